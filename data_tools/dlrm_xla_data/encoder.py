"""Rows as a service meets them -> what a trained model is given: the numbers and ids that a prepared log would have."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.errors import UserError
from dlrm_xla_data import layout as layouts
from dlrm_xla_data.bags import PADDING
from dlrm_xla_data.known_ids import read_values
from dlrm_xla_data.multi_hot import more_ids
from dlrm_xla_data.parsing import Misfit, is_number, parse_table, read_integer, text_types
from dlrm_xla_data.prepared import read_meta

Row = Mapping[str, Any]


class Encoder:
    """Maps rows to the dense features [B, I] float32 and ids [B, S] int32 of a model trained on a prepared dataset.

    A row is a mapping from the log's columns to values; others are not looked at. None is missing, and so is an empty
    text where the log was CSV, whose fields may be given as text or as numbers, and a number that is NaN. Several
    values of a column are a list. The rows of a Parquet log have values of its columns' types. Ids are those of
    `prepare --ids-of`: 0 for what is missing or was not seen in training, -1 in slots that a bag of varying length does
    not fill.

    Reads meta.json, values.npy and value_ids.npy of the folder, of the last two only what it looks up. Raises UserError
    where the folder does not have them; of a row ValueError with its number, column and value.
    """

    def __init__(self, folder: str | Path) -> None:
        import pyarrow as pa

        folder = Path(folder)
        meta = read_meta(folder)
        self._values = read_values(folder, meta)
        if "features" not in meta:
            raise UserError(
                f"{folder}: how its columns are read was not kept. Prepare its log again, into another folder."
            )
        self._layout = layouts.of_features(meta["features"])
        if self._layout.parquet:
            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(meta["schema"])))
            self._types = {name: schema.field(name).type for name in self._layout.needed}
        else:
            self._types = text_types(self._layout, self._layout.needed)
        self._separators = {c.name: c.separator for c in self._layout.categories}
        self._bag_lengths: list[int] = meta["bag_lengths"]
        self._rows_of_tables: list[int] = [n + 1 for n in meta["ids_per_table"]]
        self._seed: int = meta["options"]["seed"]

    def __call__(self, rows: Sequence[Row]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Dense features and ids of rows, at least one."""
        if not rows:
            raise ValueError("no rows: a model takes at least one")
        try:
            return self._encode(rows)
        except ValueError as error:
            for number, row in enumerate(rows):
                try:
                    self._encode([row])
                except ValueError as problem:
                    raise ValueError(f"row {number}: {problem}") from error
            raise

    def _encode(self, rows: Sequence[Row]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        import pyarrow as pa

        table = pa.table({name: self._column(name, [_value(row, name) for row in rows]) for name in self._types})
        try:
            parsed = parse_table(table, self._layout)
        except Misfit as misfit:
            raise ValueError(str(misfit)) from misfit
        ids = [self._values.ids(k, codes) for k, codes in enumerate(parsed.codes)]
        if not self._layout.variable_bags:
            return parsed.dense, more_ids(np.stack(ids, 1), self._bag_lengths, self._rows_of_tables, self._seed)
        bags = [self._padded(k, of_table, parsed.lengths[k]) for k, of_table in enumerate(ids)]
        return parsed.dense, np.concatenate(bags, 1)

    def _column(self, name: str, values: list[Any]) -> Any:
        import pyarrow as pa

        kind = self._types[name]
        try:
            if not self._layout.parquet:
                fields = [_joined(value, self._separators.get(name, "")) for value in values]
                if pa.types.is_binary(kind):
                    values = [_text(field) for field in fields]
                else:
                    read = _integer if pa.types.is_integer(kind) else _real
                    values = [_number(field, read) for field in fields]
            return pa.array(values, kind)
        except _NoValue as error:
            raise ValueError(f"column {name} is {_shown(values)}, expected {error}") from error
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise ValueError(f"column {name} is {_shown(values)}, expected {kind}: {error}") from error

    def _padded(self, k: int, ids: NDArray[np.int32], lengths: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """Ids [B, longest bag in training] of one feature."""
        longest = self._bag_lengths[k]
        if lengths is None:
            lengths = np.ones(len(ids), np.int32)
        if lengths.max() > longest:
            raise ValueError(
                f"column {self._layout.categories[k].name} has {lengths.max()} values, but no more than {longest} in "
                "any row of the dataset: leave some out"
            )
        within = np.arange(longest) < lengths[:, None]
        padded = np.full(within.shape, PADDING, np.int32)
        padded[within] = ids
        return padded


class _NoValue(Exception):
    """A field of a CSV is not what the message says."""


def _joined(value: Any, separator: str) -> Any:
    """Several values as a field has them."""
    if not isinstance(value, list | tuple):
        return value
    if not separator:
        raise _NoValue("one value")
    return separator.join(map(str, value))


def _text(value: Any) -> bytes | None:
    """The text of a field, None where it is missing."""
    if isinstance(value, str):
        return value.encode() or None
    if isinstance(value, bool | float | np.floating):
        raise _NoValue("the text that stood in the log")
    if value is None or isinstance(value, bytes):
        return value or None
    return str(value).encode()


def _number(value: Any, read: Callable[[bytes], float]) -> Any:
    """The number that Arrow reads in a field, None where it is missing."""
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes):
        return None if value != value else value  # NaN
    return read(value) if value else None


def _integer(text: bytes) -> int:
    number = read_integer(text)
    if number is None:
        raise _NoValue("an integer or nothing")
    return number


def _real(text: bytes) -> float:
    if not is_number(text):
        raise _NoValue("a number or nothing")
    return float(text)


def _value(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"there is no column {name!r}; a missing value is None")
    return row[name]


def _shown(values: list[Any]) -> str:
    text = repr(values[0])
    return text if len(text) <= 40 else text[:40] + "..."
