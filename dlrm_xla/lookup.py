"""One lookup of a step: bags side by side, their pooling, and the gradients that come back to their slots."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Lookup(NamedTuple):
    """What one lookup of a step leaves for the optimizer.

    ``leaf`` is the leaf of autograd: the ``pooled`` bags [B, F, D], or, where a plugin's weights want gradients
    themselves, the gathered rows [B, S, D]. ``sums`` is what the leaf was made of where FBGEMM looked up.
    """

    ids_BS: Tensor
    weights_BS: Tensor
    leaf: Tensor
    pooled: bool
    lengths: Sequence[int]
    names: Sequence[str]
    sums: Tensor | None = None

    def gradient(self) -> Tensor:
        """The leaf's gradient."""
        assert self.leaf.grad is not None
        return self.leaf.grad

    def gradients(self, factor: float = 1.0) -> Tensor:
        """Gradient of each slot's row times a factor, [B S, D]."""
        grad = self.gradient()
        if not self.pooled:
            return self.spread(self.weights_BS, grad * factor)
        weights_BS = self.weights_BS * factor
        if len(set(self.lengths)) > 1:
            return self.spread(weights_BS, grad)
        # In one pass, which a TPU lays out worse than the passes of `spread`: 51,000 cycles of 444,485 on v5e.
        return (grad.unsqueeze(2) * weights_BS.view(*grad.shape[:2], self.bag_length, 1)).view(-1, grad.shape[2])

    def spread(self, weights_BS: Tensor, grad: Tensor) -> Tensor:
        """The leaf's gradient by slot, [B S, D]."""
        if self.pooled:
            if len(self.lengths) != self.ids_BS.shape[1]:
                runs = equal_runs(self.lengths)
                parts = torch.split(grad, [count for _, count in runs], 1)
                slots = [
                    part.unsqueeze(2).expand(-1, -1, length, -1).flatten(1, 2)
                    for part, (length, _) in zip(parts, runs, strict=True)
                ]
                grad = slots[0] if len(slots) == 1 else torch.cat(slots, 1)
            grad = grad * weights_BS.unsqueeze(2)
        return grad.reshape(-1, grad.shape[2])

    def bag_gradients(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the bags [B F, D], each slot's bag, and its weight; None where each slot is a bag by itself."""
        assert self.leaf.grad is not None
        grads_GD = self.leaf.grad.flatten(0, 1)
        if not self.pooled:
            return grads_GD, None, None
        single = len(self.lengths) == self.ids_BS.shape[1]
        slots = None if single else bag_of_slot(len(self.ids_BS), tuple(self.lengths), self.ids_BS.device)
        return grads_GD, slots, self.weights_BS.reshape(-1)

    @property
    def bag_length(self) -> int:
        """How many slots each of the bags has; 0 where they differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else 0

    def gradient_sums(self) -> Tensor:
        """One number per name, not finite where any gradient of that bag is not."""
        assert self.leaf.grad is not None
        # Over samples first: five times faster on a CPU than over samples and columns at once.
        sums = self.leaf.grad.flatten(1).sum(0).view(self.leaf.shape[1], -1).sum(1)
        if len(sums) == len(self.names):
            return sums
        if self.bag_length:
            return sums.view(len(self.names), -1).sum(1)
        return torch.stack([part.sum() for part in torch.split(sums, list(self.lengths))])


def pool(rows_ND: Tensor, weights_BS: Tensor, lengths: Sequence[int]) -> Tensor:
    """Weighted sum of each bag's rows: [B S, D], [B, S] -> [B, F, D], bag f of ``lengths[f]`` slots."""
    rows_BSD = rows_ND.view(*weights_BS.shape, rows_ND.shape[-1]) * weights_BS.unsqueeze(2)
    if len(lengths) == weights_BS.shape[1]:
        return rows_BSD
    runs = equal_runs(lengths)
    parts = torch.split(rows_BSD, [length * count for length, count in runs], 1)
    pooled = [
        part if length == 1 else part.reshape(part.shape[0], count, length, part.shape[2]).sum(2)
        for part, (length, count) in zip(parts, runs, strict=True)
    ]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)


def equal_runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours of one length as (length, how many)."""
    return [(length, len(list(run))) for length, run in itertools.groupby(lengths)]


# Kept for good, as the two below: a recorded step reads them where they were.
@functools.cache
def bag_starts(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each bag starts among B S slots of bags that lie side by side, int32 [B F]."""
    within = [0, *itertools.accumulate(lengths)][:-1]
    starts = torch.arange(batch).unsqueeze(1) * sum(lengths) + torch.tensor(within)
    return starts.flatten().int().to(device)


@functools.cache
def bag_ends(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each bag starts and, behind them, where the last one ends, int32 [B F + 1]."""
    slots = torch.tensor([batch * sum(lengths)], dtype=torch.int32, device=device)
    return torch.cat([bag_starts(batch, lengths, device), slots])


@functools.cache
def bag_of_slot(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The bag of each slot, int32 [B S]."""
    bags = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return (torch.arange(batch).unsqueeze(1) * len(lengths) + bags).flatten().int().to(device)
