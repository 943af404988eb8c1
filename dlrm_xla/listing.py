"""The list of plugins: options, and where each runs, what it composes with and how small it gets.

The latter is found by building the plugin on the ``meta`` device, so that it holds for a stranger's as for ours.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dlrm_xla.contract import FromTable, Plugin, Size, Table
from dlrm_xla.errors import UserError
from dlrm_xla.plan import bytes_kept, check_lookup
from dlrm_xla.registry import installed, load, options_of, package, type_name
from dlrm_xla.rows import RowTable
from dlrm_xla.shapes import shapes_alone
from dlrm_xla.sizing import first_that_builds

PROBE = Table("probe", 1_000_000, 16)


def describe() -> list[dict[str, str]]:
    """One row per installed plugin: name, package, summary (its docstring's first line), options, traits.

    A plugin that does not import, or whose options have no types, has a summary that says so, and the rest empty.
    """
    rows = []
    for name, entry in sorted(installed().items()):
        row = {"name": name, "package": package(entry), "options": "", "traits": ""}
        try:
            plugin = load(name)
        except UserError as error:
            rows.append(row | {"summary": f"BROKEN: {error}"})
            continue
        row["summary"] = (inspect.getdoc(plugin) or "").partition("\n")[0]
        try:
            options = options_of(plugin).values()
        except UserError as error:
            rows.append(row | {"summary": f"BROKEN: {error}"})
            continue
        row["options"] = ", ".join(map(_option, options))
        try:
            found = traits(plugin)
        except Exception as error:  # whatever a stranger's plugin raises: its line says so, the list goes on
            rows.append(row | {"traits": f"cannot be built for a table of {PROBE.num_rows:,} rows: {error}"})
            continue
        told = f"runs on {found.devices}; composes {found.composable}; at most {found.floor}"
        rows.append(row | {"traits": f"{told}; from trained tables: {'yes' if found.post_training else 'no'}"})
    return rows


def _option(parameter: inspect.Parameter) -> str:
    typed = f"{parameter.name}: {type_name(parameter.annotation)}"
    required = parameter.default is inspect.Parameter.empty
    return f"{typed}, required" if required else f"{typed} = {parameter.default!r}"


class Traits(NamedTuple):
    """``devices``, ``composable`` and ``floor`` in words, for one plugin; ``post_training``: it takes over tables."""

    devices: str
    composable: str
    floor: str
    post_training: bool


class _Stranger(nn.Module):
    """Stands for another plugin's bag: nothing is known of it but its output."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids_BL: torch.Tensor, weights_BL: torch.Tensor) -> torch.Tensor:
        return weights_BL.new_zeros(len(ids_BL), self.table.dim)


def traits(plugin: Plugin) -> Traits:
    """Devices, composition and floor of a plugin, at a table of 1,000,000 x 16."""
    return Traits(_devices(plugin), _composable(plugin), _floor(plugin), _post_training(plugin))


def _built(plugin: Plugin, options: Mapping[str, Any], inner: Any = RowTable) -> nn.Module:
    with shapes_alone():
        bag = plugin(PROBE, inner, **options)
    if not isinstance(bag, nn.Module):
        raise TypeError(f"it gives {type(bag).__name__}, no nn.Module")
    return bag


def _devices(plugin: Plugin) -> str:
    """A graph of fixed shapes runs on xla as well; without data, data-dependent shapes fail."""
    try:
        bag = _built(plugin, {}, _Stranger) if _composable(plugin) == "anywhere" else _built(plugin, {})
        ids_BL = torch.zeros(4, 2, dtype=torch.int32, device="meta")
        bag(ids_BL, torch.ones(4, 2, device="meta"))
    except (NotImplementedError, RuntimeError):
        return "cpu, cuda"
    check_lookup(bag, PROBE, getattr(plugin, "__name__", type(plugin).__name__))
    return "cpu, cuda, xla"


def _composable(plugin: Plugin) -> str:
    asked = []

    def inner(table: Table) -> nn.Module:
        asked.append(table)
        return _Stranger(table)

    try:
        _built(plugin, {}, inner)
    except ValueError:
        pass
    except AttributeError as error:
        if _Stranger.__name__ not in str(error):
            raise
    else:
        return "anywhere" if asked else "last, for it asks for no rows"
    return "last, for it needs rows" if asked else "no"


def _post_training(plugin: Plugin) -> bool:
    return isinstance(_built(plugin, {}), FromTable)


def _floor(plugin: Plugin) -> str:
    """The highest ratio of exact bytes to bytes kept, by the option that sizes the plugin."""
    size: Size | None = getattr(plugin, "size", None)
    values: Sequence[Any] = size.values(PROBE) if size else [None]

    def kept(index: int) -> float:
        try:
            return bytes_kept(_built(plugin, {size.option: values[index]} if size else {}))
        except ValueError:
            return math.inf

    least = first_that_builds(len(values), lambda index: kept(index) < math.inf)
    if least is None:
        return "unknown"
    ratio = PROBE.num_rows * PROBE.dim * 4 / kept(least)
    if ratio <= 1:
        return "what follows it"
    sized_by = f" by {size.option}" if size else ", not sized"
    return f"{ratio:,.3g}x{sized_by}" if ratio < 1000 else f"{ratio:,.0f}x{sized_by}"
