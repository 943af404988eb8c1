"""Which bag each table gets, and what it costs to keep, before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.errors import UserError, choices
from dlrm_xla.registry import compose, parse
from dlrm_xla.rows import RowTable


@dataclass(frozen=True)
class TablePlan:
    """One table's bag: its plugin ("exact" for none), the bytes it keeps, and why it is not what was asked for."""

    name: str
    rows: int
    dim: int
    plugin: str
    bytes: int
    exact_bytes: int
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The plan as a row of ``report.json``."""
        return asdict(self)


def bytes_kept(module: nn.Module) -> int:
    """Bytes that must be kept to serve: every parameter and every buffer of the state dict."""
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def plan(
    tables: Sequence[Table], plugin: str, single: Mapping[str, str], min_rows: int
) -> tuple[list[TablePlan], list[MakeBag]]:
    """Chooses a bag for each table; ``single`` holds the plugins of single tables by name.

    Tables of fewer than ``min_rows`` rows stay exact unless ``single`` names them, and so does a table that its
    plugin would not make smaller. Candidates are built on the ``meta`` device and counted, so a plan of tables that
    fit nowhere costs nothing.
    """
    unknown = set(single) - {table.name for table in tables}
    if unknown:
        name = min(unknown)
        raise UserError(f"the configuration names a table {name!r}; {choices(name, (t.name for t in tables))}")
    plans, bags = [], []
    for table in tables:
        spec = single.get(table.name, plugin)
        layers = parse(spec)
        exact = table.num_rows * table.dim * 4
        note = ""
        if layers and table.name not in single and table.num_rows < min_rows:
            layers, note = [], f"below {min_rows} rows"
        elif layers:
            kept = bytes_kept(_on_meta(compose(layers, RowTable), table, spec))
            if kept >= exact:
                layers, note = [], f"{spec} would keep {kept:,} bytes, no less than exact"
        make = compose(layers, RowTable)
        kept = bytes_kept(_on_meta(make, table, spec)) if layers else exact
        name = "+".join(map(str, layers)) or "exact"
        plans.append(TablePlan(table.name, table.num_rows, table.dim, name, kept, exact, note))
        bags.append(make)
    return plans, bags


def _on_meta(make: MakeBag, table: Table, spec: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return make(table)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"plugin {spec!r} refuses table {table.name} ({table.num_rows} x {table.dim}): {error}"
        ) from error


def text(plans: Sequence[TablePlan]) -> str:
    """The plan as a table for people, with totals."""
    lines = [f"{'table':<10}{'rows':>12}{'dim':>5}{'bytes':>16}{'exact bytes':>16}{'ratio':>8}  plugin"]
    total = TablePlan(
        "total",
        sum(p.rows for p in plans),
        0,
        "",
        sum(p.bytes for p in plans),
        sum(p.exact_bytes for p in plans),
    )
    for p in [*plans, total]:
        note = f"  ({p.note})" if p.note else ""
        lines.append(
            f"{p.name:<10}{p.rows:>12,}{p.dim or '':>5}{p.bytes:>16,}{p.exact_bytes:>16,}"
            f"{p.exact_bytes / p.bytes:>7.1f}x  {p.plugin}{note}"
        )
    return "\n".join(lines)


def check_memory(plans: Sequence[TablePlan], row_optimizer: str) -> None:
    """Raises a UserError where tables and their optimizer state exceed the memory of this machine."""
    state = sum(p.rows * 4 for p in plans) if row_optimizer == "adagrad" else 0
    need = sum(p.bytes for p in plans) + state
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > 0.9 * have:
        raise UserError(
            f"the tables need {need / 1e9:.1f} GB, but this machine has {have / 1e9:.1f} GB. Take a --plugin that "
            "keeps less (--plan shows what each table keeps), a larger --min-count or a smaller --dim."
        )
