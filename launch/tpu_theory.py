#!/usr/bin/env python
"""Checks the statements of docs/tpu.md against libtpu's compiler and draws them. Needs the extra tpu-compiler.

    launch/tpu_theory.py                    all parts, some ten minutes: docs/tpu.json and docs/tpu.png
    launch/tpu_theory.py --parts storage    one part; the others stay as they are in the file

Every figure is the compiler's or arithmetic: nothing here was measured on a TPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tpu_plot import draw

from dlrm_xla.presets import KAGGLE_ROWS, MLPERF_V2_ROWS, TERABYTE_ROWS
from dlrm_xla.tpu import CHIPS, find_chip, storage_bytes

DOCS = Path(__file__).parent.parent / "docs"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int32": torch.int32}
IDS = 26 * 2048  # of a step of the kaggle preset at batch 2048
LINES = 4_220_323  # its tables, 8 rows of 16 to a line


def preset_shapes() -> list[tuple[int, int]]:
    """Every table of the presets and all of one preset stacked, at widths 16 and 128, packed to 128 lanes and not."""
    rows = {*KAGGLE_ROWS, *TERABYTE_ROWS, *MLPERF_V2_ROWS}
    rows |= {sum(KAGGLE_ROWS), sum(TERABYTE_ROWS), sum(MLPERF_V2_ROWS)}
    return [shape for n in sorted(rows) for shape in ((n, 16), (-(-n // 8), 128), (n, 128))]


def grid_shapes() -> list[tuple[int, ...]]:
    """Edges of tiles in none to four dimensions."""
    edges = (1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 64, 100, 127, 128, 129, 200, 257, 1000)
    shapes: list[tuple[int, ...]] = [(), *((n,) for n in (*edges, 255, 256, 511, 513, 1023, 1025, 4097, 100_003))]
    shapes += [(a, b) for a in edges for b in edges]
    few = (1, 2, 3, 5, 8, 9, 26, 128, 130)
    shapes += [(a, b, c) for a in few for b in few for c in few]
    return shapes + [(2, a, b, c) for a in (3, 9) for b in few for c in few]


def storage() -> dict[str, Any]:
    """The bytes of arguments, by the compiler and by the model."""
    import jax.numpy as jnp
    from tpu_programs import compile_for

    checked: dict[str, Any] = {}
    for chip in CHIPS.values():
        wrong, count = [], 0
        for name, dtype in TYPES.items():
            shapes = grid_shapes()
            for start in range(0, len(shapes), 150):
                part = shapes[start : start + 150]
                program = compile_for(chip, lambda *arrays: arrays[0], [(shape, jnp.dtype(name)) for shape in part])
                count += len(part)
                if program.argument_bytes != sum(storage_bytes(shape, dtype) for shape in part):
                    wrong.append([name, start])
        tables = [(s, n) for s in preset_shapes() for n in ("float32", "bfloat16", "int8")]
        too_large = 0
        facts = []
        for shape, name in tables:
            expected = storage_bytes(shape, TYPES[name])
            if expected > 0.9 * chip.hbm_bytes:
                too_large += 1
                continue
            found_bytes = compile_for(chip, lambda a: a[0, 0], [(shape, jnp.dtype(name))]).argument_bytes
            facts.append([list(shape), name, found_bytes])
            if found_bytes != expected:
                wrong.append([name, shape, found_bytes])
        checked[chip.name] = {"grid": count, "tables": len(facts), "too_large": too_large, "wrong": wrong}
        if chip.name == "v5e":
            checked["facts"] = facts
        print(chip.name, checked[chip.name], flush=True)
    return checked


def programs() -> dict[str, Any]:
    """What the compiled lookups and updates of one array do for each row."""
    import jax.numpy as jnp
    import tpu_programs
    from tpu_programs import compile_for

    from dlrm_xla.xla_kernels import update_lines

    tpu_programs.read_kernels()
    ids = ((IDS,), jnp.int32)

    def gather(table: Any, ids_N: Any) -> Any:
        return jnp.take(table, ids_N, axis=0, mode="clip")

    def update(is_sorted: bool) -> Callable[..., Any]:
        return lambda table, ids_N, values: table.at[ids_N].add(
            values, indices_are_sorted=is_sorted, unique_indices=True, mode="drop"
        )

    def by_kernel(table: Any, ids_N: Any, values: Any) -> Any:
        return update_lines(table, jnp.full((1,), IDS, jnp.int32), ids_N, values)

    result: dict[str, Any] = {}
    for chip in CHIPS.values():
        cases: dict[str, Any] = {"lookup float32 128": (gather, ((LINES, 128), jnp.float32), False)}
        if chip.name in ("v5e", "v6e"):
            cases["lookup float32 256"] = (gather, ((LINES // 2, 256), jnp.float32), False)
            cases["lookup bfloat16 128"] = (gather, ((LINES, 128), jnp.bfloat16), False)
            cases["lookup float32 16"] = (gather, ((LINES, 16), jnp.float32), False)
            cases["lookup float32 64"] = (gather, ((LINES, 64), jnp.float32), False)
        cases["update float32 128"] = (update(False), ((LINES, 128), jnp.float32), True)
        if chip.name != "v4":  # not tried there
            cases["update float32 128 kernel"] = (by_kernel, ((LINES, 128), jnp.float32), True)
        cases["update float32 128 sorted"] = (update(True), ((LINES, 128), jnp.float32), True)
        for name, (function, table, writes) in cases.items():
            values = [((IDS, table[0][1]), jnp.float32)] if writes else []
            program = compile_for(chip, function, [table, ids, *values], [0] if writes else [])
            kernels = [k for k in program.kernels if re.match("gather|scatter|update_lines", k.name)]
            result[f"{chip.name} {name}"] = {
                "counted_bytes": program.bytes_accessed,
                "known_cycles": sum(program.cycles.values()),
                "kernels": [vars(k) for k in kernels],
            }
            print(chip.name, name, [(k.issued, k.copied_bytes) for k in kernels], flush=True)
    return result


def on_chip() -> dict[str, Any]:
    """Bundles issued for each row of a table that the chip's own memory holds."""
    import jax.numpy as jnp
    import tpu_programs
    from tpu_programs import compile_for

    tpu_programs.read_kernels()

    def gather(table: Any, ids_N: Any) -> Any:
        return jnp.take(table, ids_N, axis=0, mode="clip")

    def update(table: Any, ids_N: Any, values: Any) -> Any:
        return table.at[ids_N].add(values, mode="drop")

    result: dict[str, Any] = {}
    for chip in CHIPS.values():
        if chip.name == "tpu7x":  # whose SparseCores take what is large, and show no program
            continue
        for lines, rows in ((1_070, 28_672), (8_960, 28_672), (71_162, 43_008), (5_925, 589_824)):
            shapes = [((lines, 128), jnp.float32), ((rows,), jnp.int32), ((rows, 128), jnp.float32)]
            for name, function, given, donated in (("lookup", gather, shapes[:2], []), ("update", update, shapes, [0])):
                program = compile_for(chip, function, given, donated)
                kernels = [k for k in program.kernels if re.match("gather|scatter|sort", k.name)]
                per_row = {k.name: round(k.issued / rows, 2) for k in kernels if k.issued > rows / 4}
                result[f"{chip.name} {name} {lines} {rows}"] = per_row
                print(chip.name, name, lines, rows, per_row, flush=True)
    return result


