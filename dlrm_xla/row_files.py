"""Tables larger than memory: arrays of rows that are files."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from dlrm_xla.contract import Table
from dlrm_xla.errors import UserError

# What a table takes from which on it is worth a file of its own.
LEAST_FILE_BYTES = 2**26
# Names of the files in a folder; locked by the process that uses them.
_LIST = "rows.json"


class RowFiles:
    """Files of a folder as arrays: what is read comes from disk, what is written goes there, memory is a cache.

    They are of one process, and worth nothing after it: checkpoints hold all rows. So files that an earlier one left
    are replaced; a UserError where it still runs, or where the folder has anything else.
    """

    def __init__(self, folder: Path, least_bytes: int = LEAST_FILE_BYTES) -> None:
        self.folder = folder
        self.least_bytes = least_bytes
        self._names: list[str] = []
        self._lock: int | None = None
        try:
            strange = {p.name for p in folder.iterdir()} - {_LIST, *_listed(folder)} if folder.exists() else set()
        except OSError as error:
            raise UserError(f"row_files: cannot use {folder}: {error.strerror}") from error
        if strange:
            raise UserError(f"row_files: {folder} holds {min(strange)}; name a new folder, or empty it")

    def takes(self, table: Table, dtype: torch.dtype) -> bool:
        """Whether a table is large enough to be a file."""
        return table.num_rows * table.dim * dtype.itemsize >= self.least_bytes

    def create(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new file of zeros as an array, its blocks reserved; a UserError if the disk has no room."""
        if torch.get_default_device().type == "meta":  # a plan, which must leave nothing behind
            return torch.empty(shape, dtype=dtype)
        if self._lock is None:
            self._lock = self._locked()
        path = self.folder / f"{len(self._names)}.{name.replace('/', '_')}.{str(dtype).removeprefix('torch.')}"
        self._names.append(path.name)
        (self.folder / _LIST).write_text(json.dumps(self._names))
        numbers = math.prod(shape)
        free = shutil.disk_usage(self.folder).free
        try:
            # A file with holes would end the process at the first row that finds no room.
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, numbers * dtype.itemsize)
        except OSError as error:
            path.unlink(missing_ok=True)
            need = numbers * dtype.itemsize
            raise UserError(
                f"row_files: {path} needs {need / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB ({error.strerror})"
            ) from error
        return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(shape)

    def release(self) -> None:
        """Lets another take the folder's files; the arrays stay what they are."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _locked(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / _LIST, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise UserError(f"row_files: a run that has not ended uses {self.folder}; name another folder") from error
        for name in _listed(self.folder):
            (self.folder / name).unlink(missing_ok=True)
        return lock


def _listed(folder: Path) -> list[str]:
    try:
        names: list[str] = json.loads((folder / _LIST).read_text() or "[]")
    except (FileNotFoundError, ValueError):
        return []
    return names
