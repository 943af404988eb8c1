"""launch/compress.py on trained runs: what it writes, what it goes on from, what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from conftest import install, launch_script
from safetensors.torch import load_file

from dlrm_xla import serving
from dlrm_xla.devices import open_device
from dlrm_xla.tensor_file import Section, opened, write

launcher, compress = launch_script("run"), launch_script("compress")
SETTINGS = {
    "synthetic_tables": [30, 400, 200],
    "synthetic_rows": 3000,
    "bottom": [8],
    "top": [8],
    "dim": 8,
    "batch_size": 128,
    "min_count": 0,
    "min_rows": 100,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.yaml").write_text(yaml.safe_dump(SETTINGS))
    assert launcher.main(["--device", "cpu", "--config", str(folder / "c.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run" / "checkpoints" / "best.safetensors"


def _report(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_compressed_run_is_a_run(trained, tmp_path, capsys):
    out = tmp_path / "small"
    assert compress.main([str(trained), "--plugin", "svd:rank=3", "--out", str(out)]) == 0
    assert "C2        svd:rank=3: error 0." in capsys.readouterr().out
    report = _report(out)
    assert [t["plugin"] for t in report["compression"]] == ["exact", "svd:rank=3", "svd:rank=3"]
    assert report["embedding_bytes"] == 4 * (30 * 8 + (400 + 200 + 2 * 8) * 3)
    assert report["auc"] == report["after"]["test"]["auc"]
    source, small = load_file(trained), load_file(out / "checkpoints" / "best.safetensors")
    weight = source["model.bags.1.weight"]
    dataset, _ = launcher.open_data(compress.resolve(SETTINGS, None)[0])
    lookups = compress.lookups(dataset, 1, 400)
    start, stop = dataset.splits["train"]
    np.testing.assert_array_equal(lookups, np.bincount(dataset.ids[start:stop, 1], minlength=400))
    vectors = torch.linalg.svd(weight * lookups.sqrt().unsqueeze(1), full_matrices=False).Vh[:3]
    rows = small["model.bags.1.bag.weight"] @ small["model.bags.1.matrix"]
    torch.testing.assert_close(rows, weight @ vectors.T @ vectors, atol=1e-4, rtol=0)
    torch.testing.assert_close(small["model.bags.0.weight"], source["model.bags.0.weight"])

    best = str(out / "checkpoints" / "best.safetensors")
    assert launcher.main(["--evaluate", best, "--out", str(tmp_path / "p.parquet")]) == 0
    assert f"{report['auc']:.4f}" in capsys.readouterr().out, "scored as it was when it was compressed"
    assert launcher.main(["--export", best, "--out", str(tmp_path / "program"), "--batch-size", "4"]) == 0
    assert launcher.main(["--resume", str(out)]) == 0
    assert _report(out)["steps"] > 0


def test_lookups_of_bags_count_every_id_of_a_bag():
    dataset, _ = launcher.open_data(compress.resolve({**SETTINGS, "synthetic_bags": [1, 3, 2]}, None)[0])
    start, stop = dataset.splits["train"]
    ids = dataset.ids[start:stop]
    # As preparation with --multi-hot counts: the first id of each bag.
    counts = [np.bincount(ids[:, slot], minlength=n)[1:] for slot, n in ((0, 30), (1, 400), (4, 200))]
    dataset = dataclasses.replace(dataset, counts=counts)
    for feature, (first, stop, rows) in enumerate([(0, 1, 30), (1, 4, 400), (4, 6, 150)]):
        expected = np.bincount(np.where(ids < rows, ids, 0)[:, first:stop].ravel(), minlength=rows)
        np.testing.assert_array_equal(compress.lookups(dataset, feature, rows), expected)


def test_large_tables_stay_in_the_checkpoint_while_it_is_scored(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("dlrm_xla.serving.LEAST_FILE_BYTES", 400 * 8 * 4)
    with opened(trained) as file:
        about = json.loads(file.about["about"])
        model = serving.build_mapped(about["model"], file, open_device("cpu"))
        mapped = [bag.weight.data_ptr() for bag in model.bags.children() if bag.file_backed]
        assert mapped == [file.tensor("model.bags.1.weight").data_ptr()]
    assert compress.main([str(trained), "--plugin", "svd:rank=7", "--out", str(tmp_path / "small")]) == 0
    assert _report(tmp_path / "small")["before"]["test"]["auc"] == _report(trained.parent.parent)["auc"]


def test_rows_that_are_not_finite_are_refused_before_anything_is_done(trained, tmp_path, capsys):
    with opened(trained) as file:
        tensors = {name: file.tensor(name).clone() for name in file.names}
        about = dict(file.about)
    tensors["model.bags.1.weight"][3, 2] = torch.nan
    bad = tmp_path / "bad.safetensors"
    del about["sha256"]
    write(bad, [Section([(n, t.shape)], t.dtype, [t]) for n, t in tensors.items()], about)
    assert compress.main([str(bad), "--plugin", "svd:rank=2", "--out", str(tmp_path / "out")]) == 2
    assert "table C2: row 3 is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fine_tuning_keeps_what_was_compressed_where_training_makes_it_worse(trained, tmp_path, capsys):
    out = tmp_path / "tuned"
    arguments = ["--plugin", "hash_rows:rows=50", "--out", str(out), "--fine-tune", "1"]
    assert compress.main([str(trained), *arguments, "--row-lr", "50", "--dense-lr", "1"]) == 0
    compressed, tuned = json.loads((out / "compression.json").read_text()), _report(out)
    assert tuned["best_step"] == 0
    assert tuned["auc"] == pytest.approx(compressed["auc"], abs=1e-6)
    assert "fine-tuned" in capsys.readouterr().out


def test_fine_tuning_has_a_schedule_of_its_own():
    config, _ = compress.resolve({**SETTINGS, "warmup_steps": 1000, "decay_start": 2000, "decay_steps": 500}, None)
    about = {"config": dataclasses.asdict(config)}

    def schedule(*arguments):
        given = vars(compress.flags().parse_args(["x", "--plugin", "svd", *arguments]))
        fine_tune = [given.pop(name) for name in ("checkpoint", "weigh", "fine_tune")][-1]
        found, origins = compress._settings(about, given, fine_tune)
        return (found.warmup_steps, found.decay_start, found.decay_steps), origins

    assert schedule()[0] == (1000, 2000, 500)
    found, origins = schedule("--fine-tune", "1")
    assert found == (0, 0, 0)
    assert {origins[name] for name in ("warmup_steps", "row_lr", "patience", "epochs")} == {"--fine-tune"}
    assert [origins[name] for name in ("plugin", "dim")] == ["flag", "the checkpoint"]
    given = ["--fine-tune", "1", "--warmup-steps", "5", "--decay-start", "7", "--decay-steps", "9"]
    assert schedule(*given)[0] == (5, 7, 9)


def test_stopped_while_it_trains_on_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    out = tmp_path / "my run"
    out.mkdir()
    (out / "config.yaml").touch()
    monkeypatch.setattr(compress, "compress", stopped)
    assert compress.main(["x.safetensors", "--plugin", "svd", "--out", str(out)]) == 130
    assert f"launch/run.py --resume '{out}' goes on" in capsys.readouterr().err


def test_stopped_it_goes_on_after_the_last_finished_table(trained, tmp_path, monkeypatch, capsys):
    out, arguments = tmp_path / "stopped", ["--plugin", "pq:bits=2", "--weigh", "alike"]
    asked = []

    def until_the_third(bag, rows, fit=compress.set_table):
        asked.append(rows.num_rows)
        if len(asked) == 3:
            raise KeyboardInterrupt
        fit(bag, rows)

    monkeypatch.setattr(compress, "set_table", until_the_third)
    assert compress.main([str(trained), *arguments, "--out", str(out)]) == 130
    assert "goes on after the last table" in capsys.readouterr().err
    (out / "config.yaml").touch()  # as when it was killed while it wrote its checkpoint
    assert launch_script("run").main(["--resume", str(out)]) == 2
    assert "launch/compress.py was stopped there; the same command goes on" in capsys.readouterr().err
    assert compress.main([str(trained), "--plugin", "pq:bits=3", "--out", str(out)]) == 2
    assert "of another compression" in capsys.readouterr().err
    assert compress.main([str(trained), *arguments, "--out", str(out)]) == 0
    assert asked == [30, 400, 200, 30, 200], "finished tables are not done again; the first is only copied"
    monkeypatch.undo()
    assert compress.main([str(trained), *arguments, "--out", str(tmp_path / "whole")]) == 0
    one, other = (load_file(f / "checkpoints" / "last.safetensors") for f in (out, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other if name.startswith("model."))
    assert compress.main([str(trained), *arguments, "--out", str(out)]) == 2
    assert "already holds files" in capsys.readouterr().err


def test_weights_of_the_reference_script_are_a_source(small_log, tmp_path, capsys):
    convert = launch_script("convert")
    data = ["--data", str(small_log), "--min-count", "0"]
    common = ["--device", "cpu", "--dim", "8", "--min-rows", "10", *data]
    assert launcher.main([*common, "--out", str(tmp_path / "run")]) == 0
    file = tmp_path / "dlrm.pt"
    best = tmp_path / "run" / "checkpoints" / "best.safetensors"
    assert convert.main(["--to-reference", str(best), "--out", str(file)]) == 0
    arguments = ["--plugin", "svd:rank=7", "--min-rows", "10", *data, "--out", str(tmp_path / "small")]
    assert compress.main([str(file), *arguments]) == 0
    assert "does not know its training rows" in capsys.readouterr().err
    assert _report(tmp_path / "small")["before"]["test"]["auc"] == pytest.approx(
        _report(tmp_path / "run")["auc"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plugin", "exact"], "name what shall replace"),
        (["--plugin", "svd:rank=9"], "rank is 9, but must be from 1 to 7"),
        (["--plugin", "svd", "--ratio", "1000"], "is within its reach"),
        (["--plugin", "svd:rank=3", "--min-rows", "1000"], "would replace no table"),
        (["--plugin", "robe:blocks=20"], "robe:blocks=20 cannot be made from a trained table: "),
        (["--plugin", "svd", "--fine-tune", "-1"], "must be 0 or more"),
        (["--plugin", "svd", "--seed", "5"], "rows would mean something else"),
        (["--plugin", "tensorly_cp:block=true,rank=2"], "leave block out"),
    ],
)
def test_bad_input_is_refused(trained, tmp_path, capsys, arguments, message):
    assert compress.main([str(trained), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("around", ["", "svd:rank=3+", "hot_cold:hot=20+svd:rank=3+"])
def test_a_layer_that_takes_no_rows_is_named_before_any_are_read(trained, tmp_path, capsys, monkeypatch, around):
    def read(*_):
        raise AssertionError("rows are read")

    monkeypatch.setattr(compress, "check_rows", read)
    monkeypatch.setattr(compress, "scores", read)
    arguments = ["--plugin", f"{around}robe:blocks=20,width=1", "--out", str(tmp_path / "out")]
    assert compress.main([str(trained), *arguments]) == 2
    assert "error: robe:blocks=20,width=1 cannot be made from a trained table: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "table C2, spoils: set_table() of _Spoils fails on 400 rows of 8: ValueError: no"),
        (torch.nan, "table C2: spoils made of it gives rows that are not finite"),
    ],
)
def test_a_plugin_that_cannot_take_rows_over_is_told_with_the_table(
    trained, tmp_path, capsys, monkeypatch, value, message
):
    class _Spoils(torch.nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.row = torch.nn.Parameter(torch.zeros(1, dim))

        def forward(self, ids_BL, weights_BL):
            return weights_BL.sum(1, keepdim=True) * self.row

        def set_table(self, rows):
            if value is None:
                raise ValueError("no")
            with torch.no_grad():
                self.row.fill_(value)

    def spoils(table, inner):
        return _Spoils(table.dim)

    install(monkeypatch, spoils)
    assert compress.main([str(trained), "--plugin", "spoils", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_data_damaged_rows_and_compressed_sources_are_refused(trained, small_log, tmp_path, capsys):
    arguments = ["--plugin", "svd:rank=2", "--out", str(tmp_path / "out")]
    assert compress.main([str(trained), *arguments, "--data", str(small_log)]) == 2
    assert "the model has 3 tables, the data 26" in capsys.readouterr().err
    assert compress.main([str(trained.parent.parent), *arguments]) == 2
    assert f"is a run folder: give its {trained}" in capsys.readouterr().err
    assert compress.main([str(tmp_path / "none.safetensors"), *arguments]) == 2
    assert "cannot read the checkpoint" in capsys.readouterr().err
    (tmp_path / "dlrm.pt").write_bytes(b"no weights")
    assert compress.main([str(tmp_path / "dlrm.pt"), *arguments]) == 2
    assert "it is damaged, or has something else than tensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
