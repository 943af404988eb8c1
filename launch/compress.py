#!/usr/bin/env python
"""Replaces a trained run's tables by approximations computed from them, and says what that costs in accuracy.

python launch/compress.py RUN/checkpoints/best.safetensors --plugin svd --ratio 10
python launch/compress.py RUN/checkpoints/best.safetensors --plugin int4 --fine-tune 1
python launch/compress.py dlrm.pt --plugin hash_rows --ratio 100 --data PREPARED     weights of facebookresearch/dlrm

Writes a run folder whose checkpoint launch/run.py takes to --evaluate, --export, and --resume, which trains on. Rows
count by how often training looks them up, for that is how often their errors are made; --weigh alike counts all the
same. Stopped, the same command goes on after the last table that it finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import convert
import numpy as np
import torch
from dlrm_xla_data.loader import Loader
from dlrm_xla_data.prepared import PreparedDataset
from first_checkpoint import Scores, check_ids, check_source, scores, write_run
from numpy.typing import NDArray
from run import INTERRUPTED, run
from run_data import open_data
from run_flags import add_settings
from run_plan import Plan, make_plan
from run_report import make_report
from torch import Tensor

from dlrm_xla import checkpoint, registry, serving
from dlrm_xla import plan as planning
from dlrm_xla.compression import TableError, check_rows, compose_checked, set_table, table_error
from dlrm_xla.config import Config, resolve
from dlrm_xla.contract import innermost
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.graph_watch import GraphWatch
from dlrm_xla.guards import announce, warn
from dlrm_xla.metrics import base_rate_metrics
from dlrm_xla.model import DLRM
from dlrm_xla.row_optim import DTYPES
from dlrm_xla.run_folder import COMPRESSING, RunFolder, check_out
from dlrm_xla.steps import Steps
from dlrm_xla.tensor_file import Section, TensorFile, opened, write
from dlrm_xla.train import Outcome
from dlrm_xla.trained_rows import TrainedRows

_SCHEDULE = ("warmup_steps", "decay_start", "decay_steps")  # counts the run's steps; fine-tuning starts at 0
SETTINGS = {
    *("plugin", "ratio", "memory", "min_rows", "device", "data", "data_cache", "out", "min_count", "seed"),
    *("batch_size", "row_lr", "dense_lr", "plugin_lr", "row_optimizer", "patience", "evals_per_epoch", "precision"),
    *_SCHEDULE,
}
# Trained weights want smaller steps than random ones: of a run's own rates, where none are given.
FINE_TUNE_RATE = 0.1
# Times as many validations, and as many more to wait. What fine-tuning gives back comes in the first steps: a random
# projection at 10x was best after 12 steps of 230, where four validations an epoch saw it overfit only.
FINE_TUNE_VALIDATIONS = 5
_OFTENER = ("evals_per_epoch", "patience")
_COUNTED_ROWS = 2**18  # of the log at a time
# Settings of the checkpoint that are of its run or of its tables.
_DROPPED = ("out", "row_files", "plugin", "ratio", "memory", "tables")


def _unless_given(name: str) -> str:
    if name == "out":
        return "default a folder beside the source's, named after it, the plugin and the ratio"
    if name in _DROPPED:
        return "must be given" if name == "plugin" else "default: as the plugin's options say"
    if name.endswith("_lr"):
        return f"default the checkpoint's, with --fine-tune {FINE_TUNE_RATE:g} times that"
    if name in _OFTENER:
        return f"default the checkpoint's, with --fine-tune {FINE_TUNE_VALIDATIONS} times that"
    if name in _SCHEDULE:
        return "default the checkpoint's, with --fine-tune 0"
    return "default the checkpoint's"


def flags() -> argparse.ArgumentParser:
    """The command's flags; settings that are not given are those of the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint with exact tables, or a file of the script's")
    parser.add_argument("--fine-tune", type=int, default=0, metavar="EPOCHS", help="train on, at most so long")
    parser.add_argument(
        "--weigh", choices=["lookups", "alike"], default="lookups", help="how rows count (default lookups)"
    )
    add_settings(parser, SETTINGS, _unless_given)
    return parser


