"""The model against the reference's own steps and against numpy by hand."""

import numpy as np
import pytest
import torch
from conftest import EVERY_DEVICE, needs_xla

from dlrm_xla.batches import PackedBatch
from dlrm_xla.config import resolve
from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.model import DLRM
from dlrm_xla.rows import RowTable
from dlrm_xla.steps import Steps


def _to_reference(name: str) -> str:
    for ours, theirs in (("bottom.", "bot_l."), ("top.", "top_l."), ("bags.", "emb_l.")):
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize(
    ("device", "loss_error", "weight_error"), [("cpu", 1e-5, 1e-4), pytest.param("xla", 1e-4, 1e-3, marks=needs_xla)]
)
def test_twenty_sgd_steps_of_the_reference(reference_steps, device, loss_error, weight_error):
    steps = reference_steps
    tables = [Table(f"C{k}", len(steps[f"initial.emb_l.{k}.weight"]), 16) for k in range(4)]
    model = DLRM(13, tables, [RowTable] * 4, bottom=[64, 32], top=[32, 16])
    state = {n: torch.from_numpy(steps[f"initial.{_to_reference(n)}"].copy()) for n in model.state_dict()}
    model.load_state_dict(state)
    config, _ = resolve({"preset": "kaggle", "batch_size": 128, "dense_lr": 0.1, "row_lr": 0.1}, None)
    ours = Steps(model, [3] * 4, open_device(device), config)
    for k in range(20):
        ids = steps["ids"][k].transpose(1, 0, 2).reshape(128, 12)
        ours.train(
            PackedBatch(
                *(torch.from_numpy(np.ascontiguousarray(a)) for a in (steps["dense"][k], ids, steps["labels"][k]))
            ),
            k,
        )
        assert ours.mean_loss() == pytest.approx(steps["losses"][k], abs=loss_error), f"step {k}"
    for name, value in [*ours.model.state_dict().items(), *ours.rows.tables()]:
        expected = steps[f"final.{_to_reference(name)}"]
        np.testing.assert_allclose(value.cpu().numpy(), expected, atol=weight_error, rtol=0, err_msg=name)


class NumpyDLRM:
    """Forward, backward and SGD by hand for the concatenated and the cross interaction; bags of one id."""

    def __init__(self, state: dict[str, np.ndarray], num_tables: int, cross: int) -> None:
        self.p = {k: v.astype(np.float64) for k, v in state.items()}
        self.num_tables, self.cross = num_tables, cross

    def _mlp(self, part: str, x: np.ndarray, relu_last: bool) -> list[tuple[str, np.ndarray, np.ndarray]]:
        names = sorted({k.rsplit(".", 1)[0] for k in self.p if k.startswith(part)}, key=lambda n: int(n.split(".")[1]))
        trace = []
        for n in names:
            y = x @ self.p[f"{n}.weight"].T + self.p[f"{n}.bias"]
            mask = np.ones_like(y) if n == names[-1] and not relu_last else (y > 0).astype(float)
            trace.append((n, x, mask))
            x = y * mask
        self.out = x
        return trace

    def _mlp_back(self, trace, d, grads):
        for n, x, mask in reversed(trace):
            d = d * mask
            grads[f"{n}.weight"], grads[f"{n}.bias"] = d.T @ x, d.sum(0)
            d = d @ self.p[f"{n}.weight"]
        return d

    def step(self, dense, ids, labels, lr):
        p, grads = self.p, {}
        bottom = self._mlp("bottom", dense.astype(np.float64), True)
        x0 = np.concatenate([self.out] + [p[f"bags.{f}.weight"][ids[:, f]] for f in range(self.num_tables)], 1)
        xs, x = [x0], x0
        for k in range(self.cross):
            u = x @ p[f"interaction.v.{k}.weight"].T
            x = x0 * (u @ p[f"interaction.w.{k}.weight"].T + p[f"interaction.w.{k}.bias"]) + x
            xs.append(x)
        top = self._mlp("top", x, False)
        z = self.out[:, 0]
        loss = np.mean(np.logaddexp(0, z) - labels * z)
        d = self._mlp_back(top, ((1 / (1 + np.exp(-z)) - labels) / len(z))[:, None], grads)
        d0 = np.zeros_like(x0)
        for k in reversed(range(self.cross)):
            v, w, x = p[f"interaction.v.{k}.weight"], p[f"interaction.w.{k}.weight"], xs[k]
            u = x @ v.T
            inside = d * x0
            grads[f"interaction.w.{k}.weight"], grads[f"interaction.w.{k}.bias"] = inside.T @ u, inside.sum(0)
            grads[f"interaction.v.{k}.weight"] = (inside @ w).T @ x
            d0 += d * (u @ w.T + p[f"interaction.w.{k}.bias"])
            d = d + inside @ w @ v
        d = d + d0
        dim = d.shape[1] // (self.num_tables + 1)
        self._mlp_back(bottom, d[:, :dim], grads)
        for f in range(self.num_tables):
            grads[f"bags.{f}.weight"] = np.zeros_like(p[f"bags.{f}.weight"])
            np.add.at(grads[f"bags.{f}.weight"], ids[:, f], d[:, (f + 1) * dim : (f + 2) * dim])
        for k in p:
            p[k] -= lr * grads[k]
        return loss


