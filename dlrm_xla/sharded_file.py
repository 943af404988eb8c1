"""Checkpoints that several ranks write together: torch.distributed.checkpoint's safetensors files in one folder.

Every rank writes what it holds. Beside the files lies ``checkpoint.json`` with what `dlrm_xla.checkpoint` keeps in a
file's header, and a SHA-256 of each file; it is written last, and the folder has its name only then. Any number of
ranks reads it, and so does a single process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dlrm_xla.errors import UserError
from dlrm_xla.ranks import Ranks
from dlrm_xla.tensor_file import TensorFile, put, sync_folder

_T = TypeVar("_T")
ABOUT = "checkpoint.json"
_SUFFIX = ".safetensors"


def write_shards(path: Path, tensors: Mapping[str, Any], about: Mapping[str, str], ranks: Ranks) -> None:
    """Writes a folder, whole or not at all; called by every rank, with sharded tensors or copies of the same ones.

    Raises OSError where the disk has no room, on every rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    unfinished = path.with_name(f"{path.name}.unfinished")

    def fresh() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish() -> None:
        with (unfinished / ABOUT).open("w") as file:
            json.dump({**about, "sha256": digests}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(unfinished)
        put(unfinished, path)

    try:
        _unless_failed(ranks.from_first(lambda: _tried(fresh)))
        writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its own use of sharded tensors
                save(dict(tensors), storage_writer=writer)
        except CheckpointException as error:
            raise OSError(None, str(next(iter(error.failures.values()))[0])) from error
        mine = sorted(unfinished.glob(f"*{_SUFFIX}"))[ranks.rank :: ranks.size]
        digests: dict[str, str] = {}
        told = ranks.tell("digests", _tried(lambda: {p.name: _digest(p, sync=True) for p in mine}))
        for found in told:
            digests |= _unless_failed(found)
        _unless_failed(ranks.from_first(lambda: _tried(finish)))
    except OSError:
        ranks.from_first(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        raise


def _tried(make: Callable[[], _T]) -> _T | OSError:
    try:
        return make()
    except OSError as error:
        return error


def _unless_failed(made: _T | OSError) -> _T:
    """What one rank made; where its disk failed, the same error on every rank."""
    if isinstance(made, OSError):
        raise made
    return made


class ShardFolder(TensorFile):
    """A folder that was found whole, read as if it were one file."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self.path = path
        self.about = about
        self._metadata: dict[str, Any] = _reader(path).read_metadata().state_dict_metadata
        self.names = set(self._metadata)
        self._kept: tuple[str, Tensor] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._metadata[self._known(name)].size)

    def tensor(self, name: str) -> Tensor:
        """A tensor on the host, put together."""
        found = self._metadata[self._known(name)]
        whole = torch.empty(found.size, dtype=found.properties.dtype)
        fill(self, {name: whole})
        return whole

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor; the last one asked for is kept, for it is put together as a whole."""
        if self._kept is None or self._kept[0] != name:
            self._kept = None
            self._kept = name, self.tensor(name)
        return self._kept[1][start:stop]


@contextmanager
def opened_shards(path: Path) -> Iterator[ShardFolder]:
    """Opens a folder after comparing the checksum of every file; a UserError where one byte is not as written."""
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path} is a run folder: give its {path / 'checkpoints' / 'best.safetensors'}")
    try:
        about = json.loads((path / ABOUT).read_text())
        digests = about.pop("sha256")
        files = {p.name for p in path.glob(f"*{_SUFFIX}")}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a checkpoint of several ranks, or is damaged: {ABOUT}: {error}") from error
    for name in sorted({*digests, *files}):
        if name not in files or _digest(path / name) != digests.get(name):
            raise UserError(f"the checkpoint {path} is damaged: {name} is not as it was written. Use another one.")
    about["sha256"] = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    yield ShardFolder(path, about)


def fill(file: TensorFile, targets: Mapping[str, Any]) -> None:
    """Reads tensors in place: whole ones, or this rank's pieces of sharded ones, however the file is cut."""
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sharded tensors, which are TorchRec's; that no group takes part is meant
        for name, target in targets.items():
            if tuple(target.size()) != file.shape(name):
                raise UserError(
                    f"{file.path} is of another model: {name} is {list(file.shape(name))} there, "
                    f"{list(target.size())} here. Use the configuration and the data that it was written with."
                )
        load(dict(targets), storage_reader=_reader(file.path), no_dist=True)


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader: Any = HuggingFaceStorageReader(str(path))
    if path.is_file():
        reader.fs.ls = lambda folder: [str(path)]  # a file of one process: one whole piece of everything
    return reader


def _digest(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
