"""Learning rates that a recorded step holds as the numbers they were: whether they are those still."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class HasHostRate:
    """Something that updates ``arrays()`` at a ``learning_rate`` which is a number of the host."""

    learning_rate: float

    def arrays(self) -> list[Tensor]:
        """What it updates."""
        raise NotImplementedError


class HostRates:
    """The rates, when it is made, of every optimizer that updates a tensor of which ``updated`` says so.

    Optimizers are torch's, and whatever is a `HasHostRate`; a rate that is a tensor is none of the host.
    """

    def __init__(self, updated: Callable[[Tensor], bool]) -> None:
        self._found: list[tuple[weakref.ref[Any], Sequence[float]]] = []
        for thing in gc.get_objects():
            kind = type(thing)
            if issubclass(kind, torch.optim.Optimizer):
                tensors = [p for group in thing.param_groups for p in group["params"]]
            elif issubclass(kind, HasHostRate):
                tensors = thing.arrays()
            else:
                continue
            if any(map(updated, tensors)):
                self._found.append((weakref.ref(thing), _rates(thing)))

    def changed(self) -> str:
        """How they changed, for people; empty where they did not."""
        for reference, before in self._found:
            thing = reference()
            if thing is not None and (now := _rates(thing)) != before:
                return f"{', '.join(f'{r:g}' for r in before)} to {', '.join(f'{r:g}' for r in now)}"
        return ""


def _rates(thing: Any) -> list[float]:
    if isinstance(thing, HasHostRate):
        return [thing.learning_rate]
    return [group["lr"] for group in thing.param_groups if not isinstance(group["lr"], Tensor)]
