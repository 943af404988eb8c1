"""The benchmark runs, counts bytes rightly and writes what it promises; how fast things are is not tested."""

import dataclasses
import errno
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SLOW_BUT_ON_CPU, needs_cuda, needs_xla

from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError

sys.path.insert(0, str(ROOT / "launch"))
import bench
from bench_arms import Case

KEYS = "name device rows dim batch bag placement ms_median ms_min gb_per_s ratio_to_best_other".split()
SMALL = ["--rows", "300", "--batch", "32", "--repeat", "2"]


@pytest.mark.parametrize("device", SLOW_BUT_ON_CPU)
@pytest.mark.parametrize("what", ["lookup", "update", "step"])
def test_every_implementation_is_a_row_of_the_file(what, device, tmp_path):
    out = tmp_path / "bench.json"
    assert bench.main(["--what", what, "--device", device, "--bag", "3", *SMALL, "--out", str(out)]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    others = {"EmbeddingBag sparse", "EmbeddingBag dense"} if device != "xla" else {"naive torch_xla"}
    assert {f"{what} {name}" for name in ("dlrm_xla sparse", *others)} <= set(rows)
    for row in rows.values():
        assert set(KEYS) <= set(row)
        assert 0 < row["ms_min"] <= row["ms_median"]
        assert (row["gb_per_s"] is None) == (what == "step")
    ours = rows[f"{what} dlrm_xla sparse"]
    best = min(row["ms_median"] for name, row in rows.items() if "dlrm_xla" not in name)
    assert ours["ratio_to_best_other"] == pytest.approx(best / ours["ms_median"])
    assert out.with_suffix(".png").stat().st_size > 5000
    assert json.loads(out.with_suffix(".about.json").read_text())["copy_gb_per_s"][device] > 0


@needs_cuda
def test_work_is_timed_by_the_gpus_own_clock(tmp_path):
    out = tmp_path / "bench.json"
    given = ["--what", "update", "--device", "cuda", "--clock", "device", *SMALL, "--out", str(out)]
    assert bench.main(given) == 0
    assert all(0 < row["ms_min"] < 5 for row in json.loads(out.read_text())), "not what it idles"


def test_least_bytes_are_counted_on_the_ids_of_the_batches():
    case = Case("update", open_device("cpu"), (50,), 8, 16, 4, 0.0, "adagrad")
    different = np.mean([len(np.unique(ids.numpy())) for ids in case.ids()])
    lookup = 16 * 4 * 8 * 4 + 16 * 8 * 4
    assert case.least_bytes() == pytest.approx(lookup + 16 * 8 * 4 + different * 2 * (8 + 1) * 4)
    for ids in case.ids():
        assert ids.shape == (16, 4)
        assert ids.min() >= 0
        assert ids.max() < 50


def test_adam_that_is_not_lazy_moves_every_row_with_its_state():
    lazy = Case("update", open_device("cpu"), (50,), 8, 4, 1, 0.0, "adam")
    dense = dataclasses.replace(lazy, optimizer="adam_dense")
    different = np.mean([len(np.unique(ids.numpy())) for ids in lazy.ids()])
    assert dense.least_bytes() - lazy.least_bytes() == pytest.approx((50 - different) * 2 * 3 * 8 * 4)


def with_times(times, what, *flags, monkeypatch, tmp_path):
    """The rows of the implementations of these names, as if they had taken so many milliseconds."""
    monkeypatch.setattr(bench, "measure", lambda *args: {name: [ms] for name, ms in times.items()})
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 10.0)
    out = tmp_path / "bench.json"
    assert bench.main(["--what", what, *SMALL, *flags, "--out", str(out)]) == 0
    return {row["name"].removeprefix(f"{what} "): row for row in json.loads(out.read_text())}


def bars(monkeypatch):
    """A list that gets each plot's panels: a title, and the names of its bars."""
    drawn = []

    def savefig(figure, *args, **kwargs):
        drawn.append([(a.get_title(), [label.get_text() for label in a.get_yticklabels()]) for a in figure.axes])

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    return drawn


def test_a_panel_of_the_plot_names_other_optimizers(monkeypatch, tmp_path):
    drawn = bars(monkeypatch)
    times = {"dlrm_xla sparse": 4.0, "EmbeddingBag sparse": 2.0, "EmbeddingBag dense": 1.0}
    with_times(times, "update", "--optimizer", "adagrad", "adam", monkeypatch=monkeypatch, tmp_path=tmp_path)
    ((adagrad, adam),) = drawn
    assert adagrad[0].endswith("adagrad")
    assert adagrad[1] == [
        "dlrm_xla sparse",
        "EmbeddingBag sparse, adagrad_element",
        "EmbeddingBag dense, adagrad_element",
    ]
    assert adam[1] == ["dlrm_xla sparse", "EmbeddingBag sparse", "EmbeddingBag dense, adam_dense"]


