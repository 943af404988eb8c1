"""Preparing logs of all formats, against plain Python readings; what users' files may have wrong; verify and stats."""

import collections
import csv
import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import criteo_line, shared_file
from dlrm_xla_data import layout as layouts
from dlrm_xla_data import lines, prepare, vocabulary
from dlrm_xla_data.__main__ import main
from dlrm_xla_data.multi_hot import more_ids
from dlrm_xla_data.parsing import parse, problem_of
from dlrm_xla_data.prepare import find_layout, open_log
from dlrm_xla_data.prepared import open_prepared, read_meta
from dlrm_xla_data.vocabulary import Limits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import slow_reading

from dlrm_xla.errors import UserError


def plain_ids(values, training, min_count=1):
    """Ids by falling frequency in the training rows, equal counts by value; 0 for None and what is rare or unseen."""
    counts = collections.Counter(v for v, t in zip(values, training, strict=True) if t and v is not None)
    order = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
    rank = {v: k for k, v in enumerate(order, 1)}
    return np.array([rank.get(v, 0) for v in values])


def prepared_by(folder, *arguments):
    assert main(["prepare", *map(str, arguments[:1]), str(folder), *map(str, arguments[1:])]) == 0
    return open_prepared(folder)


def test_the_real_sample_equals_a_plain_reading_id_by_id(criteo_sample, tmp_path):
    text = tmp_path / "sample.tsv"
    text.write_bytes(gzip.decompress(criteo_sample.read_bytes()))
    data = prepared_by(tmp_path / "p", criteo_sample, "--format", "criteo")
    labels, dense, ids = slow_reading(text, data.splits["train"][1])
    np.testing.assert_array_equal(data.labels, labels)
    np.testing.assert_array_equal(data.ids, ids)
    np.testing.assert_array_equal(
        data.dense, np.float32(dense)
    )  # to the last bit, which numpy's float32 logarithm is not


