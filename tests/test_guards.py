"""Each guard is provoked once, by what it is there to see."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import EVERY_DEVICE, launch_script, needs_xla
from dlrm_xla_data.fingerprint import data_changed, describe_data, seen_by_sketch, seen_in_training
from dlrm_xla_data.synthetic import synthesize

from dlrm_xla import registry
from dlrm_xla.device import Counters
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.graph_watch import GraphWatch
from dlrm_xla.guards import FiniteWatch, announce, doubts
from dlrm_xla.metrics import click_metrics
from dlrm_xla.steps import Steps

launcher = launch_script("run")
SMALL = ["--synthetic-rows", "1400", "--batch-size", "128", "--min-count", "1"]


def test_a_recompile_after_the_second_step_and_a_fallback_are_said_at_once():
    counters = Counters(compiles=7, fallbacks={"aten::sort": 3})  # an earlier run's in this process
    said = []
    device = dataclasses.replace(open_device("cpu"), counters=lambda: counters)
    watch = GraphWatch(device, said.append)
    counters = Counters(compiles=8, fallbacks={"aten::sort": 3})
    watch.after("train", 1)
    assert said == []
    counters = Counters(compiles=9, fallbacks={"aten::sort": 3, "aten::unique": 1})
    watch.after("train", 3)
    assert said == [
        "one-graph rule broken: train step 3: compiled 2 graphs where 1 is enough",
        "one-graph rule broken: train step 3: aten::unique runs on the CPU instead of the device",
    ]
    watch.after("train", 4)
    assert len(said) == 2
    assert (watch.compiles, watch.fallbacks) == ({"train": 2}, {"aten::unique": 1})
    counters = dataclasses.replace(counters, compiles=10)
    watch.after("refresh", 4, 0)
    assert said[2:] == ["one-graph rule broken: refresh step 4: compiled 1 graphs where 0 is enough"]


@needs_xla
def test_an_operation_that_xla_hands_to_the_cpu_is_told(tmp_path, capsys, monkeypatch):
    def sorting(table, inner):
        bag = inner(dataclasses.replace(table, num_rows=5))

        class Sorting(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bag = bag

            def forward(self, ids_BL, weights_BL):
                places = torch.searchsorted(torch.arange(5, device=ids_BL.device), ids_BL.contiguous())
                return self.bag(places.clamp(max=4).int(), weights_BL)

        return Sorting()

    monkeypatch.setattr(registry, "load", lambda name: sorting)
    code = launcher.main(
        [*SMALL, "--device", "xla", "--plugin", "sorting", "--min-rows", "10", "--out", str(tmp_path / "r")]
    )
    printed = capsys.readouterr().err
    # An operation on the CPU cuts the graph in two: the step is refused, or the guard names the operation.
    assert (code == 2 and "is not one XLA graph" in printed) or "aten::searchsorted" in printed


@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_a_gradient_that_is_not_finite_stops_the_run_and_the_good_checkpoint_stays(
    device, tmp_path, capsys, monkeypatch
):
    real = Steps.train

    def train(self, packed, step):
        if step == 5:
            packed = packed._replace(dense_BI=packed.dense_BI * float("inf"))
        real(self, packed, step)

    monkeypatch.setattr(Steps, "train", train)
    out = tmp_path / "run"
    flags = [*SMALL, "--save-every", "2", "--device", device, "--out", str(out)]
    assert launcher.main(flags) == 2
    assert "is not finite at step 6. Lower" in capsys.readouterr().err
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept[-1] == "step-0000000005.safetensors"  # by the validation after half an epoch
    monkeypatch.setattr(Steps, "train", real)
    if device == "cpu":
        assert launcher.main(["--resume", str(out)]) == 0


def test_a_plugin_that_is_not_finite_from_the_start_is_named(tmp_path, capsys, monkeypatch):
    def spoiled(table, inner):
        bag = inner(table)
        bag.register_buffer("factor", torch.full((1,), torch.nan))
        bag.bytes_to_serve = lambda: 9
        return bag

    monkeypatch.setattr(registry, "load", lambda name: spoiled)
    flags = ["--plugin", "spoiled", "--out", str(tmp_path / "run")]
    assert launcher.main([*SMALL, *flags, "--device", "cpu", "--min-rows", "500"]) == 2
    assert "factor of RowTable of table C" in (printed := capsys.readouterr().err)
    assert "is not finite before training" in printed


def test_gradients_that_fail_together_are_told_together():
    watch = FiniteWatch("table", 3, open_device("cpu"))
    watch.note(["c", "a", "b"], torch.tensor([torch.nan, 1.0, torch.inf]), torch.tensor([4], dtype=torch.int32))
    with pytest.raises(UserError, match=r"the gradient of table b \(and of 1 more\) is not finite at step 4"):
        watch.check()


def test_scores_that_are_not_finite_are_told(tmp_path, capsys, monkeypatch):
    labels, logits = np.array([0, 1, 1], np.float32), np.array([0.5, np.nan, np.inf], np.float32)
    with pytest.raises(UserError, match="2 of 3 scores are not finite"):
        click_metrics(labels, logits)
    monkeypatch.setattr("dlrm_xla.train.predict", lambda *given: np.full(len(labels), np.nan, np.float32))
    assert launcher.main([*SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "scores are not finite" in capsys.readouterr().err


@pytest.mark.slow
@needs_xla
def test_a_graph_that_xla_compiles_after_the_second_step_is_told(tmp_path, capsys, monkeypatch):
    def drifting(table, inner):
        class Drifting(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bag = inner(dataclasses.replace(table, num_rows=5))
                self.register_buffer("shift", torch.zeros(1))

            def forward(self, ids_BL, weights_BL):
                return self.bag(ids_BL % 5, weights_BL) + self.shift * weights_BL.sum(1, keepdim=True)

            def refresh(self):
                self.shift.add_(0.5)  # on the device, outside a step

        return Drifting()

    monkeypatch.setattr(registry, "load", lambda name: drifting)
    few = _config(tmp_path, "synthetic_tables: [300, 200]\nbottom: [8]\ntop: [8]\n")
    flags = ["--config", str(few), "--plugin", "drifting", "--min-rows", "10", "--evals-per-epoch", "2"]
    launcher.main([*SMALL, *flags, "--device", "xla", "--out", str(tmp_path / "r")])
    printed = capsys.readouterr().err
    assert "one-graph rule broken: refresh step 5: compiled 1 graphs where 0 is enough" in printed


@pytest.mark.parametrize(
    ("auc", "log_loss", "told"),
    [
        (0.504, 0.4, "near that of chance"),
        (0.4, 0.4, "worse than chance"),
        (0.7, 0.51, "no better than 0.5000 of a constant"),
        (0.7, 0.49, ""),
    ],
)
def test_doubts(auc, log_loss, told):
    found = doubts(auc, log_loss, 0.5)
    assert told in found
    assert bool(found) == bool(told)


def test_a_model_that_learned_nothing_is_told_with_causes(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--dense-lr", "1e-12", "--row-lr", "1e-12", "--config", str(_config(tmp_path, "plugin_lr: 1.0e-12\n"))]
    assert launcher.main([*SMALL, *flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().err
    assert "Likely causes: learning rates" in printed
    assert json.loads((out / "report.json").read_text())["warnings"]


def _config(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_labels_that_are_all_the_same_are_refused(tmp_path, capsys, monkeypatch):
    dataset, best = synthesize(1400, [30, 40])
    dataset = dataclasses.replace(dataset, labels=np.zeros_like(dataset.labels))
    monkeypatch.setattr("run_data.synthesize", lambda *args: (dataset, best))
    assert launcher.main([*SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "all 1,200 labels of the train rows are 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_test_rows_that_were_trained_on_are_told(tmp_path, capsys, monkeypatch):
    dataset, best = synthesize(1400, [30, 40])
    dense, ids, labels = dataset.dense.copy(), dataset.ids.copy(), dataset.labels.copy()
    for array in (dense, ids, labels):
        array[1200:1250] = array[:50]
    leaky = dataclasses.replace(dataset, dense=dense, ids=ids, labels=labels)
    assert seen_in_training(dataset, "test") == ""
    assert "50% of the test rows" in seen_in_training(leaky, "test")
    assert "50% of the test rows" in seen_by_sketch(leaky, "test", describe_data(dataset))
    monkeypatch.setattr("run_data.synthesize", lambda *args: (leaky, best))
    assert launcher.main([*SMALL, "--out", str(tmp_path / "run")]) == 0
    assert "50% of the test rows occur in the training rows" in capsys.readouterr().err
    assert any(
        "occur in the training rows" in w for w in json.loads((tmp_path / "run/report.json").read_text())["warnings"]
    )


def test_a_fingerprint_tells_other_rows_and_other_ids():
    dataset, _ = synthesize(1400, [30, 40])
    known = json.loads(json.dumps(describe_data(dataset)))
    assert data_changed(known, describe_data(dataset)) == ""
    flipped = dataset.labels.copy()
    flipped[700] ^= 1
    assert "rows changed" in data_changed(known, describe_data(dataclasses.replace(dataset, labels=flipped)))
    other = [dataset.counts[0], dataset.counts[1][:-1]]
    assert "ids that mean something else" in data_changed(
        known, describe_data(dataclasses.replace(dataset, counts=other))
    )


@pytest.mark.parametrize("slow", [False, True])
def test_bf16_that_is_slow_on_a_cpu_is_told(slow, capsys, monkeypatch):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: not slow)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: not slow)
    device = open_device("cpu")
    announce(device, "fp32")
    assert "BF16" not in capsys.readouterr().out
    announce(device, "bf16")
    assert ("*** THIS CPU HAS NO FAST PRODUCTS IN BF16" in capsys.readouterr().out) == slow
