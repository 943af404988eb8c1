"""Tables as CP and Tucker decompositions of a tensor whose modes are the digits of the row number, and the column."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_xla.codebooks import CodebookBag
from dlrm_xla.contract import MakeBag, Table, sized
from dlrm_xla.errors import UserError
from dlrm_xla.host import has_values
from dlrm_xla.ids import divide_ids
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla_plugins.tensor_train import column_radices, first_digit_scales, row_radices


@sized("rank", lambda table: range(1, 4097))
def tensorly_cp(table: Table, inner: MakeBag, *, rank: int = 32, block: bool = False) -> nn.Module:
    """Canonical polyadic decomposition: a row is a product of three factors' rows, widened by a fourth.

        i -> (i1, i2, i3) in mixed radix (n1, n2, n3),  e_i = (A[i1] * B[i2] * C[i3]) D^T,   * element by element

    With ``block`` the columns are digits too, j -> (j1, j2, j3), and D[j] = U[j1] * V[j2] * W[j3].

    Keeps 4 rank (n1 + n2 + n3 + dim) bytes, dim replaced by d1 + d2 + d3 with ``block``. Ends a composition: it asks
    ``inner`` for nothing. A, B and C start with variance 1, D normal with start_std^2; the product meets D divided by
    sqrt(rank), so that a step of Adam, which moves each number of D by its rate, moves a row no more than rank^(1/2)
    times as far as at rank 1. Undivided it would be rank times, and larger sizes would learn worse than smaller ones.

    Kolda & Bader 2009, "Tensor Decompositions and Applications", section 3; Carroll & Chang 1970; Harshman 1970.
    """
    if rank < 1:
        raise ValueError(f"tensorly_cp: rank is {rank}, but must be at least 1")
    return CPBag(table, rank, block)


@sized("rank", lambda table: range(1, 25))
def tensorly_tucker(table: Table, inner: MakeBag, *, rank: int = 6, block: bool = False) -> nn.Module:
    """Tucker decomposition: three factors' rows meet in a core tensor.

        i -> (i1, i2, i3) in mixed radix (n1, n2, n3),  e_i = G x1 A[i1] x2 B[i2] x3 C[i3],   G [rank, rank, rank, dim]

    With ``block`` the columns are digits too, and the core is [rank, rank, rank, s1, s2, s3] times a factor [d_k, s_k]
    of each, s_k = min(rank, d_k).

    Keeps 4 (rank (n1 + n2 + n3) + rank^3 dim) bytes; without ``block`` the column's own factor is part of the core,
    which it would only widen again. Ends a composition: it asks ``inner`` for nothing. All start with the variance that
    gives rows the exact table's. The factors' product, of rank^3 numbers, meets G divided by rank^(3/2): see
    ``tensorly_cp``.

    Kolda & Bader 2009, "Tensor Decompositions and Applications", section 4; Tucker 1966.
    """
    if rank < 1:
        raise ValueError(f"tensorly_tucker: rank is {rank}, but must be at least 1")
    return TuckerBag(table, rank, block)


def unit_factor(num_rows: int, rank: int) -> nn.Parameter:
    """Factor [num_rows, rank] whose products keep a variance of 1: random signs times uniform(0.5, 1.4), scaled.

    Products of three normal numbers are mostly near zero and now and then large; these stay from 0.1 to 2.7.
    """
    factor = torch.empty(num_rows, rank).normal_().sign() * torch.empty(num_rows, rank).uniform_(0.5, 1.4)
    return nn.Parameter(factor / factor.square().mean(0).sqrt())


class _DigitFactors(CodebookBag):
    """Factors [n_k, rank] of the three digits of a row number, and the rows of each that a lookup needs."""

    def __init__(self, table: Table, rank: int, scale: float) -> None:
        super().__init__()
        self.table = table
        self.rank = rank
        self.scale = scale
        self.rows = row_radices(table.num_rows)
        self.factor1, self.factor2, self.factor3 = (unit_factor(n, rank) for n in self.rows)

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        """Weighted sums [B, dim] of rows."""
        ids_N = ids_BL.reshape(-1)
        if has_values(ids_N):  # each different id once
            ids_U, place_N = torch.unique(ids_N, return_inverse=True)
            rows_ND = self.rows_of(ids_U).index_select(0, place_N)
        else:
            rows_ND = self.rows_of(ids_N)
        # Scaled here, where a lookup has the fewest numbers.
        return (rows_ND * (weights_BL * self.scale).reshape(-1, 1)).view(*ids_BL.shape, -1).sum(1)

    def rows_of(self, ids_N: Tensor) -> Tensor:
        """Rows [N, dim] before they are scaled."""
        raise NotImplementedError

    def digits(self, ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [N, rank] of the three factors."""
        _, n2, n3 = self.rows
        i12_N = divide_ids(ids_N, n3)
        return (
            self.chosen(self.factor1, divide_ids(i12_N, n2)),
            self.chosen(self.factor2, i12_N % n2),
            self.chosen(self.factor3, ids_N % n3),
        )

    def extra_repr(self) -> str:
        return f"{self.table.name}, rows {self.rows}, rank {self.rank}"


