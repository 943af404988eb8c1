"""Steps over several chips for `launch/compile_tpu.py`: traced in a process for each number, and how they scale."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tpu_steps import Traced, trace_steps

from dlrm_xla.config import Config
from dlrm_xla.errors import UserError
from dlrm_xla.tpu import Chip, Slice


def check_hosts(chip: Chip, slice: Slice) -> None:
    """Refuses a topology that libtpu does not have: one that does not consist of whole hosts."""
    _, _, host = chip.topology.partition(":")
    _, _, asked = slice.topology.partition(":")
    sides = [int(side) for side in host.split("x")]
    whole = "x".join(str(-(-int(n) // side) * side) for n, side in zip(asked.split("x"), sides, strict=True))
    if asked != whole:
        raise UserError(
            f"--chips {asked}: a topology of {chip.name} consists of whole hosts, each of {host} chips; take {whole}, "
            f"or 1 for {chip.device}"
        )


class Tracers:
    """Traces steps for any number of devices; torch_xla has one number for the life of a process."""

    def __init__(self) -> None:
        self._processes: dict[int, ProcessPoolExecutor] = {}

    def trace(self, config: Config, devices: int) -> tuple[list[Traced], dict[str, Any]]:
        """The steps of a configuration, and what replaced its tables."""
        if devices == 1:
            return trace_steps(config)
        if devices not in self._processes:
            spawn = multiprocessing.get_context("spawn")
            self._processes[devices] = ProcessPoolExecutor(1, spawn, _become, (devices,))
        # The process starts here, and does not hear of Ctrl-C: this one does, and ends it.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            traced = self._processes[devices].submit(trace_steps, config)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        return traced.result()

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        for child in multiprocessing.active_children():
            child.terminate()
        for process in self._processes.values():
            process.shutdown(cancel_futures=True)


def _become(devices: int) -> None:
    # Virtual devices of XLA's CPU backend: nothing runs on them.
    os.environ |= {"CPU_NUM_DEVICES": str(devices), "PJRT_DEVICE": "CPU"}


def scaling(report: dict[str, Any], alone: dict[str, Any], alone_part: dict[str, Any]) -> dict[str, Any]:
    """Efficiency of n devices against one, with the batch of all and with the part of one: None if one cannot hold it.

    t1(B) / (n tn(B)) and t1(B / n) / tn(B), of estimated times of the train step.
    """
    several, devices = report["estimated_ms"], report["devices"]

    def efficiency(single: dict[str, Any], factor: float) -> float | None:
        return single["estimated_ms"] / several / factor if single["estimated_ms"] and several else None

    return {
        "one_chip_ms": alone["estimated_ms"],
        "one_chip_ms_of_its_part": alone_part["estimated_ms"],
        "efficiency_at_this_batch": efficiency(alone, devices),
        "efficiency_at_this_batch_per_chip": efficiency(alone_part, 1),
    }
