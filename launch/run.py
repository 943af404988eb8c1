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

import argparse
import dataclasses
import io
import json
import math
import os
import sys
import traceback
import typing
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import several_ranks
import torch
import use_checkpoint
from dlrm_xla_data.fingerprint import data_changed, describe_data, seen_in_training
from dlrm_xla_data.loader import Loader
from dlrm_xla_data.prepare import open_log
from dlrm_xla_data.prepared import SPLITS, PreparedDataset, open_prepared
from dlrm_xla_data.synthetic import synthesize
from torch import nn

from dlrm_xla import checkpoint, guards, listing, registry, serving, torchrec_plan
from dlrm_xla import plan as planning
from dlrm_xla.checkpoint_folder import CheckpointFolder
from dlrm_xla.config import Config, resolve
from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.devices import Device, RowAccess, open_device
from dlrm_xla.errors import UserError, choices
from dlrm_xla.metrics import base_rate_metrics, click_metrics
from dlrm_xla.model import DLRM
from dlrm_xla.presets import PRESETS
from dlrm_xla.ranks import ALONE, Ranks
from dlrm_xla.row_store import placement_rule, row_builder
from dlrm_xla.rows import RowFiles
from dlrm_xla.run_folder import NoRunFolder, RunFolder, check_out, commit, versions
from dlrm_xla.sizing import Budget, sized_layer
from dlrm_xla.torchrec_rows import LateRows
from dlrm_xla.train import GraphWatch, Outcome, Reports, Steps, predict, train

INTERRUPTED = 130


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            first = getattr(namespace, self.dest)
            parser.error(f"--plugin is given twice; to compose plugins write --plugin {first}+{value}")
        setattr(namespace, self.dest, value)


def add_settings(
    parser: argparse.ArgumentParser, names: Collection[str], told: Callable[[str], str] | None = None
) -> None:
    """A flag for each of the named settings; ``told`` says what each is where it is not given, else a run's default."""
    hints = typing.get_type_hints(Config)
    usual = resolve({}, None)[0]
    for field in dataclasses.fields(Config):
        if field.name not in names:
            continue
        kind = hints[field.name]
        literal = typing.get_origin(kind) is typing.Literal
        value = getattr(usual, field.name)
        default = f"default {value}"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=str if literal else kind,
            choices=typing.get_args(kind) if literal else None,
            action=_Once if field.name == "plugin" else "store",
            metavar=None if literal else kind.__name__.upper(),
            help=field.metadata["help"].replace("%", "%%")
            + (f" ({told(field.name) if told else default})" if value != "" else ""),
        )


def _short(value: Any) -> str:
    text = repr(value) if value != "" else "none"
    return text if len(text) < 30 else f"{text[:25]}...]"


def _without_flag() -> str:
    usual = resolve({}, None)[0]
    fields = [f for f in dataclasses.fields(Config) if not f.metadata["flag"]]
    return "\n".join(f"  {f.name:<18} {f.metadata['help']} (default {_short(getattr(usual, f.name))})" for f in fields)


