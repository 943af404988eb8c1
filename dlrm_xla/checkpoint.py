"""What a checkpoint holds: the model, the optimizers and where the run stands, by names that know no device.

    model.NAME                        parameters and buffers; exact tables one by one, however they are stacked
    dense_optimizer.PARAMETER.STATE   torch's optimizers
    row_optimizer.TABLE.stateN        the rows' optimizer, cut like the tables; row_optimizer.step
    run.NAME                          whatever else the run needs, such as random states
    metadata                          format, checksum, and a JSON object ``about``

So a checkpoint loads on another device, with another placement and on another number of ranks. Never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dlrm_xla.device import Device
from dlrm_xla.errors import UserError
from dlrm_xla.tensor_file import TensorFile, opened

FORMAT = "dlrm_xla checkpoint 2"


class Rows(Protocol):
    """Whoever has a model's exact tables: `RowStore`, or `TorchrecRows` on several ranks."""

    device: Device

    @property
    def names(self) -> list[str]:
        """The names that the model's ``state_dict()`` had for them."""

    def write(self, path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Writes tables, the rows' optimizer and ``tensors`` into one checkpoint, whole or not at all."""

    def load_from(self, file: TensorFile, optimizer: bool) -> None:
        """Sets the rows, and where asked the optimizer's state, from a checkpoint."""


def save(
    path: Path,
    model: nn.Module,
    dense: torch.optim.Optimizer,
    rows: Rows,
    about: Mapping[str, Any],
    run: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all; tables go to the disk in parts, so none is copied as a whole.

    A UserError where it cannot be written; a file of that name from before is then still there.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"dense_optimizer.{name}": tensor for name, tensor in _optimizer_tensors(model, dense)}
    tensors |= {f"run.{name}": tensor for name, tensor in (run or {}).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.write(path, tensors, {"format": FORMAT, "about": json.dumps(dict(about))})
    except OSError as error:
        raise UserError(
            f"cannot write the checkpoint {path}: {error.strerror or error}. Free space there or choose another "
            "--out; checkpoints written before are kept."
        ) from error


def read_about(path: Path) -> dict[str, Any]:
    """What was saved about a checkpoint, after checking that the file is whole."""
    with opened(path) as file:
        return _about(file)


def load_model(path: Path, model: nn.Module, rows: Rows | None = None) -> dict[str, Any]:
    """Loads the model's part of a checkpoint, strictly, and returns what was saved about it.

    ``rows`` is the store that took the model's exact tables, if one did.
    """
    with opened(path) as file:
        about = _about(file)
        _load_model(file, model, rows, optimizer=False)
    return about


def load_training(
    path: Path, model: nn.Module, dense: torch.optim.Optimizer, rows: Rows
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Loads everything in place; returns what was saved about it and the run's own tensors."""
    with opened(path) as file:
        about = _about(file)
        _load_model(file, model, rows, optimizer=True)
        for name, tensor in _optimizer_tensors(model, dense):
            rows.device.write(tensor, _of_shape(file, f"dense_optimizer.{name}", tensor))
        run = {n.removeprefix("run."): file.tensor(n) for n in file.names if n.startswith("run.")}
    return about, run


def _about(file: TensorFile) -> dict[str, Any]:
    if file.about.get("format") != FORMAT:
        raise UserError(f"{file.path} is not a checkpoint of this version ({FORMAT})")
    about: dict[str, Any] = json.loads(file.about["about"])
    return about


def _load_model(file: TensorFile, model: nn.Module, rows: Rows | None, optimizer: bool) -> None:
    state = model.state_dict()
    names = {*state, *(rows.names if rows else ())}
    saved = {n.removeprefix("model.") for n in file.names if n.startswith("model.")}
    if names != saved:
        name = min(names ^ saved)
        side = "the checkpoint" if name in saved else "the model"
        raise UserError(
            f"{file.path} is of another model: only {side} has {name}. Use the configuration that it was written with."
        )
    loaded = {name: _of_shape(file, f"model.{name}", tensor) for name, tensor in state.items()}
    if rows is None:
        model.load_state_dict(loaded)
        return
    rows.load_from(file, optimizer)
    for name, tensor in model.state_dict(keep_vars=True).items():
        rows.device.write(tensor, loaded[name])


def _of_shape(file: TensorFile, name: str, tensor: Tensor) -> Tensor:
    found = file.tensor(name)
    if found.shape != tensor.shape and found.numel() == tensor.numel() == 1:
        found = found.view(tensor.shape)  # step counts have a dimension where a step is a graph, and none elsewhere
    if found.shape != tensor.shape:
        raise UserError(
            f"{file.path} is of another model: {name} is {list(found.shape)} there, {list(tensor.shape)} here. Use "
            "the configuration and the data that it was written with."
        )
    return found


def _optimizer_tensors(model: nn.Module, dense: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in dense.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{name}.{key}", value
