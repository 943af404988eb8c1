"""What `launch/run.py --start-from` does: a new run that begins with the model of another, on newer rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from dlrm_xla_data.loader import Loader
from first_checkpoint import check_ids, check_source, scores, write_run
from run_data import open_data
from run_plan import make_plan
from run_report import make_report

from dlrm_xla import checkpoint, serving
from dlrm_xla.config import Config, resolve
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.graph_watch import GraphWatch
from dlrm_xla.guards import announce, warn
from dlrm_xla.metrics import base_rate_metrics
from dlrm_xla.model import DLRM
from dlrm_xla.run_folder import RunFolder, check_out, fresh_folder
from dlrm_xla.steps import Steps
from dlrm_xla.train import Outcome
from dlrm_xla.whole_folder import whole_folder

# Settings of the checkpoint's run that are of that run alone.
_DROPPED = ("out", "row_files", "data", "data_cache")
# What decides which states optimizers have.
_OF_STATES = ("row_optimizer", "row_state", "dense_optimizer")
BEFORE = "before.json"


def start_from(path: Path, given: dict[str, Any], run: Callable[[Config, dict[str, str], Path], int]) -> int:
    """Writes a run folder whose first checkpoint has the model of ``path``, then ``run`` goes on there.

    Settings are the checkpoint's under those that are given. States of optimizers come too, unless the optimizers are
    others. Raises UserError where the data has other ids, or settings ask for another model.
    """
    about = checkpoint.read_about(path)
    check_source(path, about)
    config, origins = _settings(about, given)
    if not config.data:
        raise UserError(f"--start-from {path}: give --data, the rows to train on")
    if config.out:
        check_out(config.out)
    torch.manual_seed(config.seed)
    device = open_device(config.device)
    announce(device, config.precision)
    dataset, best_auc = open_data(config)
    data = check_ids(about, config, dataset)
    plan = make_plan(config, device, device.rows, dataset)
    described = serving.describe(config, plan.bags, *dataset.shape)
    _check_same_model(about["model"], described)
    plan.check_memory()
    loader = Loader(dataset, config.batch_size, config.min_count, config.seed)
    watch = GraphWatch(device, warn)
    model = DLRM(dataset.dense.shape[1], plan.tables, plan.make_bags, **serving.model_settings(config))
    try:
        steps = Steps(model, dataset.bag_lengths, device, config, plan.files)
        changed = [name for name in _OF_STATES if getattr(config, name) != about["config"][name]]
        if changed:
            warn(f"{', '.join(changed)} differ from the checkpoint's: all optimizers' states start anew")
            checkpoint.load_model(path, steps.model, steps.rows)
        else:
            steps.load(path)
            steps.mean_loss()  # of steps since the last line of that run's log
        before = scores(steps, loader, watch)
        base = base_rate_metrics(loader.labels("test").numpy(), dataset.click_rate("train"))
        best = before["validation"]
        outcome = Outcome(best_log_loss=best["log_loss"], best_auc=best["auc"])
        report = make_report(config, plan, steps, watch, outcome, before["test"], base, best_auc)
        report |= {"started_from": str(path)}
        out = Path(config.out) if config.out else fresh_folder(config)
        saved = {"config": dataclasses.asdict(config), "model": described, "data": data}
        # Under its name it has a checkpoint, or it would go on with a model that nobody trained.
        with whole_folder(out) as scratch:
            write_run(RunFolder(config, origins, scratch), steps, outcome, saved, report, best, BEFORE)
    finally:
        if plan.files:
            plan.files.release()
    print(f"{out} starts from {path}, step {about['step']:,}")
    del steps, model
    code = run(config, origins, out)
    after = json.loads((out / "report.json").read_text())
    print(f"test AUC            {before['test']['auc']:.4f} before -> {after['auc']:.4f}, of these rows")
    return code


def _settings(about: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Config, dict[str, str]]:
    saved = {k: v for k, v in about["config"].items() if k not in _DROPPED}
    config, origins = resolve({**saved, **given}, None)
    return config, {k: v if k in given else "the checkpoint" for k, v in origins.items()}


def _check_same_model(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises a UserError with the first thing in which two models differ."""
    for name, value in theirs.items():
        if ours[name] == value:
            continue
        if name == "tables":
            a, b = next((a, b) for a, b in zip(value, ours[name], strict=True) if a != b)
            raise UserError(
                f"table {a['name']} is {a['plugin']} in the checkpoint, but would be {b['plugin']}: leave out what "
                "sizes tables or chooses their plugins"
            )
        raise UserError(f"{name} is {value} in the checkpoint, but would be {ours[name]}: leave out what changes it")
