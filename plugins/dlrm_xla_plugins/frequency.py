"""Frequent and rare ids apart: ids are ordered by frequency, so no map is needed to tell them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dlrm_xla.compression import set_table
from dlrm_xla.contract import ComposedBag, Computation, MakeBag, Table, Wanted, innermost, sized
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla_plugins.hashing import MappedIds


@sized("rows", lambda table: range(2, table.num_rows))
def top_rows(table: Table, inner: MakeBag, *, rows: int = 2000) -> nn.Module:
    """The most frequent ids keep rows of their own, all others share one: the line that a method must beat.

        e_i = W[min(i, rows - 1)],  id 0, missing, among those with a row of its own

    Keeps 4 rows dim bytes; a table with no more rows stays as it is.

    No paper: what a filter of rare ids does, with its number of rows given.
    """
    if rows < 2:
        raise ValueError(f"top_rows: rows is {rows}, but must be at least 2: one for missing ids, one for the rest")
    if table.num_rows <= rows:
        return inner(table)
    shorter = replace(table, name=f"{table.name}.top", num_rows=rows, std=table.start_std)
    return MappedIds(inner(shorter), rows, lambda ids: ids.clamp(max=rows - 1))


@sized("hot", lambda table: range(1, table.num_rows))
def hot_cold(table: Table, inner: MakeBag, *, hot: int = 1000) -> nn.Module:
    """The most frequent ids have exact rows, the rest whatever is composed behind.

        e_i = H[i] for i < hot,  else inner's row i - hot + 1

    Keeps 4 hot dim bytes and what ``inner`` keeps of the other rows; write it before another plugin, as in
    ``hot_cold:hot=500+tensorly_tt``. A table of no more than ``hot`` rows stays as it is.

    Zhang et al. 2024, "CAFE: Towards Compact, Adaptive, and Fast Embedding for Large-scale Recommendation Models": a
    row of its own for each hot feature, hashed ones for the rest. It finds the hot ones online by a sketch (HotSketch);
    here ids come in the order of their counts.
    """
    if hot < 1:
        raise ValueError(f"hot_cold: hot is {hot}, but must be at least 1")
    exact = replace(table, name=f"{table.name}.hot", num_rows=min(hot, table.num_rows), std=table.start_std)
    if table.num_rows <= hot:
        return innermost(inner)(replace(table, std=table.start_std))
    # Row 0 of the rest is of missing ids, which are hot: it stays unused.
    rest = replace(table, name=f"{table.name}.cold", num_rows=table.num_rows - hot + 1, std=table.start_std)
    return HotColdBag(innermost(inner)(exact), inner(rest), hot)


class HotColdBag(ComposedBag):
    """Sum of the hot ids' bag and the cold ids' bag; (ids_BL, weights_BL) -> out_BD."""

    def __init__(self, hot_bag: nn.Module, cold_bag: nn.Module, hot: int) -> None:
        super().__init__()
        self.hot_bag = hot_bag
        self.cold_bag = cold_bag
        self.hot = hot

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        is_hot_BL = ids_BL < self.hot
        hot_BD, cold_BD = yield [
            Wanted(self.hot_bag, torch.where(is_hot_BL, ids_BL, 0), weights_BL * is_hot_BL),
            Wanted(self.cold_bag, torch.where(is_hot_BL, 0, ids_BL - self.hot + 1), weights_BL * ~is_hot_BL),
        ]
        return hot_BD + cold_BD

    def set_table(self, rows: TrainedRows) -> None:
        """Hot rows as they are, the others as whatever is behind takes them over."""
        set_table(self.hot_bag, rows.part(0, self.hot))
        # The cold bag's row 0 is never looked up: the last hot row stands in, with no weight where lookups count.
        cold = rows.part(self.hot - 1, rows.num_rows)
        if cold.lookups_R is not None:
            cold = cold.weighted(torch.cat([cold.lookups_R.new_zeros(1), cold.lookups_R[1:]]))
        set_table(self.cold_bag, cold)
