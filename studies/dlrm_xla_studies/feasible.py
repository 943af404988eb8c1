"""What of a grid cannot run, found out before anything does; and what the rest will take."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlrm_xla_studies.grid import Cell
from dlrm_xla_studies.workers import Workers

# A process that has imported torch and torch_xla, its batches and its code, measured on Linux.
PROCESS_BYTES = 1.2e9
# A first guess until cells have finished: samples a second of one thread, and what a process takes to start.
SAMPLES_PER_SECOND = 10_000.0
START_SECONDS = 12.0
OTHER_TOOL_SECONDS = 60.0


@dataclass(frozen=True)
class Forecast:
    """``reason`` why a cell is impossible, or what it takes."""

    reason: str = ""
    memory: float = PROCESS_BYTES
    samples: int = 0
    embedding_bytes: int = 0

    @property
    def seconds(self) -> float:
        """A guess, for one thread."""
        return START_SECONDS + self.samples / SAMPLES_PER_SECOND if self.samples else OTHER_TOOL_SECONDS


_NOT_PLANNED = ("seed", "row_lr", "dense_lr", "plugin_lr", "out")


def plan_key(cell: Cell) -> str:
    """Cells with one key have one plan."""
    left = {k: v for k, v in cell.settings.items() if k not in _NOT_PLANNED}
    return json.dumps([cell.tool, left], sort_keys=True)


def missing_data(settings: Mapping[str, Any]) -> str:
    """Why the rows that a cell names are not here; '' where they are."""
    given = str(settings.get("data", ""))
    path = os.path.expandvars(given)
    if "$" in path:
        return f"data is {given}, and the environment variable in it is not set"
    if given and not Path(path).exists():
        return f"data is {given}, and {path} is not there"
    return ""


def forecasts(cells: Sequence[Cell], folder: Path, workers: Workers, memory: float) -> dict[str, Forecast]:
    """Forecast of each cell by its id. Plans are made once and kept in the study's folder, refusals are not."""
    lost = {cell.id: missing_data(cell.settings) for cell in cells}
    file = folder / "plans.json"
    known = _kept(file)
    new = {plan_key(c): c for c in cells if not lost[c.id] and plan_key(c) not in known}
    if new:
        known |= {k: Forecast(**v) for k, v in zip(new, _planned(list(new.values()), workers), strict=True)}
        if folder.exists():
            unfinished = file.with_suffix(".unfinished")
            kept = {k: asdict(v) for k, v in known.items() if not v.reason}
            unfinished.write_text(json.dumps(kept, indent=1) + "\n")
            os.replace(unfinished, file)
    found = {}
    for cell in cells:
        forecast = Forecast(lost[cell.id]) if lost[cell.id] else known[plan_key(cell)]
        if not forecast.reason and forecast.memory > memory:
            reason = f"needs {forecast.memory / 1e9:.1f} GB, and the study may take {memory / 1e9:.1f} GB (memory:)"
            forecast = Forecast(reason)
        found[cell.id] = forecast
    return found


def _kept(file: Path) -> dict[str, Forecast]:
    """The plans of a study's folder; none where they cannot be read, and all are made anew."""
    try:
        return {key: Forecast(**plan) for key, plan in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _planned(cells: Sequence[Cell], workers: Workers) -> list[dict[str, Any]]:
    print(f"planning {len(cells)} different cells", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        asked, answers, log = (Path(name) / part for part in ("cells.json", "plans", "log.txt"))
        asked.write_text(json.dumps([[cell.tool, dict(cell.settings)] for cell in cells]))
        if workers.call("study_plans", [str(asked), str(answers)], log)[0]:
            raise RuntimeError(f"planning failed:\n{log.read_text()}")
        return [json.loads(line) for line in answers.read_text().splitlines()]
