"""What to choose: at each size the best method by its mean, what cannot be told apart from it, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from dlrm_xla_studies.statistics import EXACT, Interval, by_seed, interval

# Seeds below which no interval is worth a word.
LEAST_SEEDS = 2
# Methods of which one is chosen; the best of two says nothing of the others.
LEAST_METHODS = 3
SIZES = (10, 100, 1000)
# A method counts for a size that it all but reaches: the largest bag below a cap rarely meets it to the byte.
_NEARLY = 0.98


def choices(runs: pd.DataFrame, found: pd.DataFrame) -> list[dict[str, Any]]:
    """For each dataset, device and size: the choice, its change against exact tables, and its equals.

    Methods are compared on one set of seeds, that which takes in the most runs; those that lack one of it are not
    compared. Equals are methods whose paired difference to the choice has zero within its confidence interval. Methods
    of a single seed are in no ranking, and a size that too few methods reach has none.
    """
    rows = []
    for (data, device), here in found.groupby(["data", "device"], sort=False):
        able = here[(here["plugin"] != EXACT) & (here["seeds"] >= LEAST_SEEDS)]
        aucs = {k: by_seed(runs, row)["auc"] for k, row in able.iterrows()}
        for size in SIZES:
            group = able[able["compression_ratio"] >= _NEARLY * size]
            # A method that shrinks more than asked is compared at every size that it reaches.
            if group["plugin"].nunique() < LEAST_METHODS:
                continue
            seeds = _shared_seeds([frozenset(aucs[k].index) for k in group.index])
            compared = group[[seeds <= set(aucs[k].index) for k in group.index]]
            values = {k: aucs[k][sorted(seeds)] for k in compared.index}
            best = group.loc[max(values, key=lambda k: values[k].mean())]
            gaps = {k: interval((values[best.name] - values[k]).tolist()) for k in values if k != best.name}
            equals = [group.loc[k] for k, gap in gaps.items() if not gap.apart]
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
                    "worse": len(gaps) - len(equals),
                    "not_compared": [row for k, row in group.iterrows() if k not in values],
                    "fastest": fastest,
                    "leanest": leanest,
                    "smallest": smallest,
                }
            )
    return rows


def _shared_seeds(each: Sequence[frozenset[int]]) -> frozenset[int]:
    """Of these sets of seeds that which the most runs are of."""
    return max(dict.fromkeys(each), key=lambda seeds: len(seeds) * sum(seeds <= other for other in each))


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