def blocks() -> dict[str, Any]:
    """Kernels that look up and add blocks of two dimensions, and columns; loops that go by data count as one turn."""
    import jax.numpy as jnp
    import tpu_programs
    from tpu_programs import compile_for

    tpu_programs.read_kernels()

    def gather(axis: int) -> Callable[..., Any]:
        return lambda array, ids_N: jnp.take(array, ids_N, axis=axis, mode="clip")

    def add(array: Any, ids_N: Any, values: Any) -> Any:
        return array.at[ids_N].add(values)

    cases: list[tuple[str, Callable[..., Any], tuple[int, ...], int]] = [
        ("lookup", gather(0), (342, 116, 928), 448),
        ("lookup", gather(0), (144, 128, 1024), 263),
        ("lookup", gather(0), (66, 48, 256), 189),
        ("columns", gather(1), (2048, 729), 351),
        ("columns", gather(1), (32_768, 729), 351),
        ("update", add, (342, 128, 1024), 448),
        ("update", add, (66, 48, 256), 189),
    ]
    result: dict[str, Any] = {}
    for chip in CHIPS.values():
        for name, function, shape, count in cases:
            shapes = [(shape, jnp.float32), ((count,), jnp.int32)]
            values = [((count, *shape[1:]), jnp.float32)] if name == "update" else []
            program = compile_for(chip, function, [*shapes, *values], [0] if values else [])
            kernels = [vars(k) for k in program.kernels if re.match("gather|scatter", k.name)]
            what = f"{chip.name} {name} {'x'.join(map(str, shape))} {count}"
            result[what] = kernels
            print(what, [(k["issued"], k["loops"]) for k in kernels], flush=True)
    return result