def test_avazu_equals_a_plain_reading(tmp_path):
    raw = shared_file("avazu_random20k.csv.gz")
    data = prepared_by(tmp_path / "p", raw, "--format", "avazu", "--min-count", 2)
    rows = list(csv.DictReader(gzip.open(raw, "rt")))
    times = np.array([int(r["hour"]) for r in rows])
    ordered = np.sort(times)
    first, second = ordered[len(rows) * 8 // 10], ordered[len(rows) * 9 // 10]
    part = np.where(times < first, 0, np.where(times < second, 2, 1))  # training, then test, then validation
    order = np.argsort(part, kind="stable")
    np.testing.assert_array_equal(data.labels, np.array([int(r["click"]) for r in rows])[order])
    for k, name in enumerate(data.names):
        if name == "hour_of_day":
            values = [int(r["hour"]) % 100 for r in rows]
        elif name == "weekday":
            values = [time.strptime("20" + r["hour"][:6], "%Y%m%d").tm_wday for r in rows]
        elif name.startswith("C") or name == "banner_pos" or name in ("device_type", "device_conn_type"):
            values = [int(r[name]) for r in rows]
        else:
            values = [int(r[name], 16) for r in rows]
        np.testing.assert_array_equal(data.ids[:, k], plain_ids(values, part == 0, 2)[order], err_msg=name)
    hours = (times % 100)[order]
    np.testing.assert_allclose(data.dense[:, 1], np.cos(hours / 24 * 2 * np.pi), atol=1e-6)


@pytest.mark.parametrize("hour", ["14139900", "14102124", "141021001"])
def test_an_impossible_hour_of_avazu_is_a_bad_row(tmp_path, capsys, monkeypatch, hour):
    layout = layouts.avazu()
    values = {c.name: "1" for c in layout.categories if c.name not in layout.derived} | {"id": "7", "click": "0"}

    def row(k):
        return ",".join((values | {"hour": f"1410{21 + k // 24:02d}{k % 24:02d}"}).values())

    rows = [",".join([*values, "hour"]), *map(row, range(80))]
    (tmp_path / "good.csv").write_text("\n".join(rows))
    (tmp_path / "bad.csv").write_text("\n".join([*rows[:30], rows[1].replace("14102100", hour), *rows[30:]]))
    command = ["prepare", str(tmp_path / "bad.csv"), str(tmp_path / "p"), "--format", "avazu"]
    assert main(command) == 2
    assert f"bad.csv, line 31: column hour is '{hour}', expected YYMMDDHH: " in capsys.readouterr().err
    monkeypatch.setattr(lines, "BLOCK_BYTES", 32)  # the bad row is all of its block
    assert main([*command, "--max-bad-rows", "1"]) == 0
    whole = prepared_by(tmp_path / "q", tmp_path / "good.csv", "--format", "avazu")
    np.testing.assert_array_equal(open_prepared(tmp_path / "p").ids, whole.ids)


@pytest.mark.parametrize(("name", "mark"), [("ratings.dat", "::"), ("u.data", "\t")])
def test_movielens_ratings_are_clicks_in_the_order_of_time(tmp_path, name, mark):
    rng = np.random.default_rng(0)
    rows = [(rng.integers(1, 40), rng.integers(1, 90), rng.integers(1, 6), 10**9 + t) for t in rng.permutation(300)]
    (tmp_path / name).write_text("".join(mark.join(map(str, r)) + "\n" for r in rows))
    data = prepared_by(tmp_path / "p", tmp_path, "--format", "movielens")
    by_time = sorted(range(300), key=lambda k: rows[k][3])
    training = set(by_time[:240])
    kept = [k for k in range(300) if k in training]
    np.testing.assert_array_equal(data.labels[:240], [rows[k][2] > 3 for k in kept])
    users = plain_ids([r[0] for r in rows], [k in training for k in range(300)])
    np.testing.assert_array_equal(data.ids[:240, 0], users[kept])
    assert [b - a for a, b in data.splits.values()] == [240, 30, 30]


YAML = """
label: {column: stars, above: 3}
dense: {price: log1p, age: none}
categories:
  - city
  - {column: shop, kind: integer}
  - {column: tags, separator: "|", at_most: 3}
split: part
"""


def own_csv(path, rows=400, seed=1):
    rng = np.random.default_rng(seed)
    table = []
    for _ in range(rows):
        tags = [f"t{t}" for t in rng.integers(0, 20, rng.integers(0, 6))]
        table.append(
            {
                "city": rng.choice(["Zürich, CH", 'New "York"', "", "Ulm", "Śrem"]),
                "ignored": "x",
                "stars": str(rng.integers(1, 6)),
                "shop": rng.choice(["", "7", "-3", "90000000000"]),
                "price": rng.choice(["", "-1", "12.5", "1e3"]),
                "age": str(rng.integers(0, 90)),
                "tags": "|".join(tags),
                "part": rng.choice(["train", "test", "validation"], p=[0.7, 0.2, 0.1]),
            }
        )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return table


def check_own(data, table):
    parts = np.array([("train", "test", "validation").index(r["part"]) for r in table])
    order = np.argsort(parts, kind="stable")
    np.testing.assert_array_equal(data.labels, [int(table[k]["stars"]) > 3 for k in order])
    price = [np.log1p(max(0.0, float(table[k]["price"] or 0))) for k in order]
    np.testing.assert_allclose(data.dense[:, 0], price, rtol=1e-6)
    bags = data.slots(np.arange(len(table)))
    longest = data.bag_lengths
    assert longest == [1, 1, 3]
    training = parts == 0
    for k, name in enumerate(("city", "shop")):
        # Text is ordered by digest where counts are equal: only counts and sameness can be compared.
        plain = np.array([r[name] for r in table])[order]
        ids = np.where(bags[:, k] == -1, 0, bags[:, k])
        pairs = set(zip(plain.tolist(), ids.tolist(), strict=True))
        assert len(pairs) == len(set(plain.tolist())) == len(set(ids.tolist()))
        assert ("", 0) in pairs
        counts = collections.Counter(r[name] for r in np.array(table)[training] if r[name])
        assert data.counts[k].tolist() == sorted(counts.values(), reverse=True)
    tags = [r["tags"].split("|")[:3] if r["tags"] else [] for r in np.array(table)[order]]
    named = {}
    for row, found in zip(tags, bags[:, 2:], strict=True):
        assert (found >= 0).sum() == len(row)
        for tag, number in zip(row, found, strict=False):
            assert named.setdefault(tag, number) == number
    assert len(named) == len(set(named.values())) == 20


def test_own_csv_and_parquet_by_yaml(tmp_path):
    pyarrow_csv = pytest.importorskip("pyarrow.csv")
    import pyarrow.parquet as pq

    table = own_csv(tmp_path / "own.csv")
    (tmp_path / "own.yaml").write_text(YAML)
    data = prepared_by(tmp_path / "p", tmp_path / "own.csv", "--format", tmp_path / "own.yaml")
    check_own(data, table)
    assert main(["verify", str(tmp_path / "p")]) == 0
    types = pyarrow_csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
    pq.write_table(pyarrow_csv.read_csv(tmp_path / "own.csv", convert_options=types), tmp_path / "own.parquet")
    (tmp_path / "parquet.yaml").write_text(YAML + "format: parquet\n")
    again = prepared_by(tmp_path / "q", tmp_path / "own.parquet", "--format", tmp_path / "parquet.yaml")
    for name in ("labels", "dense", "ids"):
        np.testing.assert_array_equal(getattr(data, name), getattr(again, name))
    np.testing.assert_array_equal(data.bags.offsets, again.bags.offsets)


def clicks(rows, **columns):
    """Columns of a log whose labels are 0 and 1 by turns, and whose price is the number of the row."""
    return {"y": [k % 2 for k in range(rows)], "price": [float(k) for k in range(rows)], **columns}


def write_layout(path, kind, *categories, more=""):
    text = "".join(f"  - {c}\n" for c in categories)
    path.write_text(f"format: {kind}\nlabel: y\ndense: [price]\ncategories:\n{text}{more}")


def write_log(folder, kind, columns, *categories, more=""):
    """A log of these columns, CSV or Parquet, and its layout; the arguments that prepare it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    log = folder / f"log.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(columns), log)
    else:
        with log.open("w", newline="") as file:
            csv.writer(file).writerows([columns.keys(), *zip(*columns.values(), strict=True)])
    write_layout(folder / "log.yaml", kind, *categories, more=more)
    return log, "--format", folder / "log.yaml"


def values_of(data, truth):
    """How many values each id of the first category stands for, where rows are in the log's order."""
    found = collections.defaultdict(set)
    slots = data.slots(np.arange(len(truth)))
    for values, ids in zip(truth, slots[:, : data.bag_lengths[0]], strict=True):
        assert (ids >= 0).sum() == len(values)
        for value, number in zip(values, ids, strict=False):
            found[int(number)].add(value)
    return {number: len(values) for number, values in found.items()}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_values_shift_no_others_where_a_category_may_hold_several(tmp_path, kind):
    single = [None if k % 3 == 0 else f"v{k % 7}" for k in range(200)]
    arguments = write_log(tmp_path, kind, clicks(200, c=single), "{column: c, at_most: 3}")
    data = prepared_by(tmp_path / "p", *arguments)
    assert values_of(data, [[v] if v else [] for v in single]) == dict.fromkeys(range(1, 8), 1)


@pytest.mark.parametrize("category", ["tags", "{column: tags, at_most: 1}", "{column: tags, at_most: 3}"])
@pytest.mark.parametrize("kind", [str, int])
def test_a_parquet_column_of_lists_is_a_bag_however_it_is_named(tmp_path, category, kind):
    lists = [[kind(10 + (k + t) % 12) for t in range(k % 6)] or (None if k % 4 else []) for k in range(120)]
    data = prepared_by(tmp_path / "p", *write_log(tmp_path, "parquet", clicks(120, tags=lists), category))
    most = {"tags": 10, "{column: tags, at_most: 3}": 3}.get(category, 1)
    if most == 1:
        assert data.bags is None
        assert values_of(data, [[v[0] if v else None] for v in lists]) == dict.fromkeys(range(11), 1)
    else:
        assert values_of(data, [(v or [])[:most] for v in lists]) == dict.fromkeys(range(1, 13), 1)


def test_one_file_of_lists_makes_bags_of_all(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "days").mkdir()
    for day, tags in enumerate([["a", None, "b"] * 20, [["a", "b"], [], ["c"]] * 20]):
        pq.write_table(pa.table(clicks(60, tags=tags)), tmp_path / "days" / f"{day}.parquet")
    write_layout(tmp_path / "l.yaml", "parquet", "tags")
    data = prepared_by(tmp_path / "p", tmp_path / "days", "--format", tmp_path / "l.yaml")
    truth = [["a"], [], ["b"]] * 20 + [["a", "b"], [], ["c"]] * 20
    assert values_of(data, truth) == dict.fromkeys(range(1, 4), 1)


def typed(kind):
    """Values of a type of Parquet, as they are written and as plain values; 7 different ones and missing ones."""
    import datetime

    import pyarrow as pa

    plain = [None if k % 5 == 0 else k % 7 for k in range(210)]

    def made(value_of, dtype):
        return pa.array([None if v is None else value_of(v) for v in plain], dtype), plain

    day = datetime.datetime(2024, 2, 28)
    return {
        "float": lambda: made(float, pa.float32()),
        "nan": lambda: (pa.array([float("nan") if v is None else float(v) for v in plain]), plain),
        "bool": lambda: (pa.array([None if v is None else v > 3 for v in plain]), [v and v > 3 for v in plain]),
        "date": lambda: made(lambda v: (day + datetime.timedelta(v)).date(), pa.date32()),
        "milliseconds": lambda: made(lambda v: day + datetime.timedelta(0, v), pa.timestamp("ms")),
        "nanoseconds": lambda: made(lambda v: day + datetime.timedelta(v), pa.timestamp("ns", "UTC")),
        "dictionary": lambda: (made(str, pa.string())[0].dictionary_encode(), plain),
        "bytes": lambda: made(lambda v: b"%02d" % v, pa.binary(2)),
        "view": lambda: made(str, pa.string_view()),
    }[kind]()


KINDS = ["float", "nan", "bool", "date", "milliseconds", "nanoseconds", "dictionary", "bytes"]


@pytest.mark.parametrize("kind", [*KINDS, "view"])
@pytest.mark.parametrize("in_lists", [False, True])
def test_parquet_categories_of_any_type_have_codes(tmp_path, kind, in_lists):
    import pyarrow as pa

    column, plain = typed(kind)
    if in_lists:
        column = pa.FixedSizeListArray.from_arrays(column, 2)
        rows = [[v for v in pair if v is not None] for pair in zip(plain[::2], plain[1::2], strict=True)]
    else:
        rows = [[v] for v in plain]
    data = prepared_by(tmp_path / "p", *write_log(tmp_path, "parquet", clicks(len(rows), c=column), "c"))
    found = values_of(data, rows)
    assert set(found.values()) == {1}
    assert len(found) == len(set(plain)) - in_lists


@pytest.mark.parametrize("kind", ["nan", "bool", "decimal", "int64"])
def test_dense_columns_of_parquet(tmp_path, kind):
    import pyarrow as pa

    values = [None if k % 5 == 0 else k % 2 for k in range(40)]
    column = {
        "nan": lambda: pa.array([float("nan") if v is None else float(v) for v in values]),
        "bool": lambda: pa.array([v if v is None else v == 1 for v in values]),
        "decimal": lambda: pa.array(values, pa.int64()).cast(pa.decimal128(21, 2)),
        "int64": lambda: pa.array(values, pa.int64()),
    }[kind]()
    data = prepared_by(tmp_path / "p", *write_log(tmp_path, "parquet", clicks(40, c=[1] * 40) | {"price": column}, "c"))
    assert data.dense[:, 0].tolist() == [v or 0 for v in values]


def test_the_text_nan_is_no_number_of_a_csv(tmp_path, capsys):
    log, *flags = write_log(tmp_path, "csv", clicks(40, c=[1] * 40) | {"price": [*range(39), "nan"]}, "c")
    assert main(["prepare", str(log), str(tmp_path / "p"), *map(str, flags)]) == 2
    assert "log.csv, line 41: column price is 'nan', expected a number or nothing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["log.parquet", "layout.yaml"])
def test_what_is_prepared_first_says_so(tmp_path, name):
    (tmp_path / "layout.yaml").write_text("label: y\n")
    write_log(tmp_path, "parquet", clicks(40, c=[1] * 40), "c")
    with pytest.raises(UserError, match=r"Prepare the log first: python -m dlrm_xla_data prepare .* --format .*yaml"):
        open_log(tmp_path / name, None)


def test_whole_real_numbers_and_integers_are_one_value(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "days").mkdir()
    write_layout(tmp_path / "l.yaml", "parquet", "{column: c, kind: integer}")
    for day, dtype in enumerate((pa.int32(), pa.float64(), pa.int64())):
        values = pa.array([k % 5 for k in range(40)], dtype)
        pq.write_table(pa.table(clicks(40, c=values)), tmp_path / "days" / f"{day}.parquet")
    data = prepared_by(tmp_path / "p", tmp_path / "days", "--format", tmp_path / "l.yaml")
    assert values_of(data, [[k % 5] for k in range(120)]) == dict.fromkeys(range(1, 6), 1)


@pytest.mark.parametrize(
    ("values", "category", "said"),
    [
        ([1.0, 2.5], "c", "category c is double, and a value is not in whole integers of 64 bits: write it as text"),
        ([1.0, 1e30], "c", "integers of 64 bits"),
        ([{"a": 1}] * 2, "c", "category c is struct<a: int64>: write it as integers, text or dates"),
        ([[[1]], [[2]]], "c", "category c is list"),
        ([1, 2], '{column: c, separator: "|"}', "category c is int64, expected text, for it has a separator"),
        (["a", "b"], "{column: c, kind: integer}", "category c is string, expected integers"),
    ],
)
def test_parquet_categories_that_have_no_codes_are_named(tmp_path, capsys, values, category, said):
    arguments = write_log(tmp_path, "parquet", clicks(60, c=values * 30), category)
    assert main(["prepare", *map(str, (arguments[0], tmp_path / "p", *arguments[1:]))]) == 2
    told = capsys.readouterr().err
    assert "log.parquet, row" in told
    assert said in told


def test_a_csv_column_may_be_a_number_and_a_category(tmp_path, capsys):
    values = [k % 7 if k % 5 else "" for k in range(105)]
    log, *layout = write_log(tmp_path, "csv", clicks(105, price=values), "price")
    data = prepared_by(tmp_path / "p", log, *layout)
    assert values_of(data, [[v] for v in values]) == dict.fromkeys(range(8), 1)
    np.testing.assert_array_equal(data.dense[:, 0], [v or 0 for v in values])
    write_log(tmp_path, "csv", clicks(105, price=[*values[:60], 1.5, *values[61:]]), "price")
    assert main(["prepare", *map(str, (log, tmp_path / "q", *layout))]) == 2
    assert "log.csv, line 62: column price is '1.5', expected a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["clicks/user", "n" * 400])
def test_a_category_may_have_any_name(tmp_path, name):
    values = [f"v{k % 7}" for k in range(60)]
    data = prepared_by(tmp_path / "p", *write_log(tmp_path, "csv", clicks(60, **{name: values}), name))
    assert data.names == [name]
    assert values_of(data, [[v] for v in values]) == dict.fromkeys(range(1, 8), 1)


def test_a_protocol_takes_parts_for_no_times_and_times_for_no_parts(tmp_path, capsys):
    parts = [("train", "validation", "test")[k % 3] for k in range(60)]
    by_part = write_log(tmp_path, "csv", clicks(60, c=["v"] * 60, part=parts), "c", more="split: part\n")
    data = prepared_by(tmp_path / "p", *by_part, "--protocol", "chronological")
    assert data.splits == {"train": (0, 48), "validation": (48, 54), "test": (54, 60)}
    np.testing.assert_array_equal(data.dense[:, 0], np.arange(60))
    by_time = write_log(tmp_path, "csv", clicks(60, c=["v"] * 60, seconds=range(60)), "c", more="time: seconds\n")
    assert main(["prepare", *map(str, (by_time[0], tmp_path / "q", *by_time[1:])), "--protocol", "column"]) == 2
    assert "--protocol column needs a layout with `split: COLUMN`" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["dlrm_days", "chronological"])
