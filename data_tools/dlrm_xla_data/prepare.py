"""Raw logs -> prepared dataset, in two passes and bounded memory: columns to files, then each column's ids.

The first pass parses blocks of text and appends each column to a file of its own; the second takes column by column,
counts its values, gives them ids and writes them; then rows are put together and into the order of their parts.
Interrupted, both go on where they were.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dlrm_xla.errors import UserError, choices
from dlrm_xla_data import layout as layouts
from dlrm_xla_data import lines
from dlrm_xla_data.assembly import assemble, join, sha256
from dlrm_xla_data.known_ids import IDS, VALUES, KnownIds
from dlrm_xla_data.layout import Layout
from dlrm_xla_data.lines import Block, Digests, Place
from dlrm_xla_data.parsing import MISSING, PARTS, Parsed, feature_schema, list_columns, parse, parse_parquet
from dlrm_xla_data.prepared import PreparedDataset, open_prepared, read_meta, save_meta, written_whole
from dlrm_xla_data.protocols import ALL_TEST, BY_TIME, PROTOCOLS, TRAIN, Split, make_split
from dlrm_xla_data.raw_columns import RawColumns
from dlrm_xla_data.vocabulary import Codes, Limits, build_vocabulary

# Rows since the last mark are parsed again after an interruption: at some 100 MB/s, under a minute. Scratch files that
# are small enough to be used up before a mark is made never go to the disk.
MARK_BYTES = 4 << 30
THREADS = 2
_MAPPED_CODES = 2**23
_READ = "read.json"
_BAD_ROWS_SHOWN = 20


@dataclass(frozen=True)
class Options:
    """What may be asked of a preparation; see `dlrm_xla_data.protocols` and `dlrm_xla_data.vocabulary`."""

    protocol: str = "dlrm_days"
    limits: Limits = Limits()
    max_bad_rows: int = 0
    seed: int = 0
    bag_lengths: tuple[int, ...] = ()

    def check(self, later: bool = False) -> None:
        """Raises UserError where a value cannot be meant; ``later`` rows get the ids of others."""
        if self.protocol not in PROTOCOLS and not (later and self.protocol == ALL_TEST):
            raise UserError(f"--protocol {self.protocol}: {choices(self.protocol, PROTOCOLS)}")
        if self.limits.tail not in ("cut", "hash"):
            raise UserError(f"--tail {self.limits.tail}: {choices(self.limits.tail, ('cut', 'hash'))}")
        if self.limits.min_count < 1 or self.max_bad_rows < 0 or self.limits.max_rows < 0:
            raise UserError("--min-count must be at least 1, --max-rows and --max-bad-rows at least 0")
        if self.limits.max_rows == 1:
            raise UserError("--max-rows 1 leaves the row of missing ids alone; give at least 2, or 0 for any number")
        most_seeds = 2**34 if self.bag_lengths else 2**64  # more_ids makes a key of 64 bits of it
        if not 0 <= self.seed < most_seeds:
            raise UserError(f"--seed {self.seed}: must be at least 0 and below {most_seeds}")


def options_of(known: KnownIds, protocol: str, max_bad_rows: int) -> Options:
    """The options that a dataset was prepared with, but for the protocol and the bad rows of this one."""
    limits = Limits(**known.options["limits"])
    return Options(protocol, limits, max_bad_rows, known.options["seed"], tuple(known.options["bag_lengths"]))


FORMATS = ("criteo", "criteo-terabyte", "avazu", "movielens")


def find_layout(name: str, files: Sequence[Path], later: bool = False, unlabelled: bool = False) -> tuple[Layout, str]:
    """The layout called so, or that of a YAML file, and the protocol that belongs to it.

    ``later``: of rows that are not split, for they are only scored; ``unlabelled``, which have no label yet.
    """
    if name.endswith(layouts.YAML):
        layout = layouts.from_yaml(Path(name))
        protocol = "column" if layout.split else "chronological"
    elif name in ("criteo", "criteo-terabyte"):
        layout, protocol = layouts.criteo(), "dlrm_days"
    elif name == "avazu":
        layout, protocol = layouts.avazu(), "chronological"
    elif name == "movielens":
        layout, protocol = layouts.movielens(files[0]), "chronological"
    else:
        raise UserError(f"--format {name}: {choices(name, FORMATS)}, or a YAML file")
    if later:
        layout = layout.for_later_rows()
    if unlabelled:
        if name == "movielens":
            raise UserError("--unlabelled: every row of MovieLens has a rating. Describe such rows by a YAML file.")
        layout = layout.without_label()
    for file in files:
        if not layout.parquet and lines.is_parquet(file):
            fix = f"give `format: parquet` in {name}" if layout.own else "describe its columns by a FILE.yaml"
            raise UserError(f"{file} is a Parquet file, not text: {fix}")
    if layout.header:
        names = _header(files[0], layout)
        layout = layout.with_columns(names, files[0])
        for file in files[1:]:
            _expect_header(file, _header(file, layout), names, files[0])
    if layout.parquet:
        layout = layout.with_lists(list_columns(files))
    return layout, protocol


def _header(file: Path, layout: Layout) -> list[str]:
    header = lines.first_line(file).decode("utf-8", "replace")
    if not header:
        raise UserError(f"{file} is empty, or its first line is, which has to name the columns")
    return [n.strip().strip('"') for n in header.split(layout.delimiter)]


def _expect_header(file: Path, names: list[str], expected: list[str], first: Path) -> None:
    """Raises UserError where a file's columns are not those of the first one, by which all are read."""
    if names == expected:
        return
    if len(names) != len(expected):
        differs = f"{len(names)} columns, {first} {len(expected)}"
    else:
        k = next(k for k, (a, b) in enumerate(zip(names, expected, strict=True)) if a != b)
        differs = f"{names[k]!r} as column {k + 1}, {first} {expected[k]!r}"
    raise UserError(f"{file}, line 1: the header has {differs}. Give all files the same columns in the same order.")


