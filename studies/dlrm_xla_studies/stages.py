"""The two stages of a study: tuning, where it is asked for, then every cell with what tuning found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dlrm_xla_studies import grid
from dlrm_xla_studies.feasible import Forecast
from dlrm_xla_studies.grid import Cell
from dlrm_xla_studies.runner import FINISHED, Runner, Stopped, folder_of, state_of, whole_report
from dlrm_xla_studies.spec import Study
from dlrm_xla_studies.tuning import tune


class Stages:
    """``known`` are the calls that the study has come to so far, trials too, by id; ``forecasts`` cover them."""

    def __init__(self, study: Study, out: Path, cells: Sequence[Cell], forecasts: Mapping[str, Forecast]) -> None:
        self.study, self.out, self.cells, self.forecasts = study, out, list(cells), dict(forecasts)
        self.known = {cell.id: cell for cell in cells if not cell.tuned}
        tuning = study.tuning
        groups = grid.methods(cells) if tuning else {}
        self.groups = {m: (grid.trial_place(group, tuning.seed), group) for m, group in groups.items() if tuning}
        for place, group in self.groups.values():
            same_size = [c for c in group if c.settings.get("ratio") == place.settings.get("ratio")]
            self.forecasts[place.id] = self.forecasts[same_size[0].id]

    def trial_places(self) -> list[Cell]:
        """A stand-in for each trial, to estimate by."""
        tuning = self.study.tuning
        return [place for place, _ in self.groups.values() for _ in range(tuning.trials if tuning else 0)]

    def run(self, runner: Runner) -> None:
        """Does both stages; raises Stopped where it was asked to."""
        found: dict[str, dict[str, float]] = {}

        def tune_one(method: str, place: Cell) -> None:
            found[method] = self._tune(place, runner.one)

        runner.all(
            [
                runner.job(partial(tune_one, method, place), place, self.forecasts[place.id])
                for method, (place, _) in self.groups.items()
            ]
        )
        self._settle(found)
        runner.all(
            [
                runner.job(partial(_ignore_state, runner.one, cell), cell, self.forecasts[cell.id])
                for cell in self.known.values()
                if not cell.trial
            ]
        )

    def look(self) -> None:
        """Finds out, running nothing, what both stages have come to."""

        def finished(cell: Cell) -> dict[str, Any]:
            state = state_of(self.out, cell)
            if state["status"] != FINISHED:
                raise Stopped
            return state

        found = {}
        for method, (place, _) in self.groups.items():
            try:
                found[method] = self._tune(place, finished)
            except Stopped:
                continue
        self._settle(found)

    def _tune(self, place: Cell, run: Callable[[Cell], dict[str, Any]]) -> dict[str, float]:
        tuning = self.study.tuning
        assert tuning

        def loss_of(trial: Cell) -> float | None:
            self.known[trial.id] = trial
            self.forecasts[trial.id] = self.forecasts[place.id]
            if run(trial)["status"] != FINISHED:
                return None
            report = whole_report(trial, folder_of(self.out, trial))
            loss: float | None = report["validation_log_loss"]
            return loss

        return tune(place, tuning, loss_of)

    def _settle(self, found: Mapping[str, Mapping[str, float]]) -> None:
        """Gives the cells what was found for their methods; cells, and trials by their method, in the grid's order.

        Trials came in the order in which methods, several at once, asked for them.
        """
        tuning = self.study.tuning
        methods = list(self.groups)
        trials = {id: cell for id, cell in self.known.items() if cell.trial}
        trials = dict(sorted(trials.items(), key=lambda item: methods.index(item[1].trial)))
        self.known = {}
        for cell in self.cells:
            if cell.tuned and tuning:
                method = cell.method()
                if method not in found:
                    continue
                settled = cell.with_tuned(found[method])
                self.forecasts[settled.id] = self.forecasts[cell.id]
                cell = settled
            self.known[cell.id] = cell
        self.known |= trials


def _ignore_state(run: Callable[[Cell], dict[str, Any]], cell: Cell) -> None:
    run(cell)
