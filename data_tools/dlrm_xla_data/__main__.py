"""Prepares, checks, describes and makes datasets: ``python -m dlrm_xla_data COMMAND --help``."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dlrm_xla.errors import UserError
from dlrm_xla.presets import MLPERF_V2_BAGS
from dlrm_xla_data.generator import Recipe, generate
from dlrm_xla_data.known_ids import read_known
from dlrm_xla_data.prepare import FORMATS, Options, find_layout, find_sources, options_of, prepare
from dlrm_xla_data.prepared import open_prepared
from dlrm_xla_data.protocols import ALL_TEST, PROTOCOLS
from dlrm_xla_data.statistics import table_text, write_statistics, zero_shares
from dlrm_xla_data.verify import verify
from dlrm_xla_data.vocabulary import Limits


def _whole(text: str) -> int:
    """20000 or 1e6 -> the number; 0 is one."""
    try:
        number = float(text)
        whole = int(number)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number such as 20000 or 1e6") from error
    if whole != number or whole < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 or more")
    return whole


def _count(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at least 1")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    """3,2,1 -> (3, 2, 1); 10x4 -> (10, 10, 10, 10)."""
    numbers: list[int] = []
    for part in text.split(","):
        value, by, times = part.lower().partition("x")
        try:
            numbers += [_count(value)] * (_count(times) if by else 1)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected numbers such as 1000,50x3; {error}") from error
    return tuple(numbers)


def _bags(text: str) -> tuple[int, ...]:
    if text == "mlperf_v2":
        return tuple(MLPERF_V2_BAGS)
    try:
        return _numbers(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or mlperf_v2") from error


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Says the defaults of those that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default in (None, ()) or "(default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dlrm_xla_data", description="Data of dlrm_xla; see docs/data.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    new = _Defaults

    made = commands.add_parser("prepare", help="raw logs -> a prepared dataset", formatter_class=new)
    made.add_argument("source", type=Path, help="a file, or a folder of files in the order of their names")
    made.add_argument("dest", type=Path, help="the folder to make; it appears when it is whole")
    made.add_argument("--format", required=True, help=f"{', '.join(FORMATS)}, or a YAML file that describes columns")
    made.add_argument("--protocol", default=None, help=f"{', '.join(PROTOCOLS)}; by default the format's own")
    made.add_argument("--min-count", type=_count, default=1, help="ids seen less often in training become 0")
    made.add_argument("--max-rows", type=_whole, default=0, help="most rows of a table, row 0 included; 0: any number")
    made.add_argument("--tail", default="cut", help="ids beyond --max-rows: cut (become 0) or hash (share the others)")
    made.add_argument(
        "--max-bad-rows", type=_whole, default=0, help="rows that may be left out for not being of the format"
    )
    made.add_argument(
        "--multi-hot", type=_bags, default=(), help="bags of several ids from one: 3,2,1,... or mlperf_v2"
    )
    made.add_argument("--seed", type=int, default=0, help="of random splits and of --multi-hot")
    made.add_argument(
        "--ids-of",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="a prepared dataset whose ids the rows get: all to be scored by what was trained on it, or with "
        "--protocol to train that further",
    )
    made.add_argument(
        "--unlabelled", action="store_true", help="with --ids-of: rows have no label yet, and no column of it is read"
    )

    checked = commands.add_parser("verify", help="checks a prepared dataset, reading all of it")
    checked.add_argument("folder", type=Path)

    told = commands.add_parser("stats", help="tables of a prepared dataset: a table, stats.json, stats.png")
    told.add_argument("folder", type=Path)
    told.add_argument("--out", type=Path, default=None, help="where the files go; by default the current folder")

    drawn = commands.add_parser("synthesize", help="a dataset with a planted signal", formatter_class=new)
    drawn.add_argument("dest", type=Path)
    drawn.add_argument("--rows", type=_count, default=1_000_000, metavar="N", help="such as 20000 or 1e6 (default 1e6)")
    drawn.add_argument("--tables", type=_numbers, default="10000x26", help="rows of each table: 1e6,1000x25")
    drawn.add_argument("--bags", type=_bags, default=(), help="ids per bag, one number for each table, or mlperf_v2")
    drawn.add_argument("--zipf", type=float, nargs="+", default=[1.05], help="exponent of all tables, or of each")
    drawn.add_argument(
        "--correlation", type=float, default=0.0, help="chance that a feature follows the row's own draw"
    )
    drawn.add_argument("--strength", type=float, default=1.0, help="standard deviation of the logit")
    drawn.add_argument("--click-rate", type=float, default=0.25, help="of the logit's middle")
    drawn.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code is 0, 1 for a dataset that is not sound, 2 for a mistake, 130 for Ctrl-C."""
    given = _parser().parse_args(argv)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return int(_COMMANDS[given.command](given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that vanishes, a disk that fails; anything else names itself
        print(f"error: {error}. Look at the disk and the permissions there.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        then = "goes on from here" if given.command == "prepare" else "starts over"
        print(f"interrupted; the same command {then}", file=sys.stderr)
        return 130


def _prepare(given: argparse.Namespace) -> int:
    if given.unlabelled and given.ids_of is None:
        raise UserError(
            "--unlabelled: rows without labels can only be scored. Give --ids-of what a model was trained on."
        )
    files = find_sources(given.source, given.format)
    if given.unlabelled and given.protocol:
        raise UserError("--unlabelled: rows without labels are all test rows, to be scored. Leave --protocol out.")
    scored = given.ids_of is not None and not given.protocol
    layout, protocol = find_layout(given.format, files, scored, given.unlabelled)
    if given.multi_hot and (layout.variable_bags or len(given.multi_hot) != len(layout.categories)):
        raise UserError(
            f"--multi-hot needs one number for each of the {len(layout.categories)} categories, all with one value a "
            f"row; {len(given.multi_hot)} were given"
        )
    if given.dest.exists():
        raise UserError(f"{given.dest} exists already. Delete it, or name another folder.")
    options = Options(
        given.protocol or protocol,
        Limits(given.min_count, given.max_rows, given.tail),
        given.max_bad_rows,
        given.seed,
        given.multi_hot,
    )
    known = read_known(given.ids_of) if given.ids_of else None
    if known:
        if replace(options, max_bad_rows=0) != Options(options.protocol):
            raise UserError(
                f"--ids-of {given.ids_of} brings its own --min-count, --max-rows, --tail, --multi-hot and --seed: "
                "leave these out"
            )
        options = options_of(known, ALL_TEST if scored else options.protocol, given.max_bad_rows)
    dataset = prepare(files, given.dest, layout, options, known)
    for name, (start, stop) in dataset.splits.items():
        if stop > start:
            clicks = f"click rate {dataset.click_rate(name):.4f}" if dataset.labelled else "no labels"
            print(f"{name:11s} {stop - start:,} rows, {clicks}")
    print(f"tables      {len(dataset.names)}, {sum(1 + len(c) for c in dataset.counts):,} rows")
    dest = shlex.quote(str(given.dest))
    if known:
        shares = zip(dataset.names, zero_shares(dataset, "test"), strict=True)
        told = ", ".join(f"{name} {share:.1%}" for name, share in shares)
        print(f"without id  {told}: missing, or not in {given.ids_of}")
        flag = "--evaluate" if scored else "--start-from"
        print(f"next        python launch/run.py {flag} RUN/checkpoints/best.safetensors --data {dest}")
        return 0
    print(f"next        python launch/run.py --data {dest}")
    return 0


def _verify(given: argparse.Namespace) -> int:
    problems = verify(given.folder)
    for problem in problems:
        print(f"wrong: {problem}")
    print(f"{given.folder}: {'sound' if not problems else 'NOT sound: prepare it again'}")
    return 1 if problems else 0


def _stats(given: argparse.Namespace) -> int:
    out = given.out or Path()
    found = write_statistics(given.folder, open_prepared(given.folder), out)
    print(table_text(found))
    print(f"written to {out / 'stats.json'} and {out / 'stats.png'}")
    return 0


def _synthesize(given: argparse.Namespace) -> int:
    recipe = Recipe(
        num_rows=given.rows,
        table_rows=given.tables,
        bag_lengths=given.bags or (1,) * len(given.tables),
        zipf=tuple(given.zipf) * len(given.tables) if len(given.zipf) == 1 else tuple(given.zipf),
        correlation=given.correlation,
        strength=given.strength,
        click_rate=given.click_rate,
        seed=given.seed,
    )
    best = generate(given.dest, replace(recipe))
    print(
        f"best AUC that any model could reach on the test rows: {best['auc']:.4f}, best log loss {best['log_loss']:.4f}"
    )
    return 0


_COMMANDS = {"prepare": _prepare, "verify": _verify, "stats": _stats, "synthesize": _synthesize}

if __name__ == "__main__":
    sys.exit(main())
