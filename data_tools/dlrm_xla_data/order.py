"""The order in which training rows come, and batches made ahead of time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 2**12
WINDOW_BLOCKS = 2**12

Rows = NDArray[np.int64]
_T = TypeVar("_T")


def shuffled(start: int, stop: int, seed: int, epoch: int, skip: int = 0) -> Iterator[Rows]:
    """Rows ``start`` to ``stop``, each once, in pieces, without the first ``skip``; (seed, epoch) decides the order.

    Up to 16.8 million rows are one permutation, each as likely as any other. More are cut into blocks of 4,096
    neighbouring rows, whose order is such a permutation, and every 4,096 blocks that follow each other in it are
    permuted row by row: a batch has rows from all over the data, and rows of one block are within 16.8 million of each
    other in the order. The order takes 134 MB however many rows there are.
    """
    num_rows = stop - start
    rng = np.random.default_rng([seed, epoch])
    if num_rows <= BLOCK_ROWS * WINDOW_BLOCKS:
        order = np.arange(start, stop)
        rng.shuffle(order)
        yield order[skip:]
        return
    blocks = rng.permutation(-(-num_rows // BLOCK_ROWS))
    for first in range(0, len(blocks), WINDOW_BLOCKS):
        chosen = blocks[first : first + WINDOW_BLOCKS]
        rows = (start + chosen[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).ravel()
        rows = rows[rows < stop]
        if skip >= len(rows):
            skip -= len(rows)
            continue
        np.random.default_rng([seed, epoch, first]).shuffle(rows)
        yield rows[skip:]
        skip = 0


def in_batches(pieces: Iterable[Rows], size: int) -> Iterator[Rows]:
    """So many rows at a time, across the pieces' borders; the last ones may be fewer."""
    rest = np.zeros(0, np.int64)
    for piece in pieces:
        rows = np.concatenate([rest, piece]) if len(rest) else piece
        whole = len(rows) // size * size
        for first in range(0, whole, size):
            yield rows[first : first + size]
        rest = rows[whole:]
    if len(rest):
        yield rest


def prefetched(batches: Iterator[_T], ahead: int) -> Iterator[_T]:
    """The same, made by a thread of its own, up to ``ahead`` before they are asked for."""
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        waiting = deque(pool.submit(next, batches, None) for _ in range(ahead))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, batches, None))
            yield batch