def test_tables_of_both_scales_are_bars_of_one_panel(monkeypatch, tmp_path):
    drawn = bars(monkeypatch)
    times = {"dlrm_xla 1M": 4.0, "dlrm_xla 100M": 5.0}
    monkeypatch.setattr(bench.arms, "ours", lambda case, placement: lambda k: None)
    rows = with_times(times, "scale", "--rows", "300", "400", monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert rows["dlrm_xla 100M"]["ratio_to_1M"] == 1.25
    ((title, names),) = drawn[0]
    assert names == ["dlrm_xla 1M", "dlrm_xla 100M"]
    assert "1M and 100M" in title


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adagrad_element", "adam"])
def test_only_updates_by_the_same_optimizer_are_compared(optimizer, capsys, monkeypatch, tmp_path):
    times = {"dlrm_xla sparse": 4.0, "EmbeddingBag sparse": 2.0, "EmbeddingBag dense": 1.0, "naive torch_xla": 1.0}
    if optimizer in ("sgd", "adagrad"):
        times["FBGEMM"] = 8.0
    rows = with_times(times, "update", "--optimizer", optimizer, monkeypatch=monkeypatch, tmp_path=tmp_path)
    sparse = {"adagrad": "adagrad_element"}.get(optimizer, optimizer)
    dense = {"adam": "adam_dense"}.get(optimizer, sparse)
    of = {"dlrm_xla sparse": optimizer, "EmbeddingBag sparse": sparse, "EmbeddingBag dense": dense}
    of |= {"naive torch_xla": dense, "FBGEMM": optimizer}
    for name, row in rows.items():
        assert row["optimizer"] == of[name]
        assert row["optimizer_asked"] == optimizer
        others = [ms for n, ms in times.items() if n != name and "dlrm_xla" not in n and of[n] == of[name]]
        assert row["ratio_to_best_other"] == (min(others) / times[name] if others else None)
        moved = Case("update", open_device("cpu"), (300,), 16, 32, 1, 1.05, of[name]).least_bytes()
        assert row["gb_per_s"] == pytest.approx(moved / times[name] / 1e6)
    said = capsys.readouterr().out
    assert said.count(f"(not compared with {optimizer})") == sum(of[name] != optimizer for name in rows)
    looked_up = with_times(times, "lookup", "--optimizer", optimizer, monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert all(row["optimizer"] == optimizer and row["ratio_to_best_other"] for row in looked_up.values())


def test_a_step_in_bf16_is_not_compared_with_float32(capsys, monkeypatch, tmp_path):
    times = {"dlrm_xla sparse": 4.0, "dlrm_xla bf16": 1.0, "EmbeddingBag sparse": 2.0}
    rows = with_times(times, "step", monkeypatch=monkeypatch, tmp_path=tmp_path)
    ratios = {name: row["ratio_to_best_other"] for name, row in rows.items()}
    assert ratios == {"dlrm_xla sparse": 0.5, "dlrm_xla bf16": None, "EmbeddingBag sparse": None}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step dlrm_xla bf16")]
    assert line.endswith("(not compared with float32)")


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.05])
def test_ids_have_the_skew_that_was_asked_for(exponent):
    case = Case("lookup", open_device("cpu"), (1000,), 8, 50_000, 1, exponent, "sgd")
    counts = np.bincount(np.concatenate([ids.numpy().ravel() for ids in case.ids()]), minlength=1000)
    # The density is that of a continuous power law, so compare decades.
    edges = np.array([0, 9, 99, 999])
    mass = np.array([counts[a:b].sum() for a, b in itertools.pairwise(edges)]) / counts.sum()
    points = np.array([1.0, 10.0, 100.0, 1000.0])
    if exponent == 1.0:
        cumulative = np.log(points) / np.log(1001)
    else:
        cumulative = (points ** (1 - exponent) - 1) / (1001 ** (1 - exponent) - 1)
    np.testing.assert_allclose(mass, np.diff(cumulative), atol=0.01)


def test_scale_touches_the_same_ids_in_tables_of_any_size(monkeypatch):
    made = []
    monkeypatch.setattr(bench.arms, "ours", lambda case, placement: made.append(case))
    given = bench.flags().parse_args(["--what", "scale"])
    ((case, title),) = bench.cases(given, {"cpu": open_device("cpu")})
    for make in bench.implementations(case, title, given).values():
        make()
    few, many = made
    assert sum(many.table_rows) == pytest.approx(100_000_000, rel=1e-6)
    assert sum(few.table_rows) == pytest.approx(1_000_000, rel=1e-4)
    assert all((a == b).all() for a, b in zip(few.ids(), many.ids(), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("xla", marks=[needs_xla, pytest.mark.slow])])
