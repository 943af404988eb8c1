#!/usr/bin/env python
"""Trains a DLRM and writes a run folder.

python launch/run.py                                       synthetic rows, exact tables, CPU: seconds on a laptop
python launch/run.py --device xla --plugin tensorly_tt --data criteo.tsv.gz
python launch/run.py --list-plugins
python launch/run.py --plan --preset terabyte --plugin tensorly_tt:rank=16
python launch/run.py --resume runs/20261123-...            goes on where its last checkpoint is, bit for bit
python launch/run.py --evaluate runs/.../checkpoints/best.safetensors --out predictions.parquet
python launch/run.py --export runs/.../checkpoints/best.safetensors --out FOLDER
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import several_ranks
import start_from
import torch
import use_checkpoint
from dlrm_xla_data.loader import Loader
from run_data import check_data, open_data
from run_flags import flags
from run_plan import make_plan
from run_report import make_report, print_results, title

from dlrm_xla import checkpoint, guards, listing, registry, serving, torchrec_plan
from dlrm_xla import plan as planning
from dlrm_xla.checkpoint_folder import CheckpointFolder
from dlrm_xla.config import Config, resolve
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.graph_watch import GraphWatch
from dlrm_xla.guards import warn
from dlrm_xla.metrics import base_rate_metrics, click_metrics
from dlrm_xla.model import DLRM
from dlrm_xla.ranks import ALONE, Ranks, among_several
from dlrm_xla.run_folder import COMPRESSING, NoRunFolder, RunFolder, check_out, versions
from dlrm_xla.steps import Steps, check_batch
from dlrm_xla.train import Outcome, Reports, predict, train

INTERRUPTED = 130


def show_plan(config: Config, ranks: Ranks) -> None:
    """Prints what each table keeps and takes in training, and which rank has what of it."""
    device = open_device(config.device, hosts=True)
    dataset = open_data(config)[0] if config.data else None
    plan = make_plan(config, device, device.planned, dataset, ranks)
    chips = device.planned.num_chips
    print(f"as {device.planned.description} lays tables out{f', on each of {chips} chips' if chips > 1 else ''}:")
    alone = ranks.part[1] == 1
    memory = plan.memory if alone else ranks.size * several_ranks.memory_of_rank(config, plan, device, ranks)
    print(planning.text(plan.bags, plan.training, memory))
    if dataset:
        print(plan.ratio())
    else:
        print(
            "Sizes are nominal: a run counts ids that its rows have --min-count times or more, as --plan --data does."
        )
    if not alone:
        several_ranks.check_settings(config, ranks)
        print(torchrec_plan.text(several_ranks.share_out(config, plan, device, ranks), ranks.size))


def list_plugins() -> None:
    """Prints the installed plugins."""
    print(
        f"What each is at most is of one table of {listing.PROBE.num_rows:,} x {listing.PROBE.dim}. The ratio of a run "
        "also counts small tables and ids that --min-count drops.\n"
    )
    print("exact  (dlrm_xla)\n    Every row as it is; the default, and what every other plugin is built around.")
    for row in listing.describe():
        print(f"{row['name']}  ({row['package']})\n    {row['summary']}")
        if row["options"]:
            print(f"    options: {row['options']}")
        if row["traits"]:
            print(f"    {row['traits']}")


def run(config: Config, origins: dict[str, str], resumed: Path | None = None, ranks: Ranks = ALONE) -> int:
    """Trains, evaluates, writes the run folder, prints the results; returns the exit code.

    ``resumed`` is the folder of a run to go on with, ``ranks`` are those of the job that this process is of.
    """
    start: tuple[Path, dict[str, Any]] | None = None
    several_ranks.check_settings(config, ranks)
    resumed = several_ranks.folder_to_go_on_in(resumed, ranks)
    if resumed:
        folder_to_go_on_in = resumed
        start = ranks.from_first(lambda: find_start(config, folder_to_go_on_in))
    elif config.out:
        ranks.from_first(lambda: check_out(config.out))
    torch.manual_seed(config.seed)
    device = open_device(config.device, hosts=True)
    check_batch(config.batch_size, config.micro_batches, device.rows.num_chips)
    guards.announce(device, config.precision)
    # Refused now rather than after minutes of drawing rows; a ratio is of the ids that these rows will have.
    if not config.data and not config.ratio and ranks.part[1] == 1:
        make_plan(config, device, device.rows, None).check_memory()
    dataset, best_auc = ranks.in_turn(lambda: open_data(config)) if config.data else open_data(config)
    warnings: list[str] = []

    def noted(line: str) -> None:
        warnings.append(line)
        if ranks.first:
            warn(line)

    fingerprint = check_data(dataset, start[1] if start else None, noted)
    several_ranks.check_data(fingerprint, ranks)
    loader = Loader(dataset, config.batch_size, config.min_count, config.seed, ranks.part, pinned=device.pinned)
    first, stop = dataset.splits["train"]
    if config.batch_size > (train_rows := stop - first):
        noted(
            f"a batch of {config.batch_size:,} has room for more samples than the {train_rows:,} training rows: the "
            "rest is padding, which takes time and memory. Take a smaller --batch-size."
        )
    about = start[1] if start else {}
    outcome = Outcome(**about.get("outcome", {}))
    total = loader.num_batches("train") * config.epochs
    if config.decay_steps and (end := config.decay_start + config.decay_steps) < total:
        noted(
            f"learning rates are 0 from step {end:,} on, of {total:,}: what comes after changes nothing. Let "
            "decay_start and decay_steps together be as many steps as the run."
        )
    if resumed and start and ranks.from_first(partial(is_finished, resumed, config, outcome, total)):
        if outcome.steps < total:
            print(f"{resumed} stopped early, at step {outcome.steps:,} of {total:,}; a larger --patience trains on")
        else:
            print(
                f"{resumed} is finished, at step {outcome.steps:,}, and its report stays; a larger --epochs trains on"
            )
        return 0
    plan = make_plan(config, device, device.rows, dataset, ranks)
    if alone := [table.name for table in plan.tables if table.num_rows == 1]:
        noted(
            f"tables of one row, that of missing ids: {', '.join(alone)}; no value is there "
            f"{max(1, config.min_count):,} times in the training rows (--min-count)"
        )
    if start:
        check_same_tables(about, serving.describe(config, plan.bags, *dataset.shape))
    print(planning.text(plan.bags))
    print(plan.ratio())
    if config.plugin != registry.EXACT and all(p.plugin == registry.EXACT for p in plan.bags):
        remedy = "Take a larger --ratio" if config.ratio else "Lower --min-rows, take options that keep less"
        print(
            f"*** {config.plugin} REPLACES NO TABLE: all stay exact, for the reasons above. {remedy}, or more rows; "
            "this run says nothing about the plugin."
        )
    shards = None
    if ranks.part[1] > 1:
        shards = several_ranks.share_out(config, plan, device, ranks)
        print(torchrec_plan.text(shards, ranks.size))
    else:
        plan.check_memory()
    model = DLRM(
        dataset.dense.shape[1],
        plan.tables,
        plan.make_bags,
        **serving.model_settings(config),
    )
    folder = open_folder(config, origins, resumed, about, ranks)
    print(f"run folder: {folder.path}")
    try:
        steps = Steps(model, dataset.bag_lengths, device, config, plan.files, ranks, shards)
        if start:
            resume(start[0], about, steps, folder)
            check_best(folder.checkpoints, outcome, noted)
        watch = GraphWatch(device, noted)
        model_about = serving.describe(config, plan.bags, *dataset.shape)

        def save(outcome: Outcome, best: bool) -> None:
            about = {
                "step": outcome.steps,
                "epoch": outcome.epochs,
                "outcome": dataclasses.asdict(outcome),
                "metrics_bytes": folder.metrics_bytes,
                "config": dataclasses.asdict(config),
                "model": model_about,
                "data": fingerprint,
                "versions": versions(),
            }
            folder.checkpoints.add(outcome.steps, partial(steps.save, about=about), best)

        outcome = train(steps, loader, watch, Reports(folder.log, noted, save), outcome)
        if math.isfinite(outcome.best_log_loss):
            checkpoint.load_model(folder.checkpoints.named("best"), steps.model, steps.rows)
        labels = loader.labels("test").numpy()
        result = click_metrics(labels, predict(steps, loader, "test", watch))
        base = base_rate_metrics(labels, dataset.click_rate("train"))
        report = make_report(config, plan, steps, watch, outcome, result, base, best_auc)
        report["warnings"] = warnings
        report["data"] = {name: fingerprint[name] for name in ("num_rows", "vocabulary", "rows")}
        folder.plot(f"{title(report)}: test AUC {result['auc']:.4f}", base["log_loss"], best_auc)
        folder.report(report)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(folder.path)) from error
    finally:
        folder.close()
        if plan.files:
            plan.files.release()
    print_results(report, base, best_auc, folder.path)
    return INTERRUPTED if outcome.interrupted else 0


def open_folder(
    config: Config, origins: dict[str, str], resumed: Path | None, about: dict[str, Any], ranks: Ranks
) -> RunFolder | NoRunFolder:
    """The run folder; the first rank's is the real one, and the others know where it is."""
    made: list[RunFolder] = []

    def make() -> Path:
        samples = about.get("outcome", {}).get("samples", 0)
        made.append(RunFolder(config, origins, resumed, about.get("metrics_bytes", 0), samples, ranks))
        return made[0].path.absolute()

    path = ranks.from_first(make)
    several_ranks.check_shared(path, ranks)
    return made[0] if made else NoRunFolder(path, config, ranks)


