"""What a compiled step costs: the compiler's cycles where it counts them, and a model of what it does not count."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from dlrm_xla.collectives import KINDS, exchanges
from dlrm_xla.hlo import REGISTER_BYTES, Array, Executed, Module, Operation
from dlrm_xla.tpu import (
    SCATTER_WINDOW_BYTES,
    Chip,
    blocks_seconds,
    lookup_seconds,
    near_lookup_seconds,
    near_update_seconds,
    sort_seconds,
    storage_bytes,
    update_seconds,
)

# Below this an operation without a count is a number or a small vector, a few cycles.
_SMALL = 1024


class Cost(NamedTuple):
    """One operation of the schedule: seconds, by the compiler's count or (``modelled``) by the model here."""

    operation: Operation
    times: int
    seconds: float
    modelled: bool
    op_name: str

    @property
    def part(self) -> str:
        """The module of the model that it belongs to, from its name; "" where it has none."""
        scope, slash, _ = self.op_name.partition("/")
        return re.sub(r"\.\d+$", "", scope) if slash and not scope.startswith(("aten__", "xla_")) else ""


def costs(module: Module, chip: Chip) -> list[Cost]:
    """The cost of each operation of a step but for collectives, which are no work of one chip.

    Nor is a bitcast of parts that lie side by side any, which is a custom call; and of an argument's prefetches, for
    this run and for the next, one counts.
    """
    found = []
    for executed in module.schedule:
        operation, cycles = executed.operation, executed.operation.cycles
        if cycles is None and _exchanges(module, operation):
            continue
        if operation.target == "ConcatBitcast" or operation.name in module.unread_copies:
            continue
        seconds = (
            modelled_seconds(module, executed, chip) if cycles is None else executed.times * cycles / chip.clock_hz
        )
        found.append(Cost(operation, executed.times, seconds, cycles is None, executed.op_name))
    return found


def modelled_seconds(module: Module, executed: Executed, chip: Chip) -> float:
    """Time of an operation that the compiler gives no count.

    A gather or scatter of lines: `dlrm_xla.tpu.lookup_seconds` and `update_seconds` in HBM, `near_lookup_seconds` and
    `near_update_seconds` on the chip, or what moves beside them where that takes longer; of blocks, which have more
    than one dimension: `blocks_seconds`; a sort: `sort_seconds`.
    Any other: bytes in HBM over its bandwidth, or bytes on the chip at one vector register per cycle. Latency is not in
    it; neither is overlap.
    """
    operation = executed.operation
    kinds = module.inside(operation)
    operands, results = module.operands(operation), operation.results
    if part := next((p for kind in ("scatter", "gather") for p in module.parts(operation) if p.kind == kind), None):
        array, (rows, block) = _array(module, operation, part), _slices(module, part)
        if len(block) > 1:
            size = rows * storage_bytes(block)
            of_array = (1 + (part.kind == "scatter")) * size * (array.space == 0)
            others = [a for a in (*operands, *results) if a.dims != array.dims]
            hbm = of_array + sum(size for a in others if a.space == 0 and a.numbers == rows * math.prod(block))
            return executed.times * blocks_seconds(chip, rows, block, hbm)
        width = block[0] if block else 1
        moved = sum(a.bytes for a in (*operands, *results) if a.space == 0) / chip.hbm_bytes_per_second
        if part.kind == "gather":
            near = near_lookup_seconds(chip, rows, width)
            return executed.times * (max(near, moved) if array.space else lookup_seconds(chip, rows, width))
        whole = storage_bytes(array.dims) <= SCATTER_WINDOW_BYTES[chip.name]
        if array.space or whole:  # whose ids need no order
            return executed.times * max(near_update_seconds(chip, rows, width, is_sorted=not whole), moved)
        by_order = "indices_are_sorted=true" in part.line
        return executed.times * update_seconds(chip, rows, array.dims, is_sorted=by_order)
    if "sort" in kinds:
        return executed.times * sort_seconds(chip, max(a.numbers for a in results))
    if kinds & {"dynamic-update-slice", "dynamic-slice"}:
        # What is updated in place, or read in part, is not moved: the smaller arrays are.
        largest = max((*operands, *results), key=lambda a: a.numbers)
        operands = [a for a in operands if a.numbers < largest.numbers]
        results = tuple(a for a in results if a.numbers < largest.numbers)
    if operation.kind == "copy-start":  # results repeat the source
        results = results[:1]
    arrays = [*operands, *results]
    if operation.kind == "slice-start":  # a part moves: source, part, and what waits for it
        arrays = [results[1], results[1]._replace(space=operands[0].space)]
    hbm = sum(a.bytes for a in arrays if a.space == 0)
    chip_bytes = sum(a.bytes for a in arrays if a.space)
    return executed.times * max(hbm / chip.hbm_bytes_per_second, chip_bytes / REGISTER_BYTES / 2 / chip.clock_hz)


