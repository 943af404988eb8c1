"""The prepared dataset: plain .npy arrays and one meta.json, readable with numpy alone.

    labels.npy   int8    [N]     0 or 1; all 0 where meta.json has ``"labelled": false``
    dense.npy    float32 [N, I]  transformed, missing is 0
    ids.npy      int32   [N, S]  slots of all features side by side; 0 missing or unseen in training
    counts.npy   int64   [sum]   for each feature, how often its ids 1, 2, ... occur in training (falling)
    values.npy, value_ids.npy    what ids stand for (`dlrm_xla_data.known_ids`)
    meta.json    format, source, dense and table names, bag lengths, ids per table, splits, checksums; written last

Where bags vary in length, meta.json has ``"variable_bags": true``, bag lengths are those of the longest, and

    ids.npy      int32   [all slots]  those of row n and feature f from offsets[n F + f] to before offsets[n F + f + 1]
    offsets.npy  int64   [N F + 1]

A folder gets its name only when it is whole: it is written under another name and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.errors import UserError
from dlrm_xla_data.bags import Bags

FORMAT = "dlrm_xla prepared 1"
VERIFIED = "verified.json"
SPLITS = ("train", "test", "validation")


@dataclass(frozen=True)
class PreparedDataset:
    """Columns of a click log, in memory or mapped from disk; see the module for shapes."""

    labels: NDArray[np.int8]
    dense: NDArray[np.float32]
    ids: NDArray[np.int32]
    counts: list[NDArray[np.int64]]
    names: list[str]
    bag_lengths: list[int]
    splits: dict[str, tuple[int, int]]
    source: dict[str, Any]
    bags: Bags | None = None
    labelled: bool = True

    @property
    def shape(self) -> tuple[int, list[int], bool]:
        """Dense features, bag lengths, and whether these are the most of bags that vary in length."""
        return self.dense.shape[1], self.bag_lengths, self.bags is not None

    def slots(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Ids [rows, S] of all features side by side, -1 where a bag is shorter than the longest."""
        return self.ids[rows] if self.bags is None else self.bags.padded(rows, tuple(self.bag_lengths))

    def lookups(self, feature: int, split: str) -> int:
        """Ids of a feature in a split, missing ones counted."""
        start, stop = self.splits[split]
        if self.bags is None:
            return (stop - start) * self.bag_lengths[feature]
        ends = self.bags.offsets[start * len(self.names) : stop * len(self.names) + 1]
        return int(np.diff(ends)[feature :: len(self.names)].sum())

    def num_rows(self, feature: int, min_count: int) -> int:
        """Rows of a feature's table when ids seen less often than ``min_count`` in training share row 0."""
        counts = self.counts[feature]
        return 1 + int(np.searchsorted(-counts, -min_count, side="right"))

    def click_rate(self, split: str) -> float:
        """Share of clicks in a split, NaN where it has no rows or no labels."""
        start, stop = self.splits[split]
        return float(self.labels[start:stop].mean()) if start < stop and self.labelled else math.nan


def day_split(num_rows: int, days: int = 7) -> dict[str, tuple[int, int]]:
    """DLRM's own split of a log in time order: all days but the last train, its first half tests, its second validates.

    Days are equal shares of the rows, the first ones a row longer where they do not divide
    (facebookresearch/dlrm, data_utils.py and dlrm_data_pytorch.py).
    """
    last_day = num_rows // days
    start = num_rows - last_day
    middle = start + (last_day + 1) // 2
    if last_day < 2:
        raise UserError(
            f"{num_rows} rows are too few for the day split: it needs {2 * days}, or two a day. Give a longer log, or "
            "without --data a larger --synthetic-rows."
        )
    return {"train": (0, start), "test": (start, middle), "validation": (middle, num_rows)}


