"""What a plugin gets and what it must give back. Third parties build on this file.

Shape suffixes used in the whole project:

    B  samples in a batch          I  dense (integer) features       D  width of an embedding row
    L  slots of one feature's bag  S  slots of all bags together     N  flat list of looked-up ids
    R  rows of a table             F  categorical features           U  segments of equal ids
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Concatenate, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from dlrm_xla.trained_rows import TrainedRows


MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """One categorical feature's embedding table: ``num_rows`` rows of ``dim`` numbers.

    Ids run from 0 to ``num_rows - 1``. Id 0 means missing or unseen in training; 1, 2, ... are ordered by
    falling frequency in the training part, so the k hottest rows are ``ids <= k``.

    ``std`` is the standard deviation that looked-up rows must have at the start. ``None`` is the reference's
    uniform(-1/sqrt(num_rows), 1/sqrt(num_rows)), hence 1/sqrt(3 num_rows). A plugin that asks ``inner`` for a
    shorter or narrower table passes the ``std`` that makes its *own* output start like the exact table, and a ``name``
    with a suffix, ``C3.quotient``; of several tables names should differ, for messages and settings go by them.
    """

    name: str
    num_rows: int
    dim: int
    std: float | None = None

    def __post_init__(self) -> None:
        for what, number in (("num_rows", self.num_rows), ("dim", self.dim)):
            if not isinstance(number, Integral):
                raise ValueError(f"table {self.name}: {what} is {number!r}, but must be a whole number")
        if self.num_rows < 1 or self.dim < 1:
            raise ValueError(f"table {self.name}: {self.num_rows} rows x {self.dim} is not a table; both must be >= 1")
        if self.num_rows > MAX_ROWS:
            raise ValueError(f"table {self.name}: {self.num_rows} rows do not fit the int32 ids of the contract")

    @property
    def start_std(self) -> float:
        """Standard deviation of a row's numbers at the start."""
        return 1 / math.sqrt(3 * self.num_rows) if self.std is None else self.std

    def setting(self, by_name: Mapping[str, str]) -> str | None:
        """What is set for the table: by its name, or the longest name of a table that it is a part of, ``C3.quotient``.

        A column's own name may have dots.
        """
        name = self.name
        while name not in by_name and "." in name:
            name = name.rpartition(".")[0]
        return by_name.get(name)


class Batch(NamedTuple):
    """Samples with fixed shapes: the last batch of an epoch is padded, never shorter.

    ``dense_BI`` float32 [B, I]; ``ids[f]`` int32 [B, L_f]; ``weights[f]`` float32 [B, L_f], 0 in a padded slot;
    ``labels_B`` float32 [B], 0 or 1, and -1 in a padded sample, which counts for nothing.
    """

    dense_BI: Tensor
    ids: list[Tensor]
    weights: list[Tensor]
    labels_B: Tensor


MakeBag = Callable[[Table], nn.Module]
"""Builds the module for a table. The module maps (ids_BL int32, weights_BL) to out_BD, the weighted sum of rows."""

Plugin = Callable[Concatenate[Table, MakeBag, ...], nn.Module]
"""``def plugin(table, inner, *, option=default) -> nn.Module``; keyword-only arguments are its options."""


def innermost(inner: MakeBag) -> MakeBag:
    """The builder of exact tables at the end of what is composed behind a plugin, for rows to be exact anyhow."""
    found: MakeBag = getattr(inner, "innermost", inner)
    return found


class Wanted(NamedTuple):
    """What a bag wants of one that it is around: bag(ids_BL, weights_BL), [B, D]."""

    bag: nn.Module
    ids_BL: Tensor
    weights_BL: Tensor


Computation = Generator[list[Wanted], list[Tensor], Tensor]
"""Yields lists of what it wants, gets what was found each time, and returns out_BD."""


