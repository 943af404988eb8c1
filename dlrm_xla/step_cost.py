"""What a compiled step costs: the compiler's cycles where it counts them, and a model of what it does not count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from dlrm_xla.collectives import KINDS, exchanges
from dlrm_xla.hlo import Array, Executed, Module, Operation
from dlrm_xla.tpu import Chip, lookup_seconds, update_seconds

# A vector register of 8 x 128 numbers of 32 bits is read and one is written per cycle.
REGISTER_BYTES = 8 * 128 * 4
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
    """The cost of each operation of a step but for collectives, which are no work of one chip."""
    found = []
    for executed in module.schedule:
        operation, cycles = executed.operation, executed.operation.cycles
        if cycles is None and _exchanges(module, operation):
            continue
        seconds = (
            modelled_seconds(module, executed, chip) if cycles is None else executed.times * cycles / chip.clock_hz
        )
        found.append(Cost(operation, executed.times, seconds, cycles is None, executed.op_name))
    return found


def modelled_seconds(module: Module, executed: Executed, chip: Chip) -> float:
    """Time of an operation that the compiler gives no count.

    A gather or scatter of lines in HBM: `dlrm_xla.tpu.lookup_seconds`, `update_seconds`; on the chip, a line per cycle.
    Any other: bytes in HBM over its bandwidth, or bytes on the chip at one vector register per cycle. Latency is not in
    it; neither is overlap.
    """
    operation = executed.operation
    kinds = module.inside(operation)
    operands, results = module.operands(operation), operation.results
    if "scatter" in kinds or "gather" in kinds:
        rows = max((a.numbers for a in operands if a.dtype in ("s32", "u32")), default=0)
        large = max((*operands, *results), key=lambda a: a.numbers)
        lines = rows * -(-(large.dims[-1] if large.dims else 1) // 128)
        if large.space:
            return executed.times * lines / chip.clock_hz
        width = large.dims[-1] if large.dims else 1
        if "scatter" not in kinds:
            return executed.times * lookup_seconds(chip, rows, width)
        is_sorted = "indices_are_sorted=true" in module.text_inside(operation)
        return executed.times * update_seconds(chip, rows, large.dims, is_sorted=is_sorted)
    if kinds & {"dynamic-update-slice", "dynamic-slice"}:
        # What is updated in place, or read in part, is not moved: the smaller arrays are.
        largest = max((*operands, *results), key=lambda a: a.numbers)
        operands = [a for a in operands if a.numbers < largest.numbers]
        results = tuple(a for a in results if a.numbers < largest.numbers)
    if operation.kind == "copy-start":  # results repeat the source
        results = results[:1]
    arrays = [*operands, *results]
    hbm = sum(a.bytes for a in arrays if a.space == 0)
    chip_bytes = sum(a.bytes for a in arrays if a.space)
    return executed.times * max(hbm / chip.hbm_bytes_per_second, chip_bytes / REGISTER_BYTES / 2 / chip.clock_hz)


def _exchanges(module: Module, operation: Operation) -> bool:
    kind = operation.kind.removesuffix("-start").removesuffix("-done")
    return kind in KINDS or operation.target.startswith("AsyncCollective") or exchanges(module, operation.calls)


def is_small(operation: Operation) -> bool:
    """Whether it is too small to be worth a line."""
    return all(a.numbers <= _SMALL for a in operation.results)


class Table(NamedTuple):
    """An array of a model that may be large. ``sparse``: a step only touches some of its lines."""

    name: str
    dims: tuple[int, ...]
    sparse: bool


def whole_table_copies(module: Module, tables: Sequence[Table]) -> list[tuple[Executed, Table]]:
    """Operations that write as many numbers as a table has, where the step need not.

    For tables of which a step touches some lines: whatever has such a result and does not write into a table in place.
    For others, whose gradient is as large: what only moves numbers.
    """
    found = []
    for executed in module.schedule:
        operation = executed.operation
        kinds = module.inside(operation)
        largest = max((a.numbers for a in operation.results), default=0)
        for table in tables:
            numbers = Array("f32", table.dims, 0).numbers
            if not _as_large(largest, numbers):
                continue
            in_place = kinds & {"scatter", "dynamic-update-slice", "custom-call"}
            if (table.sparse and not in_place) or (module.only_moves(operation) and _within_hbm(module, operation)):
                found.append((executed, table))
                break
    return found


def _as_large(numbers: int, table: int) -> bool:
    return table <= numbers < 1.1 * table


def _within_hbm(module: Module, operation: Operation) -> bool:
    # A small table brought to memory on the chip, and written back from there, is work that must be done.
    arrays = [*module.operands(operation), operation.results[0]]
    return all(a.space == 0 for a in arrays if a.numbers == operation.results[0].numbers)
