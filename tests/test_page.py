"""Statistics over seeds, what is chosen by them, and the page."""

import dataclasses
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import launch_script, made_up_run

pytest.importorskip("scipy")
pytest.importorskip("jinja2")

import itertools

from dlrm_xla_studies import choice, figures, page, statistics
from dlrm_xla_studies.families import exponents, growth, timed
from dlrm_xla_studies.figures import pareto
from dlrm_xla_studies.results import SETTINGS, frame, read_run
from scipy import stats

from dlrm_xla.config import Config
from dlrm_xla.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def runs_of(methods, seeds=3, sizes=(10, 100, 1000), noise=0.0005):
    rng = np.random.default_rng(0)
    rows = []
    for k, plugin in enumerate(["exact", *methods]):
        for size in (0.0,) if plugin == "exact" else map(float, sizes):
            for seed in range(seeds):
                auc = 0.77 - 0.002 * k - 0.004 * math.log10(size or 1) + 0.001 * seed + noise * rng.normal()
                rows.append(
                    {
                        "kind": "run", "plugin": plugin, "ratio": size, "device": "cpu", "preset": "small",
                        "batch_size": 512, "min_count": 4, "row_lr": 0.02, "dim": 16, "data": "criteo.tsv",
                        "data_digest": "a", "seed": seed, "auc": auc, "log_loss": 1.25 - auc,
                        "embedding_bytes": int(2e7 / (size or 7.8)) + k, "exact_embedding_bytes": 20_000_000,
                        "compression_ratio": size or 7.8, "training_bytes": int(3e7 / (size or 8) ** 0.5) + k,
                        "table_rows": 1000, "train_samples_per_second": 9000.0 + k, "step_ms_median": 50.0,
                        "validation_log_loss": 0.48, "versions": json.dumps({"torch": "2.9.0"}), "commit": "abc",
                        "folder": f"runs/{plugin}-{size:g}-{seed}",
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_changes_are_paired_by_seed_with_students_intervals():
    runs = runs_of(["hash_rows"], seeds=4)
    found = statistics.summary(runs)
    row = found[(found["plugin"] == "hash_rows") & (found["ratio"] == 100)].iloc[0]
    mine = runs[(runs["plugin"] == "hash_rows") & (runs["ratio"] == 100)].sort_values("seed")["auc"].to_numpy()
    exact = runs[runs["plugin"] == "exact"].sort_values("seed")["auc"].to_numpy()
    test = stats.ttest_rel(mine, exact)
    low, high = test.confidence_interval(0.95)
    assert row["auc_change"] == pytest.approx((mine - exact).mean())
    assert (row["auc_change_low"], row["auc_change_high"]) == pytest.approx((low, high))
    assert row["auc_error"] == pytest.approx(stats.sem(mine))


def test_nothing_is_ranked_without_seeds():
    runs = runs_of(["hash_rows", "robe"], seeds=1)
    found = statistics.summary(runs)
    assert math.isnan(found["auc_error"].iloc[0])
    assert choice.choices(runs, found) == []
    assert "No ranking" in page.html(runs, "one")


def test_the_choice_names_what_cannot_be_told_from_it():
    runs = runs_of(["hash_rows", "robe"], noise=0.00001)
    twin = runs[runs["plugin"] == "hash_rows"].assign(plugin="top_rows")
    twin["auc"] += 0.0001 * np.array([1, -1, 0] * 3)
    runs = pd.concat([runs, twin], ignore_index=True)
    found = choice.choices(runs, statistics.summary(runs))
    assert [d["size"] for d in found] == [10, 100, 1000]
    last = found[-1]
    assert {last["choice"]["plugin"], *(e["plugin"] for e in last["equals"])} == {"hash_rows", "top_rows"}
    assert last["worse"] == 1
    assert choice.verdict(last["change"]) == "worse than exact"


def test_a_method_without_seeds_in_common_with_the_choice_is_not_told_from_it():
    runs = runs_of(["hash_rows", "robe", "top_rows"], noise=0.00001)
    runs.loc[runs["plugin"] == "top_rows", "seed"] += 3
    last = choice.choices(runs, statistics.summary(runs))[-1]
    assert last["choice"]["plugin"] == "hash_rows"
    assert ([row["plugin"] for row in last["not_compared"]], last["worse"], last["equals"]) == (["top_rows"], 1, [])
    assert "not compared, for want of seeds: <code>top_rows 1000x</code>" in page.html(runs, "few")


def test_a_method_that_lacks_a_seed_is_no_choice_for_the_seeds_that_it_has():
    runs = runs_of(["hash_rows", "robe", "top_rows"], noise=0.00001)
    runs["auc"] += 0.01 * runs["seed"]  # seed 0 is the hardest
    partly = runs[~((runs["plugin"] == "top_rows") & (runs["seed"] == 0))]
    last = choice.choices(partly, statistics.summary(partly))[-1]
    assert (last["choice"]["plugin"], last["worse"]) == ("hash_rows", 1)
    assert [row["plugin"] for row in last["not_compared"]] == ["top_rows"]
    more = runs[(runs["plugin"] == "robe") | (runs["seed"] > 0)]
    last = choice.choices(more, statistics.summary(more))[-1]
    assert (last["choice"]["plugin"], last["worse"], last["not_compared"]) == ("hash_rows", 2, [])


def test_exact_tables_of_one_seed_are_no_reference_beside_those_of_all():
    runs = runs_of(["hash_rows"])
    other = runs[(runs["plugin"] == "exact") & (runs["seed"] == 0)].assign(row_lr=0.1, validation_log_loss=0.4)
    found = statistics.summary(pd.concat([runs, other], ignore_index=True))
    assert set(found[found["plugin"] == "hash_rows"]["auc_change_seeds"]) == {3}


def test_each_method_has_a_trial_that_was_taken():
    trials = []
    for device in ("cpu", "xla"):
        method = json.dumps({"device": device, "min_count": 4, "plugin": "hash_rows"})
        for rate, loss in ((0.01, 0.50), (0.02, 0.48), (0.04, 0.48)):
            loss += 0.1 * (device == "xla")
            row = {"kind": "trial", "plugin": "hash_rows", "ratio": 10.0, "device": device, "trial": method}
            trials.append(row | {"row_lr": rate, "plugin_lr": 0.001, "dense_lr": 0.001, "validation_log_loss": loss})
    rows = page._trials(pd.DataFrame(trials))
    taken = [(row["told"], row["row_lr"]) for row in rows if row["best"]]
    assert taken == [(["device cpu"], 0.02), (["device xla"], 0.02)]
    text = page.html(pd.DataFrame(trials), "tuned")
    assert "<code>hash_rows 10x</code>, device xla" in text
    assert "3 trials for each of these methods" in text
    text = page.html(pd.concat([pd.DataFrame(trials[1:]), runs_of([])], ignore_index=True), "tuned")
    assert "2 to 3 trials for each of these methods" in text
    assert "Without trials: <code>exact</code>." in text


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("data_digest", "b", "runs on different rows are mixed"),
        ("exact_embedding_bytes", 5, "runs on different rows are mixed"),
        ("seed", 1, "two runs of hash_rows on cpu have one seed"),
    ],
)
def test_what_does_not_compare_is_refused(column, value, words):
    runs = runs_of(["hash_rows"])
    runs.loc[len(runs) - 1, column] = value
    with pytest.raises(UserError, match=words):
        page.html(runs, "mixed")


