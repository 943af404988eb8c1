"""Bags of varying length: kept as they are in one flat array, and padded to a few lengths when batches are made.

Static shapes would pad every bag to the longest there is. Instead rows are sorted into a few buckets, each with bags
of up to a share of the longest, and a batch has rows of one bucket: as many graphs as buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

BUCKETS = 4
PADDING = -1
_ROWS_AT_A_TIME = 2**18

Lengths = tuple[int, ...]
Rows = NDArray[np.int64]


class Bags:
    """Ids of all bags: those of row n and feature f are ``ids[offsets[n F + f] : offsets[n F + f + 1]]``."""

    def __init__(self, ids: NDArray[np.int32], offsets: NDArray[np.int64], num_features: int) -> None:
        self.ids = ids
        self.offsets = offsets
        self.num_features = num_features

    def lengths(self, rows: Rows) -> NDArray[np.int64]:
        """Ids in each bag, [rows, F]."""
        at = rows[:, None] * self.num_features + np.arange(self.num_features)
        found: NDArray[np.int64] = self.offsets[at + 1] - self.offsets[at]
        return found

    def padded(self, rows: Rows, lengths: Lengths) -> NDArray[np.int32]:
        """Ids [rows, sum(lengths)] of all features side by side, ``PADDING`` where a bag has no more."""
        parts = []
        for feature, length in enumerate(lengths):
            at = rows * self.num_features + feature
            slots = self.offsets[at][:, None] + np.arange(length)
            inside = slots < self.offsets[at + 1][:, None]
            ids = self.ids[np.minimum(slots, max(0, len(self.ids) - 1))] if len(self.ids) else np.zeros_like(slots)
            parts.append(np.where(inside, ids, PADDING).astype(np.int32))
        return np.concatenate(parts, 1)


def bucket_lengths(longest: Sequence[int], buckets: int = BUCKETS) -> list[Lengths]:
    """Bag lengths of each bucket, rising: the longest halved, and halved again, rounded up; never below 1."""
    halved = [tuple(max(1, -(-length // 2**k)) for length in longest) for k in reversed(range(buckets))]
    return list(dict.fromkeys(halved))


def bucket_of(bags: Bags, rows: Rows, buckets: Sequence[Lengths]) -> NDArray[np.int64]:
    """The first bucket that holds all bags of a row, for each row."""
    limits = np.array(buckets)
    parts = [
        (bags.lengths(rows[first : first + _ROWS_AT_A_TIME])[:, None, :] <= limits).all(2).argmax(1)
        for first in range(0, len(rows), _ROWS_AT_A_TIME)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def batches_of_buckets(
    order: Rows, bucket: NDArray[np.int64], num_buckets: int, size: int
) -> Iterator[tuple[Rows, int]]:
    """Batches of rows of one bucket each, in the order in which they fill up; what is left over comes last.

    ``bucket`` has the bucket of each row of ``order``. Every row comes once.
    """
    batches = []
    for number in range(num_buckets):
        places = np.flatnonzero(bucket == number)
        for first in range(0, len(places), size):
            part = places[first : first + size]
            batches.append((len(part) < size, int(part[-1]), order[part], number))
    for _, _, rows, number in sorted(batches, key=lambda b: b[:2]):
        yield rows, number
