"""Rows of a service: numbers and ids as the prepared log would have them."""

import csv
import datetime
import gzip
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import criteo_line
from dlrm_xla_data.__main__ import main
from dlrm_xla_data.encoder import Encoder
from dlrm_xla_data.prepared import open_prepared

from dlrm_xla.errors import UserError

LAYOUT = """label: y
dense: {price: log1p, age: none}
categories:
  - {column: tags, separator: "|", at_most: 3}
  - city
  - {column: item, kind: integer}
  - {column: code, kind: hexadecimal}
"""


def prepare(log, folder, *flags):
    assert main(["prepare", str(log), str(folder), *map(str, flags)]) == 0


def csv_rows(rows, seed):
    rng = np.random.default_rng(seed)
    cities = ["Rome", "Oslo, N", 'the "Hague"', "Zürich", "null", ""]
    return [
        {
            "y": str(rng.integers(2)),
            "price": f"{rng.random():.3f}" if rng.random() < 0.8 else "",
            "age": f"{rng.normal():.3f}",
            "tags": "|".join(f"t{k}" for k in rng.zipf(1.6, rng.integers(0, 5)) % 40),
            "city": str(rng.choice(cities)),
            "item": str(rng.zipf(1.5) % 300 - 5) if rng.random() < 0.9 else "",
            "code": f"{rng.zipf(1.5) % 999:x}" if rng.random() < 0.9 else "",
        }
        for _ in range(rows)
    ]


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def prepared_rows(folder):
    """All rows of a folder of test rows alone: they stay in the log's order."""
    data = open_prepared(folder)
    return data.dense, data.slots(np.arange(len(data.labels)))


def assert_encodes(encode, rows, folder):
    dense, ids = prepared_rows(folder)
    got_dense, got_ids = encode(rows)
    assert (got_dense.dtype, got_ids.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(got_dense, dense)
    np.testing.assert_array_equal(got_ids, ids)
    for k in (0, len(rows) - 1):
        one_dense, one_ids = encode(rows[k : k + 1])
        np.testing.assert_array_equal(one_dense, dense[k : k + 1])
        np.testing.assert_array_equal(one_ids, ids[k : k + 1])


def test_csv_rows_are_as_later_rows_of_the_log(tmp_path):
    (tmp_path / "l.yaml").write_text(LAYOUT)
    old, new = csv_rows(500, 0), csv_rows(300, 1)
    write_csv(tmp_path / "old.csv", old)
    write_csv(tmp_path / "new.csv", new)
    prepare(tmp_path / "old.csv", tmp_path / "old", "--format", tmp_path / "l.yaml", "--min-count", 2)
    prepare(tmp_path / "new.csv", tmp_path / "new", "--format", tmp_path / "l.yaml", "--ids-of", tmp_path / "old")
    assert_encodes(Encoder(tmp_path / "old"), new, tmp_path / "new")
    typed = [
        row
        | {
            "price": float(row["price"]) if row["price"] else float("nan"),
            "tags": row["tags"].split("|"),
            "city": row["city"].encode(),
            "item": int(row["item"]) if row["item"] else None,
            "user": object(),
        }
        for row in new
    ]
    assert_encodes(Encoder(str(tmp_path / "old")), typed, tmp_path / "new")


def test_a_service_needs_three_files(tmp_path):
    (tmp_path / "l.yaml").write_text(LAYOUT)
    rows = csv_rows(100, 0)
    write_csv(tmp_path / "log.csv", rows)
    prepare(tmp_path / "log.csv", tmp_path / "all", "--format", tmp_path / "l.yaml")
    (tmp_path / "some").mkdir()
    for name in ("meta.json", "values.npy", "value_ids.npy"):
        shutil.copy(tmp_path / "all" / name, tmp_path / "some")
    for one, other in zip(Encoder(tmp_path / "all")(rows), Encoder(tmp_path / "some")(rows), strict=True):
        np.testing.assert_array_equal(one, other)
    script = (
        f"import sys; from dlrm_xla_data.encoder import Encoder; Encoder({str(tmp_path / 'some')!r})([{rows[0]!r}])"
    )
    check = "; assert not {'torch', 'torch_xla'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script + check], check=True)


@pytest.mark.parametrize("flags", [(), ("--multi-hot", ",".join(["3", "1", *["2"] * 24]), "--seed", "7")])
def test_criteo_rows(flags, tmp_path):
    rng = np.random.default_rng(0)
    names = ["label", *(f"I{k}" for k in range(1, 14)), *(f"C{k}" for k in range(1, 27))]
    lines = [criteo_line(rng) for _ in range(700)]
    (tmp_path / "old.tsv").write_text("\n".join(lines[:500]) + "\n")
    with gzip.open(tmp_path / "new.tsv.gz", "wt") as file:
        file.write("\n".join(lines[500:]) + "\n")
    prepare(tmp_path / "old.tsv", tmp_path / "old", "--format", "criteo", *flags)
    prepare(tmp_path / "new.tsv.gz", tmp_path / "new", "--format", "criteo", "--ids-of", tmp_path / "old")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines[500:]]
    assert_encodes(Encoder(tmp_path / "old"), rows, tmp_path / "new")


