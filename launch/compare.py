#!/usr/bin/env python
"""Makes one table and one plot of many runs: test AUC and log loss against bytes, by plugin, over seeds.

python launch/compare.py runs/*                                     prints the table
python launch/compare.py runs/* --into docs/approximations.md      puts it between the file's markers, the plot beside

Runs of one plugin, ratio, device, minimum count and learning rates are one row: the mean over their seeds, and the
distance from the lowest to the highest. Runs on other data, or with another setting that changes results, are refused:
they do not compare. What launch/compress.py made of a trained run has rows of its own, and may have been fine-tuned at
other rates and for other epochs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from dlrm_xla.errors import UserError
from dlrm_xla.run_folder import read_finished

MARKERS = ("<!-- results: made by launch/compare.py -->", "<!-- end of results -->")
# What may differ between runs that are compared; of every other setting there must be one value.
TITLES = ["plugin", "asked", "ratio", "bytes to serve", "bytes to train", "AUC", "spread", "log loss", "spread"]
TITLES += ["samples/s", "minimum count", "rates", "seeds"]
RATES = {"plugin_lr": "plugin lr", "row_lr": "row lr"}
# What also may differ where tables were compressed: how they were fine-tuned.
FINE_TUNING = ("dense_lr", "epochs", "patience", "evals_per_epoch")
# Of these the runs of one row have one value too, for no column shows them.
NOT_SHOWN = ("min_rows", "tables", "row_kernels")
MAY_DIFFER = {
    "plugin",
    "ratio",
    "seed",
    "device",
    "out",
    "data_cache",
    "min_count",
    *RATES,
    *NOT_SHOWN,
}


def read(folder: Path) -> dict[str, Any]:
    """A run's report with its settings."""
    report, settings, trained = read_finished(folder)
    report |= {"settings": settings, "training_bytes": trained}
    report["folder"] = str(folder)
    report["compressed"] = (folder / "compression.json").exists()
    return report


def check_alike(reports: Sequence[dict[str, Any]]) -> None:
    """Raises a UserError where a setting that changes results has two values, or a run was interrupted."""
    first = next((r for r in reports if not r["compressed"]), reports[0])
    for report in reports:
        if report["interrupted"]:
            raise UserError(f"{report['folder']} was interrupted; finish it or leave it out")
        # A setting that an older version did not have yet did not change that run.
        for key in sorted(first["settings"].keys() & report["settings"].keys()):
            here, there = (r["settings"][key] for r in (report, first))
            if key == "data":
                here, there = (Path(str(v)).name for v in (here, there))
            tuned = key in FINE_TUNING and report["compressed"]
            if here != there and key not in MAY_DIFFER and not tuned:
                raise UserError(
                    f"{report['folder']} has {key} {here}, {first['folder']} has {there}: such runs do not compare"
                )
        if report["exact_embedding_bytes"] != first["exact_embedding_bytes"]:
            raise UserError(f"{report['folder']} and {first['folder']} ran on other data: their exact tables differ")


