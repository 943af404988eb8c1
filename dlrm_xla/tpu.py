"""TPU chips, the bytes that an array takes on them, and the least time that a step can take.

Everything here is arithmetic: no TPU, no compiler. docs/tpu.md derives it and checks it against libtpu's compiler.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dlrm_xla.errors import UserError, choices

SUBLANES, LANES = 8, 128
# A sublane of 128 numbers of 32 bits: what one asynchronous copy of a row moves at least, for rows are tiled so.
LINE_BYTES = 4 * LANES


@dataclass(frozen=True)
class Chip:
    """What one device of a TPU topology is: a chip, or one of its two halves on a TPU7x.

    ``topology`` and ``chip_config`` are what `jax.experimental.topologies.get_topology_desc` wants for one host.
    ``hbm_bytes`` is what the compiler lets a program use, less than what is sold; ``hbm_bytes_per_second`` and
    ``bf16_flops`` are published peaks. ``clock_hz`` turns the compiler's cycles into time: published peak over the
    flops that all matrix units do in a cycle.
    ``link_bytes_per_second`` is what one link to a neighbour carries one way.
    """

    name: str
    topology: str
    hbm_bytes: int
    hbm_bytes_per_second: float
    bf16_flops: float
    clock_hz: float
    link_bytes_per_second: float
    tensor_cores: int
    chip_config: str = "default"
    devices_per_chip: int = 1

    @property
    def device(self) -> str:
        """What one device is, in words."""
        return "one chip" if self.devices_per_chip == 1 else f"one of a chip's {self.devices_per_chip} devices"


_GB, _GIB = 1e9, 2**30
# Peaks: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. TensorCores and matrix units:
# jax/_src/pallas/mosaic/tpu_info.py of jax 0.10.2. HBM: the figure in libtpu 0.0.42's error for a program that is too
# large. Flops a cycle and TensorCore: 4 units of 128 x 128 do 131,072; 2 units of 256 x 256 (v6e, 7x) do 524,288, two
# passes a cycle, for the compiler schedules 369,912 flops a cycle there and one pass would be 262,144. The clocks that
# follow for v4, v5e and v5p are the published ones (Jouppi et al. 2023, table 4; the scaling book, "TPUs"). Links: one
# way, the scaling book's table of the interconnect; Google's pages give a chip's ports together, 5 to 12 % more.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4:2x2x1", int(30.75 * _GIB), 1228 * _GB, 275e12, 1.05e9, 45 * _GB, 2, "megacore"),
        Chip("v5e", "v5e:2x2", int(15.75 * _GIB), 819 * _GB, 197e12, 1.5e9, 45 * _GB, 1),
        Chip("v5p", "v5p:2x2x1", int(95.74 * _GIB), 2765 * _GB, 459e12, 1.75e9, 90 * _GB, 2),
        Chip("v6e", "v6e:2x2", int(31.25 * _GIB), 1638 * _GB, 918e12, 1.75e9, 90 * _GB, 1),
        Chip("tpu7x", "tpu7x:2x2x1", int(94.75 * _GIB), 3690 * _GB, 1153.5e12, 2.2e9, 90 * _GB, 1, "default", 2),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of this name; a UserError lists them."""
    if name not in CHIPS:
        raise UserError(f"no chip {name!r}; {choices(name, CHIPS)}")
    return CHIPS[name]


class Slice(NamedTuple):
    """Devices of one kind: how many, their ``topology`` for `get_topology_desc`, and chips along each of its axes."""

    devices: int
    topology: str
    axes: tuple[int, ...]

    def exchange_seconds(self, chip: Chip, kind: str, bytes: int) -> float:
        """A collective over all devices; ``bytes`` are those of the array before it is cut, or after it is whole.

        n devices, each of which receives (n - 1) / n of the array, twice that for an all-reduce, through one link for
        each axis longer than one chip, for axes shorter than a pod's are no rings; and 1 us a hop along each axis. A
        collective-permute is one hop of its bytes. Overlap with other work is not in it.
        """
        links = sum(n > 1 for n in self.axes) * chip.link_bytes_per_second
        if kind == "collective-permute":
            return bytes / chip.link_bytes_per_second + _HOP_SECONDS
        rounds = 2 if kind == "all-reduce" else 1
        hops = sum(n - 1 for n in self.axes)
        return rounds * (bytes * (self.devices - 1) / self.devices / links + hops * _HOP_SECONDS)