@pytest.mark.parametrize("files", [1, 3])
def test_the_newest_rows_test_or_where_no_column_has_a_time_the_last(tmp_path, capsys, protocol, files):
    times = np.random.default_rng(3).permutation(84)
    log, *layout = write_log(tmp_path, "csv", clicks(84, c=["v"] * 84, seconds=times), "c", more="time: seconds\n")
    header, *rows = log.read_text().splitlines()
    (tmp_path / "days").mkdir()
    for day, part in enumerate(np.array_split(rows, files)):
        (tmp_path / "days" / f"{day}.csv").write_text("\n".join([header, *part]))
    last = {"chronological": 17, "dlrm_days": 84 // (7 if files == 1 else 3)}[protocol]
    training = range(84 - last)
    arguments = [tmp_path / "days", *layout, "--protocol", protocol]
    for text in ((tmp_path / "log.yaml").read_text(), (tmp_path / "log.yaml").read_text().replace("time", "#")):
        (tmp_path / "log.yaml").write_text(text)
        timed = "time" in text
        data = prepared_by(tmp_path / f"p{timed}", *arguments)
        assert ("no `time` in log.yaml: rows are taken in the order" in capsys.readouterr().err) is not timed
        assert list(data.splits) == ["train", "test", "validation"]
        place = data.dense[:, 0].astype(int)
        at = times[place] if timed else place
        parts = {name: at[start:stop] for name, (start, stop) in data.splits.items()}
        assert sorted(parts["train"]) == [*training]
        early, late = ("test", "validation") if protocol == "dlrm_days" else ("validation", "test")
        assert parts[early].max() < parts[late].min()


STAMPS = (
    "2024-02-28",
    "2024-02-28T00:00:01Z",
    "2024-02-28 00:01",
    "2024-02-28T00:01:00.5",
    "2024-02-29T23:59:59.123456789",
)


def test_dates_and_times_of_iso_8601_order_the_rows(tmp_path, capsys):
    days = [f"20{20 + k // 12:02d}-{1 + k % 12:02d}-03" for k in range(55)] + [*STAMPS]
    order = np.random.default_rng(4).permutation(60)
    columns = clicks(60, c=["v"] * 60, day=[days[k] for k in order])
    log, *layout = write_log(tmp_path, "csv", columns, "c", "day", more="time: {column: day, kind: date}\n")
    data = prepared_by(tmp_path / "p", log, *layout)
    by_day = sorted(range(60), key=lambda k: columns["day"][k].replace(" ", "T"))
    for name, rows in (("train", by_day[:48]), ("validation", by_day[48:54]), ("test", by_day[54:])):
        np.testing.assert_array_equal(data.dense[slice(*data.splits[name]), 0], sorted(rows))
    log.write_text(log.read_text().replace("2020-09-03", "2020-09-31"))
    command = ["prepare", str(log), str(tmp_path / "q"), *map(str, layout)]
    assert main(command) == 2
    assert "column day is '2020-09-31', expected a date or time such as 2024-01-31 or" in capsys.readouterr().err
    write_layout(tmp_path / "log.yaml", "csv", "c", more="time: day\n")
    assert main(command) == 2
    assert "expected an integer, or, with `time: {column: day, kind: date}`, a date" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["date32", "date64", "ms", "ns", "text"])
