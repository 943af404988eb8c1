"""Kills runs at random moments, resumes them, and compares the end with that of a run that nobody disturbed.

python tests/campaigns/kills.py --kills 200 --device cpu
python tests/campaigns/kills.py --kills 50 --device xla

Every run is a process of its own that gets SIGKILL at a random moment, again and again until it ends by itself: half of
the moments are counted from the start, half from the first checkpoint that this process has written. The run's
last checkpoint must then equal, in every bit of every tensor, that of the undisturbed run, and so must its metrics.
Prints one line of JSON; exit code 1 where a resume failed or a bit differs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "preset": "small",
    "synthetic_tables": [30, 20000, 500, 40],
    "synthetic_rows": 3000,
    "bottom": [8],
    "top": [8],
    "batch_size": 128,
    "epochs": 3,
    "min_count": 0,
    "min_rows": 100,
    "patience": 0,
    "evals_per_epoch": 2,
    "log_every": 5,
    "save_every": 2,
    "plugin": "quotient_remainder",
    "row_optimizer": "adagrad",
}


def start(arguments: list[str], log: Path) -> int:
    """The launcher in a process of its own; forked, so that imports are not paid for at each kill."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = launcher.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int, seconds: float, since: Callable[[], bool] = lambda: True) -> int | None:
    """The exit code, or None where it had to be killed: so many seconds after ``since`` came true."""
    began = None
    while began is None or time.monotonic() < began + seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if began is None and since():
            began = time.monotonic()
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def saves(folder: Path) -> list[Path]:
    """The checkpoints that a run has."""
    return sorted(folder.glob("checkpoints/step-*"))


def result(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Tensors of the last checkpoint, and the rows of the metrics."""
    return load_file(folder / "checkpoints" / "last.safetensors"), (folder / "metrics.jsonl").read_text().splitlines()


def differences(one: tuple[dict[str, Any], list[str]], other: tuple[dict[str, Any], list[str]]) -> list[str]:
    """Names of what is not the same in every bit."""
    names = sorted({*one[0], *other[0]})
    found = [
        n
        for n in names
        if n not in one[0]
        or n not in other[0]
        or one[0][n].numpy(force=True).tobytes() != other[0][n].numpy(force=True).tobytes()
    ]
    return found + (["metrics.jsonl"] if one[1] != other[1] else [])


def campaign(kills: int, device: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Kills until there were enough, always finishing the run at hand."""
    config = scratch / "settings.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, "device": device}))
    log = scratch / "log.txt"
    calm = scratch / "calm"
    child, began = start(["--config", str(config), "--out", str(calm)], log), time.monotonic()
    moments: list[float] = []

    def first_save() -> bool:
        if saves(calm):
            moments.append(time.monotonic() - began)
        return bool(moments)

    if wait(child, 600, first_save) != 0:
        raise SystemExit(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
    duration, until_saved = time.monotonic() - began, moments[0]
    wanted = result(calm)
    chance = random.Random(seed)
    found: dict[str, Any] = {
        "device": device,
        "kills": 0,
        "runs": 0,
        "before_the_folder": 0,
        "before_a_step": 0,
        "during_a_save": 0,
    }
    failed: list[str] = []
    campaign_began = time.monotonic()
    while found["kills"] < kills:
        folder = scratch / f"run{found['runs']}"
        while True:
            if (folder / "config.yaml").exists():
                arguments = ["--resume", str(folder)]
            else:
                shutil.rmtree(folder, ignore_errors=True)
                arguments = ["--config", str(config), "--out", str(folder)]
            saved = saves(folder)
            child = start(arguments, log)
            if found["kills"] >= kills:
                code = wait(child, 600)
            elif chance.random() < 0.5:
                # A start may take longer than all steps, and a run must come on between two kills.
                seconds = chance.uniform(0, duration - until_saved)
                code = wait(child, seconds, lambda folder=folder, saved=saved: saves(folder) != saved)
            else:
                code = wait(child, chance.uniform(0.01, duration))
            if code is not None:
                break
            found["kills"] += 1
            found["before_the_folder"] += not (folder / "config.yaml").exists()
            found["before_a_step"] += saves(folder) == saved
            found["during_a_save"] += any(folder.glob("checkpoints/*.unfinished"))
        found["runs"] += 1
        if code != 0:
            failed.append(f"{folder.name} ended with {code}")
        elif different := differences(wanted, result(folder)):
            failed.append(f"{folder.name} differs: {', '.join(different[:5])}")
        else:
            shutil.rmtree(folder)
        print(f"\r{found['kills']} kills, {found['runs']} runs, {len(failed)} failed", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {**found, "undisturbed_s": duration, "campaign_s": time.monotonic() - campaign_began, "failed": failed}


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "xla"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the runs; none: a temporary one")
    given = parser.parse_args()
    # Everything that a run imports, but no device is opened and no thread started before the forks.
    if given.device == "xla":
        os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
        importlib.import_module("torch_xla")
    for module in (
        "sklearn.metrics",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
        "torch._dynamo",
        "torch.fx.experimental.symbolic_shapes",
    ):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        found = campaign(given.kills, given.device, given.seed, Path(scratch))
        if found["failed"]:
            sys.stderr.write((Path(scratch) / "log.txt").read_text()[-4000:])
    print(json.dumps(found))
    return 1 if found["failed"] else 0


sys.path.insert(0, str(ROOT / "launch"))
spec = importlib.util.spec_from_file_location("run", ROOT / "launch" / "run.py")
assert spec is not None
assert spec.loader is not None
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)

if __name__ == "__main__":
    sys.exit(main())
