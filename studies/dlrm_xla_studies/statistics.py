"""Statistics over seeds: mean, standard error, and differences to exact tables on the same seeds.

A difference is paired: runs of one seed share initial values and the order of rows, so much of what varies from seed to
seed cancels. Its confidence interval is Student's, with n - 1 degrees of freedom: at three seeds 4.3 standard errors to
either side. Nothing is ranked by means alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from dlrm_xla.errors import UserError
from dlrm_xla_studies.results import SETTINGS

CONFIDENCE = 0.95
EXACT = "exact"
METRICS = ("auc", "log_loss")
# A method at a size: runs that agree in these differ by their seed alone.
SETTING = ("plugin", "device", "preset", "batch_size", "epochs_asked", *SETTINGS, "data")
# In these a method may differ from the exact tables that it is held against.
_OWN = ("plugin", "ratio", "min_rows", "row_lr", "plugin_lr", "dense_lr", "memory", "tables", "codebook_rows")
FIGURES = ("embedding_bytes", "exact_embedding_bytes", "training_bytes", "compression_ratio", "table_rows")


class Interval(NamedTuple):
    """A mean of ``n`` numbers, its standard error, and a confidence interval; NaN where n is too small."""

    mean: float
    error: float
    low: float
    high: float
    n: int

    @property
    def apart(self) -> bool:
        """Whether zero is outside the interval."""
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """mean ± t_(n-1) s / sqrt(n)."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, math.nan, n)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Interval(mean, error, mean - half, mean + half, n)


def check_alike(runs: pd.DataFrame) -> list[str]:
    """Refuses runs on different rows under one name; returns warnings where versions or datasets are several.

    Synthetic rows are drawn from the seed and other settings, so those are not compared.
    """
    real = runs[runs["data"] != "synthetic"]
    for data, group in real.groupby("data"):
        for column in ("data_digest", "exact_embedding_bytes"):
            if column not in group or group[column].nunique() < 2:
                continue
            if column == "exact_embedding_bytes" and group["dim"].nunique() > 1:
                continue
            first, second = group.drop_duplicates(column)["folder"].tolist()[:2]
            raise UserError(
                f"runs on different rows are mixed: {data} of {first} is not that of {second}. Put the runs of each "
                "dataset into a table of their own."
            )
    found = []
    if runs["data"].nunique() > 1:
        found.append(
            f"runs on {', '.join(sorted(runs['data'].unique()))}: each is compared with its own exact tables only"
        )
    if runs["versions"].nunique() > 1:
        found.append(f"runs of different versions are mixed: {_differing(runs['versions'].unique())}")
    if "commit" in runs and runs["commit"].nunique(dropna=False) > 1:
        found.append(f"runs of {runs['commit'].nunique(dropna=False)} commits of this project are mixed")
    return found


def _differing(versions: Sequence[str]) -> str:
    import json

    read = [json.loads(v) for v in versions]
    names = sorted({name for one in read for name in one if len({str(r.get(name)) for r in read}) > 1})
    return ", ".join(f"{n} {' and '.join(sorted({str(r.get(n, 'none')) for r in read}))}" for n in names)


def _present(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in table]


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each method at a size: figures over seeds, and paired differences to exact tables.

    Columns beside the settings: ``seeds``, and of each metric ``_mean``, ``_error``; of its difference to exact
    ``_change``, ``_change_low``, ``_change_high``, ``_change_seeds``; ``samples_per_second`` (median), ``step_ms``.
    """
    keys = _present(runs, SETTING)
    own = [key for key in keys if key not in _OWN]
    plain = runs.copy()
    # NaN is not equal to itself; a text is.
    plain[keys] = plain[keys].astype(object).where(plain[keys].notna(), "")
    exact = {key: _best_exact(group, keys) for key, group in plain[plain["plugin"] == EXACT].groupby(own, sort=False)}
    rows = []
    for key, group in plain.groupby(keys, sort=False):
        setting = dict(zip(keys, key, strict=True))
        if group["seed"].duplicated().any():
            raise UserError(
                f"two runs of {setting['plugin']} on {setting['device']} have one seed and all settings alike: "
                f"{', '.join(group[group['seed'].duplicated(keep=False)]['folder'])}. Leave one of them out."
            )
        reference = exact.get(_key(group, own))
        rows.append(setting | _figures(group) | _changes(group.set_index("seed"), reference))
    return pd.DataFrame(rows)


def _key(group: pd.DataFrame, own: Sequence[str]) -> Hashable:
    return tuple(group.iloc[0][name] for name in own)


def _best_exact(group: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Of exact tables at several rates those of most seeds, then lowest mean validation log loss, by seed."""
    each = [one for _, one in group.groupby(list(keys), sort=False)]
    return min(each, key=lambda one: (-len(one), one["validation_log_loss"].mean())).set_index("seed")


def _figures(group: pd.DataFrame) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len(group)}
    row |= {name: group[name].mean() for name in _present(group, FIGURES)}
    row["samples_per_second"] = group["train_samples_per_second"].median()
    row["step_ms"] = group["step_ms_median"].median()
    for metric in METRICS:
        found = interval(group[metric].tolist())
        row |= {f"{metric}_mean": found.mean, f"{metric}_error": found.error}
    return row


def _changes(group: pd.DataFrame, exact: pd.DataFrame | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    shared = [seed for seed in group.index if exact is not None and seed in exact.index]
    for metric in METRICS:
        differences = [group.at[s, metric] - exact.at[s, metric] for s in shared] if exact is not None else []
        found = interval(differences)
        row[f"{metric}_change"], row[f"{metric}_change_seeds"] = found.mean, found.n
        row[f"{metric}_change_low"], row[f"{metric}_change_high"] = found.low, found.high
    return row


def compare(runs: pd.DataFrame, first: pd.Series, second: pd.Series, metric: str = "auc") -> Interval:
    """The paired difference of two rows of a summary, first minus second."""
    one, other = (by_seed(runs, row)[metric] for row in (first, second))
    return interval([one[s] - other[s] for s in one.index if s in other.index])


def by_seed(runs: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    """The runs of a row of a summary."""
    keys = _present(runs, SETTING)
    plain = runs[keys].astype(object).where(runs[keys].notna(), "")
    chosen = (plain == pd.Series({key: row[key] for key in keys})).all(axis=1)
    return runs[chosen].set_index("seed")