def one_hot() -> dict[str, Any]:
    """Cycles of a one-hot product over the rows of a table."""
    import jax.numpy as jnp
    from tpu_programs import compile_for

    def product(table_RD: Any, ids_N: Any) -> Any:
        hot_NR = (ids_N[:, None] == jnp.arange(table_RD.shape[0], dtype=ids_N.dtype)).astype(table_RD.dtype)
        return jnp.dot(hot_NR, table_RD, preferred_element_type=jnp.float32)

    result: dict[str, Any] = {}
    for chip in CHIPS.values():
        for dim in (16, 48, 128, 384):
            for rows in (128, 512, 2048, 8192, 32768):
                program = compile_for(chip, product, [((rows, dim), jnp.float32), ((2048,), jnp.int32)])
                result[f"{chip.name} {dim} {rows}"] = sum(program.cycles.values())
        print(chip.name, {k: v for k, v in result.items() if k.startswith(chip.name)}, flush=True)
    return result


FAMILIES = [
    "exact", "hash_rows:rows=1000", "quotient_remainder", "tensorly_tt:rank=16", "tensorly_cp:rank=64",
    "low_rank:rank=4", "random_projection:dim=4", "robe", "dhe", "matmul_codes",
]  # fmt: skip


def families() -> dict[str, Any]:
    """Storage and cycles of one lookup of 4096 ids in one bag of 16 columns, by family and rows."""
    import torch_xla  # noqa: F401  (before jax)
    import torch_xla.core.xla_builder as builder
    import torch_xla.core.xla_model as xm
    from tpu_programs import compile_stablehlo

    from dlrm_xla.codebooks import most_rows, multiply_codebooks
    from dlrm_xla.contract import Table
    from dlrm_xla.devices import open_device
    from dlrm_xla.lookup import pool
    from dlrm_xla.registry import compose, parse
    from dlrm_xla.row_lines import lines_of

    device = open_device("xla")

    class Packed(torch.nn.Module):
        """The exact table as the row store lays it out on a TPU."""

        def __init__(self, table: Table) -> None:
            super().__init__()
            self.table = table
            shape = lines_of(table.num_rows, table.dim, replace(device.rows, lanes=128), "sparse")
            self.weight = torch.nn.Parameter(torch.empty(shape))

        def forward(self, ids_BL: torch.Tensor, weights_BL: torch.Tensor) -> torch.Tensor:
            rows_ND = device.rows.gather(self.weight, ids_BL.reshape(-1), self.table.dim)
            return pool(rows_ND, weights_BL, [ids_BL.shape[1]])[:, 0]

    result: dict[str, Any] = {}
    for spec in FAMILIES:
        for rows in (10**4, 10**6, 10**8):
            try:
                with torch.device("meta"):
                    bag = compose(parse("" if spec == "exact" else spec), Packed)(Table("t", rows, 16)).eval()
                multiply_codebooks(bag, most_rows(device.planned, 4096))
                held = dict(bag.named_parameters()) | dict(bag.named_buffers())
                placed = {n: builder.create_placeholder_tensor(tuple(t.shape), t.dtype) for n, t in held.items()}
                ids_BL = builder.create_placeholder_tensor((4096, 1), torch.int32)
                weights_BL = builder.create_placeholder_tensor((4096, 1), torch.float32)
                with torch.no_grad():
                    out = torch.func.functional_call(bag, placed, (ids_BL, weights_BL))
                artifact = xm.get_stablehlo_bytecode([out])
            except Exception as error:  # a family that cannot be built or traced on shapes alone is listed as such
                result[f"{spec} {rows}"] = {"error": f"{type(error).__name__}: {error}"[:200]}
                print(spec, rows, error, flush=True)
                continue
            for name in ("v5e", "v6e"):
                try:
                    result[f"{name} {spec} {rows}"] = compile_stablehlo(find_chip(name), artifact)
                except Exception as error:
                    result[f"{name} {spec} {rows}"] = {"error": str(error)[:200]}
                print(name, spec, rows, result[f"{name} {spec} {rows}"], flush=True)
    return result


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "storage": storage,
    "programs": programs,
    "on_chip": on_chip,
    "blocks": blocks,
    "one_hot": one_hot,
    "families": families,
}


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=DOCS / "tpu.json", help="the plot goes beside it, as .png")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if len(options.parts) > 1:  # libtpu reads its settings once in a process
            subprocess.run([sys.executable, __file__, "--parts", part, "--out", options.out], check=True)
            continue
        found = PARTS[part]()
        whole = json.loads(options.out.read_text()) if options.out.exists() else {}
        whole[part] = found
        options.out.write_text("{" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in whole.items()) + "}\n")
        if whole.keys() >= PARTS.keys():
            draw(whole, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
