"""Bags from trained tables: what they are asked, and how near they come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dlrm_xla.contract import FromTable, MakeBag, Table
from dlrm_xla.contract import innermost as innermost_of
from dlrm_xla.errors import UserError
from dlrm_xla.registry import Layer, compose
from dlrm_xla.trained_rows import TrainedRows


def set_table(bag: nn.Module, rows: TrainedRows) -> None:
    """Has a bag take over trained rows; a UserError where it cannot."""
    name = type(bag).__name__
    taker = _takes_rows(bag, name)
    try:
        taker.set_table(rows)
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever a stranger's bag raises
        raise UserError(
            f"set_table() of {name} fails on {rows.num_rows:,} rows of {rows.dim}: {type(error).__name__}: {error}. "
            "Take other options or another plugin, or ask its authors."
        ) from error


def compose_checked(layers: Sequence[Layer], innermost: MakeBag) -> MakeBag:
    """`dlrm_xla.registry.compose` with a UserError that names the layer whose bag cannot take over trained rows."""
    make = innermost
    for layer in reversed(layers):
        make = _checked(layer, compose([layer], make))
    return make


def _checked(layer: Layer, make: MakeBag) -> MakeBag:
    def checked(table: Table) -> nn.Module:
        bag = make(table)
        _takes_rows(bag, str(layer))
        return bag

    checked.innermost = innermost_of(make)  # type: ignore[attr-defined]
    return checked


def _takes_rows(bag: nn.Module, name: str) -> FromTable:
    if isinstance(bag, FromTable):
        return bag
    raise UserError(
        f"{name} cannot be made from a trained table: its bag has no set_table. launch/run.py --list-plugins says "
        "which ones have."
    )


def check_rows(name: str, rows: TrainedRows) -> None:
    """Raises a UserError where a number is not finite, before hours of work."""
    for start, block in rows.blocks():
        bad = (~block.isfinite()).any(1)
        if bad.any():
            row = start + int(bad.nonzero()[0])
            raise UserError(
                f"table {name}: row {row:,} is not finite, one of {int(bad.sum()):,} in its block. The run that "
                "trained it went wrong: take one of its earlier checkpoints."
            )


@dataclass(frozen=True)
class TableError:
    """||W - W'||_F / ||W||_F over all rows alike, and with rows weighted by their lookups."""

    rows: float
    lookups: float


@torch.no_grad()
def table_error(bag: nn.Module, rows: TrainedRows, lookups: torch.Tensor | None) -> TableError:
    """How far a bag's lookups are from the rows; ``lookups`` [R] are the weights of the second figure."""
    sums = torch.zeros(4, dtype=torch.float64)
    bag.eval()
    for start, block in rows.blocks():
        ids_BL = torch.arange(start, start + len(block), dtype=torch.int32).unsqueeze(1)
        off = (bag(ids_BL, torch.ones(len(block), 1)) - block).double().square().sum(1)
        whole = block.double().square().sum(1)
        weight = torch.ones(len(block)) if lookups is None else lookups[start : start + len(block)]
        sums += torch.stack([off.sum(), whole.sum(), (off * weight).sum(), (whole * weight).sum()])
    off, whole, off_weighted, whole_weighted = sums.tolist()
    return TableError(_ratio(off, whole), _ratio(off_weighted, whole_weighted))


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0
