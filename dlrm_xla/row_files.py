"""Tables larger than memory: arrays of rows that are files."""

from __future__ import annotations

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


class RowFiles:
    """Files of a folder as arrays: what is read comes from disk, what is written goes there, memory is a cache."""

    def __init__(self, folder: Path, least_bytes: int = LEAST_FILE_BYTES) -> None:
        self.folder = folder
        self.least_bytes = least_bytes
        self._count = 0
        try:
            if folder.exists() and any(folder.iterdir()):
                raise UserError(f"row_files: {folder} is not empty; name a new folder, or empty it")
        except OSError as error:
            raise UserError(f"row_files: cannot use {folder}: {error.strerror}") from error

    def takes(self, table: Table, dtype: torch.dtype) -> bool:
        """Whether a table is large enough to be a file."""
        return table.num_rows * table.dim * dtype.itemsize >= self.least_bytes

    def create(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new file of zeros as an array, its blocks reserved; a UserError if the disk has no room."""
        if torch.get_default_device().type == "meta":  # a plan, which must leave nothing behind
            return torch.empty(shape, dtype=dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._count}.{name}.{str(dtype).removeprefix('torch.')}"
        self._count += 1
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
