"""Runs the cells of a study in parallel within its cores and memory, so that a kill at any moment loses little.

A cell's folder holds `settings.yaml`, `log.txt`, `state.json` and what the tool writes. It is finished once the tool's
report is whole; then it is never run again. A run that stopped goes on by `launch/run.py --resume`.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from dlrm_xla.errors import UserError
from dlrm_xla.run_folder import read_finished
from dlrm_xla_studies.feasible import Forecast
from dlrm_xla_studies.folders import folder_of
from dlrm_xla_studies.grid import SETTINGS_FILE, Cell, expanded
from dlrm_xla_studies.spec import Tool
from dlrm_xla_studies.workers import Workers

FINISHED, FAILED, INTERRUPTED, WAITING, DAMAGED = "finished", "failed", "interrupted", "waiting", "damaged"
RUNNING = "running"
# Figures of a report without which there is no row of results; null where one does not exist.
_NUMBERS: Mapping[Tool, tuple[str, ...]] = {
    "run": ("auc", "log_loss", "validation_log_loss", "embedding_bytes", "compression_ratio", "steps",
            "step_ms_median", "train_samples_per_second", "tables_with_plugin", "seed", "batch_size"),
    "compile": ("estimated_ms",),
    "bench": ("ms_median",),
}  # fmt: skip


class Stopped(Exception):
    """The study was asked to stop."""


def whole_report(cell: Cell, folder: Path) -> Any:
    """The tool's report, or None where it is not there, cannot be read or says that it was interrupted."""
    try:
        report = json.loads(cell.report(folder).read_text())
    except (OSError, ValueError):
        return None
    if _wrong(cell.tool, report):
        return None
    return None if isinstance(report, dict) and report.get("interrupted") else report


def _wrong(tool: Tool, report: Any) -> str:
    """What is not as in a report of this tool; '' where nothing is."""
    if tool == "bench" and not isinstance(report, list):
        return "it is no list"
    for row in report if tool == "bench" else [report]:
        if not isinstance(row, dict):
            return "it holds no names with values"
        for name in _NUMBERS[tool]:
            if not isinstance(row.get(name, ""), int | float | None):
                return f"{name} is {row.get(name)!r}"
        if tool == "run" and not isinstance(row.get("plugin"), str):
            return f"plugin is {row.get('plugin')!r}"
    return ""


def state_of(study: Path, cell: Cell) -> dict[str, Any]:
    """``status``, ``error``, ``seconds`` (0: unknown) and ``attempts`` of a cell, whoever ran it."""
    folder = folder_of(study, cell)
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        state |= {"seconds": float(state["seconds"]), "attempts": int(state["attempts"]), "status": state["status"]}
    except (OSError, ValueError, TypeError, KeyError):
        state = {"status": INTERRUPTED if (folder / "run").exists() else WAITING, "seconds": 0.0, "attempts": 0}
    # bench.py writes its report row by row: only its exit says that it is whole.
    ended = cell.tool == "run" or state["status"] == FINISHED
    if ended and cell.report(folder).exists():
        if damage := _damage(cell, folder):
            return state | {"status": DAMAGED, "error": damage}
        if whole_report(cell, folder) is not None:
            # Of a call that outlived its study nobody measured the time.
            return state | {"status": FINISHED} | ({"seconds": 0.0} if state["status"] == RUNNING else {})
    return state | {"status": INTERRUPTED} if state["status"] in (FINISHED, RUNNING) else state


def _damage(cell: Cell, folder: Path) -> str:
    """Why what a cell ended with cannot be read, '' where it can. It is written in one piece: no kill leaves it so."""
    report = cell.report(folder)
    if cell.tool != "run":
        return f"{report} is damaged." if whole_report(cell, folder) is None else ""
    files = (report, report.with_name("config.yaml"))
    return _damage_of_run(report.parent, tuple(file.stat().st_mtime_ns for file in files if file.exists()))


@functools.cache
def _damage_of_run(folder: Path, changed: tuple[int, ...]) -> str:
    """The same of a run, read once for each time that it changed: YAML takes 10 ms."""
    try:
        report = read_finished(folder)[0]
    except UserError as error:
        return str(error)
    wrong = _wrong("run", report)
    return f"{folder / 'report.json'} is damaged: {wrong}." if wrong else ""


@dataclass(frozen=True)
class Job:
    """Work for one thread, which runs its cells one after another, and what it takes while it does."""

    work: Callable[[], None]
    cores: int
    memory: float
    device: str


