"""What a run ends with: report.json and the table of results."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any

from run_plan import Plan

from dlrm_xla import registry
from dlrm_xla.config import Config
from dlrm_xla.graph_watch import GraphWatch
from dlrm_xla.run_folder import commit, versions
from dlrm_xla.steps import Steps
from dlrm_xla.train import Outcome


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
    """The row that a study compares. Ratios are bytes to serve against the exact tables of ``ratio_of``."""
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
        "stopped_early": outcome.stopped_early and outcome.epochs < config.epochs,
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
        "ratio_of": plan.whole_of,
        "num_parameters": sum(p.numel() for p in steps.model.parameters()) + steps.rows.num_parameters,
        # Padding, of a last batch or of a bucket of bags, is no sample.
        "train_samples_per_second": outcome.samples / max(1, outcome.steps) / outcome.step_ms_median * 1000,
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
    tables = f" in {used} of {len(report['tables'])} tables" if asked else f", {used} tables otherwise" if used else ""
    interrupted = ", INTERRUPTED" if report["interrupted"] else ""
    return f"{report['plugin']}{tables} on {report['device']}, {report['epochs']:.2f} epochs{interrupted}"


def print_results(report: dict[str, Any], base: dict[str, float], best_auc: float | None, path: Path) -> None:
    """The table of results that a run ends with."""
    print(f"\n{title(report)}\n{'test rows':<20}{'model':>12}{'base rate':>12}" + (f"{'best':>12}" if best_auc else ""))
    for name, value in base.items():
        best = f"{best_auc:>12.4f}" if best_auc and name == "auc" else ""
        print(f"{name.replace('_', ' '):<20}{report[name]:>12.4f}{value:>12.4f}{best}")
    speed = f"{report['train_samples_per_second']:,.0f} samples/s, median step {report['step_ms_median']:.1f} ms"
    if not math.isfinite(report["step_ms_median"]):
        speed = "too few steps to tell: the first one holds the start"
    print(
        f"embeddings          {report['embedding_bytes']:,} bytes, 1/{report['compression_ratio']:.1f} of "
        f"{report['ratio_of']}\nspeed               {speed}"
    )
    if report["compiles"]:
        print(f"graphs              {report['compiles']} compiled, {report['fallbacks']} operations on the CPU instead")
    if report["stopped_early"]:
        print(
            f"stopped early       validation log loss fell no more (--patience); scored is the best step, "
            f"{report['best_step']:,} of {report['steps']:,}"
        )
    print(f"run folder          {path}")
    if report["interrupted"]:
        print(f"to go on            launch/run.py --resume {shlex.quote(str(path))}")
