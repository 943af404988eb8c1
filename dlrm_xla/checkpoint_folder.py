"""The checkpoints of one run: the last few by their steps, and the names `last` and `best`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlrm_xla.checkpoint import read_about
from dlrm_xla.errors import UserError
from dlrm_xla.ranks import ALONE, Ranks

SUFFIX = ".safetensors"


class CheckpointFolder:
    """Keeps the last ``keep`` checkpoints of a run; ``best`` stays when its step is forgotten.

    A checkpoint is a file, or a folder where several ``ranks`` wrote it; the first of them keeps order.
    """

    def __init__(self, path: Path, keep: int, ranks: Ranks = ALONE) -> None:
        self.path = path
        self.keep = keep
        self.ranks = ranks

    def named(self, name: str) -> Path:
        """Where the checkpoint "last" or "best" lies."""
        return self.path / f"{name}{SUFFIX}"

    def by_step(self) -> list[Path]:
        """Checkpoints by falling step."""
        return sorted(self.path.glob(f"step-*{SUFFIX}"), reverse=True)

    def add(self, step: int, write: Callable[[Path], None], best: bool) -> None:
        """Has a checkpoint written, gives it its names, and forgets the oldest; every rank then finds it by them."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"step-{step:010d}{SUFFIX}"
        write(path)
        if self.ranks.first:
            self._keep_order(path, best)
        self.ranks.wait()

    def _keep_order(self, path: Path, best: bool) -> None:
        # Before "last": whoever is killed here is resumed from this step, and finds its best.
        if best:
            self._name(path, "best")
        self._name(path, "last")
        kept = self.named("best").resolve()
        # One of a later step is a damaged one that a run went back behind: it must not count in place of this.
        for old in [p for p in self.by_step() if p <= path][self.keep :]:
            if old.resolve() != kept:
                _remove(old)

    def repeat_best(self, path: Path) -> None:
        """Names a checkpoint the best again, in case the run was killed before it did; every rank waits for that."""
        if self.ranks.first:
            self._name(path, "best")
        self.ranks.wait()

    def newest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and what was saved about it; None where there is none at all.

        Says which ones are damaged; a UserError where all are.
        """
        for left_over in self.path.glob("*.unfinished"):
            _remove(left_over)
        damaged = []
        for path in dict.fromkeys([*self.by_step(), self.named("last")]):
            if not path.exists():
                continue
            try:
                return path, read_about(path)
            except UserError as error:
                say(str(error))
                damaged.append(path.name)
        if damaged:
            raise UserError(f"no checkpoint of {self.path} is whole: {', '.join(damaged)}. Start the run again.")
        return None

    def _name(self, path: Path, name: str) -> None:
        scratch = self.path / f"{name}.unfinished"
        scratch.unlink(missing_ok=True)
        try:
            if path.is_dir():
                scratch.symlink_to(path.name)
            else:
                os.link(path, scratch)
        except OSError:  # a file system without links
            shutil.copyfile(path, scratch)
        os.replace(scratch, self.named(name))
        scratch.unlink(missing_ok=True)  # a rename of one file onto itself does nothing


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
