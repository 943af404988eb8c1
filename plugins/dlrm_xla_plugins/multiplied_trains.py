"""Tensor trains for a matrix unit: slices of small cores are chosen, and their gradients added up, by one-hot products.

Lookups are the last dimension, in a TPU's lanes. So a product with a one-hot matrix gives the slices as they are
wanted, and what is left are products of numbers side by side, one for each lookup, added up over the first dimension:
over the second it would cost twice as much. That is why the backward step chooses slices anew, the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlrm_xla.one_hot import one_hot
from dlrm_xla_plugins.grouped_trains import BLOCK, Groups, group

# Numbers for each lookup from which on lookups in groups take less time: by the compiler's figures for 2,048 lookups on
# v5e 0.03 ms and 0.033 for each 1,000 numbers of slices, which take 0.41 at 12,500, and grouped some 0.42 at any rank.
_MOST_NUMBERS = 12_000


def multiplied_rows(cores: tuple[Tensor, Tensor, Tensor], digits: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Rows [N, d1 d2 d3] of a tensor train of cores [n1, d1, r], [n2, r, d2 r], [n3, r, d3] at digits [N] each."""
    rows_ND: Tensor = _MultipliedRows.apply(*cores, *digits)  # type: ignore[no-untyped-call]
    return rows_ND


class _MultipliedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        core1, core2, core3, i1_N, i2_N, i3_N = given
        left = _middle(core1, core2).product(_slices(core1, i1_N), core2, i2_N)
        third = _slices(core3, i3_N)
        ctx.save_for_backward(*given, *left)
        return torch.cat([(part_RN.unsqueeze(1) * third).sum(0) for part_RN in _parts(left, core1)]).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        core1, core2, core3, i1_N, i2_N, i3_N, *left = ctx.saved_tensors
        grads_DN = torch.split(grads[0].t(), core3.shape[2])
        third = _slices(core3, i3_N, swapped=True)
        grad_third = _sum([p.unsqueeze(1) * g for p, g in zip(_parts(left, core1), grads_DN, strict=True)])
        grad_left = torch.split(torch.cat([(third * g.unsqueeze(1)).sum(0) for g in grads_DN]), len(left[0]))
        first = _slices(core1, i1_N)
        grad_first, grad2 = _middle(core1, core2).gradients(first, core2, i2_N, grad_left)
        return (
            _summed(torch.stack(list(grad_first)), i1_N, core1),
            grad2,
            _summed(grad_third, i3_N, core3),
            None,
            None,
            None,
        )


