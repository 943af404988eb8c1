"""The two stages of a study: tuning, where it is asked for, then every cell with what tuning found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dlrm_xla_studies import grid
from dlrm_xla_studies.feasible import Forecast
from dlrm_xla_studies.folders import as_tried, folder_of
from dlrm_xla_studies.grid import Cell
from dlrm_xla_studies.runner import FAILED, FINISHED, Runner, Stopped, state_of, whole_report
from dlrm_xla_studies.spec import Study
from dlrm_xla_studies.tuning import tune


class Stages:
    """Of a grid's cells ``cells`` are those that can run or have finished, whatever their forecast says by now.

    ``known`` are the calls that the study has come to so far, trials too, by id; ``forecasts`` cover them.
    """

    def __init__(self, study: Study, out: Path, cells: Sequence[Cell], forecasts: Mapping[str, Forecast]) -> None:
        self.study, self.out, self.forecasts = study, out, dict(forecasts)
        self.known: dict[str, Cell] = {}
        cells = as_tried(out, cells)
        # By method: the cell that its trials are made at, and what they found once all have ended.
        self.places: dict[str, Cell] = {}
        self.found: dict[str, dict[str, float]] = {}
        for method, group in (grid.methods(cells) if study.tuning else {}).items():
            self._look(method, group)
        self.cells = [cell for cell in cells if not self.forecasts[cell.id].reason or self._has_finished(cell)]
        self._settle()

    def trials_left(self, ended: Collection[str] = (FINISHED, FAILED)) -> list[Cell]:
        """A stand-in for each trial that is in none of these states, to estimate by."""
        tried = Counter(
            cell.trial for cell in self.known.values() if cell.trial and state_of(self.out, cell)["status"] in ended
        )
        trials = self.study.tuning.trials if self.study.tuning else 0
        return [place for method, place in self.places.items() for _ in range(trials - tried[method])]

    def settled(self, cell: Cell) -> Cell | None:
        """A cell of the grid with what tuning found for it; None before it did."""
        if not cell.tuned:
            return cell
        values = self.found.get(cell.method())
        return None if values is None else cell.with_tuned(values)

    def untuned(self) -> list[Cell]:
        """The cells that wait for tuning."""
        return [cell for cell in self.cells if self.settled(cell) is None]

    def run(self, runner: Runner) -> None:
        """Does both stages; raises Stopped where it was asked to."""

        def tune_one(method: str, place: Cell) -> None:
            def run(trial: Cell) -> dict[str, Any]:
                self._add_trial(trial, place)
                return runner.one(trial)

            self.found[method] = self._tune(place, run)

        runner.all(
            [
                runner.job(partial(tune_one, method, place), place, self.forecasts[place.id])
                for method, place in self.places.items()
                if not self.forecasts[place.id].reason
            ]
        )
        self._settle()
        runner.all(
            [
                runner.job(partial(_ignore_state, runner.one, cell), cell, self.forecasts[cell.id])
                for cell in self.known.values()
                if not cell.trial and not self.forecasts[cell.id].reason
            ]
        )

    def _look(self, method: str, group: Sequence[Cell]) -> None:
        """Finds out, running nothing, where a method's trials are made and what they have come to.

        They are where they have ended already, though another ratio would be chosen now: which ones can run changes.
        """
        tuning = self.study.tuning
        assert tuning
        able = [cell for cell in group if not self.forecasts[cell.id].reason]
        usual = grid.trial_place(able or group, tuning.seed)
        places = {place.id: place for place in (usual, *(grid.trial_place([cell], tuning.seed) for cell in group))}
        seen = {id: self._seen(place) for id, place in places.items()}
        ended = [id for id, (_, values) in seen.items() if values is not None]
        if not ended and not able:
            return
        place = places[ended[0] if ended else usual.id]
        same_size = [cell for cell in group if cell.settings.get("ratio") == place.settings.get("ratio")]
        self.places[method], self.forecasts[place.id] = place, self.forecasts[same_size[0].id]
        trials, values = seen[place.id]
        for trial in trials:
            self._add_trial(trial, place)
        if values is not None:
            self.found[method] = values

    def _seen(self, place: Cell) -> tuple[list[Cell], dict[str, float] | None]:
        """The trials at a place up to the first that has not ended, and what they found where all have."""
        trials: list[Cell] = []

        def look(trial: Cell) -> dict[str, Any]:
            trials.append(trial)
            state = state_of(self.out, trial)
            if state["status"] not in (FINISHED, FAILED):
                raise Stopped
            return state

        try:
            return trials, self._tune(place, look)
        except Stopped:
            return trials, None

    def _add_trial(self, trial: Cell, place: Cell) -> None:
        self.known[trial.id] = trial
        self.forecasts[trial.id] = self.forecasts[place.id]

    def _tune(self, place: Cell, run: Callable[[Cell], dict[str, Any]]) -> dict[str, float]:
        tuning = self.study.tuning
        assert tuning

        def loss_of(trial: Cell) -> float | None:
            if run(trial)["status"] != FINISHED:
                return None
            report = whole_report(trial, folder_of(self.out, trial))
            loss: float | None = report["validation_log_loss"]
            return loss

        return tune(place, tuning, loss_of)

    def _has_finished(self, cell: Cell) -> bool:
        settled = self.settled(cell)
        return settled is not None and state_of(self.out, settled)["status"] == FINISHED

    def _settle(self) -> None:
        """Gives the cells what was found for their methods; cells, and trials by their method, in the grid's order.

        Trials came in the order in which methods, several at once, asked for them. A cell may be given what another
        has: they are one.
        """
        methods = list(self.places)
        trials = {id: cell for id, cell in self.known.items() if cell.trial}
        trials = dict(sorted(trials.items(), key=lambda item: methods.index(item[1].trial)))
        different: dict[str, Cell] = {}
        for cell in self.cells:
            settled = self.settled(cell)
            if settled is not None:
                self.forecasts[settled.id] = self.forecasts[cell.id]
                different.setdefault(settled.result_key(), settled)
        self.known = {cell.id: cell for cell in different.values()} | trials


def _ignore_state(run: Callable[[Cell], dict[str, Any]], cell: Cell) -> None:
    run(cell)
