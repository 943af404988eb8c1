"""What a compiled step sends between chips."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from dlrm_xla.hlo import Module

KINDS = frozenset(
    ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
)


class Collective(NamedTuple):
    """One exchange: its kind, the bytes of its whole array on one chip, its operation's line and place in the model."""

    kind: str
    bytes: int
    line: str
    op_name: str


def collectives(module: Module) -> list[Collective]:
    """Each collective once, the largest first.

    The compiler spreads one over several operations, all with its channel, and writes a reduce-scatter as an all-reduce
    in a computation of that name.
    """
    found: dict[str, Collective] = {}
    for name, operations in module.computations.items():
        for operation in operations:
            kind = operation.kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", operation.line)
            arrays = (*module.operands(operation), *operation.results)
            # Of a start the result repeats the operand; and an all-reduce of several arrays sends all of them.
            whole = sum(a.bytes for a in operation.results) if kind == "all-reduce" else max(a.bytes for a in arrays)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            key = channel[1] if channel else operation.name
            before = found.get(key)
            op_name = operation.op_name or (before.op_name if before else "")
            if before is None or whole > before.bytes or not before.op_name:
                found[key] = Collective(kind, max(whole, before.bytes if before else 0), operation.line[:160], op_name)
    return sorted(found.values(), key=lambda one: -one.bytes)


def exchanges(module: Module, calls: Sequence[str]) -> bool:
    """Whether any of these computations, or what they call, has a collective."""
    return any(
        operation.kind.removesuffix("-start") in KINDS or exchanges(module, operation.calls)
        for name in calls
        for operation in module.computations.get(name, ())
    )
