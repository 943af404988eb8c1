"""What a process hears of Ctrl-C, whatever it is doing."""

import signal
import subprocess
import sys
import threading
import time

# A mutex of C that is locked twice waits like a compilation does: other threads run, and no signal is heard of.
PROGRAM = """
import ctypes, os, threading, time
from dlrm_xla.stopping import stop_signals

def stuck(seconds):
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    timer = threading.Timer(seconds, libc.pthread_mutex_unlock, [mutex])
    timer.daemon = True
    timer.start()
    libc.pthread_mutex_lock(mutex)

with stop_signals() as asked:
    print("ready", flush=True)
    WORK
print("asked", asked(), flush=True)
"""


def stopped(work, number, signals):
    """Sends signals, each once the one before was told of; exit code, what was printed, and what was told."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("WORK", work)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    late = threading.Timer(60, process.kill)
    late.start()
    assert process.stdout.readline() == "ready\n"
    told = ""
    for _ in range(signals):
        time.sleep(0.5)  # until it is at its work, and has heard of the one before
        process.send_signal(number)
        while "stopping after this step" not in told:
            line = process.stderr.readline()
            assert line, "it ended"
            told += line
    printed, rest = process.communicate()
    late.cancel()
    return process.returncode, printed, told + rest


def test_one_is_told_of_at_once_and_heard_when_the_step_is_done():
    code, printed, told = stopped("stuck(2)", signal.SIGTERM, 1)
    assert (code, printed) == (0, "asked True\n")
    assert told.count("stopping after this step, then saving") == 1


def test_a_second_one_ends_what_hears_nothing():
    code, printed, told = stopped("stuck(50)", signal.SIGINT, 2)
    assert (code, printed) == (130, "")
    assert "stopped at once; --resume goes on" in told


def test_a_forked_child_is_not_heard():
    work = "pid = os.fork(); pid or (os.kill(os.getpid(), 15), time.sleep(3), os._exit(0)); os.kill(os.getpid(), 15)"
    code, printed, told = stopped(f"{work}; time.sleep(1.5)", signal.SIGTERM, 0)
    assert (code, printed) == (0, "asked True\n")
    assert told.count("stopping after this step") == 1


def test_a_second_one_is_an_interrupt_where_python_runs():
    code, printed, told = stopped("while True: time.sleep(0.01)", signal.SIGINT, 2)
    assert code != 0
    assert printed == ""
    assert "KeyboardInterrupt" in told
    assert "stopped at once" not in told
