"""Products of gathered tensor-train cores, each different one once: for the CPU, where sizes may depend on the ids.

Lookups repeat: of 4096 that follow Zipf's law (exponent 1.05) in 1M rows some 2,200 are different, with some 950
different left products, whose digits are the first two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlrm_xla.ids import divide_ids
from dlrm_xla_plugins.grouped_trains import BLOCK, group


def distinct_rows(cores: tuple[Tensor, Tensor, Tensor], ids_N: Tensor) -> Tensor:
    """Rows [N, d1 d2 d3] of a tensor train of cores [n1, d1, r], [n2, r, d2 r], [n3, r, d3]."""
    rows_ND: Tensor = _DistinctRows.apply(*cores, ids_N)  # type: ignore[no-untyped-call]
    return rows_ND


def _sums(rows: int, index: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(rows, *values.shape[1:]).index_add_(0, index, values)


class _DistinctRows(torch.autograd.Function):
    """U different ids have P different left products, which are grouped by their second digit into slots S."""

    @staticmethod
    def forward(ctx: Any, core1: Tensor, core2: Tensor, core3: Tensor, ids_N: Tensor) -> Tensor:
        (_, d1, rank), n2, n3 = core1.shape, len(core2), len(core3)
        ids_U, place_N = torch.unique(ids_N, return_inverse=True)
        i12_U = divide_ids(ids_U, n3)
        i12_P, left_U = torch.unique_consecutive(i12_U, return_inverse=True)  # sorted, because ids_U are
        i1_P = divide_ids(i12_P, n2)
        by2 = group(i12_P - i1_P * n2, n2)
        # An empty slot multiplies what nobody reads, and its gradient stays zero.
        i1_S = i1_P.index_select(0, by2.lookup_of_slot.clamp(min=0))
        first = core1.index_select(0, i1_S).view(-1, BLOCK * d1, rank)
        second = core2.index_select(0, by2.row_of_block)
        slot_U = by2.slot_of_lookup.index_select(0, left_U)
        left = torch.bmm(first, second).view(len(i1_S), -1).index_select(0, slot_U).view(len(ids_U), -1, rank)
        i3_U = ids_U - i12_U * n3
        third = core3.index_select(0, i3_U)
        ctx.save_for_backward(first, second, left, third, i1_S, by2.row_of_block, slot_U, i3_U, place_N)
        ctx.sizes = len(core1), n2, n3
        return torch.bmm(left, third).flatten(1).index_select(0, place_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first, second, left, third, i1_S, row_of_block, slot_U, i3_U, place_N = ctx.saved_tensors
        (grad_ND,), (n1, n2, n3) = grads, ctx.sizes
        grad_U = _sums(len(left), place_N, grad_ND).view(len(left), left.shape[1], -1)
        grad3 = _sums(n3, i3_U, torch.bmm(left.transpose(1, 2), grad_U))
        grad_left = torch.bmm(grad_U, third.transpose(1, 2)).flatten(1)
        grad_S = _sums(len(i1_S), slot_U, grad_left).view(*first.shape[:2], -1)
        grad2 = _sums(n2, row_of_block, torch.bmm(first.transpose(1, 2), grad_S))
        grad_first = torch.bmm(grad_S, second.transpose(1, 2)).view(len(i1_S), -1, left.shape[2])
        return _sums(n1, i1_S, grad_first), grad2, grad3, None