def test_parquet_dates_and_times_order_the_rows(tmp_path, capsys, kind):
    import pyarrow as pa

    order = np.random.default_rng(4).permutation(60)
    days = np.datetime64("1969-12-20") + order
    dtype = {"date32": pa.date32(), "date64": pa.date64(), "ms": pa.timestamp("ms"), "ns": pa.timestamp("ns", "UTC")}
    column = pa.array([str(d) for d in days]) if kind == "text" else pa.array(days, pa.date32()).cast(dtype[kind])
    if kind == "ns":
        column = pa.array(column.cast(pa.int64()).to_numpy() + 1, dtype["ns"])
    log, *layout = write_log(tmp_path, "parquet", clicks(60, c=["v"] * 60, day=column), "c", more="time: day\n")
    command = ["prepare", str(log), str(tmp_path / "p"), *map(str, layout)]
    if kind == "text":
        assert main(command) == 2
        assert "row 1: column day, which orders the rows, is string" in capsys.readouterr().err
        write_layout(tmp_path / "log.yaml", "parquet", "c", more="time: {column: day, kind: date}\n")
    assert main(command) == 0
    data = open_prepared(tmp_path / "p")
    np.testing.assert_array_equal(data.dense[:48, 0], np.flatnonzero(order < 48))


def test_criteo_terabyte_is_a_folder_of_days(tmp_path):
    rng = np.random.default_rng(5)
    days = tmp_path / "days"
    days.mkdir()
    for day in range(12):  # day_10 comes after day_9
        text = "".join(criteo_line(rng) + "\n" for _ in range(20 + day))
        (days / f"day_{day}.gz").write_bytes(gzip.compress(text.encode()))
    whole = b"".join(gzip.decompress((days / f"day_{day}.gz").read_bytes()) for day in range(12))
    (tmp_path / "whole.tsv").write_bytes(whole)
    data = prepared_by(tmp_path / "p", days, "--format", "criteo-terabyte")
    train = sum(20 + day for day in range(11))
    assert data.splits == {"train": (0, train), "test": (train, train + 16), "validation": (train + 16, train + 31)}
    labels, _, ids = slow_reading(tmp_path / "whole.tsv", train)
    np.testing.assert_array_equal(data.ids, ids)
    np.testing.assert_array_equal(data.labels, labels)
    assert [f["file"] for f in read_meta(tmp_path / "p")["files"]] == [f"day_{day}.gz" for day in range(12)]


def test_random_split_and_limits(small_log, tmp_path, monkeypatch):
    for module in ("raw_columns", "protocols", "assembly"):  # many chunks
        monkeypatch.setattr(f"dlrm_xla_data.{module}.CHUNK", 128)
    plain = prepared_by(tmp_path / "plain", small_log, "--format", "criteo")
    data = prepared_by(tmp_path / "p", small_log, "--format", "criteo", "--protocol", "random_811", "--seed", "4")
    sizes = {name: b - a for name, (a, b) in data.splits.items()}
    assert sum(sizes.values()) == 700
    assert 520 < sizes["train"] < 600
    assert sorted(map(tuple, data.dense.tolist())) == sorted(map(tuple, plain.dense.tolist())), "every row once"
    cut = prepared_by(tmp_path / "cut", small_log, "--format", "criteo", "--max-rows", "50", "--min-count", "2")
    hashed = prepared_by(tmp_path / "hash", small_log, "--format", "criteo", "--max-rows", "50", "--tail", "hash")
    for k in range(26):
        expected = np.where((plain.ids[:, k] < 50), plain.ids[:, k], 0)
        expected[expected > (plain.counts[k] >= 2).sum()] = 0
        np.testing.assert_array_equal(cut.ids[:, k], expected)
        assert hashed.ids[:, k].max() <= 49
        np.testing.assert_array_equal(hashed.ids[:600, k] == 0, plain.ids[:600, k] == 0)
        assert hashed.counts[k].sum() == plain.counts[k].sum()
        np.testing.assert_array_equal(np.bincount(hashed.ids[:600, k], minlength=50)[1:], hashed.counts[k])
        assert (np.diff(hashed.counts[k]) <= 0).all()


@pytest.mark.parametrize(
    "limits", [Limits(), Limits(min_count=3), Limits(max_rows=700), Limits(max_rows=700, tail="hash")]
)
def test_vocabularies_beyond_memory_give_the_same_ids(tmp_path, monkeypatch, limits):
    rng = np.random.default_rng(7)
    codes = (rng.zipf(1.3, 60_000) % 5_000) * 2_654_435_761 - 2**40

    def chunks():
        return iter(np.array_split(codes, 29))

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    once = vocabulary.build_vocabulary(tmp_path / "a", "C1", chunks, limits)
    monkeypatch.setattr(vocabulary, "MOST_IN_MEMORY", 300)
    monkeypatch.setattr(vocabulary, "_RUN_VALUES", 4_096)
    spilled = vocabulary.build_vocabulary(tmp_path / "b", "C1", chunks, limits)
    assert len(once.parts) == 1
    assert len(spilled.parts) == 64
    np.testing.assert_array_equal(once.ids(codes), spilled.ids(codes))
    assert once.counts.read_bytes() == spilled.counts.read_bytes()
    if limits.tail == "cut":
        expected = plain_ids(codes.tolist(), [True] * len(codes), limits.min_count)
        expected[expected >= (limits.max_rows or len(codes))] = 0
        np.testing.assert_array_equal(once.ids(codes), expected)


