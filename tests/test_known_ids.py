"""Later rows with the ids of those that were trained on."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import criteo_line, launch_script
from dlrm_xla_data.__main__ import main
from dlrm_xla_data.prepared import open_prepared

launcher = launch_script("run")


def prepare(log, folder, *flags):
    return main(["prepare", str(log), str(folder), *map(str, flags)])


def lists_log(path, rows, seed):
    """A CSV log of a list, a text that may be missing, and a number; and what its values are."""
    rng = np.random.default_rng(seed)
    values = []
    lines = ["y,price,tags,city,item"]
    for _ in range(rows):
        tags = [f"t{k}" for k in rng.zipf(1.6, rng.integers(1, 4)) % 40]
        city, item = rng.choice(["Rome", "Oslo", "", "Bern"]), str(rng.zipf(1.5) % 300)
        values.append([tags, [city] if city else [], [item]])
        lines.append(f"{rng.integers(2)},{rng.random():.3f},{'|'.join(tags)},{city},{item}")
    path.write_text("\n".join(lines) + "\n")
    return values


LAYOUT = """format: csv
label: y
dense: [price]
categories:
  - {column: tags, separator: "|", at_most: 4}
  - city
  - {column: item, kind: integer}
"""


@pytest.mark.parametrize("flags", [(), ("--min-count", 3), ("--max-rows", 20), ("--max-rows", 20, "--tail", "hash")])
def test_values_have_the_ids_that_they_had(flags, tmp_path, capsys):
    (tmp_path / "l.yaml").write_text(LAYOUT)
    layout = ("--format", tmp_path / "l.yaml")
    old_values, new_values = (lists_log(tmp_path / f"{n}.csv", 400, seed) for seed, n in enumerate(("old", "new")))
    assert prepare(tmp_path / "old.csv", tmp_path / "old", *layout, *flags) == 0
    assert prepare(tmp_path / "new.csv", tmp_path / "new", *layout, "--ids-of", tmp_path / "old") == 0
    old, new = (open_prepared(tmp_path / n) for n in ("old", "new"))
    assert new.bag_lengths == old.bag_lengths
    assert new.splits == {"train": (0, 0), "validation": (0, 0), "test": (0, 400)}
    assert all(np.array_equal(a, b) for a, b in zip(new.counts, old.counts, strict=True))
    for feature in range(3):
        known: dict[str, int] = {}  # as the old rows have them
        for data, values in ((old, old_values), (new, new_values)):
            for row in range(400):
                ids = data.bags.ids[slice(*data.bags.offsets[row * 3 + feature : row * 3 + feature + 2])]
                of_row = values[row][feature] or [""]
                assert len(ids) in (len(of_row), 0 if of_row == [""] else len(of_row))
                for value, i in zip(of_row, ids, strict=False):
                    assert known.setdefault(value, 0 if value == "" or data is new else i) == i, value
    assert main(["verify", str(tmp_path / "new")]) == 0
    assert main(["stats", str(tmp_path / "new"), "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "without id  tags " in told
    assert "--evaluate" in told


CRITEO = ("--format", "criteo")


def trained(folder, *flags):
    """The lines of a log that is prepared as ``train``, and the best checkpoint of a run on it."""
    rng = np.random.default_rng(0)
    log = [criteo_line(rng) + "\n" for _ in range(1400)]
    (folder / "train.tsv").write_text("".join(log))
    assert prepare(folder / "train.tsv", folder / "train", *CRITEO) == 0
    flags = ["--data", str(folder / "train"), "--batch-size", "128", *flags, "--out", str(folder / "run")]
    assert launcher.main(flags) == 0
    return log, str(folder / "run" / "checkpoints" / "best.safetensors")


def test_the_same_rows_get_the_same_scores(tmp_path, capsys):
    log, best = trained(tmp_path, "--min-rows", "10", "--min-count", "2", "--plugin", "hash_rows:rows=9")
    assert launcher.main(["--evaluate", best, "--out", str(tmp_path / "a.parquet")]) == 0
    start, stop = open_prepared(tmp_path / "train").splits["test"]
    (tmp_path / "later.tsv").write_text("".join(log[start:stop]))
    assert prepare(tmp_path / "later.tsv", tmp_path / "later", *CRITEO, "--ids-of", tmp_path / "train") == 0
    assert (
        launcher.main(["--evaluate", best, "--data", str(tmp_path / "later"), "--out", str(tmp_path / "b.parquet")])
        == 0
    )
    one, other = (pq.read_table(tmp_path / f"{n}.parquet").to_pandas() for n in "ab")
    np.testing.assert_allclose(other["logit"], one["logit"], atol=1e-6)
    np.testing.assert_array_equal(other["label"], one["label"])
    parts = ["--evaluate", best, "--data", str(tmp_path / "later"), "--split", "train", "--out", str(tmp_path / "no")]
    assert launcher.main(parts) == 2
    assert "--split train: the data has no such rows, but those of: test" in capsys.readouterr().err
    assert launcher.main(["--data", str(tmp_path / "later"), "--out", str(tmp_path / "no")]) == 2
    assert "it has no training rows" in capsys.readouterr().err


def test_rows_without_labels_get_the_same_scores(tmp_path, capsys):
    log, best = trained(tmp_path)
    rows = log[:300]
    (tmp_path / "labelled.tsv").write_text("".join(rows))
    (tmp_path / "unlabelled.tsv").write_text("".join(row.partition("\t")[2] for row in rows))
    later = (*CRITEO, "--ids-of", tmp_path / "train")
    assert prepare(tmp_path / "labelled.tsv", tmp_path / "a", *later) == 0
    assert prepare(tmp_path / "unlabelled.tsv", tmp_path / "b", *later, "--unlabelled") == 0
    assert "300 rows, no labels" in capsys.readouterr().out
    for name in "ab":
        scores = ["--data", str(tmp_path / name), "--out", str(tmp_path / f"{name}.parquet")]
        assert launcher.main(["--evaluate", best, *scores]) == 0
    told = capsys.readouterr()
    assert ("auc" in told.out, told.out.count("no labels")) == (True, 1)
    one, other = (pq.read_table(tmp_path / f"{n}.parquet").to_pandas() for n in "ab")
    assert list(one) == ["row", "label", "logit", "probability"]
    assert list(other) == ["row", "logit", "probability"]
    np.testing.assert_array_equal(other["logit"], one["logit"])
    assert f"{other['probability'].mean():.4f}; no labels" in told.out
    assert main(["verify", str(tmp_path / "b")]) == 0
    assert main(["stats", str(tmp_path / "b"), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "stats.json").read_text())["click_rate"]["test"] is None
    assert prepare(tmp_path / "labelled.tsv", tmp_path / "c", *later, "--unlabelled") == 2
    assert "40 tab-separated columns, expected 39: 13 integers, 26 categories" in capsys.readouterr().err
    assert prepare(tmp_path / "unlabelled.tsv", tmp_path / "c", *CRITEO, "--unlabelled") == 2
    assert "Give --ids-of" in capsys.readouterr().err
    assert prepare(tmp_path / "unlabelled.tsv", tmp_path / "c", *later) == 2
    assert "--unlabelled" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["header", "header with labels", "columns", "parquet"])
def test_a_label_is_not_looked_for_where_there_is_none(kind, tmp_path):
    lists_log(tmp_path / "old.csv", 200, 0)
    header, *rows = (tmp_path / "old.csv").read_text().splitlines()
    text = LAYOUT
    if kind == "columns":
        text += f"columns: [{header}]\n"
        (tmp_path / "old.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "l.yaml").write_text(text)
    layout = ("--format", tmp_path / "l.yaml")
    lines = rows if kind == "columns" else [header, *rows]
    new = [line if kind == "header with labels" else line.partition(",")[2] for line in lines]
    if kind == "parquet":
        text = text.replace("format: csv", "format: parquet")
        (tmp_path / "l.yaml").write_text(text)
        columns = [[row.split(",")[k] for row in rows] for k in range(5)]
        types = {"y": int, "price": float, "tags": str, "city": str, "item": int}
        table = {n: [t(v) for v in c] for (n, t), c in zip(types.items(), columns, strict=True)}
        pq.write_table(pa.table(table), tmp_path / "old.csv")
        del table["y"]
        pq.write_table(pa.table(table), tmp_path / "new.csv")
    else:
        (tmp_path / "new.csv").write_text("\n".join(new) + "\n")
    assert prepare(tmp_path / "old.csv", tmp_path / "old", *layout) == 0
    later = (*layout, "--ids-of", tmp_path / "old", "--unlabelled")
    assert prepare(tmp_path / "new.csv", tmp_path / "new", *later) == 0
    old, new_rows = (open_prepared(tmp_path / n) for n in ("old", "new"))
    assert not new_rows.labelled
    np.testing.assert_array_equal(new_rows.bags.ids, old.bags.ids)
    np.testing.assert_array_equal(new_rows.dense, old.dense)


def test_ids_that_cannot_be_given_are_refused(small_log, tmp_path, capsys):
    known, criteo = tmp_path / "known", ("--format", "criteo")
    assert prepare(small_log, known, *criteo) == 0
    assert prepare(small_log, tmp_path / "again", *criteo, "--ids-of", known) == 0
    (tmp_path / "l.yaml").write_text(LAYOUT)
    lists_log(tmp_path / "x.csv", 50, 0)
    for log, flags, words in (
        (small_log, (*criteo, "--ids-of", tmp_path / "none"), "there is no folder"),
        (small_log, (*criteo, "--ids-of", tmp_path / "again"), "its ids are those of known. Name that folder"),
        (small_log, (*criteo, "--ids-of", known, "--min-count", 3), "brings its own --min-count"),
        (small_log, (*criteo, "--ids-of", known, "--protocol", "random_8"), "did you mean 'random_811'"),
        (
            tmp_path / "x.csv",
            ("--format", tmp_path / "l.yaml", "--ids-of", known),
            "alike: dense there ('I1', 'log1p'), here ('price', 'none')",
        ),
    ):
        assert prepare(log, tmp_path / "p", *flags) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "p").exists()
    meta = json.loads((known / "meta.json").read_text())
    del meta["values_per_table"]
    (known / "meta.json").write_text(json.dumps(meta))
    assert prepare(small_log, tmp_path / "p", *criteo, "--ids-of", known) == 2
    assert "what its ids stand for was not kept" in capsys.readouterr().err


def test_later_rows_may_have_other_columns_besides(tmp_path):
    parted = LAYOUT + "split: part\n"
    (tmp_path / "l.yaml").write_text(parted)
    lists_log(tmp_path / "old.csv", 90, 0)
    lines = (tmp_path / "old.csv").read_text().splitlines()
    parts = ["part", *(["train"] * 60), *(["test"] * 15), *(["validation"] * 15)]
    (tmp_path / "old.csv").write_text("".join(f"{line},{part}\n" for line, part in zip(lines, parts, strict=True)))
    assert prepare(tmp_path / "old.csv", tmp_path / "old", "--format", tmp_path / "l.yaml") == 0
    turned = "".join(
        ",".join(["extra" if k == 0 else "7", *reversed(line.split(","))]) + "\n" for k, line in enumerate(lines)
    )
    (tmp_path / "new.csv").write_text(turned)
    (tmp_path / "other name.yaml").write_text(parted)
    layout = ("--format", tmp_path / "other name.yaml")
    assert prepare(tmp_path / "new.csv", tmp_path / "new", *layout, "--ids-of", tmp_path / "old") == 0
    old, new = (open_prepared(tmp_path / n) for n in ("old", "new"))
    np.testing.assert_array_equal(new.bags.ids, old.bags.ids)
    np.testing.assert_array_equal(new.dense, old.dense)


def test_a_longer_bag_than_any_before_is_refused(tmp_path, capsys):
    (tmp_path / "l.yaml").write_text(LAYOUT)
    layout = ("--format", tmp_path / "l.yaml")
    lists_log(tmp_path / "old.csv", 100, 0)
    assert prepare(tmp_path / "old.csv", tmp_path / "old", *layout) == 0
    (tmp_path / "new.csv").write_text("y,price,tags,city,item\n1,2,t1|t2|t3|t4,Rome,5\n")
    assert prepare(tmp_path / "new.csv", tmp_path / "new", *layout, "--ids-of", tmp_path / "old") == 2
    assert (
        "a row has 4 values of tags, but the dataset whose ids are asked for has at most 3" in capsys.readouterr().err
    )
