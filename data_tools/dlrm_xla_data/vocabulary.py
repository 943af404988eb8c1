"""Codes of a column -> ids by falling frequency in training, in bounded memory however many values there are.

Ids are 1, 2, ... by falling count, equal counts by rising code; 0 is missing, unseen in training, or left out. Values
are counted in runs; runs beyond memory go to disk in parts that each hold a range of codes, and every further pass
has one part in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.errors import UserError
from dlrm_xla_data.parsing import MISSING

# Distinct values of one column in memory: with their counts and a table to find them some 600 MB.
MOST_IN_MEMORY = 8_000_000
MOST_IDS = 2**31 - 2
_RUN_VALUES = 2**23
_PARTS = 64

Codes = NDArray[np.int64]
Chunks = Callable[[], Iterator[Codes]]


@dataclass(frozen=True)
class Limits:
    """Which values get ids of their own: those seen ``min_count`` times, and of them the most frequent.

    ``max_rows`` is the most rows of a table, row 0 included, 0 for any number. Further ones become 0 with
    ``tail`` "cut", or share ids 1 to max_rows - 1 by a hash of their code with "hash".
    """

    min_count: int = 1
    max_rows: int = 0
    tail: str = "cut"


class Vocabulary:
    """Codes and ids of one column, in parts of rising ranges of codes, kept in files."""

    def __init__(self, folder: Path) -> None:
        self.parts: list[tuple[Path, Path]] = []
        self.counts: Path = folder / "counts"
        self.num_ids = 0

    def ids(self, codes: Codes) -> NDArray[np.int32]:
        """Ids of codes; 0 where they have none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        result = np.zeros(len(codes), np.int32)
        for values, ids in self.parts:
            known = np.fromfile(values, np.int64)
            if not len(known):
                continue
            of_known = np.append(np.fromfile(ids, np.int32), np.int32(0))
            place = pc.index_in(pa.array(codes), value_set=pa.array(known)).fill_null(-1).to_numpy()
            np.maximum(result, of_known[place], out=result)
        return result

    def save(self, values: Path, ids: Path) -> None:
        """Writes all codes that have an id, rising, and their ids, in two files."""
        for target, files in ((values, [v for v, _ in self.parts]), (ids, [i for _, i in self.parts])):
            with target.open("wb") as out:
                for file in files:
                    with file.open("rb") as part:
                        shutil.copyfileobj(part, out)

    def delete(self) -> None:
        """Deletes its files."""
        for files in self.parts:
            for file in files:
                file.unlink(missing_ok=True)
        self.counts.unlink(missing_ok=True)


def build_vocabulary(folder: Path, name: str, training_codes: Chunks, limits: Limits) -> Vocabulary:
    """Counts a column's values in training and gives them ids; the folder must be empty.

    Raises UserError where more values than int32 can name would get one.
    """
    counted = _Counts(folder)
    for codes in training_codes():
        counted.add(codes)
    vocabulary = Vocabulary(folder)
    parts = counted.finish(limits.min_count)
    # How many values occur so often: as many numbers as there are different counts.
    frequencies, numbers = _frequencies(parts)
    falling = np.argsort(-frequencies, kind="stable")
    frequencies, numbers = frequencies[falling], numbers[falling]
    total = int(numbers.sum())
    if total > MOST_IDS and not limits.max_rows:
        raise UserError(
            f"column {name} has {total:,} different values, more than int32 ids can name. "
            "Give --min-count or --max-rows."
        )
    next_id = np.concatenate([[1], 1 + np.cumsum(numbers)])[:-1]
    kept = min(total, limits.max_rows - 1) if limits.max_rows else total
    folded = np.zeros(kept + 1, np.int64) if limits.tail == "hash" and kept < total else None
    for values_file, counts_file in parts:
        codes, counts = np.fromfile(values_file, np.int64), np.fromfile(counts_file, np.int64)
        group = np.searchsorted(-frequencies, -counts)
        # numpy sorts 16 bits by their digits, several times faster
        order = np.argsort(group.astype(np.uint16) if len(frequencies) < 2**16 else group, kind="stable")
        sizes = np.bincount(group, minlength=len(frequencies))
        within = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids = np.empty(len(codes), np.int64)
        ids[order] = np.repeat(next_id, sizes) + within
        next_id = next_id + sizes
        if folded is not None:
            ids = np.where(ids > kept, 1 + _hashed(codes, kept), ids)
            folded += np.bincount(ids, counts, minlength=kept + 1).astype(np.int64)
        else:
            codes, ids = codes[ids <= kept], ids[ids <= kept]
        codes.tofile(values_file)
        ids.astype(np.int32).tofile(counts_file)
        vocabulary.parts.append((values_file, counts_file))
    vocabulary.num_ids = kept
    if folded is None:
        _write_counts(vocabulary.counts, frequencies, numbers, kept)
    else:
        _rank_again(vocabulary, folded)
    return vocabulary


