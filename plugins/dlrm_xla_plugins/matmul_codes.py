"""Made for the matrix unit: lookups that are products with one-hot ids, with no gather and no scatter in the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dlrm_xla.contract import MakeBag, Table, sized
from dlrm_xla.ids import divide_ids
from dlrm_xla.one_hot import one_hot
from dlrm_xla_plugins.tensor_factors import unit_factor
from dlrm_xla_plugins.tensor_train import row_radices


@sized("hot", lambda table: range(1, min(table.num_rows, 4096)))
def matmul_codes(table: Table, inner: MakeBag, *, hot: int = 256, rank: int = 0) -> nn.Module:
    """Frequent ids have rows, rare ones a product of three codebooks' rows, all looked up by matrix products.

        e_i = onehot(i) H                                            for i < hot
        e_i = ((onehot(i1) A) * (onehot(i2) B) * (onehot(i3) C)) D   else, i - hot -> (i1, i2, i3) in mixed radix

    A codebook has about the cube root of the rows: 342 for 40M, so all of them stay in on-chip memory and a lookup is
    sums of products of a matrix of 0 and 1, which the matrix unit does at full speed. Gradients are the transposed
    products, so a step neither gathers nor scatters, and duplicate ids need no sort.

        flops a lookup: 2 (hot dim + rank (n1 + n2 + n3 + dim)),   bytes kept: 4 (hot dim + rank (n1 + n2 + n3 + dim))

    ``rank`` 0 is hot / 8, from 1 to 32. All start so that rows have the exact table's variance. Ends a composition: it
    asks ``inner`` for nothing. This project's own; hot rows as in ``hot_cold``, the rest as in ``tensorly_cp``.
    """
    if hot < 1 or rank < 0:
        raise ValueError(f"matmul_codes: hot is {hot} and rank {rank}; hot must be at least 1, and rank at least 0")
    return MatmulCodesBag(table, min(hot, table.num_rows), rank or min(32, max(1, hot // 8)))


class MatmulCodesBag(nn.Module):
    """(ids_BL, weights_BL) -> out_BD by products with one-hot matrices alone."""

    def __init__(self, table: Table, hot: int, rank: int) -> None:
        super().__init__()
        self.table = table
        self.hot = hot
        self.hot_rows = nn.Parameter(torch.empty(hot, table.dim).normal_(std=table.start_std))
        self.radices = row_radices(table.num_rows - hot) if table.num_rows > hot else None
        if self.radices:
            self.codebooks = nn.ParameterList(unit_factor(n, rank) for n in self.radices)
            self.columns = nn.Parameter(torch.empty(rank, table.dim).normal_(std=table.start_std / math.sqrt(rank)))

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        is_hot_BL = ids_BL < self.hot
        hot_N = torch.where(is_hot_BL, ids_BL, -1).reshape(-1)  # -1 is no row: a line of zeros
        counts_BH = (one_hot(hot_N, self.hot) * weights_BL.reshape(-1, 1)).view(*ids_BL.shape, -1).sum(1)
        out_BD: Tensor = counts_BH @ self.hot_rows
        if self.radices is None:
            return out_BD
        cold_N = torch.where(is_hot_BL, 0, ids_BL - self.hot).reshape(-1)
        _, n2, n3 = self.radices
        i12_N = divide_ids(cold_N, n3)
        product_NK = one_hot(divide_ids(i12_N, n2), len(self.codebooks[0])) @ self.codebooks[0]
        product_NK = product_NK * (one_hot(i12_N % n2, n2) @ self.codebooks[1])
        product_NK = product_NK * (one_hot(cold_N % n3, n3) @ self.codebooks[2])
        product_NK = product_NK * (weights_BL * ~is_hot_BL).reshape(-1, 1)
        # Summed before it is widened, which is the same by linearity.
        out_BD = out_BD + product_NK.view(*ids_BL.shape, -1).sum(1) @ self.columns
        return out_BD

    def extra_repr(self) -> str:
        return f"{self.table.name}, {self.hot} hot rows, codebooks of {self.radices}"
