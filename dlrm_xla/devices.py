"""Devices: the only file that knows that there are several, and the only one that imports torch_xla.

A new backend is one new function here and one line in `_OPENERS`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dlrm_xla.errors import UserError, choices

Step = Callable[..., Any]


@dataclass(frozen=True)
class Counters:
    """Since the process began: graphs compiled, and operations run on the CPU instead, by name."""

    compiles: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """What a training loop needs of a device.

    ``place(module)`` moves a module there, ``compile(step, name)`` makes a step run as the device runs it best,
    ``synchronize()`` waits for queued work, ``counters()`` reads the counts above, ``loud`` is a line that the user
    must not miss. ``capturable``: an optimizer must keep its step counts on the device.
    """

    name: str
    torch_device: torch.device
    description: str
    place: Callable[[nn.Module], nn.Module]
    compile: Callable[[Step, str], Step]
    synchronize: Callable[[], None]
    counters: Callable[[], Counters]
    loud: str = ""
    capturable: bool = False


def open_device(name: str) -> Device:
    """Opens "cpu", "cuda" or "xla"; a UserError says what is missing."""
    if name not in _OPENERS:
        raise UserError(f"there is no device {name!r}; {choices(name, _OPENERS)}")
    return _OPENERS[name]()


def open_xla_first() -> bool:
    """Opens the xla device where torch_xla is installed; opened after the process's first backward, it fails.

    For test processes that use several devices. Returns whether it is installed.
    """
    if importlib.util.find_spec("torch_xla") is None:
        return False
    # By default 0 and 1 become constants of the graph, so a learning rate passing through 1.0 would compile again.
    os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies' deprecations
        logging.disable(logging.WARNING)  # it says where it runs; `Device.loud` says so louder
        try:
            torch_xla = importlib.import_module("torch_xla")
            torch_xla.device()
        finally:
            logging.disable(logging.NOTSET)
    return True


def _as_it_is(step: Step, name: str) -> Step:
    return step


def _cpu() -> Device:
    description = f"CPU, {torch.get_num_threads()} threads"
    return Device("cpu", torch.device("cpu"), description, lambda m: m, _as_it_is, lambda: None, Counters)


def _cuda() -> Device:
    if not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver was found"
        )
        raise UserError(f"--device cuda: {built}. Check nvidia-smi and the torch build, or use --device cpu or xla.")
    description = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    device = torch.device("cuda")
    return Device("cuda", device, description, lambda m: m.to(device), _as_it_is, torch.cuda.synchronize, Counters)


def _xla() -> Device:
    if not open_xla_first():
        raise UserError(
            "--device xla needs torch_xla, which is not installed: pip install -e '.[xla]' "
            "(torch_xla 2.9.0 goes with torch 2.9.0), or use --device cpu."
        )
    import torch_xla
    import torch_xla.debug.metrics as metrics
    import torch_xla.runtime

    device = torch_xla.device()
    kind = torch_xla.runtime.device_type()
    loud = ""
    if kind == "CPU":
        loud = "XLA FOUND NO TPU: this run uses XLA's CPU backend. Results hold; times say nothing about a TPU."

    def place(module: nn.Module) -> nn.Module:
        host = module.state_dict()
        moved = module.to(device)
        # A view of a parameter is traced differently once the parameter was written in place, which every step does.
        # Written once before the first step, the first graph is that of all steps.
        moved.load_state_dict(host)
        return moved

    def compile(step: Step, name: str) -> Step:
        compiled = torch_xla.compile(step, full_graph=True, name=name, max_different_graphs=1)

        def run(*args: Any) -> Any:
            try:
                return compiled(*args)
            except RuntimeError as error:
                raise UserError(
                    f"the {name} step is not one XLA graph: {_first_line(error)}. Some module reads a device value on "
                    "the host (.item(), an if on a tensor) or has shapes that depend on the data; look at the plugins."
                ) from error

        return run

    def synchronize() -> None:
        torch_xla.sync(wait=True)

    def counters() -> Counters:
        data = metrics.metric_data("CompileTime")
        names = [n for n in metrics.counter_names() if n.startswith("aten::")]
        return Counters(data[0] if data else 0, {n: int(metrics.counter_value(n)) for n in names})

    return Device("xla", device, f"XLA on {kind}", place, compile, synchronize, counters, loud, capturable=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_OPENERS: dict[str, Callable[[], Device]] = {"cpu": _cpu, "cuda": _cuda, "xla": _xla}
