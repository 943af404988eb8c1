"""Studies: files read and refused, cells run, resumed and recorded."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT, launch_script, made_up_run

pytest.importorskip("optuna")
pytest.importorskip("scipy")

from dlrm_xla_studies import conduct, feasible, figures, grid, results, runner
from dlrm_xla_studies.feasible import Forecast
from dlrm_xla_studies.folders import folder_of
from dlrm_xla_studies.progress import Estimate
from dlrm_xla_studies.results import TIMES
from dlrm_xla_studies.runner import DAMAGED, FINISHED, Runner, Stopped, state_of
from dlrm_xla_studies.spec import read_study
from dlrm_xla_studies.stages import Stages
from dlrm_xla_studies.tuning import tune
from dlrm_xla_studies.workers import Workers

from dlrm_xla.errors import UserError

FLAGS = {"compile": ["chip", "plugin", "ratio"], "bench": ["what", "rows", "plugin"]}
TINY = {
    "synthetic_rows": 1200,
    "synthetic_tables": [30, 2000, 500, 40],
    "bottom": [8],
    "top": [8],
    "min_rows": 100,
    "min_count": 0,
    "batch_size": 128,
}


@pytest.fixture
def study_file(tmp_path):
    def make(text):
        path = tmp_path / "small.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return path

    return make


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs:\n  - {plugin: [hash_rows, robee]}\n", r"small.yaml:2: .*'robee'; did you mean 'robe'"),
        ("runs:\n  - plugin: exact\n    ratioo: 10\n", r":3: .*'ratioo' of a run; did you mean 'ratio'"),
        ("runs:\n  - {plugin: 'hash_rows:row=3'}\n", r":2: .* no option 'row'; did you mean 'rows'"),
        ("runs: [{plugin: exact}]\nsettings:\n  preset: smal\n", r":3: .*'smal'; did you mean 'small'"),
        ("runs: [{plugin: exact, batch_size: [64, 1.5]}]\n", r":1: batch_size cannot be 1.5"),
        ("runs: [{plugin: exact, out: x}]\n", r":1: there is no field 'out' of a run"),
        ("questions: why\nruns: [{plugin: exact}]\n", r":1: .*'questions' of a study; did you mean"),
        ("compiles: [{chips: v5e}]\n", r":1: there is no field 'chips' of a compile; did you mean 'chip'"),
        ("runs: [{plugin: exact, plugin: robe}]\n", r":1: plugin is given twice"),
        ("runs: [{plugin: []}]\n", r":1: plugin has no values"),
        ("runs: [{}]\n", r":1: a block without a field"),
        ("runs: {plugin: exact}\n", r":1: blocks are a list"),
        ("question: why\n", r":1: the study has no cells"),
        ("", r"is empty"),
        ("a: [", r"is not YAML"),
        ("cores: 0\nruns: [{plugin: exact}]\n", r":1: cores is 0"),
        ("memory: lots\nruns: [{plugin: exact}]\n", r":1: .*'lots'"),
        ("runs: [{plugin: exact}]\ntuning: {trials: 2}\n", r":2: tuning has no search"),
        ("runs: [{plugin: exact}]\ntuning: {search: {row_lr: [0.1, 0.01]}}\n", r":2: the range of row_lr"),
        ("runs: [{plugin: exact}]\ntuning: {search: {preset: [0.1, 0.2]}}\n", r":2: preset cannot be tuned"),
        ("runs: [{plugin: exact}]\ntuning: {search: {ratio: [2, 10]}}\n", r":2: ratio cannot be tuned: "),
        ("runs: [{plugin: exact}]\ntuning:\n  search: {}\n", r":3: search is empty"),
        ("runs:\n  - {[plugin, ratio]: exact}\n", r":2: a name in a block must be a word"),
        ("settings:\n  plugin: robee\nruns: [{seed: 0}]\n", r":2: .*'robee'; did you mean 'robe'"),
        ("runs:\n  - plugin: exact\n    tables: {C1: robee}\n", r":3: .*'robee'; did you mean 'robe'"),
        ("runs:\n  - plugin: robe\n    memory: lots\n", r":3: memory cannot be 'lots'"),
        ("runs:\n  - plugin: robe\n    ratio: 0.5\n", r":2: ratio is 0.5 \(study\), but"),
        ("runs:\n  - plugin: exact\n    batch_size: [64, 65]\n    micro_batches: [1, 2]\n", r":2: batch_size 65 "),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_with_its_line(study_file, text, words):
    with pytest.raises(UserError, match=words):
        read_study(study_file(text), FLAGS)


@pytest.mark.parametrize(
    "text",
    [
        "runs: [{plugin: exact, micro_batches: 3, batch_size: 384}]\n",
        "settings: {warmup_steps: 10}\nruns: [{plugin: exact, decay_steps: 5, decay_start: 20}]\n",
        "settings: {synthetic_bags: [1, 2], synthetic_tables: [5, 5]}\nruns: [{plugin: exact}]\n",
    ],
)
def test_settings_are_checked_together(study_file, text):
    assert len(grid.cells(read_study(study_file(text), FLAGS))) == 1


def test_a_block_is_the_product_of_its_lists(study_file):
    text = """
