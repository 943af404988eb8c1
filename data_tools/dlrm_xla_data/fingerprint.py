"""What a dataset is told by: whether two are the same, and whether rows of one part occur in another.

A row is one number of 64 bits, so rows are compared without being kept. Large parts are sampled evenly; what is told
about them is an estimate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm_xla_data.prepared import PreparedDataset

_MOST_TRAIN_ROWS = 2_000_000
_MOST_OTHER_ROWS = 200_000
_SKETCH = 4096
# Logs repeat rows by themselves: in the real sample of Criteo's log that the tests use, fewer than 1 % of test rows.
_SUSPICIOUS_SHARE = 0.05


def describe_data(dataset: PreparedDataset) -> dict[str, Any]:
    """What a checkpoint keeps of its training data.

    ``vocabulary`` is a digest of how often each id occurs in training, so of what ids mean; ``rows`` one of the labels
    and of rows sampled evenly; ``sketch`` the smallest hashes of training rows, which any other dataset can be held
    against; ``sketch_share`` the share of training rows that were hashed for it.
    """
    vocabulary = hashlib.sha256(json.dumps([dataset.names, list(dataset.bag_lengths)]).encode())
    for counts in dataset.counts:
        vocabulary.update(np.ascontiguousarray(counts, np.int64).data)
    rows = hashlib.sha256(np.ascontiguousarray(dataset.labels, np.int8).data)
    rows.update(row_hashes(dataset, _evenly(0, len(dataset.labels), 100_000)).data)
    start, stop = dataset.splits["train"]
    chosen = _evenly(start, stop, _MOST_TRAIN_ROWS)
    hashes = np.unique(row_hashes(dataset, chosen))[:_SKETCH]
    return {
        "num_rows": len(dataset.labels),
        "splits": {name: list(part) for name, part in dataset.splits.items()},
        "vocabulary": vocabulary.hexdigest(),
        "rows": rows.hexdigest(),
        "sketch": [int(h) for h in hashes],
        "sketch_share": len(chosen) / max(1, stop - start),
    }


def data_changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two descriptions; empty where nothing does."""
    if saved["vocabulary"] != now["vocabulary"]:
        return "the data is another: its tables have other ids, or ids that mean something else"
    for name in ("num_rows", "splits", "rows"):
        if saved[name] != now[name]:
            told = f" ({saved[name]} -> {now[name]})" if name != "rows" else ""
            return f"the data is another: its {name.replace('_', ' of ').replace('num', 'number')} changed{told}"
    return ""


def row_hashes(dataset: PreparedDataset, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One number per row, of its label, dense features and ids."""
    result = np.zeros(len(rows), np.uint64)
    for first in range(0, len(rows), 100_000):
        part = rows[first : first + 100_000]
        columns = np.concatenate(
            [
                np.asarray(dataset.labels[part], np.uint32)[:, None],
                np.ascontiguousarray(dataset.dense[part], np.float32).view(np.uint32),
                np.ascontiguousarray(dataset.slots(part), np.int32).view(np.uint32),
            ],
            axis=1,
        )
        mixed = np.zeros(len(part), np.uint64)
        for column in columns.T:  # the finalizer of splitmix64, Steele et al. 2014, column by column
            mixed = (mixed + column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
        result[first : first + len(part)] = mixed
    return result


def seen_in_training(dataset: PreparedDataset, split: str) -> str:
    """A warning where rows of a split occur in the training part of the same dataset; empty where they do not."""
    start, stop = dataset.splits["train"]
    chosen = _evenly(start, stop, _MOST_TRAIN_ROWS)
    others = _evenly(*dataset.splits[split], _MOST_OTHER_ROWS)
    known = np.isin(row_hashes(dataset, others), row_hashes(dataset, chosen)).mean() if len(others) else 0.0
    return _told(split, float(known) * (stop - start) / max(1, len(chosen)))


def seen_by_sketch(dataset: PreparedDataset, split: str, description: Mapping[str, Any]) -> str:
    """The same against the training rows that a checkpoint describes, whatever dataset they were in."""
    sketch = np.array(description["sketch"], np.uint64)
    hashes = row_hashes(dataset, _evenly(*dataset.splits[split], _MOST_OTHER_ROWS))
    if len(sketch) == _SKETCH:  # only hashes below its largest could be in it
        hashes = hashes[hashes <= sketch[-1]]
    if not len(hashes):
        return ""
    return _told(split, float(np.isin(hashes, sketch).mean()) / description["sketch_share"])


def _told(split: str, share: float) -> str:
    if share < _SUSPICIOUS_SHARE:
        return ""
    return (
        f"{min(1.0, share):.0%} of the {split} rows occur in the training rows too: their figures say little about "
        "new ones. Remove duplicates, or split by time."
    )


def _evenly(start: int, stop: int, most: int) -> NDArray[np.int64]:
    return np.arange(start, stop, max(1, -(-(stop - start) // most)))
