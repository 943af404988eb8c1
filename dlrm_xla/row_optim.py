"""Optimizers that touch only the rows that a step looked up, in place.

Duplicate ids are combined by sort and segment sum. Where shapes must be static the result is as long as the list of
ids: `unique` has a shape that depends on the data, and torch-xla runs it on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dlrm_xla.config import RowOptimizerName
from dlrm_xla.devices import Device, RowAccess
from dlrm_xla.rows import Lookup, RowFiles, RowStack, matmul_parts, one_hot

StateName = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RowSettings:
    """Numbers of a row optimizer. ``weight_decay`` is L2, added to the gradient of touched rows only."""

    name: RowOptimizerName = "adagrad"
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    state: StateName = "fp32"


class Rule(NamedTuple):
    """An optimizer for rows given with their whole gradients.

    ``states`` says for each state whether it has one number per row or per element. ``update`` maps (gradients [U, D],
    states, learning rate, step [1] from 1, settings) to (what is added to the rows, new states). ``still``: a row whose
    gradient is zero stays as it is, state included.
    """

    states: tuple[Literal["row", "element"], ...]
    update: Callable[[Tensor, list[Tensor], float, Tensor, RowSettings], tuple[Tensor, list[Tensor]]]
    still: bool


def _sgd(g: Tensor, states: list[Tensor], lr: float, step: Tensor, s: RowSettings) -> tuple[Tensor, list[Tensor]]:
    return g * -lr, []


def _adagrad(g: Tensor, states: list[Tensor], lr: float, step: Tensor, s: RowSettings) -> tuple[Tensor, list[Tensor]]:
    sum_U = states[0] + g.square().mean(1)
    return g * (-lr / (sum_U.sqrt() + s.eps)).unsqueeze(1), [sum_U]


def _adagrad_element(
    g: Tensor, states: list[Tensor], lr: float, step: Tensor, s: RowSettings
) -> tuple[Tensor, list[Tensor]]:
    sum_UD = states[0] + g.square()
    return g * -lr / (sum_UD.sqrt() + s.eps), [sum_UD]


def _adam(g: Tensor, states: list[Tensor], lr: float, step: Tensor, s: RowSettings) -> tuple[Tensor, list[Tensor]]:
    # The second moment is the first state: torch_xla lets XLA pair donated buffers with results of the same shape in
    # the order in which the graph meets them, and a pair that is crossed costs a copy of each.
    first, second = s.betas
    v_UD = states[0] * second + g.square() * (1 - second)
    m_UD = states[1] * first + g * (1 - first)
    # 1 - beta^t without the loss of digits that 1 - 0.999 has in float32
    bias1, bias2 = (-torch.expm1(step * math.log(beta)) for beta in s.betas)
    return m_UD * (-lr * bias2.sqrt() / bias1) / (v_UD.sqrt() + s.eps), [v_UD, m_UD]


RULES: dict[str, Rule] = {
    "sgd": Rule((), _sgd, still=True),
    "adagrad": Rule(("row",), _adagrad, still=True),
    "adagrad_element": Rule(("element",), _adagrad_element, still=True),
    "adam": Rule(("element", "element"), _adam, still=False),
}


def combine_lookups(ids_N: Tensor, lookups: Sequence[Lookup], access: RowAccess) -> tuple[Tensor, Tensor]:
    """Sums the gradients of equal ids over lookups: (ids_U, grads_UD), ids rising and different.

    With its ids sorted, an id's gradients are a bag of the gradients of the bags it was in, so one embedding bag over
    those adds them up, and no gradient is ever written per slot.
    """
    assert access.sum_rows is not None
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
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    ids_U, counts_U = torch.unique_consecutive(sorted_N, return_counts=True)
    starts_U = counts_U.cumsum(0) - counts_U
    slots_N, weights_N = (_joined(parts).index_select(0, order_N) for parts in (slots, weights))
    return ids_U, access.sum_rows(_joined(grads), slots_N, starts_U, weights_N)


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
    (int32, broadcast over the last dimension), so every device rounds alike and a resumed run goes on alike.

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

    def step(self, stack: RowStack, learning_rate: float, step: Tensor) -> None:
        """Updates the rows looked up since the last step."""
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
        ids_N = _joined([lookup.ids_BS.reshape(-1) for lookup in stack.lookups])
        if not self._still:
            ids_N = _without_padding(ids_N, [lookup.weights_BS for lookup in stack.lookups], stack.end)
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

    @property
    def _still(self) -> bool:
        return self.rule.still and self.settings.weight_decay == 0

    def _only_adds(self, stack: RowStack) -> bool:
        """Whether what is added to a row depends on its gradient alone."""
        return self.settings.name == "sgd" and self.settings.weight_decay == 0 and stack.rows.dtype == torch.float32

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
        ids_U, sums_UD = combine_duplicates(ids_N, grads_ND, stack.end + 1)
        self._write(stack, access, arrays, ids_U, ids_U.clamp(max=stack.num_rows - 1), sums_UD, learning_rate, step)

    def _dense(self, stack: RowStack, ids_N: Tensor, learning_rate: float, step: Tensor, still: bool) -> None:
        grads_ND = torch.cat([lookup.gradients() for lookup in stack.lookups])
        if stack.placement == "matmul":
            hot_RN = one_hot(ids_N, stack.num_rows).t()
            sums_RD = sum(
                (hot_RN @ part for part in matmul_parts(grads_ND, stack.device)), torch.zeros(()).to(grads_ND)
            )
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
        old = self.states()
        change_RD, states = self._changes(stack.rows.float(), sums_RD, old, learning_rate, step)
        rows_RD = stack.rows.float() + change_RD
        if not still:
            rows_RD = torch.where(touched_R.unsqueeze(1), rows_RD, stack.rows.float())
            states = [
                torch.where(touched_R.unsqueeze(1) if new.dim() > 1 else touched_R, new, before.float())
                for new, before in zip(states, old, strict=True)
            ]
        ids_R = torch.arange(stack.num_rows, dtype=torch.int32, device=stack.rows.device)
        stack.rows.copy_(self._rounded(rows_RD, stack.rows.dtype, ids_R, step, 0, stack.device))
        for number, (array, new) in enumerate(zip(old, states, strict=True), 1):
            array.copy_(self._rounded(new, array.dtype, ids_R, step, number, stack.device))

    def _changes(
        self, rows: Tensor | None, sums: Tensor, states: list[Tensor], learning_rate: float, step: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """What is added to rows, and new states; ``rows`` matter to weight decay alone."""
        if self.settings.weight_decay:
            assert rows is not None
            sums = sums + rows * self.settings.weight_decay
        return self.rule.update(sums, [s.float() for s in states], learning_rate, step, self.settings)

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
        change_UD, new = self._changes(rows_UD, sums_UD, old, learning_rate, step)
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
