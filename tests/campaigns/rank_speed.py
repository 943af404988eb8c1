"""Speed of two gloo ranks with one thread each against one process with two threads, at the same global batch.

python tests/campaigns/rank_speed.py --preset small --cap 100000 --repeat 3

Runs take turns, and each reports its median step after the first ones. Prints one line of JSON: milliseconds a step of
every run, and how many times as fast the ranks are by the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from dlrm_xla.config import Config
from dlrm_xla.presets import PRESETS

ROOT = Path(__file__).parent.parent.parent
RUN = str(ROOT / "launch" / "run.py")


def step_ms(ranks: int, settings: Path, out: Path) -> float:
    """The median step of one run, ms; two threads in all."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks)}
    command = [*launch, RUN, "--config", str(settings), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found: float = json.loads((out / "report.json").read_text())["step_ms_median"]
    return found


def main() -> int:
    """Runs both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--cap", type=int, default=100_000, help="rows of a table at most")
    parser.add_argument("--batch", type=int, help="samples of a step; as the preset has it")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    values = PRESETS[given.preset].settings
    batch = given.batch or values.get("batch_size", Config().batch_size)
    settings = {
        "preset": given.preset,
        "batch_size": batch,
        "synthetic_rows": batch * given.steps * 7 // 6,
        "epochs": 1,
        "evals_per_epoch": 1,
    }
    if "synthetic_tables" in values:
        settings["synthetic_tables"] = [min(given.cap, rows) for rows in values["synthetic_tables"]]
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "settings.yaml"
        path.write_text(yaml.safe_dump(settings))
        for number in range(given.repeat):
            for ranks, times in found.items():
                times.append(step_ms(ranks, path, Path(scratch) / f"{ranks}-{number}"))
    ratio = statistics.median(found[1]) / statistics.median(found[2])
    print(json.dumps({**vars(given), "batch_size": batch, "step_ms": found, "times_as_fast": round(ratio, 3)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
