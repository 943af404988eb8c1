"""What to choose: at each size the best method by its mean, what cannot be told apart from it, and what that costs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from dlrm_xla_studies.statistics import EXACT, Interval, compare

# Seeds below which no interval is worth a word.
LEAST_SEEDS = 2
# Methods of which one is chosen; the best of two says nothing of the others.
LEAST_METHODS = 3
SIZES = (10, 100, 1000)
# A method counts for a size that it all but reaches: the largest bag below a cap rarely meets it to the byte.
_NEARLY = 0.98


def choices(runs: pd.DataFrame, found: pd.DataFrame) -> list[dict[str, Any]]:
    """For each dataset, device and size: the choice, its change against exact tables, and its equals.

    Equals are methods whose paired difference to the choice has zero within its confidence interval. Methods that have
    fewer seeds in common with it than a difference takes are not compared. Methods of a single seed are in no ranking,
    and a device on which too few methods ran has none.
    """
    rows = []
    for (data, device), here in found.groupby(["data", "device"], sort=False):
        able = here[(here["plugin"] != EXACT) & (here["seeds"] >= LEAST_SEEDS)]
        if able["plugin"].nunique() < LEAST_METHODS:
            continue
        for size in SIZES:
            group = able[able["compression_ratio"] >= _NEARLY * size]
            # A method that shrinks more than asked is compared at every size that it reaches.
            if group.empty:
                continue
            best = group.loc[group["auc_mean"].idxmax()]
            others = [(row, compare(runs, best, row)) for k, row in group.iterrows() if k != best.name]
            compared = [(row, gap) for row, gap in others if gap.n >= LEAST_SEEDS]
            equals = [row for row, gap in compared if not gap.apart]
            fastest = max([best, *equals], key=lambda row: row["samples_per_second"])
            leanest = min([best, *equals], key=lambda row: row["training_bytes"])
            smallest = min([best, *equals], key=lambda row: row["embedding_bytes"])
            rows.append(
                {
                    "data": data,
                    "device": device,
                    "size": size,
                    "choice": best,
                    "change": change(best),
                    "equals": sorted(equals, key=lambda row: -row["auc_mean"]),
                    "worse": len(compared) - len(equals),
                    "not_compared": [row for row, gap in others if gap.n < LEAST_SEEDS],
                    "fastest": fastest,
                    "leanest": leanest,
                    "smallest": smallest,
                }
            )
    return rows


def change(row: pd.Series, metric: str = "auc") -> Interval:
    """A summary's difference to exact tables, as an interval."""
    low, high = row[f"{metric}_change_low"], row[f"{metric}_change_high"]
    return Interval(row[f"{metric}_change"], float("nan"), low, high, int(row[f"{metric}_change_seeds"]))


def verdict(gap: Interval) -> str:
    """What an interval of a change in AUC says, in words."""
    if gap.n < LEAST_SEEDS:
        return "too few seeds to tell"
    if not gap.apart:
        return "not told apart from exact"
    return "better than exact" if gap.low > 0 else "worse than exact"


def name(row: pd.Series) -> str:
    """A method at its size."""
    ratio = row.get("ratio")
    return f"{row['plugin']} at {row['compression_ratio']:,.0f}x" if not ratio or ratio != ratio else (
        f"{row['plugin']} {ratio:g}x"
    )  # fmt: skip
