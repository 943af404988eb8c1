"""Runs that begin with what another one trained: their folder, with a checkpoint before any step."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dlrm_xla_data.fingerprint import describe_data
from dlrm_xla_data.loader import Loader
from dlrm_xla_data.prepared import PreparedDataset
from run_data import check_trains
from run_plan import make_tables

from dlrm_xla import serving
from dlrm_xla.config import Config
from dlrm_xla.errors import UserError
from dlrm_xla.graph_watch import GraphWatch
from dlrm_xla.guards import warn
from dlrm_xla.metrics import click_metrics
from dlrm_xla.run_folder import RunFolder, versions
from dlrm_xla.steps import Steps
from dlrm_xla.train import Outcome, predict

Scores = dict[str, dict[str, float]]


def check_source(path: Path, about: Mapping[str, Any]) -> None:
    """Raises a UserError where a checkpoint does not say which model it is of."""
    if "model" not in about:
        raise UserError(f"{path} does not say which model it is of; a checkpoint of launch/run.py does")


def check_ids(about: Mapping[str, Any], config: Config, dataset: PreparedDataset) -> dict[str, Any]:
    """The dataset's description; a UserError where it has no rows to train on, or other ids than a checkpoint's."""
    check_trains(dataset)
    serving.check_tables(about["model"], [t.num_rows for t in make_tables(config, dataset)])
    now, known = describe_data(dataset), about.get("data")
    if known is None:
        warn("the checkpoint does not know its training rows: whether these ids mean the same cannot be checked")
    elif now["vocabulary"] != known["vocabulary"]:
        raise UserError(
            "the data has other ids than the checkpoint was trained on, so its rows would mean something else. Give "
            "--data rows that were prepared with the ids of the training rows (python -m dlrm_xla_data prepare LOG NEW "
            "--ids-of PREPARED --protocol ...)."
        )
    return now


def scores(steps: Steps, loader: Loader, watch: GraphWatch) -> Scores:
    """Metrics of validation and test rows."""
    return {
        split: click_metrics(loader.labels(split).numpy(), predict(steps, loader, split, watch))
        for split in ("validation", "test")
    }


def write_run(
    folder: RunFolder,
    steps: Steps,
    outcome: Outcome,
    about: Mapping[str, Any],
    report: Mapping[str, Any],
    validation: Mapping[str, float],
    name: str,
) -> None:
    """Writes a run that has done no step: its checkpoint is the best so far, its report also called ``name``."""
    try:
        folder.log({"step": 0, "samples": 0, **{f"validation_{k}": value for k, value in validation.items()}})
        started = {"outcome": dataclasses.asdict(outcome), "metrics_bytes": folder.metrics_bytes}
        whole = {"step": 0, "epoch": 0.0, **started, **about, "versions": versions()}
        folder.checkpoints.add(0, partial(steps.save, about=whole), best=True)
        folder.report(report)
        # Training on writes another report.
        shutil.copyfile(folder.path / "report.json", folder.path / name)
    finally:
        folder.close()
