"""The rows of a run, opened or drawn, and what is looked for in them before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dlrm_xla_data.fingerprint import data_changed, describe_data, seen_in_training
from dlrm_xla_data.prepare import open_log
from dlrm_xla_data.prepared import PreparedDataset, open_prepared
from dlrm_xla_data.synthetic import synthesize

from dlrm_xla import guards
from dlrm_xla.config import Config
from dlrm_xla.errors import UserError


def open_data(config: Config) -> tuple[PreparedDataset, float | None]:
    """The dataset, and the best AUC that any model could reach on it where that is known."""
    if config.data:
        path = Path(config.data)
        cache = Path(config.data_cache) if config.data_cache else None
        return (open_prepared(path) if path.is_dir() else open_log(path, cache)), None
    tables, bags = config.synthetic_tables, config.synthetic_bags
    dataset, best = synthesize(config.synthetic_rows, tables, bags, config.seed, config.synthetic_variable)
    print(
        f"SYNTHETIC DATA, for there is no --data: {config.synthetic_rows:,} rows of Criteo's shape with a planted "
        f"signal; best AUC that any model could reach on its test rows: {best:.4f}"
    )
    return dataset, best


def check_trains(dataset: PreparedDataset) -> None:
    """Raises a UserError where a dataset has the ids of another, and so no rows to train on."""
    start, stop = dataset.splits["train"]
    if start == stop:
        raise UserError(
            "this data was prepared with --ids-of, to be scored with --evaluate: it has no training rows. Give --data "
            "that has."
        )


def check_data(dataset: PreparedDataset, about: dict[str, Any] | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The dataset's fingerprint, after looking for what makes a run senseless; ``about`` is that of a checkpoint."""
    check_trains(dataset)
    splits = {name: np.asarray(dataset.labels[slice(*part)], np.float32) for name, part in dataset.splits.items()}
    guards.check_labels(splits)
    fingerprint = describe_data(dataset)
    if about and (line := data_changed(about["data"], fingerprint)):
        raise UserError(f"{line}. A run goes on with its own rows: give --data what it was trained on.")
    if line := seen_in_training(dataset, "test"):
        say(line)
    return fingerprint
