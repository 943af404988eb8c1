"""Which rank holds which rows: TorchRec's planner, asked about the exact tables of a model."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dlrm_xla.config import SHARDINGS
from dlrm_xla.contract import Table
from dlrm_xla.errors import UserError, choices
from dlrm_xla.fbgemm_rows import finds_rows
from dlrm_xla.row_rules import RULES, RowSettings


@dataclass(frozen=True)
class Shards:
    """TorchRec's plan, and of each table how it is cut and the bytes of rows and optimizer state on each rank."""

    plan: Any
    tables: Sequence[Table]
    kinds: Sequence[str]
    bytes: Sequence[Mapping[int, int]]
    memory: float


@contextmanager
def quiet_torchrec() -> Iterator[None]:
    """Holds back what torchrec and what it stands on say of themselves; a UserError where they are not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torchrec", "fbgemm_gpu", "root", "torch.fx._symbolic_trace"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        except ModuleNotFoundError as error:
            raise UserError(
                f"several ranks need TorchRec, but {error.name} is not installed: pip install -e '.[distributed]'"
            ) from error


def embedding_bags(tables: Sequence[Table], features: Sequence[Sequence[str]]) -> Any:
    """One collection of all tables on ``meta``; ``features`` names the bags of each table that a step looks up."""
    with quiet_torchrec():
        from torchrec.modules.embedding_configs import EmbeddingBagConfig
        from torchrec.modules.embedding_modules import EmbeddingBagCollection
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=f"t{k}",
                embedding_dim=-(-t.dim // 4) * 4,  # FBGEMM's kernels give wrong sums for others, without a word
                num_embeddings=t.num_rows,
                feature_names=list(features[k]),
            )
            for k, t in enumerate(tables)
        ],
        device=torch.device("meta"),
    )


def sharder(settings: RowSettings) -> Any:
    """TorchRec's sharder whose kernels update rows as our own row optimizer does."""
    with quiet_torchrec():
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    kinds = {
        "sgd": EmbOptimType.EXACT_SGD,
        "adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "adagrad_element": EmbOptimType.EXACT_ADAGRAD,
        "adam": EmbOptimType.ADAM,
    }
    first, second = settings.betas

    class Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return list(SHARDINGS)  # by rows on CPU too, where TorchRec offers it on CUDA only

    return Sharder(
        fused_params={"optimizer": kinds[settings.name], "eps": settings.eps, "beta1": first, "beta2": second}
    )


