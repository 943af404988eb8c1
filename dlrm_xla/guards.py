"""Guards against runs that go on without sense: what is not finite, not learned, or not what was asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm_xla.device import Device
from dlrm_xla.errors import UserError

# Settings that may differ in a run that goes on, for they change neither the model nor a step; with another device or
# placement, though, sums are added up in another order.
_FREE = {
    "out",
    "data",
    "data_cache",
    "memory",
    "log_every",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "rank_patience",
}
_ROUNDING = {
    "device",
    "precision",
    "placement",
    "matmul_rows",
    "dense_rows",
    "near_bytes",
    "codebook_rows",
    "micro_batches",
    "row_files",
    "row_kernels",
    "cuda_graphs",
    "sharding",
}
_COURSE = {
    *("epochs", "patience", "evals_per_epoch", "dense_lr", "plugin_lr", "row_lr", "row_weight_decay"),
    *("warmup_steps", "decay_start", "decay_steps", "decay_power"),
}


class FiniteWatch:
    """The step at which each gradient was first not finite; on the device until somebody asks.

    ``kind`` is what the gradients are of, ``size`` the most names that a step may have.
    """

    def __init__(self, kind: str, size: int, device: Device) -> None:
        self._kind = kind
        # Made on the host, for zeros made on xla would be one more graph.
        self._first_bad_N = torch.zeros(size, dtype=torch.int32).to(device.torch_device)
        self._names: list[str] = []

    def note(self, names: Sequence[str], sums_N: Tensor, step: Tensor) -> None:
        """Takes one number per gradient that is not finite where the gradient is not; ``step`` is int32 [1]."""
        self._names = list(names)
        bad_N = sums_N.isfinite().logical_not().int()
        bad_N = torch.nn.functional.pad(bad_N, (0, len(self._first_bad_N) - len(names)))
        self._first_bad_N.copy_(torch.where((bad_N > 0) & (self._first_bad_N == 0), step, self._first_bad_N))

    def check(self) -> None:
        """Raises a UserError that names the first that was not finite; waits for the device."""
        bad = [(step, name) for name, step in zip(self._names, self._first_bad_N.tolist(), strict=False) if step]
        if bad:
            step, name = min(bad)
            together = sum(first == step for first, _ in bad)
            others = f" (and of {together - 1} more)" if together > 1 else ""
            raise UserError(
                f"the gradient of {self._kind} {name}{others} is not finite at step {step}. Lower the learning rates "
                "(--dense-lr, --row-lr), or check the data; checkpoints saved before it are kept."
            )


def check_labels(labels: Mapping[str, NDArray[np.float32]]) -> None:
    """Raises a UserError where the labels of a split are all the same: nothing can be learned or judged."""
    for split, values in labels.items():
        if len(values) and values.min() == values.max():
            raise UserError(
                f"all {len(values):,} labels of the {split} rows are {values[0]:.0f}. Check the label column (the "
                "first one) and the order of the rows."
            )


def doubts(auc: float, log_loss: float, base_log_loss: float) -> str:
    """What to look at when a model has learned nothing, or an empty text; figures of validation rows."""
    if abs(auc - 0.5) < 0.01:
        what = f"validation AUC is {auc:.4f}, near that of chance"
    elif auc < 0.5:
        what = f"validation AUC is {auc:.4f}, worse than chance"
    elif log_loss >= base_log_loss:
        what = f"validation log loss is {log_loss:.4f}, no better than {base_log_loss:.4f} of a constant"
    else:
        return ""
    return (
        f"{what}. Likely causes: learning rates too high or too low (--dense-lr, --row-lr), labels in another order "
        "than the rows, ids that mean something else in training than in validation, or too few rows."
    )


def config_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines about settings that changed since a checkpoint, for a run that goes on.

    Raises UserError where one of them makes it another model or another order of rows.
    """
    changed = {
        name: f"{name}: {saved.get(name)!r} -> {now.get(name)!r}"
        for name in sorted({*saved, *now} - _FREE)
        if saved.get(name) != now.get(name)
    }
    refused = [line for name, line in changed.items() if name not in _ROUNDING | _COURSE]
    if refused:
        raise UserError(
            f"a run cannot be resumed with other settings of the model or of the data: {'; '.join(refused)}. Leave "
            "them out after --resume, or start a new run."
        )
    return [
        f"{line} (changed since the checkpoint; "
        + ("it goes on with other rounding)" if name in _ROUNDING else "it goes on on another course)")
        for name, line in changed.items()
    ]


def version_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Lines about packages that changed since a checkpoint, after which bits may differ."""
    return [
        f"{name}: {saved.get(name, 'none')} -> {now.get(name, 'none')} (changed since the checkpoint; bits may differ)"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]


def announce(device: Device, precision: str) -> None:
    """Prints what a command computes on, and what must not be missed about it."""
    print(f"device: {device.description}")
    for line in (device.loud, device.slow_bf16 if precision == "bf16" else ""):
        if line:
            print(f"*** {line}")


def warn(line: str) -> None:
    """A line that must not be missed."""
    print(f"*** {line}", file=sys.stderr)
