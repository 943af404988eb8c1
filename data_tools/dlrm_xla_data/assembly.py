"""Files of columns -> arrays of rows, the rows of each part side by side."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dlrm_xla.errors import UserError
from dlrm_xla_data.layout import Layout
from dlrm_xla_data.multi_hot import more_ids
from dlrm_xla_data.parsing import PARTS
from dlrm_xla_data.protocols import Split
from dlrm_xla_data.raw_columns import CHUNK, RawColumns

# Columns become rows within the cache: a million rows of 26 in 46 ms instead of 181 ms at once.
_STACKED_ROWS = 2**12


class Rows:
    """An .npy file of given shape that is written at several places, each going on by itself."""

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
        self.dtype = np.dtype(dtype)
        self._file: BinaryIO = path.open("wb")
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        )
        self._start = self._file.tell()
        self._row_bytes = self.dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        self._file.truncate(self._start + shape[0] * self._row_bytes)

    def write(self, row: int, values: NDArray[Any]) -> None:
        """Writes rows from that one on."""
        self._file.seek(self._start + row * self._row_bytes)
        self._file.write(np.ascontiguousarray(values, self.dtype).data)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def assemble(
    columns: RawColumns,
    folder: Path,
    layout: Layout,
    split: Split,
    bag_lengths: Sequence[int],
    seed: int,
    most: Sequence[int] = (),
) -> dict[str, Any]:
    """Writes labels, dense, ids, counts and, where bags vary in length, offsets; returns their part of the metadata.

    ``most`` values a row may have of each category, where that is known; a UserError where one has more.
    """
    rows_of_tables = _write_counts(columns, folder)
    starts = [split.final_ranges()[name][0] for name in PARTS]
    num_rows, num_features = columns.num_rows, columns.num_categories
    lengths = list(bag_lengths) or [1] * num_features
    with contextlib.ExitStack() as stack:

        def rows(name: str, dtype: Any, *shape: int) -> Rows:
            return stack.enter_context(Rows(folder / f"{name}.npy", dtype, shape))

        labels_file = rows("labels", np.int8, num_rows)
        dense_file = rows("dense", np.float32, num_rows, columns.num_dense)
        bags: _FixedBags | _VaryingBags
        if layout.variable_bags:
            slots, longest = _slots(columns, split)
            lengths = [int(x) for x in longest]
            for category, length, limit in zip(layout.categories, lengths, most, strict=bool(most)):
                if length > limit:
                    raise UserError(
                        f"a row has {length} values of {category.name}, but the dataset whose ids are asked for has at "
                        f"most {limit}. Give the column at_most: {limit} there and here, or leave such rows out."
                    )
            lengths = list(most) or lengths
            offsets = rows("offsets", np.int64, num_rows * num_features + 1)
            bags = _VaryingBags(rows("ids", np.int32, sum(slots)), offsets, num_features, slots, starts)
        else:
            bags = _FixedBags(rows("ids", np.int32, num_rows, sum(lengths)), lengths, rows_of_tables, seed)
        readers = zip(
            columns.chunks("labels"),
            columns.chunks("dense"),
            split.parts(),
            zip(*(columns.values(k, "ids", np.int32) for k in range(num_features)), strict=True),
            zip(*(columns.lengths(k) for k in range(num_features)), strict=True),
            strict=True,
        )
        at = list(starts)
        bar = tqdm(readers, total=-(-num_rows // CHUNK), unit="million rows", desc="rows", disable=None)
        for labels, dense, parts, ids, sizes in bar:
            bags.take(ids, sizes)
            for part in np.unique(parts):
                # Mostly a chunk is of one part, and is not copied.
                chosen: Any = slice(None) if (parts == part).all() else np.flatnonzero(parts == part)
                of_part = labels[chosen]
                labels_file.write(at[part], of_part)
                dense_file.write(at[part], dense[chosen])
                bags.write(int(part), at[part], chosen)
                at[part] += len(of_part)
    return {"bag_lengths": lengths, "variable_bags": layout.variable_bags}


def _write_counts(columns: RawColumns, folder: Path) -> list[int]:
    """Writes the counts of all tables one after the other; returns rows of tables, row 0 included."""
    files = [columns.folder / f"{k}.counts" for k in range(columns.num_categories)]
    return [1 + size for size in join(folder / "counts.npy", np.int64, files)]


def join(path: Path, dtype: Any, files: Sequence[Path]) -> list[int]:
    """Writes plain files of numbers, one for each table, as one .npy file; returns how many each has."""
    sizes = [file.stat().st_size // np.dtype(dtype).itemsize for file in files]
    with Rows(path, dtype, (sum(sizes),)) as out:
        at = 0
        for file in files:
            with file.open("rb") as of_table:
                while len(numbers := np.fromfile(of_table, dtype, CHUNK)):
                    out.write(at, numbers)
                    at += len(numbers)
    return sizes


class _FixedBags:
    """Ids [N, S]: one of each category, or bags made of them."""

    def __init__(self, file: Rows, lengths: Sequence[int], rows_of_tables: Sequence[int], seed: int) -> None:
        self._file = file
        self._more = (lengths, rows_of_tables, seed)
        self._block = np.empty((0, 0), np.int32)

    def take(self, ids: Sequence[NDArray[np.int32]], sizes: Sequence[NDArray[np.int32] | None]) -> None:
        block = np.empty((len(ids[0]), len(ids)), np.int32)
        for first in range(0, len(block), _STACKED_ROWS):
            part = slice(first, first + _STACKED_ROWS)
            np.stack([column[part] for column in ids], axis=1, out=block[part])
        self._block = more_ids(block, *self._more) if max(self._more[0]) > 1 else block

    def write(self, part: int, row: int, chosen: Any) -> None:
        self._file.write(row, self._block[chosen])


class _VaryingBags:
    """Ids [all slots] and where each bag's begin."""

    def __init__(
        self, file: Rows, offsets: Rows, num_features: int, slots: Sequence[int], starts: Sequence[int]
    ) -> None:
        self._file, self._offsets, self._num_features = file, offsets, num_features
        self._next = [0, 0, 0]
        for before, after in itertools.pairwise(sorted(range(3), key=lambda part: (starts[part], slots[part]))):
            self._next[after] = self._next[before] + slots[before]
        offsets.write(0, np.zeros(1))

    def take(self, ids: Sequence[NDArray[np.int32]], sizes: Sequence[NDArray[np.int32] | None]) -> None:
        self._flat, self._sizes = _side_by_side(ids, sizes)

    def write(self, part: int, row: int, chosen: Any) -> None:
        kept = np.zeros(len(self._sizes), bool)
        kept[chosen] = True
        own = self._flat[np.repeat(kept, self._sizes.sum(1))]
        self._file.write(self._next[part], own)
        ends = self._next[part] + np.cumsum(self._sizes[kept].ravel())
        self._offsets.write(row * self._num_features + 1, ends)
        self._next[part] += len(own)


