"""What the ids of a prepared dataset stand for: kept with it, so that later rows can be given the same ids.

values.npy     int64  [sum]  codes of the values that have an id (`dlrm_xla_data.parsing`), table after table, rising
value_ids.npy  int32  [sum]  their ids
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.errors import UserError
from dlrm_xla_data.prepared import open_prepared, read_meta
from dlrm_xla_data.vocabulary import Codes

VALUES, IDS = "values", "value_ids"


@dataclass(frozen=True)
class ValueIds:
    """The values and ids of a dataset's tables, mapped from its folder."""

    tables: list[tuple[Codes, NDArray[np.int32]]]

    def ids(self, table: int, codes: Codes) -> NDArray[np.int32]:
        """Ids of codes; 0 where they have none."""
        values, ids = self.tables[table]
        if not len(values):
            return np.zeros(len(codes), np.int32)
        # Values rise, so a few rows read little of a large table.
        at = np.minimum(np.searchsorted(values, codes), len(values) - 1)
        return np.where(values[at] == codes, ids[at], np.int32(0))


@dataclass(frozen=True)
class KnownIds:
    """The values and ids of a dataset, and what it was prepared with."""

    folder: Path
    meaning: str
    features: dict[str, Any]
    options: dict[str, Any]
    bag_lengths: list[int]
    counts: list[NDArray[np.int64]]
    values: ValueIds
    digest: str


def read_values(folder: Path, meta: dict[str, Any]) -> ValueIds:
    """The values and ids of a prepared folder with that metadata; a UserError where it does not have them."""
    if origin := meta.get("ids_of"):
        raise UserError(f"{folder}: its ids are those of {origin['folder']}. Name that folder.")
    again = "Prepare its log again, into another folder."
    if "values_per_table" not in meta:
        remedy = again if "key" in meta else "Its rows are synthetic."
        raise UserError(f"{folder}: what its ids stand for was not kept when it was made. {remedy}")
    sizes = meta["values_per_table"]
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in (VALUES, IDS)]
        for name, array in zip((VALUES, IDS), arrays, strict=True):
            if array.shape != (sum(sizes),):
                raise ValueError(f"{name}.npy is {array.shape}, meta.json says {sum(sizes):,} values")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}. {again}") from error
    parts = [np.split(np.asarray(array), np.cumsum(sizes)[:-1]) for array in arrays]
    return ValueIds(list(zip(*parts, strict=True)))


def read_known(folder: Path) -> KnownIds:
    """The ids of a prepared folder for a preparation; a UserError where it does not have them."""
    meta = read_meta(folder)
    try:
        values = read_values(folder, meta)
    except UserError as error:
        raise UserError(f"--ids-of {error}") from error
    dataset = open_prepared(folder)
    return KnownIds(
        folder.resolve(),
        meta["meaning"],
        {name: value for name, value in meta.get("features", {}).items() if name != "layout"},
        meta["options"],
        dataset.bag_lengths,
        dataset.counts,
        values,
        meta["checksums"][VALUES] + meta["checksums"][IDS],
    )
