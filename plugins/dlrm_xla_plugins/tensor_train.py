"""Tables as tensor trains: a row is a product of small cores, gathered and multiplied, never a table rebuilt."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dlrm_xla.codebooks import CodebookBag
from dlrm_xla.contract import MakeBag, Table, sized
from dlrm_xla.host import autocasts, fuses_sums, has_values
from dlrm_xla.ids import divide_ids
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla_plugins.distinct_trains import distinct_rows
from dlrm_xla_plugins.fused_trains import UNROLLED, fused_rows
from dlrm_xla_plugins.grouped_trains import GROUPED, train_rows
from dlrm_xla_plugins.multiplied_trains import multiplied_rows

# Numbers in a slice of the middle core from which on what repeats is computed once on a CPU: forward and backward of
# 2048 lookups of Zipf's law take 2.7 instead of 3.0 ms at 64, 2.1 instead of 1.7 at 16, on two cores.
DISTINCT = 64


@sized("rank", lambda table: range(1, 129))
def tensorly_tt(table: Table, inner: MakeBag, *, rank: int = 8) -> nn.Module:
    """Tensor train: each row is a product of three small cores.

        i -> (i1, i2, i3) in mixed radix (n1, n2, n3), n1 n2 n3 >= R, and likewise the column in (d1, d2, d3)
        e_i[a, b, c] = G1[i1, a, :] . G2[i2, :, b, :] . G3[i3, :, c]

    Keeps 4 rank (n1 d1 + n2 d2 rank + n3 d3) bytes: with R^(1/3) each, a thousandth and less of a large table.
    The radices are rounded up, so a prime number of rows costs no more than its neighbours. Ends a composition:
    it asks ``inner`` for nothing.

    Oseledets 2011, "Tensor-Train Decomposition"; Yin et al. 2021, "TT-Rec", section 3.
    """
    if rank < 1:
        raise ValueError(f"tensorly_tt: rank is {rank}, but must be at least 1")
    return TensorTrainBag(table, rank)


def row_radices(num_rows: int) -> tuple[int, int, int]:
    """Three balanced factors whose product is at least num_rows and as little above it as rounding up allows."""
    n1 = max(1, round(num_rows ** (1 / 3)))
    n2 = max(1, math.ceil(math.sqrt(num_rows / n1)))
    return n1, n2, math.ceil(num_rows / (n1 * n2))


def column_radices(dim: int) -> tuple[int, int, int]:
    """The three factors of least sum whose product is at least dim: 16 -> (2, 2, 4), 64 -> (4, 4, 4)."""
    top = math.ceil(dim ** (1 / 2)) + 1
    triples = ((a, b, math.ceil(dim / (a * b))) for a, b in itertools.product(range(1, top), repeat=2) if a <= b)
    return min(triples, key=lambda t: (sum(t), math.prod(t), t[2]))


def first_digit_scales(rows: TrainedRows, radices: tuple[int, int, int]) -> NDArray[np.float64]:
    """Roots of the mean lookups of the rows of each first digit [n1, 1]; 1 where rows count alike.

    Ids come by falling frequency, so rows of one first digit are neighbours in it. A weight of the first digit alone is
    exact least squares: a decomposition of the scaled table, its first factor divided by the scales again.
    """
    n1, rest = radices[0], math.prod(radices[1:])
    if rows.lookups_R is None:
        return np.ones((n1, 1))
    sums, counts = np.zeros(n1), np.zeros(n1)
    digits = np.arange(rows.num_rows) // rest
    np.add.at(sums, digits, rows.lookups_R.double().numpy())
    np.add.at(counts, digits, 1)
    means = sums / np.maximum(counts, 1)
    # Rows that nobody looks up count a little, so that what is divided by is never 0.
    means += means.mean() / 1000
    scales: NDArray[np.float64] = np.sqrt(means / means.mean())[:, None]
    return scales


class TensorTrainBag(CodebookBag):
    """Embedding bag whose rows are tensor-train products; (ids_BL, weights_BL) -> out_BD.

    Cores start normal with the variance that gives the product the table's ``start_std``: a number of a row is a
    sum of rank^2 products of three, so each core has variance (start_std^2 / rank^2)^(1/3).
    """

    def __init__(self, table: Table, rank: int) -> None:
        super().__init__()
        self.table = table
        self.rank = rank
        self.rows = row_radices(table.num_rows)
        self.columns = column_radices(table.dim)
        (n1, n2, n3), (d1, d2, d3) = self.rows, self.columns
        std = (table.start_std / rank) ** (1 / 3)
        self.core1 = nn.Parameter(torch.empty(n1, d1, rank).normal_(std=std))
        self.core2 = nn.Parameter(torch.empty(n2, rank, d2 * rank).normal_(std=std))
        self.core3 = nn.Parameter(torch.empty(n3, rank, d3).normal_(std=std))

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        rows_ND = self._rows_at(ids_BL.reshape(-1))
        if rows_ND.shape[1] > self.table.dim:
            rows_ND = rows_ND[:, : self.table.dim]
        if ids_BL.shape[1] == 1:
            return rows_ND * weights_BL
        return (rows_ND.view(*ids_BL.shape, -1) * weights_BL.unsqueeze(-1)).sum(1)

    def _rows_at(self, ids_N: Tensor) -> Tensor:
        """Rows [N, d1 d2 d3], the way that takes the least time where they are; float32 under autocast too.

        For gradients of products rounded to bf16 are added up, and the backward step runs without autocast.
        """
        if autocasts(ids_N):
            with torch.autocast(ids_N.device.type, enabled=False):
                return self._rows_at(ids_N)
        cores = self.core1, self.core2, self.core3
        numbers = self.core2[0].numel()
        multiplied = max(self.rows) <= self.codebook_rows
        if not multiplied and numbers >= DISTINCT and has_values(ids_N):
            return distinct_rows(cores, ids_N)
        _, n2, n3 = self.rows
        i12_N = divide_ids(ids_N, n3)
        digits = divide_ids(i12_N, n2), i12_N % n2, ids_N % n3
        if multiplied:
            return multiplied_rows(cores, digits)
        # Groups have a size for each number of lookups; an exported program takes any number.
        if not torch.compiler.is_exporting():
            if self.rank <= UNROLLED and fuses_sums(ids_N):
                return fused_rows(cores, digits)
            if numbers >= GROUPED:
                return train_rows(cores, digits)
        first, second, third = (core.index_select(0, at_N) for core, at_N in zip(cores, digits, strict=True))
        left = torch.bmm(first, second).view(-1, math.prod(self.columns[:2]), self.rank)
        return torch.bmm(left, third).flatten(1)

    def set_table(self, rows: TrainedRows) -> None:
        """The nearest cores by tensorly's TT-SVD (Oseledets 2011, algorithm 1; quasi-optimal), of all rows at once.

        Rows and columns are padded with zeros up to the radices' products. Rows count by ``first_digit_scales``.
        """
        import tensorly as tl
        from tensorly.decomposition import tensor_train_matrix

        rank = self.rank
        padded = rows.padded(math.prod(self.rows), math.prod(self.columns))
        scales = first_digit_scales(rows, self.rows)
        padded = padded.reshape(len(scales), -1) * scales
        with tl.backend_context("numpy", local_threadsafe=True):  # importing tltorch, for one, makes torch the default
            factors = tensor_train_matrix(padded.reshape(*self.rows, *self.columns), rank=[1, rank, rank, 1])
        factors = [factors[0] / scales[:, :, None], *factors[1:]]
        with torch.no_grad():
            for core, factor in zip((self.core1, self.core2, self.core3), factors, strict=True):
                # tensorly: [left rank, row radix, column radix, right rank]; ranks that the table does not need are
                # left out by it, and are zeros here.
                left, n, d, right = factor.shape
                full = torch.zeros(1 if core is self.core1 else rank, n, d, 1 if core is self.core3 else rank)
                full[:left, :, :, :right] = torch.from_numpy(factor)
                core.copy_(full.transpose(0, 1).reshape(core.shape))

    def extra_repr(self) -> str:
        return f"{self.table.name}, rows {self.rows}, columns {self.columns}, rank {self.rank}"
