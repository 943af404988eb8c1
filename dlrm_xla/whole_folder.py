"""Folders that are there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlrm_xla.errors import UserError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that gets its name when the block ends well, also in the place of an empty one, else vanishes.

    Raises UserError where the disk is full or nothing may be written there.
    """
    scratch = folder.with_name(f"{folder.name}.unfinished")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        scratch.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}. Name a folder elsewhere (--out).") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
