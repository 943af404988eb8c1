"""What a run's tables become and take, planned from its settings, its data and its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dlrm_xla_data.prepared import PreparedDataset
from torch import nn

from dlrm_xla import plan, registry
from dlrm_xla.config import Config
from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.device import Device, RowAccess
from dlrm_xla.errors import UserError, choices
from dlrm_xla.ranks import ALONE, Ranks
from dlrm_xla.row_files import RowFiles
from dlrm_xla.row_store import placement_rule, row_builder
from dlrm_xla.sizing import Budget, sized_layer
from dlrm_xla.torchrec_rows import LateRows


def make_tables(config: Config, dataset: PreparedDataset | None) -> list[Table]:
    """The tables of a dataset, or without one those of the preset's nominal sizes."""
    if dataset is None:
        return [Table(f"C{k}", rows, config.dim) for k, rows in enumerate(config.synthetic_tables, 1)]
    rows = [dataset.num_rows(f, config.min_count) for f in range(len(dataset.names))]
    return [Table(name, r, config.dim) for name, r in zip(dataset.names, rows, strict=True)]


class Plan(NamedTuple):
    """A run's tables, what replaces each, and what that takes.

    ``lengths`` are ids a sample looks up in each; ``whole`` is the bytes of all as exact tables over every id seen, of
    synthetic data over all rows of nominal size; ``whole_of`` says which.
    """

    tables: list[Table]
    lengths: list[int]
    bags: list[plan.TablePlan]
    make_bags: list[MakeBag]
    training: list[plan.TrainingBytes]
    files: RowFiles | None
    memory: float
    whole: int
    whole_of: str

    def ratio(self) -> str:
        """What all tables keep, and the ratio that is asked for and reported."""
        kept = sum(p.bytes for p in self.bags)
        return f"{kept:,} bytes to serve, 1/{self.whole / kept:,.1f} of {self.whole_of}"

    def check_memory(self) -> None:
        """Raises a UserError where training them does not fit."""
        plan.check_memory(self.training, self.memory)


def make_plan(
    config: Config, device: Device, access: RowAccess, dataset: PreparedDataset | None, ranks: Ranks = ALONE
) -> Plan:
    """Plans the tables of a dataset, or without one those of nominal size, for a device's way to lay rows out."""
    tables = make_tables(config, dataset)
    lengths = list(dataset.bag_lengths if dataset else config.synthetic_bags) or [1] * len(tables)
    innermost, files = row_builder(config, device) if ranks.part[1] == 1 else (LateRows, None)
    place = placement_rule(config, access)

    def trained(bag: nn.Module, table: Table) -> int:
        # Files too: a budget that they are free of would replace no table.
        return plan.training_bytes(bag, lengths[positions[table.name]], config, access, place).total

    positions = {table.name: k for k, table in enumerate(tables)}
    whole = sum(dataset.num_rows(f, 0) for f in range(len(tables))) if dataset else sum(t.num_rows for t in tables)
    whole *= config.dim * 4
    budget = make_budget(config, trained, whole)
    plans, make_bags = plan.plan(tables, config.plugin, config.tables, config.min_rows, innermost, budget)
    for setting, named in (("placement", config.placement), ("sharding", config.sharding)):
        if unknown := set(named) - set(positions):
            name = min(unknown)
            raise UserError(f"{setting} names a table {name!r}; {choices(name, positions)}")
    training = [
        plan.training_bytes(plan.on_meta(make, table), length, config, access, place)
        for make, table, length in zip(make_bags, tables, lengths, strict=True)
    ]
    memory = plan.read_bytes(config.memory) if config.memory else device.memory
    # Synthetic data has as many ids as were asked for, drawn or not.
    whole_of = f"exact tables {'over all ids seen in training' if dataset and config.data else 'of nominal size'}"
    return Plan(tables, lengths, plans, make_bags, training, files, memory, whole, whole_of)


def make_budget(config: Config, trained: Callable[[nn.Module, Table], int], exact_bytes: int) -> Budget | None:
    """What sizes the plugin: a ratio of the exact tables' bytes, or a memory for tables and their training."""
    layers = registry.parse(config.plugin)
    if config.ratio:
        if not layers:
            raise UserError("--ratio sizes a plugin, and exact tables have no size; name one with --plugin")
        kept = exact_bytes / config.ratio
        return Budget(kept, lambda bag, table: plan.bytes_kept(bag), f"--ratio {config.ratio:g}", exact_bytes)
    if config.memory and sized_layer(layers):
        return Budget(plan.read_bytes(config.memory), trained, f"--memory {config.memory}")
    return None
