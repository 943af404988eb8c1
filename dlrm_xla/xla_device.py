"""The xla device: TPUs, and XLA's CPU backend where there are none; torch_xla is imported when it is opened."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from dlrm_xla.device import HOST_GENERATOR, Counters, Device, RowAccess, Step, machine_memory, part_lines, write
from dlrm_xla.errors import UserError

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def open_xla_first() -> bool:
    """Opens the xla device where torch_xla is installed; opened after the process's first backward, it fails.

    For test processes that use several devices. Returns whether it is installed.
    """
    if importlib.util.find_spec("torch_xla") is None:
        return False
    if not (devices := os.environ.get("CPU_NUM_DEVICES", "1")).isdecimal() or int(devices) < 1:
        raise UserError(f"CPU_NUM_DEVICES is {devices!r}, but must be a number of devices")  # xla would crash
    # By default 0 and 1 become constants of the graph, so a learning rate passing through 1.0 would compile again.
    os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
    # XLA warns at every partitioned compile that its partitioner has a successor, which torch_xla 2.9 does not use.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies' deprecations
        logging.disable(logging.WARNING)  # it says where it runs; `Device.loud` says so louder
        try:
            torch_xla = importlib.import_module("torch_xla")
            runtime = importlib.import_module("torch_xla.runtime")
            if runtime.global_runtime_device_count() > 1:
                runtime.use_spmd()
            torch_xla.device()
        finally:
            logging.disable(logging.NOTSET)
    return True


def job_of_hosts(name: str) -> dict[str, str]:
    """Where this process stands among the hosts whose chips the device joins, in torchrun's variables.

    Empty where there is one host. A process of each host must make the same calls in the same order, for they run one
    program.
    """
    if name != "xla" or not open_xla_first():
        return {}
    import torch_xla.runtime

    if torch_xla.runtime.process_count() == 1:
        return {}
    address = os.environ.get("MASTER_ADDR") or torch_xla.runtime.get_master_ip()
    return {
        "RANK": str(torch_xla.runtime.process_index()),
        "WORLD_SIZE": str(torch_xla.runtime.process_count()),
        "MASTER_ADDR": address,
        "MASTER_PORT": os.environ.get("MASTER_PORT", "29500"),
    }


def open_xla() -> Device:
    """All TPU chips of the job as one device, or XLA's CPU backend, which says so loudly."""
    if not open_xla_first():
        raise UserError(
            "--device xla needs torch_xla, which is not installed: pip install -e '.[xla]' "
            "(torch_xla 2.9.0 goes with torch 2.9.0), or use --device cpu."
        )
    import torch_xla
    import torch_xla.core.xla_model
    import torch_xla.debug.metrics as metrics
    import torch_xla.runtime

    from dlrm_xla import xla_rows
    from dlrm_xla.xla_spmd import Mesh
    from dlrm_xla.xla_steps import RecordedStep

    device = torch_xla.device()
    kind = torch_xla.runtime.device_type()
    loud = ""
    if kind == "CPU":
        loud = "XLA FOUND NO TPU: this run uses XLA's CPU backend. Results hold; times say nothing about a TPU."

    def place(module: nn.Module) -> nn.Module:
        host = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
        module.to_empty(device=device)
        # A view of a parameter is traced differently once the parameter was written in place, which every step does.
        # Written once before the first step, the first graph is that of all steps. Into empty ones, for no second copy
        # of a large table is made on the way: 50,000,000 rows of 16 took 5 s and 7.0 GB instead of 15 s and 11.6 GB.
        with torch.no_grad():
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
                tensor.copy_(host.pop(name))
        return module

    def send(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    chips = Mesh() if torch_xla.runtime.is_spmd() else None

    def synchronize() -> None:
        # A sync waits for the graph that it sends off; a compiled step has sent its own.
        torch_xla.core.xla_model.wait_device_ops()

    def counters() -> Counters:
        data = metrics.metric_data("CompileTime")
        names = [n for n in metrics.counter_names() if n.startswith("aten::")]
        return Counters(data[0] if data else 0, {n: int(metrics.counter_value(n)) for n in names})

    tpu = RowAccess(
        "a TPU",
        xla_rows.gather,
        xla_rows.scatter,
        bits=xla_rows.bits,
        static_shapes=True,
        lanes=128,
        rounds_matmul=True,
        near_bytes=_near_bytes(chips.count if chips else 1),
        codebook_rows=16_384,
        chips=chips,
    )
    rows, memory = tpu, 0.0
    compile: Callable[[Step, str], Step] = RecordedStep
    if kind == "CPU":
        compile = _in_memory_kept(RecordedStep)
        rows = replace(tpu, description="XLA's CPU backend", lanes=0, rounds_matmul=False)
        rows = replace(rows, near_bytes=0, codebook_rows=0)
        memory = machine_memory()
    else:
        memory = _chip_memory(lambda: torch_xla.core.xla_model.get_memory_info(device)["bytes_limit"])
    return Device(
        "xla",
        device,
        f"XLA on {kind}" if chips is None else f"XLA on {kind}, {chips.description}",
        place if chips is None else partial(chips.place, sharded=False),
        compile if chips is None else lambda step, name: compile(chips.returning_whole(step), name),
        synchronize,
        counters,
        rows,
        tpu,
        memory,
        _xla_parts if chips is None else partial(chips.host_parts, part_lines=part_lines),
        HOST_GENERATOR,
        place if chips is None else partial(chips.place, sharded=True),
        send if chips is None else chips.send,
        write if chips is None else chips.write,
        loud,
        capturable=True,
    )


def _near_bytes(chips: int) -> int:
    """What small tables may take of the memory on so many TPU chips (docs/tpu.md, 4).

    None of more than eight: a part of large tables is then small enough for the compiler to stream it in order of ids.
    """
    return 40_000_000 * chips if chips <= 8 else 0


def _xla_parts(array: Tensor) -> Iterator[Tensor]:
    lines = part_lines(array)
    if lines >= len(array):
        yield array.cpu()
        return
    for first in range(0, len(array), lines):
        # By index, for a slice at another place is another graph.
        at = torch.arange(first, first + lines, dtype=torch.int32).clamp(max=len(array) - 1)
        yield array.index_select(0, at.to(array.device)).cpu()[: len(array) - first]


def _chip_memory(read: Callable[[], int]) -> float:
    try:
        return 0.9 * read()
    except RuntimeError:  # torch_xla does not tell it of the device that stands for all chips under SPMD
        return math.inf


def _in_memory_kept(compile: Callable[[Step, str], Step]) -> Callable[[Step, str], Step]:
    """From the first step on, the C library keeps freed memory for the next one.

    XLA's CPU backend asks for a step's temporary memory anew each time, and the system hands it out in cleared pages:
    8,923 page faults, 22 of 133 ms of processor time a step of the kaggle preset. Not before, for tables that have
    moved into a stack should leave memory.
    """

    def compiled(step: Step, name: str) -> Step:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # glibc
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        return compile(step, name)

    return compiled
