"""A trained table as compression reads it: in blocks of rows, so that it need not fit memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm_xla.device import machine_memory
from dlrm_xla.errors import UserError

BLOCK_ROWS = 2**18
# Tensor decompositions of 500,000 x 16 took 5.9 (TT-SVD) and 5.6 (HOOI) times the table in float64.
_WORKING_COPIES = 6


class TrainedRows:
    """Rows [num_rows, dim] in float32 that are read, or computed, block by block, and how often each is looked up.

    ``read(start, stop)`` gives rows [stop - start, dim]. ``lookups_R`` are weights of the error that a compression
    makes: the one that matters is that of lookups. None weighs all rows alike, and so do lookups of none of them, which
    become None.
    """

    def __init__(
        self, read: Callable[[int, int], Tensor], num_rows: int, dim: int, lookups_R: Tensor | None = None
    ) -> None:
        if lookups_R is not None and len(lookups_R) != num_rows:
            raise ValueError(f"{len(lookups_R)} numbers of lookups for {num_rows} rows")
        self._read = read
        self.num_rows = num_rows
        self.dim = dim
        self.lookups_R = lookups_R if lookups_R is None or lookups_R.any() else None

    @classmethod
    def of(cls, weight_RD: Tensor, lookups_R: Tensor | None = None) -> TrainedRows:
        """Rows of an array, which may be mapped from a file."""
        num_rows, dim = weight_RD.shape
        return cls(lambda start, stop: weight_RD[start:stop], num_rows, dim, lookups_R)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) from the first to the last."""
        for start in range(0, self.num_rows, BLOCK_ROWS):
            yield start, self._read(start, min(start + BLOCK_ROWS, self.num_rows)).float()

    def weights(self, start: int, count: int) -> Tensor:
        """Weights of the rows of a block, float32 [count]."""
        return torch.ones(count) if self.lookups_R is None else self.lookups_R[start : start + count].float()

    def map(self, function: Callable[[Tensor], Tensor], dim: int) -> TrainedRows:
        """Rows that are computed from these, block by block, each time that they are read."""

        def read(start: int, stop: int) -> Tensor:
            return function(self._read(start, stop).float())

        return TrainedRows(read, self.num_rows, dim, self.lookups_R)

    def weighted(self, lookups_R: Tensor | None) -> TrainedRows:
        """The same rows with other weights."""
        return TrainedRows(self._read, self.num_rows, self.dim, lookups_R)

    def part(self, first: int, last: int) -> TrainedRows:
        """The rows from ``first`` to before ``last``."""
        lookups_R = None if self.lookups_R is None else self.lookups_R[first:last]
        return TrainedRows(lambda a, b: self._read(first + a, first + b), last - first, self.dim, lookups_R)

    def sample(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """At most ``count`` different rows and their weights; drawn in order, so that a file is read forwards.

        All alike where none of those drawn is looked up.
        """
        if count >= self.num_rows:
            return self.whole(), self.weights(0, self.num_rows)
        drawn = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(seed))[:count].sort().values
        rows, weights = [], []
        for start, block in self.blocks():
            here = drawn[(drawn >= start) & (drawn < start + len(block))] - start
            rows.append(block[here])
            weights.append(self.weights(start, len(block))[here])
        weights_N = torch.cat(weights)
        return torch.cat(rows), weights_N if weights_N.any() else torch.ones(len(weights_N))

    def whole(self) -> Tensor:
        """All rows at once, for methods that know no other way."""
        return torch.cat([block for _, block in self.blocks()])

    def padded(self, rows: int, columns: int) -> NDArray[np.float64]:
        """All rows at once, zeros behind them up to [rows, columns], for decompositions of a whole tensor.

        A UserError where that would take more memory than the machine has, before any is taken.
        """
        needed = _WORKING_COPIES * rows * columns * 8
        if needed > machine_memory():
            raise UserError(
                f"a tensor decomposition takes a table whole: {needed / 1e9:.1f} GB for {self.num_rows:,} rows of "
                f"{self.dim}, where this machine has {machine_memory() / 1e9:.1f}. Compress it by a plugin that reads "
                "blocks of rows (svd, hash_rows, count_sketch), or on a larger machine."
            )
        found = np.zeros((rows, columns))
        for start, block in self.blocks():
            found[start : start + len(block), : self.dim] = block.numpy()
        return found
