"""What `launch/run.py` does with a checkpoint besides training: score rows, and export the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from dlrm_xla_data.fingerprint import data_changed, describe_data, seen_by_sketch
from dlrm_xla_data.loader import Loader
from run_data import open_data

from dlrm_xla import checkpoint, serving
from dlrm_xla.config import resolve
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.export import export
from dlrm_xla.graph_watch import GraphWatch
from dlrm_xla.guards import announce, warn
from dlrm_xla.metrics import base_rate_metrics, check_scores, click_metrics
from dlrm_xla.predictions import write_predictions
from dlrm_xla.row_optim import DTYPES
from dlrm_xla.steps import Steps
from dlrm_xla.train import predict

# Flags that leave the model as it is.
_FOR_SCORES = {"out", "device", "data", "data_cache", "batch_size", "precision", "seed", "min_count", "synthetic_rows"}
# Nothing is trained: rows have no state, and go through kernels that every device has.
_UNTRAINED = {"row_optimizer": "sgd", "row_kernels": "own", "micro_batches": 1}
_FOR_PROGRAMS = {"out", "batch_size"}


def evaluate(path: Path, given: dict[str, Any], split: str) -> int:
    """Scores a split of a dataset by a checkpoint, writes predictions as Parquet, prints metrics where it has labels.

    Settings are those of the checkpoint but for ``given``. A UserError where the data's ids mean something else.
    """
    about = _about(path)
    _check_flags(given, _FOR_SCORES, "--evaluate")
    named = given.pop("out", "")
    out = Path(named or path.parent.parent / f"predictions-{path.stem}-{split}.parquet")
    if named and out.exists():
        raise UserError(f"--out {out} is there already. Choose a new name.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    saved = {k: v for k, v in about["config"].items() if k not in ("out", "row_files")}
    config, _ = resolve({**saved, **_UNTRAINED, **given}, None)
    if not config.data and "data" not in about:
        raise UserError(f"--evaluate {path}: the checkpoint does not know its data. Give --data.")
    device = open_device(config.device)
    announce(device, config.precision)
    dataset, _ = open_data(config)
    filled = [name for name, (start, stop) in dataset.splits.items() if start < stop]
    if split not in filled:
        raise UserError(f"--split {split}: the data has no such rows, but those of: {', '.join(filled)}")
    now, known = describe_data(dataset), about.get("data")
    if known is None:
        warn("the checkpoint does not know its training rows: whether these ids mean the same cannot be checked")
    elif now["vocabulary"] != known["vocabulary"]:
        raise UserError(
            f"{data_changed(known, now)}. Its scores would be noise: give --data rows that were prepared with "
            "the ids of the training rows (python -m dlrm_xla_data prepare LOG NEW --ids-of PREPARED --format ...)."
        )
    elif line := seen_by_sketch(dataset, split, known):
        warn(line)
    serving.check_tables(about["model"], [dataset.num_rows(f, config.min_count) for f in range(len(dataset.names))])
    model = serving.build(about["model"], DTYPES[config.row_precision])
    steps = Steps(model, about["model"]["bag_lengths"], device, config)
    checkpoint.load_model(path, steps.model, steps.rows)
    # Under another name, for training rows of that name come in random order.
    ordered = replace(dataset, splits={**dataset.splits, "scored": dataset.splits[split]})
    loader = Loader(ordered, config.batch_size, config.min_count, config.seed)
    labels = loader.labels("scored").numpy()
    logits = predict(steps, loader, "scored", GraphWatch(device, warn))
    check_scores(logits)
    write_predictions(out, labels if dataset.labelled else None, logits, dataset.splits[split][0])
    print(f"{len(labels):,} {split} rows scored by {path}, step {about['step']:,}")
    if not dataset.labelled:
        print(f"mean probability    {float((1 / (1 + np.exp(-logits.astype(np.float64)))).mean()):>12.4f}; no labels")
    elif 0 < float(np.mean(labels)) < 1:
        trains = dataset.splits["train"][0] < dataset.splits["train"][1]
        base = base_rate_metrics(labels, dataset.click_rate("train" if trains else split))
        for name, value in click_metrics(labels, logits).items():
            print(f"{name.replace('_', ' '):<20}{value:>12.4f}{base[name]:>12.4f} of a constant")
    else:
        warn("all labels of these rows are the same: there are no metrics")
    print(f"predictions         {out}")
    return 0


def export_model(path: Path, given: dict[str, Any]) -> int:
    """Exports a checkpoint's model as torch.export and StableHLO programs into a folder."""
    _about(path)
    _check_flags(given, _FOR_PROGRAMS, "--export")
    if given.get("batch_size", 1) < 1:
        raise UserError(f"batch_size is {given['batch_size']}, but a program needs at least 1 sample")
    folder = Path(given.get("out", "") or path.parent.parent / f"export-{path.stem}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder} is there already. Choose a new folder.")
    scorer, about = serving.load(path)
    names = export(scorer, about, folder, given.get("batch_size", about["config"]["batch_size"]))
    print(f"step {about['step']:,} of {path} exported to {folder}: {', '.join(names)}")
    return 0


def _check_flags(given: Mapping[str, Any], allowed: Collection[str], command: str) -> None:
    unused = sorted(set(given) - set(allowed))
    if unused:
        raise UserError(
            f"{command} takes the model as it was trained: --{unused[0].replace('_', '-')} would change nothing. Leave "
            f"it out; these may be given: {', '.join('--' + name.replace('_', '-') for name in sorted(allowed))}."
        )


def _about(path: Path) -> dict[str, Any]:
    about = checkpoint.read_about(path)
    if "model" not in about:
        raise UserError(f"{path} does not say which model it is of; a checkpoint of launch/run.py does")
    return about
