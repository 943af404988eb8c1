"""What a study says while it runs: a line for each cell that ended, and the time left."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dlrm_xla_studies.feasible import Forecast
from dlrm_xla_studies.grid import Cell
from dlrm_xla_studies.stages import Stages


def minutes(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Estimate:
    """Seconds that cells will take: the forecast, corrected by how finished ones compare with theirs.

    Kinds are corrected apart, by tool, device and plugin where cells of it have finished, else by tool and device.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], tuple[float, float]] = {}

    def learn(self, cell: Cell, forecast: Forecast, seconds: float) -> None:
        """A cell finished after so many seconds; 0 where nobody knows, of which nothing is learned."""
        if not seconds:
            return
        for key in _keys(cell):
            guessed, took = self._seen.get(key, (0.0, 0.0))
            self._seen[key] = guessed + forecast.seconds, took + seconds

    def seconds(self, cell: Cell, forecast: Forecast) -> float:
        """Of one cell."""
        for key in _keys(cell):
            if key in self._seen:
                guessed, took = self._seen[key]
                return forecast.seconds * took / guessed
        return forecast.seconds

    def total(self, cells: Sequence[Cell], forecasts: Mapping[str, Forecast], slots: int) -> float:
        """Of all cells: those for the CPU share the slots, those of one device take turns."""
        by_device: dict[str, float] = {}
        for cell in cells:
            alone = cell.tool == "bench"
            seconds = self.seconds(cell, forecasts[cell.id])
            by_device[cell.device] = by_device.get(cell.device, 0.0) + seconds * (slots if alone else 1)
        return max([sum(by_device.values()) / slots, *(s for d, s in by_device.items() if d)], default=0.0)


def _keys(cell: Cell) -> list[tuple[str, ...]]:
    kind = (cell.tool, cell.device)
    return [(*kind, str(cell.settings.get("plugin", ""))), kind]


class Progress:
    """Counts cells down on standard error; thread-safe."""

    def __init__(
        self, estimate: Estimate, stages: Stages, waiting: Sequence[Cell], trials: Sequence[Cell], slots: int
    ) -> None:
        self.estimate, self.stages, self.slots = estimate, stages, slots
        self.waiting = {cell.id: cell for cell in waiting}
        # Trials and cells whose settings are not known yet.
        self.trials = list(trials)
        self.untuned = stages.untuned()
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=len(waiting) + len(trials) + len(self.untuned),
            unit="run",
            file=sys.stderr,
            bar_format="{n_fmt} of {total_fmt} |{bar:20}| {elapsed} so far{postfix}",
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        self._told()

    def done(self, cell: Cell, state: Mapping[str, Any], figures: str) -> None:
        """A cell ended."""
        with self._lock:
            if cell.trial:
                self.trials = self.trials[1:]
            elif self.waiting.pop(cell.id, None) is None:
                self.untuned = self.untuned[1:]
            if state["status"] == "finished":
                self.estimate.learn(cell, self.stages.forecasts[cell.id], state["seconds"])
            self._bar.n += 1
            why = ": ".join(filter(None, (state["status"], state.get("error"))))
            what = figures if state["status"] == "finished" else why
            trial = "trial: " if cell.trial else ""
            took = minutes(state["seconds"]) if state["seconds"] else "in a call of a study that was killed"
            tqdm.write(f"{trial}{cell.title:<58} {what}  ({took})", file=sys.stdout)
            sys.stdout.flush()
            self._told()

    def _told(self) -> None:
        left = [*self.waiting.values(), *self.trials, *self.untuned]
        seconds = self.estimate.total(left, self.stages.forecasts, self.slots)
        self._bar.set_postfix_str(f"about {minutes(seconds)} left" if left else "nothing left", refresh=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
