"""Rows whose width falls with frequency, around a row that ids of like frequency share."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from dlrm_xla.compression import set_table
from dlrm_xla.contract import ComposedBag, Computation, MakeBag, Table, Wanted, sized
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla_plugins.directions import top_directions

# Each band holds so many times the ids of all before it, and its rows are half as wide.
GROWTH = 4


@sized("full_rows", lambda table: range(1, (table.num_rows - 1) // GROWTH + 1))
def frequency_bands(table: Table, inner: MakeBag, *, full_rows: int = 64, width: int = 4) -> nn.Module:
    """Bands of falling frequency: the rarer an id, the narrower its row, around a row that its band shares.

        e_i = C[b] + Z_b[i] P_b,   b the band of i: up to full_rows, 4 full_rows, 16 full_rows, ... ids
        Z_b as wide as the table, half, a quarter, ... of it, no narrower than ``width``; P_0 the identity

    What few lookups cannot tell of an id is that of its band. Id 0, missing or unseen, has a row of its own and the
    rarest band's C, for that is what an unseen id most likely is. Keeps, with F_b ids in band b of width d_b,
    4 (sum_b (F_b d_b + dim) + sum_{b > 0} d_b dim) bytes: no less than width / dim of a large table. C and Z_b start
    with 1/sqrt(2) of the exact table's standard deviation, P_b normal(0, 1/d_b).

    Baevski & Auli 2019, "Adaptive Input Representations for Neural Language Modeling", section 3, for bands of falling
    width d / k^(n - 1) with a projection each; Ginart et al. 2021, "Mixed Dimension Embeddings", for widths that fall
    with frequency in a DLRM. The shared rows are this project's.
    """
    if full_rows < 1 or not 1 <= width <= table.dim:
        raise ValueError(
            f"frequency_bands: full_rows is {full_rows} and width {width}; full_rows must be at least 1, width from 1 "
            f"to {table.dim}"
        )
    return BandsBag(table, inner, full_rows, width)


class BandsBag(ComposedBag):
    """(ids_BL, weights_BL) -> out_BD; the shared rows C lie behind the widest band's."""

    def __init__(self, table: Table, inner: MakeBag, full_rows: int, width: int) -> None:
        super().__init__()
        self.starts, widths = [0], [table.dim]
        end = full_rows
        while end < table.num_rows and widths[-1] > width:
            self.starts.append(end)
            widths.append(max(width, widths[-1] // 2))
            end *= GROWTH
        self.ends = [*self.starts[1:], table.num_rows]
        std = table.start_std / math.sqrt(2)
        sizes = [b - a for a, b in zip(self.starts, self.ends, strict=True)]
        sizes[0] += len(sizes)
        self.bags = nn.ModuleList(
            inner(replace(table, name=f"{table.name}.band{k}", num_rows=size, dim=d, std=std))
            for k, (size, d) in enumerate(zip(sizes, widths, strict=True))
        )
        self.matrices = nn.ParameterList(torch.empty(d, table.dim).normal_(std=1 / math.sqrt(d)) for d in widths[1:])

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        is_full_BL = ids_BL < self.ends[0]
        # Full rows and shared ones are slots of one bag.
        slots_BS = torch.cat([torch.where(is_full_BL, ids_BL, 0), self.ends[0] + self.band(ids_BL)], 1)
        wanted = [Wanted(self.bags[0], slots_BS, torch.cat([weights_BL * is_full_BL, weights_BL], 1))]
        for bag, start, end in zip(self.bags[1:], self.starts[1:], self.ends[1:], strict=True):
            here_BL = (ids_BL >= start) & (ids_BL < end)
            wanted.append(Wanted(bag, torch.where(here_BL, ids_BL - start, 0), weights_BL * here_BL))
        out_BD, *narrow = yield wanted
        for narrow_BD, matrix in zip(narrow, self.matrices, strict=True):
            out_BD = out_BD + narrow_BD @ matrix
        return out_BD

    def band(self, ids: Tensor) -> Tensor:
        """The band of each id, int32; that of id 0 is the last."""
        band = torch.where(ids == 0, len(self.starts) - 1, 0).to(ids.dtype)
        for start in self.starts[1:]:
            band = band + (ids >= start).to(ids.dtype)
        return band

    def set_table(self, rows: TrainedRows) -> None:
        """Shared rows are the means of their bands, by lookups; P_b the leading directions of what is left."""
        sums_KD, counts_K = torch.zeros(len(self.starts), rows.dim), torch.zeros(len(self.starts))
        for start, block in rows.blocks():
            bands, weights = self.band(_ids(start, len(block))).long(), rows.weights(start, len(block)).clone()
            if start == 0:
                weights[0] = 0  # id 0 has a row of its own and is no rare id
            sums_KD.index_add_(0, bands, block * weights.unsqueeze(1))
            counts_K.index_add_(0, bands, weights)
        shared_KD = sums_KD / torch.where(counts_K == 0, 1, counts_K).unsqueeze(1)
        full_RD = rows.part(0, self.ends[0]).whole()
        own_RD = full_RD - shared_KD[self.band(_ids(0, len(full_RD))).long()]
        lookups = None if rows.lookups_R is None else torch.cat([rows.lookups_R[: self.ends[0]], counts_K])
        set_table(self.bags[0], TrainedRows.of(torch.cat([own_RD, shared_KD]), lookups))
        for k, matrix in enumerate(self.matrices, 1):
            left = rows.part(self.starts[k], self.ends[k]).map(shared_KD[k].neg().add, rows.dim)
            with torch.no_grad():
                matrix.copy_(top_directions(left, len(matrix)))
            back = torch.linalg.pinv(matrix.detach().double()).float()
            set_table(self.bags[k], _projected(left, back))

    def extra_repr(self) -> str:
        return f"bands end at {self.ends}, widths below the first {[len(matrix) for matrix in self.matrices]}"


def _ids(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.int32)


def _projected(rows: TrainedRows, matrix: Tensor) -> TrainedRows:
    return rows.map(lambda block: block @ matrix, matrix.shape[1])