def compress(path: Path, given: dict[str, Any], fine_tune: int, weigh: str) -> int:
    """The whole command; returns the exit code."""
    layers = registry.parse(given.get("plugin", registry.EXACT))
    if not layers:
        raise UserError("name what shall replace the tables: --plugin svd, int4, tensorly_tt, ...")
    if fine_tune < 0:
        raise UserError(f"--fine-tune is {fine_tune}, but must be 0 or more epochs")
    out = Path(given.setdefault("out", str(_default_out(path, given))))
    scratch = out / COMPRESSING
    if scratch.is_dir():
        return _compress(path, given, fine_tune, weigh, out)
    check_out(str(out))
    try:
        return _compress(path, given, fine_tune, weigh, out)
    except UserError:
        if not any(scratch.glob("table*")):  # refused: nothing that the command could go on from
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):
                out.rmdir()
        raise


def _compress(path: Path, given: dict[str, Any], fine_tune: int, weigh: str, out: Path) -> int:
    scratch = out / COMPRESSING
    if path.suffix != ".safetensors" and not path.is_dir():
        path = _converted(path, scratch)
    about = checkpoint.read_about(path)
    _check_source(path, about)
    config, origins = _settings(about, given, fine_tune)
    device = open_device(config.device)
    announce(device, config.precision)
    dataset, best_auc = open_data(config)
    data = check_ids(about, config, dataset)
    plan = make_plan(config, device, device.rows, dataset)
    print(planning.text(plan.bags))
    print(plan.ratio())
    if all(p.plugin == registry.EXACT for p in plan.bags):
        raise UserError(
            f"{config.plugin} would replace no table, for the reasons above. Give {'a larger ' * bool(config.ratio)}"
            "--ratio, options that keep less, or a lower --min-rows."
        )
    for make, table, planned in zip(plan.make_bags, plan.tables, plan.bags, strict=True):
        layers = registry.parse(planned.plugin)
        planning.on_meta(compose_checked(layers, innermost(make)), table, planned.plugin)
    plan.check_memory()
    loader = Loader(dataset, config.batch_size, config.min_count, config.seed)
    watch = GraphWatch(device, warn)

    with opened(path) as file:
        for table, trained in zip(plan.tables, _trained(file, plan), strict=True):
            check_rows(table.name, trained)
        # Nothing is trained: rows have no state, and go through kernels that take arrays in files too.
        plain = dataclasses.replace(config, row_optimizer="sgd", row_kernels="own")
        scored = Steps(serving.build_mapped(about["model"], file, device), dataset.bag_lengths, device, plain)
        before = scores(scored, loader, GraphWatch(device, warn))
        del scored
        described = serving.describe(config, plan.bags, *dataset.shape)
        model = serving.build(described, DTYPES[config.row_precision])
        scratch.mkdir(parents=True, exist_ok=True)
        tables = _compress_tables(file, model, plan, dataset, config, weigh, scratch)
        _copy_dense(file, model)
    steps = Steps(model, dataset.bag_lengths, device, config, plan.files)
    after = scores(steps, loader, watch)
    base = base_rate_metrics(loader.labels("test").numpy(), dataset.click_rate("train"))
    outcome = Outcome(best_log_loss=after["validation"]["log_loss"], best_auc=after["validation"]["auc"])
    report = make_report(config, plan, steps, watch, outcome, after["test"], base, best_auc)
    report |= {"compressed_from": str(path), "weigh": weigh, "before": before, "after": after, "compression": tables}
    about = {"config": dataclasses.asdict(config), "model": described, "data": data}
    write_run(
        RunFolder(config, origins, resumed=out), steps, outcome, about, report, after["validation"], "compression.json"
    )
    shutil.rmtree(scratch)
    _print(before, after, report, out)
    if not fine_tune:
        return 0
    del steps, model
    code = run(config, origins, out)
    tuned = json.loads((out / "report.json").read_text())
    print(
        f"test AUC            {before['test']['auc']:.4f} -> {after['test']['auc']:.4f} compressed "
        f"-> {tuned['auc']:.4f} fine-tuned"
    )
    return code


