"""A study from its file to its page: plan, tune, run, table, report."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from dlrm_xla.errors import UserError
from dlrm_xla_studies import grid, results
from dlrm_xla_studies.feasible import Forecast, forecasts
from dlrm_xla_studies.folders import folder_of
from dlrm_xla_studies.grid import Cell
from dlrm_xla_studies.progress import Estimate, Progress, minutes
from dlrm_xla_studies.runner import DAMAGED, FAILED, FINISHED, Runner, Stopped, only_one, state_of
from dlrm_xla_studies.spec import Study
from dlrm_xla_studies.stages import Stages
from dlrm_xla_studies.workers import Workers


class Wishes(NamedTuple):
    """What the command line asked for."""

    dry_run: bool
    retry_failed: bool
    report_only: bool
    cores: int


def conduct(study: Study, out: Path, launch: Path, wishes: Wishes) -> int:
    """Runs what is not finished, writes table and page, and returns the exit code."""
    cells = grid.cells(study)
    with ExitStack() as held:
        if not wishes.dry_run:
            held.enter_context(only_one(out))
            _keep(study.path, out / "study.yaml")
            if wishes.report_only:
                stages = Stages(study, out, cells, {cell.id: Forecast() for cell in cells})
                return _finish(study, out, stages, stopped=False)
        slots = max(1, wishes.cores // study.threads)
        workers = held.enter_context(Workers(launch, slots, study.threads))
        found = forecasts(cells, out, workers, study.memory)
        stages = Stages(study, out, cells, found)
        ids = {cell.id for cell in stages.cells}
        for reason, names in _by_reason([cell for cell in cells if cell.id not in ids], found).items():
            print(f"skipped: {', '.join(sorted(names))}: {reason}")
        if not stages.cells:
            raise UserError(f"no cell of {study.path} can run, for the reasons above")
        estimate = Estimate()
        states = {cell.id: state_of(out, stages.settled(cell) or cell) for cell in stages.cells}
        for cell in stages.cells:
            if states[cell.id]["status"] == FINISHED and not found[cell.id].reason:
                estimate.learn(cell, found[cell.id], states[cell.id]["seconds"])
        if wishes.dry_run:
            _print_grid(study, stages.cells, states, stages, estimate, slots)
            return 0
        return _finish(study, out, stages, stopped=_run(study, out, workers, stages, estimate, slots, wishes))


def _keep(given: Path, kept: Path) -> None:
    """Copies the study file into the study's folder, which may be where it was read."""
    if not (kept.exists() and kept.samefile(given)):
        shutil.copyfile(given, kept)


def _run(
    study: Study, out: Path, workers: Workers, stages: Stages, estimate: Estimate, slots: int, wishes: Wishes
) -> bool:
    """Whether it was stopped."""
    ended = {FINISHED} if wishes.retry_failed else {FINISHED, FAILED}
    settled = [cell for cell in stages.known.values() if not cell.trial]
    waiting = [cell for cell in settled if state_of(out, cell)["status"] not in ended]
    for cell in stages.known.values():
        if (state := state_of(out, cell))["status"] == DAMAGED:
            print(f"damaged: {cell.title}: {state['error']} It runs again now.")
    total = len(settled) + len(stages.untuned())
    print(f"{len(settled) - len(waiting)} of {total} cells have ended already")
    progress = Progress(estimate, stages, waiting, stages.trials_left(ended), slots)
    runner = Runner(
        out, workers, wishes.cores, study.threads, study.memory, lambda c, s: progress.done(c, s, results.told(out, c)),
        wishes.retry_failed,
    )  # fmt: skip
    try:
        stages.run(runner)
    except Stopped:
        return True
    finally:
        progress.close()
    return False


def _finish(study: Study, out: Path, stages: Stages, stopped: bool) -> int:
    known = list(stages.known.values())
    states = {cell.id: state_of(out, cell) for cell in known}
    stays = (out / results.TABLE).exists()
    table = results.write(study.name, out, known, states)
    counts = Counter(states[cell.id]["status"] for cell in known if not cell.trial)
    for cell in known:
        status = states[cell.id]["status"]
        if status == FAILED:
            print(f"failed: {cell.title}: {states[cell.id]['error']}  ({folder_of(out, cell) / 'log.txt'})")
        if status == DAMAGED:
            print(f"damaged: {cell.title}: {states[cell.id]['error']}. The next run of the study runs it again.")
    print(f"{counts[FINISHED]} of {counts.total() + len(stages.untuned())} cells finished, {counts[FAILED]} failed")
    print(
        f"table: {out / results.TABLE}"
        + (": nothing has finished, so it stays as it was" if stays and not len(table) else "")
    )
    if stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if len(table):
        from dlrm_xla_studies import page

        print(f"page:  {page.write(table, out, study.name, study.question)}")
    return 1 if counts[FAILED] or counts[DAMAGED] else 0


def _by_reason(cells: Sequence[Cell], found: Mapping[str, Forecast]) -> dict[str, set[str]]:
    """Names of impossible cells, without their seeds, by reason."""
    reasons: dict[str, set[str]] = {}
    for cell in cells:
        if reason := found[cell.id].reason:
            reasons.setdefault(reason, set()).add(cell.title.partition(" seed ")[0])
    return reasons


def _print_grid(
    study: Study,
    cells: Sequence[Cell],
    states: Mapping[str, Mapping[str, Any]],
    stages: Stages,
    estimate: Estimate,
    slots: int,
) -> None:
    """The grid, and what it takes."""
    if study.question:
        print(study.question)
    print(f"{'cell':<74}{'bytes to serve':>15}{'memory':>10}{'time':>8}  state")
    for cell in cells:
        forecast = stages.forecasts[cell.id]
        served = f"{forecast.embedding_bytes:,}" if forecast.embedding_bytes else ""
        title = cell.title + (f" (tunes {', '.join(cell.tuned)})" if cell.tuned else "")
        print(
            f"{title:<74}{served:>15}{forecast.memory / 1e9:>7.1f} GB"
            f"{minutes(estimate.seconds(cell, forecast)):>8}  {states[cell.id]['status']}"
        )
    left = [cell for cell in cells if states[cell.id]["status"] not in (FINISHED, FAILED)]
    trials = stages.trials_left()
    learned = any(state["status"] == FINISHED for state in states.values())
    basis = "by the cells that have finished" if learned else "a first guess, until cells have finished"
    total = estimate.total([*left, *trials], stages.forecasts, slots)
    print(
        f"{len(cells)} cells, {len(left)} to run, {len(trials)} tuning trials; {slots} at once with {study.threads} "
        f"threads each, within {study.memory / 1e9:g} GB: about {minutes(total)} ({basis})"
    )
