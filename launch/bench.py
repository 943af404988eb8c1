#!/usr/bin/env python
"""Times lookups, updates and whole train steps against other implementations, in one run on one machine.

python launch/bench.py                                            CPU: one table, and the kaggle step capped at 1M rows
python launch/bench.py --device cpu xla --what step --rows 1000000 --optimizer sgd --out bench.json
python launch/bench.py --what update --rows 1000000 --dim 16 64 128 --zipf 0 1.05 --placement sparse dense
python launch/bench.py --what scale --device cpu xla              the same ids in tables of 1M and of 100M rows in all
python launch/bench.py --what placement --device cpu xla          the kaggle step with small tables placed otherwise
python launch/bench.py --what tt --rows 1000000 --dim 64
python launch/bench.py --what plugins --ratio 100                 the kaggle step with each plugin, against exact tables
python launch/bench.py --what growth --rows 10000 1000000         the same with 26 equal tables of so many rows in all

Each case is run by every implementation that can run it, taking turns repetition by repetition, so that what else the
machine does meets all alike; a timed repetition follows one of its own that is not timed, as steps of training do.
``optimizer`` is what an implementation updates rows by, ``optimizer_asked`` the flag: torch's Adagrad is by element,
its Adam for dense gradients updates every row (adam_dense). ``gb_per_s`` is the least that any implementation of that
optimizer must move over the median time (ids and duplicates as they are; null for whole steps), ``share_of_copy`` that
over the copy bandwidth measured in the same run. ``ratio_to_best_other`` is the best other implementation's median over
this one's, so above 1 this one is faster than all others; only those of the same optimizer and precision count.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bench_arms as arms
import bench_parts
import numpy as np
import torch
from bench_arms import Case, Repetition
from tqdm import tqdm

from dlrm_xla import fbgemm_rows
from dlrm_xla.config import PLACEMENTS
from dlrm_xla.contract import MAX_ROWS
from dlrm_xla.device import Device
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.guards import announce
from dlrm_xla.presets import KAGGLE_ROWS
from dlrm_xla.registry import EXACT, installed, parse
from dlrm_xla.row_lines import Placement
from dlrm_xla.row_rules import RULES
from dlrm_xla.run_folder import versions
from dlrm_xla.xla_device import open_xla_first

WARM_UP = 3
# Some 10 ms of a GPU at 2 GHz.
_IDLE_CYCLES = 20_000_000
OURS = "dlrm_xla"
BF16 = f"{OURS} bf16"
Maker = Callable[[], Repetition | None]
WITH_PLUGINS = ("plugins", "growth")
# Most rows of tables placed as matmul and as dense; without any, all are sparse.
THRESHOLDS = ((0, 0), (32, 32), (1000, 1000), (0, 32), (0, 1000), (0, 20_000), (0, 200_000))
# Rows of 26 equal tables.
SCALES = {"1M": (1_000_000 // 26,) * 26, "100M": (100_000_000 // 26,) * 26}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The examples as they are written, and each flag's default."""