def _default_out(path: Path, given: Mapping[str, Any]) -> Path:
    """A name that the same command finds again."""
    source = path.parent.parent if path.parent.name == "checkpoints" else path.with_suffix("")
    plugin = "".join(c if c.isalnum() or c in "+_=." else "-" for c in given.get("plugin", ""))
    size = f"-{given['ratio']:g}x" if "ratio" in given else ""
    return source.with_name(f"{source.name}-{plugin}{size}")


def _converted(path: Path, scratch: Path) -> Path:
    target = scratch / "source.safetensors"
    if not target.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        print(f"{path}: {convert.from_reference(path, target)}")
    return target


def _check_source(path: Path, about: Mapping[str, Any]) -> None:
    check_source(path, about)
    replaced = {t["plugin"] for t in about["model"]["tables"]} - {registry.EXACT}
    if replaced:
        raise UserError(
            f"{path} has tables that are approximations already ({', '.join(sorted(replaced))}). Compress a checkpoint "
            "with exact tables."
        )


def _settings(about: Mapping[str, Any], given: Mapping[str, Any], fine_tune: int) -> tuple[Config, dict[str, str]]:
    """The checkpoint's settings under those that were given; fine-tuning has some of its own."""
    saved = {k: v for k, v in about["config"].items() if k not in _DROPPED}
    tuned: dict[str, Any] = {}
    if fine_tune:
        tuned |= {name: saved[name] * FINE_TUNE_RATE for name in ("row_lr", "dense_lr", "plugin_lr") if saved[name]}
        tuned |= {name: saved[name] * FINE_TUNE_VALIDATIONS for name in _OFTENER}
        tuned |= dict.fromkeys(_SCHEDULE, 0) | {"epochs": fine_tune}
    config, origins = resolve({**saved, **tuned, **given}, None)
    of_tuning = dict.fromkeys(tuned, "--fine-tune")
    return config, {k: v if k in given else of_tuning.get(k, "the checkpoint") for k, v in origins.items()}


def lookups(dataset: PreparedDataset, feature: int, num_rows: int) -> Tensor:
    """How often training looks up each row of a table, float32 [num_rows]; row 0 has all ids that have none."""
    if dataset.bags is None and dataset.bag_lengths[feature] > 1:  # the counts are of the first id of each bag
        found = _counted(dataset, feature, num_rows).astype(np.float32)
    else:
        counts = dataset.counts[feature][: num_rows - 1]
        found = np.empty(num_rows, np.float32)
        # Counts may be those of older rows, whose ids these have.
        found[0], found[1:] = max(0, dataset.lookups(feature, "train") - counts.sum()), counts
    return torch.from_numpy(found)


def _counted(dataset: PreparedDataset, feature: int, num_rows: int) -> NDArray[np.int64]:
    start, stop = dataset.splits["train"]
    first = sum(dataset.bag_lengths[:feature])
    slots = slice(first, first + dataset.bag_lengths[feature])
    found = np.zeros(num_rows, np.int64)
    for at in range(start, stop, _COUNTED_ROWS):
        ids = dataset.ids[at : min(at + _COUNTED_ROWS, stop), slots]
        found += np.bincount(np.where(ids < num_rows, ids, 0).ravel(), minlength=num_rows)
    return found


def _trained(file: TensorFile, plan: Plan) -> list[TrainedRows]:
    return [
        TrainedRows(partial(file.rows, f"model.bags.{k}.weight"), table.num_rows, table.dim)
        for k, table in enumerate(plan.tables)
    ]