def test_exact_tables_of_which_some_are_replaced_are_no_reference(tmp_path):
    rows, single = [], {"C1": "hash_rows:rows=60", "C2": "hash_rows:rows=60", "C3": "exact"}
    for seed in range(2):
        for k, (auc, replaced, tables) in enumerate(
            [(0.75, 0, {}), (0.76 + 0.001 * seed, 2, single), (0.74, 0, {"C4": "int4"})]
        ):
            folder = made_up_run(tmp_path / f"{k}-{seed}", auc, replaced, seed=seed, tables=tables)
            rows.append(read_run(folder) | {"cell": str(k)})
        rows.append(read_run(made_up_run(tmp_path / f"plugin-{seed}", 0.73, 3, seed=seed, plugin="hash_rows")))
    table = frame(rows)
    mixed = "exact with hash_rows:rows=60 for C1, C2"
    assert table["plugin"].tolist()[:4] == ["exact", mixed, "exact", "hash_rows"]  # tables of which none was replaced
    found = statistics.summary(table).set_index("plugin")
    assert found.loc[mixed, "auc_change"] == pytest.approx(0.0105)
    assert found.loc["hash_rows", "auc_change"] == pytest.approx(-0.02)
    text = page.html(table, "mixed")
    assert f"<code>{mixed}" in text
    assert "several plugins" in text


def test_every_setting_that_changes_a_result_tells_runs_apart():
    ran = runs_of(["hash_rows"], seeds=2)
    both = pd.concat([ran.assign(cross_rank=4), ran.assign(cross_rank=64)], ignore_index=True)
    found = statistics.summary(both)
    assert len(found) == 2 * len(statistics.summary(ran))
    assert set(found["seeds"]) == {2}
    assert set(found["auc_change_seeds"]) == {2}
    told = {"plugin", "device", "preset", "batch_size", "epochs_asked", "data", *SETTINGS}
    fields = {f.name for f in dataclasses.fields(Config)} - {"seed", "epochs"}
    assert fields - told == {
        "out", "data_cache", "row_files", "log_every", "save_every", "save_minutes", "keep_checkpoints", "rank_patience"
    }  # fmt: skip


def test_other_rows_are_refused_whatever_the_width():
    ran = runs_of(["hash_rows"])
    wider = ran.assign(dim=32, exact_embedding_bytes=40_000_000)
    assert statistics.check_alike(pd.concat([ran, wider])) == []
    with pytest.raises(UserError, match="different rows"):
        statistics.check_alike(pd.concat([ran, wider.assign(data_digest="b")]))