def flags() -> argparse.ArgumentParser:
    """Every flag takes several values; the benchmark is their product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help, allow_abbrev=False)
    several: dict[str, Any] = {"nargs": "+"}
    whats = ["lookup", "update", "step", "scale", "placement", "tt", *WITH_PLUGINS]
    parser.add_argument("--what", choices=whats, default=["update", "step"], help="what is timed", **several)
    parser.add_argument("--device", choices=["cpu", "cuda", "xla"], default=["cpu"], help="where", **several)
    parser.add_argument(
        "--rows", type=int, default=[1_000_000], help="rows of a table; of a step's tables at most", **several
    )
    parser.add_argument("--dim", type=int, default=[16], help="width of a row", **several)
    parser.add_argument("--batch", type=int, default=[2048], help="samples", **several)
    parser.add_argument(
        "--bag", type=int, default=[1], help="ids per bag; a lookup of one table is batch x bag ids", **several
    )
    parser.add_argument(
        "--zipf", type=float, default=[1.05], help="exponent of the ids' distribution, 0: uniform", **several
    )
    parser.add_argument("--placement", choices=PLACEMENTS, default=["sparse"], help="of single tables", **several)
    parser.add_argument("--optimizer", choices=list(RULES), default=["sgd"], help="of rows", **several)
    parser.add_argument("--rank", type=int, default=16, help="rank of the tensor trains")
    parser.add_argument("--plugin", help="of the steps with plugins; none: all that are installed", **several)
    parser.add_argument("--ratio", type=float, default=0, help="of the steps with plugins; 0: their default sizes")
    parser.add_argument(
        "--others", default=["all"], help="names of other people's to compare with, all, or none", **several
    )
    parser.add_argument("--repeat", type=int, default=20, help="timed repetitions of each")
    parser.add_argument(
        "--clock",
        choices=["wall", "device"],
        default="wall",
        help="device: on cuda, what the GPU takes for work that waits for it in a queue, without what the host takes",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; a plot is written beside it")
    return parser


def check(given: argparse.Namespace) -> None:
    """Raises a UserError for what cannot be measured, before anything is."""
    for name in ("rows", "dim", "batch", "bag", "rank", "repeat"):
        values = np.atleast_1d(getattr(given, name))
        if min(values) < 1:
            raise UserError(f"--{name} is {min(values)}, but must be at least 1")
    if not all(0 <= number < float("inf") for number in (*given.zipf, given.ratio)):
        raise UserError("--zipf and --ratio must be 0 or a number above it")
    if max(given.rows) > MAX_ROWS:
        raise UserError(f"--rows is {max(given.rows):,}, but a table has at most {MAX_ROWS:,}")
    for spec in given.plugin or ():
        parse(spec)
    if given.plugin and not set(given.what) & set(WITH_PLUGINS):
        raise UserError(f"--plugin is of --what {' and '.join(WITH_PLUGINS)}; leave it out")
    if given.out:
        _check_out(given.out)
    if given.clock == "device" and set(given.device) != {"cuda"}:
        raise UserError("--clock device: only --device cuda has a clock of its own; leave it out")


def files_of(out: Path) -> tuple[Path, Path, Path]:
    """The JSON files of rows and of what they were measured with, and the plot."""
    return out, out.with_suffix(".about.json"), out.with_suffix(".png")


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; give a JSON file's name, as {out / 'bench.json'}")
    if out.suffix == ".png":
        raise UserError(f"--out: {out} is where the plot goes; name the JSON file, {out.with_suffix('.json')}")
    for file in files_of(out):
        if file.exists() and not file.is_file():
            raise UserError(f"--out: {file}, which is to be written, is no plain file; give another name")
        try:
            if file.exists():
                file.open("a").close()
            unfinished = _unfinished(file)
            unfinished.open("w").close()
            unfinished.unlink()
        except OSError as error:
            raise UserError(f"--out: {file} cannot be written ({error.strerror})") from error


def _unfinished(file: Path) -> Path:
    """Beside the file itself, where that is linked to."""
    return file.resolve().with_name(f"{file.name}.unfinished")


def _write(out: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Writes both JSON files, each in one piece; where that fails, prints the rows and raises a UserError."""
    try:
        for file, content in zip(files_of(out), (rows, about), strict=False):
            unfinished = _unfinished(file)
            try:
                unfinished.write_text(json.dumps(content, indent=1) + "\n")
                unfinished.replace(file.resolve())
            finally:
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        tqdm.write(json.dumps(rows))
        raise UserError(
            f"--out: {file} cannot be written ({error.strerror}); all that was measured is above"
        ) from error


