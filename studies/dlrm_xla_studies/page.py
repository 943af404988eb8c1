"""The report: one HTML page that needs no network, and its plots as PNG and PDF beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from dlrm_xla.registry import EXACT
from dlrm_xla_studies import choice, figures, grid, statistics
from dlrm_xla_studies.families import along, exponents, family, timed
from dlrm_xla_studies.figures import Figure

_SOURCES = {"cpu": "measured on CPU", "cuda": "measured on CUDA", "xla": "measured on XLA"}
_AGAINST = ("embedding_bytes", "training_bytes", "samples_per_second")
_AGAINST_WORDS = {
    "embedding_bytes": "bytes to serve",
    "training_bytes": "bytes to train",
    "samples_per_second": "samples per second",
}
_METRIC_WORDS = {"auc": "AUC", "log_loss": "Log loss"}


def write(table: pd.DataFrame, out: Path, name: str, question: str = "") -> Path:
    """Writes report.html and figures/ into a folder; returns the page's path."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    unfinished = out / "report.html.unfinished"
    unfinished.write_text(html(table, name, question, folder), encoding="utf-8")
    os.replace(unfinished, page)
    return page


def html(table: pd.DataFrame, name: str, question: str = "", folder: Path | None = None) -> str:
    """The page of a table; raises UserError where its runs do not compare."""
    runs = _kind(table, "run")
    found, warnings = pd.DataFrame(), []
    if len(runs):
        warnings = statistics.check_alike(runs)
        found = statistics.summary(runs)
    times = timed(table)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dlrm_xla_studies", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "safe_json": _script_json}
    return environment.get_template("page.html.jinja").render(
        name=name,
        question=question,
        warnings=warnings,
        decisions=choice.choices(runs, found) if len(found) else [],
        verdict=choice.verdict,
        method=choice.name,
        figures=[*_quality_figures(found, folder), *_time_figures(table, times, folder)],
        growth=exponents(times),
        methods=_method_rows(found),
        devices=_device_rows(found),
        compiled=_compiled(_kind(table, "compile")),
        trials=_trials(_kind(table, "trial")),
        tuned=_tuned(runs, _kind(table, "trial")),
        runs=_run_rows(runs),
        confidence=round(statistics.CONFIDENCE * 100),
        about=_about(runs),
    )


