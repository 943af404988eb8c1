"""Blocks of a raw log -> labels, dense features and codes of categories; rows that are not of the format are named.

A code is 64 bits that stand for a category's value: the number itself, or for text the first 8 bytes of BLAKE2b, where
among n values two meet with a probability of about n^2 / 2^65 (3e-5 for 30 million).
"""

from __future__ import annotations

import base64
import csv as python_csv
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.errors import UserError
from dlrm_xla_data.layout import HEX, NUMBER, Layout
from dlrm_xla_data.lines import BYTE_ORDER_MARK, Block

MISSING = np.iinfo(np.int64).min
PARTS = ("train", "test", "validation")
_PARQUET_ROWS = 2**17
_FLOAT32_MAX = float(np.finfo(np.float32).max)

# Two ASCII bytes, read as one little-endian number -> the value of two hexadecimal digits, 0xFFFF for anything else.
_DIGITS = {ord(c): int(c, 16) for c in "0123456789abcdefABCDEF"}
_HEX_PAIRS = np.full(2**16, 0xFFFF, np.uint16)
for _high, _a in _DIGITS.items():
    for _low, _b in _DIGITS.items():
        _HEX_PAIRS[_high + 256 * _low] = 16 * _a + _b

_DATES = "a date or time such as 2024-01-31 or 2024-01-31T23:59:59.5Z, in UTC"
_TEXT_OF_KIND = {HEX: "up to 8 hexadecimal digits or nothing", NUMBER: "an integer or nothing"}


class Misfit(Exception):
    """Some row of a block is not of the format; which one is found by reading line by line."""


@dataclass
class Parsed:
    """Rows of a block: labels int8 [n], dense float32 [n, I], a list of codes int64 for each category, and what else.

    ``lengths`` has for each category how many codes each row has, None where it is always one. ``order`` is the time
    or the part of each row, if the layout names such a column.
    """

    labels: NDArray[np.int8]
    dense: NDArray[np.float32]
    codes: list[NDArray[np.int64]]
    lengths: list[NDArray[np.int32] | None]
    order: NDArray[np.int64] | None = None
    bad: list[tuple[Path, int, str]] = field(default_factory=list)


def parse(block: Block, layout: Layout, keep_good: bool = False) -> Parsed:
    """Parses a block's lines.

    Raises UserError with file and line for the first row that is not of the layout; with ``keep_good`` such rows are
    left out and listed in ``bad`` instead.
    """
    try:
        return parse_table(_read(block.data, layout), layout)
    except Misfit as misfit:
        bad: list[tuple[Path, int, str]] = []
        good = []
        for number, line in enumerate(block.data.split(b"\n"), block.first_line):
            if not line:
                continue
            problem = problem_of(line, layout)
            if problem is None:
                good.append(line)
                continue
            if not keep_good:
                raise UserError(f"{block.path}, line {number}: {problem}") from misfit
            bad.append((block.path, number, problem))
        if not bad:
            raise UserError(f"{block.path}, lines {block.first_line} to {_last_line(block)}: {misfit}") from misfit
        try:
            parsed = parse_table(_read(b"".join(line + b"\n" for line in good), layout), layout)
        except Misfit as again:
            raise UserError(f"{block.path}, lines {block.first_line} to {_last_line(block)}: {again}") from again
        parsed.bad = bad
        return parsed


def _last_line(block: Block) -> int:
    return block.first_line + block.data.count(b"\n") - 1