def cases(given: argparse.Namespace, devices: dict[str, Device]) -> list[tuple[Case, str]]:
    """The product of the flags, each once, with a name for its title; some depend on few of the flags."""
    found: list[tuple[Case, str]] = []
    product = itertools.product(
        given.what, devices.values(), given.rows, given.dim, given.batch, given.bag, given.zipf, given.optimizer
    )
    for what, device, rows, dim, batch, bag, zipf, optimizer in product:
        capped = tuple(min(r, rows) for r in KAGGLE_ROWS)
        kind = {"tt": "update", **dict.fromkeys(("scale", "placement", *WITH_PLUGINS), "step")}.get(what, what)
        tables = dict.fromkeys(("step", "placement", "plugins"), capped)
        tables |= {"scale": SCALES["1M"], "growth": (-(-rows // 26),) * 26}
        case = Case(kind, device, tables.get(what, (rows,)), dim, batch, bag, zipf, optimizer)
        if (case, what) not in found:
            found.append((case, what))
    return found


def check_others(given: argparse.Namespace, all_cases: Sequence[tuple[Case, str]]) -> None:
    """Raises a UserError for a name in ``--others`` that is of no case; one that is of some is measured in those."""
    if given.others in (["all"], ["none"]):
        return
    known = list(dict.fromkeys(name for case, title in all_cases for name in others(case, title, given)))
    if unknown := [name for name in given.others if name not in known]:
        choice = f"all or none alone, or of {', '.join(known)}" if known else "no case here is compared with any"
        raise UserError(f"--others: {', '.join(unknown)}: {choice}")


def implementations(case: Case, title: str, given: argparse.Namespace) -> dict[str, Maker]:
    """Makers by name, ours first."""
    asked = others(case, title, given)
    if given.others != ["all"]:
        asked = {name: make for name, make in asked.items() if name in given.others}
    return ours(case, title, given) | asked


def ours(case: Case, title: str, given: argparse.Namespace) -> dict[str, Maker]:
    """Makers of our own, by names that begin with "dlrm_xla"."""
    if title == "scale":
        # The same ids, those of the smallest tables, looked up in tables of every size.
        sized = {n: dataclasses.replace(case, table_rows=tables, id_rows=SCALES["1M"]) for n, tables in SCALES.items()}
        return {f"{OURS} {n}": partial(arms.ours, c, "sparse") for n, c in sized.items()}
    if title == "placement":
        return {f"{OURS} {m} {d}": partial(arms.placed, case, m, d) for m, d in THRESHOLDS}
    if title in WITH_PLUGINS:
        specs = [EXACT, *(given.plugin or sorted(installed()))]
        return {f"{OURS} {spec}": partial(arms.with_plugin, case, spec, given.ratio) for spec in specs}
    if title == "tt":
        return {f"{OURS} tensorly_tt": lambda: arms.tt(case, given.rank)}
    # A step's placement is the device's choice; the flag is for single tables.
    placements: list[Placement] = given.placement if case.what != "step" else ["sparse"]
    makers: dict[str, Maker] = {f"{OURS} {p}": partial(arms.ours, case, p) for p in placements}
    if case.device.name == "cpu" and fbgemm_rows.installed() and case.optimizer in fbgemm_rows.OPTIMIZERS:
        makers[f"{OURS} FBGEMM's kernels"] = lambda: arms.ours(case, "sparse", "fbgemm")
    if case.what == "step":
        if not case.device.slow_bf16:
            makers[BF16] = lambda: arms.ours(case, "sparse", precision="bf16")
        if case.device.optional_graphs:
            makers[f"{OURS} without a graph"] = lambda: arms.ours(case, "sparse", cuda_graphs="off")
    return makers


def others(case: Case, title: str, given: argparse.Namespace) -> dict[str, Maker]:
    """Makers of other people's, by name; none where a case compares ours with each other."""
    if title == "tt":
        return {"tltorch blocktt": lambda: arms.tltorch_tt(case, given.rank)}
    if title not in ("lookup", "update", "step"):
        return {}
    makers: dict[str, Maker] = {
        "EmbeddingBag sparse": lambda: arms.torch_bag(case, sparse=True),
        "EmbeddingBag dense": lambda: arms.torch_bag(case, sparse=False),
        "FBGEMM": lambda: arms.fbgemm(case),
    }
    if case.what == "step" and case.device.optional_graphs:
        makers["FBGEMM in a graph"] = lambda: arms.fbgemm(case, graph=True)
    if case.device.name == "xla":
        makers["naive torch_xla"] = lambda: arms.naive(case)
    return makers


def rule_of(case: Case, name: str) -> str:
    """What an implementation updates rows by: ``case.optimizer``, or what torch has under that name."""
    gradients = {"EmbeddingBag sparse": "sparse", "EmbeddingBag dense": "dense", "naive torch_xla": "dense"}
    if case.what != "update" or name not in gradients:
        return case.optimizer
    return arms.TORCH_RULES[gradients[name]].get(case.optimizer, case.optimizer)


def not_compared_with(case: Case, name: str) -> str:
    """The precision or the optimizer of most implementations, where this one has another; else ''."""
    if name == BF16:
        return "float32"
    return "" if rule_of(case, name) == case.optimizer else case.optimizer


def copy_bandwidth(device: Device, size: int = 2**28) -> float:
    """GB/s of a copy of ``size`` bytes, read and written, the best of ten."""
    source = torch.zeros(size // 4).to(device.torch_device)

    # In place, so that no memory is asked for; a copy alone would be optimised away.
    def step() -> None:
        source.add_(1)

    copy = device.compile(step, "copy")
    times = []
    for _ in range(WARM_UP + 10):
        device.synchronize()
        began = time.perf_counter()
        copy()
        device.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size / min(times[WARM_UP:]) / 1e9


def measure(
    device: Device, repetitions: dict[str, Repetition], repeat: int, clock: str = "wall"
) -> dict[str, list[float]]:
    """Milliseconds of each repetition, the implementations taking turns.

    Before each comes one that is not timed: else each would pay for the caches and the memory that the one before it
    has left, 90 instead of 59 ms for a step on XLA's CPU backend after one with gradients of 360 MB.
    """
    times: dict[str, list[float]] = {name: [] for name in repetitions}
    timed = _wall_ms if clock == "wall" else _device_ms
    for k in range(WARM_UP + repeat):
        for name, run in repetitions.items():
            run(k)
            device.synchronize()
            ms = timed(device, run, k + 1)
            if k >= WARM_UP:
                times[name].append(ms)
    return times


def _wall_ms(device: Device, run: Repetition, k: int) -> float:
    began = time.perf_counter()
    run(k)
    device.synchronize()
    return (time.perf_counter() - began) * 1000


def _device_ms(device: Device, run: Repetition, k: int) -> float:
    """By events on the GPU, which first idles so long that all of the work is in its queue."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(_IDLE_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()  # type: ignore[no-untyped-call]
    run(k)
    end.record()  # type: ignore[no-untyped-call]
    device.synchronize()
    return float(begin.elapsed_time(end))  # type: ignore[no-untyped-call]


def _tried(name: str, make: Maker, device: Device, needed: bool) -> Repetition | None:
    """An implementation, made and run once; None where it cannot run, which is told.

    Ours may refuse, unless ``needed``; any other error of ours is raised.
    """
    try:
        run = make()
        if run is not None:
            run(0)
            device.synchronize()
        return run
    except ImportError as error:
        reason = f"not installed ({error})"
        if needed:
            raise UserError(f"{name}: {reason}") from error
    except UserError as error:
        if needed:
            raise
        reason = str(error)
    except Exception as error:
        if name.startswith(OURS):
            raise
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    tqdm.write(f"{name}: {reason}; left out")
    return None


def rows_of(case: Case, title: str, given: argparse.Namespace, copy: float) -> list[dict[str, Any]]:
    """Measures a case: one row per implementation."""
    repetitions: dict[str, Repetition] = {}
    for name, make in implementations(case, title, given).items():
        run = _tried(name, make, case.device, needed=name.startswith(OURS) and not repetitions)
        if run is not None:
            repetitions[name] = run
        else:
            gc.collect()  # else a later step on xla would find what this one left on the device
    times = measure(case.device, repetitions, given.repeat, given.clock)
    medians = {name: statistics.median(t) for name, t in times.items()}
    parts = {}
    if title in WITH_PLUGINS:
        specs = {name: name.removeprefix(f"{OURS} ") for name in medians}
        parts = {name: bench_parts.parts(case, spec, given.ratio, given.repeat) for name, spec in specs.items()}
    apart = {name: not_compared_with(case, name) for name in medians}
    rows = []
    for name, ms in medians.items():
        best = min(
            (m for n, m in medians.items() if not n.startswith(OURS) and n != name and apart[n] == apart[name]),
            default=None,
        )
        rule = rule_of(case, name)
        of_rule = dataclasses.replace(case, optimizer=rule)
        moved = of_rule.least_bytes() / ms / 1e6 if case.what != "step" and title != "tt" else None
        rows.append(
            {
                "name": f"{title} {name}",
                "device": case.device.name,
                "rows": sum(SCALES[name.split()[-1]] if title == "scale" else case.table_rows),
                "dim": case.dim,
                "batch": case.batch,
                "bag": case.bag,
                "zipf": case.zipf,
                "optimizer": rule,
                "optimizer_asked": case.optimizer,
                "placement": name.split()[-1] if name.split()[-1] in PLACEMENTS else "",
                "ms_median": ms,
                "ms_min": min(times[name]),
                "gb_per_s": moved,
                "share_of_copy": moved / copy if moved else None,
                "ratio_to_best_other": best / ms if best else None,
                "not_compared_with": apart[name],
                "clock": given.clock,
                "ratio_to_1M": ms / medians[f"{OURS} 1M"] if title == "scale" else None,
                "ratio_to_exact": ms / medians[f"{OURS} {EXACT}"] if title in WITH_PLUGINS else None,
                "ms_by_part": parts.get(name),
            }
        )
    return rows


def text(row: dict[str, Any]) -> str:
    """A row for people."""
    share = f"{row['gb_per_s']:8.2f} GB/s {row['share_of_copy']:6.1%} of copy" if row["gb_per_s"] else " " * 29
    ratio = f"{row['ratio_to_best_other']:6.2f}x as fast as the best other" if row["ratio_to_best_other"] else ""
    ratio += f" (not compared with {row['not_compared_with']})" if row["not_compared_with"] else ""
    ratio += f"{row['ratio_to_exact']:6.2f} of the time of exact tables" if row["ratio_to_exact"] else ""
    ratio += f"{row['ratio_to_1M']:6.2f} of the time at 1M rows" if row["ratio_to_1M"] else ""
    return (
        f"{row['name']:<28} {row['device']:<5}{row['rows']:>12,} x {row['dim']:<4} batch {row['batch']:<6} bag "
        f"{row['bag']:<3} zipf {row['zipf']:<5} {row['optimizer']:<16}{row['ms_median']:>9.2f} ms (min "
        f"{row['ms_min']:8.2f}) {share} {ratio}".rstrip()
    )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of the median, one panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        what = row["name"].split()[0]
        size = " and ".join(SCALES) if what == "scale" else f"{row['rows']:,}"
        title = f"{what} on {row['device']}: {size} x {row['dim']}, batch {row['batch']}, bag {row['bag']}, "
        panels.setdefault(f"{title}zipf {row['zipf']}, {row['optimizer_asked']}", []).append(row)
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 0.6 + 1.6 * len(panels)), squeeze=False)
    for (title, members), (axis,) in zip(panels.items(), axes, strict=True):
        names = [m["name"].partition(" ")[2] for m in members]
        colours = ["tab:blue" if n.startswith(OURS) else "tab:gray" for n in names]
        names = [
            n if m["optimizer"] == m["optimizer_asked"] else f"{n}, {m['optimizer']}"
            for n, m in zip(names, members, strict=True)
        ]
        axis.barh(names, [m["ms_median"] for m in members], color=colours)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("median ms", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    given = flags().parse_args(arguments)
    try:
        check(given)
        if "xla" in given.device:
            open_xla_first()
        devices = {name: open_device(name) for name in dict.fromkeys(given.device)}
        to_measure = cases(given, devices)
        check_others(given, to_measure)
        for device in devices.values():
            announce(device, "fp32")
            if "step" in given.what and device.slow_bf16:
                print(f"steps in bf16 are left out on {device.name}, which has no fast products in it")
        copies = {name: copy_bandwidth(device) for name, device in devices.items()}
        for name, copy in copies.items():
            print(f"{name}: copies at {copy:.1f} GB/s")
        rows: list[dict[str, Any]] = []
        for case, title in tqdm(to_measure, desc="cases", file=sys.stderr, disable=None):
            new = rows_of(case, title, given, copies[case.device.name])
            rows += new
            for row in new:
                tqdm.write(text(row))
            if given.out:  # after every case, so an interrupted benchmark keeps what it measured
                about = {"versions": versions(), "copy_gb_per_s": copies, "threads": torch.get_num_threads()}
                _write(given.out, rows, about)
        if given.out:
            *_, picture = files_of(given.out)
            try:
                plot(rows, picture)
            except OSError as error:
                raise UserError(f"{picture} cannot be written ({error.strerror}); {given.out} has the rows") from error
            print(f"wrote {given.out} and {picture}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the cases measured so far are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
