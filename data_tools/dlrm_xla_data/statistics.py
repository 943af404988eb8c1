"""What a dataset's tables look like: what to read before choosing plugins."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm_xla_data.prepared import SPLITS, PreparedDataset, read_meta

TOP = (10, 100, 1_000, 10_000, 100_000)
_ROWS = 2**18


def statistics(dataset: PreparedDataset, missing: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """Rows, clicks and, for each table, how its ids are distributed.

    Of a table: ``rows`` with id 0; ``singletons``, the share of ids that occur once in training; ``top``, the share of
    training lookups that the k most frequent ids have; ``rows_for``, how many of them have 90, 99 and 99.9 %;
    ``zero_train`` and ``zero_test``, the share of lookups of id 0, which are missing, unseen in training, or left out
    there as too rare; an empty bag counts as one. From ``missing``, the rows of each part without a value: ``missing``,
    their share in training, and ``unseen_test``, the share of test lookups whose value no id stands for; None where
    there are no such rows, or nobody counted. ``exponent`` is the slope of log count against log rank, least squares
    over powers of two.
    """
    lookups = {split: _lookups(dataset, split) for split in ("train", "test")}

    def missing_share(split: str, k: int) -> float | None:
        start, stop = dataset.splits[split]
        # A column with empty bags has no other missing values; datasets of before these were counted say it has none.
        if not missing or start == stop:
            return None
        return (lookups[split].empty[k] or missing[split][k]) / (stop - start)

    def unseen_share(k: int) -> float | None:
        test, share = lookups["test"], missing_share("test", k)
        if share is None:
            return None
        return test.zeros[k] / test.lookups[k] if test.empty[k] else test.zero_share(k) - share

    tables = []
    for k, (name, counts) in enumerate(zip(dataset.names, dataset.counts, strict=True)):
        total = max(1, int(counts.sum()))
        reached = np.cumsum(counts) / total
        tables.append(
            {
                "table": name,
                "rows": 1 + len(counts),
                "bag_length": dataset.bag_lengths[k],
                "singletons": float((np.asarray(counts) == 1).mean()) if len(counts) else 0.0,
                "top": {str(n): float(reached[min(n, len(counts)) - 1]) if len(counts) else 0.0 for n in TOP},
                "rows_for": {
                    str(s): int(np.searchsorted(reached, s) + 1) if len(counts) else 0 for s in (0.9, 0.99, 0.999)
                },
                "exponent": _exponent(counts),
                "zero_train": lookups["train"].zero_share(k),
                "zero_test": lookups["test"].zero_share(k),
                "missing": missing_share("train", k),
                "unseen_test": unseen_share(k),
            }
        )
    return {
        "rows": len(dataset.labels),
        "splits": {name: list(dataset.splits[name]) for name in SPLITS},
        "click_rate": {name: _known(dataset.click_rate(name)) for name in SPLITS},
        "total_table_rows": sum(t["rows"] for t in tables),
        "tables": tables,
    }


@dataclass(frozen=True)
class _Lookups:
    """Of each table the lookups of a split, how many of them are of id 0, and how many are bags that hold none."""

    lookups: list[int]
    zeros: list[int]
    empty: list[int]

    def zero_share(self, k: int) -> float:
        return (self.zeros[k] + self.empty[k]) / max(1, self.lookups[k])


def _lookups(dataset: PreparedDataset, split: str) -> _Lookups:
    start, stop = dataset.splits[split]
    found = np.zeros((3, len(dataset.names)), np.int64)
    firsts = np.cumsum([0, *dataset.bag_lengths])
    for first in range(start, stop, _ROWS):
        slots = dataset.slots(np.arange(first, min(first + _ROWS, stop)))
        for k in range(len(dataset.names)):
            of_table = slots[:, firsts[k] : firsts[k + 1]]
            empty = (of_table < 0).all(1).sum()
            found[:, k] += ((of_table >= 0).sum() + empty, (of_table == 0).sum(), empty)
    return _Lookups(*found.tolist())


def zero_shares(dataset: PreparedDataset, split: str) -> list[float]:
    """For each table the share of a split's lookups that are of id 0; an empty bag is one of them."""
    found = _lookups(dataset, split)
    return [found.zero_share(k) for k in range(len(dataset.names))]


