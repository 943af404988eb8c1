"""Reads and writes rows of large arrays on xla: `RowAccess` there, by operations of XLA that torch has no name for."""

from __future__ import annotations

from typing import Any

import torch
import torch_xla.core.xla_builder as builder
import torch_xla.core.xla_op_registry as registry
from torch import Tensor

from dlrm_xla.ids import divide_ids, filled, places


def gather(array: Tensor, ids_N: Tensor, dim: int) -> Tensor:
    """Rows [N, dim], or [N] of an array [R]."""
    pack = 1 if array.dim() == 1 else array.shape[1] // dim
    if pack == 1:
        rows_NW = array.index_select(0, ids_N)
        return rows_NW if array.dim() == 1 else rows_NW[:, :dim]
    line_N, place_N = _line_and_place(ids_N, pack)
    lines_NPD = array.index_select(0, line_N)[:, : pack * dim].view(-1, pack, dim)
    return torch.where(places(place_N, pack).unsqueeze(2), lines_NPD, 0).sum(1)


def scatter(array: Tensor, ids_N: Tensor, values: Tensor, add: bool) -> None:
    """Writes rows in place, or adds to them.

    Of packed rows it adds whole lines, zero beside the row, on a TPU (libtpu 0.0.42, 53,248 rows of 16 of the `kaggle`
    preset) 3.5M bundles on v5e, 3.6M in bfloat16; windows of a line become a loop that takes 488M cycles. That indices
    are sorted is not said: told so, the program copies the whole table.

    Of bfloat16 a sum is rounded, so two are added: what the first leaves is exact. It leaves r, the multiple of some
    2^k nearest to a value v, and either r = 0 or r/2 <= v <= 2r, where v - r is exact (Sterbenz 1974, theorem 4.3.1).
    """
    pack = 1 if array.dim() == 1 else array.shape[1] // values.shape[1]
    if pack == 1:
        values = filled(values, array)
        array.copy_(_SCATTER(array, ids_N.unsqueeze(1), values.to(array.dtype), add=add))
        return
    line_N, place_N = _line_and_place(ids_N, pack)
    place_NP1 = places(place_N, pack).unsqueeze(2)
    for _ in range(1 if add or array.dtype == torch.float32 else 2):
        added = values
        if not add:  # a line may hold several of the rows, so what is added is the change
            added = values - gather(array, ids_N.clamp(max=len(array) * pack - 1), values.shape[1]).float()
        lines_NW = torch.where(place_NP1, added.unsqueeze(1), 0).view(len(ids_N), -1).to(array.dtype)
        array.copy_(_SCATTER(array, line_N.unsqueeze(1), filled(lines_NW, array), add=True))


def bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``Tensor.view(dtype)``, which torch_xla 2.9 cannot trace."""
    read: Tensor = _BITS[dtype](tensor)
    return read


def _line_and_place(ids_N: Tensor, pack: int) -> tuple[Tensor, Tensor]:
    """floor(ids / pack) and what is left, also of ids below 0."""
    if pack & (pack - 1):
        return divide_ids(ids_N, pack), ids_N % pack
    place_N = ids_N.bitwise_and(pack - 1)
    return _DIVIDE(ids_N - place_N, by=pack), place_N


def _lower_scatter(array: Any, at: Any, values: Any, *, add: bool) -> Any:
    scalar = array.shape().as_scalar()
    combine = builder.Op.make_computation("Combine", (lambda a, b: a + b) if add else (lambda a, b: b), (scalar,) * 2)
    return array.scatter(
        at,
        values,
        combine,
        update_window_dims=tuple(range(1, values.shape().rank)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=tuple(range(at.shape().sizes[1])),
        index_vector_dim=1,
        indices_are_sorted=False,
        unique_indices=not add,
    )


def _lower_divide(multiples: Any, *, by: int) -> Any:
    # By a number in the graph, which XLA makes a shift; torch_xla divides by an argument of the graph.
    return multiples / builder.Op.scalar(multiples.builder(), by, dtype=multiples.shape().dtype)


_SCATTER = registry.register("scatter_rows", _lower_scatter)
_DIVIDE = registry.register("divide_multiples", _lower_divide)
_BITS = {
    torch.int32: registry.register("bits_as_int32", lambda values: values.bitcast("s32")),
    torch.float32: registry.register("bits_as_float32", lambda values: values.bitcast("f32")),
}