_HOP_SECONDS = 1e-6
# Slices that the pages above list, by number of chips.
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


def find_slice(chip: Chip, chips: str) -> Slice:
    """The slice of this many chips, such as "16", or of a topology, such as "4x4"; a UserError lists the numbers.

    "1" is one device, which on a TPU7x is one of a chip's two.
    """
    family, _, one_host = chip.topology.partition(":")
    if chips == "1":
        return Slice(1, chip.topology, (1,))
    known = {str(n): shape for n, shape in (_FLAT if one_host.count("x") == 1 else _CUBES).items()}
    shape = known.get(chips, chips)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape) or shape.count("x") != one_host.count("x"):
        raise UserError(
            f"--chips {chips}: {chip.name} has slices of 1, {', '.join(known)} chips, or a topology as {one_host}"
        )
    axes = tuple(int(n) for n in shape.split("x"))
    return Slice(math.prod(axes) * chip.devices_per_chip, f"{family}:{shape}", axes)


class Layout(NamedTuple):
    """How the compiler lays out an argument: the dimensions along lanes and sublanes, sublanes a tile, bytes."""

    lanes: int
    sublanes: int
    tile: int
    bytes: int


def layout(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Layout:
    """The layout that libtpu chooses for an argument of at least two dimensions: of all, the one of fewest bytes.

    With p = 4 / itemsize numbers packed along the sublanes of a 32-bit word, a tile is s x 128 numbers, s the least
    power of two in [p, 8] that the sublane dimension fits, or 8. An array takes

        prod(other dimensions) ceil(sublane dimension / s) s ceil(lane dimension / 128) 128 itemsize

    bytes. Every ordered pair of dimensions may be the sublanes and lanes; row-major wins a tie. 64-bit numbers are two
    arrays of 32 bits.
    """
    word = min(dtype.itemsize, 4)
    pairs = sorted(
        itertools.permutations(range(len(shape)), 2), key=lambda pair: pair != (len(shape) - 2, len(shape) - 1)
    )
    found = []
    for sublanes, lanes in pairs:
        tile = min(SUBLANES, max(4 // word, _power_of_two(shape[sublanes])))
        rest = math.prod(n for d, n in enumerate(shape) if d not in (sublanes, lanes))
        padded = rest * _round_up(shape[sublanes], tile) * _round_up(shape[lanes], LANES)
        found.append(Layout(lanes, sublanes, tile, padded * dtype.itemsize))
    return min(found, key=lambda one: one.bytes)


def storage_bytes(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """Bytes of an argument in HBM, equal to the compiler's memory analysis (docs/tpu.md, statement 1).

    From two dimensions on those of its `layout`. One dimension is a row of tiles of min(1024, the least power of two
    that holds it) numbers, of 512 bytes at least; so is a number without a dimension.
    """
    if len(shape) > 1:
        return layout(shape, dtype).bytes
    numbers = math.prod(shape)
    tile = min(SUBLANES * LANES, max(LINE_BYTES // min(dtype.itemsize, 4), _power_of_two(numbers)))
    return _round_up(numbers, tile) * dtype.itemsize


def row_bytes(dim: int) -> int:
    """Bytes that the copy of one row moves at least: whole lines of 512.

    A row narrower than 128 shares its line with its neighbours, and so does, in types of 16 and 8 bits, a row of 128
    lanes with the one or three rows in the same 32-bit words: neither is moved for less than a line.
    """
    return -(-dim // LANES) * LINE_BYTES


@dataclass(frozen=True)
class Touched:
    """Rows of one width that a step looks up and updates.

    ``rows`` ids, ``states`` arrays of an optimizer as wide as the rows, ``row_states`` with one number a row;
    ``array_bytes`` and ``row_state_bytes`` those of the whole arrays, which a step need not move more than once.
    """

    rows: int
    dim: int
    states: int = 0
    row_states: int = 0
    array_bytes: float = math.inf
    row_state_bytes: float = math.inf

    @property
    def forward_bytes(self) -> float:
        """One reading of each row, or of the array."""
        return min(self.rows * row_bytes(self.dim), self.array_bytes)

    @property
    def step_bytes(self) -> float:
        """Each row read for the forward step, read and written by the update; state read and written.

        Where that is less, arrays are read and written whole, the rows' once for both.
        """
        rows = min(3 * self.rows * row_bytes(self.dim), 2 * self.array_bytes)
        states = 2 * self.states * min(self.rows * row_bytes(self.dim), self.array_bytes)
        return rows + states + 2 * self.row_states * min(self.rows * LINE_BYTES, self.row_state_bytes)


@dataclass(frozen=True)
class LowerBound:
    """The least that a step moves and multiplies, and the time of the slower of the two; they may overlap fully.

    For different ids: a row that is looked up twice is counted twice, and a step may move it once.
    """

    bytes: float
    flops: float
    memory_seconds: float
    matrix_seconds: float

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self.memory_seconds, self.matrix_seconds)


def lower_bound(
    chip: Chip,
    touched: Iterable[Touched],
    *,
    read_bytes: int = 0,
    written_bytes: int = 0,
    flops: float = 0,
    training: bool = True,
) -> LowerBound:
    """The least time of a step: max(bytes / HBM bandwidth, flops / peak).

    Besides the rows touched ``read_bytes`` are read once, those of the batch and of dense parameters and their state,
    and ``written_bytes`` of them written once. ``flops`` are those of products of matrices, 2 per multiplication and
    addition, at the bf16 peak, which is what a TPU gives float32 factors at default precision; where they are the
    compiler's, those of the program as it is written, one-hot products among them. Nothing else costs time: not the
    sorting of ids, the interaction's layout, or vector work.
    """
    moved = sum(t.step_bytes if training else t.forward_bytes for t in touched) + read_bytes + written_bytes
    return LowerBound(moved, flops, moved / chip.hbm_bytes_per_second, flops / chip.bf16_flops)


# Bundles that XLA's compiled lookup and update issue for each row of one line (launch/tpu_theory.py, libtpu 0.0.42),
# and those that each further line adds to a lookup, read for v5e and v6e: v4 and v5p have the figure of v5e. A chip of
# two TensorCores shares a lookup between them. A TPU7x looks up on its SparseCores, whose programs are not shown: the
# figures of v6e stand in. The lookup of v6e (5.0) and the update of v5p (103.7) are rounded down.
_LOOKUP_CYCLES = {"v4": 4.3, "v5e": 5.3, "v5p": 5.3, "v6e": 4.9, "tpu7x": 4.9}
_LINE_CYCLES = {"v4": 3.6, "v5e": 3.6, "v5p": 3.6, "v6e": 2.7, "tpu7x": 2.7}
_UPDATE_CYCLES = {"v4": 107, "v5e": 65, "v5p": 103, "v6e": 71, "tpu7x": 74.5}
# The same where the table is in the chip's own memory: 28,672 rows of 1,070 and 8,960 lines, 43,008 of 71,162 lines,
# which are brought there and sorted first (the sort is an operation of its own). Two TensorCores share v4 and v5p. Of
# TPU7x none was read: the figures are those of v6e.
_NEAR_LOOKUP_CYCLES = {"v4": 1.4, "v5e": 2.0, "v5p": 1.0, "v6e": 2.0, "tpu7x": 2.0}
_NEAR_LINE_CYCLES = 1.2  # of further lines: 351 columns of 2,048 numbers issue 1.19 a line on v5e and v6e
_NEAR_UPDATE_CYCLES = {"v4": 3.8, "v5e": 7.2, "v5p": 3.8, "v6e": 7.2, "tpu7x": 7.2}
_NEAR_SORTED_UPDATE_CYCLES = {"v4": 11.3, "v5e": 8.8, "v5p": 8.8, "v6e": 8.3, "tpu7x": 8.3}
# A kernel that scatters brings an array of up to so many bytes whole to the chip, by itself; of a larger one windows.
SCATTER_WINDOW_BYTES = {"v4": 15_831_040, "v5e": 15_831_040, "v5p": 15_831_040, "v6e": 32_190_464, "tpu7x": 32_190_464}
_SORT_CYCLES = {"v4": 1.9, "v5e": 2.3, "v5p": 0.6, "v6e": 1.0, "tpu7x": 1.0}


def lookup_seconds(chip: Chip, rows: int, dim: int) -> float:
    """XLA's gather of whole lines: the slower of issuing a copy for each row and of moving it in and out."""
    cores = chip.tensor_cores if chip.devices_per_chip == 1 else 1
    cycles = _LOOKUP_CYCLES[chip.name] + _LINE_CYCLES[chip.name] * (row_bytes(dim) // LINE_BYTES - 1)
    return max(rows * cycles / cores / chip.clock_hz, 2 * rows * row_bytes(dim) / chip.hbm_bytes_per_second)


def near_lookup_seconds(chip: Chip, rows: int, dim: int) -> float:
    """XLA's gather from a table in the chip's own memory: bundles issued for each line."""
    cycles = _NEAR_LOOKUP_CYCLES[chip.name]
    further = min(cycles, _NEAR_LINE_CYCLES) * (row_bytes(dim) // LINE_BYTES - 1)
    return rows * (cycles + further) / chip.clock_hz


def near_update_seconds(chip: Chip, rows: int, width: int, *, is_sorted: bool) -> float:
    """XLA's scatter into a table in the chip's own memory: bundles issued for each line, its ids sorted or not."""
    cycles = (_NEAR_SORTED_UPDATE_CYCLES if is_sorted else _NEAR_UPDATE_CYCLES)[chip.name]
    return rows * -(-width // 128) * cycles / chip.clock_hz


# Bundles of each block and of each vector register (8 x 128 numbers of 32 bits) of it: gathers and scatters of blocks
# of 12 and 128 registers on v4 to v6e issue 89 to 118 and 160 to 448 (launch/tpu_theory.py --parts blocks; turns of
# loops that depend on data take 4 or 16 blocks, by their copies).
_BLOCK_CYCLES, _REGISTER_CYCLES = 80, 2.0


def blocks_seconds(chip: Chip, blocks: int, shape: Sequence[int], hbm_bytes: int) -> float:
    """XLA's gather or scatter of blocks of two dimensions or more, each one copy of whole tiles.

    The slower of issuing them and of ``hbm_bytes``, what moves from and to HBM.
    """
    issued = blocks * (_BLOCK_CYCLES + _REGISTER_CYCLES * storage_bytes(shape) / (SUBLANES * LINE_BYTES))
    return max(issued / chip.clock_hz, hbm_bytes / chip.hbm_bytes_per_second)


def sort_seconds(chip: Chip, numbers: int) -> float:
    """A sort of ids with their places: bundles issued for each of some 43,000."""
    return numbers * _SORT_CYCLES[chip.name] / chip.clock_hz


def update_seconds(chip: Chip, rows: int, table: Sequence[int], *, is_sorted: bool) -> float:
    """XLA's scatter into a table [lines, width], or [rows] of single numbers, that does not fit on the chip.

    Told that indices are sorted, it copies the whole table through the chip, window by window, whatever the number of
    rows. Otherwise it reads and writes a tile of eight lines for each row, one after the other.
    """
    if is_sorted:
        issued = rows * _NEAR_SORTED_UPDATE_CYCLES[chip.name] / chip.clock_hz
        return max(2 * storage_bytes(table) / chip.hbm_bytes_per_second, issued)
    tiles = 2 * rows * SUBLANES * row_bytes(table[-1] if len(table) > 1 else 1)
    return max(rows * _UPDATE_CYCLES[chip.name] / chip.clock_hz, tiles / chip.hbm_bytes_per_second)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
