"""The columns of a log as it is being read: one plain file each, with a journal from which reading goes on."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dlrm_xla_data.layout import Layout
from dlrm_xla_data.lines import Place
from dlrm_xla_data.parsing import Parsed

CHUNK = 2**20
_JOURNAL = "journal.json"


class RawColumns:
    """Appends parsed rows to files, and reads them back in chunks.

    Files: ``labels`` int8, ``dense`` float32 row by row, ``<k>.codes`` int64 and, where a category may have several
    values a row, ``<k>.lengths`` int32; ``order`` int64 if rows have a time or a part, and ``.order`` says which.
    """

    def __init__(self, folder: Path, layout: Layout, key: dict[str, Any]) -> None:
        self.folder = folder
        self.key = key
        self.num_dense = len(layout.dense)
        self.num_categories = len(layout.categories)
        self.several = [bool(c.separator) or c.at_most > 1 for c in layout.categories]
        self._types: dict[str, tuple[Any, int]] = {"labels": (np.int8, 1), "dense": (np.float32, self.num_dense)}
        for k, several in enumerate(self.several):
            self._types[f"{k}.codes"] = (np.int64, 1)
            if several:
                self._types[f"{k}.lengths"] = (np.int32, 1)
        self.order = "time" if layout.time else "split" if layout.split else ""
        if self.order:
            self._types["order"] = (np.int64, 1)
        self._files: dict[str, BinaryIO] = {}
        self.num_rows = 0
        self.num_bad = 0
        self.extra: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(1)
        self._marking: Future[None] | None = None

    def begin(self) -> Place:
        """Opens the files, behind what an interrupted reading of the same sources left whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = self._journal()
        sizes = journal.get("sizes", {})
        self.num_rows, self.num_bad = journal.get("num_rows", 0), journal.get("num_bad", 0)
        self.extra = journal.get("extra", {})
        if not journal:
            for left in self.folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        for name in self._types:
            file = (self.folder / name).open("r+b" if name in sizes else "wb")
            file.truncate(sizes.get(name, 0))
            file.seek(0, os.SEEK_END)
            self._files[name] = file
        return Place(*journal.get("place", ()))

    def resume_read(self) -> bool:
        """Whether all rows were read already; then nothing is opened, as nothing will be appended."""
        journal = self._journal(ids_do=True)
        self.num_rows, self.num_bad = journal.get("num_rows", 0), journal.get("num_bad", 0)
        self.extra = journal.get("extra", {})
        return bool(journal)

    def _journal(self, ids_do: bool = False) -> dict[str, Any]:
        try:
            journal: dict[str, Any] = json.loads((self.folder / _JOURNAL).read_text())
            sizes = journal["sizes"]
            for name in self._types:
                ids = self.folder / name.replace(".codes", ".ids")
                if ids_do and ids.is_file():
                    continue  # codes are deleted once their ids are written
                if (self.folder / name).stat().st_size < sizes[name]:
                    return {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return journal if journal.get("key") == self.key else {}

    def append(self, parsed: Parsed) -> None:
        """Appends the rows of a block."""
        arrays: dict[str, NDArray[Any] | None] = {"labels": parsed.labels, "dense": parsed.dense, "order": parsed.order}
        for k in range(self.num_categories):
            arrays[f"{k}.codes"] = parsed.codes[k]
            lengths = parsed.lengths[k]
            if self.several[k] and lengths is None:
                lengths = np.ones(len(parsed.labels), np.int32)
            expected = len(parsed.labels) if lengths is None else int(lengths.sum())
            if len(parsed.codes[k]) != expected:  # all further values would go to other rows
                raise RuntimeError(f"category {k} has {len(parsed.codes[k]):,} codes, expected {expected:,}")
            arrays[f"{k}.lengths"] = lengths
        for name, file in self._files.items():
            array = arrays[name]
            assert array is not None, name
            file.write(np.ascontiguousarray(array).data)
        self.num_rows += len(parsed.labels)
        self.num_bad += len(parsed.bad)

    def mark(self, place: Place) -> None:
        """Makes what was appended outlast the process and the machine, so that reading can go on from ``place``.

        In the background: waiting for the disk took a tenth of the time of reading.
        """
        self._marked()
        for file in self._files.values():
            file.flush()
        journal = {
            "key": self.key,
            "place": [place.file, place.offset, place.lines],
            "num_rows": self.num_rows,
            "num_bad": self.num_bad,
            "extra": copy.deepcopy(self.extra),
            "sizes": {name: file.tell() for name, file in self._files.items()},
        }
        self._marking = self._pool.submit(self._write_mark, journal, [f.fileno() for f in self._files.values()])

    def _write_mark(self, journal: dict[str, Any], files: list[int]) -> None:
        for number in files:
            os.fsync(number)
        new = self.folder / f"{_JOURNAL}.new"
        with new.open("w") as out:
            json.dump(journal, out)
            out.flush()
            os.fsync(out.fileno())
        new.replace(self.folder / _JOURNAL)

    def _marked(self) -> None:
        if self._marking is not None:
            waiting, self._marking = self._marking, None
            waiting.result()

    def close(self) -> None:
        """Closes all files, once a mark that is being made is made."""
        try:
            self._marked()
        finally:
            for file in self._files.values():
                file.close()
            self._files = {}
            self._pool.shutdown()

    def chunks(self, name: str) -> Iterator[NDArray[Any]]:
        """A file's values of `CHUNK` rows at a time, [n] or [n, I]."""
        dtype, width = self._types[name]
        with (self.folder / name).open("rb") as file:
            while len(values := np.fromfile(file, dtype, CHUNK * width)):
                yield values.reshape(-1, width) if name == "dense" else values

    def lengths(self, k: int) -> Iterator[NDArray[np.int32] | None]:
        """How many values each of `CHUNK` rows has in a category; None where it is always one."""
        if self.several[k]:
            yield from self.chunks(f"{k}.lengths")
        else:
            for _ in range(0, self.num_rows, CHUNK):
                yield None

    def values(self, k: int, suffix: str, dtype: Any) -> Iterator[NDArray[Any]]:
        """A category's values, codes or ids, of `CHUNK` rows at a time, row by row."""
        with (self.folder / f"{k}.{suffix}").open("rb") as file:
            for first, lengths in zip(range(0, self.num_rows, CHUNK), self.lengths(k), strict=True):
                count = min(CHUNK, self.num_rows - first) if lengths is None else int(lengths.sum())
                yield np.fromfile(file, dtype, count)

    def codes(self, k: int) -> Iterator[NDArray[np.int64]]:
        """A category's codes."""
        return self.values(k, "codes", np.int64)

    def spread(self, k: int, of_rows: Iterator[NDArray[np.int8]]) -> Iterator[NDArray[np.int8]]:
        """What is given for each row, for each value of a category."""
        for rows, lengths in zip(of_rows, self.lengths(k), strict=True):
            yield rows if lengths is None else np.repeat(rows, lengths)

    def delete(self, name: str) -> None:
        """Deletes a file that is no longer needed."""
        (self.folder / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes all of it."""
        shutil.rmtree(self.folder)