def test_placements_are_a_step_each_with_tables_placed_so(device, tmp_path, monkeypatch):
    placed = []
    real = bench.arms.Steps

    def steps(model, lengths, device, config):
        made = real(model, lengths, device, config)
        placed.append({t.num_rows: s.placement for s in made.rows.stacks for t in s.tables})
        return made

    monkeypatch.setattr(bench.arms, "Steps", steps)
    out = tmp_path / "bench.json"
    # the kaggle preset's tables, the largest cut to 1,500 rows
    given = ["--what", "placement", "--device", device, "--rows", "1500", "--batch", "16", "--repeat", "1"]
    assert bench.main([*given, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == [f"placement dlrm_xla {m} {d}" for m, d in bench.THRESHOLDS]
    assert all(0 < row["ms_min"] <= row["ms_median"] for row in rows)
    for (matmul, dense), of_rows in zip(bench.THRESHOLDS, placed, strict=True):
        expected = {
            n: "matmul" if n <= matmul else "dense" if n <= dense else "sparse"
            for n in (min(1500, r) for r in bench.KAGGLE_ROWS)
        }
        assert of_rows == expected


def test_an_interrupted_benchmark_keeps_what_it_measured(tmp_path, capsys, monkeypatch):
    real, calls = bench.measure, []

    def measure(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(bench, "measure", measure)
    out = tmp_path / "bench.json"
    given = ["--what", "lookup", "--dim", "4", "8", "--others", "none", *SMALL, "--out", str(out)]
    assert bench.main(given) == 130
    assert {row["dim"] for row in json.loads(out.read_text())} == {4}
    assert "are kept" in capsys.readouterr().err


def test_names_of_others_are_checked_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    given = ["--what", "update", "tt", "scale", *SMALL, "--out", str(out)]
    asked = bench.flags().parse_args([*given, "--others", "EmbeddingBag sparse", "tltorch blocktt"])
    found = bench.cases(asked, {"cpu": open_device("cpu")})
    bench.check_others(asked, found)
    names = {title: set(bench.implementations(case, title, asked)) for case, title in found}
    assert names["update"] >= {"dlrm_xla sparse", "EmbeddingBag sparse"}
    assert not names["update"] & {"EmbeddingBag dense", "FBGEMM"}
    assert names["tt"] == {"dlrm_xla tensorly_tt", "tltorch blocktt"}
    assert names["scale"] == {"dlrm_xla 1M", "dlrm_xla 100M"}

    monkeypatch.setattr(bench, "rows_of", lambda *args: pytest.fail("measured"))
    assert bench.main([*given, "--others", "FBGEMM", "torchrec"]) == 2
    assert "--others: torchrec: all or none alone, or of EmbeddingBag sparse" in capsys.readouterr().err
    assert bench.main(["--what", "scale", "--others", "FBGEMM"]) == 2
    assert "--others: FBGEMM: no case here is compared with any" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["folder", "plot.json", "plot.png", "link.json", "pipe", "/"])
def test_files_that_cannot_be_written_are_told_before_anything_is_measured(name, capsys, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "plot.png").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "missing" / "bench.json")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(bench, "rows_of", lambda *args: pytest.fail("measured"))
    before = sorted(tmp_path.iterdir())
    assert bench.main(["--what", "lookup", *SMALL, "--out", str(tmp_path / name)]) == 2
    assert "error: --out: " in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", [".json", ".about.json", ".png"])
def test_a_full_disk_loses_nothing_that_was_measured(suffix, capsys, tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    real, calls = bench.rows_of, []

    def full(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def rows_of(*args):
        calls.append(1)
        if len(calls) == 2:  # room for the first case only
            real_text = Path.write_text
            fills = f"bench{suffix}.unfinished"
            monkeypatch.setattr(
                Path, "write_text", lambda path, text: full(path) if path.name == fills else real_text(path, text)
            )
            if suffix == ".png":
                monkeypatch.setattr(bench, "plot", full)
        return real(*args)

    monkeypatch.setattr(bench, "rows_of", rows_of)
    given = ["--what", "lookup", "--dim", "4", "8", "--others", "none", *SMALL, "--out", str(out)]
    assert bench.main(given) == 2
    said = capsys.readouterr()
    assert f"bench{suffix} cannot be written (No space left on device)" in said.err
    kept = {row["dim"] for row in json.loads(out.read_text())}
    assert kept == ({4} if suffix == ".json" else {4, 8}), "what was written before stays"
    if suffix != ".png":
        printed = next(json.loads(line) for line in said.out.splitlines() if line.startswith("["))
        assert {row["dim"] for row in printed} == {4, 8}
    assert not list(tmp_path.glob("*.unfinished"))


def test_what_is_missing_is_said_and_left_out(capsys, tmp_path, monkeypatch):
    def missing(case):
        raise ImportError("No module named 'fbgemm_gpu'")

    monkeypatch.setattr(bench.arms, "fbgemm", missing)
    assert bench.main(["--what", "lookup", *SMALL]) == 0
    assert "FBGEMM: not installed" in capsys.readouterr().out
    monkeypatch.undo()
    assert bench.main(["--what", "lookup", *SMALL, "--dim", "6"]) == 0
    assert "FBGEMM: takes widths in fours, not 6; left out" in capsys.readouterr().out
    assert bench.main(["--out", str(tmp_path / "no" / "b.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_another_that_cannot_run_is_told_and_the_others_go_on(capsys, tmp_path, monkeypatch):
    def torch_bag(case, sparse):
        def run(k):
            raise RuntimeError("no memory for it\nat 0x7f")

        if sparse:
            return run
        raise ValueError("no such gradient")

    monkeypatch.setattr(bench.arms, "torch_bag", torch_bag)
    out = tmp_path / "bench.json"
    assert bench.main(["--what", "update", "--dim", "4", "8", *SMALL, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("EmbeddingBag sparse: RuntimeError: no memory for it; left out") == 2
    assert said.count("EmbeddingBag dense: ValueError: no such gradient; left out") == 2
    assert "0x7f" not in said
    ours = [row["dim"] for row in json.loads(out.read_text()) if row["name"] == "update dlrm_xla sparse"]
    assert ours == [4, 8]


@pytest.mark.parametrize("error", [UserError, ImportError, RuntimeError])
def test_our_own_implementation_is_never_left_out(error, capsys, monkeypatch):
    def ours(case, placement, *more):
        raise error("it does not run")

    monkeypatch.setattr(bench.arms, "ours", ours)
    given = ["--what", "lookup", "--others", "EmbeddingBag sparse", *SMALL]
    if error is RuntimeError:
        with pytest.raises(RuntimeError, match="does not run"):
            bench.main(given)
    else:
        assert bench.main(given) == 2
        assert "it does not run" in capsys.readouterr().err


@needs_xla
@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_autograd_through_a_table_on_xla_has_its_state_from_the_start(plain, capsys, tmp_path, monkeypatch):
    if plain:

        def made_in_the_first_step(name, groups, device):
            ((parameters, rate),) = groups
            return torch.optim.Adam(parameters, lr=rate, foreach=False)

        monkeypatch.setattr(bench.arms, "dense_optimizer", made_in_the_first_step)
    out = tmp_path / "bench.json"
    given = ["--what", "update", "--device", "xla", "--dim", "4", "8", "--optimizer", "adam", *SMALL]
    assert bench.main([*given, "--out", str(out)]) == 0
    names = [row["name"] for row in json.loads(out.read_text())]
    assert names == ["update dlrm_xla sparse", *([] if plain else ["update naive torch_xla"])] * 2
    assert ("naive torch_xla: the update step leaves 2 new tensors" in capsys.readouterr().out) == plain


def test_tensor_trains_are_compared_with_tensorly_torchs(tmp_path):
    pytest.importorskip("tltorch")
    out = tmp_path / "tt.json"
    flags = ["--what", "tt", "--rows", "4096", "--dim", "8", "--rank", "4", "--batch", "16", "--repeat", "2"]
    assert bench.main([*flags, "--out", str(out)]) == 0
    names = [row["name"] for row in json.loads(out.read_text())]
    assert names == ["tt dlrm_xla tensorly_tt", "tt tltorch blocktt"]


def test_steps_with_plugins_are_measured_against_exact_tables(tmp_path, capsys):
    out = tmp_path / "bench.json"
    given = ["--what", "plugins", "--plugin", "hash_rows", "low_rank", "--ratio", "30"]
    assert bench.main([*given, "--rows", "9000", "--batch", "32", "--repeat", "2", "--out", str(out)]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"plugins dlrm_xla exact", "plugins dlrm_xla hash_rows"}
    hashed, exact = rows["plugins dlrm_xla hash_rows"], rows["plugins dlrm_xla exact"]
    assert hashed["ratio_to_exact"] == pytest.approx(hashed["ms_median"] / exact["ms_median"])
    assert "low_rank takes at least" in capsys.readouterr().out, "a plugin that cannot be so small is left out aloud"
