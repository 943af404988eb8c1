#!/usr/bin/env python
"""Compiles the steps that launch/run.py would run for a TPU that is not there, and says what they cost on it.

python launch/compile_tpu.py --chip v5e --plugin tensorly_tt --preset kaggle
python launch/compile_tpu.py --chip v5e --chips 16 --preset kaggle
python launch/compile_tpu.py --chip v5e v6e --plugin exact hash_rows --preset kaggle --batch-size 2048 --compare

XLA's TPU compiler comes with libtpu (extra tpu-compiler) and needs no TPU. Tables are shapes here: no data, no memory.
They have the preset's nominal sizes, or those of the data that a --config file names.
Figures are the compiler's estimates where it makes one, else those of a model (docs/tpu.md); it is said which. The exit
code is 3 where a step does not fit the chip.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tpu_compare
from run import INTERRUPTED
from run_flags import add_settings
from tpu_chips import Tracers, check_hosts, scaling
from tpu_steps import check_plan, compile_step, step_report

from dlrm_xla import registry
from dlrm_xla.config import Config, resolve
from dlrm_xla.errors import UserError
from dlrm_xla.plan import in_words
from dlrm_xla.steps import check_batch
from dlrm_xla.tpu import CHIPS, Chip, Slice, find_chip, find_slice
from dlrm_xla.tpu_compile import check_cache, compiler_version

DOES_NOT_FIT = 3
TERMINATED = 128 + signal.SIGTERM
SETTINGS = {"preset", "min_rows", "ratio", "precision", "dense_optimizer", "row_optimizer"}
CONFIG_HELP = (
    "YAML file of settings; a run's config.yaml works: tables are then those of its data, or where that is not here "
    "of its synthetic_tables"
)
SEVERAL = {"plugin": str, "batch_size": int, "dim": int}


def flags() -> argparse.ArgumentParser:
    """The model's flags of launch/run.py, chips, and where results go."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--chip", nargs="+", default=["v5e"], metavar="CHIP", help=f"{', '.join(CHIPS)} (default v5e)")
    parser.add_argument("--plugin", nargs="+", metavar="PLUGIN", help="as in launch/run.py; several with --compare")
    parser.add_argument(
        "--batch-size", nargs="+", type=int, metavar="N", help="samples per step; several with --compare"
    )
    parser.add_argument("--dim", nargs="+", type=int, metavar="N", help="width of a row; several with --compare")
    parser.add_argument(
        "--chips",
        nargs="+",
        default=["1"],
        metavar="N",
        help="chips that share the step by SPMD, or their topology such as 4x4; several with --compare",
    )
    add_settings(parser, SETTINGS)
    parser.add_argument("--config", type=Path, default=None, help=CONFIG_HELP)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write; with --compare a folder")
    parser.add_argument(
        "--compare",
        action="store_true",
        default=False,
        help="every plugin, batch size, dim and chip: a table, plots with --out",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="FOLDER",
        help="where compiled steps are kept (default %(default)s)",
    )
    return parser


def default_cache() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlrm_xla" / "tpu"


def report_of(config: Config, chip: Chip, slice: Slice, cache: Path, tracers: Tracers) -> dict[str, Any]:
    """Compiles the steps for a slice; the train step's figures are the report's own, of the longest bags."""
    traced, about = tracers.trace(config, slice.devices)
    reports = []
    on = chip.name if slice.devices == 1 else f"{slice.devices} x {chip.name}"
    began = time.monotonic()
    for step in traced:
        bags = f" of {step.slots} slots" if len(traced) > 2 else ""
        what = f"{config.plugin}, {step.name} step{bags} for {on}"
        print(what, file=sys.stderr)
        say = partial(_say, what)
        compiled = compile_step(step, chip, slice, cache, say)
        reports.append(step_report(step, compiled, chip, slice))
    train, forward, *shorter = reports
    return {
        "chip": chip.name,
        "chips": slice.devices // chip.devices_per_chip or slice.devices / chip.devices_per_chip,
        "devices": slice.devices,
        "device": chip.device,
        "topology": slice.topology,
        "plugin": config.plugin,
        "preset": config.preset,
        "data": config.data or None,
        "batch_size": config.batch_size,
        "dim": config.dim,
        "row_optimizer": config.row_optimizer,
        "dense_optimizer": config.dense_optimizer,
        "ratio_asked": config.ratio or None,
        "compiler": compiler_version(),
        "seconds": round(time.monotonic() - began, 1),
        **about,
        **train,
        **{f"per_chip_{name}": train[name] for name in ("argument_bytes", "temporary_bytes")},
        "forward": forward,
        "shorter_bags": [{"slots": step.slots, **report} for step, report in zip(traced[2:], shorter, strict=True)],
    }