settings: {epochs: 2}
runs:
  - {plugin: [hash_rows, robe], ratio: [2, 4], seed: [0, 1], bottom: [8, 4]}
  - {plugin: hash_rows, ratio: 2, seed: 0, bottom: [8, 4]}   # had already
compiles:
  - {plugin: exact, chip: [v5e, v6e]}
"""
    cells = grid.cells(read_study(study_file(text), FLAGS))
    assert len(cells) == 8 + 2
    assert len({cell.id for cell in cells}) == len(cells)
    runs = [cell for cell in cells if cell.tool == "run"]
    assert all(cell.settings["bottom"] == [8, 4] and cell.settings["epochs"] == 2 for cell in runs)
    assert [cell.settings["seed"] for cell in runs] == [0, 1] * 4


def test_a_benchmark_of_a_device_that_is_not_here_is_impossible(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plans = launch_script("study_plans")
    benches = [grid.Cell("bench", {"what": "lookup", "device": device, "batch": 64}) for device in ("cpu", "cuda")]
    assert [bench.title for bench in benches] == ["bench batch 64 lookup cpu", "bench batch 64 lookup cuda"]
    assert plans.plan(benches[0])["memory"] > 1e9
    assert "cuda" in plans.plan(benches[1])["reason"]


def test_every_method_gets_its_trials_and_keeps_the_best(study_file):
    text = """
runs:
  - {plugin: [hash_rows, robe], ratio: [2, 4, 8], seed: [0, 1]}
  - {plugin: exact, row_lr: 0.3}
tuning: {trials: 5, seed: 7, search: {row_lr: [0.01, 0.5]}}
"""
    study = read_study(study_file(text), FLAGS)
    groups = grid.methods(grid.cells(study))
    assert len(groups) == 2  # what sets its own rate is not tuned
    for group in groups.values():
        assert len(group) == 6
        place = grid.trial_place(group, study.tuning.seed)
        assert (place.settings["ratio"], place.settings["seed"]) == (4, 7)
        asked = []

        def loss_of(cell, asked=asked):
            asked.append(cell)
            rate = cell.settings["row_lr"]
            return None if len(asked) == 2 else abs(rate - 0.2)

        best = tune(place, study.tuning, loss_of)
        assert len({cell.id for cell in asked}) == 5
        rates = [cell.settings["row_lr"] for k, cell in enumerate(asked) if k != 1]
        assert best == {"row_lr": min(rates, key=lambda r: abs(r - 0.2))}
        assert asked[0].settings["row_lr"] == 0.02  # the preset's own comes first
        again = []
        tune(place, study.tuning, lambda cell, again=again: again.append(cell) or None)
        assert again[0].id == asked[0].id


def test_what_a_block_decides_is_not_searched_for_it(study_file):
    text = """
runs:
  - {plugin: exact, row_lr: [0.02, 0.08], seed: [0, 1]}
  - {plugin: exact, seed: [0, 1]}
