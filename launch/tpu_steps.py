"""What `launch/compile_tpu.py` compiles: the steps of `launch/run.py`, traced on shapes, and their report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dlrm_xla_data.bags import bucket_lengths
from dlrm_xla_data.prepared import PreparedDataset
from run_data import open_data
from run_plan import make_plan
from torch import Tensor, nn

from dlrm_xla import hlo, step_cost
from dlrm_xla.batches import PackedBatch
from dlrm_xla.collectives import collectives
from dlrm_xla.config import Config
from dlrm_xla.devices import open_device
from dlrm_xla.model import DLRM
from dlrm_xla.plan import in_words
from dlrm_xla.row_optim import StackOptimizer
from dlrm_xla.row_store import RowStore
from dlrm_xla.rows import RowStack
from dlrm_xla.serving import model_settings
from dlrm_xla.shapes import shapes_alone
from dlrm_xla.step_cost import Cost, Table
from dlrm_xla.steps import Steps
from dlrm_xla.tpu import Chip, Slice, Touched, lower_bound, storage_bytes
from dlrm_xla.tpu_compile import Compiled, compile_for

# Criteo's and the synthetic rows', where there is no data.
NUM_DENSE = 13
DEAREST = 10


@dataclass(frozen=True)
class Traced:
    """One step of a model: its program, rows touched and large arrays on one chip, and what each argument is.

    ``sparse`` are the titles of the stacks of sparse placement, which arguments' names begin with. ``slots`` is the
    ids of a sample, padding among them; ``empty_bytes`` what lines of rows and states have beside them, on one chip.
    """

    name: str
    artifact: bytes
    text: str
    arguments: list[Any]
    donated: list[int]
    touched: list[Touched]
    tables: list[Table]
    sparse: tuple[str, ...] = ()
    devices: int = 1
    slots: int = 0
    empty_bytes: int = 0

    def bytes_of(self, *kinds: str) -> int:
        """Bytes that arguments of these kinds take on one chip."""
        return sum(storage_bytes(self.on_one(a), a.dtype) for a in self.arguments if kind_of(a.name) in kinds)

    def on_one(self, argument: Any) -> tuple[int, ...]:
        """The shape of an argument's part on one chip."""
        return _part(argument, self.devices)


def kind_of(name: str) -> str:
    """parameters, optimizer, batch or other: what an argument of this name is."""
    if name == "batch":
        return "batch"
    if (name.startswith("rows") and " optimizer" in name) or name.startswith("dense optimizer"):
        return "optimizer"
    return "other" if name in ("constant", "other state") else "parameters"


def check_plan(config: Config) -> None:
    """Raises a UserError where no tables can be planned for a configuration."""
    device = open_device("xla")
    make_plan(config, device, device.planned, _dataset(config))


def _dataset(config: Config) -> PreparedDataset | None:
    return open_data(config)[0] if config.data else None


