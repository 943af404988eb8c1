"""Kills or halts one rank of a job at random moments, and looks at how the job ends.

python tests/campaigns/rank_kills.py --times 20

Jobs run under torchrun's own agent, in turn with and without restarts. With them a job must end by itself with the last
checkpoint, in every bit, that an undisturbed one has; without them each rank that is left must stop within a minute,
with a message that names the lost one. A quarter of the ranks is halted (SIGSTOP) rather than killed: it then hangs,
and nobody hears of it. Prints one line of JSON; exit code 1 where a job hung, differed or named nobody.

Ranks are forked from a process that has imported everything, for on two cores the imports take longer than the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RANKS = 2
FLAGS = {
    "synthetic_tables": [30, 4000, 2000, 800],
    "synthetic_rows": 12000,
    "tables": {"C3": "hash_rows:rows=300"},
    "sharding": {"C2": "row_wise"},
    "bottom": [16],
    "top": [16],
    "batch_size": 64,
    "epochs": 1,
    "log_every": 5,
    "save_every": 10,
    "keep_checkpoints": 3,
    "rank_patience": 15.0,
}


def worker(arguments: list[str]) -> None:
    """One rank: the launcher, as torchrun would start it."""
    sys.path.insert(0, str(ROOT / "launch"))
    import run

    code = run.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


def start(arguments: list[str], restarts: int, log: Path) -> int:
    """Starts a job in a process of its own; its number. That process is the agent, ranks are its children."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    code = 0
    try:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=RANKS,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="fork",
            max_restarts=restarts,
            monitor_interval=0.1,
        )
        elastic_launch(config, worker)(arguments)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}"[:2000], flush=True)
        code = 1
    os._exit(code)


def rank_processes(agent: int) -> dict[int, int]:
    """The living ranks of an agent: process numbers by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            # A forked process keeps the environment of its parent, so the rank is in the order of their numbers.
            if parent == agent and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[int(path.name)] = True
        except (OSError, IndexError):
            continue
    return dict(enumerate(sorted(found)))


def wait_for(pid: int, seconds: float) -> int | None:
    """Exit code of a process; None where it is still there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


def end_all(agent: int, ranks: dict[int, int]) -> None:
    """Ends what a job that hung has left: the processes that this campaign started."""
    for pid in (*ranks.values(), agent):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_for(agent, 10)


def bits(run: Path) -> dict[str, bytes]:
    """Every tensor of a run's last checkpoint."""
    from dlrm_xla.tensor_file import opened

    with opened(run / "checkpoints" / "last.safetensors") as file:
        return {name: file.tensor(name).numpy().tobytes() for name in sorted(file.names)}


def one(number: int, chance: random.Random, folder: Path, settings: Path, seconds: float, expected: Any) -> str:
    """One job with one rank lost; how it ended, "failed: ..." where it should not have."""
    run, log = folder / f"run{number}", folder / f"run{number}.log"
    restarts = 2 * (number % 2)
    halted = number % 4 == 1 or number % 8 == 2
    agent = start(["--config", str(settings), "--out", str(run)], restarts, log)
    moment = chance.uniform(0.05, 0.95) * seconds
    code = wait_for(agent, moment)
    ranks = rank_processes(agent) if code is None else {}
    if not ranks:
        return "ended before" if code == 0 else "failed: ended by itself"
    lost = chance.choice(sorted(ranks))
    os.kill(ranks[lost], signal.SIGSTOP if halted else signal.SIGKILL)
    begin = time.monotonic()
    code = wait_for(agent, 60 + (6 * seconds if restarts else 0))
    if code is None:
        end_all(agent, rank_processes(agent) | ranks)
        return f"failed: hung after rank {lost} was {'halted' if halted else 'killed'}; see {log}"
    if restarts:
        if code or bits(run) != expected:
            return f"failed: exit code {code}, or other bits; see {log}"
        return "halted, restarted, same bits" if halted else "killed, restarted, same bits"
    said = log.read_text(errors="replace")
    told = re.findall(rf"rank (\d+)[^\n]*: rank {lost} was lost", said)
    by_all = {int(rank) for rank in told} == set(range(RANKS)) - {lost}
    # torchrun's agent may hear of a rank's death first: it ends the others at once, and says itself which it was.
    by_torchrun = re.search(rf"rank +: {lost} \(local_rank", said) is not None
    if not by_all and not by_torchrun:
        if not (run / "config.yaml").exists():
            return "killed before it began, stopped"
        return f"failed: rank {lost} lost, named by {sorted(told)}; see {log}"
    assert time.monotonic() - begin < 60
    return f"{'halted' if halted else 'killed'}, named{'' if by_all else ' by torchrun'}, stopped"


def campaign(times: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs the jobs one after the other."""
    import yaml

    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump(FLAGS))
    begin = time.monotonic()
    agent = start(["--config", str(settings), "--out", str(folder / "calm")], 0, folder / "calm.log")
    code = wait_for(agent, 600)
    assert code == 0, (folder / "calm.log").read_text()
    seconds, expected = time.monotonic() - begin, bits(folder / "calm")
    chance = random.Random(seed)
    ends = [one(number, chance, folder, settings, seconds, expected) for number in range(times)]
    return {
        "times": times,
        "undisturbed_seconds": round(seconds, 1),
        "ends": dict(Counter(end for end in ends if not end.startswith("failed"))),
        "failed": [end for end in ends if end.startswith("failed")],
    }


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where runs and logs stay; none: nowhere")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sklearn.metrics
        import torchrec.distributed.planner  # noqa: F401
        from matplotlib import pyplot  # noqa: F401

        del sklearn
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = campaign(given.times, given.seed, folder)
    print(json.dumps(found))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