class _Slices:
    """The middle core's slices, which are d2 r^2 numbers for each lookup."""

    @staticmethod
    def product(first: Tensor, core2: Tensor, at_N: Tensor) -> Sequence[Tensor]:
        """Each of the d1 products [d2 r, N] of first slices [r, N] and second ones."""
        second = _slices(core2, at_N)
        return [(first_RN.unsqueeze(1) * second).sum(0) for first_RN in first]

    @staticmethod
    def gradients(
        first: Tensor, core2: Tensor, at_N: Tensor, grads: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Gradients of the first slices and of the middle core, of those of the products."""
        grad_second = _sum([first_RN.unsqueeze(1) * grad_KN for first_RN, grad_KN in zip(first, grads, strict=True)])
        second = _slices(core2, at_N, swapped=True)
        return [(second * grad_KN.unsqueeze(1)).sum(0) for grad_KN in grads], _summed(grad_second, at_N, core2)


class _Crossed:
    """The same by products of first slices and the one-hot matrix, d1 n2 r numbers, that meet the middle core whole."""

    @staticmethod
    def product(first: Tensor, core2: Tensor, at_N: Tensor) -> Sequence[Tensor]:
        matrix_KX = _filled(core2).flatten(0, 1).t()
        return [matrix_KX @ cross_XN for cross_XN in _crosses(first, core2, at_N)]

    @staticmethod
    def gradients(
        first: Tensor, core2: Tensor, at_N: Tensor, grads: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor]:
        full, rank = _filled(core2), core2.shape[1]
        matrix_XK, hot_RN = full.flatten(0, 1), _hot(at_N, core2).t().unsqueeze(1)
        grad_first = [((matrix_XK @ grad_KN).view(*full.shape[:2], -1) * hot_RN).sum(0)[:rank] for grad_KN in grads]
        crosses = _crosses(first, core2, at_N)
        grad2 = _sum([cross_XN @ grad_KN.t() for cross_XN, grad_KN in zip(crosses, grads, strict=True)])
        return grad_first, grad2.view(full.shape)[:, :rank]


class _Grouped:
    """The same with lookups of one slice of the middle core in blocks, so that few slices are ever laid out."""

    @staticmethod
    def product(first: Tensor, core2: Tensor, at_N: Tensor) -> Sequence[Tensor]:
        groups = group(at_N, len(core2))
        first_S, second = _first_blocks(first, groups), core2.index_select(0, groups.row_of_block)
        left_SK = torch.bmm(first_S, second).view(len(groups.lookup_of_slot), -1)
        return left_SK.index_select(0, groups.slot_of_lookup).t().chunk(len(first))

    @staticmethod
    def gradients(
        first: Tensor, core2: Tensor, at_N: Tensor, grads: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor]:
        groups = group(at_N, len(core2))
        first_S, second = _first_blocks(first, groups), core2.index_select(0, groups.row_of_block)
        grads_S = _blocks(torch.stack(list(grads)), groups)
        grad_second = torch.bmm(first_S.transpose(1, 2), grads_S)
        grad2 = torch.zeros_like(core2).index_add(0, groups.row_of_block, grad_second)
        grad_first = torch.bmm(grads_S, second.transpose(1, 2)).view(len(groups.lookup_of_slot), -1)
        return grad_first.index_select(0, groups.slot_of_lookup).t().chunk(len(first)), grad2


def _middle(core1: Tensor, core2: Tensor) -> type[_Slices] | type[_Crossed] | type[_Grouped]:
    """The way with the fewest numbers for each lookup; a crossed one costs about two of a slice."""
    d1, (n2, rank, width) = core1.shape[1], core2.shape
    slices, crossed = d1 * rank * width, 2 * d1 * n2 * rank
    if min(slices, crossed) > _MOST_NUMBERS:
        return _Grouped
    return _Slices if slices < crossed else _Crossed


def _hot(at_N: Tensor, core: Tensor) -> Tensor:
    return one_hot(at_N, len(core)).to(core.dtype)


def _filled(core2: Tensor) -> Tensor:
    """With zeros up to a multiple of 8 rows a slice, as a TPU pads them anyhow: slices below one another fit then."""
    return torch.nn.functional.pad(core2, (0, 0, 0, -core2.shape[1] % 8))


def _crosses(first: Tensor, core2: Tensor, at_N: Tensor) -> list[Tensor]:
    """d1 times [n2 r, N]: a lookup's first slice at the row of the middle core that it wants, zeros elsewhere."""
    hot_RN = _hot(at_N, core2).t().unsqueeze(1)
    return [(hot_RN * full_RN).flatten(0, 1) for full_RN in _filled(first)]


def _blocks(values: Tensor, groups: Groups) -> Tensor:
    """[a, b, N] -> [blocks, BLOCK a, b], lookup 0 in an empty slot."""
    a, b, _ = values.shape
    slots = values.flatten(0, 1).t().index_select(0, groups.lookup_of_slot.clamp(min=0))
    return slots.view(-1, BLOCK * a, b)


def _first_blocks(first: Tensor, groups: Groups) -> Tensor:
    """With zeros in an empty slot, so that it adds nothing to the middle core's gradient."""
    real_S = (groups.lookup_of_slot >= 0).to(first.dtype)
    return _blocks(first, groups) * real_S.repeat_interleave(len(first)).view(-1, BLOCK * len(first), 1)


def _slices(core: Tensor, at_N: Tensor, swapped: bool = False) -> Tensor:
    """Slices [a, b, N] of a core [R, a, b], or [b, a, N]."""
    if not swapped:
        return torch.einsum("rab,nr->abn", core, _hot(at_N, core))
    # Another one-hot matrix, or a compiler keeps the forward step's slices and adds up over their second dimension.
    rows_R1 = torch.arange(len(core), dtype=at_N.dtype, device=at_N.device).unsqueeze(1)
    return torch.einsum("rab,rn->ban", core, (rows_R1 == at_N).to(core.dtype))


def _summed(grads_ABN: Tensor, at_N: Tensor, core: Tensor) -> Tensor:
    """The gradient of a core, of those of its slices."""
    return torch.einsum("abn,nr->rab", grads_ABN, _hot(at_N, core))


def _parts(left: Sequence[Tensor], core1: Tensor) -> list[Tensor]:
    """d1 d2 parts [r, N] of d1 products [d2 r, N]."""
    return [part_RN for left_KN in left for part_RN in torch.split(left_KN, core1.shape[2])]


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0])
