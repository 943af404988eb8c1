"""Rows on a CUDA device: bags summed and rows updated in one pass over memory each, by kernels in Triton.

torch's own operations lay what they make side by side: gradients of equal ids summed, rows read, changes, rows written,
each once more through memory. Here an id's gradients are added up in registers, and its row is read and written once.
Sums are added in one order, so a run repeats itself to the bit.

Ids are sorted, and the program of an id's first place updates its row. So that an id looked up very often is not the
work of one program alone, sorted places are cut into chunks: chunks of one id are summed beforehand, each by its own
program, and the id's program takes what they come to in one step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
import torch
import triton
import triton.language as tl
from torch import Tensor

from dlrm_xla.row_rules import RowSettings

# Numbers of a tile, and most rows of it: enough loads in flight for the memory, and few registers a program.
_NUMBERS, _ROWS, _WARPS = 512, 32, 1
# Most sorted places of a chunk and numbers of their gradients; chunks that a program looks at, and joins at once.
_CHUNK, _CHUNK_NUMBERS, _CHUNKS, _JOINED = 32, 8192, 4, 128
_NO_ROW = 2**31 - 1


def _tile(dim: int) -> tuple[int, int]:
    columns = triton.next_power_of_2(dim)
    return columns, max(1, min(_ROWS, _NUMBERS // columns))


def _chunk(dim: int) -> int:
    columns: int = triton.next_power_of_2(dim)
    return max(4, min(_CHUNK, _CHUNK_NUMBERS // columns))


def gather_rows(array: Tensor, ids_N: Tensor, dim: int) -> Tensor:
    """Rows [N, dim] of an array [R, dim], or values [N] of an array [R], of its type; NaN for an id that has no row."""
    if array.dim() == 1 or not array.is_floating_point() or not len(ids_N):
        return array.index_select(0, ids_N)
    out_ND = array.new_empty(len(ids_N), dim)
    columns, rows = _tile(dim)
    _gather_rows[(triton.cdiv(len(ids_N), rows),)](
        array, ids_N.contiguous(), out_ND, len(ids_N), len(array), dim, columns, rows, num_warps=_WARPS
    )
    return out_ND


def sum_rows(rows: Tensor, ids_N: Tensor, starts_G: Tensor, weights_N: Tensor) -> Tensor:
    """Weighted sums [G, D] of rows [R, D] over groups of neighbouring ids, float32.

    out_g = sum of weights[n] rows[ids[n]] over n from starts[g] up to starts[g + 1], the last up to N; NaN where an id
    has no row.
    """
    dim = rows.shape[1]
    out_GD = torch.empty(len(starts_G), dim, dtype=torch.float32, device=rows.device)
    columns, groups = _tile(dim)
    if len(starts_G):
        _sum_rows[(triton.cdiv(len(starts_G), groups),)](
            *(rows, ids_N.contiguous(), starts_G.contiguous(), weights_N.contiguous(), out_GD),
            *(len(starts_G), len(ids_N), len(rows), dim, columns, groups),
            num_warps=_WARPS,
        )
    return out_GD


def update_rows(
    arrays: Sequence[Tensor],
    ids_N: Tensor,
    bags_N: Tensor | int,
    weights_N: Tensor,
    grads_GD: Tensor,
    settings: RowSettings,
    learning_rate: float,
    step: Tensor,
) -> Tensor:
    """Updates the rows [R, D] of ``arrays[0]``, and states beside them, by gradients of the bags that they were in.

    The gradient of row r is the sum of weights[n] grads[bags[n]] over all n with ids[n] = r; a number for ``bags_N``
    says that each bag has so many neighbouring ids. Ids past the rows belong to none. ``step`` [1] int32 counts from 1.
    Arrays are float32, or bfloat16 and then rounded stochastically. Returns int32 [1]: the lowest row whose gradient
    is not finite, or 2^31 - 1.
    """
    rows = arrays[0]
    states = [*arrays[1:], rows, rows][:2]
    count, dim = len(ids_N), rows.shape[1]
    bad = torch.full((1,), _NO_ROW, dtype=torch.int32, device=rows.device)
    if not count:
        return bad
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    columns, tile = _tile(dim)
    bags, length = (bags_N, 0) if isinstance(bags_N, Tensor) else (order_N, bags_N)
    slots = (sorted_N, order_N, bags.contiguous(), weights_N.contiguous(), grads_GD.contiguous())
    sums_CD, alike_C = sum_chunks(*slots, length)
    betas = [number for beta in settings.betas for number in (beta, 1 - beta)]
    _update_rows[(triton.cdiv(count, tile),)](
        *(rows, *states, *slots, sums_CD, alike_C, step, _scale(settings, step), bad, count, len(rows)),
        *(float(learning_rate), settings.eps, *betas, settings.weight_decay),
        *(dim, columns, tile, _chunk(dim), length, settings.name, settings.weight_decay != 0),
        # A million ids, rows of 128, H200: with a state to read two warps are 6 to 10 % faster, else one 7 to 14 %.
        num_warps=_WARPS if settings.name == "sgd" else 2 * _WARPS,
    )
    return bad


def sum_chunks(
    sorted_N: Tensor, order_N: Tensor, bags_N: Tensor, weights_N: Tensor, grads_GD: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Sums the gradients of chunks of one id each: sums [C, D], and how many chunks each of them is of, int32 [C].

    An id's chunks add up to one sum, in the second chunk that the id is in, and the others count none.
    """
    count, dim, size = len(sorted_N), grads_GD.shape[1], _chunk(grads_GD.shape[1])
    chunks, columns = triton.cdiv(count, size), triton.next_power_of_2(dim)
    part, programs = min(columns, 32), triton.cdiv(chunks, _CHUNKS)
    sums_CD = torch.empty(chunks, dim, dtype=torch.float32, device=grads_GD.device)
    alike_C = torch.zeros(chunks, dtype=torch.int32, device=grads_GD.device)
    _sum_chunks[(programs,)](
        sorted_N, order_N, bags_N, weights_N, grads_GD, sums_CD, count, dim, columns, size, _CHUNKS, length
    )
    _join_chunks[(programs, columns // part)](sorted_N, sums_CD, alike_C, count, dim, part, size, _CHUNKS, _JOINED)
    return sums_CD, alike_C


def _scale(settings: RowSettings, step: Tensor) -> Tensor:
    """What Adam's rate is multiplied by, for its moments began at zero, [1]; other rules read it not."""
    if settings.name != "adam":
        return step
    first, second = (-torch.expm1(step * math.log(beta)) for beta in settings.betas)
    return second.sqrt() / first


@triton.jit
def _sum_rows(
    rows, ids, starts, weights, out, num_groups, num_ids, num_rows,
    dim: tl.constexpr, columns: tl.constexpr, groups: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * groups + tl.arange(0, groups)
    column = tl.arange(0, columns)[None, :]
    place = tl.load(starts + group, mask=group < num_groups, other=0)
    end = tl.load(starts + group + 1, mask=group + 1 < num_groups, other=num_ids)
    end = tl.where(group < num_groups, end, place)
    sums = tl.zeros([groups, columns], tl.float32)
    while tl.max(end - place, 0) > 0:
        here = place < end
        row = tl.load(ids + place, mask=here, other=0).to(tl.int64)
        weight = tl.load(weights + place, mask=here, other=0)
        found = (row >= 0) & (row < num_rows)
        mask = (here & found)[:, None] & (column < dim)
        values = tl.load(rows + row[:, None] * dim + column, mask=mask, other=0).to(tl.float32)
        sums += tl.where(found, weight, float("nan"))[:, None] * values
        place += 1
    inside = (group < num_groups)[:, None] & (column < dim)
    tl.store(out + group.to(tl.int64)[:, None] * dim + column, sums, mask=inside)


@triton.jit
def _gather_rows(rows, ids, out, num_ids, num_rows, dim: tl.constexpr, columns: tl.constexpr, tile: tl.constexpr):
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, columns)[None, :]
    inside = place < num_ids
    row = tl.load(ids + place, mask=inside, other=0).to(tl.int64)
    mask = (inside & (row >= 0) & (row < num_rows))[:, None] & (column < dim)
    values = tl.load(rows + row[:, None] * dim + column, mask=mask, other=float("nan"))
    tl.store(out + place.to(tl.int64)[:, None] * dim + column, values, mask=inside[:, None] & (column < dim))


@triton.jit
def _slot_gradients(order, bags, weights, grads, slot, mask, column, dim: tl.constexpr, length: tl.constexpr):
    """Gradients of the bags of some places in the order of ids, and the weights there."""
    slot = tl.load(order + slot, mask=mask, other=0)
    weight = tl.load(weights + slot, mask=mask, other=0)
    bag = slot // length if length > 0 else tl.load(bags + slot, mask=mask, other=0).to(tl.int64)
    values = tl.load(
        grads + bag[:, None] * dim + column[None, :], mask=mask[:, None] & (column < dim)[None, :], other=0
    )
    return values, weight


@triton.jit
def _of_one_id(ids, chunk, num_ids, size: tl.constexpr):
    """Whether all sorted places of a chunk have one id, and the id."""
    inside = (chunk + 1) * size <= num_ids
    row = tl.load(ids + chunk * size, mask=inside, other=-1)
    last = tl.load(ids + chunk * size + size - 1, mask=inside, other=-2)
    return row == last, row


@triton.jit
def _sum_chunks(
    ids, order, bags, weights, grads, sums, num_ids,
    dim: tl.constexpr, columns: tl.constexpr, size: tl.constexpr, chunks: tl.constexpr, length: tl.constexpr,
):  # fmt: skip
    """Sums the gradients of each chunk of one id."""
    begin = tl.program_id(0) * chunks
    any_alike, _rows = _of_one_id(ids, begin + tl.arange(0, chunks), num_ids, size)
    if tl.max(any_alike.to(tl.int32), 0) > 0:
        column = tl.arange(0, columns)
        for k in range(chunks):
            chunk = begin + k
            alike, _row = _of_one_id(ids, chunk, num_ids, size)
            if alike:
                place = chunk * size + tl.arange(0, size)
                values, weight = _slot_gradients(
                    order, bags, weights, grads, place, place < num_ids, column, dim, length
                )
                total = tl.sum(values * weight[:, None], 0)
                tl.store(sums + chunk.to(tl.int64) * dim + column, total, mask=column < dim)


@triton.jit
def _join_chunks(
    ids, sums, alike, num_ids,
    dim: tl.constexpr, part: tl.constexpr, size: tl.constexpr, chunks: tl.constexpr, joined: tl.constexpr,
):  # fmt: skip
    """Adds up neighbouring chunks of one id, from the second chunk that it is in on; ``alike`` there says how many."""
    begin = tl.program_id(0) * chunks
    any_alike, _rows = _of_one_id(ids, begin + tl.arange(0, chunks), num_ids, size)
    if tl.max(any_alike.to(tl.int32), 0) > 0:
        column = tl.program_id(1) * part + tl.arange(0, part)
        for k in range(chunks):
            chunk = begin + k
            one, row = _of_one_id(ids, chunk, num_ids, size)
            # Whether the id's first place is in the chunk before: its program walks from there to the first place here.
            before = tl.load(ids + chunk * size - 1, mask=one & (chunk > 0), other=-1)
            earlier = tl.load(ids + chunk * size - size - 1, mask=one & (chunk > 1), other=-1)
            if one and before == row and earlier != row:
                total = tl.zeros([part], tl.float32)
                count = 0
                more = True
                while more:
                    other = chunk + count + tl.arange(0, joined)
                    inside = (other + 1) * size <= num_ids
                    # Sorted, so a chunk whose last id is the same is of that id alone.
                    same = tl.load(ids + other * size + size - 1, mask=inside, other=-1) == row
                    values = tl.load(
                        sums + other.to(tl.int64)[:, None] * dim + column[None, :],
                        mask=same[:, None] & (column < dim)[None, :],
                        other=0,
                    )
                    total += tl.sum(values, 0)
                    found = tl.sum(same.to(tl.int32), 0)
                    count += found
                    more = found == joined
                tl.store(sums + chunk.to(tl.int64) * dim + column, total, mask=column < dim)
                if tl.program_id(1) == 0:
                    tl.store(alike + chunk, count)


@triton.jit
def _write(array, at, values, mask, key, column):
    """Stores float32 values; to bfloat16 as `dlrm_xla.row_optim.round_stochastically` does."""
    if array.dtype.element_ty == tl.bfloat16:
        mixed = key * -1640531527 + column * 40503
        for _ in tl.static_range(2):
            mixed = (((mixed & 0x7FFFFFFF) >> 15) ^ mixed) * -2048144789
        noise = (mixed & 0x7FFFFFFF) >> 15
        cut = (values.to(tl.int32, bitcast=True) + noise) & -65536
        tl.store(array + at, cut.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=mask)
    else:
        tl.store(array + at, values, mask=mask)


@triton.jit
def _update_rows(
    rows, state0, state1, ids, order, bags, weights, grads, sums, alike, step_at, scale_at, bad, num_ids, num_rows,
    rate, eps, beta1, rest1, beta2, rest2, decay,
    dim: tl.constexpr, columns: tl.constexpr, tile: tl.constexpr, size: tl.constexpr, length: tl.constexpr,
    rule: tl.constexpr, decays: tl.constexpr,
):  # fmt: skip
    """Each place where an id begins adds up its gradients, and updates its row."""
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, columns)
    row = tl.load(ids + place, mask=place < num_ids, other=-1)
    before = tl.load(ids + place - 1, mask=(place > 0) & (place < num_ids), other=-1)
    first = (row != before) & (row >= 0) & (row < num_rows)
    mask = first[:, None] & (column < dim)[None, :]
    at = row.to(tl.int64)[:, None] * dim + column[None, :]
    values = tl.load(rows + at, mask=mask, other=0).to(tl.float32)
    # All that can be is read before the gradients are, for that may take several turns.
    if rule == "adagrad":
        state = tl.load(state0 + row, mask=first, other=0).to(tl.float32)
    elif rule != "sgd":
        state = tl.load(state0 + at, mask=mask, other=0).to(tl.float32)
    if rule == "adam":
        mean = tl.load(state1 + at, mask=mask, other=0).to(tl.float32)
    gradient, weight = _slot_gradients(order, bags, weights, grads, place, first, column, dim, length)
    gradient *= weight[:, None]
    place += 1
    more = first & (tl.load(ids + place, mask=first & (place < num_ids), other=-1) == row)
    while tl.max(more.to(tl.int32), 0) > 0:
        chunk = place // size
        count = tl.load(alike + chunk, mask=more & (place % size == 0), other=0)
        if tl.max(count, 0) > 0:
            whole = chunk.to(tl.int64)[:, None] * dim + column[None, :]
            gradient += tl.load(sums + whole, mask=(count > 0)[:, None] & (column < dim)[None, :], other=0)
        end = (chunk + 1) * size
        for k in tl.static_range(4):  # together, for each waits for memory three times
            here = more & (count == 0) & (place + k < end)
            here = here & (tl.load(ids + place + k, mask=here & (place + k < num_ids), other=-1) == row)
            found, weight = _slot_gradients(order, bags, weights, grads, place + k, here, column, dim, length)
            gradient += found * weight[:, None]
        place = tl.where(count > 0, place + count * size, tl.minimum(place + 4, end))
        more = more & (tl.load(ids + place, mask=more & (place < num_ids), other=-1) == row)

    finite = tl.min((tl.abs(gradient) < float("inf")).to(tl.int32), 1)
    wrong = first & (finite == 0)
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tl.atomic_min(bad, tl.min(tl.where(wrong, row, 2147483647), 0))

    if decays:
        gradient += values * decay
    step = tl.load(step_at)
    key = row[:, None] + step * 7919
    if rule == "sgd":
        change = gradient * -rate
    elif rule == "adagrad":
        state += tl.sum(gradient * gradient, 1) / dim
        change = gradient * (-rate / (tl.sqrt_rn(state) + eps))[:, None]
        _write(state0, row, state, first, row + step * 7919 + 104729, 0)
    elif rule == "adagrad_element":
        state += gradient * gradient
        change = gradient * -rate / (tl.sqrt_rn(state) + eps)
        _write(state0, at, state, mask, key + 104729, column[None, :])
    else:
        state = state * beta2 + gradient * gradient * rest2
        mean = mean * beta1 + gradient * rest1
        change = mean * (-rate * tl.load(scale_at)) / (tl.sqrt_rn(state) + eps)
        _write(state0, at, state, mask, key + 104729, column[None, :])
        _write(state1, at, mean, mask, key + 209458, column[None, :])
    _write(rows, at, values + change, mask, key, column[None, :])
