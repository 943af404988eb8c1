"""torch's optimizers for the dense parameters, started so that their first step is like every other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dlrm_xla.config import DenseOptimizerName
from dlrm_xla.device import Device
from dlrm_xla.errors import UserError, choices

_KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
}


def dense_optimizer(
    name: DenseOptimizerName, groups: Iterable[tuple[Iterable[nn.Parameter], float]], device: Device
) -> torch.optim.Optimizer:
    """SGD, Adagrad or Adam over groups of (parameters on the device, learning rate), with its state made beforehand.

    A group's own rate stays in its ``base_lr``. torch makes Adam's state in the first step, which on xla is then
    another graph than the following ones. Here a twin on the host takes one step of zero gradients, and its state, set
    back to step 0, is loaded.
    """
    if name not in _KINDS:
        raise UserError(f"there is no dense optimizer {name!r}; {choices(name, _KINDS)}")
    real = [([p for p in parameters if p.requires_grad], rate) for parameters, rate in groups]
    real = [(parameters, rate) for parameters, rate in real if parameters]
    zeros = [[nn.Parameter(torch.zeros(p.shape)) for p in parameters] for parameters, _ in real]
    twin = _KINDS[name]([{"params": parameters} for parameters in zeros], lr=0.0, foreach=False)
    for parameter in itertools.chain.from_iterable(zeros):
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    state: dict[str, Any] = twin.state_dict()
    for values in state["state"].values():
        if "step" in values:
            # torch_xla keeps one copy of equal numbers without a dimension: all step counts would be one input of the
            # first graph and several of the next. A dimension of 1 keeps them apart. CUDA graphs want them
            # on the device.
            values["step"] = torch.zeros([1] if device.capturable else [])
    optimizer = _KINDS[name]([{"params": parameters} for parameters, _ in real], lr=0.0, foreach=False)
    for group, (_, rate) in zip(state["param_groups"], real, strict=True):
        group["lr"] = group["base_lr"] = rate
        if "capturable" in group:
            group["capturable"] = device.capturable
    optimizer.load_state_dict(state)
    return optimizer