def find_sources(source: Path, name: str) -> list[Path]:
    """The files of a source: itself, or those of a folder in the order of their names, numbers as numbers."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: there is no such file or folder")
    if (source / "meta.json").is_file():
        raise UserError(f"{source} is a prepared dataset already: launch/run.py --data takes it as it is")
    if name == "movielens":
        for rating in ("ratings.dat", "u.data"):
            if (source / rating).is_file():
                return [source / rating]
        raise UserError(f"{source} holds neither ratings.dat (MovieLens 1M) nor u.data (100k)")
    files = [f for f in source.iterdir() if f.is_file() and not f.name.startswith((".", "_"))]
    if not files:
        raise UserError(f"{source} holds no files")

    def natural(file: Path) -> list[Any]:
        parts: list[Any] = [""]
        for character in file.name:
            if character.isdigit():
                parts = [*parts, character] if not parts[-1].isdigit() else [*parts[:-1], parts[-1] + character]
            else:
                parts = [*parts[:-1], parts[-1] + character] if not parts[-1].isdigit() else [*parts, character]
        return [int(p) if p.isdigit() else p for p in parts]

    return sorted(files, key=natural)


def open_log(raw: Path, cache: Path | None) -> PreparedDataset:
    """The prepared copy of a raw log of a known format, made now if there is none of this very file.

    It lies beside the log as ``<name>.prepared``, or under ``cache``.
    """
    if not raw.is_file():
        raise UserError(f"--data {raw}: there is no such file. Give a raw Criteo or Avazu log, or a prepared folder.")
    folder = (cache or raw.parent) / f"{raw.name}.prepared"
    source = fingerprint(raw)
    if folder.exists() and read_meta(folder)["source"] == source:
        return open_prepared(folder)
    if folder.exists():
        print(f"{folder} was made from another {raw.name}; preparing it again", file=sys.stderr)
    return prepare([raw], folder, *_guess(raw))


def _guess(raw: Path) -> tuple[Layout, Options]:
    """Avazu where its header is there, else Criteo, whose reader says what is wrong."""
    described = raw.suffix in layouts.YAML
    if described or lines.is_parquet(raw):
        log, by = ("LOG", shlex.quote(str(raw))) if described else (shlex.quote(str(raw)), "FILE.yaml")
        kind = "says what columns a log has" if described else "is a Parquet file, whose columns a FILE.yaml describes"
        raise UserError(
            f"--data {raw} {kind} (docs/data.md). Prepare the log first: python -m dlrm_xla_data prepare {log} NEW "
            f"--format {by}, with --ids-of PREPARED where its rows are to be scored."
        )
    known = "avazu" if lines.first_line(raw).startswith(b"id,click,hour,") else "criteo"
    layout, protocol = find_layout(known, [raw])
    return layout, Options(protocol)


def fingerprint(raw: Path) -> dict[str, Any]:
    """Enough to tell one log from another without reading it all: name, size, hash of both ends."""
    size = raw.stat().st_size
    if size == 0:
        raise UserError(f"{raw} is empty: there is no line in it. Fetch it again.")
    digest = hashlib.sha256()
    with raw.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return {"file": raw.name, "size": size, "sha256_of_both_ends": digest.hexdigest()}


def prepare(
    files: Sequence[Path], folder: Path, layout: Layout, options: Options, known: KnownIds | None = None
) -> PreparedDataset:
    """Prepares raw logs into ``folder``, which appears only when it is whole.

    With ``known`` rows get the ids of another dataset, whose ``options`` are to be given too, see `options_of`.
    Of several processes that prepare the same folder one does and the others wait for it. One that was interrupted is
    gone on with when the same is asked again.
    """
    options.check(later=known is not None)
    if known:
        _check_known(known, layout)
    if options.protocol == "column" and not layout.split:
        raise UserError("--protocol column needs a layout with `split: COLUMN`")
    sources = [fingerprint(file) for file in files]
    described = {name: value for name, value in vars(layout).items() if not callable(value)}
    digest = hashlib.sha256(repr(described).encode()).hexdigest()
    key = {"sources": sources, "layout": digest, "options": json.loads(json.dumps(asdict(options)))}
    # Of what kind the files of an unfinished preparation are.
    key["ids_of"] = known.digest if known else "its own"
    with _alone(folder):
        if folder.exists() and read_meta(folder).get("key") == key:
            return open_prepared(folder)  # another process made it meanwhile
        began = time.perf_counter()
        print(f"preparing {', '.join(map(str, files[:3]))}{' ...' * (len(files) > 3)} -> {folder}", file=sys.stderr)
        if layout.own and not layout.time and options.protocol in BY_TIME:
            print(f"no `time` in {layout.name}: rows are taken in the order of the files", file=sys.stderr)
        with written_whole(folder, resumable=True) as scratch:
            columns = RawColumns(scratch / "columns", layout, key)
            read = _read(files, columns, layout, options)
            split = make_split(options.protocol, columns, read["rows_of_files"], options.seed)
            per_table = _write_all_ids(columns, layout, split, options, known)
            most = known.bag_lengths if known else ()
            about = assemble(columns, scratch, layout, split, options.bag_lengths, options.seed, most)
            arrays = ["labels", "dense", "ids", "counts", *(["offsets"] if about["variable_bags"] else [])]
            if known:
                about["ids_of"] = {"folder": known.folder.name, "values": known.digest}
            else:
                values, ids = zip(*(_value_files(columns, k) for k in range(len(per_table))), strict=True)
                join(scratch / f"{IDS}.npy", np.int32, ids)
                sizes = join(scratch / f"{VALUES}.npy", np.int64, values)
                about |= {"values_per_table": sizes, "meaning": layout.meaning, "features": layout.features()}
                if layout.parquet:
                    about["schema"] = feature_schema(files[0], layout)
                arrays += [VALUES, IDS]
            with ThreadPoolExecutor(THREADS) as pool:
                digests = dict(zip(arrays, pool.map(lambda n: sha256(scratch / f"{n}.npy"), arrays), strict=True))
            missing = np.stack([np.load(columns.folder / f"{k}.missing.npy") for k in range(len(per_table))])
            columns.remove()
            save_meta(
                scratch,
                {
                    "source": sources[0] if len(sources) == 1 else {"files": sources},
                    "num_rows": columns.num_rows,
                    "dense": list(layout.dense),
                    "tables": [c.name for c in layout.categories],
                    "ids_per_table": per_table,
                    "splits": split.final_ranges(),
                    **about,
                    "labelled": layout.label is not None,
                    "files": read["files"],
                    "layout": layout.name,
                    "options": key["options"],
                    "missing": {name: missing[:, k].tolist() for k, name in enumerate(PARTS)},
                    "bad_rows": {"skipped": columns.num_bad, "first": read["bad"]},
                    "checksums": digests,
                    "tool": f"dlrm_xla {_version()}",
                    "key": key,
                },
            )
    seconds = time.perf_counter() - began
    print(
        f"prepared {columns.num_rows:,} rows in {seconds:.1f} s, {columns.num_rows / seconds:,.0f} a second",
        file=sys.stderr,
    )
    alone = [c.name for c, ids in zip(layout.categories, per_table, strict=True) if not ids]
    if alone and not known:
        least = options.limits.min_count
        rare = f"no value {least:,} times (--min-count)" if least > 1 else "no value"
        print(
            f"warning: tables without any id: {', '.join(alone)}; {rare} in the training rows of these columns",
            file=sys.stderr,
        )
    if columns.num_bad:
        print(f"left out {columns.num_bad:,} rows that are not of the format:", file=sys.stderr)
        for place in read["bad"]:
            print(f"  {place}", file=sys.stderr)
    return open_prepared(folder)


def _version() -> str:
    try:
        return version("dlrm_xla")
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process prepares this folder."""
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise UserError(
                f"cannot write {folder}: {error.strerror}. Name a folder of yours (launch/run.py: --data-cache)."
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"another process prepares {folder}; waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_there(file, path):
                continue  # the process that was waited for deleted the file; a third one may hold a new one
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_there(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(files: Sequence[Path], columns: RawColumns, layout: Layout, options: Options) -> dict[str, Any]:
    """The first pass; what it found is kept beside the columns, so that it is done once."""
    done = columns.folder / _READ
    if done.is_file() and columns.resume_read():
        loaded: dict[str, Any] = json.loads(done.read_text())
        return loaded
    try:
        start = columns.begin()
        if columns.num_rows:
            print(f"going on behind the {columns.num_rows:,} rows that are read already", file=sys.stderr)
        digests = Digests()
        bad: list[str] = columns.extra.get("bad", [])
        ends: list[int] = columns.extra.get("ends", [0] * len(files))
        marked = 0
        size = sum(file.stat().st_size for file in files)
        place_name = "row" if layout.parquet else "line"
        with tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
            for parsed, place, read in _parsed(files, start, digests, layout, options.max_bad_rows):
                columns.append(parsed)
                bad += [f"{p}, {place_name} {n}: {problem}" for p, n, problem in parsed.bad][
                    : _BAD_ROWS_SHOWN - len(bad)
                ]
                if columns.num_bad > options.max_bad_rows:
                    listed = "; ".join(bad[:3])
                    raise UserError(
                        f"more than --max-bad-rows {options.max_bad_rows} rows are not of the format: {listed}"
                    )
                ends[place.file] = columns.num_rows
                marked += read
                bar.update(min(read, size - bar.n))
                if marked >= MARK_BYTES:
                    columns.extra = {"bad": bad, "ends": ends}
                    columns.mark(place)
                    marked = 0
        if not columns.num_rows:
            raise UserError(f"{files[0]} holds no lines of data")
        for number in range(1, len(ends)):
            ends[number] = max(ends[number], ends[number - 1])  # a file without rows ends where the one before did
        columns.extra = {"bad": bad, "ends": ends}
        columns.mark(Place(len(files)))
    finally:
        columns.close()
    found = {
        "bad": bad,
        "rows_of_files": [b - a for a, b in zip([0, *ends], ends, strict=False)],
        "files": digests.files,
    }
    done.with_suffix(".new").write_text(json.dumps(found))
    done.with_suffix(".new").replace(done)
    return found


def _parsed(
    files: Sequence[Path], start: Place, digests: Digests, layout: Layout, most_bad: int
) -> Iterator[tuple[Parsed, Place, int]]:
    """Parsed blocks in order, with the place behind each and the bytes in it; parsing runs in threads."""
    if layout.parquet:
        for number in range(start.file, len(files)):
            first = start.offset if number == start.file else 0
            before = first
            for parsed, row in parse_parquet(files[number], layout, first, most_bad):
                share = (row - before) / max(1, row)
                yield parsed, Place(number, row, row), int(files[number].stat().st_size * share)
                before = row
        for file in files:
            digests.add(file, sha256(file))
        return

    def work(block: Block) -> Parsed:
        return parse(block, layout, keep_good=most_bad > 0)

    with ThreadPoolExecutor(THREADS) as pool:
        waiting: list[tuple[Future[Parsed], Block]] = []
        try:
            for block in lines.blocks(files, start, digests, layout.header):
                waiting.append((pool.submit(work, block), block))
                if len(waiting) > THREADS + 1:
                    future, oldest = waiting.pop(0)
                    yield future.result(), oldest.after, len(oldest.data)
            while waiting:
                future, oldest = waiting.pop(0)
                yield future.result(), oldest.after, len(oldest.data)
        except UserError:
            for future, _ in waiting:  # an earlier block's bad line comes before a file's bad end
                future.result()
            raise
        finally:
            for future, _ in waiting:
                future.cancel()


def _check_known(known: KnownIds, layout: Layout) -> None:
    """Raises a UserError where a dataset's ids are of another layout, whose values have other codes."""
    if known.meaning == layout.meaning:
        return
    now = layout.features()
    differ = [f"{name} {_differing(then, now[name])}" for name, then in known.features.items() if then != now[name]]
    raise UserError(
        f"--ids-of {known.folder} was prepared with other numbers or categories, of another format, or from "
        "Parquet with other columns of lists: the same values would not be known again. Describe them alike"
        f"{': ' + '; '.join(differ[:2]) if differ else ''}."
    )


def _differing(then: Any, now: Any) -> str:
    """What two descriptions of features differ in, the first of several."""
    if isinstance(then, dict):
        then, now = list(then.items()), list(now.items())
    if isinstance(then, list):
        pairs = itertools.zip_longest(then, now, fillvalue="nothing")
        then, now = next((a, b) for a, b in pairs if a != b)
    return f"there {then}, here {now}"


def _value_files(columns: RawColumns, k: int) -> tuple[Path, Path]:
    return columns.folder / f"{k}.values", columns.folder / f"{k}.value_ids"


def _write_all_ids(
    columns: RawColumns, layout: Layout, split: Split, options: Options, known: KnownIds | None
) -> list[int]:
    """The second pass: a file of ids and one of counts for each category; returns ids per table."""

    def one(k: int) -> int:
        if known:
            return _write_known_ids(columns, k, split, known)
        return _write_ids(columns, k, layout.categories[k].name, split, options.limits)

    numbers = range(len(layout.categories))
    with ThreadPoolExecutor(THREADS) as pool:
        done = tqdm(pool.map(one, numbers), total=len(numbers), unit="column", desc="ids", disable=None)
        return list(done)


def _write_ids(columns: RawColumns, k: int, name: str, split: Split, limits: Limits) -> int:
    ids_file, counts_file = columns.folder / f"{k}.ids", columns.folder / f"{k}.counts"
    if ids_file.is_file() and counts_file.is_file():
        return counts_file.stat().st_size // 8
    scratch = columns.folder / f"{k}.vocabulary"
    if scratch.exists():
        shutil.rmtree(scratch)  # what a killed process had counted already would be counted twice
    scratch.mkdir()

    def training() -> Iterator[Codes]:
        for codes, part in zip(columns.codes(k), columns.spread(k, split.parts()), strict=True):
            yield codes if (part == TRAIN).all() else codes[part == TRAIN]

    vocabulary = build_vocabulary(scratch, name, training, limits)
    unfinished = ids_file.with_suffix(".ids.new")
    with unfinished.open("wb") as out:
        for codes in _larger(_codes_and_missing(columns, k, split)):
            out.write(vocabulary.ids(codes).data)
    vocabulary.save(*_value_files(columns, k))
    os.replace(vocabulary.counts, counts_file)
    vocabulary.delete()
    scratch.rmdir()
    os.replace(unfinished, ids_file)
    columns.delete(f"{k}.codes")
    return vocabulary.num_ids


def _write_known_ids(columns: RawColumns, k: int, split: Split, known: KnownIds) -> int:
    ids_file, counts_file = columns.folder / f"{k}.ids", columns.folder / f"{k}.counts"
    if ids_file.is_file() and counts_file.is_file():
        return len(known.counts[k])
    unfinished = ids_file.with_suffix(".ids.new")
    with unfinished.open("wb") as out:
        for codes in _larger(_codes_and_missing(columns, k, split)):
            out.write(known.values.ids(k, codes).data)
    known.counts[k].tofile(counts_file)
    os.replace(unfinished, ids_file)
    columns.delete(f"{k}.codes")
    return len(known.counts[k])


def _codes_and_missing(columns: RawColumns, k: int, split: Split) -> Iterator[Codes]:
    """A category's codes; at their end a file says how many rows of each part have no value, or an empty bag."""
    missing = np.zeros(3, np.int64)
    for codes, lengths, parts in zip(columns.codes(k), columns.lengths(k), split.parts(), strict=True):
        missing += np.bincount(parts[codes == MISSING if lengths is None else lengths == 0], minlength=3)
        yield codes
    np.save(columns.folder / f"{k}.missing.npy", missing)


def _larger(chunks: Iterator[Codes]) -> Iterator[Codes]:
    """Chunks put together, as a table to find ids in is made anew for each."""
    waiting: list[NDArray[np.int64]] = []
    for chunk in chunks:
        waiting.append(chunk)
        if sum(map(len, waiting)) >= _MAPPED_CODES:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)