def rows(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per plugin, ratio, device, minimum count and learning rates, by ratio and then by AUC."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for report in reports:
        settings = report["settings"]
        rates = ", ".join(f"{word} {settings[key]:g}" for key, word in RATES.items() if settings.get(key))
        key = report["plugin"], settings.get("ratio") or 0, report["device"], rates, settings.get("min_count", 1)
        groups.setdefault((*key, report["compressed"]), []).append(report)
    found = []
    for (plugin, ratio, device, rates, count, compressed), group in groups.items():
        _check_one_setting(group)
        seeds = [r["seed"] for r in group]
        if len(set(seeds)) < len(seeds):
            one, other = next((a, b) for a, b in itertools.combinations(group, 2) if a["seed"] == b["seed"])
            raise UserError(
                f"{one['folder']} and {other['folder']} would be one row, for both are {plugin} on {device} with the "
                f"same sizes and rates, and have the seed {one['seed']}. Give one of the two, or runs of several seeds."
            )
        row: dict[str, Any] = {"plugin": plugin, "ratio asked": ratio, "device": device, "rates": rates}
        row |= {"minimum count": count, "compressed": compressed}
        row |= {"seeds": len(seeds), "bytes": round(statistics.mean(r["embedding_bytes"] for r in group))}
        row["training bytes"] = round(statistics.mean(r["training_bytes"] for r in group))
        row["ratio"] = group[0]["exact_embedding_bytes"] / row["bytes"]
        for name in ("auc", "log_loss"):
            values = [r[name] for r in group]
            row[name] = statistics.mean(values)
            row[f"{name} spread"] = max(values) - min(values)
        # A run that was compressed, or went on for no step, has none.
        speeds = [r["train_samples_per_second"] for r in group if r["train_samples_per_second"] is not None]
        row["samples/s"] = statistics.median(speeds) if speeds else None
        found.append(row)
    return sorted(found, key=lambda r: (r["ratio asked"], -r["auc"]))


def _check_one_setting(group: Sequence[dict[str, Any]]) -> None:
    """Raises a UserError where runs of one row differ in what the row does not show."""
    for key in (*NOT_SHOWN, *FINE_TUNING):
        values = {str(r["settings"][key]): r["folder"] for r in group if key in r["settings"]}
        if len(values) > 1:
            (one, here), (other, there) = list(values.items())[:2]
            raise UserError(
                f"{here} has {key} {one}, {there} has {other}: both are {group[0]['plugin']} on {group[0]['device']}, "
                "and would be one row. Compare them in two tables."
            )


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    several = len({r["device"] for r in found}) > 1
    lines = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    for r in found:
        name = f"`{r['plugin']}`" + ", compressed" * r["compressed"] + (f" on {r['device']}" if several else "")
        asked = f"{r['ratio asked']:g}x" if r["ratio asked"] else ""
        speed = "" if r["samples/s"] is None else f"{r['samples/s']:,.0f}"
        spreads = [f"{r[f'{metric} spread']:.4f}" if r["seeds"] > 1 else "" for metric in ("auc", "log_loss")]
        lines.append(
            f"| {name} | {asked} | {r['ratio']:,.1f}x | {r['bytes']:,} | {r['training bytes']:,} | {r['auc']:.4f} | "
            f"{spreads[0]} | {r['log_loss']:.4f} | {spreads[1]} | {speed} | "
            f"{r['minimum count']} | {r['rates']} | {r['seeds']} |"
        )
    return "\n".join(lines)


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """AUC against bytes to serve, a line per plugin; ``top_rows`` as the line to beat and ``exact`` dashed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for r in found:
        if r["plugin"] == "exact":
            style = "--" if r["minimum count"] > 1 else ":"
            label = f"exact, ids seen {r['minimum count']} times or more"
            axes.axhline(r["auc"], color="black", linestyle=style, linewidth=1, label=label)
            continue
        lines.setdefault(r["plugin"] + ", compressed" * r["compressed"], []).append(r)
    colours = pyplot.get_cmap("tab20").colors
    for number, (name, points) in enumerate(sorted(lines.items())):
        points.sort(key=lambda r: r["bytes"])
        line = {"color": "black", "linewidth": 2.5} if name == "top_rows" else {"color": colours[number % 20]}
        axes.errorbar(
            [r["bytes"] for r in points],
            [r["auc"] for r in points],
            yerr=[r["auc spread"] / 2 for r in points],
            marker="o",
            markersize=4,
            capsize=2,
            label=name + (", the line to beat" if name == "top_rows" else ""),
            **line,
        )
    axes.set(xscale="log", xlabel="bytes to serve, all tables", ylabel="test AUC, mean over seeds (bar: their spread)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def put(path: Path, text: str) -> None:
    """Replaces what lies between a file's markers."""
    whole = path.read_text()
    if not all(whole.count(marker) == 1 for marker in MARKERS):
        raise UserError(f"{path} must have one line {MARKERS[0]!r} and one {MARKERS[1]!r}, between which results go")
    head, rest = whole.split(MARKERS[0])
    path.write_text(f"{head}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for the user's mistakes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--into", type=Path, help="Markdown file with the two markers")
    given = parser.parse_args(arguments)
    try:
        for path in given.runs:
            if not path.exists():
                raise UserError(f"there is no run folder {path}")
        reports = [read(folder) for folder in given.runs if folder.is_dir()]  # of runs/* what is no folder is left out
        if not reports:
            raise UserError("none of these is a run folder; give the folders that launch/run.py wrote")
        check_alike(reports)
        found = rows(reports)
        if given.into is None:
            print(table(found))
            return 0
        picture = given.into.with_suffix(".png")
        put(given.into, f"{table(found)}\n\n![AUC against bytes]({picture.name})")
        plot(found, picture)
        print(f"wrote {given.into} and {picture}")
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