def _known(rate: float) -> float | None:
    return None if math.isnan(rate) else rate


def _exponent(counts: Any) -> float | None:
    ranks = 2 ** np.arange(int(np.log2(len(counts))) + 1) if len(counts) else np.zeros(0, np.int64)
    if len(ranks) < 3:
        return None
    return float(-np.polyfit(np.log(ranks), np.log(np.maximum(1, np.asarray(counts)[ranks - 1])), 1)[0])


def table_text(found: dict[str, Any]) -> str:
    """The figures as a table to read in a terminal."""
    head = (
        f"{'table':12s} {'rows':>12s} {'bag':>4s} {'once':>6s} {'top 100':>8s} {'top 10k':>8s} {'rows for 99 %':>14s} "
    )
    head += f"{'missing':>8s} {'unseen in test':>15s} {'slope':>6s}"
    lines = [head]
    for t in sorted(found["tables"], key=lambda t: -t["rows"]):
        slope = "" if t["exponent"] is None else f"{t['exponent']:.2f}"
        lines.append(
            f"{t['table'][:12]:12s} {t['rows']:12,} {t['bag_length']:4} {t['singletons']:6.1%} {t['top']['100']:8.1%} "
            f"{t['top']['10000']:8.1%} {t['rows_for']['0.99']:14,} "
            f"{_share(t['missing']):>8s} {_share(t['unseen_test']):>15s} {slope:>6s}"
        )
    rates = ", ".join(f"{name} {rate:.4f}" for name, rate in found["click_rate"].items() if rate is not None)
    lines.append(f"{found['rows']:,} rows, {found['total_table_rows']:,} rows of tables; click rate: {rates}")
    return "\n".join(lines)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def write_statistics(folder: Path, dataset: PreparedDataset, out: Path) -> dict[str, Any]:
    """Writes ``stats.json`` and ``stats.png`` to a folder and returns the figures."""
    meta = read_meta(folder)
    found = statistics(dataset, meta.get("missing"))
    for name in ("files", "layout", "options", "bad_rows"):
        if name in meta:
            found[name] = meta[name]
    out.mkdir(parents=True, exist_ok=True)
    (out / "stats.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(dataset, found, out / "stats.png")
    return found


def plot(dataset: PreparedDataset, found: dict[str, Any], path: Path) -> None:
    """A page: frequency against rank of every table, what the top k ids cover, and rows of each table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ranks, cover, rows) = pyplot.subplots(1, 3, figsize=(18, 6), layout="constrained")
    order = sorted(range(len(dataset.names)), key=lambda k: -len(dataset.counts[k]))
    colors = pyplot.get_cmap("viridis")(np.linspace(0, 0.95, max(1, len(order))))
    for color, k in zip(colors, order, strict=True):
        counts = dataset.counts[k]
        if not len(counts):
            continue
        at = np.unique(np.geomspace(1, len(counts), 200).astype(int))
        ranks.loglog(at, np.asarray(counts)[at - 1], color=color, linewidth=1, label=dataset.names[k])
        cover.semilogx(at, np.cumsum(counts)[at - 1] / counts.sum(), color=color, linewidth=1)
    ranks.set(title="How often ids occur in training", xlabel="rank of the id", ylabel="occurrences")
    ranks.legend(fontsize=6, ncols=2, title="tables, largest first", title_fontsize=6)
    cover.set(title="Lookups that the most frequent ids have", xlabel="k", ylabel="share of lookups", ylim=(0, 1.02))
    names = [dataset.names[k] for k in order]
    sizes = [1 + len(dataset.counts[k]) for k in order]
    needed = [found["tables"][k]["rows_for"]["0.99"] for k in order]
    places = np.arange(len(order))
    rows.bar(places - 0.2, sizes, 0.4, label="rows")
    rows.bar(places + 0.2, np.maximum(1, needed), 0.4, label="rows that 99 % of lookups need")
    rows.set_yscale("log")
    rows.set_xticks(places, names, rotation=90, fontsize=7)
    rows.set(title="Rows of tables")
    rows.legend()
    for axes in (ranks, cover, rows):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
