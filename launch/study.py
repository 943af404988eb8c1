#!/usr/bin/env python
"""Runs a study: a grid of runs from one YAML file, to one table and one page.

python launch/study.py studies/quick.yaml --dry-run       the grid, what is impossible and why, and what it will take
python launch/study.py studies/quick.yaml                 runs it under runs/quick/, with the time left
python launch/study.py studies/quick.yaml                 again: goes on; what is finished is never run again
python launch/study.py studies/quick.yaml --retry-failed  runs what failed once more

Writes, under --out: results.parquet, one row per run; report.html, one page that needs no network; figures/, the
same plots as PNG and PDF; cells/, a folder for each run.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dlrm_xla.errors import UserError

try:
    import study_plans
    from dlrm_xla_studies import conduct
    from dlrm_xla_studies.spec import read_study
except ModuleNotFoundError as error:
    print(f"error: a study needs {error.name}: pip install -e '.[studies]'", file=sys.stderr)
    sys.exit(2)

LAUNCH = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where cells failed, 2 for the user's mistakes, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--out", type=Path, help="the study's folder (default: runs/STUDY)")
    parser.add_argument("--dry-run", action="store_true", help="print the grid and what it will take, and stop")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed")
    parser.add_argument("--report-only", action="store_true", help="run nothing: table and page of what is finished")
    parser.add_argument("--cores", type=int, help="cores for all that runs at once, instead of the study's")
    given = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    # Cells are stopped in their own way; before and between them a SIGTERM is as a Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        study = read_study(given.study, study_plans.tool_flags())
        if given.cores is not None and given.cores < 1:
            raise UserError(f"--cores is {given.cores}, but must be at least 1")
        return conduct.conduct(
            study,
            given.out or Path("runs") / study.name,
            LAUNCH,
            conduct.Wishes(given.dry_run, given.retry_failed, given.report_only, given.cores or study.cores),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that fills, a folder that vanishes; anything else names itself
        print(f"error: {error}. Look at the disk and the permissions there; the same command goes on.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
