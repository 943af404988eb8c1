"""What a log file is told of a run's progress."""

import time

from dlrm_xla.progress import Progress


def test_a_first_step_that_takes_long_is_told_of(monkeypatch, capsys):
    monkeypatch.setattr("dlrm_xla.progress.SECONDS_BETWEEN_LINES", 0.05)
    with Progress(100, 64) as progress:
        time.sleep(0.3)
        progress.advance()
        told = capsys.readouterr().err.splitlines()
        time.sleep(0.2)
    assert len(told) >= 2
    assert "the first step, in which xla compiles, has taken 0 s" in told
    assert "the first step" not in capsys.readouterr().err


def test_the_first_step_which_compiles_is_no_measure_of_the_others(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Progress(100, 64) as progress:
        progress.skip(10)
        now = 70.0
        progress.advance()
        progress.show(loss=0.5)
        for _ in range(5):
            now += 2
            progress.advance()
        now += 30
        progress.paused(30)
        now += 2
        progress.advance()
        now += 2
        progress.advance()
        progress.show(loss=0.4)
    assert capsys.readouterr().err.splitlines() == [
        "step 11/100, the first took 70 s",
        "step 16/100, 32 samples/s, 02:48 left, loss 0.5000 at step 11",
        "step 17/100, 32 samples/s, 02:46 left, loss 0.5000 at step 11",
        "step 18/100, 32 samples/s, 02:44 left, loss 0.4000",
    ]