def flags() -> argparse.ArgumentParser:
    """One flag per setting that has one, plus --config, --plan and --list-plugins."""
    presets = "\n".join(f"  {name:<10} {preset.about}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"presets:\n{presets}\n\nsettings of a --config file that have no flag:\n{_without_flag()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_settings(parser, {f.name for f in dataclasses.fields(Config) if f.metadata["flag"]})
    parser.add_argument("--config", type=Path, default=None, help="YAML file of settings; a run's config.yaml works")
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument(
        "--resume", type=Path, default=None, metavar="RUN", help="run folder to go on with; its config.yaml holds"
    )
    commands.add_argument(
        "--evaluate", type=Path, default=None, metavar="CHECKPOINT", help="score rows, write --out as Parquet, and stop"
    )
    parser.add_argument("--split", default=None, choices=SPLITS, help="the rows that --evaluate scores (default test)")
    commands.add_argument(
        "--export", type=Path, default=None, metavar="CHECKPOINT", help="write programs to the folder --out, and stop"
    )
    parser.add_argument("--plan", action="store_true", default=False, help="print what each table keeps, and stop")
    commands.add_argument(
        "--list-plugins", action="store_true", default=False, help="print the installed plugins, and stop"
    )
    return parser


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


def make_tables(config: Config, dataset: PreparedDataset | None) -> list[Table]:
    """The tables of a dataset, or without one those of the preset's nominal sizes."""
    if dataset is None:
        return [Table(f"C{k}", rows, config.dim) for k, rows in enumerate(config.synthetic_tables, 1)]
    rows = [dataset.num_rows(f, config.min_count) for f in range(len(dataset.names))]
    return [Table(name, r, config.dim) for name, r in zip(dataset.names, rows, strict=True)]


class Plan(NamedTuple):
    """Tables, what replaces each, and what that takes."""

    tables: list[Table]
    bags: list[planning.TablePlan]
    make_bags: list[MakeBag]
    training: list[planning.TrainingBytes]
    files: RowFiles | None
    memory: float
    whole: int

    def ratio(self) -> str:
        """What all tables keep, and the ratio that is asked for and reported."""
        kept = sum(p.bytes for p in self.bags)
        return f"{kept:,} bytes to serve, 1/{self.whole / kept:,.1f} of exact tables over all ids seen in training"


def make_plan(
    config: Config, device: Device, access: RowAccess, dataset: PreparedDataset | None, ranks: Ranks = ALONE
) -> Plan:
    """Plans the tables of a dataset, or without one those of nominal size, for a device's way to lay rows out."""
    tables = make_tables(config, dataset)
    lengths = list(dataset.bag_lengths if dataset else config.synthetic_bags) or [1] * len(tables)
    innermost, files = row_builder(config, device) if ranks.part[1] == 1 else (LateRows, None)
    place = placement_rule(config, access)

    def trained(bag: nn.Module, table: Table) -> int:
        # Files too: a budget that they are free of would replace no table.
        return planning.training_bytes(bag, lengths[positions[table.name]], config, access, place).total

    positions = {table.name: k for k, table in enumerate(tables)}
    whole = sum(dataset.num_rows(f, 0) for f in range(len(tables))) if dataset else sum(t.num_rows for t in tables)
    whole *= config.dim * 4
    budget = make_budget(config, trained, whole)
    plans, make_bags = planning.plan(tables, config.plugin, config.tables, config.min_rows, innermost, budget)
    unknown = set(config.placement) - {t.name for t in tables}
    if unknown:
        name = min(unknown)
        raise UserError(f"placement names a table {name!r}; {choices(name, (t.name for t in tables))}")
    training = [
        planning.training_bytes(planning.on_meta(make, table), length, config, access, place)
        for make, table, length in zip(make_bags, tables, lengths, strict=True)
    ]
    memory = planning.read_bytes(config.memory) if config.memory else device.memory
    return Plan(tables, plans, make_bags, training, files, memory, whole)


def make_budget(config: Config, trained: Callable[[nn.Module, Table], int], exact_bytes: int) -> Budget | None:
    """What sizes the plugin: a ratio of the exact tables' bytes, or a memory for tables and their training."""
    layers = registry.parse(config.plugin)
    if config.ratio:
        if not layers:
            raise UserError("--ratio sizes a plugin, and exact tables have no size; name one with --plugin")
        kept = exact_bytes / config.ratio
        return Budget(kept, lambda bag, table: planning.bytes_kept(bag), f"--ratio {config.ratio:g}", exact_bytes)
    if config.memory and sized_layer(layers):
        return Budget(planning.read_bytes(config.memory), trained, f"--memory {config.memory}")
    return None


def check_memory(plan: Plan) -> None:
    """Refuses tables that do not fit."""
    planning.check_memory(plan.training, plan.memory)


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


def warn(line: str) -> None:
    """A line that must not be missed."""
    print(f"*** {line}", file=sys.stderr)


def run(config: Config, origins: dict[str, str], resumed: Path | None = None, ranks: Ranks = ALONE) -> int:
    """Trains, evaluates, writes the run folder, prints the results; returns the exit code.

    ``resumed`` is the folder of a run to go on with, ``ranks`` are those of the job that this process is of.
    """
    start: tuple[Path, dict[str, Any]] | None = None
    several_ranks.check_settings(config, ranks)
    resumed = several_ranks.folder_to_go_on_in(config, resumed, ranks)
    if resumed:
        folder_to_go_on_in = resumed
        start = ranks.from_first(lambda: find_start(config, folder_to_go_on_in))
    elif config.out:
        ranks.from_first(lambda: check_out(config.out))
    torch.manual_seed(config.seed)
    device = open_device(config.device, hosts=True)
    print(f"device: {device.description}")
    if device.loud:
        print(f"*** {device.loud}")
    if not config.data and ranks.part[1] == 1:  # refused now rather than after minutes of drawing rows
        check_memory(make_plan(config, device, device.rows, None))
    dataset, best_auc = ranks.in_turn(lambda: open_data(config)) if config.data else open_data(config)
    warnings: list[str] = []

    def noted(line: str) -> None:
        warnings.append(line)
        if ranks.first:
            warn(line)

    fingerprint = check_data(dataset, start[1] if start else None, noted)
    several_ranks.check_data(fingerprint, ranks)
    pinned = config.device == "cuda"
    loader = Loader(dataset, config.batch_size, config.min_count, config.seed, ranks.part, pinned=pinned)
    plan = make_plan(config, device, device.rows, dataset, ranks)
    print(planning.text(plan.bags))
    print(plan.ratio())
    if config.plugin != registry.EXACT and all(p.plugin == registry.EXACT for p in plan.bags):
        print(
            f"*** {config.plugin} REPLACES NO TABLE: all stay exact, for the reasons above. Lower --min-rows, take "
            "more rows, a larger --ratio or options that keep less; this run says nothing about the plugin."
        )
    shards = None
    if ranks.part[1] > 1:
        shards = several_ranks.share_out(
            config, plan.tables, plan.make_bags, dataset.bag_lengths, device, plan.memory, ranks
        )
        print(torchrec_plan.text(shards, ranks.size))
    else:
        check_memory(plan)
    model = DLRM(
        dataset.dense.shape[1],
        plan.tables,
        plan.make_bags,
        **serving.model_settings(config),
    )
    about = start[1] if start else {}
    outcome = Outcome(**about.get("outcome", {}))
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
    finally:
        folder.close()
    print_results(report, base, best_auc, device, folder.path)
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


def check_data(dataset: PreparedDataset, about: dict[str, Any] | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The dataset's fingerprint, after looking for what makes a run senseless; ``about`` is that of a checkpoint."""
    splits = {name: np.asarray(dataset.labels[slice(*part)], np.float32) for name, part in dataset.splits.items()}
    guards.check_labels(splits)
    fingerprint = describe_data(dataset)
    if about and (line := data_changed(about["data"], fingerprint)):
        raise UserError(f"{line}. A run goes on with its own rows: give --data what it was trained on.")
    if line := seen_in_training(dataset, "test"):
        say(line)
    return fingerprint


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


def make_report(
    config: Config,
    plan: Plan,
    steps: Steps,
    watch: GraphWatch,
    outcome: Outcome,
    result: dict[str, float],
    base: dict[str, float],
    best_auc: float | None,
) -> dict[str, Any]:
    """The row that a study compares. Ratios are bytes to serve against exact tables over all ids seen in training."""
    embedding_bytes = sum(p.bytes for p in plan.bags)
    return {
        "device": config.device,
        "ranks": steps.ranks.size,
        "plugin": config.plugin,
        "ratio_asked": config.ratio or None,
        "tables_with_plugin": sum(p.plugin != registry.EXACT for p in plan.bags),
        "preset": config.preset,
        "seed": config.seed,
        "epochs": outcome.epochs,
        "batch_size": config.batch_size,
        "interrupted": outcome.interrupted,
        "stopped_early": outcome.stopped_early,
        **result,
        **{f"base_rate_{name}": value for name, value in base.items()},
        "best_reachable_auc": best_auc,
        "validation_auc": outcome.best_auc,
        "validation_log_loss": outcome.best_log_loss,
        "best_step": outcome.best_step,
        "steps": outcome.steps,
        "samples": outcome.samples,
        "embedding_bytes": embedding_bytes,
        "exact_embedding_bytes": plan.whole,
        "compression_ratio": plan.whole / embedding_bytes,
        "num_parameters": sum(p.numel() for p in steps.model.parameters()) + steps.rows.num_parameters,
        "train_samples_per_second": config.batch_size / outcome.step_ms_median * 1000,
        "step_ms_median": outcome.step_ms_median,
        "compiles": sum(watch.compiles.values()),
        "compiles_by_phase": watch.compiles,
        "fallbacks": sum(watch.fallbacks.values()),
        "fallback_operations": watch.fallbacks,
        "one_graph_rule_broken": watch.broken,
        "versions": versions(),
        "commit": commit(),
        "tables": [p.as_dict() | dataclasses.asdict(t) for p, t in zip(plan.bags, plan.training, strict=True)],
    }


def title(report: dict[str, Any]) -> str:
    """What ran, and where."""
    used, asked = report["tables_with_plugin"], report["plugin"] != registry.EXACT
    tables = f" in {used} of {len(report['tables'])} tables" if asked else ""
    interrupted = ", INTERRUPTED" if report["interrupted"] else ""
    return f"{report['plugin']}{tables} on {report['device']}, {report['epochs']:.2f} epochs{interrupted}"


def print_results(
    report: dict[str, Any], base: dict[str, float], best_auc: float | None, device: Device, path: Path
) -> None:
    """The table of results that a run ends with."""
    print(f"\n{title(report)}\n{'test rows':<20}{'model':>12}{'base rate':>12}" + (f"{'best':>12}" if best_auc else ""))
    for name, value in base.items():
        best = f"{best_auc:>12.4f}" if best_auc and name == "auc" else ""
        print(f"{name.replace('_', ' '):<20}{report[name]:>12.4f}{value:>12.4f}{best}")
    speed = f"{report['train_samples_per_second']:,.0f} samples/s, median step {report['step_ms_median']:.1f} ms"
    if not math.isfinite(report["step_ms_median"]):
        speed = "too few steps to tell: the first one holds the start"
    print(
        f"embeddings          {report['embedding_bytes']:,} bytes, 1/{report['compression_ratio']:.1f} of exact tables "
        f"over all ids seen in training\nspeed               {speed}"
    )
    if report["compiles"]:
        print(f"graphs              {report['compiles']} compiled, {report['fallbacks']} operations on the CPU instead")
    print(f"run folder          {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the flags and returns the exit code: 0, 2 for the user's mistakes, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # so that a log file has the lines in their order
    given = vars(flags().parse_args(arguments))
    ranks = ALONE
    file, plan_only, listing = given.pop("config"), given.pop("plan"), given.pop("list_plugins")
    resumed, evaluated, exported, split = (given.pop(k) for k in ("resume", "evaluate", "export", "split"))
    try:
        if listing:
            list_plugins()
            return 0
        if split is not None and not evaluated:
            raise UserError("--split names the rows that --evaluate scores: give --evaluate, or leave it out")
        if plan_only and (evaluated or exported):
            raise UserError("--plan is of a run that trains; leave it out with --evaluate and --export")
        if evaluated:
            return use_checkpoint.evaluate(evaluated, given, split or "test", open_data, warn)
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
        config, origins = resolve(given, file)
        registry.parse(config.plugin)
        ranks = several_ranks.open_job(config)
        if not ranks.first:
            sys.stdout = open(os.devnull, "w")  # one rank is enough to read
        if plan_only:
            device = open_device(config.device, hosts=True)
            dataset = open_data(config)[0] if config.data else None
            plan = make_plan(config, device, device.planned, dataset, ranks)
            chips = device.planned.num_chips
            print(
                f"as {device.planned.description} lays tables out{f', on each of {chips} chips' if chips > 1 else ''}:"
            )
            print(planning.text(plan.bags, plan.training, plan.memory))
            if dataset:
                print(plan.ratio())
            if ranks.part[1] > 1:
                lengths = list(dataset.bag_lengths if dataset else config.synthetic_bags) or [1] * len(plan.tables)
                several_ranks.check_settings(config, ranks)
                shards = several_ranks.share_out(
                    config, plan.tables, plan.make_bags, lengths, device, plan.memory, ranks
                )
                print(torchrec_plan.text(shards, ranks.size))
            ranks.leave()
            return 0
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
        error = UserError(f"{error}. Look at the disk and the permissions there, and run again.")
        print(ranks.failed(error), file=sys.stderr)
        return ranks.end(2)
    except KeyboardInterrupt:
        print("stopped at once; --resume RUN goes on from its last checkpoint", file=sys.stderr)
        return ranks.end(INTERRUPTED)
    except Exception as error:  # the others must hear of it, whatever it is
        if ranks is ALONE:
            raise
        traceback.print_exc()
        print(ranks.failed(error), file=sys.stderr)
        return ranks.end(1)


if __name__ == "__main__":
    sys.exit(main())
