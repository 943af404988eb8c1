"""Several hosts whose chips train together: what one host makes, written once, and stopped together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, launch_script, needs_xla

from dlrm_xla import devices
from dlrm_xla.errors import UserError
from dlrm_xla.ranks import Ranks
from dlrm_xla.tensor_file import opened

several_ranks = launch_script("several_ranks")
HOST = str(ROOT / "tests" / "spmd_host.py")
SETTINGS = {
    "device": "xla",
    "synthetic_tables": [30, 2000, 500, 3000],
    "synthetic_bags": [1, 1, 3, 1],
    "synthetic_rows": 3200,
    "tables": {"C2": "hash_rows:rows=300", "C3": "cce:rows=16"},
    "placement": {"C1": "dense"},
    "bottom": [8],
    "top": [8],
    "batch_size": 64,
    "row_lr": 0.1,
    "epochs": 1,
    "evals_per_epoch": 2,
    "log_every": 1,
    "keep_checkpoints": 100,
    "rank_patience": 20.0,
}


def start(folder, name, *flags, port=None, **changes):
    """The launcher, as a host of several where its number is given, and alone with all chips otherwise."""
    if "--resume" not in flags:
        settings = folder / f"{name}.yaml"
        settings.write_text(yaml.safe_dump(SETTINGS | changes))
        flags = ("--config", settings, *flags)
    environment = os.environ | {"CPU_NUM_DEVICES": "4", "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"}
    what = [ROOT / "launch" / "run.py"]
    if port is not None:
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        what = [HOST, name[-1]]
    command = [sys.executable, *what, *flags]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT)


def printed(folder, name):
    return (folder / f"{name}.log").read_text()


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def two_hosts(folder, *flags, second=None, **changes):
    port = free_port()
    return [start(folder, f"host{k}", *flags, port=port, **(changes | (second or {} if k else {}))) for k in (0, 1)]


def train_losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train_loss"] for row in rows if "train_loss" in row]


def assert_same(one, other):
    with opened(one / "checkpoints/last.safetensors") as left, opened(other / "checkpoints/last.safetensors") as right:
        assert left.names == right.names
        for name in left.names:
            assert torch.equal(left.tensor(name), right.tensor(name)), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert start(folder, "alone", "--out", folder / "run").wait(300) == 0, printed(folder, "alone")
    return folder / "run"


@needs_xla
@pytest.mark.slow
def test_two_hosts_train_as_one_does_and_write_one_folder(alone, tmp_path):
    codes = [host.wait(300) for host in two_hosts(tmp_path, "--out", tmp_path / "run")]
    assert codes == [0, 0], printed(tmp_path, "host0") + printed(tmp_path, "host1")
    assert train_losses(tmp_path / "run") == train_losses(alone)
    assert_same(tmp_path / "run", alone)
    left, right = (json.loads((run / "report.json").read_text()) for run in (alone, tmp_path / "run"))
    assert (left["ranks"], right["ranks"]) == (1, 2)
    for figure in ("samples", "steps", "auc", "log_loss", "embedding_bytes", "compiles"):
        assert left[figure] == right[figure], figure
    assert "4 chips of 2 hosts by SPMD" in printed(tmp_path, "host0")
    assert "run folder" in printed(tmp_path, "host0")
    assert "run folder" not in printed(tmp_path, "host1")


@needs_xla
@pytest.mark.slow
def test_hosts_stop_together_and_one_goes_on(alone, tmp_path):
    """The second is asked to stop, as where a spot machine is taken away."""
    hosts = two_hosts(tmp_path, "--out", tmp_path / "run")
    while not (tmp_path / "run/metrics.jsonl").exists() or len(train_losses(tmp_path / "run")) < 3:
        assert all(host.poll() is None for host in hosts), printed(tmp_path, "host0") + printed(tmp_path, "host1")
        time.sleep(0.05)
    hosts[1].send_signal(signal.SIGTERM)
    codes = [host.wait(120) for host in hosts]
    assert codes == [130, 130], printed(tmp_path, "host0") + printed(tmp_path, "host1")
    assert len(train_losses(tmp_path / "run")) < len(train_losses(alone))
    assert start(tmp_path, "on", "--resume", tmp_path / "run").wait(300) == 0, printed(tmp_path, "on")
    assert_same(tmp_path / "run", alone)


@needs_xla
@pytest.mark.slow
def test_a_lost_host_is_named_and_the_other_stops(tmp_path):
    hosts = two_hosts(tmp_path, "--out", tmp_path / "run", rank_patience=8.0, epochs=1000)
    while not (tmp_path / "run/metrics.jsonl").exists() or len(train_losses(tmp_path / "run")) < 3:
        assert all(host.poll() is None for host in hosts), printed(tmp_path, "host0") + printed(tmp_path, "host1")
        time.sleep(0.05)
    hosts[1].kill()
    hosts[1].wait()
    assert hosts[0].wait(60) != 0
    assert "rank 1 was lost" in printed(tmp_path, "host0")


@needs_xla
@pytest.mark.slow
def test_hosts_with_other_settings_are_refused(tmp_path):
    hosts = two_hosts(tmp_path, "--out", tmp_path / "run", second={"row_lr": 0.5})
    # Whoever sees it first tells the other, which may hear of it before it has looked itself.
    assert {host.wait(120) for host in hosts} in ({2}, {1, 2})
    both = printed(tmp_path, "host0") + printed(tmp_path, "host1")
    assert "row_lr: 0.1 on rank 0, 0.5 on rank 1" in both or "row_lr: 0.5 on rank 1, 0.1 on rank 0" in both
    assert not (tmp_path / "run").exists()


class Told(Ranks):
    size = 2

    def __init__(self, *values):
        self.values = values

    def tell(self, name, value):
        return list(self.values)


def test_a_folder_that_a_host_does_not_see_is_refused(tmp_path):
    several_ranks.check_shared(tmp_path, Told((True, "a"), (True, "b")))
    with pytest.raises(UserError, match=r"rank 1 on b does not see the run folder .* Give --out on a file system"):
        several_ranks.check_shared(tmp_path, Told((True, "a"), (False, "b")))


def test_only_training_runs_on_several_hosts(monkeypatch):
    monkeypatch.setattr(devices, "job_of_hosts", lambda name: {"WORLD_SIZE": "4"})
    with pytest.raises(UserError, match="chips of 4 hosts are one device here, and only training runs on several"):
        devices.open_device("xla")