def trace_steps(config: Config) -> tuple[list[Traced], dict[str, Any]]:
    """The train and the forward step of a configuration, on shapes alone, and what replaced its tables.

    Where bags vary in length these are steps of the longest; train steps of each shorter bucket follow.
    """
    opened = open_device("xla")  # first, for it keeps torch_xla quiet about the CPU
    from dlrm_xla import xla_trace

    device = xla_trace.on_shapes(opened)
    num_chips = device.rows.num_chips
    mesh = device.rows.chips if isinstance(device.rows.chips, xla_trace.PlaceholderMesh) else None
    dataset = _dataset(config)
    plan = make_plan(config, device, device.rows, dataset)
    lengths = plan.lengths
    num_dense, _, variable = dataset.shape if dataset else (NUM_DENSE, lengths, config.synthetic_variable)
    with shapes_alone():
        model = DLRM(
            num_dense,
            plan.tables,
            plan.make_bags,
            **model_settings(config),
        )
    steps = Steps(model, lengths, device, config)
    assert isinstance(steps.rows, RowStore)
    stacks, optimizers = steps.rows.stacks, steps.rows.optimizers
    looked_up = [_counted(stack) for stack in stacks]
    modules: dict[str, nn.Module] = {name or "model": module for name, module in steps.model.named_modules()}
    titles = [f"rows{number} of {_tables_of(stack)}" for number, stack in enumerate(stacks)]
    for title, stack, optimizer in zip(titles, stacks, optimizers, strict=True):
        modules[title], modules[f"{title} optimizer"] = stack, optimizer
    state = {
        f"dense optimizer.{key}.{number}": value
        for number, values in enumerate(steps.dense.state.values())
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    *shorter, longest = bucket_lengths(lengths) if variable else [tuple(lengths)]

    def batch(bags: tuple[int, ...]) -> PackedBatch:
        size = config.batch_size
        shapes = (((size, num_dense), torch.float32), ((size, sum(bags)), torch.int32), ((size,), torch.float32))
        dense_BI, ids_BS, labels_B = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
        varying = bags if variable else None
        return steps.arranged(PackedBatch(dense_BI, ids_BS, labels_B, None, varying)).sent(device.send)

    sparse = tuple(title for title, stack in zip(titles, stacks, strict=True) if stack.placement == "sparse")
    traced = []
    train: tuple[str, Callable[..., Any], float | None]
    train, forward = ("train", steps._train_step, 1.0), ("forward", steps._evaluation_step, None)
    for (name, step, rate), bags in [(train, longest), (forward, longest), *((train, bags) for bags in shorter)]:
        for counts in looked_up:
            counts.clear()
        found = xla_trace.trace(step, name, [batch(bags)], modules, state, rate, mesh)
        touched = [
            _touched(stack, optimizer, -(-sum(counts) // num_chips), num_chips)
            for stack, optimizer, counts in zip(stacks, optimizers, looked_up, strict=True)
            if stack.placement == "sparse"  # others are read and written whole
        ]
        passed = {
            f"{title}.rows"
            for title, counts, stack, optimizer in zip(titles, looked_up, stacks, optimizers, strict=True)
            if name == "train" and optimizer.updates_all(stack, sum(counts), len(stack.rows) // num_chips)
        }
        large = [
            Table(a.name, _part(a, num_chips), a.name in {f"{title}.rows" for title in sparse}, a.name in passed)
            for a in found.arguments
            if a.name.startswith(("rows", "bags")) and math.prod(a.shape) >= 2**18
        ]
        made = found.artifact, found.text, found.arguments, found.donated
        of_step = optimizers if name == "train" else [None] * len(stacks)
        empty = sum(_empty_bytes(stack, optimizer, num_chips) for stack, optimizer in zip(stacks, of_step, strict=True))
        traced.append(Traced(name, *made, touched, large, sparse, num_chips, sum(bags), empty))
    replaced = {p.name: p.plugin for p in plan.bags}
    return traced, {"plugins_of_tables": replaced, "embedding_bytes": sum(p.bytes for p in plan.bags)}


def _part(argument: Any, devices: int) -> tuple[int, ...]:
    shape: tuple[int, ...] = argument.shape
    return (shape[0] // devices, *shape[1:]) if "devices=" in argument.sharding else shape


def _tables_of(stack: RowStack) -> str:
    names = list(dict.fromkeys(table.name.partition(".")[0] for table in stack.tables))
    return "+".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}, {len(names)} tables"


def _counted(stack: RowStack) -> list[int]:
    """A list that each lookup of a stack adds its number of ids to."""
    counts: list[int] = []
    look_up = stack.look_up

    def counting(ids_BS: Tensor, *rest: Any) -> Tensor:
        counts.append(ids_BS.numel())
        return look_up(ids_BS, *rest)

    stack.look_up = counting  # type: ignore[method-assign, assignment]
    return counts


def _touched(stack: RowStack, optimizer: StackOptimizer, ids: int, num_chips: int) -> Touched:
    kinds = optimizer.rule.states
    # States may be of another type than rows; a bound is of the smaller.
    size = min(
        storage_bytes(array.shape, array.dtype) for array in (stack.rows, *optimizer.states()) if array.dim() > 1
    )
    numbers = sum(storage_bytes(state.shape, state.dtype) for state in optimizer.states() if state.dim() == 1)
    return Touched(ids, stack.dim, kinds.count("element"), kinds.count("row"), size // num_chips, numbers // num_chips)


def _empty_bytes(stack: RowStack, optimizer: StackOptimizer | None, num_chips: int) -> int:
    """Bytes of a stack's arrays on one chip that belong to no row."""
    chips = num_chips if stack.placement == "sparse" else 1
    arrays = [stack.rows, *(optimizer.states() if optimizer else [])]
    used = [stack.num_rows * (stack.dim if array.dim() > 1 else 1) for array in arrays]
    return sum((a.numel() - n) * a.element_size() for a, n in zip(arrays, used, strict=True)) // chips


def compile_step(traced: Traced, chip: Chip, slice: Slice, cache: Path | None, say: Callable[[str], None]) -> Compiled:
    """Compiles a step for the devices of a slice."""
    return compile_for(
        slice.topology,
        traced.artifact,
        traced.donated,
        shardings=[a.sharding for a in traced.arguments] if traced.devices > 1 else (),
        partitions=traced.devices,
        chip_config=chip.chip_config,
        cache=cache,
        identity=traced.text,
        say=say,
    )


def step_report(traced: Traced, compiled: Compiled, chip: Chip, slice: Slice) -> dict[str, Any]:
    """The figures of one step on one chip of a slice; those of a step that was refused for its size are None."""
    memory = {
        "parameter_bytes": traced.bytes_of("parameters"),
        "optimizer_bytes": traced.bytes_of("optimizer"),
        "batch_bytes": traced.bytes_of("batch"),
        "unpadded_bytes": sum(math.prod(traced.on_one(a)) * a.dtype.itemsize for a in traced.arguments)
        - traced.empty_bytes,
        "modelled_argument_bytes": traced.bytes_of("parameters", "optimizer", "batch", "other"),
        "hbm_bytes": chip.hbm_bytes,
    }
    memory["padding_bytes"] = memory["modelled_argument_bytes"] - memory["unpadded_bytes"]
    training = traced.name == "train"
    read, written = whole_bytes(traced)
    if compiled.error:
        bound = lower_bound(chip, traced.touched, read_bytes=read, written_bytes=written, training=training)
        missing = (
            "known_cycles",
            "bytes_accessed",
            "flops",
            "temporary_bytes",
            "known_ms",
            "modelled_ms",
            "collective_ms",
            "estimated_ms",
        )
        return (
            memory
            | dict.fromkeys(missing)
            | {
                "fits": False,
                "argument_bytes": memory["modelled_argument_bytes"],
                "lower_bound_ms": bound.seconds * 1e3,
                "verdict": _refusal(compiled.error, memory["modelled_argument_bytes"], chip),
                "uncovered_operations": [],
                "whole_table_copies": [],
                "brought_on_chip": [],
                "collectives": [],
                "dearest": [],
                "parts_ms": {},
            }
        )
    module = hlo.read(compiled.hlo)
    costs = step_cost.costs(module, chip)
    known = sum(c.seconds for c in costs if not c.modelled)
    modelled = sum(c.seconds for c in costs if c.modelled)
    sent = exchanged(module, chip, slice)
    between = sum(c["ms"] for c in sent) / 1e3
    bytes_of_number = {a.name: a.dtype.itemsize for a in traced.arguments}
    sizes = (math.prod(t.dims) * bytes_of_number[t.name] * traced.devices for t in traced.tables)
    largest_table = max(sizes, default=0)
    largest = max((c["bytes"] for c in sent), default=0)
    flops = compiled.cost.get("flops", 0.0)
    bound = lower_bound(chip, traced.touched, read_bytes=read, written_bytes=written, flops=flops, training=training)
    used = compiled.memory
    total = used["argument"] + used["output"] - used["alias"] + used["temp"] + used["generated_code"]
    uncovered = sorted((c for c in costs if c.modelled), key=lambda c: -c.seconds)
    dearest = sorted(costs, key=lambda c: -c.seconds)[:DEAREST]
    copies = step_cost.whole_table_copies(module, traced.tables)
    return memory | {
        "argument_bytes": used["argument"],
        "temporary_bytes": used["temp"],
        "output_bytes": used["output"] - used["alias"],
        "code_bytes": used["generated_code"],
        "total_bytes": total,
        "fits": total <= chip.hbm_bytes,
        "verdict": f"fits: {in_words(total)} of {in_words(chip.hbm_bytes)}",
        "known_cycles": hlo.sum_cycles(module.schedule),
        "known_ms": known * 1e3,
        "modelled_ms": modelled * 1e3,
        "collective_ms": between * 1e3,
        "estimated_ms": (known + modelled + between) * 1e3,
        "collectives": sent,
        "largest_collective_bytes": largest,
        "largest_table_bytes": largest_table,
        "collective_as_large_as_a_table": bool(largest_table) and largest >= largest_table,
        "lower_bound_ms": bound.seconds * 1e3,
        "lower_bound_bytes": bound.bytes,
        "ratio_to_lower_bound": (known + modelled + between) / bound.seconds,
        "flops": flops,
        "bytes_accessed": compiled.cost.get("bytes accessed"),
        "uncovered_operations": [described(c, traced) for c in uncovered if not step_cost.is_small(c.operation)],
        "uncovered_small": sum(step_cost.is_small(c.operation) for c in uncovered),
        "whole_table_copies": [
            {"table": table.name, "operation": e.operation.line[:160], "times": e.times} for e, table in copies
        ],
        "brought_on_chip": step_cost.brought_on_chip(module, traced.tables),
        "dearest": [described(c, traced) for c in dearest],
        "parts_ms": parts(costs),
        "loops": sorted({e.times for e in module.schedule} - {1}),
    }


def whole_bytes(traced: Traced) -> tuple[int, int]:
    """Bytes that a step reads whole, and that it writes whole: of all but rows of sparse placement and their state."""
    touched = tuple(f"{title}{end}" for title in traced.sparse for end in (".", " optimizer"))
    read = written = 0
    for argument in traced.arguments:
        if argument.name.startswith(touched):
            continue
        size = storage_bytes(traced.on_one(argument), argument.dtype)
        read += size
        written += size * argument.donated
    return read, written


def exchanged(module: hlo.Module, chip: Chip, slice: Slice) -> list[dict[str, Any]]:
    """The collectives of a step for people, with the time that the model gives them."""
    return [
        {
            "kind": c.kind,
            "bytes": c.bytes,
            "ms": slice.exchange_seconds(chip, c.kind, c.bytes) * 1e3,
            "what": c.op_name,
        }
        for c in collectives(module)
    ]


def described(cost: Cost, traced: Traced) -> dict[str, Any]:
    """An operation for people: what it is, where in the model, on which table, and its time."""
    operation = cost.operation
    shapes = {a.dims for a in operation.results} | {
        tuple(int(n) for n in dims.split(",")) for dims in re.findall(r"\[(\d[\d,]*)\]", operation.line)
    }
    tables = [
        a.name
        for a in traced.arguments
        if kind_of(a.name) == "parameters" and len(a.shape) > 1 and traced.on_one(a) in shapes
    ]
    results = " ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in operation.results[:2])
    return {
        "operation": f"{operation.kind} {operation.name} {results}",
        "what": cost.op_name.rpartition("/")[2].replace("aten__", ""),
        "module": cost.part,
        "table": tables[0] if len(tables) == 1 else "",
        "times": cost.times,
        "ms": cost.seconds * 1e3,
        "by": "model" if cost.modelled else "compiler",
    }


def parts(costs: Sequence[Cost]) -> dict[str, float]:
    """Milliseconds by part of the model: its top-level modules, forward and backward, and each stack's update."""
    found: dict[str, float] = {}
    for cost in costs:
        scope = cost.part
        head = scope.split(".")[0] if scope.startswith(("bottom", "top", "bags", "interaction")) else scope
        name = (head + (" backward" if scope.endswith("backward") and "backward" not in head else "")) or "other"
        found[name] = found.get(name, 0.0) + cost.seconds * 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _refusal(error: str, argument_bytes: int, chip: Chip) -> str:
    """The verdict on a step whose memory the compiler names, that of all it needs or of temporaries alone."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of \S+ hbm", error)
    temporary = re.search(r"on HBM, the total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", error)
    found = used or temporary
    if not found:
        return f"DOES NOT FIT: {error.splitlines()[0][:200]}"
    needed = float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]
    needed += 0 if used else argument_bytes
    return f"DOES NOT FIT: it needs {needed / 1e9:,.2f} of {chip.hbm_bytes / 1e9:,.2f} GB"
