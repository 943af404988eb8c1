"""Safetensors files that are written part by part, and carry one checksum over all of their bytes.

The safetensors library wants every tensor on the host before it writes the first; a table that fills a device does not
fit beside itself. Its format is eight bytes of length, a header of JSON and the tensors' bytes, so files written here
are read by the library.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlrm_xla.errors import UserError

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}
_UNKNOWN = "0" * 64
_PIECE = 2**24
# What the safetensors library takes at most.
_LONGEST_HEADER = 100_000_000


class Section(NamedTuple):
    """Tensors that lie behind one another in a stream: their names and shapes in order, their type, and the stream.

    ``parts`` gives the bytes of all of them as tensors on the host, of any shapes.
    """

    members: Sequence[tuple[str, Sequence[int]]]
    dtype: torch.dtype
    parts: Iterable[Tensor]


def write(path: Path, sections: Sequence[Section], about: Mapping[str, str]) -> None:
    """Writes under a new name, syncs and renames, so that a file of that name is always whole.

    Raises OSError where the disk has no room; what was there before then still is.
    """
    header: dict[str, Any] = {"__metadata__": {**about, "sha256": _UNKNOWN}}
    end = 0
    for section in sections:
        for name, shape in section.members:
            start, end = end, end + int(np.prod(shape)) * section.dtype.itemsize
            header[name] = {"dtype": _TYPES[section.dtype], "shape": list(shape), "data_offsets": [start, end]}
    head = _header_bytes(header)
    digest = hashlib.sha256(head)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(head)
            for section in sections:
                for part in section.parts:
                    data = part.detach().contiguous().flatten().view(torch.uint8).numpy().data
                    for first in range(0, len(data), _PIECE):
                        digest.update(data[first : first + _PIECE])
                        file.write(data[first : first + _PIECE])
            assert file.tell() == len(head) + end, "the parts of a section are not its tensors"
            header["__metadata__"]["sha256"] = digest.hexdigest()
            file.seek(0)
            file.write(_header_bytes(header))
            file.flush()
            os.fsync(file.fileno())
        put(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def put(unfinished: Path, path: Path) -> None:
    """Gives what was written its name; a checkpoint that had it is gone, be it a file or a folder of several ranks."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif unfinished.is_dir():
        path.unlink(missing_ok=True)
    unfinished.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes names in a folder last: a rename is one only once the folder is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class TensorFile:
    """A file that was found whole: what it says about itself, and its tensors, mapped from the disk."""

    def __init__(self, path: Path, about: dict[str, str], handle: Any, head: tuple[bytes, dict[str, Any]]) -> None:
        self.path = path
        self.about = about
        self._handle = handle
        self._start, self._header = len(head[0]), head[1]
        self.names: set[str] = set(handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._handle.get_slice(self._known(name)).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A tensor on the host."""
        tensor: Tensor = self._handle.get_tensor(self._known(name))
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, read rather than mapped: mapped pages of a table stay until they are wanted elsewhere."""
        entry = self._header[self._known(name)]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        width = int(np.prod(shape[1:])) * dtype.itemsize
        place = self._start + entry["data_offsets"][0] + start * width
        data = np.fromfile(self.path, np.uint8, (min(stop, shape[0]) - start) * width, offset=place)
        return torch.from_numpy(data).view(dtype).view(-1, *shape[1:])

    def _known(self, name: str) -> str:
        if name not in self.names:
            raise UserError(
                f"{self.path} has no {name}: it was written by another version or for another model. Use the "
                "configuration that it was written with."
            )
        return name


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Opens a file after reading it once to compare its checksum; a UserError where one byte is not as written."""
    if path.is_dir():  # of several ranks
        from dlrm_xla.sharded_file import opened_shards

        with opened_shards(path) as folder:
            yield folder
        return
    from safetensors import SafetensorError, safe_open

    try:
        head = _verify(path)
        handle = safe_open(path, framework="pt")
        about: dict[str, str] = handle.metadata() or {}  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise UserError(f"cannot read the checkpoint {path}: {reason}") from error
    with handle:
        yield TensorFile(path, about, handle, head)


def _verify(path: Path) -> tuple[bytes, dict[str, Any]]:
    with path.open("rb") as file:
        head, header = _read_header(path, file)
        written = header.get("__metadata__", {}).get("sha256")
        if not isinstance(written, str):
            raise UserError(f"{path} is not a checkpoint of this version: it has no checksum")
        header["__metadata__"]["sha256"] = _UNKNOWN
        if len(_header_bytes(header)) != len(head):
            raise _damaged(path, "its header is not as it was written")
        digest = hashlib.sha256(_header_bytes(header))
        while piece := file.read(_PIECE):
            digest.update(piece)
    if digest.hexdigest() != written or head != _header_bytes(_with_digest(header, written)):
        raise _damaged(path, "its checksum is another")
    return head, header


def _read_header(path: Path, file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(_LONGEST_HEADER, path.stat().st_size - 8):
        raise UserError(f"{path} is not a checkpoint, or is cut off: it does not begin as a safetensors file does")
    text = file.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a checkpoint, or is damaged: its header is no JSON. Use another checkpoint."
        ) from error
    return start + text, header


def _with_digest(header: dict[str, Any], digest: str) -> dict[str, Any]:
    return {**header, "__metadata__": {**header["__metadata__"], "sha256": digest}}


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the library does, so that the tensors are aligned
    return struct.pack("<Q", len(text)) + text


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"the checkpoint {path} is damaged: {what}. Use another one, or start the run again.")
