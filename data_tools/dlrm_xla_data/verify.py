"""Whether a prepared dataset is what its metadata says, read whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dlrm_xla_data.assembly import sha256
from dlrm_xla_data.prepared import VERIFIED, PreparedDataset, file_marks, open_prepared, read_meta

_ROWS = 2**18


def verify(folder: Path) -> list[str]:
    """What is wrong with a dataset, nothing if it is sound; it is marked, and `open_prepared` tells later changes.

    Checks digests of all files, labels, dense features, the range of ids, rising offsets, and that ids occur in
    training as often as ``counts`` says.
    """
    meta = read_meta(folder)
    (folder / VERIFIED).unlink(missing_ok=True)
    dataset = open_prepared(folder)
    problems = []
    marks = file_marks(folder)
    for name, digest in meta.get("checksums", {}).items():
        if sha256(folder / f"{name}.npy") != digest:
            problems.append(f"{name}.npy is not what was written: its SHA-256 is not the one in meta.json")
    if "values_per_table" in meta:
        ends = np.cumsum([0, *meta["values_per_table"]])
        values = np.load(folder / "values.npy", mmap_mode="r")
        for table, first, last in zip(dataset.names, ends, ends[1:], strict=False):
            pieces = range(first, last, _ROWS)
            if any((np.diff(values[k : min(k + _ROWS + 1, last)]) <= 0).any() for k in pieces):
                problems.append(f"values of {table} do not rise, so that what its ids stand for is not found")
    problems += list(_content(dataset, "ids_of" not in meta))
    (folder / VERIFIED).write_text(json.dumps({"unsound": problems[0]} if problems else marks))
    return problems


def _content(dataset: PreparedDataset, counted: bool) -> Iterator[str]:
    """``counted``: counts are of this dataset's own training rows."""
    num_rows, num_features = len(dataset.labels), len(dataset.names)
    rows_of_tables = [1 + len(c) for c in dataset.counts]
    start, stop = dataset.splits["train"]
    seen = [np.zeros(rows, np.int64) for rows in rows_of_tables]
    lengths = [1] * num_features if dataset.bags else dataset.bag_lengths
    columns = np.cumsum([0, *lengths])
    for name, (first, last) in dataset.splits.items():
        if not 0 <= first <= last <= num_rows:
            yield f"the {name} part is rows {first} to {last} of {num_rows}"
            return
    for table, counts in zip(dataset.names, dataset.counts, strict=True):
        if (np.diff(counts) > 0).any():
            yield f"counts of {table} do not fall: its ids are not ordered by frequency"
    for first in tqdm(range(0, num_rows, _ROWS), unit="block", desc="verifying", disable=None):
        rows = slice(first, min(first + _ROWS, num_rows))
        if not np.isin(dataset.labels[rows], (0, 1)).all():
            yield f"rows {rows.start} to {rows.stop}: a label is neither 0 nor 1"
        if not np.isfinite(dataset.dense[rows]).all():
            yield f"rows {rows.start} to {rows.stop}: a dense feature is not finite"
        in_training = slice(max(rows.start, start), min(rows.stop, stop))
        for k, table in enumerate(dataset.names):
            if dataset.bags is None:
                ids = np.asarray(dataset.ids[rows, columns[k] : columns[k + 1]])
                inside = ids[max(0, in_training.start - first) : max(0, in_training.stop - first)]
            else:
                offsets = np.asarray(dataset.bags.offsets[rows.start * num_features : rows.stop * num_features + 1])
                if (np.diff(offsets) < 0).any():
                    yield f"rows {rows.start} to {rows.stop}: offsets fall"
                    return
                flat = np.asarray(dataset.bags.ids[offsets[0] : offsets[-1]])
                sizes = np.diff(offsets)
                feature = np.repeat(np.tile(np.arange(num_features), len(sizes) // num_features), sizes)
                row = np.repeat(np.repeat(np.arange(rows.start, rows.stop), num_features), sizes)
                ids = flat[feature == k]
                inside = ids[(row[feature == k] >= start) & (row[feature == k] < stop)]
            if len(ids) and (ids.min() < 0 or ids.max() >= rows_of_tables[k]):
                yield f"rows {rows.start} to {rows.stop}: an id of {table} is not within 0 to {rows_of_tables[k] - 1}"
            elif inside.size:
                # A bag made of one id counts by that id: what was counted is the log's own value.
                own = inside if dataset.bags is not None or lengths[k] == 1 else inside[:, :1]
                seen[k] += np.bincount(own.ravel(), minlength=rows_of_tables[k])
    for k, table in enumerate(dataset.names if counted else ()):
        if dataset.bags is None and lengths[k] > 1 and not _made_of_one(dataset, k):
            continue  # ids of several slots were counted together, in an order that only their maker knows
        wrong = np.flatnonzero(seen[k][1:] != dataset.counts[k])
        if len(wrong):
            at = int(wrong[0]) + 1
            told = dataset.counts[k][at - 1]
            yield f"id {at} of {table} occurs {seen[k][at]} times in training, counts.npy says {told}"


def _made_of_one(dataset: PreparedDataset, k: int) -> bool:
    return "synthetic" not in dataset.source