def leaves_ranks_empty(table: Table, size: int) -> bool:
    """Whether cut by rows a table leaves some of ``size`` ranks without any: each takes the same number, rounded up."""
    return -(-table.num_rows // size) * (size - 1) >= table.num_rows


def allowed(table: Table, looked_up: int, settings: RowSettings, size: int) -> list[str]:
    """Ways to cut a table that keep its updates exact; ``looked_up`` rows of it are asked for on a rank in a step.

    Copied to every rank where the gradient of all its rows is no longer than the vectors that would be exchanged, and
    a row without a gradient stays as it is; and where FBGEMM has no kernel, for widths that 4 does not divide. Cut by
    columns only where no state is kept by row: TorchRec keeps one per piece.
    """
    rule = RULES[settings.name]
    if table.dim % 4 and not rule.still:
        raise UserError(
            f"table {table.name} is {table.dim} wide, and with {settings.name} FBGEMM needs a multiple of 4. Take "
            "options of the plugin that make it so, or --row-optimizer sgd, adagrad or adagrad_element."
        )
    if table.dim % 4 or (rule.still and table.num_rows <= looked_up):
        return ["data_parallel"]
    ways = ["table_wise"] if leaves_ranks_empty(table, size) else ["table_wise", "row_wise"]
    if "row" not in rule.states and table.dim % 8 == 0:
        ways.append("column_wise")
    return ways


def make_shards(
    tables: Sequence[Table],
    lengths: Sequence[int],
    batch_size: int,
    size: int,
    kind: str,
    memory: float,
    settings: RowSettings,
    asked: Mapping[str, str],
) -> Shards:
    """Plans ``tables`` for ``size`` ranks of ``memory`` bytes each; a UserError where they do not fit.

    ``lengths`` are the slots of each table in a sample, ``batch_size`` is that of all ranks together, ``kind`` "cpu" or
    "cuda", and ``asked`` says how to cut single tables, by name or by the feature that they are of.
    """
    with quiet_torchrec():
        from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
        from torchrec.distributed.planner.types import PlannerError
    ways = []
    for table, length in zip(tables, lengths, strict=True):
        name = table.setting(asked)
        if name and name not in SHARDINGS:
            raise UserError(f"sharding of table {table.name} cannot be {name!r}; {choices(name, SHARDINGS)}")
        good = allowed(table, batch_size // size * length, settings, size)
        if name == "row_wise" and leaves_ranks_empty(table, size):
            raise UserError(
                f"sharding: table {table.name} of {table.num_rows} rows cannot be cut by rows for {size} ranks: the "
                "last would have none, which FBGEMM does not take. Take table_wise, or fewer ranks."
            )
        if name == "column_wise" and "row" in RULES[settings.name].states:
            raise UserError(
                f"sharding: table {table.name} cannot be cut by columns with {settings.name}, whose state is by row. "
                "Take row_wise or table_wise, or --row-optimizer sgd or adagrad_element."
            )
        if name == "data_parallel" and not RULES[settings.name].still:
            raise UserError(
                f"sharding: table {table.name} cannot be data_parallel with {settings.name}, which would move rows "
                "that a step does not look up. Take table_wise or row_wise, or --row-optimizer sgd, adagrad or "
                "adagrad_element."
            )
        ways.append([name] if name else good)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    topology = Topology(
        world_size=size,
        local_world_size=local,
        compute_device=kind,
        hbm_cap=int(memory) if kind == "cuda" else None,
        ddr_cap=int(memory) if kind == "cpu" else None,
    )
    constraints = {
        f"t{k}": ParameterConstraints(
            sharding_types=way,
            compute_kernels=["dense" if way == ["data_parallel"] else "fused"],
            min_partition=max(4, tables[k].dim // size),
            pooling_factors=[float(lengths[k])],
        )
        for k, way in enumerate(ways)
    }
    planner = EmbeddingShardingPlanner(
        topology=topology, batch_size=max(1, batch_size // size), constraints=constraints, debug=False
    )
    bags = embedding_bags(tables, [[f"f{k}"] for k in range(len(tables))])
    try:
        with quiet_torchrec():
            plan = planner.plan(torch.nn.ModuleDict({"rows": bags}), [sharder(settings)])
    except PlannerError as error:
        largest = sorted(tables, key=lambda t: -table_bytes(t, settings))[:5]
        told = ", ".join(f"{t.name} {table_bytes(t, settings):,}" for t in largest)
        whole = sum(table_bytes(t, settings) for t in tables)
        raise UserError(
            f"TorchRec's planner finds no way to put {len(tables)} tables, {whole:,} bytes with their optimizer, on "
            f"{size} ranks of {int(memory):,} bytes each (a part of them is kept for batches and what is exchanged). "
            f"The largest: {told}. Take more ranks, another --memory, --plugin or --row-optimizer, or name how to cut "
            "a table with sharding in --config."
        ) from error
    placed = plan.plan["rows"]
    kinds, pieces = [], []
    for k, table in enumerate(tables):
        found = placed[f"t{k}"]
        kinds.append(found.sharding_type)
        spec = found.sharding_spec
        each = dict.fromkeys(range(size), table_bytes(table, settings))
        if spec is not None:
            each = {}
            for shard in spec.shards:
                rank = shard.placement.rank()
                part = Table(table.name, *(max(1, n) for n in shard.shard_sizes))
                if kind == "cpu" and not finds_rows(4 * part.num_rows * part.dim, settings.name):
                    raise UserError(
                        f"table {table.name}: rank {rank} would have {4 * part.num_rows * part.dim:,} bytes of it, and "
                        "FBGEMM's row-wise Adagrad on the CPU updates wrong rows beyond 4 GiB. Take sharding: "
                        f"{{{table.name}: row_wise}} in --config, more ranks, or --row-optimizer sgd or "
                        "adagrad_element."
                    )
                each[rank] = each.get(rank, 0) + (table_bytes(part, settings) if min(shard.shard_sizes) else 0)
        pieces.append(each)
    return Shards(plan, tables, kinds, pieces, memory)


def table_bytes(table: Table, settings: RowSettings) -> int:
    """Bytes of a table's rows and of its optimizer's state."""
    whole = table.num_rows * table.dim
    return 4 * (whole + sum(table.num_rows if kind == "row" else whole for kind in RULES[settings.name].states))


def text(shards: Shards, size: int) -> str:
    """Where each exact table lies, as a table for people; bytes are of rows and their optimizer."""
    lines = [f"{'exact table':<16}{'rows':>12}{'dim':>5}  {'sharding':<14}{'bytes by rank':<40}"]
    for table, kind, each in zip(shards.tables, shards.kinds, shards.bytes, strict=True):
        where = f"{next(iter(each.values())):,} on every rank"
        if kind != "data_parallel":
            where = ", ".join(f"{rank}: {count:,}" for rank, count in sorted(each.items())[:8])
            where += f", and {len(each) - 8} more" if len(each) > 8 else ""
        lines.append(f"{table.name:<16}{table.num_rows:>12,}{table.dim:>5}  {kind:<14}{where}")
    totals = [sum(each.get(rank, 0) for each in shards.bytes) for rank in range(size)]
    told = ", ".join(f"{rank}: {count:,}" for rank, count in enumerate(totals[:8]))
    told += f", and {size - 8} more up to {max(totals):,}" if size > 8 else ""
    lines.append(f"{'in all':<16}{'':>12}{'':>5}  {'':<14}{told}; each may use {int(shards.memory):,}")
    return "\n".join(lines)