tuning: {trials: 3, search: {row_lr: [0.01, 0.5], dense_lr: [0.001, 0.1]}}
"""
    study = read_study(study_file(text), FLAGS)
    groups = grid.methods(grid.cells(study))
    assert [len(group) for group in groups.values()] == [2, 2, 2]
    for method, group in groups.items():
        rates = []
        place = grid.trial_place(group, 0)
        best = tune(
            place, study.tuning, lambda cell, rates=rates: rates.append(cell.settings) or cell.settings["dense_lr"]
        )
        given = [cell.with_tuned(best).settings for cell in group]
        assert all(settings["dense_lr"] == best["dense_lr"] for settings in given), method
        if "row_lr" not in best:  # the trials' is the cells' own
            assert {s["row_lr"] for s in rates} == {s["row_lr"] for s in given}


def test_cells_of_other_epochs_have_plans_of_their_own():
    from dlrm_xla_studies.feasible import plan_key

    one, other, seed = (
        plan_key(grid.Cell("run", {"plugin": "exact", **settings}))
        for settings in ({"epochs": 1}, {"epochs": 50}, {"epochs": 1, "seed": 3})
    )
    assert one == seed != other


@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_a_table_is_the_grids_whichever_method_was_tuned_first(study_file, tmp_path, backwards):
    text = """
runs:
  - {plugin: [hash_rows, robe, dhe], ratio: 2, seed: [0, 1]}
tuning: {trials: 2, search: {row_lr: [0.01, 0.5]}}
"""
    study = read_study(study_file(text), FLAGS)

    class Runs:
        def job(self, work, cell, forecast):
            return work

        def all(self, jobs):
            for work in reversed(jobs) if backwards else jobs:
                work()

        def one(self, cell):
            return {"status": "failed"}

    cells = grid.cells(study)
    stages = Stages(study, tmp_path, cells, {cell.id: Forecast() for cell in cells})
    stages.run(Runs())
    plugins = [cell.settings["plugin"] for cell in stages.known.values()]
    assert plugins == 2 * [p for plugin in ("hash_rows", "robe", "dhe") for p in (plugin, plugin)]
    assert [bool(cell.trial) for cell in stages.known.values()] == 6 * [False] + 6 * [True]


def test_cells_that_differ_in_how_they_are_written_are_one(study_file):
    text = """
settings: {preset: small}
runs:
  - {plugin: hash_rows, ratio: 10}
  - {plugin: hash_rows, ratio: [10.0, 20], seed: 0, epochs: 1, data_cache: ''}
tuning: {trials: 2, search: {row_lr: [0.01, 0.5]}}
"""
    study = read_study(study_file(text), FLAGS)
    cells = grid.cells(study)
    assert [cell.settings["ratio"] for cell in cells] == [10, 20]
    first = {"device": "cpu", "plugin": "hash_rows", "seed": 0, "preset": "small", "ratio": 10}
    assert cells[0].id == grid.Cell("run", first).id  # that of folders that there are
    decided = grid.cells(read_study(study_file(text.replace("epochs: 1", "row_lr: 0.02")), FLAGS))
    assert len(decided) == 3  # what is to be tuned is not yet the preset's


def test_cells_that_differ_in_what_changes_no_result_are_refused_with_their_lines(study_file):
    text = "runs:\n  - {plugin: exact}\n  - {plugin: exact, seed: [1, 0], log_every: 10}\n"
    with pytest.raises(
        UserError, match=r"small.yaml:3: exact cpu seed 0 has the same results as in line 2, .*log_every"
    ):
        grid.cells(read_study(study_file(text), FLAGS))


def test_titles_name_what_tells_cells_apart(study_file):
    text = """
settings: {batch_size: 64, epochs: 2}
runs:
  - {plugin: exact, dense_lr: [0.1, 0.2]}
  - {plugin: exact, tables: [{C1: int4, C2: int8}], bottom: [8, 4]}