def _hashed(codes: Codes, buckets: int) -> NDArray[np.int64]:
    """Multiply-shift hashing (Dietzfelbinger et al. 1997) of codes to 0 .. buckets - 1."""
    mixed = codes.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def _rank_again(vocabulary: Vocabulary, folded: NDArray[np.int64]) -> None:
    """Orders ids by the counts that they have once the tail shares them."""
    order = np.argsort(-folded[1:], kind="stable")
    new = np.zeros(len(folded), np.int32)
    new[1:][order] = np.arange(1, len(folded))
    for _, ids in vocabulary.parts:
        new[np.fromfile(ids, np.int32)].tofile(ids)
    folded[1:][order].tofile(vocabulary.counts)


def _frequencies(parts: list[tuple[Path, Path]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    values, numbers = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for _, counts in parts:
        found, times = np.unique(np.fromfile(counts, np.int64), return_counts=True)
        values, numbers = _merged([(values, numbers), (found, times.astype(np.int64))])
    return values, numbers


def _write_counts(path: Path, frequencies: NDArray[np.int64], numbers: NDArray[np.int64], kept: int) -> None:
    left = kept
    with path.open("wb") as file:
        for frequency, number in zip(frequencies, numbers, strict=True):
            count = min(int(number), left)
            left -= count
            while count:
                step = min(count, _RUN_VALUES)
                file.write(np.full(step, frequency, np.int64).data)
                count -= step


Run = tuple[Codes, NDArray[np.int64]]


def _merged(runs: list[Run]) -> Run:
    """Sums counts of equal codes; codes rise."""
    runs = [run for run in runs if len(run[0])]
    if len(runs) < 2:
        return runs[0] if runs else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    codes = np.unique(np.concatenate([run[0] for run in runs]))
    counts = np.zeros(len(codes), np.int64)
    for values, numbers in runs:
        counts[np.searchsorted(codes, values)] += numbers
    return codes, counts


class _Counts:
    """Counts of values, in memory while they fit, else in files by ranges of codes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: list[Codes] = []
        self._runs: list[Run] = []
        self._borders: Codes | None = None

    def add(self, codes: Codes) -> None:
        self._pending.append(codes[codes != MISSING])
        if sum(map(len, self._pending)) >= _RUN_VALUES:
            self._close_run()

    def _close_run(self) -> None:
        if self._pending:
            codes, counts = np.unique(np.concatenate(self._pending), return_counts=True)
            self._pending = []
            self._runs.append((codes, counts.astype(np.int64)))
        # Runs of like size are merged, so each value is merged only some log2(runs) times.
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            self._runs[-2:] = [_merged(self._runs[-2:])]
        if sum(len(run[0]) for run in self._runs) > MOST_IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        codes, counts = _merged(self._runs)
        self._runs = []
        if self._borders is None:
            places = np.linspace(0, len(codes), _PARTS + 1).astype(int)[1:-1]
            self._borders = codes[places]
        cuts = [0, *np.searchsorted(codes, self._borders), len(codes)]
        for part in range(_PARTS):
            piece = slice(cuts[part], cuts[part + 1])
            with self._spilled(part).open("ab") as file:
                file.write(np.stack([codes[piece], counts[piece]], 1).data)

    def _spilled(self, part: int) -> Path:
        return self.folder / f"{part}.spilled"

    def finish(self, min_count: int) -> list[tuple[Path, Path]]:
        """Files of codes and of counts, a pair for each range."""
        self._close_run()
        if self._borders is None:
            return [self._write(0, _merged(self._runs), min_count)]
        self._spill()
        result = []
        for part in range(_PARTS):
            pairs = np.fromfile(self._spilled(part), np.int64).reshape(-1, 2)
            run = _merged_pairs(pairs)
            self._spilled(part).unlink()
            result.append(self._write(part, run, min_count))
        return result

    def _write(self, part: int, run: Run, min_count: int) -> tuple[Path, Path]:
        values, counts = self.folder / f"{part}.values", self.folder / f"{part}.ids"
        enough = run[1] >= min_count
        run[0][enough].tofile(values)
        run[1][enough].tofile(counts)
        return values, counts


def _merged_pairs(pairs: NDArray[np.int64]) -> Run:
    codes = np.unique(pairs[:, 0])
    counts = np.zeros(len(codes), np.int64)
    np.add.at(counts, np.searchsorted(codes, pairs[:, 0]), pairs[:, 1])
    return codes, counts
