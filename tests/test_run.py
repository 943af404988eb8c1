"""The launcher as a user runs it."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import yaml
from conftest import EVERY_DEVICE, ROOT, SLOW_BUT_ON_CPU, launch_script, needs_xla
from safetensors.torch import load_file
from sklearn.metrics import log_loss

from dlrm_xla import checkpoint, registry
from dlrm_xla.config import Config, resolve
from dlrm_xla.contract import Table
from dlrm_xla.errors import UserError
from dlrm_xla.metrics import base_rate_metrics, click_metrics
from dlrm_xla.presets import PRESETS
from dlrm_xla.rows import RowTable
from dlrm_xla.steps import learning_rate_factor

launcher = launch_script("run")


QUICK = ["--synthetic-rows", "7000", "--min-count", "1", "--log-every", "5"]
REPORT = """device plugin preset seed epochs batch_size auc log_loss normalized_entropy accuracy base_rate_log_loss
    embedding_bytes exact_embedding_bytes compression_ratio num_parameters train_samples_per_second step_ms_median
    compiles fallbacks versions commit tables""".split()


def test_how_to_go_on_is_quoted(capsys):
    launcher.stopped_at_once("my runs/a")
    assert "--resume 'my runs/a' goes on" in capsys.readouterr().err


@pytest.mark.parametrize("device", SLOW_BUT_ON_CPU)
def test_a_run_writes_its_folder(device, tmp_path, capsys):
    out = tmp_path / "run"
    assert launcher.main([*QUICK, "--device", device, "--plugin", "tensorly_tt:rank=2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "SYNTHETIC DATA" in printed
    assert "best AUC that any model could reach" in printed
    report = json.loads((out / "report.json").read_text())
    assert set(REPORT) <= set(report)
    assert report["fallbacks"] == 0
    assert report["compiles"] == (2 if device == "xla" else 0)
    assert report["one_graph_rule_broken"] == []
    assert ("XLA FOUND NO TPU" in printed) == (device == "xla")
    assert [row["plugin"] for row in report["tables"]].count("tensorly_tt:rank=2") > 5
    assert report["embedding_bytes"] == sum(row["bytes"] for row in report["tables"])
    assert 0.5 < report["auc"] < report["best_reachable_auc"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"train_loss", "validation_auc"} <= set().union(*rows)
    assert (out / "curves.png").stat().st_size > 10_000
    assert list(out.glob("events.out.tfevents*"))
    for name in ("best", "last"):
        assert (out / "checkpoints" / f"{name}.safetensors").is_file()
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["plugin"] == {"value": "tensorly_tt:rank=2", "origin": "flag"}
    assert settings["top"]["origin"] == "preset small"
    assert settings["seed"]["origin"] == "default"
    config, _ = resolve({}, out / "config.yaml")
    assert config.plugin == "tensorly_tt:rank=2", "a run's configuration can be given back"


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    reports = []
    for k, seed in enumerate(["1", "1", "2"]):
        out = tmp_path / str(k)
        assert launcher.main([*QUICK, "--seed", seed, "--out", str(out)]) == 0
        reports.append(json.loads((out / "report.json").read_text()))
    assert reports[0]["auc"] == reports[1]["auc"] != reports[2]["auc"]


@needs_xla
def test_cpu_and_xla_agree(small_log, tmp_path):
    aucs = []
    for device in ("cpu", "xla"):
        out = tmp_path / device
        flags = ["--data", str(small_log), "--batch-size", "50", "--min-rows", "10", "--plugin", "quotient_remainder"]
        assert launcher.main([*flags, "--device", device, "--out", str(out)]) == 0
        aucs.append(json.loads((out / "report.json").read_text())["log_loss"])
    assert aucs[0] == pytest.approx(aucs[1], abs=1e-3)


@pytest.mark.slow
def test_exact_tables_on_real_rows_reach_the_documented_auc(criteo_sample, tmp_path):
    out = tmp_path / "run"
    assert launcher.main(["--data", str(criteo_sample), "--data-cache", str(tmp_path), "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["auc"] > 0.765
    assert report["exact_embedding_bytes"] == pytest.approx(280_499 * 64, rel=0.001)


def test_multi_hot_bags_of_different_lengths_and_other_interactions(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("synthetic_tables: [30, 2000, 500]\nsynthetic_bags: [1, 3, 7]\ninteraction: dcn\ncross_rank: 8\n")
    out = tmp_path / "run"
    flags = [
        *QUICK,
        "--min-count",
        "0",
        "--config",
        str(file),
        "--dense-optimizer",
        "adagrad",
        "--row-optimizer",
        "sgd",
    ]
    assert launcher.main([*flags, "--precision", "bf16", "--out", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["tables"][1]["rows"] == 2000


def test_the_best_checkpoint_is_the_model_that_was_reported(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [*QUICK, "--epochs", "3", "--row-lr", "0.5", "--out", str(out)]
    assert launcher.main(flags) == 0
    report = json.loads((out / "report.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["validation_log_loss"] for row in rows if "validation_log_loss" in row}
    assert report["best_step"] == min(losses, key=losses.get)
    assert report["stopped_early"], "this learning rate overfits"
    assert report["epochs"] < 3


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--data", "nothing.tsv"], "there is no such file"),
        (["--plugin", "tensorly"], "did you mean 'tensorly_tt'"),
        (["--plugin", "tensorly_tt:rank=0"], "rank is 0"),
        (["--preset", "huge"], "there is no preset 'huge'"),
        (["--batch-size", "0"], "batch_size is 0 (flag), but must be at least 1"),
        (["--config", "nothing.yaml"], "cannot read the configuration"),
        (["--row-lr", "-1"], "must be a number above 0"),
        (["--plugin", "hash_rows:rows=9,rows=10"], "has the option 'rows' twice"),
        (["--split", "train"], "--split names the rows that --evaluate scores"),
        (["--evaluate", "c", "--plan"], "--plan is of a run that trains"),
        (["--preset", "terabyte", "--synthetic-rows", "1000"], "the tables need"),
        (["--plugin", "hash_rows", "--plugin", "tensorly_tt"], "--plugin hash_rows+tensorly_tt"),
        (["--device", "gpu"], "invalid choice: 'gpu'"),
        (["--epochs", "many"], "invalid int value"),
    ],
)
def test_mistakes_are_told_with_exit_code_2(flags, match, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = launcher.main(flags)
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2
    assert match in printed.err
    assert "Traceback" not in printed.err
    assert not list(tmp_path.rglob("report.json"))


def test_cuda_without_cuda_names_the_fix(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert launcher.main(["--device", "cuda"]) == 2
    assert "nvidia-smi" in capsys.readouterr().err


def test_a_run_folder_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert launcher.main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "already holds files" in capsys.readouterr().err


def test_plan_prints_and_stops(capsys):
    assert launcher.main(["--plan", "--preset", "terabyte", "--plugin", "tensorly_tt:rank=16"]) == 0
    printed = capsys.readouterr().out
    assert "39,884,406" in printed
    assert "total" in printed


@needs_xla
def test_a_plugin_that_reads_the_device_is_told_with_the_step(tmp_path, capsys, monkeypatch):
    def peeking(table, inner):
        bag = inner(dataclasses.replace(table, num_rows=500))

        class Peeking(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bag = bag

            def forward(self, ids_BL, weights_BL):
                if ids_BL.device.type == "xla" and ids_BL.max().item() < 0:
                    return self.bag(ids_BL, weights_BL) * 2
                return self.bag(ids_BL % 500, weights_BL)

        return Peeking()

    monkeypatch.setattr(registry, "load", lambda name: peeking)
    assert launcher.main([*QUICK, "--device", "xla", "--plugin", "peeking", "--out", str(tmp_path / "r")]) == 2
    printed = capsys.readouterr().err
    assert "the train step is not one XLA graph" in printed
    assert ".item()" in printed


@pytest.mark.parametrize("device", SLOW_BUT_ON_CPU)
def test_ctrl_c_finishes_the_step_and_reports(device, tmp_path):
    out = tmp_path / "my run"
    flags = "--synthetic-rows 14000 --batch-size 64 --epochs 250 --patience 0 --log-every 3".split()
    process = subprocess.Popen(
        [sys.executable, "launch/run.py", *flags, "--device", device, "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "INTERRUPTED" in printed
    assert f"launch/run.py --resume '{out}'\n" in printed
    assert "Traceback" not in errors
    report = json.loads((out / "report.json").read_text())
    assert report["interrupted"] is True
    assert (out / "checkpoints" / "last.safetensors").is_file()


def test_a_prepared_folder_is_as_good_as_the_log(small_log, tmp_path):
    aucs = []
    for data in (small_log, tmp_path / "small.tsv.prepared"):
        out = tmp_path / f"run{len(aucs)}"
        assert launcher.main(["--data", str(data), "--batch-size", "50", "--out", str(out)]) == 0
        aucs.append(json.loads((out / "report.json").read_text())["auc"])
    assert aucs[0] == aucs[1]


def test_a_disk_that_fills_while_training_is_told(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    # Of checkpoints alone: the module is not that of the run folder's other files.
    monkeypatch.setattr("dlrm_xla.tensor_file.os", types.SimpleNamespace(**vars(os) | {"fsync": full}))
    out = tmp_path / "run"
    assert launcher.main([*QUICK, "--out", str(out)]) == 2
    printed = capsys.readouterr().err
    assert "cannot write the checkpoint" in printed
    assert "No space left" in printed
    assert not list(out.rglob("*.safetensors*"))


def test_the_readmes_plugin_keeps_the_contract():
    text = (ROOT / "README.md").read_text()
    code = text.split("# my_plugin.py")[1].split("```")[0]
    namespace: dict = {}
    exec(code, namespace)
    bag = namespace["halves"](Table("t", 101, 4), RowTable, parts=2)
    ids = torch.arange(101, dtype=torch.int32).unsqueeze(1)
    rows = bag(ids, torch.ones(101, 1))
    assert torch.equal(rows[4], rows[5])
    assert len(rows.unique(dim=0)) == 51


@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_the_readmes_own_model_learns_and_leaves_other_rows_alone(device, tmp_path, monkeypatch):
    code, _, schedule, _, saving, *_ = (ROOT / "README.md").read_text().split("# own_model.py")[1].split("```")
    before, loop = code.replace('open_device("cpu")', f'open_device("{device}")').split("run = device.compile")
    torch.manual_seed(0)
    ids_BL = torch.randint(0, 1000, (256, 5), dtype=torch.int32)
    batch = ids_BL, torch.ones(256, 5), (ids_BL[:, 0] % 2).float()
    namespace: dict = {"batches": [batch] * 60}
    exec(before, namespace)
    start = {name: table.clone() for name, table in namespace["rows"].tables()}
    exec(f"run = device.compile{loop}", namespace)
    assert namespace["loss"].item() < 0.3
    for name, table in namespace["rows"].tables():
        changed = (table != start[name]).any(1)
        touched = ids_BL // 4 if "quotient" in name else ids_BL % 4
        assert torch.equal(changed.nonzero().flatten(), touched.unique()), name
    monkeypatch.chdir(tmp_path)
    namespace["batches"] = [batch] * 12
    exec(schedule.removeprefix("python"), namespace)
    exec(saving.removeprefix("python"), namespace)
    assert namespace["about"]["epoch"] == 1
    assert namespace["loss"].item() < 0.3


def test_metrics_equal_scikit_learn_and_a_constant_is_the_base_rate():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500).astype(np.float32)
    logits = rng.normal(size=500).astype(np.float32)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    result = click_metrics(labels, logits)
    wins = (logits[labels == 1][:, None] > logits[labels == 0][None, :]).mean()
    assert result["auc"] == pytest.approx(wins)
    assert result["log_loss"] == pytest.approx(log_loss(labels, probability))
    constant = np.full(500, np.log(0.3 / 0.7), np.float32)
    base = base_rate_metrics(labels, 0.3)
    for name, value in click_metrics(labels, constant).items():
        assert base[name] == pytest.approx(value, rel=1e-6), name
    with pytest.raises(UserError, match="all 500 labels"):
        click_metrics(np.zeros(500, np.float32), logits)


def test_learning_rate_schedule():
    config = Config(warmup_steps=4, decay_start=10, decay_steps=10, decay_power=2.0)
    factors = [learning_rate_factor(config, step) for step in (0, 3, 4, 10, 15, 20, 99)]
    assert factors == [0.25, 1.0, 1.0, 1.0, 0.25, 1e-12, 1e-12]
    assert learning_rate_factor(dataclasses.replace(config, decay_power=400.0), 19) == 1e-12


def test_a_decay_that_leaves_steps_without_a_rate_is_told(tmp_path, capsys):
    flags = ["--synthetic-rows", "3000", "--decay-steps", "2"]
    assert launcher.main([*flags, "--out", str(tmp_path / "r")]) == 0
    told = "learning rates are 0 from step 2 on"
    assert told in capsys.readouterr().err
    assert told in json.loads((tmp_path / "r" / "report.json").read_text())["warnings"][0]
    assert launcher.main([*flags, "--warmup-steps", "3", "--out", str(tmp_path / "s")]) == 2
    assert "decay_start is 0 (default), but learning rates still rise until warmup_steps, 3" in capsys.readouterr().err


def test_every_preset_resolves_and_says_what_it_reproduces():
    for name, preset in PRESETS.items():
        config, origins = resolve({"preset": name}, None)
        assert len(config.synthetic_tables) == 26
        assert origins["synthetic_tables"] == f"preset {name}"
        assert len(preset.about) > 40


def test_unknown_settings_and_wrong_types_are_told(tmp_path):
    file = tmp_path / "c.yaml"
    for text, match in (
        ("epoch: 3", "did you mean 'epochs'"),
        ("epochs: three", r"epochs cannot be 'three' \(.*c.yaml\)"),
        ("[1, 2]", "lines of the form"),
        ("a: [", "not YAML"),
        ("row_weight_decay: -1", r"row_weight_decay is -1.0 \(.*c.yaml\), but must be 0 or a number above it"),
        ("row_weight_decay: .nan", "row_weight_decay is nan"),
        ("decay_power: -1", "decay_power is -1.0 .*must be a number above 0"),
        ("synthetic_tables: []", "synthetic_tables is empty .*name the rows of each table, or give --data"),
        ("{warmup_steps: 9, decay_start: 8, decay_steps: 1}", "decay_start is 8 .*Let decay_start be at least that"),
        ("decay_power: .nan", "decay_power is nan"),
        ("cross_rank: 0", "cross_rank is 0 .*must be at least 1"),
        ("tables: {3: tensorly_tt}", "tables cannot be"),
        ("sharding: {C3: rowwise}", "sharding of table C3 cannot be 'rowwise'; did you mean 'row_wise'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=match):
            resolve({}, file)
    file.write_text("row_lr: 1e-3")  # text, to YAML
    assert resolve({}, file)[0].row_lr == 0.001


def test_flags_win_over_the_file_over_the_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("batch_size: 100\nseed: 5\n")
    config, origins = resolve({"seed": 7, "preset": "kaggle"}, file)
    assert (config.batch_size, config.seed, config.dense_lr) == (100, 7, 0.1)
    assert (origins["batch_size"], origins["seed"], origins["dense_lr"]) == (str(file), "flag", "preset kaggle")


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        checkpoint.load_model(tmp_path / "none.safetensors", model)
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04 not a checkpoint")
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.load_model(tmp_path / "bad.safetensors", model)


def test_tables_that_no_id_is_left_in_are_told(tmp_path, capsys):
    flags = ["--synthetic-rows", "3000", "--min-count", "100000", "--out", str(tmp_path / "r")]
    assert launcher.main(flags) == 0
    told = "tables of one row, that of missing ids: C1, C2,"
    assert told in capsys.readouterr().err
    assert told in json.loads((tmp_path / "r" / "report.json").read_text())["warnings"][0]


@pytest.mark.parametrize("setting", ["placement: {C99: dense}", "sharding: {C99: row_wise}"])
def test_settings_of_tables_that_there_are_not_are_told(setting, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(setting)
    assert launcher.main(["--plan", "--config", str(tmp_path / "c.yaml")]) == 2
    assert f"{setting.partition(':')[0]} names a table 'C99'; did you mean 'C9'" in capsys.readouterr().err


@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_a_plan_shows_placement_bytes_and_whether_they_fit(device, capsys):
    flags = ["--plan", "--preset", "terabyte", "--device", device]
    assert launcher.main([*flags, "--memory", "16GB"]) == 0
    printed = capsys.readouterr().out
    assert "DOES NOT FIT in 16.00 GB" in printed
    assert "sparse" in printed
    assert launcher.main([*flags, "--memory", "16GB", "--plugin", "tensorly_tt:rank=16"]) == 0
    assert ": fits in 16.00 GB" in capsys.readouterr().out
    assert launcher.main([*flags, "--memory", "much"]) == 2
    assert "write it like 16GB" in capsys.readouterr().err


def test_large_tables_may_lie_in_files(tmp_path):
    file = tmp_path / "c.yaml"
    rows = tmp_path / "rows"
    file.write_text(f"synthetic_tables: [30, 1200000, 500]\nrow_files: {rows}\n")
    out = tmp_path / "run"
    flags = [*QUICK, "--min-count", "0", "--config", str(file), "--memory", "10MB"]
    assert launcher.main([*flags, "--out", str(out)]) == 0
    assert [p.name for p in rows.iterdir() if ".C2." in p.name] == ["0.C2.float32"]
    # A run's files are of no use after it, so another one, or the same one that goes on, takes their place.
    assert launcher.main(["--resume", str(out), "--epochs", "2"]) == 0
    assert launcher.main([*flags, "--epochs", "2", "--out", str(tmp_path / "again")]) == 0
    lasts = [load_file(run / "checkpoints" / "last.safetensors") for run in (out, tmp_path / "again")]
    assert torch.equal(*(last["model.bags.1.weight"] for last in lasts))
    (rows / "mine.txt").write_text("nobody's but the user's")
    assert launcher.main([*flags, "--out", str(tmp_path / "third")]) == 2
    assert (rows / "mine.txt").exists()


@needs_xla
def test_files_need_the_cpu(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(f"row_files: {tmp_path / 'rows'}\n")
    assert launcher.main([*QUICK, "--device", "xla", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    assert "tables in files need --device cpu" in capsys.readouterr().err


def test_a_plugin_that_no_table_takes_is_said_loudly(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [*QUICK, "--plugin", "tensorly_tt", "--min-rows", "100000", "--out", str(out)]
    assert launcher.main(flags) == 0
    printed = capsys.readouterr().out
    assert "tensorly_tt REPLACES NO TABLE" in printed
    assert "tensorly_tt in 0 of 26 tables" in printed
    assert json.loads((out / "report.json").read_text())["tables_with_plugin"] == 0


def test_a_config_of_a_run_starts_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launcher.main([*QUICK, "--out", "first", "--seed", "3"]) == 0
    assert launcher.main(["--config", "first/config.yaml"]) == 0
    (second,) = (tmp_path / "runs").iterdir()
    reports = [json.loads((p / "report.json").read_text()) for p in (tmp_path / "first", second)]
    assert reports[0]["auc"] == reports[1]["auc"]


def test_a_plugin_that_breaks_on_its_options_is_told_without_traceback(tmp_path, capsys, monkeypatch):
    def breaking(table, inner, *, parts: int = 0):
        return inner(dataclasses.replace(table, num_rows=table.num_rows // parts))

    monkeypatch.setattr(registry, "load", lambda name: breaking)
    assert launcher.main([*QUICK, "--plugin", "breaking", "--out", str(tmp_path / "r")]) == 2
    assert "plugin 'breaking' fails on table C1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "full"])
def test_an_out_that_cannot_be_used_is_refused_before_any_work(tmp_path, capsys, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    assert launcher.main([*QUICK, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert {"file": "is a file", "full": "already holds files"}[kind] in printed.err
    assert "SYNTHETIC" not in printed.out


def test_a_reader_that_leaves_is_no_error(tmp_path):
    command = [sys.executable, "launch/run.py", *QUICK, "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.readline()
        run.stdout.close()
        assert "Look at the disk" not in run.stderr.read()
    assert run.returncode == 1


def test_an_empty_plugin_is_no_choice(capsys):
    assert launcher.main(["--plugin", ""]) == 2
    assert "plugin is empty (flag)" in capsys.readouterr().err


def test_the_checkpoint_of_the_lowest_validation_log_loss_is_the_one_that_is_tested(tmp_path):
    out = tmp_path / "run"
    # A learning rate this large overfits within the epochs, so the last validation is not the best.
    flags = [*QUICK, "--epochs", "4", "--patience", "0", "--row-lr", "0.3", "--dense-lr", "0.01", "--out", str(out)]
    assert launcher.main(flags) == 0
    report = json.loads((out / "report.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if "validation_log_loss" in row]
    best = min(validations, key=lambda row: row["validation_log_loss"])
    assert report["best_step"] == best["step"] < validations[-1]["step"]
    assert report["validation_auc"] == best["validation_auc"]


@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_a_run_that_diverges_stops_with_step_and_cause(device, tmp_path, capsys):
    out = tmp_path / "run"
    assert launcher.main([*QUICK, "--device", device, "--row-lr", "1e38", "--out", str(out)]) == 2
    told = r"(gradient of table C\d+ \(and of \d+ more\) is not finite|the loss is nan) at step \d+"
    assert re.search(told, capsys.readouterr().err)
    assert not (out / "report.json").exists()
