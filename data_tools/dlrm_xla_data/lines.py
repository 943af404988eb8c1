"""Raw text logs as blocks of whole lines: plain or gzipped files, one after the other, each block with its place."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dlrm_xla.errors import UserError

# Of 0.5 to 16 MB, 4 MB were parsed fastest: larger ones leave the cache.
BLOCK_BYTES = 4 << 20
_NEWLINE = 10
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Place:
    """Where reading goes on: in the file of that number, behind so many of its bytes and lines, unpacked."""

    file: int = 0
    offset: int = 0
    lines: int = 0


@dataclass(frozen=True)
class Block:
    """Whole lines of one file: the first one's number, counted from 1, and the place behind the last one."""

    path: Path
    data: bytes
    first_line: int
    after: Place


class Digests:
    """Size and SHA-256 of each source file, as it lies on the disk, made while it is read."""

    def __init__(self) -> None:
        self.files: list[dict[str, Any]] = []

    def add(self, path: Path, digest: str) -> None:
        """Notes a file that was read to its end."""
        self.files.append({"file": path.name, "size": path.stat().st_size, "sha256": digest})


def is_gzip(path: Path) -> bool:
    """Whether a file begins as gzip files do, whatever it is called."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet files do."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def first_line(path: Path) -> bytes:
    """The first line of a log, without its end and without a byte-order mark."""
    try:
        with _Source(path).open() as file:
            return bytes(file.readline(1 << 20)).removeprefix(BYTE_ORDER_MARK).rstrip(b"\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}. Fetch it again.") from error


def blocks(
    files: Sequence[Path],
    start: Place,
    digests: Digests,
    header: bool = False,
    block_bytes: int | None = None,
) -> Iterator[Block]:
    """The lines of all files from ``start`` on, some megabytes at a time, and their digests.

    Lines may end in \\n, \\r\\n or \\r, each as it likes. A byte-order mark and, with ``header``, each file's
    first line are left out, a missing end of the last line is added. What lies before ``start`` is read for the
    digests alone.

    Raises UserError where a file cannot be read or unpacked, with the last whole line that can.
    """
    size = block_bytes or BLOCK_BYTES
    for number, path in enumerate(files):
        source = _Source(path)
        begin = start if number == start.file else Place(number)
        lines = begin.lines
        try:
            with source.open() as file:
                if number < start.file:
                    source.finish(file, digests)
                    continue
                _skip(file, begin.offset)
                offset = begin.offset
                while data := file.read(size):
                    if not data.endswith(b"\n"):
                        data += file.readline(64 * size)
                    if len(data) > 64 * size and not data.endswith(b"\n"):
                        raise UserError(f"{path}, line {lines + 1}: a line of more than {64 * size:,} bytes")
                    first, at_start = lines + 1, offset == 0
                    offset += len(data)
                    text = _tidy(data, at_start)
                    # bytes.count takes 3.6 times as long where an end comes every 200 bytes
                    lines += int(np.count_nonzero(np.frombuffer(text, np.uint8) == _NEWLINE))
                    if at_start and header:
                        text, first = text.partition(b"\n")[2], first + 1
                    yield Block(path, text, first, Place(number, offset, lines))
                source.finish(file, digests)
        except EOFError as error:
            last = _whole_lines(path)
            raise UserError(f"{path} is a truncated gzip file: it ends after line {last}. Fetch it again.") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            last = _whole_lines(path)
            raise UserError(f"{path} cannot be unpacked after line {last}: {error}. Fetch it again.") from error


def _whole_lines(path: Path) -> int:
    """How many whole lines of a broken gzip file can be read.

    It is read again from its beginning, in small pieces: a read that fails gives nothing of what it had unpacked.
    """
    count, last = 0, b""
    with _Source(path).open() as file, contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error):
        while data := file.read1(1 << 13):
            data = last + data
            last = data[-1:] if data.endswith(b"\r") else b""  # \n may follow
            data = data.removesuffix(b"\r")
            count += data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
    return count + len(last)


def _tidy(data: bytes, at_start: bool) -> bytes:
    if at_start:
        data = data.removeprefix(BYTE_ORDER_MARK)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return data if data.endswith(b"\n") else data + b"\n"


def _skip(file: BinaryIO, offset: int) -> None:
    while offset > 0:
        read = len(file.read(min(offset, 1 << 22)))
        if not read:
            return
        offset -= read


class _Source:
    """A file whose bytes pass a digest on their way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.packed = is_gzip(path)
        self._digest = hashlib.sha256()

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        raw: Any = io.BufferedReader(_Digesting(self.path, self._digest), 1 << 20)
        with raw, gzip.GzipFile(fileobj=raw) if self.packed else raw as file:
            yield file

    def finish(self, file: BinaryIO, digests: Digests) -> None:
        """Reads what is left, and notes the digest."""
        while file.read(1 << 22):
            pass
        digests.add(self.path, self._digest.hexdigest())


class _Digesting(io.RawIOBase):
    def __init__(self, path: Path, digest: Any) -> None:
        self._file = path.open("rb", buffering=0)
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:read])
        return read

    def close(self) -> None:
        self._file.close()
        super().close()
