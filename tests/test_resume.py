"""Runs that were interrupted go on as if they had not been, and damaged checkpoints never load."""

import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
import yaml
from conftest import ROOT, SLOW_BUT_ON_CPU, launch_script, needs_xla
from safetensors.torch import load_file

from dlrm_xla import checkpoint, tensor_file
from dlrm_xla.batches import PackedBatch
from dlrm_xla.checkpoint_folder import CheckpointFolder
from dlrm_xla.config import resolve
from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.model import DLRM
from dlrm_xla.ranks import Ranks
from dlrm_xla.registry import compose, parse
from dlrm_xla.rows import RowTable
from dlrm_xla.steps import Steps

launcher = launch_script("run")
SETTINGS = {
    "synthetic_tables": [30, 2000, 500],
    "synthetic_rows": 1400,
    "bottom": [8],
    "top": [8],
    "batch_size": 128,
    "epochs": 2,
    "min_count": 0,
    "min_rows": 100,
    "log_every": 4,
    "save_every": 1,
    "keep_checkpoints": 100,
    # A run that goes on goes on in its schedule.
    "warmup_steps": 4,
    "decay_start": 8,
    "decay_steps": 30,
}


def _campaign(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "campaigns" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return ["--config", str(path)]


def _interrupted(run, to, step):
    """A folder as a kill after a step's save leaves it, with what later steps wrote still in its metrics."""
    shutil.copytree(run, to)
    (to / "report.json").unlink()
    for path in (to / "checkpoints").glob("*"):
        if path.name > f"step-{step:010d}.safetensors" or not path.name.startswith("step"):
            path.unlink()
    (to / "checkpoints" / "last.unfinished").write_bytes(b"half of a")
    return to


def _bits(path):
    return {name: tensor.numpy(force=True).tobytes() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("device", SLOW_BUT_ON_CPU)
@pytest.mark.parametrize("plugin", ["exact", "tensorly_tt:rank=2", "cce:rows=20"])  # the last rearranges its tables
def test_a_run_that_goes_on_ends_in_the_same_bits(plugin, device, settings, tmp_path):
    if device == "cuda" and plugin != "exact":
        pytest.skip("on CUDA torch adds gradients of cores and codebooks up in any order (docs/checkpoints.md)")
    calm = tmp_path / "calm"
    plugin = ["--plugin", plugin, "--device", device]
    if device == "cuda":  # where steps at a rate of their own are in no graph
        plugin += ["--warmup-steps", "0", "--decay-steps", "0"]
    assert launcher.main([*settings, *plugin, "--out", str(calm)]) == 0
    steps = len(list((calm / "checkpoints").glob("step-*")))
    assert steps == 20
    # within an epoch, and beside validations and log lines
    folder = _interrupted(calm, tmp_path / "interrupted", 13)
    assert launcher.main(["--resume", str(folder)]) == 0
    for file in ("checkpoints/last.safetensors", "checkpoints/best.safetensors"):
        assert _bits(folder / file) == _bits(calm / file)
    assert (folder / "metrics.jsonl").read_text() == (calm / "metrics.jsonl").read_text()
    reports = [json.loads((path / "report.json").read_text()) for path in (calm, folder)]
    for figure in ("auc", "log_loss", "steps", "samples", "best_step"):
        assert reports[0][figure] == reports[1][figure]
    assert reports[1]["one_graph_rule_broken"] == []
    shifts = [t for n, t in load_file(calm / "checkpoints" / "last.safetensors").items() if n.endswith("shift")]
    assert len(shifts) == (2 if "cce" in plugin[1] else 0)
    assert all(shifts), "clusters were found anew"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_at_hand_and_the_run_goes_on(number, settings, tmp_path, monkeypatch):
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    flags = [*settings, "--save-every", "0"]
    assert launcher.main([*flags, "--out", str(calm)]) == 0
    real, count = Steps.train, 0

    def train(self, packed, step):
        nonlocal count
        count += 1
        if count == 7:
            os.kill(os.getpid(), number)
        real(self, packed, step)

    monkeypatch.setattr(Steps, "train", train)
    assert launcher.main([*flags, "--out", str(stopped)]) == 130
    assert checkpoint.read_about(stopped / "checkpoints" / "last.safetensors")["step"] == 7
    assert json.loads((stopped / "report.json").read_text())["interrupted"] is True
    assert launcher.main(["--resume", str(stopped)]) == 0
    assert _bits(stopped / "checkpoints/last.safetensors") == _bits(calm / "checkpoints/last.safetensors")
    assert (stopped / "metrics.jsonl").read_text() == (calm / "metrics.jsonl").read_text()


def test_a_disk_that_fills_stops_the_run_and_what_was_saved_goes_on(settings, tmp_path, monkeypatch, capsys):
    calm, full = tmp_path / "calm", tmp_path / "full"
    assert launcher.main([*settings, "--out", str(calm)]) == 0
    limits, real = resource.getrlimit(resource.RLIMIT_FSIZE), Steps.train

    def train(self, packed, step):
        if step == 6:
            size = (full / "checkpoints" / "last.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        real(self, packed, step)

    monkeypatch.setattr(Steps, "train", train)
    try:
        assert launcher.main([*settings, "--out", str(full)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    printed = capsys.readouterr().err
    assert "cannot write the checkpoint" in printed
    assert "Free space there" in printed
    assert checkpoint.read_about(full / "checkpoints" / "last.safetensors")["step"] == 6
    assert launcher.main(["--resume", str(full)]) == 0
    assert _bits(full / "checkpoints/last.safetensors") == _bits(calm / "checkpoints/last.safetensors")


def test_a_setting_that_is_newer_than_the_checkpoint_counts_as_its_default(settings, tmp_path, capsys):
    folder = tmp_path / "run"
    assert launcher.main([*settings, "--epochs", "1", "--out", str(folder)]) == 0
    path, found = CheckpointFolder(folder / "checkpoints", 1).newest(print)
    del found["config"]["cross_rank"], found["config"]["row_weight_decay"]
    capsys.readouterr()
    now, _ = resolve({}, folder / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFolder, "newest", lambda self, say: (path, found))
        assert launcher.find_start(now, folder)[0] == path
        assert capsys.readouterr().err == ""
        with pytest.raises(UserError, match="cross_rank: 512 -> 8"):
            launcher.find_start(dataclasses.replace(now, cross_rank=8), folder)


class _Pair(Ranks):
    """One of two ranks that are threads of this process."""

    size = 2

    def __init__(self, rank, barrier):
        self.rank = rank
        self.wait = barrier.wait


def test_every_rank_finds_the_same_best_checkpoint(tmp_path, monkeypatch):
    barrier, found = threading.Barrier(2, timeout=20), {}
    rename = os.replace

    def slow(*names):
        time.sleep(0.2)
        rename(*names)

    monkeypatch.setattr(os, "replace", slow)

    def train(rank):
        folder = CheckpointFolder(tmp_path, 1, _Pair(rank, barrier))
        for step in (1, 2):
            folder.add(step, lambda path: path.mkdir(exist_ok=True), best=True)
        found[rank] = folder.named("best").resolve().name

    threads = [threading.Thread(target=train, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == dict.fromkeys((0, 1), "step-0000000002.safetensors")


def test_a_checkpoint_written_after_a_damaged_later_one_is_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, 1)
    for step in (300, 250, 260):
        folder.add(step, lambda path: path.mkdir(), best=step == 300)
    assert folder.named("last").resolve().name == "step-0000000260.safetensors"
    assert [p.name for p in folder.by_step()] == ["step-0000000300.safetensors", "step-0000000260.safetensors"]


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_run_whose_best_checkpoint_is_lost_says_so_and_finds_another(damage, settings, tmp_path, capsys):
    calm = tmp_path / "calm"
    assert launcher.main([*settings, "--evals-per-epoch", "2", "--out", str(calm)]) == 0
    folder = _interrupted(calm, tmp_path / "lost", 12)
    best = folder / "checkpoints" / "best.safetensors"
    if damage == "flipped":
        best.write_bytes((folder / "checkpoints" / "step-0000000012.safetensors").read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert launcher.main(["--resume", str(folder)]) == 0
    told = capsys.readouterr().err
    assert "best.safetensors" in told
    assert "The best checkpoint is now the next one with a validation" in told
    assert _bits(folder / "checkpoints/last.safetensors") == _bits(calm / "checkpoints/last.safetensors")
    assert json.loads((folder / "report.json").read_text())["best_step"] in (15, 20)


@pytest.mark.slow
def test_a_few_kills_of_the_campaign(tmp_path):
    campaign = ROOT / "tests" / "campaigns" / "kills.py"
    command = [sys.executable, str(campaign), "--kills", "8", "--scratch", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["kills"] >= 8
    assert found["failed"] == []


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(settings, tmp_path, capsys):
    calm = tmp_path / "calm"
    assert launcher.main([*settings, "--out", str(calm)]) == 0
    folder = _interrupted(calm, tmp_path / "damaged", 9)
    newest = folder / "checkpoints" / "step-0000000009.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    capsys.readouterr()
    assert launcher.main(["--resume", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "step-0000000009.safetensors is damaged" in printed.err
    assert "step 8" in printed.out
    assert _bits(folder / "checkpoints/last.safetensors") == _bits(calm / "checkpoints/last.safetensors")
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"\x80\x04")
    assert launcher.main(["--resume", str(folder)]) == 2
    assert "no checkpoint of" in capsys.readouterr().err


def test_a_finished_run_keeps_its_report(settings, tmp_path, capsys):
    run = tmp_path / "run"
    assert launcher.main([*settings, "--epochs", "1", "--out", str(run)]) == 0
    before = (run / "report.json").read_bytes()
    assert launcher.main(["--resume", str(run)]) == 0
    steps = json.loads(before)["steps"]
    assert f"is finished, at step {steps}," in capsys.readouterr().out
    assert (run / "report.json").read_bytes() == before
    (run / "report.json").unlink()  # as after a kill while the last rows were scored
    assert launcher.main(["--resume", str(run)]) == 0
    after = json.loads((run / "report.json").read_text())
    assert after["auc"] == json.loads(before)["auc"]
    # Its steps were an earlier process's, so it has no speed; a table of results has an empty place there.
    assert after["train_samples_per_second"] is None
    assert launch_script("compare").main([str(run)]) == 0


def test_a_memory_that_sizes_the_plugin_otherwise_is_refused_and_the_run_stays(settings, tmp_path, capsys):
    flags = [*settings, "--epochs", "1", "--plugin", "hash_rows", "--memory", "30kB"]
    run = tmp_path / "run"
    assert launcher.main([*flags, "--out", str(run)]) == 0
    assert launcher.main(["--resume", str(run), "--epochs", "2", "--memory", "50kB"]) == 2
    assert "--memory sizes plugins, and was 30kB" in capsys.readouterr().err
    assert launcher.main(["--resume", str(run), "--epochs", "2"]) == 0


def test_what_changed_since_the_checkpoint_is_said_or_refused(settings, tmp_path, capsys):
    folder = tmp_path / "run"
    assert launcher.main([*settings, "--epochs", "1", "--out", str(folder)]) == 0
    assert launcher.main(["--resume", str(folder), "--dim", "8", "--seed", "4"]) == 2
    assert "dim: 16 -> 8; seed: 0 -> 4" in capsys.readouterr().err
    assert launcher.main(["--resume", str(folder), "--epochs", "2", "--row-lr", "0.01"]) == 0
    printed = capsys.readouterr().err
    assert "row_lr: 0.02 -> 0.01 (changed since the checkpoint" in printed
    assert "epochs: 1 -> 2" in printed
    assert json.loads((folder / "report.json").read_text())["epochs"] == 2
    assert launcher.main(["--resume", str(folder), "--out", "elsewhere"]) == 2
    assert "no --out" in capsys.readouterr().err
    assert launcher.main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_a_thousandth_of_the_corruption_campaign(tmp_path):
    found = _campaign("corruption").campaign(160, 1, tmp_path)
    assert found["failed"] == []
    assert sum(found["refused"].values()) == 160


TABLES = [Table("a", 30, 8), Table("b", 2000, 8), Table("c", 500, 8)]


def _steps(device, placement, spec="exact", innermost=RowTable, **settings):
    config, _ = resolve({"preset": "small", "batch_size": 8, "placement": placement, **settings}, None)
    model = DLRM(3, TABLES, [compose(parse(spec), innermost)] * 3, bottom=[8], top=[8])
    return Steps(model, [1, 3, 2], open_device(device) if isinstance(device, str) else device, config)


def _batch(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat(
        [torch.randint(0, t.num_rows, (8, n), generator=generator) for t, n in zip(TABLES, (1, 3, 2), strict=True)], 1
    )
    labels = torch.randint(0, 2, (8,), generator=generator).float()
    return PackedBatch(torch.randn(8, 3, generator=generator), ids.int(), labels)


def _assert_same_numbers(one, other):
    saved, again = load_file(one), load_file(other)
    for name, tensor in saved.items():
        assert torch.equal(tensor.flatten(), again[name].flatten()), name


def _assert_near(one, other):
    for (name, a), (_, b) in zip(sorted(one.rows.tables()), sorted(other.rows.tables()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)


@needs_xla
@pytest.mark.parametrize(("here", "there"), [("cpu", "xla"), ("xla", "cpu")])
def test_training_goes_on_on_another_device_with_another_placement(here, there, tmp_path):
    one = _steps(here, {"a": "dense", "b": "sparse"}, row_optimizer="adagrad")
    two = _steps(there, {"a": "matmul", "b": "dense"}, row_optimizer="adagrad")
    for k in range(3):
        one.train(_batch(k), k)
    one.save(tmp_path / "c.safetensors", {"step": 3})
    two.load(tmp_path / "c.safetensors")
    two.save(tmp_path / "d.safetensors", {"step": 3})
    _assert_same_numbers(tmp_path / "c.safetensors", tmp_path / "d.safetensors")
    for k in range(3, 6):
        one.train(_batch(k), k)
        two.train(_batch(k), k)
    assert one.mean_loss() == pytest.approx(two.mean_loss(), rel=1e-5)
    _assert_near(one, two)


@needs_xla
@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
@pytest.mark.parametrize("lanes", [12, 20])
def test_a_checkpoint_does_not_tell_how_rows_lay_in_lines(lanes, optimizer, tmp_path):
    """Rows of 8: one to a line of 12, two to one of 20, and so with columns left in each."""
    xla = open_device("xla")
    packed = dataclasses.replace(xla, rows=dataclasses.replace(xla.rows, lanes=lanes))
    there, here = _steps(packed, {}, row_optimizer=optimizer), _steps("cpu", {}, row_optimizer=optimizer)
    assert {stack.rows.shape[1] for stack in there.rows.stacks} == {lanes}
    for k in range(2):
        there.train(_batch(k), k)
    there.save(tmp_path / "c.safetensors", {"step": 2})
    here.load(tmp_path / "c.safetensors")
    here.save(tmp_path / "d.safetensors", {"step": 2})
    there.load(tmp_path / "d.safetensors")
    _assert_same_numbers(tmp_path / "c.safetensors", tmp_path / "d.safetensors")
    for k in range(2, 4):
        here.train(_batch(k), k)
        there.train(_batch(k), k)
    _assert_near(here, there)


@needs_xla
@pytest.mark.slow
def test_rows_in_bf16_are_the_same_in_lines_with_columns_left():
    """To the bit: an update is rounded by row and column, not by where they lie."""
    xla, tables = open_device("xla"), []
    for lanes in (0, 12, 20):
        device = dataclasses.replace(xla, rows=dataclasses.replace(xla.rows, lanes=lanes))
        torch.manual_seed(0)
        steps = _steps(device, {}, innermost=partial(RowTable, dtype=torch.bfloat16), row_optimizer="adagrad")
        assert {stack.rows.dtype for stack in steps.rows.stacks} == {torch.bfloat16}
        before = {name: rows.clone() for name, rows in steps.rows.tables()}
        for k in range(2):
            steps.train(_batch(k), k)
        tables.append(dict(steps.rows.tables()))
        assert any(not torch.equal(before[name], rows) for name, rows in tables[-1].items())
    for other in tables[1:]:
        for name, rows in tables[0].items():
            assert torch.equal(rows, other[name]), name


@needs_xla
@pytest.mark.parametrize("dense", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("rows", ["sgd", "adagrad", "adagrad_element", "adam"])
def test_every_pair_of_optimizers_trains_on_xla_as_on_cpu(rows, dense, tmp_path):
    """At default rates, of which some equal other numbers of a step."""
    cpu, xla = (_steps(name, {}, row_optimizer=rows, dense_optimizer=dense) for name in ("cpu", "xla"))
    cpu.save(tmp_path / "start.safetensors", {"step": 0})
    xla.load(tmp_path / "start.safetensors")
    for k in range(3):
        for steps in (cpu, xla):
            steps.train(_batch(k), k)
    assert xla.mean_loss() == pytest.approx(cpu.mean_loss(), rel=1e-5)
    for (name, a), (_, b) in zip(sorted(cpu.rows.tables()), sorted(xla.rows.tables()), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4, msg=name)
    for (name, a), b in zip(cpu.model.named_parameters(), xla.model.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach().cpu(), atol=2e-5, rtol=1e-3, msg=name)


@needs_xla
def test_arrays_larger_than_a_part_are_read_whole_from_xla(monkeypatch):
    monkeypatch.setattr("dlrm_xla.device._PART_BYTES", 999)
    device = open_device("xla")
    array = torch.arange(700.0).view(100, 7)
    assert torch.equal(torch.cat(list(device.host_parts(array.to(device.torch_device)))), array)


def test_a_file_size_limit_stops_a_save_and_the_checkpoint_before_loads(tmp_path):
    steps = _steps("cpu", {})
    path = tmp_path / "c.safetensors"
    steps.save(path, {"step": 0})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write the checkpoint .*too large"):
            steps.save(path, {"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert checkpoint.read_about(path)["step"] == 0
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_what_the_library_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.int64), "c": torch.ones(2).bfloat16()}
    sections = [tensor_file.Section([(n, t.shape)], t.dtype, t.split(2)) for n, t in tensors.items()]
    tensor_file.write(tmp_path / "f", sections, {"format": "x"})
    assert all(torch.equal(load_file(tmp_path / "f")[n], t) for n, t in tensors.items())
    with tensor_file.opened(tmp_path / "f") as file:
        assert file.about["format"] == "x"
        assert file.shape("a") == (3, 5)
        assert torch.equal(file.rows("a", 1, 9), tensors["a"][1:])
        assert torch.equal(file.rows("b", 1, 3), tensors["b"][1:3])
        assert torch.equal(file.rows("c", 0, 1), tensors["c"][:1])
        with pytest.raises(UserError, match="has no nothing"):
            file.tensor("nothing")