def list_columns(files: Sequence[Path]) -> set[str]:
    """Columns that are lists in any of these Parquet files; UserError where one cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: set[str] = set()
    for path in files:
        try:
            found |= {field.name for field in pq.read_schema(path) if _is_list(field.type)}
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    return found


def feature_schema(path: Path, layout: Layout) -> str:
    """The types of a Parquet file's columns that features are made of, as Arrow writes a schema, in base64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {*layout.dense, *(category.name for category in layout.categories)}
    fields = [
        # What a dictionary stands for: requests hold the values themselves.
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in pq.read_schema(path)
        if field.name in features
    ]
    return base64.b64encode(pa.schema(fields).serialize()).decode()


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def parse_parquet(path: Path, layout: Layout, first_row: int, most_bad: int = 0) -> Iterator[tuple[Parsed, int]]:
    """Parses a Parquet file's rows from ``first_row`` on, with the number of rows read so far.

    Raises UserError with file and row for the first row that is not of the layout; with ``most_bad`` such rows are left
    out and listed in ``bad`` instead, and a block that has more of them is left out as a whole.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        layout = layout.with_columns(file.schema_arrow.names, path)
        row = 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=layout.needed):
            row += batch.num_rows
            if row > first_row:
                yield _parsed_rows(pa.Table.from_batches([batch]), layout, path, row - batch.num_rows, most_bad), row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _parsed_rows(table: Any, layout: Layout, path: Path, before: int, most_bad: int) -> Parsed:
    import pyarrow as pa

    try:
        return parse_table(table, layout)
    except (Misfit, pa.ArrowInvalid, pa.ArrowNotImplementedError) as misfit:
        found = _bad_rows(table, layout, most_bad + 1)
        if found and not most_bad:
            raise UserError(f"{path}, row {before + found[0][0] + 1}: {found[0][1]}") from misfit
        bad = [(path, before + k + 1, problem) for k, problem in found]
        if len(bad) > most_bad:
            none = np.zeros(0, np.int64)
            no_codes = [none] * len(layout.categories)
            no_dense = np.zeros((0, len(layout.dense)), np.float32)
            return Parsed(none.astype(np.int8), no_dense, no_codes, [None] * len(no_codes), none, bad)
        try:
            parsed = parse_table(_taken(table, np.delete(np.arange(len(table)), [k for k, _ in found])), layout)
        except (Misfit, pa.ArrowInvalid, pa.ArrowNotImplementedError) as again:
            raise UserError(f"{path}, rows {before + 1} to {before + len(table)}: {again}") from again
        parsed.bad = bad
        return parsed


def _bad_rows(table: Any, layout: Layout, most: int) -> list[tuple[int, str]]:
    """The first rows that are not of the layout, at most so many, by halving where they are."""
    import pyarrow as pa

    found: list[tuple[int, str]] = []
    waiting = [(0, len(table))]
    while waiting and len(found) < most:
        first, stop = waiting.pop()
        try:
            parse_table(_taken(table, np.arange(first, stop)), layout)
        except (Misfit, pa.ArrowInvalid, pa.ArrowNotImplementedError) as misfit:
            if stop - first == 1:
                found.append((first, str(misfit)))
            else:
                middle = (first + stop) // 2
                waiting += [(middle, stop), (first, middle)]
    return found


def _taken(table: Any, rows: NDArray[np.int64]) -> Any:
    """Rows of a table, copied: `_from_hex` reads what lies in memory from its beginning."""
    import pyarrow as pa

    return table.take(pa.array(rows, pa.int64()))


def text_types(layout: Layout, names: Sequence[str]) -> dict[str, Any]:
    """What Arrow reads the needed columns of a text log as, in their order."""
    import pyarrow as pa

    needed = set(layout.needed)
    types = {name: pa.binary() for name in names if name in needed}
    types |= dict.fromkeys((n for n in layout.dense if n in types), pa.int64() if layout.integers else pa.float64())
    if layout.label:
        types[layout.label] = pa.float64() if layout.above is not None else pa.int8()
    types |= {n: pa.int64() for n in types if layout.kind(n) == NUMBER}
    if layout.time:
        types[layout.time] = pa.string() if layout.dates else pa.int64()
    return types


def _read(data: bytes, layout: Layout) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    assert layout.columns is not None
    types = text_types(layout, layout.columns)
    needed = list(types)
    if not data.strip(b"\n"):
        return pa.table({n: pa.array([], types[n]) for n in needed})
    if data.startswith(BYTE_ORDER_MARK):
        data = b"\n" + data  # Arrow would drop the mark, but only a file may begin with one, not a block of its lines
    try:
        table = csv.read_csv(
            pa.BufferReader(data),
            read_options=csv.ReadOptions(
                block_size=len(data) + 1, column_names=list(layout.columns), use_threads=False
            ),
            parse_options=csv.ParseOptions(
                delimiter=layout.delimiter, quote_char='"' if layout.quoted else False, ignore_empty_lines=True
            ),
            convert_options=csv.ConvertOptions(
                column_types=types, null_values=[""], strings_can_be_null=True, include_columns=needed
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise Misfit(str(error)) from error
    if layout.quoted and b'"' in data and len(table) != sum(1 for line in data.split(b"\n") if line):
        # Blocks end at line ends, so such a field would be read in one block and be cut in the next.
        raise Misfit("a quoted field goes over several lines")
    return table


def parse_table(table: Any, layout: Layout) -> Parsed:
    """Parses an Arrow table; Misfit where a row is not of the layout."""
    import pyarrow as pa

    order = None
    if layout.time:
        try:
            order = _times(_one(table, layout.time), layout)
        except pa.ArrowInvalid as error:
            raise Misfit(f"column {layout.time}, which orders the rows: {error}") from error
    elif layout.split:
        order = _parts(table, layout.split)
    labels = _labels(table, layout)
    if layout.derive is not None:
        try:
            table = layout.derive(table)
        except ValueError as error:
            raise Misfit(f"column {layout.time}, {error}") from error
    dense = np.empty((len(table), len(layout.dense)), np.float32)
    for k, (name, transform) in enumerate(layout.dense.items()):
        values = _numbers(_one(table, name), name)
        if layout.parquet and values.dtype.kind == "f":
            values = np.where(np.isnan(values), 0, values)  # missing; in the text of a CSV it is no number
        with np.errstate(over="ignore"):  # what float32 does not hold is refused below
            if transform == "log1p":
                # In float64, for numpy's float32 logarithm ends in another bit on another processor, and then the same
                # log would be other data.
                dense[:, k] = np.log1p(np.maximum(values, 0).astype(np.float32).astype(np.float64))
            else:
                dense[:, k] = values
    finite = np.isfinite(dense)
    if not finite.all():
        name = list(layout.dense)[int(finite.all(0).argmin())]
        raise Misfit(f"dense column {name} is not finite, or not within float32")
    codes, lengths = [], []
    for category in layout.categories:
        code, length = _codes(_one(table, category.name), category)
        codes.append(code)
        lengths.append(length)
    return Parsed(labels, dense, codes, lengths, order)


def _one(table: Any, name: str) -> Any:
    """A column in one piece."""
    import pyarrow as pa

    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # what older versions of Arrow give
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _numbers(column: Any, name: str) -> NDArray[Any]:
    """A dense column as numbers, 0 where it is null."""
    import pyarrow as pa

    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    elif pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise Misfit(f"dense column {name} is {column.type}, expected numbers")
    if column.null_count:
        column = column.fill_null(0)
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _labels(table: Any, layout: Layout) -> NDArray[np.int8]:
    import pyarrow as pa

    if not layout.label:
        return np.zeros(len(table), np.int8)
    column = _one(table, layout.label)
    if column.null_count:
        raise Misfit("a label is missing")
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise Misfit(f"the label column {layout.label} is {column.type}, expected numbers{_label_fix(layout)}")
    values = column.to_numpy(zero_copy_only=False)
    if layout.above is not None:
        if not np.isfinite(values).all():
            raise Misfit("a label is no number")
        return np.asarray(values > layout.above, np.int8)
    if not ((values == 0) | (values == 1)).all():
        raise Misfit(f"a label is neither 0 nor 1{_label_fix(layout)}")
    return np.asarray(values, np.int8)


def _label_fix(layout: Layout) -> str:
    """What to do about labels that are none, where a user says what they are."""
    if not layout.own or layout.above is not None:
        return ""
    return (
        f": write 0 or 1, or give `label: {{column: {layout.label}, above: N}}`, which is 1 where the number is larger"
    )


def _times(column: Any, layout: Layout) -> NDArray[np.int64]:
    """Integers that order the rows: of dates and times the microseconds since 1970, in UTC, further digits cut off."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if layout.dates and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        column = pc.replace_substring_regex(column, pattern=r"(\.[0-9]{6})[0-9]{0,3}Z?$|Z$", replacement=r"\1")
        column = column.cast(pa.timestamp("us"))
    elif pa.types.is_date(kind):
        column = column.cast(pa.timestamp("us"))
    if pa.types.is_timestamp(column.type):
        micro = pc.CastOptions(pa.timestamp("us", column.type.tz), allow_time_truncate=True)
        column = pc.cast(column, options=micro).cast(pa.int64())
    if column.null_count or not pa.types.is_integer(column.type):
        text = f". For text give `time: {{column: {layout.time}, kind: date}}`" if layout.own else ""
        raise Misfit(
            f"column {layout.time}, which orders the rows, is {kind}, or missing in a row: expected integers, dates or "
            f"times in every row{text}"
        )
    return np.asarray(column.to_numpy(zero_copy_only=False), np.int64)