def report_of_several(config: Config, chip: Chip, slice: Slice, cache: Path, tracers: Tracers) -> dict[str, Any]:
    """The report of a slice, compared with one device where it has more."""
    report = report_of(config, chip, slice, cache, tracers)
    if slice.devices == 1:
        return report
    one = find_slice(chip, "1")
    sizes = (config.batch_size, config.batch_size // slice.devices)
    alone, part = (report_of(replace(config, batch_size=size), chip, one, cache, tracers) for size in sizes)
    return report | {"scaling": scaling(report, alone, part)}


def without_missing_data(configs: Sequence[Config], file: Path | None) -> list[Config]:
    """The configurations of a file, without its data where that is not here, which is said."""
    data, rows = configs[0].data, configs[0].synthetic_tables
    if not data or Path(data).exists():
        return list(configs)
    print(
        f"{file}: its data {data} is not here; tables are synthetic_tables instead, {len(rows)} of {sum(rows):,} rows",
        file=sys.stderr,
    )
    return [replace(config, data="") for config in configs]


def _say(what: str, line: str) -> None:
    print(f"{what}: {line}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the flags and returns the exit code: 0, 2 for the user's mistakes, 3 where it does not fit, 130."""
    given = vars(flags().parse_args(arguments))
    file, out, compare, cache = (given.pop(name) for name in ("config", "out", "compare", "cache"))
    tracers = Tracers()
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        compiler_version()
        chips = [find_chip(name) for name in given.pop("chip")]
        numbers = given.pop("chips")
        slices = [(chip, find_slice(chip, number)) for chip in chips for number in numbers]
        for chip, slice in slices:
            check_hosts(chip, slice)
        several = {name: given.pop(name, [None]) for name in SEVERAL}
        cases = list(itertools.product(*several.values()))
        if len(cases) * len(slices) > 1 and not compare:
            raise UserError(f"{len(cases) * len(slices)} steps were asked for; --compare makes a table of several")
        tpu_compare.check_out(out, compare)
        configs = []
        for case in cases:
            values = {name: value for name, value in zip(several, case, strict=True) if value is not None}
            config, _ = resolve({**given, **values, "device": "xla"}, file)
            if compare and len(several["plugin"]) > 1 and not registry.parse(config.plugin):
                config = replace(config, ratio=0.0)  # that of the others, which are compared with exact tables
            for _, slice in slices:
                check_batch(config.batch_size, config.micro_batches, slice.devices)
            configs.append(config)
        configs = without_missing_data(configs, file)
        for config in configs:
            check_plan(config)
        check_cache(cache)
        reports: list[dict[str, Any]] = []
        try:
            for config, (chip, slice) in itertools.product(configs, slices):
                reports.append(report_of_several(config, chip, slice, cache, tracers))
                if not compare:
                    print(text(reports[-1]))
        finally:
            if compare and reports:  # those that are finished, also where a later one fails
                tpu_compare.write(reports, out)
        if out and not compare:
            out.write_text(json.dumps(reports[0], indent=1) + "\n")
        return 0 if all(r["fits"] for r in reports) else DOES_NOT_FIT
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; steps that were compiled are kept and cost nothing the next time", file=sys.stderr)
        return INTERRUPTED
    finally:
        tracers.close()


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    data = f", tables of {report['data']}" if report["data"] else ""
    lines = [
        f"\n{report['plugin']}, preset {report['preset']}{data}, batch {report['batch_size']:,}, dim {report['dim']}, "
        f"rows by {report['row_optimizer']}, on {_where(report)}; {report['compiler']}; nothing was run"
    ]
    for name, step in (("train", report), ("forward", report["forward"])):
        longest = ", of the longest bags" if report["shorter_bags"] else ""
        lines += [f"\n{name} step{longest}", *_memory(step), *_time(step), *_between(step)]
    if report["shorter_bags"]:
        lines.append("\nbags vary in length; train steps of shorter ones, each a graph of its own")
    for step in report["shorter_bags"]:
        ms = "does not fit" if step["estimated_ms"] is None else f"{step['estimated_ms']:10.3f} ms estimated"
        lines.append(f"  {step['slots']:,} slots a sample: {ms}, lower bound {step['lower_bound_ms']:.3f} ms")
    if "scaling" in report:
        lines += _scaling(report)
    return "\n".join(lines)


def _where(report: dict[str, Any]) -> str:
    if report["devices"] == 1:
        return str(report["device"]).replace("chip", report["chip"])  # one v5e; one of a tpu7x's 2 devices
    return f"{report['devices']} devices of {report['topology']}, figures are those of each"


def _between(step: dict[str, Any]) -> list[str]:
    """What goes between chips."""
    if not step["collectives"]:
        return []
    lines = ["  between chips                 ms           KB"]
    for c in step["collectives"]:
        lines.append(f"{c['ms']:32.4f} {c['bytes'] / 1e3:12,.1f}  {c['kind']:<20}{c['what'][:60]}")
    as_large = "*** AS LARGE AS A TABLE: " if step["collective_as_large_as_a_table"] else ""
    lines.append(
        f"  {as_large}the largest has {step['largest_collective_bytes']:,} bytes, "
        f"the largest array of rows {step['largest_table_bytes']:,}"
    )
    return lines


def _scaling(report: dict[str, Any]) -> list[str]:
    found = report["scaling"]

    def line(what: str, single: float | None, efficiency: float | None) -> str:
        if single is None or efficiency is None:
            who = one if single is None else f"{report['devices']} devices"
            return f"  {what}: {who} cannot hold it"
        return f"  {what}: {efficiency:.2f} ({one} takes {single:.3f} ms)"

    one, part = report["device"], report["batch_size"] // report["devices"]
    return [
        f"\nscaling efficiency against {one}, estimated",
        line(f"the same batch of {report['batch_size']:,}", found["one_chip_ms"], found["efficiency_at_this_batch"]),
        line(
            f"the same batch per {'chip' if one == 'one chip' else 'device'}, {part:,}",
            found["one_chip_ms_of_its_part"],
            found["efficiency_at_this_batch_per_chip"],
        ),
    ]


def _memory(step: dict[str, Any]) -> list[str]:
    def size(key: str) -> str:
        return "unknown" if step.get(key) is None else f"{in_words(step[key]):>13}"

    rows = [
        ("parameters", "parameter_bytes"),
        ("optimizer state", "optimizer_bytes"),
        ("arguments", "argument_bytes"),
        ("of them padding", "padding_bytes"),
        ("temporaries", "temporary_bytes"),
    ]
    return [f"  {label:<22}{size(key)}" for label, key in rows] + [f"  {step['verdict']}"]


def _time(step: dict[str, Any]) -> list[str]:
    if step["estimated_ms"] is None:
        return [f"  lower bound           {step['lower_bound_ms']:10.3f} ms"]
    small = f", and {step['uncovered_small']} small ones" if step["uncovered_small"] else ""
    lines = [
        f"  estimated time        {step['estimated_ms']:10.3f} ms = {step['known_ms']:.3f} by the compiler's "
        f"{step['known_cycles']:,} cycles + {step['modelled_ms']:.3f} modelled"
        + (f" + {step['collective_ms']:.3f} between chips" if step["collectives"] else ""),
        f"  lower bound           {step['lower_bound_ms']:10.3f} ms, {step['ratio_to_lower_bound']:.1f} times less",
        f"  bytes accessed        {in_words(step['bytes_accessed']):>13}, {step['flops'] / 1e9:,.2f} GFLOP by the "
        "compiler's analysis",
        f"  dearest operations            ms {'by':<9}{'of torch':<22}{'of XLA, with its results':<60}  part, table",
        *(f"    {_line(o)}" for o in step["dearest"]),
        f"  of all, timed by the model alone: {len(step['uncovered_operations'])} operations{small}",
        *(f"    {_line(o)}" for o in step["uncovered_operations"][:10]),
        "  by part:  " + ", ".join(f"{name} {ms:.3f}" for name, ms in list(step["parts_ms"].items())[:8]),
    ]
    for copy in step["whole_table_copies"]:
        lines.append(f"  *** COPIES THE WHOLE TABLE {copy['table']}, {copy['times']} times: {copy['operation']}")
    if not step["whole_table_copies"]:
        lines.append("  no operation copies a whole table")
    if step["brought_on_chip"]:
        lines.append(f"  small enough to be brought whole to memory on the chip: {', '.join(step['brought_on_chip'])}")
    return lines


def _line(operation: dict[str, Any]) -> str:
    times = f" x {operation['times']:,}" if operation["times"] > 1 else ""
    where = ", ".join(filter(None, (operation["module"], operation["table"])))
    what = f"{operation['by']:<9}{operation['what']:<22}{operation['operation'][:60]}{times}"
    return f"{operation['ms']:27.4f} {what}  {where}"


if __name__ == "__main__":
    sys.exit(main())