class Runner:
    """Runs cells; ``done`` hears of each that ended, with its state."""

    def __init__(
        self,
        study: Path,
        workers: Workers,
        cores: int,
        threads: int,
        memory: float,
        done: Callable[[Cell, dict[str, Any]], None],
        retry_failed: bool = False,
    ) -> None:
        self.study, self.workers, self.cores, self.threads, self.memory = study, workers, cores, threads, memory
        self.done, self.retry_failed = done, retry_failed
        self._signals = 0

    def job(self, work: Callable[[], None], cell: Cell, forecast: Forecast) -> Job:
        """A job for cells like this one."""
        # A benchmark's times are worth nothing beside other work.
        cores = self.cores if cell.tool == "bench" else min(self.threads, self.cores)
        return Job(work, cores, forecast.memory, cell.device)

    def all(self, jobs: Sequence[Job]) -> None:
        """Starts the first job that there is room for, until all are done; raises Stopped after a signal."""
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        waiting, running = list(jobs), dict[Future[None], Job]()
        try:
            with ThreadPoolExecutor(max(1, self.cores)) as pool:
                while running or (waiting and not self._signals):
                    now = list(running.values())
                    ready = None if self._signals else next((job for job in waiting if self._fits(job, now)), None)
                    if ready:
                        waiting.remove(ready)
                        running[pool.submit(ready.work)] = ready
                        continue
                    for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        if not isinstance(future.exception(), Stopped):
                            future.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signals:
            raise Stopped

    def _fits(self, job: Job, running: Sequence[Job]) -> bool:
        return (
            sum(other.cores for other in running) + job.cores <= self.cores
            and sum(other.memory for other in running) + job.memory <= self.memory
            and not (job.device and job.device in {other.device for other in running})
        )

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signals += 1
        self.workers.signal(signal.SIGINT if self._signals == 1 else signal.SIGKILL)
        if self._signals == 1:
            print("\nstopping: runs write a checkpoint and end; Ctrl-C again ends them at once", file=sys.stderr)

    def one(self, cell: Cell) -> dict[str, Any]:
        """Runs a cell to its end, unless it is finished, and returns its state."""
        state = state_of(self.study, cell)
        if state["status"] == FINISHED or (state["status"] == FAILED and not self.retry_failed):
            return state
        if self._signals:
            raise Stopped
        state = self._attempt(cell)
        self.done(cell, state)
        if state["status"] == INTERRUPTED:
            raise Stopped
        return state

    def _attempt(self, cell: Cell) -> dict[str, Any]:
        folder = folder_of(self.study, cell)
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / "lock"
        self._wait_for(lock, cell)
        state = state_of(self.study, cell)
        if state["status"] == FINISHED:
            return state
        script, *arguments = self._prepare(cell, folder)
        attempts = state["attempts"] + 1
        self._write(folder, {"status": RUNNING, "seconds": state["seconds"], "attempts": attempts})
        code, took = self.workers.call(Path(script).stem, arguments, folder / "log.txt", lock)
        state = {"seconds": state["seconds"] + took, "attempts": attempts} | self._ending(cell, folder, code)
        self._write(folder, state)
        return state

    def _wait_for(self, lock: Path, cell: Cell) -> None:
        """Returns once no call holds a cell's lock: where a study was killed, its calls live on."""
        told = False
        with lock.open("a+") as held:
            while not _taken(held):
                if self._signals:
                    raise Stopped
                if not told:
                    held.seek(0)
                    print(
                        f"{cell.title} waits for a call of a study that was killed, process {held.read() or 'unknown'}",
                        file=sys.stderr,
                    )
                told = True
                time.sleep(0.2)

    def _prepare(self, cell: Cell, folder: Path) -> list[str]:
        """The command, after removing what cannot be gone on with."""
        run = folder / "run"
        if _is_mapping(run / "config.yaml"):
            return ["run", "--resume", str(run)]
        if run.exists():
            shutil.rmtree(run)
        (folder / SETTINGS_FILE).write_text(yaml.safe_dump(expanded(cell.settings)))
        return cell.command(folder)

    def _ending(self, cell: Cell, folder: Path, code: int) -> dict[str, Any]:
        # 3: compiled, and does not fit the chip, which is a result.
        done = (0, 3) if cell.tool == "compile" else (0,)
        if code in done and whole_report(cell, folder) is not None:
            return {"status": FINISHED}
        if self._signals:
            return {"status": INTERRUPTED}
        tail = (folder / "log.txt").read_text(errors="replace").splitlines()[-15:]
        errors = [line for line in tail if line.startswith("error:")]
        said = errors[-1] if errors else (tail[-1] if tail else "no output")
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return {"status": FAILED, "error": f"{why}: {said}"}

    def _write(self, folder: Path, state: Mapping[str, Any]) -> None:
        unfinished = folder / "state.json.unfinished"
        unfinished.write_text(json.dumps(state) + "\n")
        os.replace(unfinished, folder / "state.json")


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_mapping(file: Path) -> bool:
    """Whether a YAML file has settings: a crash of the machine can leave an empty one."""
    try:
        return isinstance(yaml.safe_load(file.read_text()), dict)
    except (OSError, ValueError, yaml.YAMLError):
        return False


@contextmanager
def only_one(study: Path) -> Iterator[None]:
    """Holds a study's folder; raises UserError where another process does."""
    try:
        study.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the study's folder {study}: {error.strerror}. Choose another --out.") from error
    with (study / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another study is running in {study}; wait for it, or give another --out") from error
        yield
