"""Weights of the facebookresearch/dlrm script: its own numbers come out, its names come back, pickles do not run."""

import os
import pickle

import numpy as np
import pytest
import torch
from conftest import launch_script

from dlrm_xla import checkpoint, serving
from dlrm_xla.batches import PackedBatch, unpack

convert = launch_script("convert")


def _saved(state, path, **more):
    # As dlrm_s_pytorch.py does with --save-model: losses and accuracies are sums of numpy's numbers.
    loss, right = np.float32(0.51) * 128, np.sum(np.ones(96, np.uint8))
    numbers = {"train_loss": loss / 128, "test_acc": right / 128, "total_loss": loss, "total_accu": right}
    batches = {"iter": 20, "epoch": 0, "nepochs": 1, "nbatches": 20, "nbatches_test": 7}
    weights = [tensor.clone() for tensor in state.values()]
    optimizer = torch.optim.SGD(weights, lr=0.1).state_dict()
    torch.save({**batches, "state_dict": state, **numbers, "opt_state_dict": optimizer, **more}, path)
    return path


def _layout(sizes=(5, 9), dim=4):
    shapes = {f"emb_l.{k}.weight": (n, dim) for k, n in enumerate(sizes)}
    shapes |= {"bot_l.0.weight": (6, 3), "bot_l.0.bias": (6,), "bot_l.2.weight": (dim, 6), "bot_l.2.bias": (dim,)}
    width = dim + len(sizes) * (len(sizes) + 1) // 2
    shapes |= {"top_l.0.weight": (7, width), "top_l.0.bias": (7,), "top_l.2.weight": (1, 7), "top_l.2.bias": (1,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_weights_of_the_scripts_own_run_give_its_probabilities(reference_steps, tmp_path):
    state = {
        k.removeprefix("initial."): torch.tensor(v) for k, v in reference_steps.items() if k.startswith("initial.")
    }
    out = tmp_path / "model.safetensors"
    assert convert.main(["--from-reference", str(_saved(state, tmp_path / "ref.pt")), "--out", str(out)]) == 0
    scorer, about = serving.load(out)
    assert about["model"]["interaction"] == "dot"
    ids = torch.tensor(reference_steps["ids"][0])  # [features, batch, bag]
    packed = PackedBatch(torch.tensor(reference_steps["dense"][0]), torch.cat(list(ids), 1), torch.zeros(ids.shape[1]))
    batch = unpack(packed, [ids.shape[2]] * len(ids))
    with torch.no_grad():
        found = torch.sigmoid(scorer.model(batch.dense_BI, batch.ids, batch.weights))
    torch.testing.assert_close(found, torch.tensor(reference_steps["probabilities"][0]), atol=1e-6, rtol=1e-5)
    back = tmp_path / "new" / "back.pt"
    assert convert.main(["--to-reference", str(out), "--out", str(back)]) == 0
    again = torch.load(back, weights_only=True)["state_dict"]
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_the_scripts_names_come_back_bit_for_bit(tmp_path):
    state = _layout()
    out, back = tmp_path / "m.safetensors", tmp_path / "back.pt"
    # nn.DataParallel puts its own name before the others.
    file = _saved({f"module.{n}": t for n, t in state.items()}, tmp_path / "ref.pt")
    assert convert.main(["--from-reference", str(file), "--out", str(out)]) == 0
    assert convert.main(["--to-reference", str(out), "--out", str(back)]) == 0
    again = torch.load(back, weights_only=True)["state_dict"]
    assert list(map(str, sorted(again))) == sorted(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(("old", "new"), [(b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")])
def test_numbers_of_either_numpy_are_read(tmp_path, old, new):
    content = {"state_dict": _layout(), "losses": [t(0.5) for t in (np.float32, np.float64, np.int64, np.uint8)]}
    content["losses"].append(np.array([0.5], ">f4").view(">f4")[0])
    torch.save(content, tmp_path / "ref.pt", _use_new_zipfile_serialization=False)  # names as they are, to exchange
    (tmp_path / "ref.pt").write_bytes((tmp_path / "ref.pt").read_bytes().replace(old, new))
    found = convert.reference_weights.read(tmp_path / "ref.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in content["state_dict"].items())


def test_the_script_finds_what_it_reads_and_trains_on(tmp_path, capsys):
    out, back = tmp_path / "m.safetensors", tmp_path / "back.pt"
    assert convert.main(["--from-reference", str(_saved(_layout(), tmp_path / "ref.pt")), "--out", str(out)]) == 0
    to = ["--to-reference", str(out), "--out", str(back)]
    assert convert.main([*to, "--learning-rate", "0"]) == 2
    assert "--learning-rate is 0, but must be above 0" in capsys.readouterr().err
    assert convert.main([*to, "--learning-rate", "0.05"]) == 0
    found = torch.load(back, weights_only=True)
    # What dlrm_s_pytorch.py reads behind "Load model is specified": its last version, with --mlperf-logging too, and
    # versions before it.
    read = {"state_dict", "iter", "epoch", "nepochs", "nbatches", "nbatches_test", "train_loss", "total_loss"}
    read |= {"test_auc", "test_acc", "opt_state_dict"}
    assert set(found) == read | {"train_acc", "total_accu", "test_loss"}
    kinds = ("epoch", "nepochs", "iter", "nbatches", "nbatches_test")
    print("epoch = {:d}/{:d}, batch = {:d}/{:d}, ntbatch = {:d}".format(*(found[k] for k in kinds)))
    for loss, accuracy in (("train_loss", "train_acc"), ("test_loss", "test_acc")):
        print(f"loss = {found[loss]:.6f}, accuracy = {found[accuracy] * 100:3.3f} %")
    assert 7 % found["nbatches"] == 0, "with --inference-only it prints every so many batches"
    assert found["epoch"] == found["iter"] == 0, "it waits for a later epoch for ever, and leaves batches out in all"
    assert found["test_acc"] == found["test_auc"] == 0, "it saves only what is above it"
    assert found["total_loss"] + 1 == found["total_accu"] + 1 == 1

    weights = [torch.nn.Parameter(tensor.clone()) for tensor in found["state_dict"].values()]
    optimizer = torch.optim.SGD(weights, lr=9.0)
    optimizer.load_state_dict(found["opt_state_dict"])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight, tensor in zip(weights, found["state_dict"].values(), strict=True):
        torch.testing.assert_close(weight.detach(), tensor - 0.05)


def test_weights_that_fit_two_interactions_are_asked_about(tmp_path, capsys):
    layout = {n: t for n, t in _layout().items() if not n.startswith("emb_l.")}
    dim = len(layout["bot_l.2.weight"])
    tables = {f"emb_l.{k}.weight": torch.randn(9, dim) for k in range(2 * dim - 1)}
    layout |= tables | {"top_l.0.weight": torch.randn(len(layout["top_l.0.bias"]), 2 * dim * dim)}
    file, out = str(_saved(layout, tmp_path / "both.pt")), tmp_path / "m.safetensors"
    assert convert.main(["--from-reference", file, "--out", str(out)]) == 2
    assert "takes --interaction" in capsys.readouterr().err
    assert convert.main(["--from-reference", file, "--out", str(out), "--interaction", "cat"]) == 0
    about = checkpoint.read_about(out)
    assert about["model"]["interaction"] == about["config"]["interaction"] == "cat"


class _Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class _Number:
    """A scalar of numpy as a file may claim it to be."""

    def __init__(self, dtype, state=None, data=b"12345678"):
        self.dtype, self.state, self.data = dtype, state, data

    def __reduce__(self):
        kind = _Kind(self.dtype, self.state) if self.state else self.dtype
        return np.float32(0).__reduce__()[0], (kind, self.data)


class _Kind:
    def __init__(self, dtype, state):
        self.dtype, self.state = dtype, state

    def __reduce__(self):
        return *self.dtype.__reduce__()[:2], self.state


def test_what_cannot_be_converted_is_told_and_nothing_is_executed(tmp_path, capsys):
    quotient = {n.replace("emb_l.0.weight", "emb_l.0.weight_q"): t for n, t in _layout().items()}
    squares = {n: torch.randn(7, 4 + 6) if n == "top_l.0.weight" else t for n, t in _layout().items()}
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Malice(tmp_path / "executed"), protocol=2))
    torch.save({"state_dict": _Malice(tmp_path / "executed")}, tmp_path / "evil2.pt")
    double = np.dtype("f8")
    counted = (3, "<", None, None, None, -1, -1, 1)  # as if its 8 bytes were a reference to an object
    for k, number in enumerate(
        [_Number(np.dtype("O")), _Number(double, counted), _Number(double, (3,)), _Number(double, None, b"")]
    ):
        _saved(_layout(), tmp_path / f"number{k}.pt", train_loss=number)
    for path, match in (
        (_saved(quotient, tmp_path / "q.pt"), "no place for the weights 'emb_l.0.weight_q'"),
        (_saved(squares, tmp_path / "s.pt"), "takes 10 numbers"),
        (tmp_path / "evil.pt", "not a file of weights that is safe to load"),
        (tmp_path / "evil2.pt", "not a file of weights that is safe to load"),
        *((tmp_path / f"number{k}.pt", "not a file of weights that is safe to load") for k in range(4)),
        (tmp_path / "none.pt", "cannot read"),
    ):
        assert convert.main(["--from-reference", str(path), "--out", str(tmp_path / "m")]) == 2
        assert match in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "m").exists()


def test_a_compressed_model_has_no_place_in_the_script():
    model = serving.build(
        {
            "num_dense": 3,
            "tables": [{"name": "C1", "rows": 50, "dim": 4, "plugin": "hash_rows:rows=9"}],
            **{"bottom": [4], "top": [4], "interaction": "dot", "cross_layers": 1, "cross_rank": 1, "seed": 0},
        }
    )
    with pytest.raises(convert.UserError, match="exact tables"):
        convert.reference_weights.to_reference(model.state_dict())