def test_more_values_than_int32_can_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "MOST_IDS", 9)
    with pytest.raises(UserError, match=r"column C3 has 10 different values.*--min-count or --max-rows"):
        vocabulary.build_vocabulary(tmp_path, "C3", lambda: iter([np.arange(10)]), Limits())


def test_bad_rows_are_left_out_counted_and_told(small_log, tmp_path, capsys):
    good = small_log.read_text().splitlines()
    bad = list(good)
    bad[10:10] = ["2" + good[10][1:], "\t".join(good[0].split("\t")[:20])]
    bad[500] = bad[500].replace("\t", "\tx", 1)
    mended = [line for k, line in enumerate(bad) if k not in (10, 11, 500)]
    small_log.write_text("\n".join(bad) + "\n")
    (tmp_path / "good.tsv").write_text("\n".join(mended) + "\n")
    assert main(["prepare", str(small_log), str(tmp_path / "no"), "--format", "criteo", "--max-bad-rows", "2"]) == 2
    assert "more than --max-bad-rows 2" in capsys.readouterr().err
    data = prepared_by(tmp_path / "p", small_log, "--format", "criteo", "--max-bad-rows", "3")
    told = capsys.readouterr().err
    for expected in (
        "left out 3 rows",
        "line 11: the label is '2'",
        "line 12: 20 tab-separated",
        "line 501: column I1",
    ):
        assert expected in told
    np.testing.assert_array_equal(
        data.ids, prepared_by(tmp_path / "g", tmp_path / "good.tsv", "--format", "criteo").ids
    )
    assert read_meta(tmp_path / "p")["bad_rows"]["skipped"] == 3


@pytest.mark.parametrize("block", [40, 2**17])
def test_bad_rows_of_parquet_are_named_and_left_out(tmp_path, capsys, monkeypatch, block):
    monkeypatch.setattr("dlrm_xla_data.parsing._PARQUET_ROWS", block)
    columns = clicks(
        200, c=[f"{k % 9:x}" * (1 + k % 8) for k in range(200)], t=[["a", "b"][: k % 3] for k in range(200)]
    )
    bad = {name: list(values) for name, values in columns.items()}
    bad["y"][17], bad["c"][41], bad["price"][150] = None, "xyz", float("inf")
    categories = "{column: c, kind: hexadecimal}", "t"
    log, *layout = write_log(tmp_path, "parquet", bad, *categories)
    command = ["prepare", str(log), str(tmp_path / "p"), *map(str, layout)]
    assert main(command) == 2
    assert "log.parquet, row 18: a label is missing" in capsys.readouterr().err
    assert main([*command, "--max-bad-rows", "2"]) == 2
    told = capsys.readouterr().err
    assert "more than --max-bad-rows 2" in told
    assert "row 151: dense column price is not finite" in told
    assert main([*command, "--max-bad-rows", "3"]) == 0
    told = capsys.readouterr().err
    assert "left out 3 rows" in told
    assert "log.parquet, row 42: category c is not hexadecimal" in told
    data = open_prepared(tmp_path / "p")
    good = {name: [v for k, v in enumerate(values) if k not in (17, 41, 150)] for name, values in columns.items()}
    whole = prepared_by(tmp_path / "q", *write_log(tmp_path, "parquet", good, *categories))
    np.testing.assert_array_equal(data.dense, whole.dense)
    np.testing.assert_array_equal(data.bags.ids, whole.bags.ids)


def test_marks_line_ends_and_empty_lines_do_not_matter(small_log, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 4096)
    text = small_log.read_text().splitlines()
    mixed = b"\xef\xbb\xbf" + b"".join(
        line.encode() + (b"\r\n", b"\n", b"\n\n")[k % 3] for k, line in enumerate(text[:-1])
    )
    (tmp_path / "mixed.tsv").write_bytes(mixed + text[-1].encode() + b"\r\n\n\n")
    (tmp_path / "no_end.tsv").write_bytes("\n".join(text).encode())
    expected = prepared_by(tmp_path / "a", small_log, "--format", "criteo")
    for k, name in enumerate(("mixed.tsv", "no_end.tsv")):
        data = prepared_by(tmp_path / f"b{k}", tmp_path / name, "--format", "criteo")
        np.testing.assert_array_equal(data.ids, expected.ids)


@pytest.mark.parametrize(
    ("value", "match"),
    [("1" + "0" * 30, "column I5 is '1000000000"), ('"5"', "column I5 is"), ("\xfc", "column I5 is")],
)
def test_odd_numbers_are_named(small_log, tmp_path, capsys, value, match):
    text = small_log.read_text().splitlines()
    fields = text[5].split("\t")
    fields[5] = value
    text[5] = "\t".join(fields)
    small_log.write_bytes("\n".join(text).encode("latin-1"))
    assert main(["prepare", str(small_log), str(tmp_path / "p"), "--format", "criteo"]) == 2
    said = capsys.readouterr().err
    assert "small.tsv, line 6: " in said
    assert match in said
    assert "Traceback" not in said


def test_text_in_any_encoding_is_a_value_of_its_own(tmp_path):
    (tmp_path / "l.yaml").write_text("columns: [y, x, c]\nlabel: y\ndense: [x]\ncategories: [c]\n")
    lines_of = [b"%d,1,%s" % (k % 2, (b"M\xfcnchen", "München".encode(), b"")[k % 3]) for k in range(60)]
    (tmp_path / "l.csv").write_bytes(b"\n".join(lines_of))
    data = prepared_by(tmp_path / "p", tmp_path / "l.csv", "--format", tmp_path / "l.yaml")
    assert len(data.counts[0]) == 2
    assert (data.ids[2::3] == 0).all()


