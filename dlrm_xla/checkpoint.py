"""Checkpoints: one safetensors file of the model, the optimizers and where the run stands. Never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlrm_xla.errors import UserError
from dlrm_xla.row_store import RowStore

FORMAT = "dlrm_xla checkpoint 1"


def save(
    path: Path,
    model: nn.Module,
    dense: torch.optim.Optimizer,
    rows: RowStore,
    about: Mapping[str, Any],
) -> None:
    """Writes a checkpoint under a new name, syncs it and renames it, so a file of that name is always whole."""
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v.detach() for k, v in model.state_dict().items()}
    tensors |= {f"model.{k}": v for k, v in rows.tables()}
    for index, state in dense.state_dict()["state"].items():
        tensors |= {f"dense_optimizer.{index}.{k}": v.detach() for k, v in state.items() if isinstance(v, Tensor)}
    tensors |= {f"row_optimizer.{k}": v for k, v in rows.state_dict().items()}
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        save_file(
            {k: v.to("cpu").contiguous() for k, v in tensors.items()},
            unfinished,
            metadata={"format": FORMAT, "about": json.dumps(dict(about))},
        )
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except Exception as error:  # safetensors wraps the system's errors in its own
        unfinished.unlink(missing_ok=True)
        raise UserError(
            f"cannot write the checkpoint {path}: {error}. Free space there or choose another --out."
        ) from error


def load_model(path: Path, model: nn.Module, rows: RowStore | None = None) -> dict[str, Any]:
    """Loads the model's part of a checkpoint, strictly, and returns what was saved about it.

    ``rows`` is the store that took the model's exact tables, if one did.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a checkpoint of this version ({FORMAT})")
            state = {k.removeprefix("model."): file.get_tensor(k) for k in file.keys() if k.startswith("model.")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}") from error
    if rows is not None:
        rows.load_tables({name: state.pop(name) for name in rows.names})
    model.load_state_dict(state)
    about: dict[str, Any] = json.loads(metadata["about"])
    return about
