"""docs/results.md, docs/paper.md and a table of the README, made from one committed table of runs.

A number in the paper is asked of the table and links to its row in docs/results.md; the template holds no result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from dlrm_xla.errors import UserError
from dlrm_xla_studies import choice, figures, statistics
from dlrm_xla_studies.page import number, signed

TABLE = Path("docs/results.csv")
MARKERS = ("<!-- results: made by make results -->", "<!-- end of results -->")
# What is kept of a run; folders and times of a study are not.
COLUMNS = (
    "study", "kind", "plugin", "device", "preset", "batch_size", "epochs_asked", "seed", "auc", "log_loss", "accuracy",
    "base_rate_log_loss", "validation_auc", "validation_log_loss", "best_step", "embedding_bytes",
    "exact_embedding_bytes", "compression_ratio", "training_bytes", "table_rows", "train_samples_per_second",
    "step_ms_median", *statistics.SETTING, "data", "data_digest", "versions", "commit",
)  # fmt: skip


def keep(table: pd.DataFrame, root: Path) -> None:
    """Makes a study's runs the committed table."""
    columns = [name for name in dict.fromkeys(COLUMNS) if name in table]
    kept = table[table["kind"] == "run"][columns]
    statistics.check_alike(kept.assign(folder=table["folder"]))
    kept.to_csv(root / TABLE, index=False, lineterminator="\n")


def read(root: Path) -> pd.DataFrame:
    """The committed table."""
    table = pd.read_csv(root / TABLE)
    return table.assign(folder=[f"{TABLE} line {k}" for k in range(2, len(table) + 2)])


def documents(root: Path) -> dict[Path, str]:
    """The text of each document that is made from the table."""
    runs = read(root)
    warnings = statistics.check_alike(runs)
    found = statistics.summary(runs).sort_values(
        ["device", "compression_ratio", "plugin"], kind="stable", ignore_index=True
    )
    lookup = Lookup(runs, found)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dlrm_xla_studies", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "signed": signed}
    values: dict[str, Any] = {
        "runs": runs,
        "methods": [row for _, row in found.iterrows()],
        "decisions": choice.choices(runs, found),
        "change": choice.change,
        "verdict": choice.verdict,
        "name": choice.name,
        "warnings": warnings,
        "at": lookup,
        "confidence": round(100 * statistics.CONFIDENCE),
    }
    made = {
        root / "docs" / f"{name}.md": environment.get_template(f"{name}.md.jinja").render(values)
        for name in ("results", "paper")
    }
    readme = root / "README.md"
    made[readme] = between(readme, environment.get_template("readme.md.jinja").render(values))
    return made


class Lookup:
    """Figures of the table by method and ratio, each a link to its row."""

    def __init__(self, runs: pd.DataFrame, found: pd.DataFrame) -> None:
        self.runs, self.found = runs, found

    def row(self, plugin: str, ratio: float = 0, device: str = "cpu", min_count: int = 4) -> pd.Series:
        """One row of the summary; UserError where the table has none or several."""
        same = self.found[
            (self.found["plugin"] == plugin)
            & (self.found["ratio"].fillna(0) == ratio)
            & (self.found["device"] == device)
            & (self.found["min_count"] == min_count)
        ]
        if len(same) != 1:
            raise UserError(
                f"the paper asks for {plugin} at ratio {ratio:g} on {device}, minimum count {min_count}, and "
                f"{TABLE} has {len(same)} such rows"
            )
        return same.iloc[0]

    def has(self, plugin: str, *ratios: float) -> bool:
        """Whether the table has a method at all of these ratios, on CPU."""
        mine = self.found[(self.found["plugin"] == plugin) & (self.found["device"] == "cpu")]
        return set(ratios) <= set(mine["ratio"].fillna(0))

    def _linked(self, row: pd.Series, text: str) -> str:
        return f"[{text}](results.md#r{row.name})"

    def auc(self, plugin: str, ratio: float = 0, **where: Any) -> str:
        """Mean test AUC."""
        row = self.row(plugin, ratio, **where)
        return self._linked(row, number(row["auc_mean"], 4))

    def log_loss(self, plugin: str, ratio: float = 0, **where: Any) -> str:
        """Mean test log loss."""
        row = self.row(plugin, ratio, **where)
        return self._linked(row, number(row["log_loss_mean"], 4))

    def change(self, plugin: str, ratio: float = 0, **where: Any) -> str:
        """Change of AUC against exact tables, with its interval."""
        row = self.row(plugin, ratio, **where)
        gap = choice.change(row)
        return self._linked(row, f"{signed(gap.mean)} ({signed(gap.low)} to {signed(gap.high)})")

    def ratio(self, plugin: str, ratio: float = 0, **where: Any) -> str:
        """Compression ratio."""
        row = self.row(plugin, ratio, **where)
        return self._linked(row, f"{number(row['compression_ratio'], 1)}x")

    def bytes(self, plugin: str, ratio: float = 0, **where: Any) -> str:
        """Bytes to serve."""
        row = self.row(plugin, ratio, **where)
        return self._linked(row, number(row["embedding_bytes"]))

    def training_bytes(self, plugin: str, ratio: float = 0, **where: Any) -> str:
        """Bytes to train."""
        row = self.row(plugin, ratio, **where)
        return self._linked(row, number(row["training_bytes"]))

    def against(self, one: str, other: str, ratio: float) -> str:
        """Paired difference in AUC of two methods at a ratio, with its interval."""
        first, second = self.row(one, ratio), self.row(other, ratio)
        gap = statistics.compare(self.runs, first, second)
        return self._linked(first, f"{signed(gap.mean)} ({signed(gap.low)} to {signed(gap.high)})")


def between(path: Path, text: str) -> str:
    """The file with what lies between its markers replaced."""
    whole = path.read_text()
    if not all(whole.count(marker) == 1 for marker in MARKERS):
        raise UserError(f"{path} must have one line {MARKERS[0]!r} and one {MARKERS[1]!r}, between which results go")
    head, rest = whole.split(MARKERS[0])
    return f"{head}{MARKERS[0]}\n\n{text.strip()}\n\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}"


def draw(root: Path) -> list[Path]:
    """The documents' figures, as PNG."""
    found = statistics.summary(read(root))
    folder = root / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    names: Mapping[str, tuple[str, str]] = {
        "auc-bytes": ("auc", "embedding_bytes"),
        "auc-training-bytes": ("auc", "training_bytes"),
        "log-loss-bytes": ("log_loss", "embedding_bytes"),
    }
    for name, (metric, against) in names.items():
        figures.quality(found, metric, against, "cpu", folder, name, kinds=("png",))
    return [folder / f"{name}.png" for name in names]