class ComposedBag(nn.Module):
    """A bag around others that says what it wants of them, so that a model looks up what all its bags want at once.

    A plugin's bag may as well call the bags that it is around in a ``forward`` of its own: the same numbers, but a
    lookup for each.
    """

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        """What ``forward`` would compute, with a yield where that would call bags.

            def compute(self, ids_BL, weights_BL):
                narrow_BD, hot_BD = yield [Wanted(self.narrow, ids_BL, weights_BL), Wanted(self.hot, ...)]
                return narrow_BD @ self.matrix + hot_BD

        What does not depend on rows belongs into one list, for each list is a lookup of its own. There must be a yield,
        though it may be of an empty list.
        """
        raise NotImplementedError

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        """The same by itself."""
        computation = self.compute(ids_BL, weights_BL)
        if not isinstance(computation, Generator):
            raise TypeError(f"compute() of {type(self).__name__} has no yield: it gives {type(computation).__name__}")
        found: list[Tensor] | None = None
        while True:
            try:
                wanted = computation.send(found)  # type: ignore[arg-type]
            except StopIteration as end:
                out_BD: Tensor = end.value
                return out_BD
            if not isinstance(wanted, list) or not all(isinstance(want, Wanted) for want in wanted):
                raise TypeError(
                    f"compute() of {type(self).__name__} yields {type(wanted).__name__}, but must yield lists of Wanted"
                )
            found = [want.bag(want.ids_BL, want.weights_BL) for want in wanted]


class RedirectedBag(ComposedBag):
    """A bag that is another one, ``bag``, at other ids and weights."""

    bag: nn.Module

    def redirect(self, ids_BL: Tensor, weights_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights for ``bag``; as many or more a sample, the same number for each."""
        raise NotImplementedError

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        (out_BD,) = yield [Wanted(self.bag, *self.redirect(ids_BL, weights_BL))]
        return out_BD


@runtime_checkable
class Refreshed(Protocol):
    """A bag that rearranges its table in training, on the host: after each validation that another step follows.

    The same from the same state, so that a run that goes on does not differ; shapes, types and Parameters stay, and all
    is finite. The bag is in evaluation mode. Rows of exact tables inside are out of reach: a lookup is refused, for on
    xla it would be a graph, and on several ranks an exchange. On xla new values go into ``tensor.data``: a copy into
    the old tensor would be one more graph.
    """

    def refresh(self) -> None:
        """Rearranges the table."""


@runtime_checkable
class FromTable(Protocol):
    """A bag that can take over a trained table: what ``launch/compress.py`` asks of a plugin's bag.

    A bag around another asks that one in turn, so that compositions work.
    """

    def set_table(self, rows: TrainedRows) -> None:
        """Sets parameters and buffers so that lookups come as near to the given rows as this bag can.

        The rows may be larger than memory, so they are read in blocks. Their weights say which errors matter.
        """


@runtime_checkable
class Stored(Protocol):
    """A bag that is stored in fewer bytes than it is trained in, as quantized rows are."""

    def bytes_to_serve(self) -> int:
        """Bytes of what ``served`` gives."""

    def served(self) -> nn.Module:
        """A bag that gives what this one does, only looked up: made of what is stored, and nothing else."""


@dataclass(frozen=True)
class Size:
    """The option that sizes a plugin, and its values for a table from the smallest bag to the largest.

    ``values(table, **options)``: whatever options of the plugin are set.
    """

    option: str
    values: Callable[..., Sequence[int]]


_P = TypeVar("_P", bound=Callable[..., nn.Module])


def sized(option: str, values: Callable[..., Sequence[int]]) -> Callable[[_P], _P]:
    """Marks a plugin as one that ``--ratio`` and ``--memory`` can size by an option.

        @sized("rank", lambda table: range(1, table.dim))
        def low_rank(table, inner, *, rank=4): ...

    Where values depend on other options, these are parameters too: ``lambda table, parts: ...``. A value further on
    must not keep fewer bytes. What the plugin refuses (a ValueError) is passed over at either end, as where a plugin
    behind it asks for more.
    """

    def mark(plugin: _P) -> _P:
        known = inspect.signature(plugin).parameters
        asked = list(inspect.signature(values).parameters)[1:]
        for name in asked:
            if name not in known:
                raise TypeError(f"the values of {option!r} depend on {name!r}, which is no option of {plugin.__name__}")
        defaults = {name: known[name].default for name in asked}

        def of_table(table: Table, **options: object) -> Sequence[int]:
            return values(table, **{name: options.get(name, default) for name, default in defaults.items()})

        plugin.size = Size(option, of_table)  # type: ignore[attr-defined]
        return plugin

    return mark
