"""An update of rows on a TPU by asynchronous copies: a kernel in Pallas, and how torch_xla calls it.

XLA's scatter moves the whole table or eight lines a row (docs/tpu.md, statement 4); this moves one line each way. It
needs jax, and a libtpu that reads what that jax writes: jax 0.10.2 and libtpu 0.0.42, the extra tpu-compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from torch import Tensor

_UNROLL = 16
_array_of: Any = jax.ShapeDtypeStruct  # jax gives it no types
# Half of the bundles issued are bounds checks otherwise. Ids are checked on the host, before a step.
_OPTIONS = pltpu.CompilerParams(disable_bounds_checks=True)


def update_lines(
    array: jax.Array,
    count: jax.Array,
    ids_N: jax.Array,
    values: jax.Array,
    *,
    block: int = 512,
    interpret: bool = False,
) -> jax.Array:
    """array[ids_N[:count]] += values[:count], in place: [R, W], int32 [1], int32 [N], [N, W] -> [R, W].

    W is a multiple of 128 and N of ``block``. A block of lines is read, added to and written before the next; copies
    within it run in any order, so the ids must differ.
    """

    def kernel(
        count_ref: Any, ids_ref: Any, values_ref: Any, _: Any, array_ref: Any, lines: Any, semaphore: Any
    ) -> None:
        base = pl.program_id(0) * block
        left = count_ref[0] - base

        def read(i: Any) -> Any:
            return pltpu.make_async_copy(array_ref.at[pl.ds(ids_ref[base + i], 1)], lines.at[pl.ds(i, 1)], semaphore)

        def write(i: Any) -> Any:
            return pltpu.make_async_copy(lines.at[pl.ds(i, 1)], array_ref.at[pl.ds(ids_ref[base + i], 1)], semaphore)

        @pl.when(left >= block)
        def _whole() -> None:
            everything: Any = pltpu.make_async_copy(array_ref.at[pl.ds(0, block)], lines, semaphore)
            _start_all(block, read)
            everything.wait()
            lines[...] += values_ref[...]
            _start_all(block, write)
            everything.wait()

        @pl.when((left > 0) & (left < block))
        def _rest() -> None:
            lax.fori_loop(0, left, lambda i, _: read(i).start(), None)
            lax.fori_loop(0, left, lambda i, _: read(i).wait(), None)
            lines[...] += values_ref[...]
            lax.fori_loop(0, left, lambda i, _: write(i).start(), None)
            lax.fori_loop(0, left, lambda i, _: write(i).wait(), None)

    width = array.shape[1]
    call: Callable[..., jax.Array] = pl.pallas_call(
        kernel,
        out_shape=_array_of(array.shape, array.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(ids_N) // block,),
            in_specs=[pl.BlockSpec((block, width), lambda i, *_: (i, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.VMEM((block, width), array.dtype), pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={3: 0},
        compiler_params=_OPTIONS,
        name="update_lines",
        interpret=interpret,
    )
    return call(count, ids_N, values, array)


def _start_all(number: int, copy: Callable[[Any], Any]) -> None:
    def some(i: Any, _: None) -> None:
        for k in range(_UNROLL):
            copy(i * _UNROLL + k).start()

    lax.fori_loop(0, number // _UNROLL, some, None)


def call_update_lines(array: Tensor, count: Tensor, ids_N: Tensor, values: Tensor) -> Tensor:
    """`update_lines` of torch_xla's tensors.

    torch_xla's own call of such kernels cannot say that the result is its operand; a computation made from jax's HLO
    does.
    """
    import torch_xla

    shapes = tuple(tuple(t.shape) for t in (array, count, ids_N, values))
    return torch_xla._XLAC._xla_user_computation(  # type: ignore[no-any-return]
        "xla::update_lines", [array, count, ids_N, values], _computation(shapes)
    )[0]


@functools.lru_cache
def _computation(shapes: tuple[tuple[int, ...], ...]) -> Any:
    import torch_xla.core.xla_builder as builder

    types = (jnp.float32, jnp.int32, jnp.int32, jnp.float32)
    arguments = [_array_of(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]
    lowered = jax.jit(update_lines).trace(*arguments).lower(lowering_platforms=("tpu",))
    return builder.computation_from_module_proto(
        "update_lines", lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
    )
