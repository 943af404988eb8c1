"""Optimizers that touch only the rows that a step looked up, in place.

Duplicate ids are combined by sort and segment sum. Where shapes must be static the result is as long as the list of
ids: `unique` has a shape that depends on the data, and torch-xla runs it on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dlrm_xla.device import Device, RowAccess
from dlrm_xla.lookup import Lookup
from dlrm_xla.one_hot import matmul_parts, one_hot
from dlrm_xla.row_files import RowFiles
from dlrm_xla.row_rules import RULES, Lines, RowSettings
from dlrm_xla.rows import RowStack

# A whole near array is updated where a step looks up more than one id to so many lines: sorting ids and writing single
# states take some 24 ns an id, a pass over all rows some 2.5 ns a line, by the compiler's figures and the model on v5e.
_LINES_PER_ID = 8
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def combine_lookups(ids_N: Tensor, lookups: Sequence[Lookup], access: RowAccess) -> tuple[Tensor, Tensor]:
    """Sums the gradients of equal ids over lookups: (ids_U, grads_UD), ids rising and different.

    With its ids sorted, an id's gradients are a bag of the gradients of the bags it was in, so one embedding bag over
    those adds them up, and no gradient is ever written per slot.
    """
    assert access.sum_rows is not None
    slots_N, weights_N, grads_GD = _slots(ids_N, lookups)
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    ids_U, counts_U = torch.unique_consecutive(sorted_N, return_counts=True)
    starts_U = counts_U.cumsum(0) - counts_U
    slots_N, weights_N = (part.index_select(0, order_N) for part in (slots_N, weights_N))
    return ids_U, access.sum_rows(grads_GD, slots_N, starts_U, weights_N)


def _slots(ids_N: Tensor, lookups: Sequence[Lookup]) -> tuple[Tensor, Tensor, Tensor]:
    """The bag and the weight of each slot of some lookups, and the gradients of their bags [G, D]."""
    grads, slots, weights, bags = [], [], [], 0
    for lookup in lookups:
        grads_GD, slot_bags_N, weights_N = lookup.bag_gradients()
        count = lookup.ids_BS.numel()
        if slot_bags_N is None:
            slot_bags_N = torch.arange(count, dtype=torch.int32, device=ids_N.device)
        slots.append(slot_bags_N + bags if bags else slot_bags_N)
        weights.append(grads_GD.new_ones(count) if weights_N is None else weights_N)
        grads.append(grads_GD)
        bags += len(grads_GD)
    return _joined(slots), _joined(weights), _joined(grads)


def _without_padding(ids_N: Tensor, weights: Sequence[Tensor], end: int) -> Tensor:
    """Padding must not count as touched: it goes to an id that no row has."""
    return torch.where(torch.cat([w.reshape(-1) for w in weights]) != 0, ids_N, end)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def combine_duplicates(ids_N: Tensor, grads_ND: Tensor, past_end: int) -> tuple[Tensor, Tensor]:
    """Sums the gradients of equal ids with static shapes: (ids_N, grads_ND) -> (ids_U, grads_UD), U = N, ids rising.

    What is left over at the end of ``ids_U`` are different ids from ``past_end`` on, which belong to no row.
    """
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    is_first_N = torch.ones_like(sorted_N)
    is_first_N[1:] = (sorted_N[1:] != sorted_N[:-1]).to(sorted_N.dtype)
    segment_N = torch.cumsum(is_first_N, 0, dtype=torch.int32) - 1
    # torch_xla 2.9 aborts the process where index_select takes a result of sort as it is; .int() makes it another.
    sums_UD = torch.zeros_like(grads_ND).index_add_(0, segment_N, grads_ND.index_select(0, order_N.int()))
    spare_N = past_end + torch.arange(len(ids_N), dtype=ids_N.dtype, device=ids_N.device)
    # Ids of one segment are equal, so whichever of them is written last, the result is the same.
    return spare_N.scatter(0, segment_N.long(), sorted_N), sums_UD


def round_stochastically(values: Tensor, keys: Tensor, device: Device) -> Tensor:
    """float32 -> bfloat16, up or down with probabilities that make the mean exact.

    A random number below 2^16 is added to the 32 bits, whose lower half is then cut off. It is a hash of ``keys``
    (int32, broadcast over the last dimension), so a resumed run goes on alike. Keys come of a row's place in its array:
    two devices round alike where the same tables lie together in one array, see `near_bytes` and `placement`.

    Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 2.
    """
    column = torch.arange(values.shape[-1], dtype=torch.int32, device=values.device)
    mixed = keys.unsqueeze(-1) * -1640531527 + column * 40503 if values.dim() > 1 else keys * -1640531527
    for _ in range(2):
        mixed = ((mixed.bitwise_and(0x7FFFFFFF) >> 15) ^ mixed) * -2048144789
    noise = mixed.bitwise_and(0x7FFFFFFF) >> 15
    cut = (device.rows.bits(values, torch.int32) + noise) & -65536
    return device.rows.bits(cut, torch.float32).to(torch.bfloat16)


class StackOptimizer(nn.Module):
    """One stack's optimizer: a module, so that its state moves to a device with the rest."""

    def __init__(self, stack: RowStack, settings: RowSettings, files: RowFiles | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.rule = RULES[settings.name]
        dtype = DTYPES[settings.state]
        for number, kind in enumerate(self.rule.states):
            shape = (stack.end,) if kind == "row" else tuple(stack.rows.shape)
            zeros = files.create(f"state{number}", shape, dtype) if files else torch.zeros(shape, dtype=dtype)
            self.register_buffer(f"state{number}", zeros)

    def states(self) -> list[Tensor]:
        """The state arrays."""
        return [self.get_buffer(f"state{number}") for number in range(len(self.rule.states))]

    def update(self, stack: RowStack, learning_rate: float, step: Tensor) -> Tensor:
        """Updates the rows looked up since the last step in one pass; the lowest whose gradient is not finite, [1]."""
        update_rows = stack.device.rows.update_rows
        assert update_rows is not None
        ids_N = self._touched(stack)
        arrays, first = [stack.rows, *self.states()], stack.lookups[0]
        slots: tuple[Tensor | int, Tensor, Tensor]
        if len(stack.lookups) == 1 and first.pooled and first.bag_length:  # which says what bag a slot is of
            slots = first.bag_length, first.weights_BS.reshape(-1), first.gradient().flatten(0, 1)
        else:
            slots = _slots(ids_N, stack.lookups)
        return update_rows(arrays, ids_N, *slots, self.settings, learning_rate, step)

    def _touched(self, stack: RowStack) -> Tensor:
        ids_N = _joined([lookup.ids_BS.reshape(-1) for lookup in stack.lookups])
        if self._still:
            return ids_N
        return _without_padding(ids_N, [lookup.weights_BS for lookup in stack.lookups], stack.end)

    def step(self, stack: RowStack, learning_rate: float, step: Tensor) -> None:
        """Updates the rows looked up since the last step, by operations of torch."""
        if stack.fbgemm is not None and len(stack.lookups) == 1 and (sums := stack.lookups[0].sums) is not None:
            stack.fbgemm.update(sums, stack.lookups[0].bag_gradients()[0])
            return
        access = stack.device.rows
        if stack.placement == "sparse" and access.static_shapes:
            parts = [t for k in stack.lookups for t in (k.ids_BS, k.weights_BS, k.gradient())]
            update = partial(self._static, stack, learning_rate)
            access.updated(update, [stack.rows, *self.states()], step, *parts)
            return
        if stack.placement == "sparse" and self._only_adds(stack) and access.adds_duplicates:
            for lookup in stack.lookups:
                access.scatter(stack.rows, lookup.ids_BS.reshape(-1), lookup.gradients(-learning_rate), True)
            return
        ids_N = self._touched(stack)
        if stack.placement != "sparse":
            self._dense(stack, ids_N, learning_rate, step, self._still)
            return
        ids_U, sums_UD = combine_lookups(ids_N, stack.lookups, access)
        if not self._still and len(ids_U) and int(ids_U[-1]) == stack.end:
            ids_U, sums_UD = ids_U[:-1], sums_UD[:-1]
        if self._only_adds(stack):  # rows are read and written in one pass
            access.scatter(stack.rows, ids_U, sums_UD * -learning_rate, True)
            return
        self._write(stack, access, [stack.rows, *self.states()], ids_U, ids_U, sums_UD, learning_rate, step)

    def updates_all(self, stack: RowStack, num_ids: int, lines: int) -> bool:
        """Whether a compiled step that looks up so many ids updates all rows of a near array of so many lines."""
        plain = stack.rows.dtype == torch.float32 == DTYPES[self.settings.state]
        return stack.near and plain and not self._only_adds(stack) and num_ids * _LINES_PER_ID > lines

    @property
    def _still(self) -> bool:
        return self.rule.still and self.settings.weight_decay == 0

    def _only_adds(self, stack: RowStack) -> bool:
        """Whether what is added to a row depends on its gradient alone."""
        return self.settings.only_adds and stack.rows.dtype == torch.float32

    def _static(
        self,
        stack: RowStack,
        learning_rate: float,
        access: RowAccess,
        arrays: Sequence[Tensor],
        step: Tensor,
        *parts: Tensor,
    ) -> None:
        """The update of ``arrays``, rows and states, with static shapes; ``parts`` are the lookups' tensors."""
        ids, weights, grads = parts[::3], parts[1::3], parts[2::3]
        ids_N = _joined([i.reshape(-1) for i in ids])
        grads_ND = torch.cat([k.spread(w, g) for k, w, g in zip(stack.lookups, weights, grads, strict=True)])
        if self._only_adds(stack):  # which combines duplicates by itself
            access.scatter(arrays[0], ids_N, grads_ND * -learning_rate, True)
            return
        if not self._still:
            ids_N = _without_padding(ids_N, weights, stack.end)
        if self.updates_all(stack, len(ids_N), len(arrays[0])):
            self._in_lines(stack, access, arrays, ids_N, grads_ND, learning_rate, step)
            return
        ids_U, sums_UD = combine_duplicates(ids_N, grads_ND, stack.end + 1)
        self._write(stack, access, arrays, ids_U, ids_U.clamp(max=stack.num_rows - 1), sums_UD, learning_rate, step)

    def _dense(self, stack: RowStack, ids_N: Tensor, learning_rate: float, step: Tensor, still: bool) -> None:
        grads_ND = torch.cat([lookup.gradients() for lookup in stack.lookups])
        if stack.placement == "matmul":
            hot_RN = one_hot(ids_N, stack.num_rows).t()
            parts = [hot_RN @ part for part in matmul_parts(grads_ND, stack.device)]
            sums_RD = sum(parts[1:], parts[0])
            touched_R = hot_RN.sum(1) > 0
        else:
            # One row more for padding.
            sums_RD = grads_ND.new_zeros(stack.num_rows + 1, stack.dim)
            stack.device.rows.scatter(sums_RD, ids_N, grads_ND, True)
            sums_RD = sums_RD[:-1]
            touched_R = grads_ND.new_zeros(stack.num_rows + 1)
            if not still:
                stack.device.rows.scatter(touched_R, ids_N, torch.ones_like(ids_N, dtype=touched_R.dtype), True)
            touched_R = touched_R[:-1] > 0
        self._all(stack, [stack.rows, *self.states()], sums_RD, None if still else touched_R, learning_rate, step)

    def _in_lines(
        self,
        stack: RowStack,
        access: RowAccess,
        arrays: Sequence[Tensor],
        ids_N: Tensor,
        grads_ND: Tensor,
        learning_rate: float,
        step: Tensor,
    ) -> None:
        """Adds gradients up in lines of zeros, then updates all rows.

        No equal ids to bring together, and no state to read and write one by one.
        """
        sums_LW = torch.zeros_like(arrays[0])
        access.scatter(sums_LW, ids_N, grads_ND, True)
        touched_R = None
        if not self._still:
            touched_R = sums_LW.new_zeros(len(sums_LW) * stack.pack)
            access.scatter(touched_R, ids_N, torch.ones_like(ids_N, dtype=touched_R.dtype), True)
            touched_R = touched_R > 0
        self._all(stack, arrays, sums_LW, touched_R, learning_rate, step, stack.pack)

    def _all(
        self,
        stack: RowStack,
        arrays: Sequence[Tensor],
        sums_LW: Tensor,
        touched_R: Tensor | None,
        learning_rate: float,
        step: Tensor,
        pack: int = 1,
    ) -> None:
        """Updates all rows by gradients of all; ``touched_R`` where one without a gradient does not stay by itself."""
        lines = Lines(pack, stack.dim, sums_LW.shape[1], stack.device)
        rows_LW, *old = (array.float() for array in arrays)
        change_LW, new = self._changes(rows_LW, sums_LW, old, learning_rate, step, lines)
        if touched_R is not None:
            hit_LW = lines.spread(touched_R.float()) > 0.5
            change_LW = torch.where(hit_LW, change_LW, 0)
            new = [
                torch.where(hit_LW if value.dim() > 1 else touched_R, value, before)
                for value, before in zip(new, old, strict=True)
            ]
        ids_R = torch.arange(stack.num_rows, dtype=torch.int32, device=stack.rows.device)
        for number, (array, values) in enumerate(zip(arrays, [rows_LW + change_LW, *new], strict=True)):
            array.copy_(self._rounded(values, array.dtype, ids_R, step, number, stack.device))

    def _changes(
        self,
        rows: Tensor | None,
        sums: Tensor,
        states: list[Tensor],
        learning_rate: float,
        step: Tensor,
        lines: Lines,
    ) -> tuple[Tensor, list[Tensor]]:
        """What is added to rows, and new states; ``rows`` matter to weight decay alone."""
        if self.settings.weight_decay:
            assert rows is not None
            sums = sums + rows * self.settings.weight_decay
        return self.rule.update(sums, [s.float() for s in states], learning_rate, step, self.settings, lines)

    def _write(
        self,
        stack: RowStack,
        access: RowAccess,
        arrays: Sequence[Tensor],
        ids_U: Tensor,
        at_U: Tensor,
        sums_UD: Tensor,
        learning_rate: float,
        step: Tensor,
    ) -> None:
        """Updates rows and states of different ids; ``at_U`` are the same ids, cut off at the end for reading."""
        # A compiled scatter adds as fast as it writes, so rows need not be read first; a CPU's is slower than both.
        adds = access.static_shapes and arrays[0].dtype == torch.float32
        reads = not adds or self.settings.weight_decay != 0
        rows_UD = access.gather(arrays[0], at_U, stack.dim).float() if reads else None
        old = [access.gather(array, at_U, stack.dim) for array in arrays[1:]]
        change_UD, new = self._changes(rows_UD, sums_UD, old, learning_rate, step, Lines())
        if adds:
            access.scatter(arrays[0], ids_U, change_UD, True)
        else:
            assert rows_UD is not None
            new = [rows_UD + change_UD, *new]
        for number, (array, values) in enumerate(zip(arrays[adds:], new, strict=True), int(adds)):
            values = self._rounded(values, array.dtype, ids_U, step, number, stack.device)
            access.scatter(array, ids_U, values, False)

    @staticmethod
    def _rounded(values: Tensor, dtype: torch.dtype, ids: Tensor, step: Tensor, number: int, device: Device) -> Tensor:
        if dtype == torch.float32:
            return values
        return round_stochastically(values, ids + (step * 7919 + number * 104729), device)
