"""Kills a study at random moments, starts it again, and compares its table with that of a study that nobody disturbed.

python tests/campaigns/study_kills.py --kills 20

Half of the kills take the runs along, half leave them behind as orphans. A study that ended is followed by a new
one until there were kills enough. Prints one line of JSON with what differs of all figures but times; exit code 1 where
any does.
"""

from __future__ import annotations

import argparse
import contextlib
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


def differences(one: pd.DataFrame, other: pd.DataFrame) -> list[str]:
    """What differs, by column."""
    for what, here, there in (("cells", one["cell"], other["cell"]), ("columns", one.columns, other.columns)):
        if list(here) != list(there):
            return [f"{what}: {sorted(set(here) ^ set(there)) or 'in another order'}"]
    return [f"{c}: {one[c].tolist()} and {other[c].tolist()}" for c in one if not one[c].equals(other[c])]


def kill(child: subprocess.Popen[bytes], along: bool) -> bool:
    """Kills a study, its runs along with it or left as orphans; returns ``along``."""
    below = descendants(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    for pid in below if along else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return along


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
        kills = orphaned = studies = 0
        different: list[str] = []
        while kills < given.kills:
            out = folder / f"killed{studies}"
            while (child := start(file, out)) and kills < given.kills:
                try:
                    child.wait(rng.uniform(0.05, 0.5) * seconds)
                    break
                except subprocess.TimeoutExpired:
                    orphaned += not kill(child, along=rng.random() < 0.5)
                    kills += 1
            code = child.wait()
            assert code == 0, out.with_suffix(".log").read_text()
            different += differences(table(folder / "whole"), table(out))
            studies += 1
    result = {"kills": kills, "left orphans": orphaned, "studies": studies, "different": different}
    print(json.dumps(result | {"seconds undisturbed": round(seconds, 1)}))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
