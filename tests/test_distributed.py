"""Several ranks train what one process trains, and end together, whatever happens to one of them."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, criteo_line, launch_script
from dlrm_xla_data.loader import Loader
from dlrm_xla_data.synthetic import synthesize
from torch.distributed import TCPStore

from dlrm_xla import checkpoint
from dlrm_xla.config import resolve
from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.ranks import ALONE, TorchrunRank, TorchrunRanks
from dlrm_xla.row_rules import RowSettings
from dlrm_xla.sharded_file import write_shards
from dlrm_xla.tensor_file import Section, opened, write

torchrec = pytest.importorskip("torchrec")
from dlrm_xla.torchrec_plan import make_shards, text  # noqa: E402  after the skip

launcher = launch_script("run")
RUN = str(ROOT / "launch" / "run.py")
# Tables for TorchRec's ways to cut, and plugins with tables inside, one of them with weights that are learned.
SETTINGS = {
    "synthetic_tables": [30, 2000, 500, 3000, 1500, 800, 900, 70],
    "synthetic_bags": [1, 1, 3, 1, 2, 1, 1, 1],
    "synthetic_rows": 4800,
    "tables": {
        "C2": "hash_rows:rows=300",
        "C3": "random_projection:dim=4",
        "C4": "tensorly_tt:rank=2",
        "C6": "memcom:rows=100",
        "C7": "int8",
    },
    "sharding": {"C5": "row_wise", "C8": "data_parallel"},
    "bottom": [8],
    "top": [8],
    "batch_size": 64,
    "epochs": 1,
    "log_every": 1,
    "save_every": 20,
    "keep_checkpoints": 100,
    "dense_optimizer": "sgd",
    "dense_lr": 0.1,
    "rank_patience": 30.0,
}

# Two ranks, forked so that they start together whatever else the machine does: the second comes late to one sum, and
# never to the other.
SLOW_RANK = """
import os, signal, socket, time
import torch
from dlrm_xla.ranks import TorchrunRanks

with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
rank = 0 if os.fork() else 1
place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
ranks = TorchrunRanks(3.0, place)
time.sleep(6 * rank)
print("together", int(ranks.add(torch.ones(1))), flush=True)
if rank:
    os.kill(os.getpid(), signal.SIGSTOP)
ranks.add(torch.ones(1))
"""


def torchrun(ranks, *flags, elastic=(), settings=None, timeout=240):
    """The launcher under torchrun, as a user starts it; torchrun's exit code and all that was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *elastic]
    command += [RUN, *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def settings_file(folder, **changes):
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | changes))
    return ["--config", path]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train_loss"] for row in rows if "train_loss" in row]


