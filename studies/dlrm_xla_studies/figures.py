"""The plots of a study: each a matplotlib figure, saved as SVG for the page and as PNG and PDF beside it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd

from dlrm_xla.registry import EXACT
from dlrm_xla_studies.families import along, growth
from dlrm_xla_studies.grid import differing, told
from dlrm_xla_studies.statistics import SETTING

# Paul Tol's muted palette and its shapes: told apart by the colour-blind, and in grey by the markers.
COLOURS = ("#332288", "#117733", "#44AA99", "#88CCEE", "#999933", "#CC6677", "#882255", "#AA4499", "#DDCC77", "#661100")
MARKERS = "osD^vP*Xph"
LINE_TO_BEAT = "top_rows"
# More labels than this hide the points.
_MOST_IN_LEGEND = 24


class Figure(NamedTuple):
    """A plot on the page."""

    name: str
    title: str
    caption: str
    svg: str


@contextmanager
def _drawn(width: float = 6.6, height: float = 4.6, panels: int = 1) -> Iterator[tuple[Any, Any]]:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 10, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
        "legend.fontsize": 8, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "dlrm_xla",
        "font.family": ["DejaVu Sans"], "pdf.fonttype": 42,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(1, panels, figsize=(width, height), layout="constrained", squeeze=False)
        try:
            yield figure, axes[0] if panels > 1 else axes[0][0]
        finally:
            pyplot.close(figure)


def saved(figure: Any, folder: Path | None, name: str, kinds: Sequence[str] = ("png", "pdf")) -> str:
    """The figure as inline SVG; with ``folder`` as PNG and PDF there too. Undated: equal figures are equal files."""
    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    for kind in kinds if folder is not None else ():
        figure.savefig(Path(folder or "") / f"{name}.{kind}", dpi=200, metadata=undated[kind])
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue().partition("<!DOCTYPE")[2].partition(">")[2].strip() or text.getvalue()
    # The page holds several figures, and matplotlib numbers the parts of each from 1.
    own = re.sub(r"[^\w-]", "_", name)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", drawn)


def _logarithmic(axes: Any, *sides: str) -> None:
    """Logarithmic axes, "x" and "y", whose labels do not run into one another where they span few decades."""
    from matplotlib import ticker

    for side in sides:
        getattr(axes, f"set_{side}scale")("log")
        low, high = getattr(axes, f"get_{side}lim")()
        axis = getattr(axes, f"{side}axis")
        axis.set_minor_formatter(ticker.NullFormatter())
        if high < 100 * low:
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 10 * low else (1, 3)))
            axis.set_major_formatter(ticker.LogFormatterMathtext(minor_thresholds=(math.inf, math.inf)))


def style_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each plugin; the line to beat is black."""
    found = {}
    for k, name in enumerate(sorted(set(names) - {EXACT, LINE_TO_BEAT})):
        found[name] = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[(k + k // len(COLOURS)) % len(MARKERS)]}
    return found | {LINE_TO_BEAT: {"color": "black", "marker": "o", "linewidth": 2.2}}


def pareto(points: Sequence[tuple[float, float]], highest: bool) -> list[int]:
    """Indices of points that no other beats in both: smaller first, and higher (or lower) second."""
    sign = -1 if highest else 1
    best, found = math.inf, []
    for k in sorted(range(len(points)), key=lambda k: (points[k][0], sign * points[k][1])):
        if sign * points[k][1] < best:
            best = sign * points[k][1]
            found.append(k)
    return found


def _exact_labels(exact: pd.DataFrame) -> list[str]:
    """By minimum count, and where that is not enough by all settings that are not the same in all."""
    counts = exact["min_count"].tolist() if "min_count" in exact else []
    labels = [f"exact, ids seen {count:g}+ times" for count in counts] or ["exact"] * len(exact)
    settings = exact[[key for key in SETTING if key in exact and key != "min_count"]].to_dict("records")
    names = differing(settings) if len(set(labels)) < len(labels) else []
    return [", ".join([label, *told(row, names)]) for label, row in zip(labels, settings, strict=True)]


def quality(
    found: pd.DataFrame,
    metric: str,
    against: str,
    device: str,
    folder: Path | None,
    name: str,
    kinds: Sequence[str] = ("png", "pdf"),
) -> str:
    """A metric against bytes or speed, on one device: a line per plugin, bars of one standard error.

    Rings mark the Pareto front of the means; dashed lines are exact tables, the black line ``top_rows``.
    """
    words = {
        "embedding_bytes": "bytes kept to serve, all tables",
        "training_bytes": "bytes that training takes: rows, optimizer, gradients",
        "samples_per_second": "training samples per second",
    }
    metrics = {"auc": "test AUC", "log_loss": "test log loss (nats)"}
    here = found[found["device"] == device]
    highest, many = metric == "auc", len(here) > 200
    styles = style_of(here["plugin"].tolist())
    with _drawn(height=5.4 if here["plugin"].nunique() > 8 else 4.6) as (figure, axes):
        exact = here[here["plugin"] == EXACT]
        for k, (label, (_, row)) in enumerate(zip(_exact_labels(exact), exact.iterrows(), strict=True)):
            line = ("--", ":", "-.")[k % 3]
            axes.axhline(row[f"{metric}_mean"], color="#555555", linestyle=line, linewidth=1.1, label=label)
            error = 0.0 if many or math.isnan(row[f"{metric}_error"]) else row[f"{metric}_error"]
            axes.errorbar(row[against], row[f"{metric}_mean"], yerr=error, marker="s", color="#555555", markersize=4,
                          linestyle="", capsize=1.5)  # fmt: skip
        for plugin, group in sorted(here[here["plugin"] != EXACT].groupby("plugin"), key=lambda pair: str(pair[0])):
            group = group.sort_values("embedding_bytes")
            axes.errorbar(
                group[against],
                group[f"{metric}_mean"],
                yerr=None if many else group[f"{metric}_error"].fillna(0),
                label=plugin + (", the line to beat" if plugin == LINE_TO_BEAT else ""),
                markersize=3 if many else 4.5,
                linestyle="" if many or against == "samples_per_second" else "-",
                capsize=1.5,
                **({"linewidth": 1.1} | styles[str(plugin)]),
            )
        points = list(zip(here[against], here[f"{metric}_mean"], strict=True))
        better = [(-x if against == "samples_per_second" else x, y) for x, y in points]
        front = [points[k] for k in pareto(better, highest)]
        axes.plot(*zip(*front, strict=True), linestyle="", marker="o", markersize=10, markerfacecolor="none",
                  markeredgecolor="#D00000", markeredgewidth=1.1, label="Pareto front")  # fmt: skip
        axes.set(xlabel=words[against], ylabel=f"{metrics[metric]}, mean over seeds")
        if against != "samples_per_second":
            _logarithmic(axes, "x")
        if here["plugin"].nunique() <= _MOST_IN_LEGEND:
            figure.legend(loc="outside lower center", ncols=3)
        return saved(figure, folder, name, kinds)


def scaling(times: pd.DataFrame, size: str, source: str, device: str, folder: Path | None, name: str) -> str:
    """Milliseconds per step against rows, batch or ratio, a line per family with its exponent."""
    words = {"rows": "rows of all tables", "batch": "samples per step", "ratio": "compression ratio"}
    here = times[(times["source"] == source) & (times["device"] == device)]
    with _drawn() as (figure, axes):
        for k, (kind, group) in enumerate(here.groupby("family")):
            held = along(group, size)
            points = held.groupby(size)["ms"].median()
            if not len(points):
                continue
            fitted = growth(held[size].astype(float).tolist(), held["ms"].astype(float).tolist())
            label = f"{kind}: {size}^{fitted.exponent:.2f} ± {fitted.error:.2f}" if fitted else str(kind)
            axes.plot(points.index, points.values, label=label, color=COLOURS[k % len(COLOURS)],
                      marker=MARKERS[k % len(MARKERS)], markersize=4, linewidth=1.1)  # fmt: skip
        _logarithmic(axes, "x", "y")
        axes.set(xlabel=words[size], ylabel="ms per step (median)")
        if here["family"].nunique() <= _MOST_IN_LEGEND:
            figure.legend(loc="outside lower center", ncols=2)
        return saved(figure, folder, name)


def parts(table: pd.DataFrame, folder: Path | None, name: str) -> str:
    """Bars of the milliseconds of a step, by part."""
    labels = table["label"].tolist()
    columns = [c for c in table.columns if c != "label"]
    with _drawn(height=1.2 + 0.34 * len(table)) as (figure, axes):
        left = [0.0] * len(table)
        for k, part in enumerate(columns):
            widths = table[part].fillna(0).tolist()
            axes.barh(range(len(table)), widths, left=left, color=COLOURS[k % len(COLOURS)], label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(table)), labels)
        axes.invert_yaxis()
        axes.set(xlabel="ms per step")
        figure.legend(loc="outside lower center", ncols=3)
        return saved(figure, folder, name)