def _compress_tables(
    file: TensorFile,
    model: DLRM,
    plan: Plan,
    dataset: PreparedDataset,
    config: Config,
    weigh: str,
    scratch: Path,
) -> list[dict[str, Any]]:
    """Sets the model's bags, table by table; what was finished by a command that was stopped is taken from files."""
    specs = [p.plugin for p in plan.bags]
    job = {"source": file.about["sha256"], "plugins": specs, "weigh": weigh, "seed": config.seed}
    job_file = scratch / "job.json"
    if job_file.exists() and json.loads(job_file.read_text()) != job:
        raise UserError(
            f"{scratch} is of another compression that was stopped. Delete {scratch.parent} or choose another --out."
        )
    job_file.write_text(json.dumps(job))
    read = _trained(file, plan)
    rows = []
    for k, (table, planned, make) in enumerate(zip(plan.tables, plan.bags, plan.make_bags, strict=True)):
        count = lookups(dataset, k, table.num_rows)
        finished = scratch / f"table{k}.safetensors"
        if finished.exists():
            with opened(finished) as done:
                model.bags[k].load_state_dict({name: done.tensor(name) for name in done.names})
                told = json.loads(done.about["told"])
        else:
            began = time.perf_counter()
            torch.manual_seed(config.seed + k)
            bag = make(table)
            try:
                set_table(bag, read[k].weighted(count if weigh == "lookups" else None))
            except UserError as refused:
                raise UserError(f"table {table.name}, {planned.plugin}: {refused}") from refused
            seconds = time.perf_counter() - began
            error = table_error(bag, read[k], count) if planned.plugin != registry.EXACT else TableError(0.0, 0.0)
            if not math.isfinite(error.rows):
                raise UserError(
                    f"table {table.name}: {planned.plugin} made of it gives rows that are not finite. Take other "
                    "options or another plugin, or ask its authors."
                )
            told = planned.as_dict() | {"seconds": seconds, "error": error.rows, "error_of_lookups": error.lookups}
            state = bag.state_dict()
            if planned.plugin != registry.EXACT:  # what is only copied need not be kept
                sections = [Section([(name, tensor.shape)], tensor.dtype, [tensor]) for name, tensor in state.items()]
                write(finished, sections, {"told": json.dumps(told)})
            model.bags[k].load_state_dict(state)
        if planned.plugin != registry.EXACT:
            print(
                f"{table.name:<10}{planned.plugin}: error {told['error']:.3f} of rows, "
                f"{told['error_of_lookups']:.3f} of lookups, {told['seconds']:.1f} s  ({k + 1} of {len(plan.tables)})"
            )
        rows.append(told)
    return rows


def _copy_dense(file: TensorFile, model: DLRM) -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.startswith("bags."):
                tensor.copy_(file.tensor(f"model.{name}"))


def _print(before: Scores, after: Scores, report: Mapping[str, Any], out: Path) -> None:
    print(f"\n{'':<20}{'trained':>12}{'compressed':>12}")
    for split in ("validation", "test"):
        for name in ("auc", "log_loss"):
            title = f"{split} {name.replace('_', ' ')}"
            print(f"{title:<20}{before[split][name]:>12.4f}{after[split][name]:>12.4f}")
    print(
        f"embeddings          {report['embedding_bytes']:,} bytes, 1/{report['compression_ratio']:.1f} of "
        f"{report['ratio_of']}\nrun folder          {out}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the flags and returns the exit code: 0, 2 for the user's mistakes, 130 when interrupted."""
    given = vars(flags().parse_args(arguments))
    path, fine_tune, weigh = (given.pop(k) for k in ("checkpoint", "fine_tune", "weigh"))
    try:
        return compress(path, given, fine_tune, weigh)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. Look at the disk and the permissions there, and run again.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        on = "the same command goes on after the last table that it finished"
        out = Path(given.get("out", COMPRESSING))
        if (out / "config.yaml").exists() and not (out / COMPRESSING).exists():  # it was training on
            on = f"launch/run.py --resume {shlex.quote(str(out))} goes on from its last checkpoint"
        print(f"stopped; {on}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
