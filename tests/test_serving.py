"""What a checkpoint is good for after training: predictions, programs, and weights of the reference's script."""

import importlib.util
import json
import re

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import launch_script, needs_xla
from sklearn.metrics import roc_auc_score
from torch import nn

from dlrm_xla import registry, serving
from dlrm_xla.contract import Table
from dlrm_xla.errors import UserError
from dlrm_xla.export import export, store
from dlrm_xla.plan import bytes_kept
from dlrm_xla.rows import RowTable

launcher = launch_script("run")
# torch's and torch_xla's own warning, while they load what they wrote
LOADS = pytest.mark.filterwarnings("ignore:The given buffer is not writable")
QUICK = ["--synthetic-rows", "7000", "--min-count", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert launcher.main([*QUICK, "--plugin", "tensorly_tt:rank=2", "--out", str(out)]) == 0
    return out


def test_predictions_of_a_checkpoint_are_those_that_were_reported(run, tmp_path, capsys):
    best, out = run / "checkpoints" / "best.safetensors", tmp_path / "p.parquet"
    assert launcher.main(["--evaluate", str(best), "--out", str(out)]) == 0
    assert capsys.readouterr().err == ""
    columns = pyarrow.parquet.read_table(out).to_pydict()
    assert columns["row"] == list(range(6000, 6500)), "the first half of the last day"
    report = json.loads((run / "report.json").read_text())
    assert roc_auc_score(columns["label"], columns["probability"]) == pytest.approx(report["auc"], abs=1e-9)
    logits = np.array(columns["logit"])
    np.testing.assert_allclose(columns["probability"], 1 / (1 + np.exp(-logits)), rtol=1e-6)
    assert launcher.main(["--evaluate", str(best), "--split", "train", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    out.unlink()
    assert launcher.main(["--evaluate", str(best), "--split", "train", "--out", str(out)]) == 0
    assert "100% of the train rows occur in the training rows too" in capsys.readouterr().err
    columns = pyarrow.parquet.read_table(out).to_pydict()
    # Rows that the model learned from, in their own order: shuffled ones would give 0.5.
    assert roc_auc_score(columns["label"], columns["logit"]) > 0.55


def test_rows_whose_ids_mean_something_else_are_refused(run, tmp_path, capsys):
    best = run / "checkpoints" / "best.safetensors"
    assert launcher.main(["--evaluate", str(best), "--seed", "5", "--out", str(tmp_path / "p")]) == 2
    assert "ids that mean something else" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def _described(spec):
    return {
        "model": {
            "num_dense": 3,
            "bag_lengths": [1, 3, 2],
            "tables": [{"name": n, "rows": r, "dim": 8, "plugin": spec} for n, r in (("a", 30), ("b", 999), ("c", 80))],
            "bottom": [4],
            "top": [4],
            "interaction": "dot",
            "cross_layers": 1,
            "cross_rank": 1,
            "seed": 0,
        },
        "step": 5,
    }


def _inputs(batch):
    rng = np.random.default_rng(batch)
    ids = [rng.integers(0, rows, (batch, length)) for rows, length in ((30, 1), (999, 3), (80, 2))]
    dense = torch.from_numpy(rng.normal(size=(batch, 3)).astype(np.float32))
    return dense, torch.from_numpy(np.concatenate(ids, 1).astype(np.int32))


CHOSEN = ["exact", "hot_cold+hash_rows:rows=9"]
OTHERS = [
    *sorted(registry.installed()),
    *("tensorly_tt:rank=12", "hash_rows:rows=20+int8", "random_projection:dim=2", "pq:bits=3"),
]


@needs_xla
@LOADS
@pytest.mark.parametrize("spec", [*CHOSEN, *(pytest.param(spec, marks=pytest.mark.slow) for spec in OTHERS)])
def test_exported_programs_give_the_models_probabilities(spec, tmp_path):
    from torch_xla.stablehlo import StableHLOGraphModule

    about = _described(spec)
    scorer = serving.Scorer(serving.build(about["model"]), about["model"]["bag_lengths"])
    export(scorer, about, tmp_path, batch=6)
    with torch.no_grad():
        expected = {batch: scorer(*_inputs(batch)) for batch in (1, 6, 11)}
        # Of ids that tables have not, as of values that training saw too rarely for a row.
        dense, ids = _inputs(6)
        ids[0, 0] = ids[1, 2] = ids[2, 5] = 0
        beyond = ids.clone()
        beyond[0, 0], beyond[1, 2], beyond[2, 5] = 30, 2**31 - 1, -1
        assert torch.equal(scorer(dense, beyond), scorer(dense, ids))
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch, probabilities in expected.items():
        torch.testing.assert_close(program(*_inputs(batch)), probabilities, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(program(dense, beyond), program(dense, ids), atol=0, rtol=0)
    assert not program(dense, ids).requires_grad
    stablehlo = StableHLOGraphModule.load(str(tmp_path / "stablehlo"))
    found = torch.as_tensor(np.asarray(stablehlo(*_inputs(6)).cpu()))
    torch.testing.assert_close(found, expected[6], atol=1e-6, rtol=1e-5)
    assert torch.equal(stablehlo(dense, beyond).cpu(), stablehlo(dense, ids).cpu())


@needs_xla
@LOADS
@pytest.mark.parametrize("spec", ["exact", "hash_rows:rows=20", "hot_cold:hot=9+hash_rows:rows=9"])
def test_programs_of_rows_in_bfloat16(spec, tmp_path):
    from torch_xla.stablehlo import StableHLOGraphModule

    about = _described(spec)
    scorer = serving.Scorer(serving.build(about["model"], torch.bfloat16), about["model"]["bag_lengths"]).eval()
    with torch.no_grad():
        expected = scorer(*_inputs(6))
    assert export(scorer, about, tmp_path / "e", batch=6) == ["model.pt2", "stablehlo", "interface.json"]
    program = torch.export.load(tmp_path / "e" / "model.pt2").module()
    assert torch.bfloat16 in {buffer.dtype for buffer in program.buffers()}
    stablehlo = StableHLOGraphModule.load(str(tmp_path / "e" / "stablehlo"))
    for found in (program(*_inputs(6)), stablehlo(*_inputs(6)).cpu()):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@needs_xla
def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    about = _described("exact")

    def scorer():
        return serving.Scorer(serving.build(about["model"]), about["model"]["bag_lengths"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dlrm_xla.xla_export.save_stablehlo", full)
    with pytest.raises(UserError, match=r"cannot write .*e: No space left on device"):
        export(scorer(), about, tmp_path / "e", batch=6)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    export(scorer(), about, tmp_path / "e", batch=6)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@needs_xla
def test_a_program_is_as_small_as_what_is_served(tmp_path):
    about = _described("hash_rows:rows=100000+int4")
    about["model"]["tables"] = [{"name": "a", "rows": 900_000, "dim": 16, "plugin": "hash_rows:rows=100000+int4"}]
    about["model"]["bag_lengths"] = [1]
    model = serving.build(about["model"])
    kept = bytes_kept(model.bags)
    assert kept == 100_000 * (16 // 2 + 2)
    export(serving.Scorer(model, [1]), about, tmp_path, batch=6)
    for path in (tmp_path / "model.pt2", tmp_path / "stablehlo"):
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        assert kept < sum(p.stat().st_size for p in files) < 1.2 * kept, path


def test_a_bag_of_two_names_is_stored_once_and_one_that_only_counts_is_refused():
    model = nn.Module()
    model.a = model.b = registry.compose(registry.parse("int4"), RowTable)(Table("t", 50, 8))
    store(model)
    assert model.a is model.b
    assert not list(model.parameters())

    class Counts(nn.Module):
        def bytes_to_serve(self):
            return 5

    model.c = Counts()
    assert bytes_kept(model.c) == 5
    with pytest.raises(UserError, match="it has no served"):
        store(model)


@LOADS
def test_a_checkpoint_is_exported_from_the_command_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("synthetic_tables: [30, 2000, 40]\nbottom: [8]\ntop: [8]\n")
    flags = ["--config", str(tmp_path / "c.yaml"), "--plugin", "tensorly_tt:rank=2", "--out", str(tmp_path / "run")]
    assert launcher.main([*QUICK, *flags]) == 0
    best = tmp_path / "run" / "checkpoints" / "best.safetensors"
    assert launcher.main(["--export", str(best), "--out", str(tmp_path / "e")]) == 0
    scorer, _ = serving.load(best)
    program = torch.export.load(tmp_path / "e" / "model.pt2").module()
    inputs = torch.rand(4, 13), torch.randint(0, 30, (4, 3), dtype=torch.int32)
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs), scorer(*inputs), atol=1e-6, rtol=1e-5)
    assert launcher.main(["--export", str(best), "--out", str(tmp_path / "e")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert launcher.main(["--export", str(best), "--out", str(tmp_path / "one"), "--batch-size", "1"]) == 0
    program = torch.export.load(tmp_path / "one" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs), scorer(*inputs), atol=1e-6, rtol=1e-5)


def test_how_a_model_was_trained_does_not_bind_who_scores_it(tmp_path):
    pytest.importorskip("fbgemm_gpu")
    (tmp_path / "c.yaml").write_text("row_kernels: fbgemm\nmicro_batches: 4\nbatch_size: 256\n")
    out = tmp_path / "run"
    assert launcher.main([*QUICK, "--config", str(tmp_path / "c.yaml"), "--out", str(out)]) == 0
    best = str(out / "checkpoints" / "best.safetensors")
    flags = ["--batch-size", "1001", "--out", str(tmp_path / "p.parquet")]
    assert launcher.main(["--evaluate", best, *flags]) == 0
    if importlib.util.find_spec("torch_xla"):
        assert launcher.main(["--evaluate", best, "--device", "xla"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluate", "--plugin", "hash_rows"], "--plugin would change nothing"),
        (["--export", "--device", "xla"], "--device would change nothing"),
        (["--export", "--batch-size", "-3"], "needs at least 1 sample"),
        (["--export", "--batch-size", "0"], "needs at least 1 sample"),
    ],
)
def test_flags_that_a_checkpoint_cannot_follow_are_refused(run, tmp_path, capsys, flags, message):
    best = str(run / "checkpoints" / "best.safetensors")
    assert launcher.main([flags[0], best, *flags[1:], "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_command_at_a_time(capsys):
    with pytest.raises(SystemExit, match="2"):
        launcher.main(["--evaluate", "a", "--export", "a"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_run_folder_is_no_checkpoint_but_has_one(run, tmp_path, capsys):
    for flags in (["--evaluate", str(run)], ["--export", str(run)]):
        assert launcher.main(flags) == 2
        assert f"give its {run / 'checkpoints' / 'best.safetensors'}" in capsys.readouterr().err
    best = str(run / "checkpoints" / "best.safetensors")
    assert launcher.main(["--evaluate", best, "--out", str(tmp_path / "none" / "p.parquet")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_data_of_other_tables_is_refused(run, tmp_path, capsys):
    best = str(run / "checkpoints" / "best.safetensors")
    assert launcher.main(["--evaluate", best, "--min-count", "9", "--out", str(tmp_path / "p")]) == 2
    assert re.search("rows there and here: C1 .* Give --data the rows", capsys.readouterr().err)
    with pytest.raises(UserError, match="the model has 3 tables, the data 26"):
        serving.check_tables(_described("exact")["model"], [5] * 26)


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    for flag in ("--evaluate", "--export"):
        assert launcher.main([flag, str(tmp_path / "none")]) == 2
        assert "cannot read the checkpoint" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot read"):
        serving.load(tmp_path / "none")
