"""The row store of a model: its exact tables' rows in stacks, their optimizer, and the watch over their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dlrm_xla.config import Config
from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.devices import Device, RowAccess
from dlrm_xla.errors import UserError
from dlrm_xla.row_optim import DTYPES, RowSettings, StackOptimizer
from dlrm_xla.rows import BagCollection, Placement, RowFiles, RowStack, RowTable

# Ids are int32, and a stack needs some past its end.
MAX_STACK_ROWS = 2**31 - 2**27


class RowStore:
    """Takes the rows of every exact table in a model, whatever plugins are around it, and updates them.

    Tables of one width, type and placement become one `RowStack` on the device. The model still runs as before;
    ``model.state_dict()`` no longer has the rows, ``tables()`` has them under the same names.
    """

    def __init__(
        self,
        model: nn.Module,
        device: Device,
        settings: RowSettings,
        learning_rate: float,
        place: Callable[[Table], Placement] = lambda table: "sparse",
        files: RowFiles | None = None,
    ) -> None:
        self.learning_rate = learning_rate
        # On the device: torch_xla makes equal numbers of a graph one input, so a count on the host that equals another
        # number of the step would be another graph.
        self._step = torch.zeros(1, dtype=torch.int32).to(device.torch_device)
        self.device = device
        members = [(name, module) for name, module in model.named_modules() if isinstance(module, RowTable)]
        groups = list(_grouped([module for _, module in members], place))
        self.stacks = [RowStack(tables, device, placement) for placement, tables in groups]
        of_module = {module: f"{name}.weight".removeprefix(".") for name, module in members}
        self._names = [[of_module[table] for table in tables] for _, tables in groups]
        for module in model.modules():
            if isinstance(module, BagCollection):
                module.group()
        self.optimizers = [
            StackOptimizer(stack, settings, files if stack.file_backed else None) for stack in self.stacks
        ]
        for module in (*self.stacks, *self.optimizers):
            device.place(module)
        # The step at which each table's gradient was first not finite, 0 while it is; made on the host, for zeros made
        # on xla would be one more graph.
        self._first_bad_T = torch.zeros(len(members), dtype=torch.int32).to(device.torch_device)
        self._watched: list[str] = []

    @torch.no_grad()
    def step(self) -> None:
        """Applies and forgets the gradients of all lookups since the last step."""
        self._step += 1
        self._watch()
        for stack, optimizer in zip(self.stacks, self.optimizers, strict=True):
            if stack.lookups:
                optimizer.step(stack, self.learning_rate, self._step)
                stack.lookups.clear()

    def _watch(self) -> None:
        sums: dict[str, Tensor] = {}
        for lookup in (lookup for stack in self.stacks for lookup in stack.lookups):
            for name, number in zip(lookup.names, lookup.gradient_sums().unbind(), strict=True):
                sums[name] = sums[name] + number if name in sums else number
        self._watched = list(sums)
        if not sums:
            return
        sums_T = torch.stack(list(sums.values()))
        bad_T = torch.nn.functional.pad(sums_T.isfinite().logical_not().int(), (0, len(self._first_bad_T) - len(sums)))
        self._first_bad_T.copy_(torch.where((bad_T > 0) & (self._first_bad_T == 0), self._step, self._first_bad_T))

    def check_gradients(self) -> None:
        """Raises a UserError if a table's gradient was not finite since the start; waits for the device."""
        for name, step in zip(self._watched, self._first_bad_T.tolist(), strict=False):
            if step:
                raise UserError(
                    f"the gradient of table {name} is not finite at step {step}. Lower --dense-lr or --row-lr, or "
                    "check the data; checkpoints saved before it are kept."
                )

    def tables(self) -> Iterator[tuple[str, Tensor]]:
        """Each table's rows on the host under the name that ``model.state_dict()`` had for them."""
        for stack, names in zip(self.stacks, self._names, strict=True):
            yield from zip(names, stack.tables_on_host(), strict=True)

    @property
    def names(self) -> list[str]:
        """The names of ``tables()``."""
        return list(itertools.chain.from_iterable(self._names))

    def state_dict(self) -> dict[str, Tensor]:
        """What the optimizer keeps beside the rows, and the number of its steps."""
        state = {"step": self._step}
        for number, optimizer in enumerate(self.optimizers):
            state |= {f"{number}.{name}": array for name, array in optimizer.state_dict().items()}
        return state

    @torch.no_grad()
    def load_tables(self, state: Mapping[str, Tensor]) -> None:
        """Sets the rows from tensors by name; all tables must be there."""
        for stack, names in zip(self.stacks, self._names, strict=True):
            flat = torch.zeros(stack.end, stack.dim, dtype=stack.rows.dtype)
            for name, table, base in zip(names, stack.tables, stack.bases, strict=True):
                flat[base : base + table.num_rows] = state[name]
            stack.rows.copy_(flat.view(stack.rows.shape))


def row_builder(config: Config, device: Device) -> tuple[MakeBag, RowFiles | None]:
    """The innermost builder that a configuration asks for, and its files."""
    files = None
    if config.row_files:
        if not device.rows.files:
            raise UserError(f"row_files: tables in files need --device cpu, not {device.name}")
        files = RowFiles(Path(config.row_files))
    return partial(RowTable, dtype=DTYPES[config.row_precision], files=files), files


def placement_rule(config: Config, access: RowAccess) -> Callable[[Table], Placement]:
    """Placement of a table by name, else by its rows; a table inside a plugin goes by its feature's name."""
    matmul_rows = access.matmul_rows if config.matmul_rows < 0 else config.matmul_rows
    dense_rows = access.dense_rows if config.dense_rows < 0 else config.dense_rows

    def place(table: Table) -> Placement:
        named = config.placement.get(table.name.partition(".")[0])
        if named is not None:
            return named  # type: ignore[return-value]
        if table.num_rows <= matmul_rows:
            return "matmul"
        return "dense" if table.num_rows <= dense_rows else "sparse"

    return place


def _grouped(
    members: Sequence[RowTable], place: Callable[[Table], Placement]
) -> Iterator[tuple[Placement, list[RowTable]]]:
    groups: dict[tuple[Placement, int, torch.dtype, object], list[RowTable]] = {}
    parts: dict[tuple[Placement, int, torch.dtype], tuple[int, int]] = {}
    for member in members:
        assert member.weight is not None, f"{member.table.name} is in a store already"
        kind = (place(member.table), member.table.dim, member.weight.dtype)
        if member.table.num_rows > MAX_STACK_ROWS:
            raise UserError(
                f"table {member.table.name} has {member.table.num_rows:,} rows, but {MAX_STACK_ROWS:,} are the most "
                "that can be trained with int32 ids. Take a --plugin that shortens it, or a larger --min-count."
            )
        if member.file_backed:  # a stack of its own, for it would have to be copied
            groups[(*kind, member)] = [member]
            continue
        part, rows = parts.get(kind, (0, 0))
        if rows + member.table.num_rows > MAX_STACK_ROWS:
            part, rows = part + 1, 0
        parts[kind] = part, rows + member.table.num_rows
        groups.setdefault((*kind, part), []).append(member)
    for (placement, *_), tables in groups.items():
        yield placement, tables
