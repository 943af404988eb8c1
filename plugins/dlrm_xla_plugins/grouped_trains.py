"""Products of gathered tensor-train cores with lookups grouped by the core's row that they share.

Looked up one by one, each lookup needs a copy of its slice of the middle core, rank x d2 rank numbers, and the products
are of a few lines each. Grouped, one slice serves a block of lookups: 4096 lookups at rank 16 in a core of 100 slices
copy some 350 slices instead of 4096, and multiply 64 lines at once instead of 4. All shapes are static.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Lookups in a block. Measured on two cores: 8 and 16 are alike on CPU, 16 is the faster on XLA.
BLOCK = 16

# Numbers in a slice of the middle core from which on grouping pays. On XLA's CPU backend forward and backward of 2048
# lookups in each of 15 tables take 18 instead of 49 ms at 256 (rank 8, 16 columns), 15 instead of 11 at 64, where what
# is written and read, not multiplied, decides: one such table alone takes about as long either way.
GROUPED = 256


class Groups(NamedTuple):
    """Places of N lookups in blocks of slots, each block of lookups of one row; some slots stay empty.

    ``row_of_block`` [blocks] the row that a block shares, ``lookup_of_slot`` [slots] with -1 where a slot is empty,
    ``slot_of_lookup`` [N]; all int32.
    """

    row_of_block: Tensor
    lookup_of_slot: Tensor
    slot_of_lookup: Tensor


def group(rows_N: Tensor, num_rows: int, block: int = BLOCK, order_N: Tensor | None = None) -> Groups:
    """Groups lookups by row: a sort, then each row's lookups in as many blocks of a power of two as they need.

    ``order_N``: the lookups sorted by row, int32, where another way to sort them is faster than argsort. There are at
    most (N + num_rows (block - 1)) / block blocks, and no more than lookups.
    """
    count = len(rows_N)
    num_blocks = min(count, (count + num_rows * (block - 1)) // block)
    if order_N is None:
        order_N = torch.argsort(rows_N).to(torch.int32)
    lookups_R = torch.zeros(num_rows, dtype=torch.int32, device=rows_N.device)
    lookups_R = lookups_R.index_add(0, rows_N, torch.ones_like(rows_N, dtype=torch.int32))
    blocks_R = (lookups_R + (block - 1)).bitwise_right_shift(block.bit_length() - 1)
    last_R = blocks_R.cumsum(0, dtype=torch.int32)
    first_slot_R = (last_R - blocks_R) * block - (lookups_R.cumsum(0, dtype=torch.int32) - lookups_R)
    positions_N = torch.arange(count, dtype=torch.int32, device=rows_N.device)
    slots_N = first_slot_R.index_select(0, rows_N.index_select(0, order_N)) + positions_N
    blocks = torch.arange(num_blocks, dtype=torch.int32, device=rows_N.device)
    row_of_block = (blocks.unsqueeze(1) >= last_R).sum(1, dtype=torch.int32).clamp(max=num_rows - 1)
    empty = torch.zeros(num_blocks * block, dtype=torch.int32, device=rows_N.device)
    return Groups(
        row_of_block,
        empty.index_add(0, slots_N, order_N + 1) - 1,
        torch.zeros_like(positions_N).index_add(0, order_N, slots_N),
    )


def train_rows(cores: tuple[Tensor, Tensor, Tensor], digits: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Rows [N, d1 d2 d3] of a tensor train of cores [n1, d1, r], [n2, r, d2 r], [n3, r, d3] at digits [N] each."""
    rows_ND: Tensor = _TrainRows.apply(*cores, *digits)  # type: ignore[no-untyped-call]
    return rows_ND


class _TrainRows(torch.autograd.Function):
    """Left products grouped by the second digit, the product with the third core by the third."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        core1, core2, core3, i1_N, i2_N, i3_N = given
        (_, d1, rank), d3 = core1.shape, core3.shape[2]
        lines = d1 * core2.shape[2] // rank  # of rank numbers each, in the left product of one lookup
        by2, by3 = group(i2_N, len(core2)), group(i3_N, len(core3))
        # An empty slot stands for lookup 0; its line of core 1 is zeroed, and so are its gradients below.
        real_S = (by2.lookup_of_slot >= 0).to(core1.dtype).view(-1, 1, 1)
        real3_S = (by3.lookup_of_slot >= 0).to(core1.dtype).view(-1, 1)
        lookup2_S, lookup3_S = by2.lookup_of_slot.clamp(min=0), by3.lookup_of_slot.clamp(min=0)
        i1_S = i1_N.index_select(0, lookup2_S)
        first = (core1.index_select(0, i1_S) * real_S).view(-1, BLOCK * d1, rank)
        second = core2.index_select(0, by2.row_of_block)
        left = torch.bmm(first, second).view(-1, lines * rank)
        left = left.index_select(0, by2.slot_of_lookup.index_select(0, lookup3_S)).view(-1, BLOCK * lines, rank)
        third = core3.index_select(0, by3.row_of_block)
        rows_ND = torch.bmm(left, third).view(-1, lines * d3).index_select(0, by3.slot_of_lookup)
        ctx.save_for_backward(
            *(first, second, left, third, real_S, real3_S, i1_S, by2.row_of_block, by3.row_of_block),
            *(lookup2_S, lookup3_S, by3.slot_of_lookup),
        )
        ctx.sizes = len(core1), len(core2), len(core3)
        return rows_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first, second, left, third, real_S, real3_S, i1_S, row2, row3, lookup2_S, lookup3_S, slot3_N = ctx.saved_tensors
        (grad_ND,), (n1, n2, n3) = grads, ctx.sizes
        (blocks3, lines, rank), d3 = left.shape, third.shape[2]

        def summed(rows: int, index: Tensor, values: Tensor) -> Tensor:
            return values.new_zeros(rows, *values.shape[1:]).index_add(0, index, values)

        # Gathered, not scattered into slots: of 9.3 ms on XLA's CPU backend 0.6 less.
        slots = (grad_ND.index_select(0, lookup3_S) * real3_S).view(blocks3, lines, d3)
        grad3 = summed(n3, row3, torch.bmm(left.transpose(1, 2), slots))
        grad_left = torch.bmm(slots, third.transpose(1, 2)).view(blocks3 * BLOCK, -1)
        grad_left = grad_left.index_select(0, slot3_N.index_select(0, lookup2_S)).view(*first.shape[:2], -1)
        grad2 = summed(n2, row2, torch.bmm(first.transpose(1, 2), grad_left))
        grad_first = torch.bmm(grad_left, second.transpose(1, 2)).view(len(i1_S), -1, rank) * real_S
        return summed(n1, i1_S, grad_first), grad2, grad3, None, None, None