def assert_same_checkpoint(one, other, tolerance):
    # Of runs on other numbers of ranks 1e-4: losses agree to 1e-5, but Adagrad divides by roots of sums that are small.
    with opened(one) as left, opened(other) as right:
        assert left.names == right.names
        for name in left.names - {"run.random.host"}:
            torch.testing.assert_close(
                left.tensor(name), right.tensor(name), atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert launcher.main([*map(str, settings_file(folder)), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(2, *settings_file(folder), "--out", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "run" / "printed").write_text(done.stdout)
    return folder / "run"


def test_a_rank_that_torchrun_ends_says_first_which_was_lost(capsys):
    class Watch:
        said = "rank 1 was lost"

        def verdict(self):
            os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does at once
            return self.said

        def stop(self):
            pass

    ranks = object.__new__(TorchrunRanks)
    ranks.rank, ranks._watch, ranks.store = 0, Watch(), SimpleNamespace(set=lambda name, text: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert ranks.failed(RuntimeError("Connection closed by peer")) == "error: rank 0: rank 1 was lost"
        assert capsys.readouterr().err == ""
        Watch.said = ""
        assert ranks.failed(RuntimeError("a bug")) == "error: rank 0: RuntimeError: a bug"
        assert "RuntimeError: a bug" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


def test_two_ranks_train_what_one_process_trains(alone, two):
    assert len(losses(alone)) >= 50
    np.testing.assert_allclose(losses(two), losses(alone), atol=1e-5, rtol=0)
    left, right = (json.loads((folder / "report.json").read_text()) for folder in (alone, two))
    assert right["ranks"] == 2
    for figure in ("samples", "steps", "best_step", "embedding_bytes", "num_parameters", "compiles"):
        assert left[figure] == right[figure], figure
    for figure in ("auc", "log_loss", "validation_auc"):
        assert left[figure] == pytest.approx(right[figure], abs=1e-4), figure
    assert_same_checkpoint(alone / "checkpoints/last.safetensors", two / "checkpoints/last.safetensors", 1e-4)


def test_one_rank_prints_and_says_where_tables_lie(two):
    printed = (two / "printed").read_text()
    assert printed.count("run folder: ") == 1
    lines = {line.split()[0]: line for line in printed.splitlines() if line.startswith("C")}
    assert "data_parallel" in lines["C8"]
    assert "row_wise" in lines["C5"]
    assert "0: " in lines["C5"]
    assert "1: " in lines["C5"]


def test_what_two_ranks_saved_one_process_goes_on_with(two, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two, folder, symlinks=True)
    for path in (folder / "checkpoints").iterdir():
        if path.name == "step-0000000040.safetensors":
            (path / "checkpoint.json").unlink()  # damaged, and the run comes to its name again
        elif path.name != "step-0000000020.safetensors":
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    assert launcher.main(["--resume", str(folder)]) == 0
    assert (folder / "checkpoints" / "step-0000000040.safetensors").is_file()
    assert_same_checkpoint(folder / "checkpoints/last.safetensors", two / "checkpoints/last.safetensors", 1e-5)
    np.testing.assert_allclose(losses(folder), losses(two), atol=1e-5, rtol=0)


def test_a_damaged_part_of_a_checkpoint_is_found(two, tmp_path):
    path = tmp_path / "c.safetensors"
    shutil.copytree(two / "checkpoints" / "step-0000000020.safetensors", path)
    assert checkpoint.read_about(path)["step"] == 20
    part = sorted(path.glob("*.safetensors"))[-1]
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=part.name):
        checkpoint.read_about(path)
    part.unlink()
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_about(path)


def test_a_checkpoint_of_the_other_kind_is_replaced(tmp_path):
    path = tmp_path / "c.safetensors"
    for _ in range(2):
        write_shards(path, {"x": torch.ones(3)}, {}, ALONE)
        assert path.is_dir()
        write(path, [Section([("x", [3])], torch.float32, [torch.zeros(3)])], {})
        assert path.is_file()
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("calls_before", [0, 1, 2])
def test_a_disk_that_fills_as_ranks_finish_leaves_nothing_behind(calls_before, tmp_path, monkeypatch):
    path, sync = tmp_path / "c.safetensors", os.fsync
    write_shards(path, {"x": torch.ones(3)}, {}, ALONE)
    left = iter([sync] * calls_before)

    def full(handle):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    # DCP's own sync, that of this rank's files, that of checkpoint.json.
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_shards(path, {"x": torch.zeros(3)}, {}, ALONE)
    assert os.listdir(tmp_path) == [path.name]
    with opened(path) as file:
        assert torch.equal(file.tensor("x"), torch.ones(3))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_row_is_trained_on_once_an_epoch_whatever_the_number_of_ranks(size):
    dataset, _ = synthesize(1000, [50, 20], [1, 2], 0, False)
    dataset.dense[:, 0] = np.arange(len(dataset.dense))
    whole = [b.dense_BI[:, 0] for b in Loader(dataset, 64, seed=3).batches("train", 1)]
    parts = [list(Loader(dataset, 64, seed=3, part=(k, size)).batches("train", 1)) for k in range(size)]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[number].dense_BI[:, 0] for part in parts]), batch)
    real = torch.cat([b.dense_BI[b.labels_B >= 0, 0] for part in parts for b in part])
    start, stop = dataset.splits["train"]
    assert sorted(real.tolist()) == list(range(start, stop))


def test_a_rank_that_does_not_start_is_named():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with pytest.raises(UserError, match=r"ranks 1, 2 of 3 did not start within 1 s"):
        TorchrunRanks(1.0, environment)