def save_meta(folder: Path, dataset_meta: dict[str, Any]) -> None:
    """Writes meta.json, the mark of a whole dataset."""
    with (folder / "meta.json").open("w") as file:
        json.dump({"format": FORMAT, **dataset_meta}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def save_dataset(folder: Path, dataset: PreparedDataset) -> None:
    """Writes a dataset that is in memory as a prepared folder, whole or not at all."""
    arrays: dict[str, NDArray[Any]] = {
        "labels": dataset.labels,
        "dense": dataset.dense,
        "ids": dataset.ids if dataset.bags is None else dataset.bags.ids,
        "counts": np.concatenate(dataset.counts),
    }
    if dataset.bags is not None:
        arrays["offsets"] = dataset.bags.offsets
    with written_whole(folder) as scratch:
        for name, array in arrays.items():
            np.save(scratch / f"{name}.npy", array)
        save_meta(
            scratch,
            {
                "source": dataset.source,
                "num_rows": len(dataset.labels),
                "dense": [f"I{k}" for k in range(1, dataset.dense.shape[1] + 1)],
                "tables": dataset.names,
                "bag_lengths": dataset.bag_lengths,
                "ids_per_table": [len(counts) for counts in dataset.counts],
                "splits": dataset.splits,
                "variable_bags": dataset.bags is not None,
            },
        )


def read_meta(folder: Path) -> dict[str, Any]:
    """The metadata of a prepared dataset; a UserError where the folder is not one of this version."""
    path = folder / "meta.json"
    remedy = "Prepare the raw log again, into another folder."
    if folder.is_file():
        raise UserError(f"{folder} is a file. Name a prepared folder, as python -m dlrm_xla_data prepare makes it.")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if not path.is_file():
        raise UserError(
            f"{folder} holds no meta.json, so it is no prepared dataset. Raw logs of several files are prepared first: "
            f"python -m dlrm_xla_data prepare {shlex.quote(str(folder))} NEW --format criteo-terabyte, or what format "
            "they have"
        )
    try:
        meta = json.loads(path.read_text())
        found = meta.get("format")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). {remedy}") from error
    if found != FORMAT:
        raise UserError(f"{folder} was prepared as {found!r}, but this version reads {FORMAT!r}. {remedy}")
    return dict(meta)


def open_prepared(folder: Path) -> PreparedDataset:
    """Maps a prepared dataset into memory, after checking that it is whole, and as it was if it was verified."""
    meta = read_meta(folder)
    _as_verified(folder)
    try:
        names = ["labels", "dense", "ids", "counts"] + (["offsets"] if meta.get("variable_bags") else [])
        arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in names}
        per_table = meta["ids_per_table"]
        shapes = {
            "labels": (meta["num_rows"],),
            "dense": (meta["num_rows"], len(meta["dense"])),
            "ids": (meta["num_rows"], sum(meta["bag_lengths"])),
            "counts": (sum(per_table),),
        }
        bags = None
        if "offsets" in arrays:
            offsets = arrays["offsets"]
            shapes |= {"offsets": (meta["num_rows"] * len(meta["tables"]) + 1,), "ids": (int(offsets[-1]),)}
            bags = Bags(arrays["ids"], offsets, len(meta["tables"]))
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name}.npy is {arrays[name].shape}, meta.json says {shape}")
        return PreparedDataset(
            arrays["labels"],
            arrays["dense"],
            arrays["ids"],
            np.split(np.asarray(arrays["counts"]), np.cumsum(per_table)[:-1]),
            meta["tables"],
            meta["bag_lengths"],
            {name: (int(a), int(b)) for name, (a, b) in meta["splits"].items()},
            meta["source"],
            bags,
            meta.get("labelled", True),
        )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{folder} is not a whole prepared dataset: {error}. Delete it and give the raw log to --data again."
        ) from error


def file_marks(folder: Path) -> dict[str, list[int]]:
    """Size and time of the last change of each file of a dataset: what tells cheaply that one was touched."""
    states = {f.name: f.stat() for f in sorted(folder.iterdir()) if f.suffix == ".npy" or f.name == "meta.json"}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _as_verified(folder: Path) -> None:
    path = folder / VERIFIED
    if not path.is_file():
        return
    try:
        marks = json.loads(path.read_text())
    except ValueError:
        marks = {}
    if "unsound" in marks:
        raise UserError(f"{folder} was verified and is not sound: {marks['unsound']}. Prepare it again.")
    now = file_marks(folder)
    changed = [name for name in {**marks, **now} if marks.get(name) != now.get(name)]
    if changed:
        # A copy has other times, but sizes tell which file is not what it was.
        changed.sort(key=lambda name: marks.get(name, [0])[0] == now.get(name, [0])[0])
        raise UserError(
            f"{folder / changed[0]} was changed, or copied, after the dataset was verified. Run "
            f"`python -m dlrm_xla_data verify {shlex.quote(str(folder))}` again."
        )


@contextlib.contextmanager
def written_whole(folder: Path, resumable: bool = False) -> Iterator[Path]:
    """A scratch folder that gets its real name when the block ends well, and vanishes when it does not.

    What is ``resumable`` stays when it is interrupted, and is there again the next time. A full disk and a folder that
    may not be written are told as what they are.
    """
    scratch = folder.with_name(f"{folder.name}.unfinished")
    keep = False
    try:
        if not resumable:
            shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)
        yield scratch
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full while writing {folder}; nothing of it was kept. Free some space, or name a folder "
                "on another disk (launch/run.py: --data-cache)."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise UserError(
                f"cannot write {folder}: {error.strerror}. Name a folder of yours (launch/run.py: --data-cache)."
            ) from error
        raise
    except (KeyboardInterrupt, SystemExit):
        keep = resumable
        raise
    finally:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
