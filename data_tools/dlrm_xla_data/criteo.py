"""Raw Criteo click logs (label, 13 integers, 26 hexadecimal categories, tab-separated) -> prepared dataset.

The text is read once, block by block, with Arrow; each category's raw values go to a scratch file of their own,
from which ids are made one column at a time. So memory holds one block of text and one column at most.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.errors import UserError
from dlrm_xla_data.prepared import (
    PreparedDataset,
    day_split,
    open_prepared,
    read_meta,
    save_meta,
    written_whole,
)

INTEGERS = [f"I{k}" for k in range(1, 14)]
CATEGORIES = [f"C{k}" for k in range(1, 27)]
COLUMNS = ["label", *INTEGERS, *CATEGORIES]
BLOCK_BYTES = 32 << 20
MISSING = -1

# ASCII -> value of a hexadecimal digit, 255 for anything else.
_HEX = np.full(256, 255, dtype=np.uint8)
_HEX[np.frombuffer(b"0123456789", np.uint8)] = np.arange(10)
_HEX[np.frombuffer(b"abcdef", np.uint8)] = np.arange(10, 16)
_HEX[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


def open_log(raw: Path, cache: Path | None) -> PreparedDataset:
    """The prepared copy of a raw log, made now if there is none of this very file.

    It lies beside the log as ``<name>.prepared``, or under ``cache``.
    """
    if not raw.is_file():
        raise UserError(f"--data {raw}: there is no such file. Give a raw Criteo log or a prepared folder.")
    source = _fingerprint(raw)
    folder = (cache or raw.parent) / f"{raw.name}.prepared"
    if folder.exists() and read_meta(folder)["source"] == source:
        return open_prepared(folder)
    if folder.exists():
        print(f"{folder} was made from another {raw.name}; preparing it again", file=sys.stderr)
    return prepare(raw, folder, source)


def prepare(raw: Path, folder: Path, source: dict[str, Any] | None = None) -> PreparedDataset:
    """Prepares a raw log into ``folder``, which appears only when it is whole.

    Dense: log(max(x, 0) + 1), missing 0. Ids by falling frequency in the training days, ties by value; 0 for missing
    and unseen. Split: ``day_split``.
    """
    began = time.perf_counter()
    source = source or _fingerprint(raw)
    print(f"preparing {raw} -> {folder}", file=sys.stderr)
    with written_whole(folder) as scratch:
        num_rows = _read_columns(raw, scratch)
        splits = day_split(num_rows)
        per_table = _write_ids(scratch, num_rows, splits["train"][1])
        for name, dtype, width in (("labels", np.int8, ()), ("dense", np.float32, (len(INTEGERS),))):
            _as_npy(scratch / name, (num_rows, *width), dtype)
        save_meta(
            scratch,
            {
                "source": source,
                "num_rows": num_rows,
                "dense": INTEGERS,
                "tables": CATEGORIES,
                "bag_lengths": [1] * len(CATEGORIES),
                "ids_per_table": per_table,
                "splits": splits,
            },
        )
    print(f"prepared {num_rows:,} rows in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return open_prepared(folder)


def _fingerprint(raw: Path) -> dict[str, Any]:
    """Enough to tell one log from another without reading it all: name, size, hash of both ends."""
    size = raw.stat().st_size
    if size == 0:
        raise UserError(f"{raw} is empty; a Criteo log has lines of {len(COLUMNS)} tab-separated columns")
    digest = hashlib.sha256()
    with raw.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return {"file": raw.name, "size": size, "sha256_of_both_ends": digest.hexdigest()}


def _is_gzip(raw: Path) -> bool:
    with raw.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _blocks(raw: Path) -> Iterator[Any]:
    """Arrow record batches of the log; whatever does not fit the format becomes a UserError with its line."""
    import pyarrow as pa
    from pyarrow import csv

    types = {"label": pa.int8()} | dict.fromkeys(INTEGERS, pa.int64()) | dict.fromkeys(CATEGORIES, pa.string())
    try:
        with pa.input_stream(str(raw), compression="gzip" if _is_gzip(raw) else None) as stream:
            yield from csv.open_csv(
                stream,
                read_options=csv.ReadOptions(block_size=BLOCK_BYTES, column_names=COLUMNS),
                parse_options=csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
                convert_options=csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True),
            )
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        raise _explain(raw, error) from error


def _read_columns(raw: Path, scratch: Path) -> int:
    """Appends every column of the log to its scratch file and returns the number of rows."""
    num_rows = 0
    files: dict[str, BinaryIO] = {n: (scratch / n).open("wb") for n in ("labels", "dense", *CATEGORIES)}
    try:
        for block in _blocks(raw):
            labels = block.column(0).to_numpy(zero_copy_only=False)
            if not np.isin(labels, (0, 1)).all():
                raise _explain(raw, None)
            integers = [block.column(1 + k).fill_null(0).to_numpy() for k in range(len(INTEGERS))]
            dense = np.log1p(np.maximum(np.stack(integers, axis=1), 0).astype(np.float32))
            _write(files["labels"], labels.astype(np.int8))
            _write(files["dense"], dense)
            for k, name in enumerate(CATEGORIES):
                values = _from_hex(block.column(1 + len(INTEGERS) + k))
                if values is None:
                    raise _explain(raw, None)
                _write(files[name], values)
            num_rows += block.num_rows
    finally:
        for file in files.values():
            file.close()
    return num_rows


def _write(file: BinaryIO, values: NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(values).data)


def _from_hex(column: Any) -> NDArray[np.int64] | None:
    """Up to eight hexadecimal digits -> int64, MISSING where empty; None if any value is something else."""
    import pyarrow.compute as pc

    missing = column.is_null().to_numpy(zero_copy_only=False)
    filled = column.fill_null("0")
    if len(filled) and pc.max(pc.binary_length(filled)).as_py() > 8:
        return None
    padded = pc.ascii_lpad(filled, width=8, padding="0")
    text = np.frombuffer(padded.buffers()[2], np.uint8)[padded.offset * 8 :][: len(padded) * 8]
    digits = _HEX[text.reshape(-1, 8)]
    if (digits > 15).any():
        return None
    pairs = (digits[:, 0::2] << 4) | digits[:, 1::2]
    values = np.ascontiguousarray(pairs).view(">u4").ravel().astype(np.int64)
    values[missing] = MISSING
    return values


def _write_ids(scratch: Path, num_rows: int, num_train: int) -> list[int]:
    """Turns each category's raw values into ids by falling training frequency; returns ids per table."""
    ids = np.lib.format.open_memmap(scratch / "ids.npy", "w+", np.int32, (num_rows, len(CATEGORIES)))
    all_counts = []
    for k, name in enumerate(CATEGORIES):
        values = np.fromfile(scratch / name, np.int64)
        distinct, counts = np.unique(values[:num_train], return_counts=True)
        if len(distinct) and distinct[0] == MISSING:
            distinct, counts = distinct[1:], counts[1:]
        order = np.argsort(-counts, kind="stable")
        id_of = np.empty(len(distinct) + 1, np.int32)
        id_of[order] = np.arange(1, len(distinct) + 1)
        id_of[-1] = 0
        position = np.searchsorted(distinct, values)
        position[position == len(distinct)] = -1
        known = distinct[position] == values if len(distinct) else np.zeros(num_rows, bool)
        ids[:, k] = np.where(known, id_of[position], 0)
        all_counts.append(counts[order].astype(np.int64))
        (scratch / name).unlink()
    ids.flush()
    np.save(scratch / "counts.npy", np.concatenate(all_counts))
    return [len(counts) for counts in all_counts]


