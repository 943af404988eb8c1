"""Reads the scheduled HLO text that XLA's TPU compiler gives back."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# A count that the compiler did not make, as 2^64 - 1 where an operation moved to a SparseCore.
_NO_COUNT = 2**62
# Results of these are other names of their operands, or take no part in the schedule.
_NAMES_ONLY = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id", "iota"}
# In these the work is in another operation: their start, or the computations that they call.
_ELSEWHERE = {"copy-done", "async-done", "async-update", "slice-done", "while", "conditional", "call"}
_MOVES = {
    *("copy", "copy-start", "slice-start", "transpose", "reshape", "bitcast", "convert"),
    *("parameter", "tuple", "get-tuple-element"),
}
# A vector register of 8 x 128 numbers of 32 bits.
REGISTER_BYTES = 8 * 128 * 4
_INTEGER = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}


class Array(NamedTuple):
    """One array of a shape: type, dimensions and memory space (0: HBM, 1: VMEM, others: scalar memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without padding."""
        bits = re.sub(r"\D", "", self.dtype.partition("e")[0])
        return int(self.numbers * _BYTES.get(self.dtype, int(bits or 0) / 8))


class Operation(NamedTuple):
    """One line of a computation. ``cycles`` is what the compiler estimates for one run, None where it does not."""

    name: str
    kind: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    cycles: int | None
    trips: int
    op_name: str
    parameter: int | None
    target: str
    line: str


@dataclass(frozen=True)
class Executed:
    """An operation of the schedule and how often it runs: in the body of a loop, as often as that turns.

    ``op_name`` is its own, or that of the loop around it.
    """

    operation: Operation
    times: int
    op_name: str


@dataclass(frozen=True)
class Module:
    """The computations of a module by name."""

    computations: dict[str, list[Operation]]
    entry: str
    aliased: frozenset[int]

    @cached_property
    def schedule(self) -> list[Executed]:
        """Every operation that is run by itself, loops followed; what is inside a fusion belongs to the fusion.

        Of a conditional the branch that does most.
        """
        return list(self._walk(self.entry, 1, ""))

    def _walk(self, name: str, times: int, around: str) -> Iterator[Executed]:
        for operation in self.computations[name]:
            op_name = operation.op_name or around
            if operation.kind in ("while", "conditional", "call", "async-start"):
                called = [list(self._walk(name, times * self.trips(operation), op_name)) for name in operation.calls]
                if operation.kind == "conditional":
                    called = [max(called, key=_work)]
                yield from itertools.chain(*called)
            if operation.kind not in _NAMES_ONLY | _ELSEWHERE:
                yield Executed(operation, times, op_name)

    def trips(self, operation: Operation) -> int:
        """How often a loop turns: as noted, or as its condition compares a count from 0 with a constant; else 1."""
        if operation.kind != "while" or operation.trips > 1:
            return operation.trips
        for called in operation.calls:
            constants = [int(found[1]) for o in self.computations[called] if (found := _INTEGER.search(o.line))]
            compares = [o for o in self.computations[called] if "direction=LT" in o.line]
            if len(constants) == len(compares) == 1:
                return constants[0]
        return 1

    def inside(self, operation: Operation) -> set[str]:
        """Kinds of operations in what an operation calls, or its own."""
        return {part.kind for part in self.parts(operation)} - {"fusion"}

    def parts(self, operation: Operation) -> Iterator[Operation]:
        """An operation and what it calls."""
        yield operation
        for name in operation.calls:
            for part in self.computations.get(name, ()):
                yield from self.parts(part)

    def operands(self, operation: Operation) -> list[Array]:
        """The arrays that an operation reads."""
        return [array for name in operation.operands for array in self._results.get(name, ())]

    @cached_property
    def _results(self) -> dict[str, tuple[Array, ...]]:
        return {o.name: o.results for operations in self.computations.values() for o in operations}

    @cached_property
    def unread_copies(self) -> frozenset[str]:
        """Copies that no operation of this run reads, by the names of their copy-starts.

        Such a one prefetches an argument for the next run, as this run's (``cross_program_prefetch_index``) was.
        """
        operations = [o for operations in self.computations.values() for o in operations]
        read = {name for o in operations for name in o.operands}
        unread = (o for o in operations if o.kind == "copy-done" and o.name not in read)
        return frozenset(name for o in unread if not o.line.startswith("ROOT ") for name in o.operands)

    def arguments(self) -> dict[int, Array]:
        """Arguments of the program by number."""
        return {o.parameter: o.results[0] for o in self.computations[self.entry] if o.parameter is not None}

    def only_moves(self, operation: Operation) -> bool:
        """Whether it changes no number, only where numbers lie."""
        return self.inside(operation) <= _MOVES


def read(text: str) -> Module:
    """Parses a module's text; a ValueError where it is none."""
    computations: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (operation := _operation(line)):
            current.append(operation)
    if not entry:
        raise ValueError("no HLO module: it has no ENTRY computation")
    aliases = re.search(r"input_output_alias=\{(.*?)\}(?:, [a-z_]+=|$)", text.partition("\n")[0])
    aliased = frozenset(int(n) for n in re.findall(r"\((\d+), \{", aliases[1])) if aliases else frozenset()
    return Module(computations, entry, aliased)


def _operation(line: str) -> Operation | None:
    found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    rest = re.sub(r"/\*.*?\*/", "", found[2])
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    kind, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    inside, attributes = rest[:end], rest[end + 1 :]
    cycles = re.search(r'"estimated_cycles":"(\d+)"', attributes)
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
    op_name = re.search(r'op_name="([^"]*)"', attributes)
    target = re.search(r'custom_call_target="([^"]*)"', attributes)
    calls = re.findall(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)", attributes)
    for branches in re.findall(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}", attributes):
        calls += re.findall(r"%([\w.\-]+)", branches)
    counted = int(cycles[1]) if cycles and int(cycles[1]) < _NO_COUNT else None
    return Operation(
        found[1],
        kind,
        tuple(_arrays(shape)),
        tuple(re.findall(r"%([\w.\-]+)", inside)),
        tuple(calls),
        counted,
        int(trips[1]) if trips else 1,
        op_name[1] if op_name else "",
        int(inside) if kind == "parameter" else None,
        target[1] if target else "",
        line.strip(),
    )


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        space = re.search(r"S\((\d+)\)", layout)
        yield Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0)


def _closing(text: str) -> int:
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis in {text[:80]}")


def sum_cycles(operations: Sequence[Executed]) -> int:
    """Known cycles of operations, each as often as it runs."""
    return sum(e.operation.cycles * e.times for e in operations if e.operation.cycles is not None)


def _work(operations: Sequence[Executed]) -> float:
    """Tells branches apart: known cycles, and for operations without, a vector register of results a cycle."""
    uncounted = sum(e.times * a.bytes for e in operations if e.operation.cycles is None for a in e.operation.results)
    return sum_cycles(operations) + uncounted / REGISTER_BYTES
