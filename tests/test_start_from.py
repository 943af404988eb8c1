"""A run that begins with the model of another, on newer rows that have the same ids."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import criteo_line, launch_script
from dlrm_xla_data.__main__ import main
from dlrm_xla_data.prepared import open_prepared, read_meta
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

launcher = launch_script("run")
SETTINGS = ["--batch-size", "128", "--min-rows", "10", "--log-every", "3"]


def prepare(log, folder, *flags):
    return main(["prepare", str(log), str(folder), "--format", "criteo", *map(str, flags)])


def tensors(run, name):
    found = load_file(run / "checkpoints" / f"{name}.safetensors")
    return {k: v for k, v in found.items() if not k.startswith("run.")}


def same(one, other):
    """Names of tensors that are equal in both."""
    return {name for name in one if name in other and np.array_equal(one[name].float(), other[name].float())}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A run on older rows, and newer rows with their ids: prepared folders, and the best checkpoint."""
    folder = tmp_path_factory.mktemp("older")
    rng = np.random.default_rng(0)
    for name, rows in (("old", 2100), ("new", 1400)):
        (folder / f"{name}.tsv").write_text("".join(criteo_line(rng) + "\n" for _ in range(rows)))
    assert prepare(folder / "old.tsv", folder / "old") == 0
    assert prepare(folder / "new.tsv", folder / "new", "--ids-of", folder / "old", "--protocol", "chronological") == 0
    (folder / "c.yaml").write_text("keep_checkpoints: 9\n")
    flags = [
        "--config",
        str(folder / "c.yaml"),
        "--data",
        str(folder / "old"),
        *SETTINGS,
        "--plugin",
        "hash_rows:rows=9",
        "--warmup-steps",
        "2",
    ]
    assert launcher.main([*flags, "--min-count", "2", "--out", str(folder / "run")]) == 0
    return folder


def start(older, out, *flags):
    best = older / "run" / "checkpoints" / "best.safetensors"
    return launcher.main(["--start-from", str(best), "--data", str(older / "new"), "--out", str(out), *flags])


def test_newer_rows_have_the_ids_of_older_ones_and_are_split(older, tmp_path, capsys):
    assert prepare(older / "new.tsv", tmp_path / "test", "--ids-of", older / "old") == 0
    assert "launch/run.py --evaluate RUN" in capsys.readouterr().out
    new, scored = open_prepared(older / "new"), open_prepared(tmp_path / "test")
    assert new.splits == {"train": (0, 1120), "validation": (1120, 1260), "test": (1260, 1400)}
    np.testing.assert_array_equal(new.ids, scored.ids)
    assert read_meta(older / "new")["options"]["protocol"] == "chronological"
    assert main(["verify", str(older / "new")]) == 0
    assert prepare(older / "new.tsv", tmp_path / "p", "--protocol", "all_test") == 2
    assert "--protocol all_test" in capsys.readouterr().err
    flags = ("--ids-of", older / "old", "--unlabelled", "--protocol", "chronological")
    assert prepare(older / "new.tsv", tmp_path / "p", *flags) == 2
    assert "Leave --protocol out" in capsys.readouterr().err


def test_a_run_begins_with_the_model_and_the_states_of_another(older, tmp_path, capsys):
    assert start(older, tmp_path / "run", "--patience", "0") == 0
    out = capsys.readouterr().out
    first, source = tensors(tmp_path / "run", "step-0000000000"), tensors(older / "run", "best")
    assert set(first) == set(source) == same(first, source)
    assert any(name.startswith("dense_optimizer.") for name in first)
    last = tensors(tmp_path / "run", "last")
    assert len(same(last, source)) < len(source) / 2
    before, report = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("before", "report"))
    assert before["started_from"] == str(older / "run" / "checkpoints" / "best.safetensors")
    assert (before["steps"], report["steps"]) == (0, 9)
    assert f"test AUC            {before['auc']:.4f} before -> {report['auc']:.4f}, of these rows" in out
    # What the older model makes of the newer rows, by another way.
    scores = ["--evaluate", str(older / "run" / "checkpoints" / "best.safetensors"), "--data", str(older / "new")]
    assert launcher.main([*scores, "--out", str(tmp_path / "scores.parquet")]) == 0
    columns = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    assert before["auc"] == pytest.approx(roc_auc_score(columns["label"], columns["logit"]), abs=1e-9)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0
    assert rows[0]["validation_log_loss"] == before["validation_log_loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "scores.parquet"]
    # An ordinary run from here on.
    assert launcher.main(["--resume", str(tmp_path / "run"), "--epochs", "3"]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 3 * 9


def test_other_optimizers_start_anew_and_say_so(older, tmp_path, capsys):
    assert start(older, tmp_path / "run", "--row-optimizer", "sgd") == 0
    assert "row_optimizer differ from the checkpoint's: all optimizers' states start anew" in capsys.readouterr().err
    first, source = tensors(tmp_path / "run", "step-0000000000"), tensors(older / "run", "best")
    model = {name for name in first if name.startswith("model.")}
    assert model == {name for name in source if name.startswith("model.")} == same(first, source) & model


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--plugin", "exact"), "table C1 is hash_rows:rows=9 in the checkpoint, but would be exact"),
        (("--seed", "5"), "seed is 0 in the checkpoint, but would be 5"),
        (("--dim", "8"), "table C1 is"),
        (("--min-count", "1"), "the model's tables are not those of the data"),
        (("--config", "c.yaml"), "--start-from takes its settings from the checkpoint and flags"),
        (("--plan",), "--plan is of a run that trains anew"),
    ],
)
def test_another_model_is_refused(older, tmp_path, capsys, flags, told):
    assert start(older, tmp_path / "run", *flags) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_ids_and_rows_to_be_scored_are_refused(older, tmp_path, capsys):
    best = str(older / "run" / "checkpoints" / "best.safetensors")
    assert prepare(older / "new.tsv", tmp_path / "own") == 0
    assert prepare(older / "new.tsv", tmp_path / "scored", "--ids-of", older / "old") == 0
    for data, told in (
        (["--data", str(tmp_path / "own")], "the model's tables are not those of the data"),
        (["--data", str(tmp_path / "scored")], "it has no training rows"),
        ([], "give --data, the rows to train on"),
    ):
        assert launcher.main(["--start-from", best, *data, "--out", str(tmp_path / "run")]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_stopped_before_its_first_checkpoint_leaves_no_run(older, tmp_path, monkeypatch):
    monkeypatch.setattr("first_checkpoint.shutil.copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert start(older, tmp_path / "run") == 130
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert start(older, tmp_path / "run") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
