"""The bags of a model, and how their lookups become a few: one for each array of rows.

A bag around others, a plugin's, says what it wants of them (`dlrm_xla.contract.ComposedBag`). What all bags of a model
want at once is looked up at once: of 26 tables one gather, and on several chips one exchange, whatever is around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dlrm_xla.contract import ComposedBag, Computation, RedirectedBag, Wanted
from dlrm_xla.rows import RowStack, RowTable


@runtime_checkable
class Arranged(Protocol):
    """A module around bags that wants to know the order in which they come."""

    def arrange(self) -> None:
        """Looks at `BagCollection.order`; called once the stacks are made."""


class BagCollection(nn.ModuleList):
    """The bags of a model, one per feature: (ids, weights) -> [B, F, D].

    Exact tables of one stack are looked up together, in one gather, also those that a bag asks at other ids. Their bags
    then lie side by side in it, and so they are given in ``any_order``, that of ``order``; otherwise by feature, for
    which they are taken apart. What other bags want is looked up together as well.
    """

    def __init__(self, bags: Sequence[nn.Module], any_order: bool = False) -> None:
        super().__init__(bags)
        self.any_order = any_order
        self.order = list(range(len(bags)))
        self._groups: list[_Group] = []
        self._alone = self.order
        self._grouped = False

    def group(self) -> None:
        """Finds the bags that come from tables of one stack; called once the stacks are made."""
        found: dict[RowStack, _Group] = {}
        ways = [_way(bag) for bag in self]
        # Those that are tables first, for theirs have one number of slots.
        for position in sorted(range(len(self)), key=lambda position: len(ways[position][0])):
            redirections, bag = ways[position]
            if isinstance(bag, RowTable) and bag.home is not None:
                group = found.setdefault(bag.home.stack, _Group(bag.home.stack, [], [], [], []))
                group.features.append(position)
                group.redirections.append(redirections)
                group.names.append(bag.table.name)
                group.bases.append(bag.home.base)
        self._groups = list(found.values())
        for number, group in enumerate(self._groups):
            self.register_buffer(f"bases{number}", torch.tensor(group.bases, dtype=torch.int32), persistent=False)
        together = [feature for group in self._groups for feature in group.features]
        self._alone = [feature for feature in range(len(self)) if feature not in together]
        self._grouped = True
        if self.any_order:
            self.order = together + self._alone

    def forward(self, ids: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        pooled = [self._looked_up(number, ids, weights) for number in range(len(self._groups))]
        if self._alone:
            alone = [Wanted(self[f], ids[f], weights[f]) for f in self._alone]
            outs = self._found(alone)
            # Side by side rather than stacked, and cut so below: a TPU's compiler lays a stack's gradients out anew for
            # each bag (`robe` at 100x of `kaggle`: 2.2 ms on v5e, estimated, and 1.5 so).
            pooled.append(torch.cat(outs, 1).view(-1, len(outs), outs[0].shape[1]))
        if len(pooled) == 1:
            return pooled[0]
        if self.any_order:
            return torch.cat(pooled, 1)
        outs = [out_BD for part_BFD in pooled for out_BD in part_BFD.unbind(1)]
        together = [feature for group in self._groups for feature in group.features]
        places = {feature: place for place, feature in enumerate(together + self._alone)}
        return torch.stack([outs[places[feature]] for feature in range(len(self))], 1)

    def _looked_up(self, number: int, ids: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        stack, features, redirections, names, _ = self._groups[number]
        ids_F, weights_F = [], []
        for feature, bags in zip(features, redirections, strict=True):
            ids_BL, weights_BL = ids[feature], weights[feature]
            for bag in bags:
                ids_BL, weights_BL = bag.redirect(ids_BL, weights_BL)
            ids_F.append(ids_BL)
            weights_F.append(weights_BL)
        return _look_up(stack, ids_F, weights_F, self.get_buffer(f"bases{number}"), names, self.training)

    def _found(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """What bags of no group give."""
        if not self._grouped:  # where rows are is for them to know
            return [want.bag(want.ids_BL, want.weights_BL) for want in wanted]
        found: dict[int, Tensor] = {}
        rounds = _Rounds()
        for k, want in enumerate(wanted):
            rounds.ask(want, partial(found.__setitem__, k))
        while rounds.waiting:
            for (stack, _, _), lookups in rounds.take().items():
                tables, ids, weights, _ = zip(*lookups, strict=True)
                bases_F = torch.cat([table.get_buffer("base") for table in tables])
                names = [table.table.name for table in tables]
                bags_BFD = _look_up(stack, ids, weights, bases_F, names, self.training)
                for lookup, out_BD in zip(lookups, torch.split(bags_BFD.flatten(1), stack.dim, 1), strict=True):
                    lookup.deliver(out_BD)
        return [found[k] for k in range(len(wanted))]


def _way(bag: nn.Module) -> tuple[list[RedirectedBag], nn.Module]:
    """The redirections from a bag to the first that is none."""
    found = []
    while isinstance(bag, RedirectedBag):
        found.append(bag)
        bag = bag.bag
    return found, bag


def _look_up(
    stack: RowStack,
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    bases_F: Tensor,
    names: Sequence[str],
    training: bool,
) -> Tensor:
    """Bags of tables of one stack, [B, F, D]; ids are those of the tables, which begin at ``bases_F``."""
    lengths = [ids_BL.shape[1] for ids_BL in ids]
    if all(length == 1 for length in lengths):
        ids_BS = torch.cat(list(ids), 1) + bases_F
    else:
        ids_BS = torch.cat([ids_BL + bases_F[k] for k, ids_BL in enumerate(ids)], 1)
    return stack.look_up(ids_BS, torch.cat(list(weights), 1), lengths, names, training)


class _Rounds:
    """Bags that go on as far as they can, until all that are left wait for rows."""

    def __init__(self) -> None:
        self.waiting: list[_Waiting] = []

    def ask(self, wanted: Wanted, deliver: Callable[[Tensor], None]) -> None:
        """Has ``deliver`` called with what is wanted, now or in a later round."""
        bag, ids_BL, weights_BL = wanted
        if isinstance(bag, RowTable) and bag.home is not None:
            self.waiting.append(_Waiting(bag, ids_BL, weights_BL, deliver))
        elif isinstance(bag, ComposedBag):
            self._go_on(bag.compute(ids_BL, weights_BL), None, deliver)
        else:
            deliver(bag(ids_BL, weights_BL))

    def take(self) -> dict[tuple[RowStack, int, bool], list[_Waiting]]:
        """What waits, by what can be one lookup, and forgets it."""
        found: dict[tuple[RowStack, int, bool], list[_Waiting]] = {}
        for waiting in self.waiting:
            # Weights that want gradients have rows be the leaf of autograd, for all of a lookup.
            assert waiting.table.home is not None
            kind = (waiting.table.home.stack, len(waiting.ids_BL), waiting.weights_BL.requires_grad)
            found.setdefault(kind, []).append(waiting)
        self.waiting = []
        return found

    def _go_on(self, computation: Computation, found: list[Tensor] | None, deliver: Callable[[Tensor], None]) -> None:
        try:
            wanted = computation.send(found)  # type: ignore[arg-type]
        except StopIteration as end:
            deliver(end.value)
            return
        if not wanted:
            self._go_on(computation, [], deliver)
            return
        arrived: dict[int, Tensor] = {}

        def arrive(place: int, out_BD: Tensor) -> None:
            arrived[place] = out_BD
            if len(arrived) == len(wanted):
                self._go_on(computation, [arrived[k] for k in range(len(wanted))], deliver)

        for place, want in enumerate(wanted):
            self.ask(want, partial(arrive, place))


class _Waiting(NamedTuple):
    table: RowTable
    ids_BL: Tensor
    weights_BL: Tensor
    deliver: Callable[[Tensor], None]


class _Group(NamedTuple):
    stack: RowStack
    features: list[int]
    redirections: list[list[RedirectedBag]]
    names: list[str]
    bases: list[int]
