"""Where the time of a training step goes, part by part, on a device that runs operations as they come."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bench_arms import NUM_BATCHES, Case, plugin_steps
from torch import nn

WARM_UP = 3
BAGS, MLPS, BACKWARD = "bags, forward", "MLPs and interaction, forward", "backward"
DENSE, ROWS, REST = "dense optimizer", "rows updated", "checks, batch and the rest"


class Clock:
    """Adds up the time of parts; waits for the device at both ends of each."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize, self.ms = synchronize, dict[str, float]()

    def now(self) -> float:
        self.synchronize()
        return time.perf_counter()

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, clocked."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            try:
                return work(*args, **kwargs)
            finally:
                self.ms[part] = self.ms.get(part, 0.0) + (self.now() - began) * 1000

        return run


@contextmanager
def _instead(owner: Any, name: str, clock: Clock, part: str) -> Iterator[None]:
    plain = getattr(owner, name)
    setattr(owner, name, clock.timed(part, plain))
    try:
        yield
    finally:
        setattr(owner, name, plain)


def parts(case: Case, spec: str, ratio: float, repeat: int) -> dict[str, float]:
    """Median milliseconds of each part of a step; {} on xla, where a step is one program.

    Clocked parts wait for the device, so on CUDA their sum is more than a step takes.
    """
    if case.device.name == "xla":
        return {}
    steps, batches = plugin_steps(case, spec, ratio, cuda_graphs="off")
    clock = Clock(case.device.synchronize)
    model: nn.Module = steps.model
    modules = {"bags": BAGS, "bottom": MLPS, "interaction": MLPS, "top": MLPS}
    for name, part in modules.items():
        module = getattr(model, name)
        module.forward = clock.timed(part, module.forward)
    seen: dict[str, list[float]] = {}
    with (
        _instead(torch.autograd, "backward", clock, BACKWARD),
        _instead(steps.dense, "step", clock, DENSE),
        _instead(steps.rows, "step", clock, ROWS),
    ):
        for k in range(WARM_UP + repeat):
            clock.ms = {}
            began = clock.now()
            steps.train(batches[k % NUM_BATCHES], k)
            whole = (clock.now() - began) * 1000
            clock.ms[REST] = whole - sum(clock.ms.values())
            if k >= WARM_UP:
                for part, ms in clock.ms.items():
                    seen.setdefault(part, []).append(ms)
    return {part: statistics.median(times) for part, times in seen.items()}
