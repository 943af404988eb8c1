"""Processes that run the launch scripts for a study; see `launch/study_worker.py`."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class Workers:
    """At most as many processes as calls at once, each started when it is first needed."""

    def __init__(self, launch: Path, count: int, threads: int) -> None:
        self._command = [sys.executable, str(launch / "study_worker.py")]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        self._free: queue.Queue[subprocess.Popen[str] | None] = queue.Queue()
        for _ in range(count):
            self._free.put(None)
        self._started: list[subprocess.Popen[str]] = []
        self._calls: set[int] = set()
        self.stopping = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is KeyboardInterrupt:
            self.signal(signal.SIGINT)
        for worker in self._started:
            _pipe(worker.stdin).close()
            worker.wait()
            _pipe(worker.stdout).close()

    def call(self, script: str, arguments: Sequence[str], log: Path, lock: Path | None = None) -> tuple[int, float]:
        """Runs a script to its end; its exit code, negative for a signal, and the seconds that it took itself."""
        worker = self._free.get()
        try:
            if worker is None or worker.poll() is not None:
                worker = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=self._environment,
                    start_new_session=True,
                )
                self._started.append(worker)
            job = {"script": script, "arguments": list(arguments), "log": str(log), "lock": str(lock) if lock else ""}
            try:
                _pipe(worker.stdin).write(json.dumps(job) + "\n")
                _pipe(worker.stdin).flush()
            except BrokenPipeError:
                return -signal.SIGKILL, 0.0
            pid = _answer(worker).get("pid")
            if pid is None:
                return -signal.SIGKILL, 0.0
            began = time.monotonic()  # the worker's imports are over
            self._calls.add(pid)
            if self.stopping:  # asked between the job and its process
                os.kill(pid, signal.SIGINT)
            code: int = _answer(worker).get("code", -signal.SIGKILL)
            self._calls.discard(pid)
            return code, time.monotonic() - began
        finally:
            self._free.put(worker)

    def signal(self, number: int) -> None:
        """Tells every call; those to come hear that it is over."""
        self.stopping = True
        for pid in list(self._calls):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _answer(worker: subprocess.Popen[str]) -> Mapping[str, Any]:
    """The next line; {} where the worker died."""
    line = _pipe(worker.stdout).readline()
    return json.loads(line) if line else {}
