"""What a run does first where several of it were started: the ranks agree, and share the tables out."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlrm_xla_data.fingerprint import data_changed
from run_plan import Plan

from dlrm_xla.config import Config
from dlrm_xla.device import Device
from dlrm_xla.devices import take_own_gpu
from dlrm_xla.errors import UserError, choices
from dlrm_xla.plan import on_meta
from dlrm_xla.ranks import Ranks, agent_has_store, open_ranks
from dlrm_xla.rows import RowTable
from dlrm_xla.steps import row_settings
from dlrm_xla.torchrec_plan import Shards, make_shards
from dlrm_xla.xla_device import job_of_hosts

# Where data lies may differ from host to host; what is in it may not.
_OF_A_HOST = {"data", "data_cache"}


def open_job(config: Config) -> Ranks:
    """The processes that train together: those of torchrun, or one for each host whose chips are one device."""
    if config.device == "cuda":
        take_own_gpu()  # before nccl, which asks for one
    alone_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1  # several on a host would fight over its chips
    return open_ranks(config.rank_patience, job_of_hosts(config.device) if alone_here else None)


def check_settings(config: Config, ranks: Ranks) -> None:
    """Raises a UserError where settings do not go with several ranks, or are not the same on all of them."""
    if ranks.size == 1:
        return
    for k, other in enumerate(ranks.tell("settings", dataclasses.asdict(config))):
        mine = dataclasses.asdict(config)
        if different := [
            f"{name}: {mine[name]!r} on rank {ranks.rank}, {other[name]!r} on rank {k}"
            for name in mine
            if mine[name] != other[name] and name not in _OF_A_HOST
        ]:
            raise UserError(f"the ranks were started with other settings. {'; '.join(different)}. Start all alike.")
    if ranks.part[1] > 1:
        _check_parts(config, ranks)


def _check_parts(config: Config, ranks: Ranks) -> None:
    if config.batch_size % ranks.size:
        good = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
        near = sorted(sorted(good, key=lambda n: abs(n - ranks.size))[:3])
        raise UserError(
            f"a batch of {config.batch_size} does not split into {ranks.size} equal parts. Take another --batch-size, "
            f"such as {-(-config.batch_size // ranks.size) * ranks.size}, or as many ranks as divide it: "
            f"{', '.join(map(str, near))}."
        )
    refused = {
        "device xla: one process has all local devices; start it without torchrun": config.device == "xla",
        "device tpu: torch_tpu is used for one chip, without torchrun": config.device == "tpu",
        "micro_batches: take more ranks, or a smaller --batch-size": config.micro_batches > 1,
        "row_precision bf16: its rounding is not TorchRec's": config.row_precision == "bf16",
        "row_state bf16: its rounding is not TorchRec's": config.row_state == "bf16",
        "row_weight_decay: TorchRec's is another formula": config.row_weight_decay != 0,
        "row_files: tables in files belong to one process": bool(config.row_files),
        "row_optimizer adam: FBGEMM has it on CUDA only; take sgd, adagrad or adagrad_element": (
            config.row_optimizer == "adam" and config.device == "cpu"
        ),
        "placement, matmul_rows, dense_rows, near_bytes: take sharding": bool(config.placement)
        or max(config.matmul_rows, config.dense_rows, config.near_bytes) > 0,
    }
    if found := [line for line, bad in refused.items() if bad]:
        raise UserError(f"with several ranks there is no {'; no '.join(found)}.")


def check_data(fingerprint: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises a UserError where the ranks have other data."""
    for k, other in enumerate(ranks.tell("data", fingerprint)):
        if line := data_changed(fingerprint, other):
            raise UserError(f"rank {ranks.rank} and rank {k} have other data: {line}. Give all ranks the same.")


def check_shared(path: Path, ranks: Ranks) -> None:
    """Raises a UserError where a rank does not see the run folder that the first one made: it reads checkpoints too."""
    seen = ranks.tell("folder", (path.is_dir(), socket.gethostname()))
    if blind := [f"rank {k} on {host}" for k, (sees, host) in enumerate(seen) if not sees]:
        raise UserError(
            f"{', '.join(blind)} does not see the run folder {path} that rank 0 made. Give --out on a file system that "
            "all hosts share."
        )


def memory_of_rank(config: Config, plan: Plan, device: Device, ranks: Ranks) -> float:
    """Bytes that each rank may use: --memory, else its device's, or its part of a host that ranks on CPU share."""
    if config.memory or device.torch_device.type != "cpu":
        return plan.memory
    return plan.memory / int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))


def share_out(config: Config, plan: Plan, device: Device, ranks: Ranks) -> Shards:
    """The ranks' shares of all exact tables in a model; the first plans for all."""

    def shards() -> Shards:
        exact, lengths = [], []
        for table, make, length in zip(plan.tables, plan.make_bags, plan.lengths, strict=True):
            inside = [m.table for m in on_meta(make, table).modules() if isinstance(m, RowTable)]
            exact += inside
            lengths += [length] * len(inside)
        known = {t.name for t in exact} | {t.name for t in plan.tables}
        if unknown := set(config.sharding) - known:
            raise UserError(f"sharding names a table {min(unknown)!r}; {choices(min(unknown), known)}")
        kind, settings = device.torch_device.type, row_settings(config)
        memory = memory_of_rank(config, plan, device, ranks)
        return make_shards(exact, lengths, config.batch_size, ranks.size, kind, memory, settings, config.sharding)

    return ranks.from_first(shards)


def folder_to_go_on_in(resumed: Path | None, ranks: Ranks) -> Path | None:
    """The run folder that was asked for, or the one that this job had made before torchrun started it again."""
    if resumed:
        return resumed
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not agent_has_store():
        raise UserError(
            "torchrun --max-restarts: a restarted job finds its run folder in the store of torchrun's agent, and there "
            "is none here. Use --rdzv-backend c10d without TORCH_DISABLE_SHARE_RDZV_TCP_STORE, or --resume."
        )
    return ranks.from_first(ranks.remembered)
