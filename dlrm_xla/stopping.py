"""Ctrl-C and SIGTERM while a run trains: the first lets it finish its step, a second one ends it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FIRST = b"\nstopping after this step, then saving; the same again stops at once\n"
_AT_ONCE = b"\nstopped at once; --resume goes on from the last checkpoint\n"
_END = b"\0"
# What the main thread is given to end by itself. It hears of signals between two operations of Python, and XLA
# compiles for minutes in one.
_SECONDS_TO_END = 1.0
_listening: list[int] = []


def _hear_nothing() -> None:
    """In a process that was forked: its signals are not those of its parent, whose pipe it has."""
    if _listening:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_hear_nothing)


@contextmanager
def stop_signals(shown: bool = True) -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a question to ask after each step; a second one ends at once.

    It raises KeyboardInterrupt, or ends the process where that cannot be heard. ``shown``: says what was asked for.
    """
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {s: signal.signal(s, note) for s in SIGNALS}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    fd_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _listening.append(writing)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reading, ended, shown), daemon=True)
    watcher.start()
    try:
        yield lambda: bool(asked)
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        _listening.pop()
        os.write(writing, _END)
        watcher.join()
        os.close(writing)
        os.close(reading)


def _watch(reading: int, ended: threading.Event, shown: bool) -> None:
    """Hears of each signal when it comes, whatever the main thread does."""
    heard = 0
    while (number := os.read(reading, 1)) != _END:
        if number[0] not in SIGNALS:
            continue
        heard += 1
        if heard == 1 and shown:
            os.write(2, _FIRST)
        elif heard == 2 and not ended.wait(_SECONDS_TO_END):
            if shown:
                os.write(2, _AT_ONCE)
            os._exit(128 + signal.SIGINT)
