"""Steps over several chips for `launch/compile_tpu.py`: traced in a process for each number, and how they scale."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tpu_steps import Traced, trace_steps

from dlrm_xla.config import Config


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
        return self._processes[devices].submit(trace_steps, config).result()

    def close(self) -> None:
        """Ends the processes."""
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