def _slots(columns: RawColumns, split: Split) -> tuple[list[int], NDArray[np.int64]]:
    """Values of each part, and the most values of a row in each category."""
    slots = np.zeros(3, np.int64)
    longest = np.ones(columns.num_categories, np.int64)
    for k in range(columns.num_categories):
        for parts, lengths in zip(split.parts(), columns.lengths(k), strict=True):
            slots += np.bincount(parts, lengths, minlength=3).astype(np.int64)
            if lengths is not None and len(lengths):
                longest[k] = max(longest[k], int(lengths.max()))
    return [int(x) for x in slots], longest


def _side_by_side(
    ids: Sequence[NDArray[np.int32]], lengths: Sequence[NDArray[np.int32] | None]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Values of all categories row by row, and how many each row has of each, [n, F]."""
    num_rows = next(len(i) if n is None else len(n) for i, n in zip(ids, lengths, strict=True))
    sizes = np.stack([np.ones(num_rows, np.int64) if n is None else n.astype(np.int64) for n in lengths], 1)
    starts = np.cumsum(sizes.ravel()).reshape(sizes.shape) - sizes
    flat = np.empty(int(sizes.sum()), np.int32)
    for k, values in enumerate(ids):
        within = np.arange(len(values)) - np.repeat(np.cumsum(sizes[:, k]) - sizes[:, k], sizes[:, k])
        flat[np.repeat(starts[:, k], sizes[:, k]) + within] = values
    return flat, sizes


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