tuning: {trials: 2, search: {row_lr: [0.01, 0.5]}}
"""
    study = read_study(study_file(text), FLAGS)
    cells = grid.cells(study)
    assert [cell.title for cell in cells] == [
        "exact batch 64 cpu dense lr 0.1 seed 0",
        "exact batch 64 cpu dense lr 0.2 seed 0",
        "exact batch 64 cpu tables C1=int4,C2=int8 bottom 8-4 seed 0",
    ]
    trials = []
    tune(cells[0], study.tuning, lambda trial: trials.append(trial) or 0.5)
    assert trials[0].title == "exact batch 64 cpu dense lr 0.1 row lr 0.02 seed 0"


class MadeUp:
    """Runs nothing: makes up what a cell would have come to."""

    def __init__(self, out):
        self.out = out

    def job(self, work, cell, forecast):
        return work

    def all(self, jobs):
        for work in jobs:
            work()

    def one(self, cell):
        folder = folder_of(self.out, cell)
        if not folder.exists():
            made_up_run(folder / "run", 0.75 + cell.settings.get("row_lr", 0) / 10, **cell.settings)
            (folder / "state.json").write_text(json.dumps({"status": "finished", "seconds": 9.0, "attempts": 1}))
            (folder / "settings.yaml").write_text(yaml.safe_dump(dict(cell.settings)))
        return state_of(self.out, cell)


@pytest.fixture
def finished(study_file, tmp_path, monkeypatch):
    """A study of which all cells have finished: file, folder, and cells."""
    text = """
memory: 1GB
runs:
  - {plugin: exact, row_lr: 0.3, seed: [0, 1]}
  - {plugin: hash_rows, ratio: [2, 4, 8], seed: [0, 1], data: rows.tsv}
