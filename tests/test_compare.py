"""Tables of many runs."""

import json
import re

import pytest
import yaml
from conftest import launch_script

compare = launch_script("compare")


@pytest.fixture
def run_folder(tmp_path):
    def make(plugin, seed, auc, **changes):
        folder = tmp_path / f"{plugin}-{seed}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        settings = {"plugin": plugin, "seed": seed, "ratio": 10.0, "epochs": 1, "data": "/somewhere/criteo.tsv"}
        settings |= {"min_count": 4, "row_lr": 0.02, "min_rows": 1000, "tables": {}}
        report = {
            "plugin": plugin,
            "seed": seed,
            "device": "cpu",
            "auc": auc,
            "log_loss": 0.4,
            "embedding_bytes": 99_000,
        }
        report |= {"exact_embedding_bytes": 1_000_000, "train_samples_per_second": 5.0, "interrupted": False}
        report["tables"] = [{"padded": 1, "optimizer": 2, "gradient": 3}] * 2
        for key, value in changes.items():
            (settings if key in settings else report)[key] = value
        (folder / "config.yaml").write_text(
            yaml.safe_dump({k: {"value": v, "origin": "flag"} for k, v in settings.items()})
        )
        (folder / "report.json").write_text(json.dumps(report))
        return folder

    return make


def test_seeds_of_one_setting_are_one_row(run_folder, capsys):
    folders = [
        run_folder("a", 0, 0.75),
        run_folder("a", 1, 0.77),
        run_folder("b", 0, 0.8, data="/else/criteo.tsv", row_lr=0.04),
    ]
    assert compare.main(list(map(str, folders))) == 0
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert first == "| `b` | 10x | 10.1x | 99,000 | 12 | 0.8000 |  | 0.4000 |  | 5 | 4 | row lr 0.04 | 1 |"
    assert second == "| `a` | 10x | 10.1x | 99,000 | 12 | 0.7600 | 0.0200 | 0.4000 | 0.0000 | 5 | 4 | row lr 0.02 | 2 |"


def test_a_file_gets_table_and_plot_between_its_markers(run_folder, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\nold\n".join(compare.MARKERS) + "\nafter\n")
    folders = [run_folder("exact", 0, 0.75, ratio=0.0), run_folder("top_rows", 0, 0.7)]
    for _ in range(2):  # again, it is the same
        assert compare.main([*map(str, folders), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("| `top_rows` |") == 1
    assert "old" not in text
    assert (tmp_path / "page.png").stat().st_size > 10_000
    page.write_text("no markers")
    assert compare.main([*map(str, folders), "--into", str(page)]) == 2
    assert "must have one line" in capsys.readouterr().err


def test_a_compressed_run_may_be_fine_tuned_and_has_a_row_of_its_own(run_folder, capsys):
    trained = [run_folder("exact", 0, 0.77, ratio=0.0), run_folder("a", 0, 0.75)]
    tuned = run_folder("a", 0, 0.76, epochs=3)
    assert compare.main([str(tuned), *map(str, trained)]) == 2
    (tuned / "compression.json").write_text("{}")
    capsys.readouterr()
    assert compare.main([str(tuned), *map(str, trained)]) == 0
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["`exact`", "`a`, compressed", "`a`"]
    longer = run_folder("a", 1, 0.76, epochs=4)
    (longer / "compression.json").write_text("{}")
    assert compare.main([str(tuned), *map(str, trained), str(longer)]) == 2
    assert "has epochs 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 2}, "has epochs 2, .* has 1: such runs do not compare"),
        ({"exact_embedding_bytes": 5}, "ran on other data"),
        ({"interrupted": True}, "was interrupted"),
        ({"data": "/somewhere/other.tsv"}, "has data other.tsv"),
        ({}, r"both are a on cpu with the same sizes"),
        ({"min_rows": 10}, "has min_rows 1000, .* has 10: both are a on cpu, and would be one row"),
        ({"tables": {"C1": "int4"}}, "has tables {}, .* has {'C1': 'int4'}"),
    ],
)
def test_runs_that_do_not_compare_are_refused(run_folder, capsys, changes, words):
    assert compare.main([str(run_folder("a", 0, 0.75)), str(run_folder("a", 0, 0.75, **changes))]) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(("file", "text"), [("config.yaml", ""), ("config.yaml", "[]"), ("report.json", "[]")])
def test_a_damaged_run_is_named(run_folder, capsys, file, text):
    folder = run_folder("a", 0, 0.75)
    (folder / file).write_text(text)
    assert compare.main([str(folder)]) == 2
    assert f"{folder / file} is damaged" in capsys.readouterr().err


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert compare.main([str(tmp_path)]) == 2
    assert "is no finished run" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "none")]) == 2
    assert f"there is no run folder {tmp_path / 'none'}" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert compare.main([str(tmp_path / "file")]) == 2
    assert "none of these is a run folder" in capsys.readouterr().err