def find_start(config: Config, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run goes on from and what was saved about it; None where it had not saved any.

    Says what changed since; a UserError where it would be another model.
    """
    checkpoints = CheckpointFolder(folder / "checkpoints", config.keep_checkpoints)
    found = checkpoints.newest(warn)
    if found is None:
        print(f"{folder} holds no checkpoint yet: the run starts from its beginning")
        return None
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    # A setting that the checkpoint's version did not have was at what is its default now.
    saved = {**dataclasses.asdict(Config()), **found[1]["config"]}
    for line in guards.config_changes(saved, now):
        warn(line)
    for line in guards.version_changes(found[1]["versions"], versions()):
        warn(line)
    return found


def is_finished(folder: Path, config: Config, outcome: Outcome, total: int) -> bool:
    """Whether a run has nothing left to do: no step, and a report of the last one."""
    if outcome.steps < total and not 0 < config.patience <= outcome.validations_without_gain:
        return False
    try:
        report = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(report, dict):
        return False
    return bool(report.get("steps") == outcome.steps and not report.get("interrupted"))


def check_same_tables(about: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a UserError where a plan has other tables than the checkpoint, before anything is written."""
    for ours, theirs in zip(now["tables"], about["model"]["tables"], strict=True):
        if ours != theirs:
            kinds = [f"{t['plugin']} for {t['rows']:,} rows" for t in (ours, theirs)]
            raise UserError(
                f"table {ours['name']} would be {kinds[0]} here, but is {kinds[1]} in the checkpoint: --memory sizes "
                f"plugins, and was {about['config'].get('memory') or 'not given'}. Leave it out after --resume."
            )


def resume(path: Path, about: dict[str, Any], steps: Steps, folder: RunFolder | NoRunFolder) -> None:
    """Puts a checkpoint into steps that have done nothing yet."""
    steps.load(path)
    outcome = about["outcome"]
    if outcome["best_step"] == outcome["steps"]:
        folder.checkpoints.repeat_best(path)
    print(f"resumed from {path}, step {outcome['steps']:,}")


def check_best(checkpoints: CheckpointFolder, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Forgets the best step where its checkpoint is lost; otherwise the run would end with nothing to test."""
    if not math.isfinite(outcome.best_log_loss):
        return
    try:
        checkpoint.read_about(checkpoints.named("best"))
    except UserError as error:
        say(f"{error} The best checkpoint is now the next one with a validation.")
        fresh = Outcome()
        outcome.best_step, outcome.best_log_loss, outcome.best_auc = 0, fresh.best_log_loss, fresh.best_auc


def stopped_at_once(folder: str) -> int:
    """Says how a run goes on whose folder this is; "" where it has none."""
    again = f"--resume {shlex.quote(folder)} goes on from its last checkpoint"
    on = again if folder else "nothing is lost that was saved before"
    print(f"stopped at once; {on}", file=sys.stderr)
    return INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the flags and returns the exit code: 0, 2 for the user's mistakes, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # so that a log file has the lines in their order
    given = vars(flags(__doc__).parse_args(arguments))
    ranks = ALONE
    file, plan_only, listing = given.pop("config"), given.pop("plan"), given.pop("list_plugins")
    resumed, begun, evaluated, exported, split = (
        given.pop(k) for k in ("resume", "start_from", "evaluate", "export", "split")
    )
    try:
        if listing:
            list_plugins()
            return 0
        if split is not None and not evaluated:
            raise UserError("--split names the rows that --evaluate scores: give --evaluate, or leave it out")
        if plan_only and (begun or evaluated or exported):
            raise UserError(
                "--plan is of a run that trains anew; leave it out with --start-from, --evaluate and --export"
            )
        if (begun or evaluated or exported) and among_several():
            raise UserError("--start-from, --evaluate and --export are for one process: start it without torchrun")
        if begun:
            if file:
                raise UserError("--start-from takes its settings from the checkpoint and flags: no --config")
            return start_from.start_from(begun, given, run)
        if evaluated:
            return use_checkpoint.evaluate(evaluated, given, split or "test")
        if exported:
            return use_checkpoint.export_model(exported, given)
        if resumed:
            if "out" in given or file:
                raise UserError("--resume goes on in its own folder, with its own config.yaml: no --out, no --config")
            file = resumed / "config.yaml"
            if not file.exists():
                raise UserError(
                    f"--resume {resumed} is no run folder: it has no config.yaml. Give the folder of a run."
                )
            if (resumed / COMPRESSING).is_dir():
                raise UserError(f"--resume {resumed}: launch/compress.py was stopped there; the same command goes on")
        config, origins = resolve(given, file)
        registry.parse(config.plugin)
        ranks = several_ranks.open_job(config)
        if not ranks.first:
            sys.stdout = open(os.devnull, "w")  # one rank is enough to read
        if plan_only:
            show_plan(config, ranks)
            code = 0
        else:
            code = run(config, origins, resumed, ranks)
        ranks.leave()
        return code
    except UserError as error:
        print(ranks.failed(error), file=sys.stderr)
        return ranks.end(2)
    except BrokenPipeError:  # whoever read our output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that fills, a folder that vanishes; anything else names itself
        told = UserError(f"{error}. Look at the disk and the permissions there, and run again.")
        print(ranks.failed(told), file=sys.stderr)
        return ranks.end(2)
    except KeyboardInterrupt as error:
        return ranks.end(stopped_at_once(str(error)))
    except Exception as error:  # the others must hear of it, whatever it is
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):  # stopped within a class's definition
            return ranks.end(stopped_at_once(""))
        if ranks.size == 1:
            raise
        print(ranks.failed(error), file=sys.stderr)
        return ranks.end(1)


if __name__ == "__main__":
    sys.exit(main())
