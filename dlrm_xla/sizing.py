"""Sizes from a budget: one cap in bytes for all tables, and for each the largest bag below it.

Water-filling: a table whose exact rows fit the cap stays exact, every other gets the largest candidate that does. A cap
is fairer than one ratio for all: at a thousandth of each, a table of 583 rows would have less than one, and
small tables are where few bytes carry much.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from dlrm_xla.contract import MakeBag, Size, Table
from dlrm_xla.errors import Refusal, UserError
from dlrm_xla.registry import Layer, compose, load


@dataclass(frozen=True)
class Budget:
    """``bytes`` for all tables together, what a table's bag costs of them, and how the user asked for it.

    ``whole`` are the bytes that a ratio is of, or 0 where the budget is no ratio; ``spent`` are those that tables with
    a plugin of their own take and that ``bytes`` has no more.
    """

    bytes: float
    cost: Callable[[nn.Module, Table], int]
    asked: str
    whole: int = 0
    spent: int = 0


def sized_layer(layers: Sequence[Layer]) -> tuple[int, Size] | None:
    """The layer that a budget sizes: the outermost that can be and whose size was not given."""
    for place, layer in enumerate(layers):
        size: Size | None = getattr(load(layer.name), "size", None)
        if size is not None and size.option not in layer.options:
            return place, size
    return None


def sizes_of(layers: Sequence[Layer], table: Table) -> Sequence[int]:
    """Values of the option that a budget sizes, from the smallest bag on; empty where it sizes none."""
    found = sized_layer(layers)
    return found[1].values(table, **layers[found[0]].options) if found else []


def first_that_builds(count: int, builds: Callable[[int], bool]) -> int | None:
    """The first of ``count`` sizes, from the smallest bag on, that is not refused, where all before it are.

    None where none is found. A plugin behind another may ask for more than the smallest: product codes of two numbers
    for a rank of two.
    """
    if not count:
        return None
    refused, found = -1, 0
    while not builds(found):
        if found == count - 1:
            return None
        refused, found = found, min(2 * found + 1, count - 1)
    while found - refused > 1:
        middle = (refused + found) // 2
        refused, found = (refused, middle) if builds(middle) else (middle, found)
    return found


def size_range(
    layers: Sequence[Layer], table: Table, build: Callable[[list[Layer]], nn.Module]
) -> tuple[list[Layer], list[Layer]] | None:
    """The layers with the first and the last size that is not refused; None where there are no sizes.

    Where all are, the first and last of these, so that building them says why.
    """
    found, values = sized_layer(layers), sizes_of(layers, table)
    if found is None or not len(values):
        return None

    def at(index: int) -> list[Layer]:
        return with_size(layers, *found, values[index])

    def builds(index: int) -> bool:
        try:
            build(at(index))
        except Refusal:
            return False
        return True

    first = first_that_builds(len(values), builds)
    behind = first_that_builds(len(values), lambda index: builds(len(values) - 1 - index))
    return at(first or 0), at(len(values) - 1 - (behind or 0))


def with_size(layers: Sequence[Layer], place: int, size: Size, value: object) -> list[Layer]:
    """The layers with a value of the option that sizes the one at ``place``."""
    options: Mapping[str, object] = {**layers[place].options, size.option: value}
    return [*layers[:place], replace(layers[place], options=options), *layers[place + 1 :]]


def fit(
    tables: Sequence[Table],
    layers: Sequence[Layer],
    budget: Budget,
    innermost: MakeBag,
    build: Callable[[MakeBag, Table, str], nn.Module],
) -> dict[str, tuple[list[Layer], str]]:
    """The layers of each table by name that together cost at most the budget; [] for exact, and why it is.

    A table that is refused at every size stays exact. Raises UserError with the reachable range where even the smallest
    candidates cost more.
    """
    candidates = [_Candidates(table, list(layers), budget.cost, innermost, build) for table in tables]
    least = sum(c.choose(0)[1] for c in candidates)
    if least > budget.bytes:
        raise UserError(_refusal(layers, budget, least, [c.table.name for c in candidates if c.is_refused]))

    def total(cap: float) -> int:
        return sum(c.choose(cap)[1] for c in candidates)

    low, high = 0.0, float(max(c.exact for c in candidates))
    if total(high) <= budget.bytes:
        low = high
    while high - low > max(1, low / 1000):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= budget.bytes else (low, middle)
    return {c.table.name: (c.choose(low)[0], c.why_exact(low)) for c in candidates}


def _refusal(layers: Sequence[Layer], budget: Budget, least: int, refused: Sequence[str]) -> str:
    spec = "+".join(map(str, layers))
    text = f"{budget.asked}: {spec} takes at least {least:,} bytes for these tables"
    if refused:
        text += f" (exact at every size, for it is refused: {', '.join(refused)})"
    unsized = f". {spec} has no size left to choose but by its options" if sized_layer(layers) is None else ""
    if budget.spent:
        text += f" beside {budget.spent:,} of those with a plugin of their own"
        least += budget.spent
    if not budget.whole:
        return f"{text}; --memory {math.ceil(least / 1000)}kB is the least that it can keep to{unsized}"
    reachable = math.floor(10 * budget.whole / least) / 10
    if reachable < 1:
        return f"{text}, more than exact tables; leave --ratio out, or give those tables less"
    return (
        f"{text}, so a ratio from 1 to {reachable:,.1f} is within its reach. Take --ratio {reachable:.1f}, or a "
        "plugin that keeps less per row" + unsized
    )


@dataclass
class _Candidates:
    """A table's possible bags and what they cost; each is built at most once."""

    table: Table
    layers: list[Layer]
    cost: Callable[[nn.Module, Table], int]
    innermost: MakeBag
    build: Callable[[MakeBag, Table, str], nn.Module]
    exact: int = 0
    _costs: dict[int, float] = field(default_factory=dict)
    _choices: dict[float, tuple[list[Layer], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exact = self.cost(self.build(self.innermost, self.table, "exact"), self.table)
        self._sized = sized_layer(self.layers)
        self._values = sizes_of(self.layers, self.table) if self._sized else range(1)

    @functools.cached_property
    def _least(self) -> int | None:
        return first_that_builds(len(self._values), lambda index: self._cost(index) < math.inf)

    @property
    def is_refused(self) -> bool:
        """Whether there are sizes and all are refused."""
        return len(self._values) > 0 and self._least is None

    def why_exact(self, cap: float) -> str:
        """Why the table stays exact; '' where it does not."""
        if self.choose(cap)[0]:
            return ""
        if self.exact <= cap:
            return "below the cap"
        return "refused at every size" if self.is_refused else "no size is smaller"

    def choose(self, cap: float) -> tuple[list[Layer], int]:
        """The largest bag of at most ``cap`` bytes, else the smallest there is; and its bytes."""
        if cap not in self._choices:
            self._choices[cap] = self._choose(cap)
        return self._choices[cap]

    def _choose(self, cap: float) -> tuple[list[Layer], int]:
        if self.exact <= cap or self._least is None:
            return [], self.exact
        # What was counted for other caps brackets the answer.
        low = max((i for i, c in self._costs.items() if c <= cap), default=self._least)
        high = min((i - 1 for i, c in self._costs.items() if c > cap and i > low), default=len(self._values) - 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._cost(middle) <= cap else (low, middle - 1)
        bytes_ = self._cost(low)
        return ([], self.exact) if bytes_ >= self.exact else (self._at(low), int(bytes_))

    def _cost(self, index: int) -> float:
        """Bytes at a size; infinite where that is refused, so that a smaller one is taken."""
        if index not in self._costs:
            layers = self._at(index)
            try:
                bag = self.build(compose(layers, self.innermost), self.table, "+".join(map(str, layers)))
            except Refusal:
                if self._sized is None:
                    raise
                self._costs[index] = math.inf
            else:
                self._costs[index] = self.cost(bag, self.table)
        return self._costs[index]

    def _at(self, index: int) -> list[Layer]:
        return with_size(self.layers, *self._sized, self._values[index]) if self._sized else self.layers
