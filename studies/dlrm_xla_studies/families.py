"""What family a plugin is of, and how times grow within one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from dlrm_xla.registry import EXACT, installed

TRAINING = "training"
# Stands in the label of a run between its plugin and those of single tables.
MIXED = " with "


@functools.cache
def family(plugin: str) -> str:
    """The module that brings the outermost plugin of a composition; its own name where it is not installed.

    Tables of several plugins are a family of their own.
    """
    if MIXED in plugin:
        return "several plugins"
    name = plugin.partition("+")[0].partition(":")[0]
    if name == EXACT:
        return EXACT
    entry = installed().get(name)
    return entry.module.rpartition(".")[2].replace("_", " ") if entry else name


class Growth(NamedTuple):
    """time ~ size^exponent, by least squares of logarithms; ``error`` is the standard error of the exponent."""

    exponent: float
    error: float
    points: int
    low: float
    high: float


def growth(sizes: Sequence[float], times: Sequence[float]) -> Growth | None:
    """None where there are fewer than three different sizes: two points fit any exponent."""
    pairs = [(s, t) for s, t in zip(sizes, times, strict=True) if s > 0 and t > 0 and math.isfinite(s * t)]
    different = {s for s, _ in pairs}
    if len(different) < 3:
        return None
    fit = stats.linregress([math.log(s) for s, _ in pairs], [math.log(t) for _, t in pairs])
    return Growth(float(fit.slope), float(fit.stderr), len(pairs), min(different), max(different))


def timed(table: pd.DataFrame) -> pd.DataFrame:
    """What has a time per step, in one form: source, plugin, device, rows, batch, ratio, ms."""
    parts = []
    runs = table[table["kind"] == "run"] if "kind" in table else table
    if len(runs):
        parts.append(
            pd.DataFrame(
                {
                    "source": TRAINING,
                    "plugin": runs["plugin"],
                    "device": runs["device"],
                    "rows": runs["table_rows"],
                    "batch": runs["batch_size"],
                    "ratio": runs["compression_ratio"],
                    "ms": runs["step_ms_median"],
                }
            )
        )
    benches = table[table["kind"] == "bench"] if "kind" in table else table.iloc[:0]
    if len(benches):
        words = benches["name"].str.split(" ")
        ours = words.str[1] == "dlrm_xla"
        named = benches["plugin"] if "plugin" in benches else pd.Series(EXACT, benches.index)
        plugins = words.str[2:].str.join(" ").where(words.str[0].isin(["plugins", "growth"]), named.fillna(EXACT))
        parts.append(
            pd.DataFrame(
                {
                    "source": "benchmark " + words.str[0],
                    "plugin": plugins,
                    "device": benches["device"],
                    "rows": benches["rows"],
                    "batch": benches["batch"],
                    "ratio": benches["ratio"] if "ratio" in benches else math.nan,
                    "ms": benches["ms_median"],
                }
            )[ours]
        )
    compiled = table[table["kind"] == "compile"] if "kind" in table else table.iloc[:0]
    if len(compiled):
        parts.append(
            pd.DataFrame(
                {
                    "source": "estimate of the TPU compiler",
                    "plugin": compiled["plugin"] if "plugin" in compiled else EXACT,
                    "device": compiled["chip"],
                    "rows": math.nan,
                    "batch": compiled["batch_size"],
                    "ratio": compiled["ratio"] if "ratio" in compiled else math.nan,
                    "ms": compiled["estimated_ms"],
                }
            )
        )
    columns = ["source", "plugin", "device", "rows", "batch", "ratio", "ms"]
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
    found["family"] = found["plugin"].fillna(EXACT).map(family)
    return found


def along(group: pd.DataFrame, size: str) -> pd.DataFrame:
    """Of the points of one family those that differ in ``size``, "rows", "batch" or "ratio", alone.

    Other sizes are held at their commonest, but for ratios, of which tables of other sizes hardly ever have one, and
    for the rows of training runs along ratios, which are what an approximation keeps.
    """
    if size == "ratio":
        group = group[group["family"] != EXACT]  # their ratio is that of the plugin they were measured beside
    others = [other for other in ("rows", "batch") if other != size]
    if size == "ratio" and (group["source"] == TRAINING).all():
        others.remove("rows")
    for other in others:
        counts = group[other].dropna()
        if len(counts):
            group = group[group[other] == counts.mode().iloc[0]]
    return group.dropna(subset=[size, "ms"])


def exponents(times: pd.DataFrame) -> list[dict[str, Any]]:
    """Growth of ms with rows, batch and ratio, per family, source and device."""
    found = []
    for (source, device, name), group in times.groupby(["source", "device", "family"], sort=False):
        for size in ("rows", "batch", "ratio"):
            held = along(group, size)
            fitted = growth(held[size].astype(float).tolist(), held["ms"].astype(float).tolist())
            if fitted:
                found.append({"source": source, "device": device, "family": name, "with": size, **fitted._asdict()})
    return found