def test_a_quoted_line_break_is_a_bad_row_wherever_it_is(tmp_path, capsys):
    (tmp_path / "l.yaml").write_text("columns: [y, x, c]\nlabel: y\ndense: [x]\ncategories: [c]\n")
    rows = [f'{k % 2},1,"v{k % 3}, {k % 2}"' for k in range(40)]
    (tmp_path / "l.csv").write_text("\n".join([*rows[:20], '1,1,"two', 'lines"', *rows[20:]]))
    assert main(["prepare", str(tmp_path / "l.csv"), str(tmp_path / "p"), "--format", str(tmp_path / "l.yaml")]) == 2
    assert "l.csv, line 21: a quote is not closed" in capsys.readouterr().err
    arguments = ["--format", tmp_path / "l.yaml", "--max-bad-rows", 2]
    assert len(prepared_by(tmp_path / "p", tmp_path / "l.csv", *arguments).labels) == 40


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("label: y\ncategories: [nowhere]\ndense: [x]\n", "no column 'nowhere'.*known are"),
        ("label: y\ncategories: [cc]\ndense: [x]\n", "did you mean 'c'"),
        ("label: [y\n", "line 2: not YAML"),
        ("label: y\ncategory: [c]\n", "unknown key 'category'; did you mean 'categories'"),
        ("label: y\ncategories: [c]\n", "dense names no column"),
        ("label: y\ncategories: [c]\ndense: {x: log}\n", "did you mean 'log1p'"),
        ("label: y\ncategories: [c, c]\ndense: [x]\n", "'c' is there twice"),
        ("label: y\ncategories: [{column: c, kind: float}]\ndense: [x]\n", "kind"),
        ("label: {column: y, above: much}\ncategories: [c]\ndense: [x]\n", "above is 'much'"),
        ("label: y\ncategories: [c]\ndense: [x]\ntime: x\nsplit: c\n", "not both"),
        ("label: y\ncategories: [{column: x, kind: hexadecimal}]\ndense: [x]\n", "'x' is hexadecimal, but elsewhere"),
        ("label: y\ncategories: [c]\ndense: [x]\ntime: {column: x, kind: date}\n", "'x' is a date, but elsewhere"),
        ("label: y\ncategories: [c]\ndense: [x]\ntime: {column: c, kind: dat}\n", "did you mean 'date'"),
        ("label: y\ncategories: [c]\ndense: [x]\ntime: {kind: date}\n", "time names no column"),
        ("- y\n", "must be a mapping"),
        ("label: y\ncategories: c\ndense: [x]\n", r"categories is 'c', but must be a list: \[c\]"),
        ("label: y\ncategories: [c]\ndense: x\n", r"dense is 'x', but must be a list or a mapping: \[x\]"),
        ("label: y\ncategories: [c]\ndense: [x]\ncolumns: y\n", "columns is 'y', but must be a list"),
        ("label: {above: 3}\ncategories: [c]\ndense: [x]\n", "label names no column"),
        ("label: y\ncategories: [c]\ndense: [x, y]\n", "'y' is the label and a dense feature.*Take it out"),
        ("label: {column: x, above: 1}\ncategories: [x]\ndense: [y]\n", "'x' is the label and a category.*Take it"),
    ],
)
def test_layouts_that_cannot_be_meant(tmp_path, text, match):
    (tmp_path / "l.csv").write_text("y,x,c\n1,2,3\n")
    (tmp_path / "l.yaml").write_text(text)
    with pytest.raises(UserError, match=match):
        find_layout(str(tmp_path / "l.yaml"), [tmp_path / "l.csv"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"y;price;c\n1;2;3\n", """one name, 'y;price;c'. Give `delimiter: ";"`"""),
        (b"y\tprice\tc\n1\t2\t3\n", r"""Give `delimiter: "\t"`"""),
        (b"", "log.csv is empty"),
        (b"PAR1\x15\x04", "log.csv is a Parquet file, not text: give `format: parquet` in l.yaml"),
        (
            b"y,price,c\nyes,2,3\n",
            "line 2: the label is 'yes', expected 0 or 1: write 0 or 1, or give `label: {column: y,",
        ),
    ],
)
def test_files_that_are_not_as_a_layout_says_are_told_with_the_fix(tmp_path, capsys, text, said):
    write_layout(tmp_path / "l.yaml", "csv", "c")
    (tmp_path / "log.csv").write_bytes(text)
    for layout, words in ((tmp_path / "l.yaml", said), (tmp_path / "no.yaml", f"there is no file {tmp_path}/no.yaml")):
        assert main(["prepare", str(tmp_path / "log.csv"), str(tmp_path / "p"), "--format", str(layout)]) == 2
        assert words.replace("in l.yaml", f"in {tmp_path}/l.yaml") in capsys.readouterr().err


def test_commands_to_paste_are_quoted(small_log, tmp_path, capsys):
    known, later = tmp_path / "my logs" / "known", tmp_path / "my logs" / "later"
    assert main(["prepare", str(small_log), str(known), "--format", "criteo"]) == 0
    assert f"run.py --data '{known}'\n" in capsys.readouterr().out
    assert main(["prepare", str(small_log), str(later), "--format", "criteo", "--ids-of", str(known)]) == 0
    assert f"--data '{later}'\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"prepare '{tmp_path}/my logs' NEW"):
        open_prepared(tmp_path / "my logs")


@pytest.mark.parametrize("command", ["verify", "stats"])
def test_a_file_is_no_prepared_folder(small_log, capsys, command):
    assert main([command, str(small_log)]) == 2
    assert "small.tsv is a file. Name a prepared folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("y,b,a,price", "has 'b' as column 2, .*day_1.csv 'a'"),
        ("y,a,price", "has 3 columns, .*day_1.csv 4"),
        ("0,1,2,3", "has '0' as column 1"),
    ],
)
def test_files_with_other_headers_are_refused(tmp_path, header, said):
    write_layout(tmp_path / "l.yaml", "csv", "a", "b")
    files = [tmp_path / f"day_{k}.csv" for k in range(1, 4)]
    for file in files:
        file.write_text('y,"a",b,price\n0,1,2,3\n')
    find_layout(str(tmp_path / "l.yaml"), files)
    files[2].write_text(f"{header}\n0,1,2,3\n")
    with pytest.raises(UserError, match=rf"day_3.csv, line 1: the header {said}.*same order"):
        find_layout(str(tmp_path / "l.yaml"), files)


def test_commands_that_cannot_be_meant(small_log, tmp_path, capsys):
    for arguments, expected in (
        (["--format", "criteoo"], "did you mean 'criteo'"),
        (["--format", "criteo", "--protocol", "dlrm"], "did you mean 'dlrm_days'"),
        (["--format", "criteo", "--tail", "fold"], "--tail fold"),
        (["--format", "criteo", "--max-rows", "1"], "--max-rows 1"),
        (["--format", "criteo", "--protocol", "random_811", "--seed", "-1"], "--seed -1: must be at least 0"),
        (["--format", "criteo", "--multi-hot", "3," * 25 + "3", "--seed", str(2**34)], "below 17179869184"),
        (["--format", "criteo", "--multi-hot", "3,2"], "one number for each of the 26"),
        (["--format", "criteo", "--protocol", "column"], "needs a layout with"),
    ):
        assert main(["prepare", str(small_log), str(tmp_path / "p"), *arguments]) == 2
        assert expected in capsys.readouterr().err
    assert main(["prepare", str(tmp_path / "none"), str(tmp_path / "p"), "--format", "criteo"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
    prepared_by(tmp_path / "p", small_log, "--format", "criteo")
    assert main(["prepare", str(tmp_path / "p"), str(tmp_path / "q"), "--format", "criteo"]) == 2
    assert "prepared dataset already" in capsys.readouterr().err
    assert main(["stats", str(tmp_path / "p"), "--out", str(small_log / "s")]) == 2
    assert "small.tsv" in capsys.readouterr().err


def test_verify_tells_what_changed_and_opening_tells_it_too(small_log, tmp_path, capsys):
    folder = tmp_path / "p"
    prepared_by(folder, small_log, "--format", "criteo")
    assert main(["verify", str(folder)]) == 0
    open_prepared(folder)
    ids = bytearray((folder / "ids.npy").read_bytes())
    ids[-4] ^= 1
    (folder / "ids.npy").write_bytes(ids)
    with pytest.raises(UserError, match=r"ids.npy was changed, or copied, after the dataset was verified"):
        open_prepared(folder)
    assert main(["verify", str(folder)]) == 1
    assert "ids.npy is not what was written" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is not sound: ids.npy is not what was written"):
        open_prepared(folder)
    counts = np.load(folder / "counts.npy")
    counts[0] += 1
    np.save(folder / "counts.npy", counts)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"checksums": {}}))
    assert main(["verify", str(folder)]) == 1
    assert "id 1 of C1 occurs" in capsys.readouterr().out


