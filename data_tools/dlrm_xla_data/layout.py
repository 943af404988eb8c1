"""What columns a raw log has and what becomes of them: the public logs by name, any other from a small YAML file."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dlrm_xla.errors import UserError, choices

TRANSFORMS = ("none", "log1p")
HEX, NUMBER, TEXT = "hexadecimal", "integer", "text"
DATE = "date"
YAML = (".yaml", ".yml")
_SEVERAL = 10
_DELIMITERS = ";\t|,"


@dataclass(frozen=True)
class Category:
    """A categorical column: how its values are written, and for several in one field what separates them.

    ``at_most`` is 0 until a Parquet file says whether the column is one of lists, see `Layout.with_lists`.
    """

    name: str
    kind: str = TEXT
    separator: str = ""
    at_most: int = 1


@dataclass(frozen=True)
class Layout:
    """Columns of a log and their use.

    ``columns`` are those of the file in order; with ``header`` its first line names them. ``label`` is 1 where its
    column says 1 or, with ``above``, more than that; None where rows have none yet. ``dense`` gives each number's
    transform: "none", or "log1p", log(max(x, 0) + 1), missing 0 either way. ``integers``: numbers must be whole.
    ``derive`` makes further columns from that of ``time``, and raises ValueError for a value that cannot be. ``time``
    or ``split`` name a column that decides a row's part. With ``dates`` times are text, dates and times of ISO 8601.
    ``parquet``: files are Parquet.
    """

    name: str
    columns: tuple[str, ...] | None
    delimiter: str
    label: str | None
    dense: dict[str, str]
    categories: tuple[Category, ...]
    above: float | None = None
    quoted: bool = False
    integers: bool = False
    derive: Callable[[Any], Any] | None = None
    derived: tuple[str, ...] = ()
    time: str | None = None
    split: str | None = None
    parquet: bool = False
    header: bool = False
    dates: bool = False
    check: Callable[[list[bytes]], str | None] = lambda fields: None

    @property
    def own(self) -> bool:
        """Whether a YAML file describes it."""
        return self.name.endswith(YAML)

    @property
    def needed(self) -> list[str]:
        """Columns that the file must have, each once."""
        names = [self.label, *self.dense, *(c.name for c in self.categories), self.time, self.split]
        return [n for n in dict.fromkeys(names) if n and n not in self.derived]

    @property
    def variable_bags(self) -> bool:
        """Whether any column holds several values a row."""
        return any(c.separator or c.at_most > 1 for c in self.categories)

    @property
    def meaning(self) -> str:
        """What decides which numbers and ids a row has, whatever else its file holds and in which order."""
        return repr((self.dense, self.categories, self.quoted, self.integers, self.derived, self.parquet))

    def features(self) -> dict[str, Any]:
        """What a row is read by when it has neither a label nor a part, for `of_features`."""
        return {
            "layout": self.name,
            "dense": self.dense,
            "categories": [asdict(category) for category in self.categories],
            "integers": self.integers,
            "parquet": self.parquet,
        }

    def for_later_rows(self) -> Layout:
        """The same without what only a split needs."""
        return replace(self, split=None, time=self.time if self.derived else None)

    def without_label(self) -> Layout:
        """The same for rows that have no label yet: where no header says what columns there are, its column is gone."""
        unlabelled = replace(self, label=None, check=lambda fields: None)
        columns = [c for c in self.columns or () if c != self.label]
        return replace(unlabelled, columns=tuple(columns) if columns else None)

    def kind(self, name: str) -> str:
        """How a category's values are written."""
        return next((c.kind for c in self.categories if c.name == name), TEXT)

    def with_columns(self, names: Sequence[str], file: Path) -> Layout:
        """The same for a file that has these columns; UserError where one is missing."""
        missing = [n for n in self.needed if n not in names]
        if not missing:
            return replace(self, columns=tuple(names))
        hint = choices(missing[0], names)
        marks = [mark for mark in _DELIMITERS if mark in names[0]] if self.header and len(names) == 1 else []
        if marks:
            hint = f"its header is one name, {names[0]!r}. Give `delimiter: {json.dumps(marks[0])}` in a FILE.yaml."
        raise UserError(f"{file} has no column {missing[0]!r}: {hint}")

    def with_lists(self, lists: Collection[str]) -> Layout:
        """The same for Parquet files where these columns are lists, for categories that do not say ``at_most``."""
        return replace(
            self,
            categories=tuple(
                c if c.at_most else replace(c, at_most=_SEVERAL if c.name in lists else 1) for c in self.categories
            ),
        )