@pytest.mark.parametrize(("interaction", "cross"), [("cat", 0), ("dcn", 2)])
@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_other_interactions_equal_numpy_by_hand(interaction, cross, device):
    rng = np.random.default_rng(1)
    tables = [Table("a", 7, 8), Table("b", 40, 8)]
    kwargs = {"cross_layers": cross, "cross_rank": 5} if cross else {}
    model = DLRM(3, tables, [RowTable] * 2, bottom=[12], top=[10], interaction=interaction, **kwargs)
    by_hand = NumpyDLRM({k: v.numpy().copy() for k, v in model.state_dict().items()}, 2, cross)
    config, _ = resolve({"preset": "kaggle", "batch_size": 32, "dense_lr": 0.1, "row_lr": 0.1}, None)
    steps = Steps(model, [1, 1], open_device(device), config)
    for k in range(10):
        dense = rng.normal(size=(32, 3)).astype(np.float32)
        ids = np.stack([rng.integers(0, 7, 32), rng.integers(0, 40, 32)], 1).astype(np.int32)
        labels = rng.integers(0, 2, 32).astype(np.float32)
        steps.train(PackedBatch(*(torch.from_numpy(a) for a in (dense, ids, labels))), k)
        assert steps.mean_loss() == pytest.approx(by_hand.step(dense, ids, labels, 0.1), abs=1e-5)
    for name, value in [*steps.model.state_dict().items(), *steps.rows.tables()]:
        np.testing.assert_allclose(value.cpu().numpy(), by_hand.p[name], atol=1e-5, rtol=1e-4, err_msg=name)


def test_initial_values_are_the_references():
    model = DLRM(13, [Table("a", 2500, 16)], [RowTable], bottom=[512, 256], top=[512])
    weight, bias = model.bottom[2].weight, model.bottom[2].bias
    assert weight.std().item() == pytest.approx((2 / (256 + 512)) ** 0.5, rel=0.05)
    assert bias.std().item() == pytest.approx((1 / 256) ** 0.5, rel=0.2)
    rows = model.bags[0].weight
    assert rows.abs().max().item() == pytest.approx(1 / 50, rel=0.01)
    assert rows.std().item() == pytest.approx(1 / 50 / 3**0.5, rel=0.05)


def test_parts_start_alike_whatever_stands_beside_them():
    tables = [Table("a", 30, 4), Table("b", 50, 4)]

    def other(table):
        torch.rand(1000)
        return RowTable(table)

    plain = DLRM(3, tables, [RowTable, RowTable], bottom=[8], top=[8], seed=4)
    mixed = DLRM(3, tables, [other, RowTable], bottom=[8], top=[8], seed=4)
    assert torch.equal(plain.top[0].weight, mixed.top[0].weight)
    assert torch.equal(plain.bags[1].weight, mixed.bags[1].weight)
    assert not torch.equal(plain.bags[0].weight, mixed.bags[0].weight)


def test_padded_samples_count_for_nothing():
    tables = [Table("a", 30, 4)]
    config, _ = resolve({"preset": "kaggle", "batch_size": 8}, None)
    results = []
    for padding in (0.0, 5.0):
        steps = Steps(DLRM(3, tables, [RowTable], bottom=[8], top=[8]), [2], open_device("cpu"), config)
        generator = torch.Generator().manual_seed(2)
        dense = torch.randn(8, 3, generator=generator)
        ids = torch.randint(0, 30, (8, 2), generator=generator, dtype=torch.int32)
        labels = torch.tensor([0.0, 1, 1, 0, 1, -1, -1, -1])
        dense[5:] = padding
        ids[5:] = int(padding)
        steps.train(PackedBatch(dense, ids, labels), 0)
        results.append(
            (
                steps.mean_loss(),
                [*(p.detach().clone() for p in steps.model.parameters()), *(r.clone() for _, r in steps.rows.tables())],
            )
        )
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