def test_multi_hot_bags_follow_from_the_id(small_log, tmp_path):
    sizes = [1, 4, *[2] * 24]
    plain = prepared_by(tmp_path / "a", small_log, "--format", "criteo")
    data = prepared_by(tmp_path / "b", small_log, "--format", "criteo", "--multi-hot", ",".join(map(str, sizes)))
    assert data.bag_lengths == sizes
    np.testing.assert_array_equal(data.ids[:, [0, 1, 5]], plain.ids[:, :3])
    bag = data.ids[:, 1:5]
    assert {tuple(b) for b in bag[bag[:, 0] == 0]} == {(0, 0, 0, 0)}
    for number in range(1, 20):
        assert len({tuple(b) for b in bag[bag[:, 0] == number]}) == 1
    assert main(["verify", str(tmp_path / "b")]) == 0
    ids = np.arange(1, 200_001, dtype=np.int32)[:, None]
    drawn = more_ids(ids, [3], [200_001], 0)[:, 1:]
    assert drawn.min() >= 1
    assert drawn.max() <= 200_000
    share = (drawn == 1).mean() / (drawn == 2).mean()  # 1 / 2^-1.05, over intervals of the density
    assert share == pytest.approx((1 - 2**-0.05) / (2**-0.05 - 3**-0.05), rel=0.02)


def test_statistics_are_a_table_a_file_and_a_page(small_log, tmp_path, capsys):
    data = prepared_by(tmp_path / "p", small_log, "--format", "criteo")
    assert main(["stats", str(tmp_path / "p"), "--out", str(tmp_path / "s")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "s" / "stats.json").read_text())
    assert (tmp_path / "s" / "stats.png").stat().st_size > 50_000
    for k, table in enumerate(found["tables"]):
        assert table["table"] in printed
        counts = data.counts[k]
        assert table["rows"] == 1 + len(counts)
        assert table["top"]["100"] == pytest.approx(counts[:100].sum() / counts.sum())
        assert table["zero_test"] == pytest.approx((data.ids[600:650, k] == 0).mean())
        assert table["singletons"] == pytest.approx((counts == 1).mean())
    values = [line.split("\t")[14] for line in small_log.read_text().splitlines()]
    seen = set(values[:600])
    table = found["tables"][0]
    assert table["missing"] == pytest.approx(values[:600].count("") / 600)
    assert table["unseen_test"] == pytest.approx(sum(v != "" and v not in seen for v in values[600:650]) / 50)


def test_rows_without_any_value_are_missing_in_bags_too(tmp_path, capsys):
    tags = [["", "a|b", "a|new" if k >= 80 else "a", "b"][k % 4] for k in range(100)]
    log, *layout = write_log(tmp_path, "csv", clicks(100, t=tags, c=[["", "x"][k % 2] for k in range(100)]),
                             '{column: t, separator: "|"}', "c")  # fmt: skip
    prepared_by(tmp_path / "p", log, *layout)
    assert read_meta(tmp_path / "p")["missing"] == {"train": [20, 40], "test": [2, 5], "validation": [3, 5]}
    assert main(["stats", str(tmp_path / "p"), "--out", str(tmp_path)]) == 0
    bag, single = json.loads((tmp_path / "stats.json").read_text())["tables"]
    # Ten test rows have 2 empty bags and 13 tags, 3 of them unseen.
    assert (bag["missing"], bag["zero_test"], bag["unseen_test"]) == pytest.approx((0.25, 5 / 15, 3 / 15))
    assert (single["missing"], single["zero_test"], single["unseen_test"]) == pytest.approx((0.5, 0.5, 0))
    capsys.readouterr()
    prepared_by(tmp_path / "q", log, *layout, "--ids-of", tmp_path / "p")
    assert read_meta(tmp_path / "q")["missing"]["test"] == [25, 50]
    assert f"without id  t {30 / 130:.1%}, c 50.0%" in capsys.readouterr().out


def test_tables_without_any_id_are_told(tmp_path, capsys):
    columns = clicks(60, none=[""] * 60, rare=[f"v{k}" for k in range(60)], c=["v"] * 60)
    log, *layout = write_log(tmp_path, "csv", columns, "none", "rare", "c")
    prepared_by(tmp_path / "p", log, *layout)
    told = capsys.readouterr().err
    assert "warning: tables without any id: none; no value in the training rows" in told
    prepared_by(tmp_path / "q", log, *layout, "--min-count", "1e1", "--max-rows", "1e3")
    assert "without any id: none, rare; no value 10 times (--min-count) in the" in capsys.readouterr().err
    assert read_meta(tmp_path / "q")["options"]["limits"] == {"min_count": 10, "max_rows": 1000, "tail": "cut"}
    prepared_by(tmp_path / "r", log, *layout, "--max-rows", "0", "--ids-of", tmp_path / "q")
    assert "without any id" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--min-count=0", "'0': must be at least 1"),
        ("--max-rows=1.5", "'1.5': expected a whole number, 0 or more"),
        ("--max-rows=-1", "0 or more"),
        ("--min-count=nan", "'nan': expected a number such as 20000 or 1e6"),
    ],
)
def test_numbers_that_cannot_be_meant(small_log, tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit):
        main(["prepare", str(small_log), str(tmp_path / "p"), "--format", "criteo", flag])
    assert words in capsys.readouterr().err


def test_two_processes_prepare_one_folder_once(small_log, tmp_path):
    small_log.write_text(small_log.read_text() * 30)
    script = """
import sys
from pathlib import Path
from dlrm_xla_data.prepare import open_log
print(len(open_log(Path(sys.argv[1]), Path(sys.argv[2])).labels))
"""
    command = [sys.executable, "-c", script, str(small_log), str(tmp_path / "c")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=100) for process in both]
    assert [out for out, _ in said] == ["21000\n"] * 2
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == ["small.tsv.prepared"]


def test_who_waited_for_a_folder_has_it_alone(tmp_path, monkeypatch):
    waits, second_in, second_may_go, third_in = (threading.Event() for _ in range(4))
    flock = fcntl.flock

    def watched(file, how):
        if not how & fcntl.LOCK_NB:
            waits.set()
        flock(file, how)

    def second():
        with prepare._alone(tmp_path / "p"):
            second_in.set()
            second_may_go.wait(30)

    def third():
        with prepare._alone(tmp_path / "p"):
            third_in.set()

    monkeypatch.setattr(fcntl, "flock", watched)
    threads = [threading.Thread(target=target, daemon=True) for target in (second, third)]
    with prepare._alone(tmp_path / "p"):
        threads[0].start()
        assert waits.wait(30)
    assert second_in.wait(30)
    threads[1].start()
    assert not third_in.wait(0.3)
    second_may_go.set()
    assert third_in.wait(30)
    for thread in threads:
        thread.join(30)
    assert not list(tmp_path.iterdir())