def criteo() -> Layout:
    """Criteo's click logs: label, 13 integers, 26 hashed categories, tab-separated, without a header.

    Dense: log(max(x, 0) + 1) (facebookresearch/dlrm, data_utils.py).
    """
    integers = [f"I{k}" for k in range(1, 14)]
    names = [f"C{k}" for k in range(1, 27)]
    return Layout(
        name="criteo",
        columns=("label", *integers, *names),
        delimiter="\t",
        label="label",
        dense=dict.fromkeys(integers, "log1p"),
        categories=tuple(Category(n, HEX) for n in names),
        integers=True,
        check=_criteo_hint,
    )


def _criteo_hint(fields: list[bytes]) -> str | None:
    if len(fields) == 39:
        return (
            "39 columns, and no label: this is the unlabelled test form of the Criteo log. "
            "Training needs the labelled one (train.txt, 40 columns); to score its rows, prepare it with --ids-of "
            "PREPARED --unlabelled."
        )
    if len(fields) == 1 and fields[0].count(b",") > 1:
        return (
            "1 tab-separated columns, expected 40. Commas separate its columns, so this is not Criteo's format "
            "(python -m dlrm_xla_data prepare LOG NEW --format avazu, or a FILE.yaml that says what the columns are)"
        )
    return None


_AVAZU_HEX = """site_id site_domain site_category app_id app_domain app_category device_id device_ip
    device_model""".split()
_AVAZU_NUMBERS = "C1 banner_pos device_type device_conn_type C14 C15 C16 C17 C18 C19 C20 C21".split()


def avazu() -> Layout:
    """Avazu's click log: CSV with a header; click, hour as YYMMDDHH, 21 categories.

    The hour gives two dense features, sine and cosine of the time of day, and two categories, hour and weekday.
    """
    return Layout(
        name="avazu",
        columns=None,
        header=True,
        delimiter=",",
        label="click",
        dense={"hour_sine": "none", "hour_cosine": "none"},
        categories=tuple(
            [Category(n, NUMBER) for n in _AVAZU_NUMBERS]
            + [Category(n, HEX) for n in _AVAZU_HEX]
            + [Category("hour_of_day", NUMBER), Category("weekday", NUMBER)]
        ),
        derive=_avazu_hours,
        derived=("hour_sine", "hour_cosine", "hour_of_day", "weekday"),
        time="hour",
    )


