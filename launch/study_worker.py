"""Runs launch scripts for `launch/study.py`, each in a process forked from this one.

Imports are most of what a short run costs: 12 s of CPU time, where 3,000 rows take 0.7 s. So they are made once, before
any device is opened, and every call begins as a copy.

Reads one JSON object a line, {script, arguments, log, lock}; answers each with {"pid"} and, at its end, {"code"}.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import signal
import sys
import traceback
import warnings
from typing import Any, NoReturn

# What a run imports only where it needs it, which all do.
LATE = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "sklearn.metrics",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
)


def _work(job: dict[str, Any]) -> NoReturn:
    """Becomes the call; holds the lock, where there is one, as long as it lives, whoever waits for it."""
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.setsid()  # Ctrl-C is told by the study, once
        lock = os.open(job["lock"], os.O_RDWR | os.O_CREAT) if job["lock"] else None
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        try:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except FileNotFoundError:  # the study was stopped meanwhile, and with it went its folder
            os._exit(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = importlib.import_module(job["script"]).main(job["arguments"])
    except SystemExit as error:  # argparse's
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:  # before there was anything to stop
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    """Serves until its standard input ends."""
    for name in ("run", *LATE):
        importlib.import_module(name)
    # Until a call is in the block that catches it: the study tells a call by its number as soon as there is one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    for line in sys.stdin:
        with warnings.catch_warnings():
            # Python warns of other threads' locks, but these are pools of libraries, which wait for work.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _work(json.loads(line))
        if not _told({"pid": child}) or not _told({"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}):
            return 1
    return 0


def _told(answer: dict[str, int]) -> bool:
    """Whether the study still hears the answer."""
    try:
        print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python flushes once more
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