def _parts(table: Any, name: str) -> NDArray[np.int64]:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = _one(table, name)
    found = pc.index_in(column.cast(pa.binary()), value_set=pa.array([p.encode() for p in PARTS], pa.binary()))
    if found.null_count:
        raise Misfit(f"column {name} must be one of {', '.join(PARTS)} in every row")
    return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def _codes(column: Any, category: Any) -> tuple[NDArray[np.int64], NDArray[np.int32] | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    several = _is_list(column.type)
    if not several:
        column = _with_codes(column, category.name)
    if category.separator:
        if several or pa.types.is_integer(column.type):
            raise Misfit(f"category {category.name} is {column.type}, expected text, for it has a separator")
        split = pc.split_pattern(column.fill_null(b""), category.separator.encode())
        column, several = split, True
    if several:
        codes, lengths = _several(column, category)
        if category.separator or category.at_most > 1:
            return codes, lengths
        single = np.full(len(column), MISSING, np.int64)
        single[lengths > 0] = codes
        return single, None
    if pa.types.is_integer(column.type):
        codes = np.asarray(column.fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    elif category.kind == HEX:
        codes = _from_hex(column, category.name)
    elif category.kind == NUMBER:
        raise Misfit(f"category {category.name} is {column.type}, expected integers")
    else:
        codes = _from_text(column)
    if column.null_count:
        codes = np.where(column.is_null().to_numpy(zero_copy_only=False), MISSING, codes)
    if category.at_most == 1:
        return codes, None
    present = codes != MISSING
    return codes[present], present.astype(np.int32)


def _with_codes(column: Any, name: str) -> Any:
    """A category as integers, text or bytes: whole real numbers, booleans, dates and times are numbers, NaN is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    views = {"string_view": pa.large_string(), "binary_view": pa.large_binary()}  # older versions know no such types
    if str(kind) in views:
        column, kind = column.cast(views[str(kind)]), views[str(kind)]
    try:
        if pa.types.is_boolean(kind):
            return column.cast(pa.int8())
        if pa.types.is_date(kind):
            return column.cast(pa.date32()).cast(pa.int32())
        if pa.types.is_timestamp(kind):  # one value has one code, whatever the unit of its file
            return column.cast(pa.timestamp("us", kind.tz)).cast(pa.int64())
        if pa.types.is_floating(kind):
            numbers = column.cast(pa.float64())
            return pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers).cast(pa.int64())
    except pa.ArrowInvalid as error:
        held = "microseconds" if pa.types.is_timestamp(kind) else "integers of 64 bits"
        raise Misfit(f"category {name} is {kind}, and a value is not in whole {held}: write it as text") from error
    if pa.types.is_null(kind) or pa.types.is_fixed_size_binary(kind):
        return column.cast(pa.binary())
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not (pa.types.is_integer(kind) or any(is_text(kind) for is_text in texts)):
        raise Misfit(f"category {name} is {kind}: write it as integers, text or dates, or as lists of them")
    return column


def _several(column: Any, category: Any) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The first values of each row that are not empty, as many as there may be; none is none, not a missing value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    flat = _with_codes(pc.list_flatten(column), category.name)
    parents = pc.list_parent_indices(column).to_numpy()
    codes = (
        np.asarray(flat.fill_null(0).to_numpy(zero_copy_only=False), np.int64)
        if pa.types.is_integer(flat.type)
        else _from_text(flat)
    )
    present = flat.is_valid().to_numpy(zero_copy_only=False)
    if not pa.types.is_integer(flat.type):
        present &= pc.greater(
            pc.binary_length(flat.fill_null("" if pa.types.is_string(flat.type) else b"")), 0
        ).to_numpy(zero_copy_only=False)
    codes, parents = codes[present], np.asarray(parents[present], np.int64)
    starts = np.searchsorted(parents, np.arange(len(column)))
    kept = np.arange(len(parents)) - starts[parents] < category.at_most
    codes, parents = codes[kept], parents[kept]
    return codes, np.bincount(parents, minlength=len(column)).astype(np.int32)


def _from_hex(column: Any, name: str) -> NDArray[np.int64]:
    """Up to eight hexadecimal digits -> the number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    filled = column.fill_null(b"0" * 8) if column.null_count else column
    sizes = pc.binary_length(filled)
    shortest, longest = pc.min_max(sizes).as_py().values() if len(filled) else (8, 8)
    if longest > 8 or shortest == 0:
        raise Misfit(f"category {name} is not {_TEXT_OF_KIND[HEX]}")
    if shortest < 8:
        try:
            filled = pc.ascii_lpad(filled.cast(pa.string()), width=8, padding="0")
        except pa.ArrowInvalid as error:  # not even text
            raise Misfit(str(error)) from error
    text = np.frombuffer(filled.buffers()[2] or b"", np.uint16)[filled.offset * 4 :][: len(filled) * 4]
    pairs = _HEX_PAIRS[text]
    if len(pairs) and pairs.max() > 255:
        raise Misfit(f"category {name} is not hexadecimal")
    return np.asarray(pairs.astype(np.uint8).view(">u4"), np.int64)


def _from_text(column: Any) -> NDArray[np.int64]:
    """Text or bytes -> 64 bits of their digest, made once for each value of the block."""
    import pyarrow as pa

    encoded = column.cast(pa.binary()).fill_null(b"").dictionary_encode()
    digests = b"".join(hashlib.blake2b(value, digest_size=8).digest() for value in encoded.dictionary.to_pylist())
    return np.asarray(np.frombuffer(digests, "<i8")[encoded.indices.to_numpy()], np.int64)


def problem_of(line: bytes, layout: Layout) -> str | None:
    """What is wrong with a line, None if nothing is."""
    assert layout.columns is not None
    fields = line.split(layout.delimiter.encode())
    if layout.quoted and b'"' in line:
        if line.count(b'"') % 2:
            return "a quote is not closed on its line: a row is one line"
        text = line.decode("latin-1")
        fields = [f.encode("latin-1") for f in next(python_csv.reader([text], delimiter=layout.delimiter))]
    hint = layout.check(fields)
    if hint:
        return hint
    if len(fields) != len(layout.columns):
        parted = "tab-separated " if layout.delimiter == "\t" else ""
        return f"{len(fields)} {parted}columns, expected {len(layout.columns)}: {', '.join(_named(layout))}"
    values = dict(zip(layout.columns, fields, strict=True))
    if layout.label:
        label = values[layout.label]
        if layout.above is None and read_integer(label, 8) not in (0, 1):
            return f"the label is {_shown(label)}, expected 0 or 1{_label_fix(layout)}"
        if layout.above is not None and not is_number(label):
            return f"the label is {_shown(label)}, expected a number"
    for name in layout.dense:
        value = values.get(name, b"")
        if layout.integers and value and read_integer(value) is None:
            return f"column {name} is {_shown(value)}, expected an integer or nothing"
        if not layout.integers and value and not is_number(value, _FLOAT32_MAX):
            return f"column {name} is {_shown(value)}, expected a number or nothing"
    for category in layout.categories:
        value = values.get(category.name, b"")
        if value and category.kind == HEX and (len(value) > 8 or any(b not in _DIGITS for b in value)):
            return f"column {category.name} is {_shown(value)}, expected {_TEXT_OF_KIND[HEX]}"
        if value and category.kind == NUMBER and read_integer(value) is None:
            return f"column {category.name} is {_shown(value)}, expected {_TEXT_OF_KIND[NUMBER]}"
        if value and _is_real(layout, category.name) and not _is_whole(value):
            return f"column {category.name} is {_shown(value)}, expected a whole number, for it is a category too"
    if layout.time and layout.dates:
        problem = _no_time(values[layout.time], layout)
        if problem:
            return f"column {layout.time} is {_shown(values[layout.time])}, {problem}"
    elif layout.time and read_integer(values[layout.time]) is None:
        fix = f", or, with `time: {{column: {layout.time}, kind: date}}`, {_DATES}" if layout.own else ""
        return f"column {layout.time} is {_shown(values[layout.time])}, expected an integer{fix}: it orders the rows"
    if layout.time and layout.derive is not None:
        problem = _underived(layout.derive, layout.time, values[layout.time])
        if problem:
            return f"column {layout.time} is {_shown(values[layout.time])}, {problem}"
    if layout.split and values[layout.split] not in [p.encode() for p in PARTS]:
        return f"column {layout.split} is {_shown(values[layout.split])}, expected one of {', '.join(PARTS)}"
    return None


@functools.lru_cache(2**12)
def _underived(derive: Callable[[Any], Any], name: str, value: bytes) -> str | None:
    """Why nothing follows from a value, None if something does; many rows have the same one."""
    import pyarrow as pa

    try:
        derive(pa.table({name: pa.array([read_integer(value)], pa.int64())}))
    except ValueError as error:
        return str(error)
    return None


def _no_time(value: bytes, layout: Layout) -> str | None:
    """Why a text is no time, None if it is one."""
    import pyarrow as pa

    try:
        _times(pa.array([value or None], pa.binary()).cast(pa.string()), layout)
    except (Misfit, pa.ArrowInvalid):
        return f"expected {_DATES}: it orders the rows"
    return None


def _named(layout: Layout) -> list[str]:
    names = list(layout.columns or ())
    if layout.name == "criteo":
        return [*(["label"] if layout.label else []), "13 integers", "26 categories"]
    return names if len(names) < 8 else [*names[:4], "...", names[-1]]


def read_integer(value: bytes, bits: int = 64) -> int | None:
    """The number that Arrow reads, None where it reads none: spaces around it and hexadecimal digits are well."""
    text = value.strip(b" \t")
    if re.fullmatch(rb"0[xX][0-9a-fA-F]{1,%d}" % (bits // 4), text):
        number = int(text, 16)
        return number - (number >> (bits - 1) << bits)
    if not re.fullmatch(rb"-?[0-9]+", text):
        return None
    number = int(text)
    return number if -(2 ** (bits - 1)) <= number < 2 ** (bits - 1) else None


def is_number(value: bytes, most: float = sys.float_info.max) -> bool:
    """Whether Arrow reads a finite number of at most this size."""
    text = value.strip(b" \t")
    return bool(re.fullmatch(rb"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text)) and abs(float(text)) <= most


def _is_real(layout: Layout, name: str) -> bool:
    """Whether a category is read as real numbers, for it is a number too."""
    return name in layout.dense and not layout.integers and name != layout.time and layout.kind(name) != NUMBER


def _is_whole(value: bytes) -> bool:
    number = float(value.strip(b" \t"))
    return number.is_integer() and -(2**63) <= number < 2**63


def _shown(value: bytes) -> str:
    text = value.decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:40] + "...")