@pytest.fixture
def agent(monkeypatch):
    """Starts the store of torchrun's agent for so many ranks; sets and gives the variables of the first of them."""
    stores = []

    def start(size):
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        stores.append(store)
        variables = {"RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return variables

    return start


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_meet_again_whatever_an_earlier_start_left(late, agent):
    """The agents of two hosts do not count the same restarts; either host may be the first that is there again."""
    variables = agent(2)

    def meet(rank, restarts, seconds):
        ranks = object.__new__(TorchrunRanks)
        ours = {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        TorchrunRank.__init__(ranks, 20.0, variables | ours)
        time.sleep(seconds)
        return ranks._meet()

    with ThreadPoolExecutor(2) as threads:
        starts = [
            list(threads.map(meet, (0, 1), (0, count), (0.5 * (late == 0), 0.5 * (late == 1)))) for count in range(3)
        ]
    assert all(first == second for first, second in starts)
    assert len({first for first, _ in starts}) == 3


def test_a_restarted_job_goes_on_in_the_folder_that_it_made_and_in_no_other(agent, tmp_path, capsys):
    flags = [*map(str, settings_file(tmp_path, synthetic_rows=640, tables={}, sharding={}))]
    agent(1)
    assert launcher.main([*flags, "--out", str(tmp_path / "old")]) == 0
    assert launcher.main([*flags, "--out", str(tmp_path / "old"), "--epochs", "2"]) == 0
    assert "resumed from" in capsys.readouterr().out
    before = (tmp_path / "old" / "report.json").read_bytes()
    agent(1)
    for _ in range(2):
        assert launcher.main([*flags, "--out", str(tmp_path / "old"), "--epochs", "3"]) == 2
        assert "already holds files" in capsys.readouterr().err
    assert (tmp_path / "old" / "report.json").read_bytes() == before


def test_restarts_without_the_agents_store_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert launcher.main(["--out", str(tmp_path / "new")]) == 2
    assert "--max-restarts: a restarted job finds its run folder in the store" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--evaluate", "--export"])
def test_work_for_one_process_is_refused_under_torchrun(flag, agent, capsys):
    agent(2)
    assert launcher.main([flag, "c.safetensors"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_a_slow_rank_is_waited_for_and_a_silent_one_is_named(tmp_path):
    script, log = tmp_path / "ranks.py", tmp_path / "log"
    script.write_text(SLOW_RANK)
    with log.open("w") as file:  # no pipe, which the one that is stopped would keep open
        first = subprocess.Popen([sys.executable, script], stdout=file, stderr=file, start_new_session=True)
    try:
        assert first.wait(60) == 1, log.read_text()
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    assert "together 2" in log.read_text()
    assert "rank 0 stops: rank 1 was lost: no sign of it for 3 s" in log.read_text()


def test_a_rank_takes_its_own_gpu_before_it_meets_the_others(monkeypatch):
    several = launch_script("several_ranks")
    taken = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"GPU {taken[-1]}")
    sizes = SimpleNamespace(total_memory=10), SimpleNamespace(total_memory=20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sizes[device.index])
    monkeypatch.setattr(several, "open_ranks", lambda patience, hosts: taken[-1])
    config = resolve({"device": "cuda"}, None)[0]
    assert several.open_job(config) == 0
    assert taken == [0], "one process takes what is current"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert several.open_job(config) == 1
    device = open_device("cuda")
    assert (device.torch_device, device.description[:5], device.memory) == (torch.device("cuda:1"), "GPU 1", 18)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="LOCAL_RANK 2: each rank needs a GPU of its own, and this host shows 2"):
        several.open_job(config)


def test_a_plan_that_fits_nowhere_says_what_it_was_given():
    tables = [Table("small", 100, 16), Table("large", 1_000_000, 64)]
    with pytest.raises(UserError, match=r"2 ranks of 100,000,000 bytes.*large 260,000,000"):
        make_shards(tables, [1, 1], 512, 2, "cpu", 1e8, RowSettings("adagrad"), {})
    shards = make_shards(tables, [1, 1], 512, 2, "cpu", 1e9, RowSettings("adagrad"), {"large": "row_wise"})
    assert list(shards.kinds) == ["data_parallel", "row_wise"]
    assert sum(shards.bytes[1].values()) == 260_000_000
    assert "0: 130,000,000, 1: 130,000,000" in text(shards, 2)
    with pytest.raises(UserError, match="state is by row"):
        make_shards(tables, [1, 1], 512, 2, "cpu", 1e9, RowSettings("adagrad"), {"large": "column_wise"})
    few = [Table("few", 4, 16), Table("many", 6, 16)]
    with pytest.raises(UserError, match="few of 4 rows cannot be cut by rows for 3 ranks"):
        make_shards(few, [1, 1], 9, 3, "cpu", 1e9, RowSettings("adam"), {"few": "row_wise"})
    kinds = make_shards(few, [1, 1], 9, 3, "cpu", 1e9, RowSettings("adam"), {"many": "row_wise"}).kinds
    assert kinds[0] != "row_wise"
    assert kinds[1] == "row_wise"
    with pytest.raises(UserError, match="would move rows that a step does not look up"):
        make_shards(tables, [1, 1], 512, 2, "cpu", 1e9, RowSettings("adam"), {"small": "data_parallel"})
    with pytest.raises(UserError, match="did you mean 'row_wise'"):
        make_shards(tables, [1, 1], 512, 2, "cpu", 1e9, RowSettings("adagrad"), {"large": "row_wse"})
    huge = [Table("small", 100, 16), Table("huge", 80_000_000, 16)]
    with pytest.raises(UserError, match=r"table huge: rank \d would have 5,120,000,000 bytes of it"):
        make_shards(huge, [1, 1], 512, 2, "cpu", 1e11, RowSettings("adagrad"), {"huge": "table_wise"})
    assert make_shards(huge, [1, 1], 512, 2, "cpu", 1e11, RowSettings("sgd"), {"huge": "table_wise"}).kinds
    assert make_shards(huge, [1, 1], 512, 2, "cpu", 1e11, RowSettings("adagrad"), {"huge": "row_wise"}).kinds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch.export.load
def test_one_process_scores_exports_and_compresses_what_two_ranks_saved(tmp_path, capsys):
    """Metrics of scoring are those that the ranks reported; the program gives the scores that --evaluate wrote."""
    changes = {"tables": {}, "epochs": 1, "keep_checkpoints": 2}
    done = torchrun(2, *settings_file(tmp_path, **changes), "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    best = tmp_path / "two" / "checkpoints" / "best.safetensors"
    assert best.is_dir()
    assert launcher.main(["--evaluate", str(best), "--out", str(tmp_path / "p.parquet")]) == 0
    assert f"{report['auc']:.4f}" in capsys.readouterr().out
    scores = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert launcher.main(["--export", str(best), "--out", str(tmp_path / "program"), "--batch-size", "64"]) == 0
    program = torch.export.load(tmp_path / "program" / "model.pt2").module()
    config = resolve({}, tmp_path / "two" / "config.yaml")[0]
    loader = Loader(launcher.open_data(config)[0], 64, config.min_count, config.seed)
    batch = next(iter(loader.batches("test")))
    probability_B = program(batch.dense_BI, batch.ids_BS)
    np.testing.assert_allclose(probability_B.detach().numpy(), scores["probability"][:64], atol=1e-6)
    capsys.readouterr()
    compress = launch_script("compress")
    flags = ["--plugin", "svd:rank=2", "--min-rows", "100", "--out", str(tmp_path / "svd")]
    assert compress.main([str(best), *flags]) == 0, capsys.readouterr()
    told = json.loads((tmp_path / "svd" / "compression.json").read_text())
    assert told["before"]["test"]["auc"] == pytest.approx(report["auc"], abs=1e-6)
    assert 0 < max(t["error"] for t in told["compression"]) < 1


@pytest.mark.slow
def test_four_ranks_and_what_they_go_on_with(alone, two, tmp_path):
    done = torchrun(4, *settings_file(tmp_path), "--out", tmp_path / "four")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(alone), atol=1e-5, rtol=0)
    for name, source, ranks in (("from one to two", alone, 2), ("from two to four", two, 4)):
        folder = tmp_path / name
        shutil.copytree(source, folder, symlinks=True)
        for path in (folder / "checkpoints").iterdir():
            if path.name != "step-0000000020.safetensors":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        done = torchrun(ranks, "--resume", folder)
        assert done.returncode == 0, done.stderr
        assert_same_checkpoint(folder / "checkpoints/last.safetensors", alone / "checkpoints/last.safetensors", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad_element"])
def test_other_optimizers_cut_by_columns(optimizer, tmp_path):
    changes = {"row_optimizer": optimizer, "sharding": {"C5": "column_wise", "C8": "table_wise"}}
    flags = list(map(str, settings_file(tmp_path, **changes)))
    assert launcher.main([*flags, "--out", str(tmp_path / "alone")]) == 0
    done = torchrun(2, *flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "alone"), atol=1e-5, rtol=0)
    if optimizer == "sgd":  # which divides by nothing, so its tables are held to what sums may differ by
        last = "checkpoints/last.safetensors"
        assert_same_checkpoint(tmp_path / "alone" / last, tmp_path / "two" / last, 1e-6)


@pytest.mark.slow
def test_bags_of_varying_length_whose_first_is_looked_up_slot_by_slot(tmp_path):
    changes = {"synthetic_bags": [4, 1, 3, 1, 2, 1, 1, 1], "synthetic_variable": True, "sharding": {}}
    flags = list(map(str, settings_file(tmp_path, **changes, tables={"C1": "int8", "C3": "memcom:rows=100"})))
    assert launcher.main([*flags, "--out", str(tmp_path / "alone")]) == 0
    done = torchrun(2, *flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "alone"), atol=1e-5, rtol=0)


def test_ranks_of_one_host_share_its_memory(monkeypatch):
    several = launch_script("several_ranks")
    plan, ranks = SimpleNamespace(memory=12e9), SimpleNamespace(size=6)
    cpu, cuda = (SimpleNamespace(torch_device=torch.device(kind)) for kind in ("cpu", "cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for device, given, expected in ((cpu, "", 4e9), (cpu, "12GB", 12e9), (cuda, "", 12e9)):
        config = SimpleNamespace(memory=given)
        assert several.memory_of_rank(config, plan, device, ranks) == expected


@pytest.mark.slow
def test_two_hosts_go_on_after_a_process_of_one_was_killed(tmp_path):
    """Only the agent of that host counts a restart."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two"]
    command += ["--local-addr", "localhost", "--max-restarts", "3", RUN]
    flags = settings_file(tmp_path, tables={}, sharding={}, epochs=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"host{k}.log" for k in range(2)]
    agents = []
    for log in logs:
        with log.open("w") as file:
            asked = list(map(str, [*command, *flags, "--out", tmp_path / "run"]))
            agents.append(subprocess.Popen(asked, stdout=file, stderr=file, env=environment))
    try:
        while not (tmp_path / "run" / "checkpoints" / "last.safetensors").exists():
            assert all(agent.poll() is None for agent in agents), [log.read_text() for log in logs]
            time.sleep(0.05)
        children = Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        codes = [agent.wait(300) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    printed = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], printed
    assert printed.count("resumed from") == 1


@pytest.mark.slow
def test_a_few_kills_of_the_campaign(tmp_path):
    script = ROOT / "tests" / "campaigns" / "rank_kills.py"
    command = [sys.executable, str(script), "--times", "4", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert json.loads(done.stdout)["failed"] == [], done.stdout + done.stderr


@pytest.mark.slow
def test_ranks_that_differ_are_refused(tmp_path):
    flags = settings_file(tmp_path)
    done = torchrun(3, *flags, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert "a batch of 64 does not split into 3 equal parts" in done.stderr
    script = tmp_path / "other.sh"
    script.write_text(f'exec {sys.executable} {RUN} "$@" --seed $RANK\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*command, "--no-python", "bash", str(script), *map(str, flags)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    # Whichever rank is first says it, its own value first; torchrun ends the other.
    assert "seed: 0 on rank 0, 1 on rank 1" in done.stderr or "seed: 1 on rank 1, 0 on rank 0" in done.stderr
    script.write_text(f'exec {sys.executable} {RUN} "$@" --data {tmp_path}/$RANK.tsv --min-count 0\n')
    for rank in range(2):
        rng = np.random.default_rng(rank)
        lines = "".join(criteo_line(rng) + "\n" for _ in range(300))
        (tmp_path / f"{rank}.tsv").write_text(lines)
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump({"batch_size": 64}))
    done = subprocess.run(
        [*command, "--no-python", "bash", str(script), "--config", str(plain)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "have other data" in done.stderr