tuning: {trials: 3, search: {row_lr: [0.01, 0.5]}}
"""
    path = study_file(text)
    study, out = read_study(path, FLAGS), tmp_path / "o"
    cells = grid.cells(study)
    stages = Stages(study, out, cells, {cell.id: Forecast() for cell in cells})
    stages.run(MadeUp(out))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "saved", lambda *_: "")  # which takes seconds for each
    return path, out, list(stages.known.values())


@pytest.mark.parametrize("flags", [[], ["--report-only"]])
def test_what_has_finished_stays_in_the_results_though_it_can_run_no_more(finished, capsys, monkeypatch, flags):
    path, out, known = finished
    assert len(known) == 2 + 6 + 3
    planned = []

    def plan(cells, workers):
        planned.extend(cells)
        return [{"memory": 1e15 if cell.settings["plugin"] == "exact" else 1e9} for cell in cells]

    monkeypatch.setattr(feasible, "_planned", plan)
    assert launch_script("study").main([str(path), "--out", str(out), *flags]) == 0
    said = capsys.readouterr().out
    assert "8 of 8 cells finished, 0 failed" in said
    assert "skipped" not in said
    assert bool(planned) == (not flags)
    assert set(pd.read_parquet(out / "results.parquet")["cell"]) == {cell.id for cell in known}


def test_tuning_is_found_again_where_other_ratios_can_run_by_now(finished):
    path, out, known = finished
    study = read_study(path, FLAGS)
    cells = grid.cells(study)
    lost = {cell.id: Forecast("too large" if cell.settings.get("ratio") in (2, 4) else "") for cell in cells}
    stages = Stages(study, out, cells, lost)
    assert [cell.id for cell in stages.known.values()] == [cell.id for cell in known]


def test_what_has_finished_is_found_again_where_no_result_has_changed(finished, capsys, monkeypatch):
    path, out, known = finished
    before = {folder.name for folder in (out / "cells").iterdir()}
    text = path.read_text().replace("ratio: [2, 4, 8]", "ratio: [2.0, 4, 8.0]")
    monkeypatch.setenv("ROWS", "rows.tsv")
    path.write_text(text.replace("data: rows.tsv", "data: $ROWS") + "settings: {log_every: 7, data_cache: x}\n")
    assert launch_script("study").main([str(path), "--out", str(out), "--report-only"]) == 0
    assert "8 of 8 cells finished" in capsys.readouterr().out
    assert len(pd.read_parquet(out / "results.parquet")) == len(known)
    study = read_study(path, FLAGS)
    cells = grid.cells(study)
    stages = Stages(study, out, cells, {cell.id: Forecast() for cell in cells})
    assert (len(stages.trials_left()), stages.untuned()) == (0, [])
    assert {folder_of(out, cell).name for cell in stages.known.values()} == before
    path.write_text("memory: 1GB\nruns: [{plugin: exact, seed: 5}]\n")
    assert launch_script("study").main([str(path), "--out", str(out), "--report-only"]) == 0
    assert "results.parquet: nothing has finished, so it stays as it was" in capsys.readouterr().out
    assert len(pd.read_parquet(out / "results.parquet")) == len(known)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.yaml", ""),
        ("config.yaml", "[]"),
        ("report.json", "[]"),
        ("report.json", "{}"),
        ("report.json", '{"auc": "abc"}'),
        ("report.json", '{"tables": [1]}'),
    ],
)
def test_a_damaged_cell_is_named_and_the_others_get_their_page(finished, capsys, file, text):
    path, out, known = finished
    bad = known[0]
    (folder_of(out, bad) / "run" / file).write_text(text)
    assert launch_script("study").main([str(path), "--out", str(out), "--report-only"]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"damaged: {re.escape(bad.title)}: .*{re.escape(str(folder_of(out, bad)))}.*{file}", said)
    assert "7 of 8 cells finished" in said
    assert len(pd.read_parquet(out / "results.parquet")) == len(known) - 1
    assert (out / "report.html").exists()
    command = Runner(out, None, 1, 1, 1e9, None)._prepare(bad, folder_of(out, bad))
    assert ("--resume" in command) == (file == "report.json")  # no settings, no way to go on


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"status": "finished", "seconds": "x", "attempts": 1}'])
def test_a_damaged_state_loses_no_run_that_has_finished(finished, text):
    _, out, known = finished
    (folder_of(out, known[0]) / "state.json").write_text(text)
    assert state_of(out, known[0]) == {"status": FINISHED, "seconds": 0.0, "attempts": 0}


@pytest.mark.parametrize(
    ("tool", "text", "whole"),
    [
        ("compile", '{"estimated_ms": null}', True),
        ("compile", "{}", False),
        ("bench", '[{"name": "a", "ms_median": 2}]', True),
        ("bench", '[{"name": "a"}]', False),
        ("bench", "[3]", False),
    ],
)
def test_a_report_of_the_wrong_form_is_damaged(tmp_path, tool, text, whole):
    cell = grid.Cell(tool, {"plugin": "exact"})
    folder = folder_of(tmp_path, cell)
    folder.mkdir(parents=True)
    cell.report(folder).write_text(text)
    (folder / "state.json").write_text(json.dumps({"status": FINISHED, "seconds": 1.0, "attempts": 1}))
    assert state_of(tmp_path, cell)["status"] == (FINISHED if whole else DAMAGED)


def test_the_start_of_a_worker_is_no_part_of_a_call(tmp_path):
    answers = json.dumps({"pid": 999_999_999}) + "\n" + json.dumps({"code": 3})
    (tmp_path / "study_worker.py").write_text(
        f"import time\ntime.sleep(0.5)\ninput()\nprint({answers!r}, flush=True)\n"
    )
    with Workers(tmp_path, 1, 1) as workers:
        code, seconds = workers.call("run", [], tmp_path / "log.txt")
    assert code == 3
    assert seconds < 0.4


def test_trials_that_have_ended_are_not_to_run(finished, capsys, monkeypatch):
    path, out, known = finished
    monkeypatch.setattr(feasible, "_planned", lambda cells, workers: [{"memory": 5.0} for _ in cells])
    Path("rows.tsv").touch()
    asked = [str(path), "--out", str(out), "--dry-run"]
    launch_script("study").main(asked)
    assert "8 cells, 0 to run, 0 tuning trials" in capsys.readouterr().out
    shutil.rmtree(folder_of(out, [cell for cell in known if cell.trial][-1]))
    launch_script("study").main(asked)
    assert "1 tuning trials" in capsys.readouterr().out


def test_a_damaged_cache_of_plans_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(feasible, "_planned", lambda cells, workers: [{"memory": 5.0} for _ in cells])
    cell = grid.Cell("run", {"plugin": "exact"})
    for text in ('{"[', "[]", '{"a": {"other": 1}}'):
        (tmp_path / "plans.json").write_text(text)
        assert feasible.forecasts([cell], tmp_path, None, 1e9)[cell.id].memory == 5.0
        assert len(json.loads((tmp_path / "plans.json").read_text())) == 1


def test_a_study_may_be_read_from_its_own_folder(finished, capsys):
    path, out, _ = finished
    (out / "small.yaml").write_text(path.read_text())
    for name in ("small.yaml", "study.yaml"):
        assert launch_script("study").main([str(out / name), "--out", str(out), "--report-only"]) == 0
    assert (out / "study.yaml").read_text() == path.read_text()


def test_what_the_disk_refuses_is_said_in_a_line(study_file, tmp_path, capsys, monkeypatch):
    path = study_file("runs: [{plugin: exact}]\n")
    study = launch_script("study")
    assert study.main([str(path), "--out", str(path / "o")]) == 2
    assert f"cannot write the study's folder {path / 'o'}: Not a directory" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conduct, "conduct", full)
    assert study.main([str(path), "--out", str(tmp_path / "o")]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_call_that_outlived_its_study_is_waited_for_and_taken_over(tmp_path, capsys, monkeypatch):
    cell = grid.Cell("run", {"plugin": "exact", "seed": 0})
    folder = folder_of(tmp_path, cell)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"status": "running", "seconds": 4.0, "attempts": 1}))
    ended = []

    class NoWorkers:
        def signal(self, number):
            pass

    def run(after_a_while):
        tries = []

        def taken(lock):
            tries.append(lock)
            if len(tries) == 3:
                after_a_while()
            return is_taken(lock)

        monkeypatch.setattr(runner, "_taken", taken)
        made = Runner(tmp_path, NoWorkers(), 1, 1, 1e10, lambda cell, state: ended.append(state))
        made.all([made.job(lambda: made.one(cell), cell, Forecast())])

    is_taken = runner._taken
    with (folder / "lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Stopped):
            run(lambda: os.kill(os.getpid(), signal.SIGINT))
        assert capsys.readouterr().err.count("a call of a study that was killed, process 4711") == 1

        def end():
            made_up_run(folder / "run", 0.75, seed=0)
            fcntl.flock(lock, fcntl.LOCK_UN)

        run(end)
    assert [(state["status"], state["seconds"]) for state in ended] == [(FINISHED, 0.0)]
    table = results.table("small", tmp_path, [cell], {cell.id: ended[0]})
    assert table["seconds"].tolist() == [300 * 50 / 1000]  # of its own report
    estimate = Estimate()
    estimate.learn(cell, Forecast(), ended[0]["seconds"])
    assert estimate.seconds(cell, Forecast()) == Forecast().seconds


STUDY = {
    "question": "Does it run?",
    "cores": 2,
    "settings": TINY,
    "runs": [
        {"plugin": "exact", "seed": [0, 1]},
        {"plugin": "hash_rows", "ratio": [2, 5000], "seed": [0, 1]},
        {"plugin": "robe", "ratio": 2, "data": "${NOT_SET_ANYWHERE}/x.tsv"},
        {"plugin": "robe", "ratio": 2, "data": "nowhere.tsv"},
    ],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A study that ran once, in a process of its own."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "small.yaml").write_text(yaml.safe_dump(STUDY))
    command = [
        sys.executable,
        str(ROOT / "launch" / "study.py"),
        str(folder / "small.yaml"),
        "--out",
        str(folder / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return command, folder / "o", done


def stable(table):
    return table.drop(columns=[c for c in TIMES if c in table])


@pytest.mark.slow
def test_a_study_runs_what_can_run_and_says_why_the_rest_cannot(ran):
    _, out, done = ran
    assert done.returncode == 0, done.stderr
    assert "hash_rows 5000x" in done.stdout
    assert "within its reach" in done.stdout
    assert "environment variable in it is not set" in done.stdout
    assert "nowhere.tsv is not there" in done.stdout
    assert "4 of 4 cells finished, 0 failed" in done.stdout
    assert re.search(r"exact .*AUC 0\.\d{4}", done.stdout)
    table = pd.read_parquet(out / "results.parquet")
    assert sorted(zip(table["plugin"], table["seed"], strict=True)) == [
        ("exact", 0), ("exact", 1), ("hash_rows", 0), ("hash_rows", 1),
    ]  # fmt: skip
    for row in table.to_dict("records"):
        report = json.loads((out / "cells" / row["cell"] / "run" / "report.json").read_text())
        assert row["auc"] == report["auc"]
        assert row["training_bytes"] == sum(t["padded"] + t["optimizer"] + t["gradient"] for t in report["tables"])


@pytest.mark.slow
def test_a_page_and_plots_are_written(ran):
    _, out, _ = ran
    text = (out / "report.html").read_text()
    assert "Does it run?" in text
    assert "hash_rows" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    for kind in ("png", "pdf"):
        assert (out / "figures" / f"auc-embedding_bytes-cpu.{kind}").stat().st_size > 5000


@pytest.mark.slow
def test_what_is_finished_never_runs_again_and_what_failed_is_kept(ran):
    command, out, _ = ran
    before = stable(pd.read_parquet(out / "results.parquet"))
    reports = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/run/report.json")}
    # One cell as a kill leaves it: without a report, and with a checkpoint to go on from; another that failed.
    finished = sorted(out.glob("cells/*exact*"))
    (finished[0] / "run" / "report.json").unlink()
    (finished[0] / "state.json").write_text(json.dumps({"status": "running", "seconds": 1.0, "attempts": 1}))
    (finished[1] / "run" / "report.json").unlink()
    (finished[1] / "state.json").write_text(
        json.dumps({"status": "failed", "seconds": 1.0, "attempts": 1, "error": "exit code 2: error: made up"})
    )
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "3 of 4 cells finished, 1 failed" in done.stdout
    assert "made up" in done.stdout
    log = (finished[0] / "log.txt").read_text()
    assert "resumed from" in log or "holds no checkpoint" in log
    done = subprocess.run([*command, "--retry-failed"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(stable(pd.read_parquet(out / "results.parquet")), before)
    again = {p: p.stat().st_mtime_ns for p in reports}
    assert sum(again[p] == reports[p] for p in reports) == 2


@pytest.mark.slow
def test_two_studies_do_not_share_a_folder(ran, study_file, capsys):
    from dlrm_xla_studies.runner import only_one

    _, out, _ = ran
    study = launch_script("study")
    with only_one(out):
        assert study.main([str(out / "study.yaml"), "--out", str(out)]) == 2
    assert "another study is running" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_plans_is_stopped_in_one_line(number, tmp_path):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(STUDY))
    command = [sys.executable, str(ROOT / "launch" / "study.py"), str(tmp_path / "small.yaml"), "--dry-run"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # Tests that run in the background ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    worker = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    while not (workers := worker.read_text().split()):
        assert child.poll() is None
        time.sleep(0.1)
    calls = Path(f"/proc/{workers[0]}/task/{workers[0]}/children")
    while not calls.read_text():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
    assert (child.returncode, err.splitlines()[-1]) == (130, "stopped; the same command goes on")
    assert "Traceback" not in err, err


@pytest.mark.slow
def test_ctrl_c_loses_nothing(tmp_path):
    longer = STUDY | {
        "runs": [{"plugin": "exact", "synthetic_rows": 60_000, "epochs": 5, "patience": 0, "seed": [0, 1]}]
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(longer))
    command = [
        sys.executable,
        str(ROOT / "launch" / "study.py"),
        str(tmp_path / "small.yaml"),
        "--out",
        str(tmp_path / "o"),
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("o/cells/*/run/metrics.jsonl"))) < 2:
        assert child.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, out + err
    assert "the same command goes on" in err
    # On a slow machine the first may have ended before the second began.
    states = {p.parent: json.loads(p.read_text())["status"] for p in tmp_path.glob("o/cells/*/state.json")}
    stopped = [cell for cell, status in states.items() if status == "interrupted"]
    assert stopped
    assert set(states.values()) <= {"interrupted", "finished"}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 cells finished" in done.stdout
    assert all("resumed from" in (cell / "log.txt").read_text() for cell in stopped)