def test_avazu_hours_are_derived(tmp_path):
    header = "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,"
    header += "device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
    rng = np.random.default_rng(0)
    lines = []
    for k in range(400):
        hexadecimal = [f"{rng.integers(20):08x}" for _ in range(9)]
        numbers = [str(v) for v in rng.integers(-1, 50, 12)]
        fields = [str(k), str(k % 2), f"1410{21 + k // 100:02d}{k % 24:02d}", *numbers[:2], *hexadecimal, *numbers[2:]]
        lines.append(",".join(fields))
    for name, some in (("old", lines[:300]), ("new", lines[300:])):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *some]) + "\n")
    prepare(tmp_path / "old.csv", tmp_path / "old", "--format", "avazu")
    prepare(tmp_path / "new.csv", tmp_path / "new", "--format", "avazu", "--ids-of", tmp_path / "old")
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines[300:]]
    assert_encodes(Encoder(tmp_path / "old"), rows, tmp_path / "new")


def test_parquet_rows_have_the_types_of_their_columns(tmp_path):
    rng = np.random.default_rng(0)
    day = datetime.date(2024, 1, 1)

    def rows(count):
        return [
            {
                "y": int(rng.integers(2)),
                "price": float(rng.random()) if rng.random() < 0.8 else None,
                "tags": [f"t{k}" for k in rng.integers(0, 20, rng.integers(0, 4))],
                "item": int(rng.integers(50)) if rng.random() < 0.9 else None,
                "city": str(rng.choice(["Rome", "Oslo", ""])),
                "day": day + datetime.timedelta(int(rng.integers(9))),
                "paid": bool(rng.integers(2)),
            }
            for _ in range(count)
        ]

    kinds = {"y": pa.int8(), "price": pa.float32(), "tags": pa.list_(pa.string()), "item": pa.int32()}
    kinds |= {"city": pa.dictionary(pa.int32(), pa.string()), "day": pa.date32(), "paid": pa.bool_()}
    plain = pa.schema(kinds | {"city": pa.string()})
    (tmp_path / "l.yaml").write_text(
        "format: parquet\nlabel: y\ndense: [price]\ncategories: [tags, item, city, day, paid]\n"
    )
    new = rows(200)
    for name, some in (("old", rows(300)), ("new", new)):
        pq.write_table(pa.Table.from_pylist(some, plain).cast(pa.schema(kinds)), tmp_path / f"{name}.parquet")
    prepare(tmp_path / "old.parquet", tmp_path / "old", "--format", tmp_path / "l.yaml")
    prepare(tmp_path / "new.parquet", tmp_path / "new", "--format", tmp_path / "l.yaml", "--ids-of", tmp_path / "old")
    encode = Encoder(tmp_path / "old")
    assert_encodes(encode, new, tmp_path / "new")
    with pytest.raises(ValueError, match="row 1: column item is '5', expected int32"):
        encode([new[0], new[1] | {"item": "5"}])
    with pytest.raises(ValueError, match="tags has 9 values, but no more than 3"):
        encode([new[0] | {"tags": ["t1"] * 9}])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"price": "dear"}, "row 1: column price is 'dear', expected a number"),
        ({"price": float("inf")}, "row 1: dense column price is not finite"),
        ({"price": "1e99"}, "row 1: dense column price is not finite, or not within float32"),
        ({"item": "5.5"}, "row 1: column item is '5.5', expected an integer"),
        ({"item": 2**70}, "row 1: column item is 1180591620717411303424, expected int64"),
        ({"code": "0xfg"}, "row 1: category code is not hexadecimal"),
        ({"city": 5.0}, "row 1: column city is 5.0, expected the text that stood in the log"),
        ({"city": ["Rome", "Oslo"]}, r"row 1: column city is \['Rome', 'Oslo'\], expected one value"),
        (None, "row 1: there is no column 'item'; a missing value is None"),
    ],
)
def test_a_row_that_is_none_is_named(change, told, tmp_path):
    (tmp_path / "l.yaml").write_text(LAYOUT)
    rows = csv_rows(60, 0)
    write_csv(tmp_path / "log.csv", rows)
    prepare(tmp_path / "log.csv", tmp_path / "all", "--format", tmp_path / "l.yaml")
    bad = {name: value for name, value in rows[1].items() if change or name != "item"} | (change or {})
    with pytest.raises(ValueError, match=told):
        Encoder(tmp_path / "all")([rows[0], bad, rows[2]])


def test_folders_that_say_nothing_of_values(tmp_path):
    (tmp_path / "l.yaml").write_text(LAYOUT)
    rows = csv_rows(60, 0)
    write_csv(tmp_path / "log.csv", rows)
    prepare(tmp_path / "log.csv", tmp_path / "all", "--format", tmp_path / "l.yaml")
    prepare(tmp_path / "log.csv", tmp_path / "later", "--format", tmp_path / "l.yaml", "--ids-of", tmp_path / "all")
    with pytest.raises(UserError, match=r"its ids are those of all\. Name that folder"):
        Encoder(tmp_path / "later")
    with pytest.raises(ValueError, match=r"^no rows"):
        Encoder(tmp_path / "all")([])
    (tmp_path / "all" / "values.npy").unlink()
    with pytest.raises(UserError, match=r"values.npy.*Prepare its log again"):
        Encoder(tmp_path / "all")
    assert main(["synthesize", str(tmp_path / "made"), "--rows", "100", "--tables", "10x2"]) == 0
    with pytest.raises(UserError, match="Its rows are synthetic"):
        Encoder(tmp_path / "made")
