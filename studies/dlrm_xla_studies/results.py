"""Results as one table: a row per finished run, trial, compilation, and measured case of a benchmark."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dlrm_xla.config import Config
from dlrm_xla.registry import EXACT
from dlrm_xla.run_folder import read_finished
from dlrm_xla_studies.families import MIXED
from dlrm_xla_studies.folders import folder_of
from dlrm_xla_studies.grid import OF_FILES, Cell
from dlrm_xla_studies.runner import FINISHED, whole_report

TABLE = "results.parquet"
# Settings that a report has itself.
_IN_REPORT = ("plugin", "device", "preset", "batch_size", "epochs", "seed", "data")
# All others tell runs apart.
SETTINGS = tuple(f.name for f in dataclasses.fields(Config) if f.name not in _IN_REPORT + OF_FILES)
# What an undisturbed study and one that was killed and resumed agree in.
TIMES = ("train_samples_per_second", "step_ms_median", "seconds", "attempts", "ms_median", "ms_min", "gb_per_s",
         "share_of_copy", "ratio_to_best_other", "ratio_to_1M", "ratio_to_exact", "folder", "compiles",
         "ms_by_part")  # fmt: skip


def read_run(folder: Path) -> dict[str, Any]:
    """A training run's row: its report, flat, with the settings that tell it apart. UserError where it is none."""
    report, plain, trained = read_finished(folder)
    tables = report.pop("tables", [])
    row = {key: value for key, value in report.items() if not isinstance(value, dict | list)}
    row["plugin"] = label(report["plugin"], plain.get("tables", {}), report["tables_with_plugin"])
    row["training_bytes"] = trained
    row["table_rows"] = sum(t.get("rows", 0) for t in tables)
    # A setting that an older version did not have was as it is by default.
    row |= {key: _flat(plain.get(key, getattr(Config(), key))) for key in SETTINGS}
    row["epochs_asked"] = plain.get("epochs")
    row["data"] = Path(str(plain.get("data") or "synthetic")).name
    row["data_digest"] = report.get("data", {}).get("rows", "")
    row["versions"] = json.dumps(report.get("versions", {}), sort_keys=True)
    row["kind"], row["folder"] = "run", str(folder)
    return row


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def label(plugin: str, single: Mapping[str, str], replaced: int) -> str:
    """What a run is called: its plugin, and after MIXED the tables that another one is given for.

    ``replaced`` is how many tables a plugin replaced: where none was, all are exact, whatever was asked for them.
    """
    others: dict[str, list[str]] = {}
    for table, plugin_of_table in single.items():
        if plugin_of_table != plugin:
            others.setdefault(plugin_of_table, []).append(table)
    if not others or (plugin == EXACT and not replaced):
        return plugin
    return plugin + MIXED + "; ".join(f"{one} for {', '.join(tables)}" for one, tables in others.items())


def rows_of(cell: Cell, folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished cell."""
    if cell.tool == "run":
        return [read_run(folder / "run") | {"kind": "trial" if cell.trial else "run"}]
    report = whole_report(cell, folder)
    rows = [_compiled(report)] if cell.tool == "compile" else report
    settings = {k: _flat(v) for k, v in cell.settings.items()}
    found = []
    for row in rows:
        flat = {k: json.dumps(v, sort_keys=True) if isinstance(v, dict | list) else v for k, v in row.items()}
        found.append({**settings, **flat, "kind": cell.tool, "folder": str(folder)})
    return found


def _compiled(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a table keeps of a compilation: figures, and of lists their length."""
    row: dict[str, Any] = {key: len(value) if isinstance(value, list) else value for key, value in report.items()}
    row["ms_by_part"] = row.pop("parts_ms", None)
    row["forward_ms"] = (row.pop("forward", None) or {}).get("estimated_ms")
    return {key: value for key, value in row.items() if not isinstance(value, dict) or key == "ms_by_part"}


def table(name: str, out: Path, cells: Sequence[Cell], states: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """All rows of a study, in the order of its cells."""
    rows = []
    for cell in cells:
        state = states[cell.id]
        if state["status"] == FINISHED:
            extra = {
                "study": name,
                "cell": cell.id,
                "trial": cell.trial or None,
                "seconds": state["seconds"],
                "attempts": state["attempts"],
            }
            for row in rows_of(cell, folder_of(out, cell)):
                known = {} if state["seconds"] else {"seconds": _seconds_of_steps(row)}
                rows.append({**extra, **row, **known})
    return frame(rows)


def _seconds_of_steps(row: Mapping[str, Any]) -> float | None:
    """What the steps of a run took, by its own report, where nobody measured the call."""
    return row["steps"] * row["step_ms_median"] / 1000 if row["step_ms_median"] else None


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of several kinds in one table; what a row has not is null."""
    made = pd.DataFrame(list(rows))
    for column in made.columns:
        if made[column].map(type).nunique() > 1 and made[column].dtype == object:
            # None beside numbers; anything else that is mixed becomes text.
            numbers = pd.to_numeric(made[column], errors="coerce")
            made[column] = numbers if numbers.notna().sum() == made[column].notna().sum() else made[column].map(
                lambda v: None if v is None or v != v else str(v)
            )  # fmt: skip
    return made


def write(name: str, out: Path, cells: Sequence[Cell], states: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Writes the table as Parquet, in one piece, and returns it; one without a row replaces none."""
    made = table(name, out, cells, states)
    if not len(made) and (out / TABLE).exists():
        return made
    unfinished = out / f"{TABLE}.unfinished"
    made.to_parquet(unfinished, index=False)
    os.replace(unfinished, out / TABLE)
    return made


def told(out: Path, cell: Cell) -> str:
    """The figures of a finished cell in a few words."""
    report = whole_report(cell, folder_of(out, cell))
    if report is None:
        return ""
    if cell.tool == "run":
        auc, loss = ("none" if v is None else f"{v:.4f}" for v in (report["auc"], report["log_loss"]))
        return f"AUC {auc}, log loss {loss}, {report['embedding_bytes']:,} bytes"
    if cell.tool == "compile":
        estimated = report["estimated_ms"]
        return f"{estimated:.3f} ms estimated" if estimated is not None else "no estimate"
    return ", ".join(f"{row['name']} {row['ms_median']:.2f} ms" for row in report)
