"""The row store of a model: its exact tables' rows in stacks, their optimizer, and the watch over their gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dlrm_xla import fbgemm_rows
from dlrm_xla.bags import Arranged, BagCollection
from dlrm_xla.config import Config, RowKernels
from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.device import Device, RowAccess
from dlrm_xla.errors import UserError
from dlrm_xla.fbgemm_rows import FbgemmRows
from dlrm_xla.guards import FiniteWatch
from dlrm_xla.host import on_host
from dlrm_xla.host_rates import HasHostRate
from dlrm_xla.ranks import ALONE, Ranks
from dlrm_xla.row_files import RowFiles
from dlrm_xla.row_lines import Placement, lines_of, rows_of, write_rows
from dlrm_xla.row_optim import DTYPES, StackOptimizer
from dlrm_xla.row_rules import RowSettings
from dlrm_xla.rows import RowStack, RowTable
from dlrm_xla.tensor_file import Section, TensorFile, write

# A TPU's compiler streams arrays of fewer lines to an id: seen at 5 and not at 10 (docs/scale.md).
_STREAMED_LINES_PER_ID = 7
# Ids are int32, and a stack needs some past its end.
MAX_STACK_ROWS = 2**31 - 2**27


class RowStore(HasHostRate):
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
        kernels: RowKernels = "own",
        ranks: Ranks = ALONE,
        near_bytes: int = 0,
        step_ids: int = 0,
    ) -> None:
        self._learning_rate = _checked(learning_rate)
        self.stacks: list[RowStack] = []  # where tables are refused, what is left of it has none
        self.optimizers: list[StackOptimizer] = []
        self._ranks = ranks
        # On the device: torch_xla makes equal numbers of a graph one input, so a count on the host that equals another
        # number of the step would be another graph.
        self._step = torch.zeros(1, dtype=torch.int32).to(device.torch_device)
        self.device = device
        members = [(name, module) for name, module in model.named_modules() if isinstance(module, RowTable)]
        sparse = [m for _, m in members if place(m.table) == "sparse"]
        near = _near(sparse, near_bytes)
        if settings.only_adds and _streams(sparse, near, step_ids, device.rows):
            near = set()
        groups = list(_grouped([module for _, module in members], place, near))
        self.stacks = [RowStack(tables, device, placement, near) for placement, near, tables in groups]
        of_module = {module: f"{name}.weight".removeprefix(".") for name, module in members}
        self._names = [[of_module[table] for table in tables] for *_, tables in groups]
        for module in model.modules():
            if isinstance(module, BagCollection):
                module.group()
        for module in model.modules():
            if isinstance(module, Arranged):
                module.arrange()
        self.optimizers = [
            StackOptimizer(stack, settings, files if stack.file_backed else None) for stack in self.stacks
        ]
        for stack, optimizer in zip(self.stacks, self.optimizers, strict=True):
            for module in (stack, optimizer):
                (device.place_rows if stack.placement == "sparse" else device.place)(module)
        for stack, optimizer in zip(self.stacks, self.optimizers, strict=True):
            if use_fbgemm(kernels, stack, settings):
                stack.fbgemm = FbgemmRows(stack.rows, optimizer.states(), settings.name, settings.eps, learning_rate)
        if kernels == "fbgemm" and not any(stack.fbgemm is not None for stack in self.stacks):
            raise UserError(
                "row_kernels: fbgemm takes none of these tables: it is for sparse float32 rows, their width a multiple "
                "of 4, on --device cpu, with SGD, or row-wise Adagrad up to 4 GiB, in float32 and no weight decay. "
                "Leave it out; on several ranks TorchRec brings FBGEMM's kernels, on cuda too."
            )
        self._finite = FiniteWatch("table", len(members), device)

    @property
    def learning_rate(self) -> float:
        """The rate of the steps to come; set before a step's lookups, for FBGEMM's take it along."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self._learning_rate = _checked(rate)
        for stack in self.stacks:
            if stack.fbgemm is not None:
                stack.fbgemm.learning_rate = rate

    def runner(self, model: nn.Module) -> Callable[..., Tensor]:
        """The model as it is run."""
        return model

    def zero_grad(self) -> None:
        """Forgets all lookups since the last step, with their gradients."""
        for stack in self.stacks:
            stack.lookups.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Applies and forgets the gradients of all lookups since the last step.

        One without a gradient counts not, for a loss that failed leaves such; a UserError where none has one.
        """
        lookups = [lookup for stack in self.stacks for lookup in stack.lookups]
        if lookups and all(lookup.leaf.grad is None for lookup in lookups):
            raise UserError(
                "rows were looked up, but have no gradients: call backward() on the loss before step(), and let no bag "
                "be detached from it; zero_grad() forgets lookups"
            )
        for stack in self.stacks:
            stack.lookups[:] = [lookup for lookup in stack.lookups if lookup.leaf.grad is not None]
        self._step += 1
        names, numbers = list[str](), list[Tensor]()
        used = [(s, o) for s, o in zip(self.stacks, self.optimizers, strict=True) if s.lookups]
        for stack, optimizer in used:
            if stack.in_one_pass:
                names += [table.name for table in stack.tables]
                numbers.append(stack.bad_tables(optimizer.update(stack, self.learning_rate, self._step)))
            else:
                names += [name for lookup in stack.lookups for name in lookup.names]
                numbers += [lookup.gradient_sums() for lookup in stack.lookups]
        if names:
            self._watch(names, torch.cat(numbers))
        for stack, optimizer in used:
            if not stack.in_one_pass:
                optimizer.step(stack, self.learning_rate, self._step)
            stack.lookups.clear()

    def _watch(self, names: list[str], sums_N: Tensor) -> None:
        runs = [(name, len(list(run))) for name, run in itertools.groupby(names)]
        if (
            len(runs) < len(names) and len({count for _, count in runs}) == 1
        ):  # as of a table that each bag asks several times
            names, sums_N = [name for name, _ in runs], sums_N.view(len(runs), -1).sum(1)
        if len(set(names)) < len(names):
            added: dict[str, Tensor] = {}
            for name, number in zip(names, sums_N.unbind(), strict=True):
                added[name] = added[name] + number if name in added else number
            names, sums_N = list(added), torch.stack(list(added.values()))
        self._finite.note(names, sums_N, self._step)

    @property
    def steps_done(self) -> Tensor:
        """Steps since the start of training, int32 [1] on the device."""
        return self._step

    def check_gradients(self) -> None:
        """Raises a UserError if a table's gradient was not finite since the start; waits for the device."""
        self._finite.check()

    def tables(self) -> Iterator[tuple[str, Tensor]]:
        """Each table's rows on the host under the name that ``model.state_dict()`` had for them."""
        for stack, names in zip(self.stacks, self._names, strict=True):
            yield from zip(names, stack.tables_on_host(), strict=True)

    @property
    def names(self) -> list[str]:
        """The names of ``tables()``."""
        return list(itertools.chain.from_iterable(self._names))

    @property
    def num_parameters(self) -> int:
        """Numbers in all rows."""
        return sum(stack.num_rows * stack.dim for stack in self.stacks)

    def written(self) -> list[Tensor]:
        """What each step writes to."""
        return [*self.arrays(), self._step] if self.stacks else []

    def arrays(self) -> list[Tensor]:
        """Every array that the store keeps on the device: rows and the optimizer's state."""
        pairs = zip(self.stacks, self.optimizers, strict=True)
        return [array for stack, optimizer in pairs for array in (stack.rows, *optimizer.states())]

    def sections(self) -> Iterator[Section]:
        """Rows and the optimizer's state for a file, in parts, under names that stacking does not change."""
        yield Section([("row_optimizer.step", (1,))], torch.int32, [self._step.cpu()])
        for stack, optimizer, names in zip(self.stacks, self.optimizers, self._names, strict=True):
            yield self._section(stack, stack.rows, [f"model.{name}" for name in names])
            for number, array in enumerate(optimizer.states()):
                yield self._section(stack, array, [f"row_optimizer.{name}.state{number}" for name in names])

    def _section(self, stack: RowStack, array: Tensor, names: Sequence[str]) -> Section:
        shapes = [(t.num_rows,) if array.dim() == 1 else (t.num_rows, t.dim) for t in stack.tables]
        # Tables lie behind one another in the array; only what fills lines belongs to none.
        members = list(zip(names, shapes, strict=True))
        return Section(members, array.dtype, self._parts(array, stack.dim, sum(map(math.prod, shapes))))

    def _parts(self, array: Tensor, dim: int, left: int) -> Iterator[Tensor]:
        for part in self.device.host_parts(array):
            numbers = (part if part.dim() == 1 else rows_of(part, dim)).flatten()
            yield numbers[:left]
            left -= numbers.numel()

    def write(self, path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Writes tables, the rows' optimizer and ``tensors`` as one file; tables go part by part."""
        others = [Section([(name, t.shape)], t.dtype, [t.detach().to("cpu")]) for name, t in tensors.items()]
        sections = [*self.sections(), *others]
        if self._ranks.first:
            write(path, sections, about)
        else:  # its chips' parts are asked for by the first one
            for _ in itertools.chain.from_iterable(section.parts for section in sections):
                pass
        self._ranks.wait()

    def load_from(self, file: TensorFile, optimizer: bool) -> None:
        """Sets the rows, and where asked the optimizer's state, from a checkpoint."""
        self.load_tables(lambda name: file.tensor(f"model.{name}"))
        if optimizer:
            self.load_optimizer(file.tensor)

    def load_tables(self, read: Callable[[str], Tensor]) -> None:
        """Sets the rows; ``read(name)`` gives each table's, under the names of ``tables()``."""
        for stack, names in zip(self.stacks, self._names, strict=True):
            self._load(stack, stack.rows, names, read)

    def load_optimizer(self, read: Callable[[str], Tensor]) -> None:
        """Sets the optimizer's state and its number of steps from what ``sections`` wrote."""
        for stack, optimizer, names in zip(self.stacks, self.optimizers, self._names, strict=True):
            for number, array in enumerate(optimizer.states()):
                self._load(stack, array, [f"row_optimizer.{name}.state{number}" for name in names], read)
        self.device.write(self._step, read("row_optimizer.step"))

    @torch.no_grad()
    def _load(self, stack: RowStack, array: Tensor, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        # Not read from the device, which may have no room for it whole.
        host = array if on_host(array) else torch.zeros(array.shape, dtype=array.dtype)
        width = 1 if array.dim() == 1 else stack.dim
        lines = host.view(-1, 1) if array.dim() == 1 else host
        for name, table, base in zip(names, stack.tables, stack.bases, strict=True):
            found = read(name)
            if found.numel() != table.num_rows * width:
                raise UserError(
                    f"table {table.name} has {table.num_rows:,} rows of {stack.dim} here, but {name} of the checkpoint "
                    f"is {list(found.shape)}. Use the configuration and the data that it was written with."
                )
            write_rows(lines, base, found.reshape(-1, width))
        if host is not array:
            self.device.write(array, host)


def _checked(rate: float) -> float:
    if not rate >= 0:
        raise UserError(f"a learning rate of rows is {rate}, but must be 0 or a number above it")
    return rate


def row_builder(config: Config, device: Device) -> tuple[MakeBag, RowFiles | None]:
    """The innermost builder that a configuration asks for, and its files."""
    files = None
    if config.row_files:
        if not device.rows.files:
            raise UserError(f"row_files: tables in files need --device cpu, not {device.name}")
        files = RowFiles(Path(config.row_files))
    return partial(RowTable, dtype=DTYPES[config.row_precision], files=files), files


def placement_rule(config: Config, access: RowAccess) -> Callable[[Table], Placement]:
    """Placement of a table by name, else by its rows; a table inside a plugin goes by its feature's name too."""
    matmul_rows = access.matmul_rows if config.matmul_rows < 0 else config.matmul_rows
    dense_rows = access.dense_rows if config.dense_rows < 0 else config.dense_rows

    def place(table: Table) -> Placement:
        named = table.setting(config.placement)
        if named:
            return named  # type: ignore[return-value]
        if table.num_rows <= matmul_rows:
            return "matmul"
        return "dense" if table.num_rows <= dense_rows else "sparse"

    return place


def use_fbgemm(kernels: RowKernels, stack: RowStack, settings: RowSettings) -> bool:
    """Whether a stack's rows go through FBGEMM; a UserError where it was asked for and is not installed."""
    if kernels == "own":
        return False
    if not fbgemm_rows.installed():
        raise UserError("row_kernels: fbgemm is not installed. pip install -e '.[distributed]', or leave it out")
    plain = stack.placement == "sparse" and not stack.file_backed and settings.state == "fp32"
    return plain and FbgemmRows.takes(stack.rows, settings.name, settings.weight_decay)


def _grouped(
    members: Sequence[RowTable], place: Callable[[Table], Placement], near: Set[RowTable]
) -> Iterator[tuple[Placement, bool, list[RowTable]]]:
    groups: dict[tuple[Placement, int, torch.dtype, bool, object], list[RowTable]] = {}
    parts: dict[tuple[Placement, int, torch.dtype, bool], tuple[int, int]] = {}
    for member in members:
        if member.weight is None:
            raise UserError(f"table {member.table.name} is in a row store already: one takes all tables of a model")
        kind = (place(member.table), member.table.dim, member.weight.dtype, member in near)
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
    for (placement, _, _, is_near, _), tables in groups.items():
        yield placement, is_near, tables


def _near(members: Sequence[RowTable], most_bytes: int) -> set[RowTable]:
    """The smallest tables, as many as have so many bytes together."""
    found, total = set(), 0
    sizes = {m: m.weight.numel() * m.weight.element_size() for m in members if m.weight is not None}
    for member, size in sorted(sizes.items(), key=lambda item: item[1]):
        total += size
        if total > most_bytes:
            break
        found.add(member)
    return found


def _streams(members: Sequence[RowTable], near: Set[RowTable], step_ids: int, access: RowAccess) -> bool:
    """Whether a step looks up so many ids that a TPU goes through large arrays in order, small tables among them.

    From some point on its compiler sorts the ids of a scatter and streams the array. A small array apart then costs
    what the stream would have taken along, and over several chips it is not even kept near (docs/scale.md).
    """
    lines = sum(lines_of(m.table.num_rows, m.table.dim, access, "sparse")[0] for m in members) // access.num_chips
    return len(near) < len(members) and step_ids * _STREAMED_LINES_PER_ID > lines
