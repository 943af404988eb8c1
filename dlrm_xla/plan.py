"""Which bag each table gets, and what it costs to keep and to train, before anything is allocated."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from typing import Any

import torch
from torch import nn

from dlrm_xla.config import Config
from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.device import RowAccess
from dlrm_xla.errors import Refusal, UserError, choices
from dlrm_xla.registry import Layer, compose, parse
from dlrm_xla.row_lines import Placement, lines_of
from dlrm_xla.row_optim import DTYPES
from dlrm_xla.row_rules import RULES
from dlrm_xla.rows import RowTable
from dlrm_xla.shapes import shapes_alone
from dlrm_xla.sizing import Budget, fit, size_range, sized_layer
from dlrm_xla.tpu import row_bytes, storage_bytes

_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


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


@dataclass(frozen=True)
class TrainingBytes:
    """What training one table's bag takes of a device.

    ``padded`` are the parameters as the device lays them out; ``optimizer`` what the optimizers keep beside them,
    padded too; ``gradient`` the gradients of a step, of the rows looked up in a batch where rows are sparse.
    ``placement`` is that of the exact tables inside, "dense" for a plugin's own parameters, several joined by +.
    ``in_files`` of it are rows and states that are files on disk.
    """

    placement: str
    padded: int
    optimizer: int
    gradient: int
    in_files: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.padded + self.optimizer + self.gradient

    @property
    def in_memory(self) -> int:
        """What of it is not in files."""
        return self.total - self.in_files


def bytes_kept(module: nn.Module) -> int:
    """Bytes that must be kept to serve: every parameter and every buffer of the state dict.

    A bag that stores less than it trains, as quantized rows do, says so (`dlrm_xla.contract.Stored`).
    """
    stored = getattr(module, "bytes_to_serve", None)
    if stored is not None:
        given = stored()
        if not isinstance(given, Integral) or isinstance(given, bool) or given < 1:
            raise UserError(
                f"bytes_to_serve() of {type(module).__name__} gives {given!r}, but must give a whole number of bytes, "
                "1 or more. Leave its plugin out, or ask its authors."
            )
        return int(given)
    own: dict[str, torch.Tensor] = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    return sum(t.numel() * t.element_size() for t in own.values()) + sum(bytes_kept(m) for m in module.children())


def plan(
    tables: Sequence[Table],
    plugin: str,
    single: Mapping[str, str],
    min_rows: int,
    innermost: MakeBag = RowTable,
    budget: Budget | None = None,
) -> tuple[list[TablePlan], list[MakeBag]]:
    """Chooses a bag for each table; ``single`` holds the plugins of single tables by name.

    Tables of fewer than ``min_rows`` rows stay exact unless ``single`` names them, and so does a table that its
    plugin would not make smaller. With a ``budget`` it alone decides how large each bag is and which tables stay
    exact. Candidates are built on the ``meta`` device and counted, so a plan of tables that fit nowhere costs nothing.
    """
    unknown = set(single) - {table.name for table in tables}
    if unknown:
        name = min(unknown)
        raise UserError(f"the configuration names a table {name!r}; {choices(name, (t.name for t in tables))}")
    for table in tables:
        if table.name in single:
            check_composition(parse(single[table.name]), table, innermost)
    if budget and len(single) == len(tables):
        raise UserError(
            f"{budget.asked} has nothing to size, for the setting tables names a plugin for each table; leave one of "
            "the two out"
        )
    replaced = [t for t in tables if t.name not in single and (budget or t.num_rows >= min_rows)]
    if replaced:
        layers, largest = parse(plugin), max(replaced, key=lambda t: t.num_rows)
        if budget:
            layers = smallest_layers(layers, largest, innermost)
        check_composition(layers, largest, innermost)
    plans, bags = [], []
    sizes: dict[str, tuple[list[Layer], str]] = {}
    checked: set[tuple[str, int, int]] = set()
    if budget:
        given = [t for t in tables if t.name in single]
        spent = sum(
            budget.cost(on_meta(compose(parse(single[t.name]), innermost), t, single[t.name]), t) for t in given
        )
        left = replace(budget, bytes=budget.bytes - spent, spent=spent)
        sizes = fit([t for t in tables if t.name not in single], parse(plugin), left, innermost, on_meta)
    for table in tables:
        spec = single.get(table.name, plugin)
        layers, note = sizes.get(table.name, (parse(spec), ""))
        exact = bytes_kept(on_meta(innermost, table))
        is_given = table.name in sizes or table.name in single
        if layers and not is_given and table.num_rows < min_rows:
            layers, note = [], f"below {min_rows} rows"
        elif layers and table.name not in sizes:
            kept = bytes_kept(on_meta(compose(layers, innermost), table, spec))
            if kept >= exact:
                layers, note = [], f"{spec} would keep {kept:,} bytes, no less than exact"
        make = compose(layers, innermost)
        name = "+".join(map(str, layers)) or "exact"
        kept = exact
        if layers:
            bag = on_meta(make, table, name)
            kept = bytes_kept(bag)
            if (key := (name, table.num_rows, table.dim)) not in checked:
                check_lookup(bag, table, name)
                checked.add(key)
        plans.append(TablePlan(table.name, table.num_rows, table.dim, name, kept, table.num_rows * table.dim * 4, note))
        bags.append(make)
    return plans, bags


def smallest_layers(layers: list[Layer], table: Table, innermost: MakeBag) -> list[Layer]:
    """The layers with the smallest size of the one that a budget sizes, of those that are not refused.

    A UserError where all are, or where the largest keeps fewer bytes.
    """

    def build(layers: list[Layer]) -> nn.Module:
        return on_meta(compose(layers, innermost), table, "+".join(map(str, layers)))

    found, ends = sized_layer(layers), size_range(layers, table, build)
    if found is None or ends is None:
        return layers
    first, last = (bytes_kept(build(end)) for end in ends)
    if first > last:
        place, size = found
        raise UserError(
            f"plugin {layers[place].name!r} lists the values of {size.option!r} in the wrong order: for table "
            f"{table.name} ({table.num_rows} x {table.dim}) its bag keeps {first:,} bytes at "
            f"{ends[0][place].options[size.option]}, of the first ones, and {last:,} at "
            f"{ends[1][place].options[size.option]}, of the last. Have its authors turn them round (dlrm_xla.contract."
            "sized), or set the option yourself."
        )
    return ends[0]


def check_composition(layers: list[Layer], table: Table, innermost: MakeBag) -> None:
    """Raises a UserError where a plugin asks for no table, so that what is written behind it would do nothing.

    ``table`` should be the largest, for a plugin may need nothing behind it in small ones.
    """
    for place, layer in enumerate(layers[:-1], 1):
        behind = compose(layers[place:], innermost)
        asked: list[Table] = []

        def inner(asked_for: Table, behind: MakeBag = behind, asked: list[Table] = asked) -> nn.Module:
            asked.append(asked_for)
            return behind(asked_for)

        inner.innermost = innermost  # type: ignore[attr-defined]
        on_meta(compose([layer], inner), table, "+".join(map(str, layers)))
        if not asked:
            rest = "+".join(map(str, layers[place:]))
            raise UserError(
                f"plugin {'+'.join(map(str, layers))!r} cannot work: {layer} asks for no table behind it, not even for "
                f"{table.name} ({table.num_rows:,} x {table.dim}), so {rest} would do nothing. Leave {rest} out, or "
                f"write {layer} last."
            )


def on_meta(make: MakeBag, table: Table, spec: str = "exact") -> nn.Module:
    """The bag on the ``meta`` device, where it takes no memory."""
    try:
        with shapes_alone():
            bag = make(table)
    except UserError:
        raise
    except ValueError as error:
        raise Refusal(
            f"plugin {spec!r} refuses table {table.name} ({table.num_rows} x {table.dim}): {error}"
        ) from error
    except Exception as error:  # whatever a stranger's plugin makes of its options
        raise UserError(
            f"plugin {spec!r} fails on table {table.name} ({table.num_rows} x {table.dim}): "
            f"{type(error).__name__}: {error}. Check its options, or ask its authors."
        ) from error
    if not isinstance(bag, nn.Module):
        raise UserError(
            f"plugin {spec!r} gives no bag for table {table.name} ({table.num_rows} x {table.dim}): expected an "
            f"nn.Module, came {type(bag).__name__}. Have its authors return one."
        )
    return bag


def check_lookup(bag: nn.Module, table: Table, spec: str) -> None:
    """Raises a UserError where a bag on ``meta`` fails in a lookup, or gives something else than [B, D] in float32.

    Nothing is known of a bag that does not run on shapes alone.
    """
    of = f"plugin {spec!r} for table {table.name} ({table.num_rows} x {table.dim})"
    shape = (3, 2)
    try:
        with torch.no_grad(), torch.device("meta"):
            out = bag(torch.zeros(shape, dtype=torch.int32), torch.ones(shape))
    except Exception as error:  # whatever a stranger's bag raises
        if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
            return
        raise UserError(
            f"{of}: its bag {type(bag).__name__} fails in a lookup of B = 3 bags of 2 ids: {type(error).__name__}: "
            f"{error}. Check the plugin's options, or ask its authors."
        ) from error
    if isinstance(out, torch.Tensor) and out.shape == (shape[0], table.dim) and out.dtype == torch.float32:
        return
    came = type(out).__name__
    if isinstance(out, torch.Tensor):
        came = f"{list(out.shape)} {str(out.dtype).removeprefix('torch.')}"
    raise UserError(
        f"{of}: a lookup of its bag {type(bag).__name__} must give [B, {table.dim}] float32; of B = 3 bags came "
        f"{came}. Leave the plugin out, or ask its authors."
    )


def training_bytes(
    bag: nn.Module,
    bag_length: int,
    config: Config,
    access: RowAccess,
    place: Callable[[Table], Placement],
) -> TrainingBytes:
    """Counts what a bag takes in training on a device with this access to rows; the bag may be on ``meta``.

    Of several chips it is what one takes: its part of large tables, and all gradients of a batch, for it updates that
    part from all of them.
    """
    placements: list[str] = []
    padded = optimizer = gradient = in_files = 0
    inside: set[int] = set()
    rule, state = RULES[config.row_optimizer], DTYPES[config.row_state]
    for member, looked_up in lookups(bag, bag_length):
        assert member.weight is not None
        before = padded + optimizer
        inside.add(id(member.weight))
        table, placement = member.table, place(member.table)
        placements.append(placement)
        lines, width = lines_of(table.num_rows, table.dim, access, placement)
        chips = access.num_chips if placement == "sparse" else 1
        shape = (lines // chips, width)
        padded += held_bytes(shape, member.weight.dtype, access)
        for kind in rule.states:
            of_rows = (-(-table.num_rows // chips),)
            optimizer += held_bytes(of_rows if kind == "row" else shape, state, access)
        if member.file_backed:
            in_files += padded + optimizer - before
        if placement == "sparse":
            gradient += config.batch_size * looked_up * (row_bytes(table.dim) if access.lanes else 4 * table.dim)
        else:
            gradient += held_bytes(shape, torch.float32, access)
    copies = {"sgd": 0, "adagrad": 1, "adam": 2}[config.dense_optimizer]
    for tensor in {id(t): t for t in (*bag.parameters(), *bag.buffers())}.values():
        if id(tensor) in inside:
            continue
        size = held_bytes(tensor.shape, tensor.dtype, access)
        padded += size
        if isinstance(tensor, nn.Parameter):
            placements.append("dense")
            optimizer += copies * size
            gradient += size
    return TrainingBytes("+".join(dict.fromkeys(placements)), padded, optimizer, gradient, in_files)


def lookups(bag: nn.Module, bag_length: int) -> list[tuple[RowTable, int]]:
    """The exact tables inside a bag, and how many ids of each it looks up for one sample, found by running it.

    A bag that does not run on shapes alone counts as one that looks up each of a sample's ids once in every table.
    """
    counts = {member: 0 for member in bag.modules() if isinstance(member, RowTable)}
    if not counts:
        return []

    def count(member: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        counts[member] += given[0].numel()  # type: ignore[index]

    hooks = [member.register_forward_pre_hook(count) for member in counts]
    try:
        with torch.no_grad(), torch.device("meta"):
            bag(torch.zeros(1, bag_length, dtype=torch.int32), torch.ones(1, bag_length))
    except Exception:  # whatever a stranger's bag makes of ids without values
        return [(member, bag_length) for member in counts]
    finally:
        for hook in hooks:
            hook.remove()
    return list(counts.items())


def held_bytes(shape: Sequence[int], dtype: torch.dtype, access: RowAccess) -> int:
    """Bytes of an array on a device: on a TPU as its compiler lays it out."""
    return storage_bytes(shape, dtype) if access.lanes else math.prod(shape) * dtype.itemsize


def text(plans: Sequence[TablePlan], training: Sequence[TrainingBytes] | None = None, memory: float = 0) -> str:
    """The plan as a table for people, with totals, and whether they fit ``memory`` bytes."""
    width = max(9, *(len(p.name) for p in plans)) + 1
    head = f"{'table':<{width}}{'rows':>12}{'dim':>5}{'bytes':>16}{'exact bytes':>16}{'ratio':>9}"
    if training:
        head += f"{'padded':>17}{'optimizer':>17}{'gradient':>15}  {'placement':<10}"
    lines = [head + "  plugin"]
    shown: list[TrainingBytes | None] = list(training) if training else [None] * len(plans)
    total = TablePlan(
        "total",
        sum(p.rows for p in plans),
        0,
        "",
        sum(p.bytes for p in plans),
        sum(p.exact_bytes for p in plans),
    )
    sums = None
    if training:
        sums = TrainingBytes("", *(sum(getattr(t, f.name) for t in training) for f in fields(TrainingBytes)[1:]))
    for p, t in zip([*plans, total], [*shown, sums], strict=True):
        note = f"  ({p.note})" if p.note else ""
        line = f"{p.name:<{width}}{p.rows:>12,}{p.dim or '':>5}{p.bytes:>16,}{p.exact_bytes:>16,}"
        line += f" {p.exact_bytes / max(1, p.bytes):>7,.1f}x"
        if t:
            line += f"{t.padded:>17,}{t.optimizer:>17,}{t.gradient:>15,}  {t.placement:<10}"
        lines.append(f"{line}  {p.plugin}{note}")
    if sums:
        need = sums.in_memory
        verdict = "fits" if need <= memory else "DOES NOT FIT"
        lines.append(
            f"tables, optimizer and gradients take {in_words(need)}: {verdict} in {in_words(memory)} "
            + (f"beside {in_words(sums.in_files)} in files " if sums.in_files else "")
            + "(MLPs and activations not counted)"
        )
    return "\n".join(lines)


def read_bytes(given: str) -> float:
    """Bytes from what a person writes: 16GB, 96 MB, 16e9."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMGT]?)B?\s*", given, re.IGNORECASE)
    if found is None:
        raise UserError(f"memory cannot be {given!r}; write it like 16GB, 500MB or 16e9")
    return float(found[1]) * float(1000 ** " KMGT".index(found[2].upper() or " "))


def in_words(bytes_: float) -> str:
    """Bytes in the unit that suits them: 16.00 GB, 856.00 kB."""
    unit, size = next(((unit, size) for unit, size in _UNITS.items() if bytes_ >= size), ("B", 1.0))
    return f"{bytes_:,.0f} B" if unit == "B" else f"{bytes_ / size:,.2f} {unit}"


def check_memory(training: Sequence[TrainingBytes], memory: float) -> None:
    """Raises a UserError where tables, their optimizer and their gradients exceed the memory."""
    need = sum(t.in_memory for t in training)
    if need > memory:
        if sum(t.gradient for t in training) > need / 2:
            raise UserError(
                f"training the tables needs {in_words(need)}, most of it for what one batch looks up, but there are "
                f"{in_words(memory)}. Take a smaller --batch-size."
            )
        raise UserError(
            f"training the tables needs {in_words(need)}, but there are {in_words(memory)}. Take a --plugin that "
            "keeps less (--plan shows what each table takes), a larger --min-count or a smaller --dim; on the cpu, "
            "row_files in a --config file keeps large tables on disk."
        )
