"""Kills a study at random moments, starts it again, and compares its table with that of a study that nobody disturbed.

python tests/campaigns/study_kills.py --kills 20

Half of the kills take the runs along, half leave them behind as orphans. Prints one line of JSON; exit code 1 where a
figure that is no time differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml
from dlrm_xla_studies.results import TIMES

ROOT = Path(__file__).parents[2]
STUDY = {
    "cores": 2,
    "settings": {
        "synthetic_rows": 3000, "synthetic_tables": [30, 2000, 500, 40], "bottom": [8], "top": [8], "min_rows": 100,
        "min_count": 0, "batch_size": 128, "save_every": 2,
    },
    "runs": [
        {"plugin": "exact", "seed": [0, 1, 2], "row_lr": 0.02},
        {"plugin": ["hash_rows", "quotient_remainder"], "ratio": [2, 4], "seed": [0, 1, 2]},
    ],
    "tuning": {"trials": 2, "search": {"row_lr": [0.01, 0.08]}},
}  # fmt: skip


def start(file: Path, out: Path) -> subprocess.Popen[bytes]:
    """The study in a process group of its own."""
    with out.with_suffix(".log").open("ab") as log:
        command = [sys.executable, str(ROOT / "launch" / "study.py"), str(file), "--out", str(out)]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def descendants(pid: int) -> list[int]:
    """Processes below one, by /proc; children first."""
    try:
        below = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return []
    return [*below, *(d for child in below for d in descendants(child))]


def table(out: Path) -> pd.DataFrame:
    """What must agree."""
    found = pd.read_parquet(out / "results.parquet")
    return found.drop(columns=[c for c in (*TIMES, "study") if c in found])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "tiny.yaml"
        file.write_text(yaml.safe_dump(STUDY))
        began = time.monotonic()
        assert start(file, folder / "whole").wait() == 0, (folder / "whole.log").read_text()
        seconds = time.monotonic() - began
        kills = orphaned = finished = 0
        while kills < given.kills:
            child = start(file, folder / "killed")
            try:
                # So that kills fall on all of a study, not on its first seconds alone.
                child.wait(rng.uniform(0.1, 1) * seconds)
                finished += 1
                if finished > given.kills:
                    break
                continue
            except subprocess.TimeoutExpired:
                pass
            below = descendants(child.pid)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            kills += 1
            if rng.random() < 0.5:
                for pid in below:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
            else:
                orphaned += 1
        code = start(file, folder / "killed").wait()
        assert code == 0, (folder / "killed.log").read_text()
        same = table(folder / "whole").equals(table(folder / "killed"))
    print(json.dumps({"kills": kills, "left orphans": orphaned, "same table": same, "seconds undisturbed": seconds}))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