def test_of_two_methods_none_is_chosen():
    for plugins, ranked in ((["hash_rows", "robe"], False), (["hash_rows", "robe", "top_rows"], True)):
        runs = runs_of(plugins)
        assert bool(choice.choices(runs, statistics.summary(runs))) == ranked
    few = runs[(runs["ratio"] < 1000) | (runs["plugin"] == "robe")]
    assert [d["size"] for d in choice.choices(few, statistics.summary(few))] == [10, 100]


def test_mixed_versions_are_warned_of():
    runs = runs_of(["hash_rows"])
    runs.loc[0, "versions"] = json.dumps({"torch": "2.8.0"})
    assert "torch 2.8.0 and 2.9.0" in " ".join(statistics.check_alike(runs))


def test_the_pareto_front_and_exponents():
    points = [(1, 0.5), (2, 0.7), (3, 0.6), (4, 0.7), (5, 0.8)]
    assert pareto(points, highest=True) == [0, 1, 4]
    fitted = growth([10, 100, 1000], [2.0, 20.0, 200.0])
    assert fitted.exponent == pytest.approx(1)
    assert growth([10, 100], [1, 2]) is None


def test_figures_tell_exact_tables_apart_and_share_no_id():
    runs = runs_of(["hash_rows"], sizes=(10, 30))
    other = runs[runs["plugin"] == "exact"].assign(row_lr=0.5, auc=0.76)
    drawn = page.html(pd.concat([runs, other], ignore_index=True), "two")
    assert "exact, ids seen 4+ times, row lr 0.02" in drawn
    assert "exact, ids seen 4+ times, row lr 0.5" in drawn
    ids = re.findall(r'\bid="([^"]*)"', drawn)
    assert len(set(ids)) == len(ids) > 100
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', drawn)) <= set(ids)


def test_labels_of_few_decades_do_not_meet():
    with figures._drawn() as (figure, axes):
        for factor in (1.5, 8, 70, 1e4):
            axes.clear()
            axes.plot([1.1e6, 1.1e6 * factor], [1, 2])
            figures._logarithmic(axes, "x")
            figure.draw_without_rendering()
            low, high = axes.get_xlim()
            ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
            boxes = [t.label1.get_window_extent() for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
            boxes.sort(key=lambda box: box.x0)
            assert len(boxes) >= 2
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def benches(rows=(10**4, 10**5, 10**6), batches=(256, 1024), ratios=(10.0, 100.0, 1000.0)):
    """Steps whose ms are rows^0.5, times four at the larger batch; exact tables beside a plugin take half."""
    table = []
    for size, batch, ratio in [*((n, 256, 10.0) for n in rows), *((10**4, b, r) for b in batches for r in ratios)]:
        for plugin, share in (("exact", 1.0), ("hash_rows", 2.0)):
            ms = share * size**0.5 * batch / 256
            table.append(
                {
                    "kind": "bench", "name": f"growth dlrm_xla {plugin}", "plugin": "hash_rows", "device": "cpu",
                    "rows": size, "batch": batch, "ratio": ratio, "ms_median": ms,
                    "ms_by_part": json.dumps({"backward": ms / 2, "bags, forward": ms / 2}),
                }
            )  # fmt: skip
    return pd.DataFrame(table)


def test_growth_with_one_size_holds_the_others():
    found = {(e["family"], e["with"]): e["exponent"] for e in exponents(timed(benches()))}
    assert found["exact", "rows"] == pytest.approx(0.5)
    assert found["hashing", "rows"] == pytest.approx(0.5)
    assert found["hashing", "ratio"] == pytest.approx(0)
    assert ("exact", "ratio") not in found  # their ratio is that of the plugin beside them


def test_a_plot_of_which_no_point_is_left_is_not_drawn():
    """Exact tables have no ratio of their own; matplotlib's warnings are errors here."""
    table = benches()
    exact = table[table["name"].str.endswith("exact")]
    drawn = page.html(exact.assign(study="s"), "exact")
    assert "scaling-rows-" in drawn
    assert "scaling-ratio-" not in drawn


def test_bars_say_which_step_they_are_of():
    split = page._parts(benches())
    assert split["label"].is_unique
    row = split.set_index("label").loc["hash_rows, 10,000 rows, batch 1,024, 100x"]
    assert row["backward"] == pytest.approx(2.0 * 100 * 4 / 2)
    assert "exact, 1,000,000 rows, batch 256" in set(split["label"])
    drawn = page.html(benches(rows=[10**k for k in range(4, 30)]).assign(study="s"), "one")
    assert "The first 24 of" in drawn


@pytest.mark.slow
def test_a_thousand_runs_stay_below_3_mb_and_draw_quickly_in_a_browser(tmp_path):
    """Chromium is handed the page without a network; its script has then filled the table, without an error."""
    path = page.write(runs_of([f"method{k}" for k in range(111)]), tmp_path, "large")
    assert path.stat().st_size < 3_000_000
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    for width in (390, 1280):
        command = [*command[:5], f"--window-size={width},900", "--dump-dom", path.as_uri()]
        drawn = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        assert drawn.count("<tr>") >= 1002
        assert "1002 of 1002" in drawn


def test_documents_are_what_the_table_makes_them(capsys):
    assert launch_script("results").main(["--check"]) == 0, capsys.readouterr().out