def _avazu_hours(table: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    stamps = table.column("hour").to_numpy().astype(np.int64)
    hours = stamps % 100
    days, which = np.unique(stamps // 100, return_inverse=True)
    dates = [f"20{day:06d}" for day in days]
    try:
        numbers = [np.datetime64(f"{d[:4]}-{d[4:6]}-{d[6:]}", "D").astype(np.int64) for d in dates]
    except ValueError as error:
        raise ValueError(f"expected YYMMDDHH: {error}") from error
    if (hours > 23).any():
        raise ValueError("expected YYMMDDHH: an hour is beyond 23")
    weekdays = np.array(numbers, np.int64) + 3
    angle = hours * (2 * np.pi / 24)
    for name, values in (
        ("hour_sine", np.sin(angle)),
        ("hour_cosine", np.cos(angle)),
        ("hour_of_day", hours),
        ("weekday", weekdays[which] % 7),
    ):
        table = table.append_column(name, pa.array(values))
    return table


def movielens(file: Path) -> Layout:
    """MovieLens ratings as clicks: rating above 3 is one; user and movie are categories, the time decides the parts.

    ``ratings.dat`` of MovieLens 1M (fields parted by ::) or ``u.data`` of 100k (tabs). One dense feature is the
    logarithm of the time since 1970, as a model needs one.
    """
    # Fields of MovieLens 1M are parted by two colons: to a reader that parts at one, every other field is empty.
    if file.suffix == ".dat":
        columns: tuple[str, ...] = ("user", "_1", "movie", "_2", "rating", "_3", "timestamp")
        delimiter = ":"
    else:
        columns, delimiter = ("user", "movie", "rating", "timestamp"), "\t"
    return Layout(
        name="movielens",
        columns=columns,
        delimiter=delimiter,
        label="rating",
        above=3,
        dense={"timestamp": "log1p"},
        categories=(Category("user", NUMBER), Category("movie", NUMBER)),
        time="timestamp",
    )


def of_features(features: dict[str, Any]) -> Layout:
    """The layout of rows without label and part that `Layout.features` describes."""
    layout = Layout(
        features["layout"],
        columns=None,
        delimiter="",
        label=None,
        dense=features["dense"],
        categories=tuple(Category(**category) for category in features["categories"]),
        integers=features["integers"],
        parquet=features["parquet"],
    )
    if layout.name != "avazu":
        return layout
    return replace(layout, derive=_avazu_hours, derived=avazu().derived, time=avazu().time)


_KEYS = ("format", "delimiter", "quoted", "columns", "label", "dense", "categories", "time", "split")


def from_yaml(path: Path) -> Layout:
    """A layout from a YAML file.

        format: csv                       # or parquet
        delimiter: ","
        columns: [a, b, c]                # only where files have no header
        label: clicked                    # or {column: rating, above: 3}
        dense: {price: log1p, age: none}
        categories:
          - user                          # text
          - {column: item, kind: integer} # or hexadecimal, up to 8 digits
          - {column: tags, separator: "|", at_most: 8}
        time: seconds                     # an integer, or {column: day, kind: date} of ISO 8601
        split: part                       # instead of time: train, test or validation

    Raises UserError with the file and, where YAML itself is broken, the line.
    """
    try:
        loaded = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f', line {mark.line + 1}' if mark else ''}: not YAML: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must be a mapping with the keys {', '.join(_KEYS)}")
    for key in loaded:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key!r}; {choices(str(key), _KEYS)}")
    for key in ("label", "categories"):
        if not loaded.get(key):
            raise UserError(f"{path}: {key} is missing")
    kind = str(loaded.get("format", "csv"))
    if kind not in ("csv", "parquet"):
        raise UserError(f"{path}: format is {kind!r}; {choices(kind, ('csv', 'parquet'))}")
    delimiter = str(loaded.get("delimiter", ","))
    if len(delimiter.encode()) != 1:
        raise UserError(f"{path}: delimiter is {delimiter!r}, but must be one character")
    if loaded.get("time") and loaded.get("split"):
        raise UserError(f"{path}: give either time or split, not both")
    label = loaded["label"]
    above = None
    if isinstance(label, dict):
        above = _number(path, "label: above", label.get("above"))
        label = label.get("column")
        if not label:
            raise UserError(f"{path}: label names no column; expected {{column: X, above: N}}")
    dense = loaded.get("dense") or {}
    if isinstance(dense, list):
        dense = dict.fromkeys(dense, "none")
    if not isinstance(dense, dict):
        raise UserError(f"{path}: dense is {dense!r}, but must be a list or a mapping: [{dense}] or {{{dense}: log1p}}")
    if not isinstance(loaded["categories"], list):
        raise UserError(f"{path}: categories is {loaded['categories']!r}, but must be a list: [{loaded['categories']}]")
    for name, transform in dense.items():
        if transform not in TRANSFORMS:
            raise UserError(f"{path}: dense column {name!r} is {transform!r}; {choices(str(transform), TRANSFORMS)}")
    if not dense:
        raise UserError(f"{path}: dense names no column; DLRM needs at least one number a row")
    time, dates = _time(path, loaded.get("time"))
    columns = loaded.get("columns")
    if not isinstance(columns, list | None):
        raise UserError(f"{path}: columns is {columns!r}, but must be a list of all columns of the file: [a, b]")
    layout = Layout(
        name=path.name,
        columns=tuple(str(c) for c in columns) if columns else None,
        header=not columns and kind == "csv",
        delimiter=delimiter,
        label=str(label),
        above=above,
        dense={str(name): str(transform) for name, transform in dense.items()},
        categories=tuple(_category(path, entry) for entry in loaded["categories"]),
        quoted=bool(loaded.get("quoted", kind == "csv")),
        time=time,
        dates=dates,
        split=loaded.get("split"),
        parquet=kind == "parquet",
    )
    for what, features in (("a dense feature", layout.dense), ("a category", [c.name for c in layout.categories])):
        if layout.label in features:
            raise UserError(
                f"{path}: column {layout.label!r} is the label and {what}: a model would be given what it has to "
                "predict. Take it out of the features."
            )
    others = [*layout.dense, *(c.name for c in layout.categories if c.kind != TEXT)]
    if dates and time in others:
        raise UserError(
            f"{path}: column {time!r} is a date, but elsewhere a number. Let one of them have another column."
        )
    if not layout.parquet:
        layout = layout.with_lists(())
        numbers = {*layout.dense, layout.time}
        for category in layout.categories:
            if category.kind == HEX and category.name in numbers:
                raise UserError(
                    f"{path}: category {category.name!r} is hexadecimal, but elsewhere a number; give another kind"
                )
    names = [c.name for c in layout.categories]
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise UserError(f"{path}: categories: {twice[0]!r} is there twice")
    return layout.with_columns(layout.columns, path) if layout.columns else layout


