"""Products of gathered tensor-train cores as sums of products that XLA's CPU backend fuses, each written only summed.

A batch of small matrix products is a call of Eigen for each matrix there: 350 products of 64 x 16 by 16 x 64 take
1.9 ms on two cores, 4096 of 16 x 16 by 16 x 4 5 to 6. A loop that multiplies and adds takes 1.0 and 0.7, if it is
unrolled: where what is added is not the last dimension, and no longer than `UNROLLED`. At 64 it takes 30 times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlrm_xla_plugins.grouped_trains import GROUPED, Groups, group

# Products that a sum of them may have at most.
UNROLLED = 16


def fused_rows(cores: tuple[Tensor, Tensor, Tensor], digits: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Rows [N, d1 d2 d3] of a tensor train of cores [n1, d1, r], [n2, r, d2 r], [n3, r, d3] at digits [N] each."""
    first, second, _ = cores
    i1_N, i2_N, i3_N = digits
    if second[0].numel() < GROUPED or first.shape[1] > UNROLLED:
        rows_ND: Tensor = _FusedRows.apply(*cores, i1_N, i2_N, i3_N)  # type: ignore[no-untyped-call]
        return rows_ND
    # As many lookups in a block as make lines of the first core that are added up in one sum.
    block = 1 << (UNROLLED // first.shape[1]).bit_length() - 1
    by2 = group(i2_N, len(second), block, _order(i2_N, len(second)))
    lookup_S = by2.lookup_of_slot.clamp(min=0)
    i1_S, i3_S = i1_N.index_select(0, lookup_S), i3_N.index_select(0, lookup_S)
    rows_SD = _FusedRows.apply(*cores, i1_S, by2.row_of_block, i3_S)  # type: ignore[no-untyped-call]
    rows_ND = _OutOfSlots.apply(rows_SD, by2)  # type: ignore[no-untyped-call]
    return rows_ND


def _order(rows_N: Tensor, num_rows: int) -> Tensor | None:
    """The lookups sorted by row, int32: numbers sorted that hold a row and a lookup, None where none can hold both.

    4096 numbers are sorted in 0.15 ms there, pairs in 0.7; on a TPU it makes no difference.
    """
    bits = (len(rows_N) - 1).bit_length()
    if num_rows << bits > torch.iinfo(torch.int32).max:
        return None
    lookups_N = torch.arange(len(rows_N), dtype=torch.int32, device=rows_N.device)
    packed_N = rows_N.bitwise_left_shift(bits).bitwise_or(lookups_N)
    return packed_N.sort().values.bitwise_and((1 << bits) - 1)


class _OutOfSlots(torch.autograd.Function):
    """Rows [N, D] of those in slots [S, D]; the gradient of an empty slot is 0."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(groups.lookup_of_slot)
        return rows_SD.index_select(0, groups.slot_of_lookup)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Gathered, as a scatter would take longer.
        (lookup_S,) = ctx.saved_tensors
        real_S1 = (lookup_S >= 0).to(grads[0].dtype).unsqueeze(1)
        return grads[0].index_select(0, lookup_S.clamp(min=0)) * real_S1, None


class _FusedRows(torch.autograd.Function):
    """Rows of digits i1 [S], i3 [S] and i2 [X], which S / X in turn share."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        core1, core2, core3, i1_S, i2_X, i3_S = given
        first, second = _first(core1, i1_S, i2_X), core2.index_select(0, i2_X)
        left = _products(first, second).view(len(i1_S), -1, core1.shape[2])
        ctx.save_for_backward(*given, left)
        return _products(left, core3.index_select(0, i3_S)).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        core1, core2, core3, i1_S, i2_X, i3_S, left = ctx.saved_tensors
        grad_S, first = grads[0].view(*left.shape[:2], -1), _first(core1, i1_S, i2_X)
        grad3 = torch.zeros_like(core3).index_add(0, i3_S, _transposed_products(left, grad_S))
        grad_left = _products(grad_S, core3.transpose(1, 2).index_select(0, i3_S)).view(*first.shape[:2], -1)
        grad2 = torch.zeros_like(core2).index_add(0, i2_X, _transposed_products(first, grad_left))
        # One sum for each digit of the column: d2 r numbers are too many for one.
        rank = core1.shape[2]
        grad_first = torch.zeros_like(first)
        for part, slices in zip(torch.split(grad_left, rank, 2), torch.split(core2, rank, 2), strict=True):
            grad_first = grad_first + _products(part, slices.transpose(1, 2).index_select(0, i2_X))
        grad1 = torch.zeros_like(core1).index_add(0, i1_S, grad_first.view(-1, *core1.shape[1:]))
        return grad1, grad2, grad3, None, None, None


def _first(core1: Tensor, i1_S: Tensor, i2_X: Tensor) -> Tensor:
    return core1.index_select(0, i1_S).view(len(i2_X), -1, core1.shape[2])


def _products(left: Tensor, right: Tensor) -> Tensor:
    """[X, a, b] times [X, b, c]."""
    return (left.unsqueeze(3) * right.unsqueeze(1)).sum(2)


def _transposed_products(left: Tensor, right: Tensor) -> Tensor:
    """[X, b, a] transposed times [X, b, c]."""
    return (left.unsqueeze(3) * right.unsqueeze(2)).sum(1)
