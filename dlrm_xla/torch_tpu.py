"""One TPU chip by Google's torch_tpu, for torch 2.11 to 2.15: a step's operations run one by one."""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor

from dlrm_xla.device import HOST_GENERATOR, Counters, Device, RowAccess, as_it_is, parts, write
from dlrm_xla.errors import UserError
from dlrm_xla.ids import divide_ids, filled, places


def open_torch_tpu() -> Device:
    """A UserError says what is missing."""
    if importlib.util.find_spec("torch_tpu") is None:
        raise UserError(
            "--device tpu needs torch_tpu, which is not installed: on a TPU host, pip install torch_tpu in an "
            "environment without the extras xla and distributed, for they pin torch 2.9.0 and it takes torch 2.11 to "
            "2.15. Or use --device xla."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tcmalloc is not preloaded, that its device names are experimental
            importlib.import_module("torch_tpu")
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            if accelerator is None or accelerator.type != "tpu":
                raise UserError(
                    "--device tpu: torch_tpu is installed, but it finds no TPU here. Run on a TPU host, and let no "
                    "other process hold the chip; or use --device cpu."
                )
            found = torch.tpu.get_device_properties()  # type: ignore[attr-defined]
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"--device tpu: torch_tpu does not open with torch {torch.__version__}: {error}. It takes torch 2.11 to "
            "2.15, in an environment without torch_xla."
        ) from error
    device = torch.device("tpu")
    return Device(
        "tpu",
        device,
        f"{found.name} by torch_tpu, one chip",
        lambda m: m.to(device),
        as_it_is,
        torch.accelerator.synchronize,
        Counters,
        ROWS,
        ROWS,
        0.9 * found.total_memory,
        parts,
        HOST_GENERATOR,
        lambda m: m.to(device),
        lambda t: t.to(device, non_blocking=True),
        write,
        capturable=True,
    )


def _line_gather(array: Tensor, ids_N: Tensor, dim: int) -> Tensor:
    pack = 1 if array.dim() == 1 else array.shape[1] // dim
    if pack == 1:
        rows_NW = array.index_select(0, ids_N)
        return rows_NW if array.dim() == 1 else rows_NW[:, :dim]
    lines_NPD = array.index_select(0, divide_ids(ids_N, pack))[:, : pack * dim].view(-1, pack, dim)
    return torch.where(places(ids_N % pack, pack).unsqueeze(2), lines_NPD, 0).sum(1)


def _lines(values_ND: Tensor, place_N: Tensor, pack: int) -> Tensor:
    """Rows at their places in lines that are zero beside them, [N, pack D]."""
    return torch.where(places(place_N, pack).unsqueeze(2), values_ND.unsqueeze(1), 0).view(len(values_ND), -1)


def _line_scatter(array: Tensor, ids_N: Tensor, values: Tensor, add: bool) -> None:
    """Adds whole lines in torch's own operations; static shapes, so what is past the end becomes a sum with zero."""
    if array.dtype != torch.float32:
        raise UserError(f"rows and states are float32 on --device tpu, not {array.dtype}: row_precision, row_state")
    dim = values.shape[1] if values.dim() > 1 else 1
    pack = array.numel() // len(array) // dim
    inside_N = ids_N < len(array) * pack
    ids_N = ids_N.clamp(max=len(array) * pack - 1)
    if not add:  # a line may hold several of the rows, so what is added is the change
        values = values - _line_gather(array, ids_N, dim)
    values = torch.where(inside_N if values.dim() == 1 else inside_N.unsqueeze(1), values, 0)
    if pack > 1:
        values = _lines(values, ids_N % pack, pack)
    array.index_add_(0, divide_ids(ids_N, pack) if pack > 1 else ids_N, filled(values, array))


ROWS = RowAccess("a TPU", _line_gather, _line_scatter, static_shapes=True, lanes=128, rounds_matmul=True)