def _digit_tensor(rows: TrainedRows, radices: tuple[int, int, int], scales: np.ndarray) -> np.ndarray:
    padded = rows.padded(math.prod(radices), rows.dim)
    scaled: np.ndarray = padded.reshape(len(scales), -1) * scales
    return scaled.reshape(*radices, rows.dim)


class CPBag(_DigitFactors):
    """Embedding bag of ``tensorly_cp``; (ids_BL, weights_BL) -> out_BD."""

    def __init__(self, table: Table, rank: int, block: bool = False) -> None:
        super().__init__(table, rank, rank**-0.5)
        std = table.start_std
        if block:
            self.columns = nn.ParameterList(unit_factor(d, rank) for d in column_radices(table.dim))
            with torch.no_grad():
                self.columns[-1].mul_(std)
        else:
            self.columns = nn.ParameterList([torch.empty(table.dim, rank).normal_(std=std)])

    def rows_of(self, ids_N: Tensor) -> Tensor:
        first, second, third = self.digits(ids_N)
        return first * second * third @ self.column_factor().t()

    def column_factor(self) -> Tensor:
        """D [dim, rank], which meets the factors' product times ``scale``."""
        columns: Tensor = self.columns[0]
        for factor in self.columns[1:]:
            columns = (columns.unsqueeze(1) * factor).flatten(0, 1)
        return columns[: self.table.dim]

    def set_table(self, rows: TrainedRows) -> None:
        """The factors that tensorly's alternating least squares finds, of all rows at once.

        Rows count by ``first_digit_scales``.
        """
        import tensorly as tl
        from tensorly.decomposition import parafac

        if len(self.columns) > 1:
            raise UserError("tensorly_cp with block=true cannot be made from a trained table; leave block out")
        scales = first_digit_scales(rows, self.rows)
        with tl.backend_context("numpy", local_threadsafe=True):
            tensor = _digit_tensor(rows, self.rows, scales)
            found = parafac(tensor, self.rank, init="random", random_state=0)
        found.factors[0] = found.factors[0] / scales
        with torch.no_grad():
            for k, (target, factor) in enumerate(
                zip((self.factor1, self.factor2, self.factor3, self.columns[0]), found.factors, strict=True)
            ):
                target.copy_(torch.from_numpy(factor * found.weights / self.scale if k == 3 else factor))


class TuckerBag(_DigitFactors):
    """Embedding bag of ``tensorly_tucker``; (ids_BL, weights_BL) -> out_BD."""

    def __init__(self, table: Table, rank: int, block: bool = False) -> None:
        radices = column_radices(table.dim) if block else ()
        ranks = [min(rank, d) for d in radices]
        super().__init__(table, rank, (rank**3 * math.prod(ranks)) ** -0.5)
        self.columns = nn.ParameterList(unit_factor(d, s) for d, s in zip(radices, ranks, strict=True))
        width = math.prod(ranks) if block else table.dim
        self.core = nn.Parameter(torch.empty(rank**3, width).normal_(std=table.start_std))

    def rows_of(self, ids_N: Tensor) -> Tensor:
        first, second, third = self.digits(ids_N)
        outer_N = (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)
        # The core meets two factors at once and the third then, so that no product of all three is ever written:
        # rank^2 and rank width numbers a lookup, not rank^3.
        met_N = torch.unflatten(outer_N @ self.core.view(self.rank**2, -1), 1, (self.rank, -1))
        rows_ND = (met_N * third.unsqueeze(2)).sum(1)
        if not self.columns:
            return rows_ND
        # The columns' factors one after the other: [N, s1, s2, s3] -> [N, s2, s3, d1] -> ... -> [N, d1, d2, d3].
        for factor in self.columns:
            rows_ND = (torch.unflatten(rows_ND, 1, (factor.shape[1], -1)).transpose(1, 2) @ factor.t()).flatten(1)
        return rows_ND[:, : self.table.dim]

    def set_table(self, rows: TrainedRows) -> None:
        """Core and factors that tensorly's higher-order orthogonal iteration finds, of all rows at once.

        Rows count by ``first_digit_scales``.
        """
        import tensorly as tl
        from tensorly.decomposition import partial_tucker

        if len(self.columns):
            raise UserError("tensorly_tucker with block=true cannot be made from a trained table; leave block out")
        rank = self.rank
        ranks = [min(rank, n) for n in self.rows]
        scales = first_digit_scales(rows, self.rows)
        with tl.backend_context("numpy", local_threadsafe=True):
            (core, factors), _ = partial_tucker(_digit_tensor(rows, self.rows, scales), ranks, modes=[0, 1, 2])
        factors = [factors[0] / scales, *factors[1:]]
        full = np.zeros((rank, rank, rank, rows.dim))
        full[: ranks[0], : ranks[1], : ranks[2]] = core
        with torch.no_grad():
            self.core.copy_(torch.from_numpy(full).reshape(self.core.shape) / self.scale)
            for target, factor in zip((self.factor1, self.factor2, self.factor3), factors, strict=True):
                target.zero_()
                target[:, : factor.shape[1]] = torch.from_numpy(factor)