def _kind(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    return table[table["kind"] == kind].dropna(axis=1, how="all").reset_index(drop=True)


def _quality_figures(found: pd.DataFrame, folder: Path | None) -> Iterator[Figure]:
    if not len(found):
        return
    several = found["data"].nunique() > 1
    for (data, device), here in found.groupby(["data", "device"], sort=False):
        for metric, words in _METRIC_WORDS.items():
            for against in _AGAINST:
                title = f"{words} against {_AGAINST_WORDS[against]}, on {device}" + (f", {data}" if several else "")
                name = f"{metric}-{against}-{device}" + (f"-{Path(str(data)).stem}" if several else "")
                caption = (
                    "Means over seeds, bars of one standard error. Rings: the Pareto front of the means. Dashed and "
                    "dotted: exact tables. Black: top_rows, the line that a method must beat."
                )
                yield Figure(name, title, caption, figures.quality(here, metric, against, device, folder, name))


def _time_figures(table: pd.DataFrame, times: pd.DataFrame, folder: Path | None) -> Iterator[Figure]:
    for kind, title, caption in _PARTS:
        split = _parts(_kind(table, kind))
        if len(split):
            if len(split) > _MOST_BARS:
                caption += f" The first {_MOST_BARS} of {len(split)}; the table of results has all."
            split = split.head(_MOST_BARS)
            yield Figure(f"parts-{kind}", title, caption, figures.parts(split, folder, f"parts-{kind}"))
    for (source, device), here in times.groupby(["source", "device"], sort=False):
        for size in ("rows", "batch", "ratio"):
            drawn = pd.concat([along(group, size) for _, group in here.groupby("family")])
            if drawn[size].nunique() < 3:
                continue
            name = f"scaling-{size}-{source.replace(' ', '_')}-{device}"
            title = f"Time per step against {size}, {source}, {device}"
            caption = (
                "Medians per family, other sizes at their commonest; the exponent is fitted to all these points, ± its "
                "standard error."
            )
            yield Figure(name, title, caption, figures.scaling(times, size, source, device, folder, name))


_PARTS = (
    ("bench", "Time of a training step, by part, measured", "Medians. On xla a step is one program, without parts."),
    ("compile", "Time of a training step, by part, estimated by the TPU compiler", "Estimates; nothing was run."),
)
# More bars than this are no figure; more parts than this are one.
_MOST_BARS, _MOST_PARTS = 24, 8


def _parts(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each plugin, device and size: its label, and a column for each part of a step in ms, medians."""
    if "ms_by_part" not in table:
        return pd.DataFrame()
    read = table["ms_by_part"].map(lambda text: json.loads(text) if isinstance(text, str) else {})
    rows = table[read.map(bool)]
    split = pd.DataFrame(read[rows.index].tolist())
    if split.shape[1] > _MOST_PARTS:
        order = split.sum().sort_values(ascending=False).index
        few = split[order[: _MOST_PARTS - 1]].copy()
        few["all else"] = split[order[_MOST_PARTS - 1 :]].sum(axis=1)
        split = few
    split.insert(0, "label", _labels(rows))
    return split.groupby("label", sort=False).median().reset_index()


def _labels(rows: pd.DataFrame) -> list[str]:
    """The plugin of each row, and of device and sizes those that are not the same in all."""
    compiled = "chip" in rows
    plugins = rows["plugin"] if compiled else rows["name"].str.split(" ").str[2]
    words = {"rows": "{:,.0f} rows", "batch_size" if compiled else "batch": "batch {:,.0f}", "ratio": "{:g}x"}
    words = {"chip" if compiled else "device": "on {}"} | words
    told = {column: form for column, form in words.items() if column in rows and rows[column].nunique() > 1}
    labels = []
    for plugin, (_, row) in zip(plugins, rows.iterrows(), strict=True):
        # Exact tables have the ratio of the plugin that they were measured beside.
        mine = {c: f for c, f in told.items() if pd.notna(row[c]) and not (c == "ratio" and plugin == EXACT)}
        labels.append(", ".join([plugin, *(form.format(row[column]) for column, form in mine.items())]))
    return labels


def _method_rows(found: pd.DataFrame) -> list[dict[str, Any]]:
    if not len(found):
        return []
    order = found.sort_values(["data", "device", "compression_ratio"], kind="stable")
    return [
        row.to_dict()
        | {
            "family": family(row["plugin"]),
            "method": choice.name(row),
            "auc_gap": choice.change(row),
            "log_loss_gap": choice.change(row, "log_loss"),
        }
        for _, row in order.iterrows()
    ]


def _device_rows(found: pd.DataFrame) -> list[dict[str, Any]]:
    """Methods that were measured on more than one device, side by side."""
    if not len(found) or found["device"].nunique() < 2:
        return []
    rows = []
    keys = [k for k in ("data", "plugin", "ratio", "min_count", "batch_size") if k in found]
    for _, group in found.groupby(keys, sort=False):
        if group["device"].nunique() > 1:
            first = group.iloc[0]
            rows.append(
                {
                    "method": choice.name(first),
                    "devices": [
                        {"device": r["device"], "where": _SOURCES.get(r["device"], r["device"]), "row": r}
                        for _, r in group.iterrows()
                    ],
                }
            )
    return rows


def _compiled(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def _trials(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Trials by method, the best first, which is taken; a method is named by what is not the same in all."""
    if not len(table):
        return []
    settings = {method: json.loads(method) for method in table["trial"].unique()}
    names = grid.differing(settings.values())
    taken = set(table["validation_log_loss"].dropna().groupby(table["trial"]).idxmin())
    order = table.sort_values(["plugin", "trial", "validation_log_loss"], kind="stable")
    return [
        {str(k): v for k, v in row.items()}
        | {"best": index in taken, "told": grid.told(settings[row["trial"]], [n for n in names if n != "plugin"])}
        for index, row in order.iterrows()
    ]


def _tuned(runs: pd.DataFrame, trials: pd.DataFrame) -> dict[str, Any]:
    """How many trials each method had in words, and the plugins that had none."""
    counts = trials["trial"].value_counts() if len(trials) else [0]
    few, many = min(counts), max(counts)
    ran, tried = (set(part["plugin"]) if len(part) else set[str]() for part in (runs, trials))
    words = f"{few} to {many} trials" if few < many else f"{many} trial{'s' if many != 1 else ''}"
    return {"trials": words, "others": sorted(ran - tried)}


# What the table of all runs shows of each: heading, column, digits (None: text).
_RUN_COLUMNS: tuple[tuple[str, str, int | None], ...] = (
    ("plugin", "plugin", None),
    ("ratio asked", "ratio", 0),
    ("device", "device", None),
    ("batch", "batch_size", 0),
    ("seed", "seed", 0),
    ("ratio", "compression_ratio", 1),
    ("bytes to serve", "embedding_bytes", 0),
    ("bytes to train", "training_bytes", 0),
    ("AUC", "auc", 4),
    ("log loss", "log_loss", 4),
    ("samples/s", "train_samples_per_second", 0),
    ("min count", "min_count", 0),
    ("row lr", "row_lr", 4),
    ("plugin lr", "plugin_lr", 4),
)


def _run_rows(runs: pd.DataFrame) -> dict[str, Any]:
    """All runs, compact: the page's own script draws the rows that are in view."""
    shown = [column for column in _RUN_COLUMNS if column[1] in runs]
    rows = [
        [None if _missing(row[name]) else row[name] if digits is None else round(float(row[name]), digits + 1)
         for _, name, digits in shown]
        for row in runs.to_dict("records")
    ]  # fmt: skip
    return {"columns": [[title, digits] for title, _, digits in shown], "rows": rows}


def _about(runs: pd.DataFrame) -> list[tuple[str, str]]:
    if not len(runs):
        return []
    found = [("data", ", ".join(map(str, runs["data"].unique())))]
    if "commit" in runs:
        found.append(("commit", ", ".join(map(str, runs["commit"].unique()))))
    for versions in runs["versions"].unique():
        found.append(("versions", ", ".join(f"{k} {v}" for k, v in json.loads(versions).items())))
    return found


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(text)


def number(value: Any, digits: int = 0) -> str:
    """A number for people; a dash where there is none."""
    return "\N{EN DASH}" if _missing(value) or value is jinja2.Undefined else f"{float(value):,.{digits}f}"


def signed(value: Any, digits: int = 4) -> str:
    """The same with its sign."""
    return "\N{EN DASH}" if _missing(value) else f"{float(value):+,.{digits}f}".replace("-", "\N{MINUS SIGN}")
