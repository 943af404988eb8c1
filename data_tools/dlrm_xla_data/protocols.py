"""Which rows train, test and validate: published protocols by name.

Every protocol says the part of each row; rows of one part keep their order and end up side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.errors import UserError, choices
from dlrm_xla_data.parsing import PARTS
from dlrm_xla_data.prepared import day_split
from dlrm_xla_data.raw_columns import CHUNK, RawColumns

TRAIN, TEST, VALIDATION = range(3)
Parts = Callable[[], Iterator[NDArray[np.int8]]]
_BUCKETS = 2**12


@dataclass(frozen=True)
class Split:
    """The part of each row, in chunks of `dlrm_xla_data.raw_columns.CHUNK` rows, and the rows of each part.

    ``ranges``: where the parts lie side by side already, what rows they are; there they stay.
    """

    parts: Parts
    counts: tuple[int, int, int]
    ranges: dict[str, tuple[int, int]] | None = None

    def final_ranges(self) -> dict[str, tuple[int, int]]:
        """Rows of each part in the prepared dataset."""
        if self.ranges is not None:
            return {name: self.ranges[name] for name in PARTS}
        ends = np.cumsum([0, *self.counts])
        return {name: (int(ends[k]), int(ends[k + 1])) for k, name in enumerate(PARTS)}


def dlrm_days(columns: RawColumns, rows_of_files: Sequence[int], seed: int) -> Split:
    """DLRM's own: the last day's first half tests, its second half validates, all days before train.

    One file is Criteo Kaggle's seven days in equal shares of the rows; several are one day each, as Criteo Terabyte's
    24. With a time column the last day is as many rows, the newest. Source: facebookresearch/dlrm, data_utils.py and
    dlrm_data_pytorch.py.
    """
    if len(rows_of_files) == 1:
        start, middle = day_split(columns.num_rows)["test"]
    else:
        start = sum(rows_of_files[:-1])
        middle = start + (rows_of_files[-1] + 1) // 2
    return _in_order(columns, (start, middle), PARTS)


def chronological(columns: RawColumns, rows_of_files: Sequence[int], seed: int) -> Split:
    """By time 8:1:1: the oldest eight tenths train, the next tenth validates, the newest tests.

    The split that follows how a model is used; Zhu et al. 2022, "BARS" (SIGIR), section 3, discuss it.
    """
    total = columns.num_rows
    return _in_order(columns, (total * 8 // 10, total * 9 // 10), ("train", "validation", "test"))


def random_811(columns: RawColumns, rows_of_files: Sequence[int], seed: int) -> Split:
    """Each row drawn by itself: eight tenths train, one validates, one tests.

    Zhu et al. 2021, "Open Benchmarking for Click-Through Rate Prediction" (CIKM), section 4.1, for Criteo_x4 (with
    --min-count 10) and Avazu_x4 (with --min-count 2). The future leaks into training; choose it to compare with papers.
    """

    def parts() -> Iterator[NDArray[np.int8]]:
        for first in range(0, columns.num_rows, CHUNK):
            count = min(CHUNK, columns.num_rows - first)
            drawn = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, first])).random(count)
            yield np.where(drawn < 0.8, TRAIN, np.where(drawn < 0.9, VALIDATION, TEST)).astype(np.int8)

    return _counted(parts)


def column(columns: RawColumns, rows_of_files: Sequence[int], seed: int) -> Split:
    """As the layout's split column says, which it must have."""

    def parts() -> Iterator[NDArray[np.int8]]:
        for chunk in columns.chunks("order"):
            yield chunk.astype(np.int8)

    return _counted(parts)


def all_test(columns: RawColumns) -> Split:
    """Every row is of the test part: what has the ids of another dataset is there to be scored, unless told."""
    return _from_ranges({"train": (0, 0), "validation": (0, 0), "test": (0, columns.num_rows)})


PROTOCOLS: dict[str, Callable[[RawColumns, Sequence[int], int], Split]] = {
    "dlrm_days": dlrm_days,
    "chronological": chronological,
    "random_811": random_811,
    "column": column,
}

ALL_TEST = "all_test"

BY_TIME = ("dlrm_days", "chronological")


def make_split(name: str, columns: RawColumns, rows_of_files: Sequence[int], seed: int) -> Split:
    """The split of a protocol; UserError where a part would have no row."""
    if name == ALL_TEST:
        return all_test(columns)
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: {choices(name, PROTOCOLS)}")
    split = PROTOCOLS[name](columns, rows_of_files, seed)
    for part, (start, stop) in split.final_ranges().items():
        if start >= stop:
            raise UserError(
                f"--protocol {name} leaves no row of {columns.num_rows:,} for the {part} part. Give more rows, or "
                "another protocol."
            )
    return split


def _in_order(columns: RawColumns, cuts: tuple[int, int], names: tuple[str, str, str]) -> Split:
    """Rows cut at two places into parts of these names: by time where the layout has one, else in their own order.

    Rows of the same time stay together, so parts have only about so many rows where times repeat.
    """
    if columns.order != "time":
        ends = (0, *cuts, columns.num_rows)
        return _from_ranges(dict(zip(names, itertools.pairwise(ends), strict=True)))
    first, second = (_nth(columns, place) for place in cuts)
    numbers = np.array([PARTS.index(name) for name in names], np.int8)

    def parts() -> Iterator[NDArray[np.int8]]:
        for times in columns.chunks("order"):
            yield numbers[(times >= first).astype(np.int8) + (times >= second)]

    return _counted(parts)


def _from_ranges(ranges: dict[str, tuple[int, int]]) -> Split:
    total = max(stop for _, stop in ranges.values())

    def parts() -> Iterator[NDArray[np.int8]]:
        for first in range(0, total, CHUNK):
            rows = np.arange(first, min(first + CHUNK, total))
            chunk = np.zeros(len(rows), np.int8)
            for number, name in enumerate(PARTS):
                start, stop = ranges[name]
                chunk[(rows >= start) & (rows < stop)] = number
            yield chunk

    train, test, validation = (ranges[name][1] - ranges[name][0] for name in PARTS)
    return Split(parts, (train, test, validation), ranges)


def _counted(parts: Parts) -> Split:
    counts = np.zeros(3, np.int64)
    for chunk in parts():
        counts += np.bincount(chunk, minlength=3)
    return Split(parts, (int(counts[0]), int(counts[1]), int(counts[2])))


def _nth(columns: RawColumns, place: int) -> int:
    """The value that would be at ``place`` if the order column were sorted, by histograms that narrow down on it."""
    low, high = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for chunk in columns.chunks("order"):
        low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
    below = 0
    while low < high:
        width = -(-(high - low + 1) // _BUCKETS)
        histogram = np.zeros(_BUCKETS, np.int64)
        for chunk in columns.chunks("order"):
            inside = chunk[(chunk >= low) & (chunk <= high)]
            histogram += np.bincount((inside - low) // width, minlength=_BUCKETS)
        ends = below + np.cumsum(histogram)
        bucket = int(np.searchsorted(ends, place, side="right"))
        below = int(ends[bucket - 1]) if bucket else below
        low, high = low + bucket * width, min(high, low + (bucket + 1) * width - 1)
    return low