def _slices(module: Module, part: Operation) -> tuple[int, tuple[int, ...]]:
    """How many slices a gather or scatter reads or writes, and their dimensions longer than 1."""
    if part.kind == "gather":
        moved = part.results[0]
        found = re.search(r"slice_sizes=\{([\d,]*)\}", part.line)
        dims = [int(n) for n in found[1].split(",") if n] if found else []
    else:  # arrays, ids, and as many updates as arrays
        moved = module.operands(part)[len(part.operands) // 2 + 1]
        found = re.search(r"update_window_dims=\{([\d,]*)\}", part.line)
        dims = [moved.dims[int(n)] for n in found[1].split(",") if n] if found else []
    return moved.numbers // math.prod(dims), tuple(n for n in dims if n > 1)


def _array(module: Module, operation: Operation, part: Operation) -> Array:
    """What an operation reads rows of, or writes them to, for its gather or scatter ``part``; lookups may be larger."""
    if part.kind == "scatter":
        return max(operation.results, key=lambda a: a.numbers)
    read = module.operands(part)[:1] or module.operands(operation)
    # As it comes in, for only there it is said which memory it is in.
    outside = [a for a in module.operands(operation) if a.numbers == read[0].numbers]
    return max(outside or module.operands(operation), key=lambda a: a.space)


def _exchanges(module: Module, operation: Operation) -> bool:
    kind = operation.kind.removesuffix("-start").removesuffix("-done")
    return kind in KINDS or operation.target.startswith("AsyncCollective") or exchanges(module, operation.calls)


def is_small(operation: Operation) -> bool:
    """Whether it is too small to be worth a line."""
    return all(a.numbers <= _SMALL for a in operation.results)


class Table(NamedTuple):
    """An array of a model that may be large.

    ``sparse``: a step need only touch some of its lines. ``passed``: this one goes through all of them all the same,
    for it is so small that this is faster.
    """

    name: str
    dims: tuple[int, ...]
    sparse: bool
    passed: bool = False


def whole_table_copies(module: Module, tables: Sequence[Table]) -> list[tuple[Executed, Table]]:
    """Operations that write as many numbers as a table has, where the step need not.

    For tables of which a step touches some lines: whatever has such a result, or reads the table and has one a little
    larger, and does not write into a table in place. For others, whose gradient is as large, and for tables that a step
    goes through: what only moves numbers. Not `brought_on_chip`.
    """
    found = []
    for executed in module.schedule:
        operation = executed.operation
        kinds = module.inside(operation)
        largest = max((a.numbers for a in operation.results), default=0)
        moves, on_chip = module.only_moves(operation), _reaches_chip(module, operation)
        for table in tables:
            numbers = Array("f32", table.dims, 0).numbers
            if not table.sparse or table.passed:
                copies = moves and not on_chip and largest == numbers
            else:
                in_place = kinds & {"scatter", "dynamic-update-slice", "custom-call"}
                # Products of a plugin's cores are about as large as some small table, now and then.
                reads = any(a.numbers == numbers for a in module.operands(operation))
                as_large = largest == numbers or (reads and numbers < largest < 1.1 * numbers)
                copies = as_large and not in_place and not (moves and on_chip)
            if copies:
                found.append((executed, table))
                break
    return found


def brought_on_chip(module: Module, tables: Sequence[Table]) -> list[str]:
    """Tables that the compiler moves whole to memory on the chip, to read or write rows there.

    It does where they fit: fewer bytes than the lines of their rows, one by one.
    """
    moved = {
        a.dims
        for executed in module.schedule
        if module.only_moves(executed.operation) and _reaches_chip(module, executed.operation)
        for a in executed.operation.results
    }
    return [table.name for table in tables if table.sparse and table.dims in moved]


def _reaches_chip(module: Module, operation: Operation) -> bool:
    return any(a.space and a.numbers > _SMALL for a in (*module.operands(operation), *operation.results))
