"""Learning rates that a recorded step holds as the numbers they were: whether they are those still."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HasHostRate:
    """Something that writes to ``written()`` in its steps, at a ``learning_rate`` which is a number of the host."""

    learning_rate: float

    def written(self) -> list[Tensor]:
        """What each of its steps writes to."""
        raise NotImplementedError


class _Rates(NamedTuple):
    of: weakref.ref[Any]
    rates: Sequence[float]
    versions: int


class HostRates:
    """The rates, when it is made, of every optimizer that is alive: torch's, and whatever is a `HasHostRate`.

    A rate that is a tensor is none of the host.
    """

    def __init__(self) -> None:
        things = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer | HasHostRate))
        self._found = [_Rates(weakref.ref(t), _rates(t), _versions(t)) for t in things]

    def keep_stepped(self) -> None:
        """Forgets those that wrote to nothing since this was made."""
        self._found = [r for r in self._found if _versions(r.of()) != r.versions]

    def restore(self) -> None:
        """Sets the rates to what they were."""
        for reference, rates, _ in self._found:
            thing = reference()
            if isinstance(thing, HasHostRate):
                thing.learning_rate = rates[0]
            elif thing is not None and len(groups := _groups(thing)) == len(rates):  # else some became tensors
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate

    def changed(self) -> str:
        """How they changed, for people; empty where they did not."""
        for reference, before, _ in self._found:
            thing = reference()
            if thing is not None and (now := _rates(thing)) != before:
                return f"{', '.join(map(repr, before))} to {', '.join(map(repr, now))}"
        return ""


def _groups(thing: Any) -> list[dict[str, Any]]:
    # One that its constructor refused may be alive without any.
    groups = getattr(thing, "param_groups", ())
    return [group for group in groups if isinstance(group.get("lr"), int | float)]


def _rates(thing: Any) -> list[float]:
    if isinstance(thing, HasHostRate):
        return [thing.learning_rate]
    return [group["lr"] for group in _groups(thing)]


def _written(thing: Any) -> list[Tensor]:
    if isinstance(thing, HasHostRate):
        return thing.written()
    return [parameter for group in _groups(thing) for parameter in group["params"]]


def _versions(thing: Any) -> int:
    return sum(tensor._version for tensor in _written(thing) if not tensor.is_inference())
