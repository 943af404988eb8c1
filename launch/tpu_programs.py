"""Compiles jax functions for TPU chips that are not there, and reads what the compiled program does.

The compiler gives no cycles for gathers, scatters and custom calls, and counts their bytes by rule of thumb. So the
program itself is read: libtpu writes the final bundles (one bundle is issued a cycle) of each kernel to a folder.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dlrm_xla.tpu import CHIPS, LINE_BYTES, Chip

# Read when jax and libtpu are loaded: no metadata server to ask, no TPU to lock.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

Shape = tuple[tuple[int, ...], Any]
_folder: tempfile.TemporaryDirectory[str] | None = None


def read_kernels() -> None:
    """Makes libtpu write kernels for `compile_for` to read; before the first compile. They take it some 5 s each."""
    global _folder
    _folder = tempfile.TemporaryDirectory(prefix="tpu_programs")
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={_folder.name} --xla_jf_dump_llo_text=true"


@dataclass
class Kernel:
    """A kernel's final bundles, loops multiplied out.

    ``issued`` is the number of bundles issued, a lower figure of its cycles: waiting for copies is not in it.
    ``copies`` counts copies from and to HBM, ``copied_bytes`` their bytes where the size is a constant,
    ``largest_copy`` the largest's. ``loops`` has bundles and turns, None where these depend on data; such a loop is
    counted once everywhere.
    """

    name: str
    issued: int
    copies: dict[str, int] = field(default_factory=dict)
    copied_bytes: dict[str, int] = field(default_factory=dict)
    loops: list[tuple[int, int | None]] = field(default_factory=list)
    largest_copy: int = 0


@dataclass
class Program:
    """What the compiler says: argument and temporary bytes, bytes accessed, estimated cycles by operation, layouts."""

    argument_bytes: int
    temporary_bytes: int
    bytes_accessed: float
    cycles: dict[str, int]
    kernels: list[Kernel]
    layouts: list[str]
    hlo: str

    def kernel(self, *names: str) -> Kernel:
        """The kernel whose name starts with one of these."""
        return next(k for k in self.kernels if k.name.startswith(names))


@lru_cache
def device_of(name: str) -> Any:
    """A device of the chip's topology, known to the compiler alone."""
    chip = CHIPS[name]
    options = {} if chip.chip_config == "default" else {"chip_config_name": chip.chip_config}
    return topologies.get_topology_desc(platform="tpu", topology_name=chip.topology, **options).devices[0]


def compile_for(
    chip: Chip, function: Callable[..., Any], shapes: Sequence[Shape], donated: Sequence[int] = ()
) -> Program:
    """Compiles ``function`` of arrays of these shapes and types."""
    if _folder:
        for path in Path(_folder.name).iterdir():
            path.unlink()
    sharding = SingleDeviceSharding(device_of(chip.name))
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]
        for shape, dtype in shapes
    ]
    compiled = jax.jit(function, donate_argnums=tuple(donated), keep_unused=True).lower(*arguments).compile()
    memory, cost, hlo = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None
    assert cost is not None
    assert hlo is not None
    found = re.search(r"entry_computation_layout=\{\((.*?)\)->", hlo)
    cycles = {
        name: int(number)
        for name, number in re.findall(r'%(\S+) = .*estimated_cycles":"(\d+)"', hlo)
        if int(number) < 2**62  # what runs on a SparseCore has no estimate, but a number that means none
    }
    return Program(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        cost.get("bytes accessed", 0.0),  # not there where a custom call is all
        cycles,
        [read_kernel(path, chip) for path in sorted(Path(_folder.name).glob("*-final_bundles.txt"))] if _folder else [],
        re.findall(r"\w+\[[\d,]*\]\{[^}]*\}", found[1]) if found else [],
        hlo,
    )


def compile_stablehlo(chip: Chip, artifact: bytes) -> dict[str, Any]:
    """Compiles what torch_xla traced: bytes of its arguments, known cycles, and the operations that have none."""
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client  # type: ignore[attr-defined]
    from jaxlib.mlir.dialects import stablehlo

    device = device_of(chip.name)
    with mlir.make_ir_context() as context:
        module = stablehlo.deserialize_portable_artifact(context, artifact)
        options = compiler.get_compile_options(
            num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]])
        )
        compiled = device.client.compile(module, xla_client.DeviceList((device,)), options)
    hlo = compiled.hlo_modules()[0].to_string()
    entry = hlo[hlo.index("\nENTRY") :]
    numbers = [int(n) for n in re.findall(r'estimated_cycles":"(\d+)"', entry)]
    uncovered = [
        line.strip().split(" ")[0].removeprefix("ROOT ")
        for line in entry.splitlines()
        if re.search(r" (fusion|custom-call|sort)\(", line) and "estimated_cycles" not in line
    ]
    memory = compiled.get_compiled_memory_stats()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "known_cycles": sum(n for n in numbers if n < 2**62),
        "uncovered": len(uncovered),
    }


def _slots_after(bundles: Sequence[str]) -> int:
    """How many bundles behind a branch are issued before it is taken: up to four, to where its region ends."""
    return next((k for k, bundle in enumerate(bundles) if "End region" in bundle), 0)


def read_kernel(path: Path, chip: Chip) -> Kernel:
    """Reads a kernel's final bundles."""
    text = path.read_text()
    granule = LINE_BYTES if chip.name == "v4" else 32  # what sizes of copies are given in
    bundles: list[str] = []
    for line in text.splitlines():
        if re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?\s*:", line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += "\n" + line
    starts = {region: i for i, bundle in enumerate(bundles) for region in re.findall(r"Start region (\d+)", bundle)}
    loops: list[tuple[int, int, int | None]] = []
    for branch, bundle in enumerate(bundles):
        for region in re.findall(r"sbr\.rel[^$]*target = \$region(\d+)", bundle):
            start = starts.get(region, len(bundles))
            if start <= branch:
                end = branch + _slots_after(bundles[branch : branch + 5])
                body = "\n".join(bundles[start : end + 1])
                turns = re.findall(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test", body)
                loops.append((start, end, int(turns[-1]) if turns else None))
    kernel = Kernel(
        re.sub(r"^\d+-|-\d+-final_bundles$", "", path.stem),
        0,
        loops=[(end - start + 1, turns) for start, end, turns in loops],
    )
    issued = 0
    for i, bundle in enumerate(bundles):
        times = 1
        for start, end, laps in loops:
            times *= laps or 1 if start <= i <= end else 1
        issued += times
        for kind, size in re.findall(r"(?<!for )%\w+ = dma\.(\w+)[^\n]*?size_in_granules=\*/([%\w]+)", bundle):
            kernel.copies[kind] = kernel.copies.get(kind, 0) + times
            if size.isdigit():
                moved = int(size) * granule
                kernel.copied_bytes[kind] = kernel.copied_bytes.get(kind, 0) + times * moved
                kernel.largest_copy = max(kernel.largest_copy, moved)
    kernel.issued = issued
    return kernel