def _time(path: Path, entry: Any) -> tuple[str | None, bool]:
    """The column of the time, and whether it holds dates."""
    if not isinstance(entry, dict):
        return (str(entry) if entry else None), False
    for key in entry:
        if key not in ("column", "kind"):
            raise UserError(f"{path}: time: unknown key {key!r}; {choices(str(key), ('column', 'kind'))}")
    if not entry.get("column"):
        raise UserError(f"{path}: time names no column; expected {{column: X, kind: date}}")
    kind = str(entry.get("kind", NUMBER))
    if kind not in (NUMBER, DATE):
        raise UserError(f"{path}: time: kind is {kind!r}; {choices(kind, (NUMBER, DATE))}")
    return str(entry["column"]), kind == DATE


def _category(path: Path, entry: Any) -> Category:
    if not isinstance(entry, dict):
        return Category(str(entry), at_most=0)
    known = ("column", "kind", "separator", "at_most")
    for key in entry:
        if key not in known:
            raise UserError(f"{path}: categories: unknown key {key!r}; {choices(str(key), known)}")
    if "column" not in entry:
        raise UserError(f"{path}: categories: an entry without a column: {entry}")
    kind = str(entry.get("kind", TEXT))
    if kind not in (HEX, NUMBER, TEXT):
        raise UserError(f"{path}: category {entry['column']!r}: kind is {kind!r}; {choices(kind, (HEX, NUMBER, TEXT))}")
    separator = str(entry.get("separator", ""))
    at_most = int(_number(path, "at_most", entry.get("at_most", _SEVERAL if separator else 0)))
    if at_most < 1 and "at_most" in entry:
        raise UserError(f"{path}: category {entry['column']!r}: at_most is {at_most}, but must be at least 1")
    if separator and kind != TEXT:
        raise UserError(f"{path}: category {entry['column']!r}: several values in one field are read as text")
    return Category(str(entry["column"]), kind, separator, at_most)


def _number(path: Path, what: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {what} is {value!r}, expected a number") from error