def test_a_killed_preparation_is_gone_on_with(small_log, tmp_path):
    small_log.write_text(small_log.read_text() * 60)
    script = """
import sys
from dlrm_xla_data import lines, prepare, __main__
lines.BLOCK_BYTES, prepare.MARK_BYTES = 65536, 10**6
sys.exit(__main__.main(["prepare", sys.argv[1], sys.argv[2], "--format", "criteo"]))
"""
    command = [sys.executable, "-c", script, str(small_log), str(tmp_path / "p")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        journal = tmp_path / "p.unfinished" / "columns" / "journal.json"
        while not journal.exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert journal.exists()
    assert not (tmp_path / "p").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "going on behind the" in done.stderr
    whole = prepared_by(tmp_path / "q", small_log, "--format", "criteo")
    np.testing.assert_array_equal(open_prepared(tmp_path / "p").ids, whole.ids)


def test_a_preparation_killed_while_counting_counts_nothing_twice(small_log, tmp_path):
    script = """
import os, signal, sys
from dlrm_xla_data import __main__, assembly, protocols, raw_columns, vocabulary
raw_columns.CHUNK = protocols.CHUNK = assembly.CHUNK = 64
vocabulary.MOST_IN_MEMORY, vocabulary._RUN_VALUES = 100, 50
spill, calls = vocabulary._Counts._spill, []

def killed(self):
    spill(self)
    calls.append(self)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "killed":
    vocabulary._Counts._spill = killed
sys.exit(__main__.main(["prepare", sys.argv[1], sys.argv[2], "--format", "criteo"]))
"""
    command = [sys.executable, "-c", script, str(small_log), str(tmp_path / "p")]
    assert subprocess.run([*command, "killed"], stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert list(tmp_path.glob("p.unfinished/columns/*.vocabulary/*.spilled"))
    subprocess.run([*command, "again"], check=True, capture_output=True)
    whole, data = prepared_by(tmp_path / "q", small_log, "--format", "criteo"), open_prepared(tmp_path / "p")
    np.testing.assert_array_equal(data.ids, whole.ids)
    np.testing.assert_array_equal(np.concatenate(data.counts), np.concatenate(whole.counts))


LINE = "\t".join(["1", *map(str, range(13)), *(f"{k:08x}" for k in range(26))])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.just(LINE.encode()),
            st.binary(max_size=40),
            st.tuples(st.integers(0, len(LINE)), st.binary(min_size=1, max_size=3)).map(
                lambda edit: LINE.encode()[: edit[0]] + edit[1] + LINE.encode()[edit[0] + len(edit[1]) :]
            ),
        ),
        min_size=20,
        max_size=40,
    )
)
def test_whatever_a_log_holds_rows_are_read_or_named(tmp_path_factory, rows):
    raw = tmp_path_factory.getbasetemp() / "fuzzed.tsv"
    raw.write_bytes(b"\n".join([LINE.encode(), *rows]))
    layout = layouts.criteo()
    text = raw.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    # Numbers of lines as blocks of any size give them; a line is judged by itself, the fast reader by whole blocks.
    bad = [n for n, line in enumerate(text, 1) if line and problem_of(line, layout) is not None]
    good = sum(1 for line in text if line) - len(bad)
    for size in (64, 300, 10**6):
        blocks = list(lines.blocks([raw], lines.Place(), lines.Digests(), block_bytes=size))
        parsed = [parse(block, layout, keep_good=True) for block in blocks]
        assert sum(len(p.labels) for p in parsed) == good
        assert [n for p in parsed for _, n, _ in p.bad] == bad
        if bad:
            with pytest.raises(UserError, match=rf"fuzzed.tsv, line {bad[0]}: "):
                [parse(block, layout) for block in blocks]


@pytest.mark.parametrize("row", ["", LINE])
def test_a_byte_order_mark_is_dropped_where_a_file_begins_only(tmp_path, row):
    mark = b"\xef\xbb\xbf"
    raw = tmp_path / "marked.tsv"
    raw.write_bytes(mark + b"\n".join([LINE.encode(), LINE.encode(), mark + row.encode()]) + b"\n")
    for size in (len(LINE) + 1, 10**6):  # the marked row begins a block, or is within one
        blocks = lines.blocks([raw], lines.Place(), lines.Digests(), block_bytes=size)
        parsed = [parse(block, layouts.criteo(), keep_good=True) for block in blocks]
        assert sum(len(p.labels) for p in parsed) == 2
        assert [n for p in parsed for _, n, _ in p.bad] == [3]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.tuples(
            st.sampled_from(["label", "whole", "real", "hexadecimal", "integer", "time"]),
            st.text("0123 xX-+.eEfg", max_size=7),
        ),
        st.tuples(
            st.just("date"),
            st.builds(
                "{}{}".format, st.sampled_from(["", "2024-02-28", "2024-02-28T03:04:05"]), st.text("0129-:.TZ +")
            ),
        ),
    )
)
def test_the_reader_of_lines_and_that_of_blocks_take_the_same_values(tmp_path_factory, value):
    place, text = value
    layout = layouts.Layout(
        name="l", columns=("label", "whole", "real", "hexadecimal", "integer", "time"), delimiter=",", label="label",
        dense={"whole" if place == "whole" else "real": "none"}, integers=place == "whole",
        time="time", dates=place == "date",
        categories=(layouts.Category("hexadecimal", layouts.HEX), layouts.Category("integer", layouts.NUMBER)),
    )  # fmt: skip
    values = dict(zip(layout.columns, ["1", "2", "2", "ab", "7", "9"], strict=True))
    values |= {"time" if place == "date" else place: text}
    line = ",".join(values.values()).encode()
    block = lines.Block(tmp_path_factory.getbasetemp() / "l.csv", line + b"\n", 1, lines.Place())
    bad = problem_of(line, layout)
    if bad is None:
        assert len(parse(block, layout).labels) == 1
    else:
        with pytest.raises(UserError, match=r"l.csv, line 1: "):
            parse(block, layout)


@pytest.mark.parametrize("value", ["0x5", " 5", "05", str(2**63 - 1)])
def test_integers_as_arrow_reads_them_are_good_rows(small_log, tmp_path, value):
    text = small_log.read_text().splitlines()
    fields = text[5].split("\t")
    fields[5] = value
    text[5], text[6] = "\t".join(fields), "no row"
    small_log.write_text("\n".join(text))
    data = prepared_by(tmp_path / "p", small_log, "--format", "criteo", "--max-bad-rows", 1)
    assert data.dense[5, 4] == pytest.approx(np.log1p(int(value.strip(), 16 if "x" in value else 10)))
    assert len(data.labels) == 699


def test_a_folder_that_may_not_be_written_is_told(small_log, tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert main(["prepare", str(small_log), str(blocker / "p"), "--format", "criteo"]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert set(os.listdir(tmp_path)) == {"file", "small.tsv"}


def test_another_column_of_times_is_another_preparation(tmp_path):
    """What an unfinished one has read already is not gone on with then."""
    (tmp_path / "x.csv").write_text("y,a,b,c\n" + "".join(f"{k % 2},{k},{90 - k},v{k % 7}\n" for k in range(90)))
    keys = []
    for time_of in ("a", "b"):
        text = f"label: y\ndense: [a]\ncategories: [c]\ntime: {time_of}\n"
        (tmp_path / "l.yaml").write_text(text)
        prepared_by(tmp_path / time_of, tmp_path / "x.csv", "--format", str(tmp_path / "l.yaml"))
        keys.append(json.loads((tmp_path / time_of / "meta.json").read_text())["key"])
    assert keys[0] != keys[1]