def _as_npy(path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    """Turns a file of raw numbers into an .npy file of that shape."""
    array = np.lib.format.open_memmap(f"{path}.npy", "w+", dtype, shape)
    array[...] = np.memmap(path, dtype, "r", shape=shape)
    array.flush()
    os.unlink(path)


def _explain(raw: Path, error: Exception | None) -> UserError:
    """Reads the log line by line to find the first one that is not of the format, and says what is wrong with it."""
    opener = gzip.open if _is_gzip(raw) else open
    number = 0
    try:
        with opener(raw, "rb") as file:
            for number, line in enumerate(file, 1):
                problem = _problem(line.rstrip(b"\r\n"))
                if problem:
                    return UserError(f"{raw}, line {number}: {problem}")
    except EOFError:
        return UserError(f"{raw} is a truncated gzip file: it ends after line {number}. Fetch it again.")
    except (OSError, zlib.error) as broken:
        return UserError(f"{raw} cannot be read after line {number}: {broken}. Fetch it again.")
    if number == 0:
        return UserError(f"{raw} holds no lines; a Criteo log has lines of {len(COLUMNS)} tab-separated columns")
    return UserError(f"{raw} cannot be read: {error}")


def _problem(line: bytes) -> str | None:
    fields = line.split(b"\t")
    if len(fields) == len(COLUMNS) - 1:
        return (
            "39 columns, and no label: this is the unlabelled test form of the Criteo log. "
            "Training needs the labelled one (train.txt, 40 columns)."
        )
    if len(fields) != len(COLUMNS):
        problem = f"{len(fields)} tab-separated columns, expected {len(COLUMNS)}: label, 13 integers, 26 categories"
        if len(fields) == 1 and line.count(b",") > 1:
            problem += ". Commas separate its columns, so this is not Criteo's format (Avazu's logs look like this)"
        return problem
    if fields[0] not in (b"0", b"1"):
        return f"the label is {_shown(fields[0])}, expected 0 or 1"
    for name, value in zip(COLUMNS[1:14], fields[1:14], strict=True):
        digits = value.removeprefix(b"-")
        if value and not (digits.isdigit() and len(digits) < 19):
            return f"column {name} is {_shown(value)}, expected an integer or nothing"
    for name, value in zip(CATEGORIES, fields[14:], strict=True):
        if len(value) > 8 or any(_HEX[b] == 255 for b in value):
            return f"column {name} is {_shown(value)}, expected up to 8 hexadecimal digits or nothing"
    return None


def _shown(value: bytes) -> str:
    text = value.decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:40] + "...")
