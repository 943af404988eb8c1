"""What `launch/study.py` asks the other scripts before anything runs: their fields, and whether a cell can run.

Planning is a call like any other, in a process that ends: a device that it opened would be taken when runs want it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dlrm_xla_studies.feasible import PROCESS_BYTES
from dlrm_xla_studies.grid import SCRIPTS, Cell
from dlrm_xla_studies.spec import Tool

from dlrm_xla.errors import UserError
from dlrm_xla.presets import KAGGLE_ROWS

# Packages without which a tool cannot run.
NEEDS: dict[Tool, tuple[str, ...]] = {"run": (), "bench": (), "compile": ("jax", "libtpu", "torch_xla")}
# What a compilation was seen to hold, the compiler's own code included.
COMPILE_BYTES = 6e9


def tool_flags() -> dict[Tool, Collection[str]]:
    """The flags of each tool that takes a study's settings as flags."""
    found: dict[Tool, Collection[str]] = {}
    for tool in ("compile", "bench"):
        # --out is the study's to choose.
        found[tool] = [a.dest for a in _parser(tool)._actions if a.dest not in ("help", "out")]
    return found


def _parser(tool: Tool) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(SCRIPTS[tool]).flags()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Plans the cells of a JSON file, [[tool, settings], ...], into another, a line each."""
    source, target = arguments or sys.argv[1:]
    with Path(target).open("w") as out:
        for tool, settings in json.loads(Path(source).read_text()):
            out.write(json.dumps(plan(Cell(tool, settings))) + "\n")
            out.flush()
    return 0


def plan(cell: Cell) -> dict[str, Any]:
    """The arguments of a cell's `Forecast`: what it takes, or the reason why it cannot run."""
    lacking = [name for name in NEEDS[cell.tool] if importlib.util.find_spec(name) is None]
    if lacking:
        return {"reason": f"{', '.join(lacking)} is not installed"}
    if cell.tool != "run":
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                _parser(cell.tool).parse_args(cell.command(Path())[1:])
        except SystemExit:
            return {"reason": said.getvalue().strip().splitlines()[-1]}
        if cell.tool == "compile":
            return {"memory": COMPILE_BYTES}
    try:
        return _plan_run(cell) if cell.tool == "run" else _plan_bench(cell)
    except UserError as error:
        return {"reason": str(error)}


def _plan_bench(cell: Cell) -> dict[str, Any]:
    """Exact tables are always measured too, beside what a plugin makes of them in training: at most about the same."""
    from dlrm_xla.devices import open_device

    settings = cell.settings
    for name in np.atleast_1d(settings.get("device", "cpu")):
        open_device(str(name))
    rows, dim = (float(np.max(settings.get(key, default))) for key, default in (("rows", 1e6), ("dim", 16)))
    capped = max(rows, sum(min(rows, table) for table in KAGGLE_ROWS))
    totals = {"scale": 1e8, **dict.fromkeys(("step", "placement", "plugins"), capped)}
    total = max(totals.get(what, rows) for what in np.atleast_1d(settings.get("what", "step")).tolist())
    return {"memory": PROCESS_BYTES + 2 * total * dim * 4}


def _plan_run(cell: Cell) -> dict[str, Any]:
    from dlrm_xla_data.prepared import day_split
    from run_data import open_data
    from run_plan import make_plan

    from dlrm_xla.config import resolve
    from dlrm_xla.devices import open_device

    settings = {k: os.path.expandvars(v) if isinstance(v, str) else v for k, v in cell.settings.items()}
    config = resolve(settings, None)[0]
    device = open_device(config.device)
    dataset = open_data(config)[0] if config.data else None
    made = make_plan(config, device, device.rows, dataset)
    made.check_memory()
    rows = dataset.splits["train"] if dataset else day_split(config.synthetic_rows)["train"]
    held = sum(array.nbytes for array in (dataset.dense, dataset.labels)) * 4 if dataset else 0
    return {
        # Parameters, optimizer and gradients once, and once more while a checkpoint is written.
        "memory": PROCESS_BYTES + 2 * sum(t.in_memory for t in made.training) + held,
        "samples": (rows[1] - rows[0]) * config.epochs,
        "embedding_bytes": sum(bag.bytes for bag in made.bags),
    }
