"""The table and the plots of several compiled steps, for `launch/compile_tpu.py --compare`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from dlrm_xla.errors import UserError

TITLES = [
    *("chip", "chips", "plugin", "batch", "dim", "fits", "arguments GB", "temporaries GB", "known cycles", "bytes GB"),
    *("estimated ms", "of it modelled", "between chips", "lower bound ms", "forward ms", "table copies"),
]


def check_out(out: Path | None, compare: bool) -> None:
    """Refuses a place that cannot be written to before anything is compiled."""
    if out is None:
        return
    if compare:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; with --compare it is a folder")
    elif out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} must be a file in a folder that exists")
    whole = out.absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not (there == whole or there.is_dir()) or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: {there} cannot be written to; name a place of yours")


def write(reports: Sequence[dict[str, Any]], out: Path | None) -> None:
    """Prints the table; with a folder, made where there is none, also writes it, the reports as JSON and the plots."""
    table = markdown(reports)
    print(table)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "reports.json").write_text(json.dumps(list(reports), indent=1) + "\n")
        (out / "table.md").write_text(table + "\n")
        plot(reports, out)


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """One row per report."""
    rows = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    return "\n".join(rows + ["| " + " | ".join(_row(r)) + " |" for r in reports])


def _row(r: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value / scale, form)

    return [
        r["chip"],
        str(r["chips"]),
        r["plugin"],
        str(r["batch_size"]),
        str(r["dim"]),
        "yes" if r["fits"] else "no",
        number(r["argument_bytes"], ",.2f", 1e9),
        number(r["temporary_bytes"], ",.3f", 1e9),
        number(r["known_cycles"], ",.0f"),
        number(r["bytes_accessed"], ",.3f", 1e9),
        number(r["estimated_ms"], ",.3f"),
        number(r["modelled_ms"], ",.3f"),
        number(r["collective_ms"], ",.3f"),
        number(r["lower_bound_ms"], ",.3f"),
        number(r["forward"]["estimated_ms"], ",.3f"),
        str(len(r["whole_table_copies"]) + len(r["forward"]["whole_table_copies"])),
    ]


def plot(reports: Sequence[dict[str, Any]], folder: Path) -> None:
    """Bars of time, of memory against the chip's, and of the share of each part."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{r['plugin']}\n{r['chips']} x {r['chip']}, batch {r['batch_size']}, dim {r['dim']}" for r in reports]
    figure, (time, memory, share) = pyplot.subplots(1, 3, figsize=(18, 2 + 0.5 * len(reports)), sharey=True)
    places = list(range(len(reports)))[::-1]
    known, modelled = ([r[key] or 0.0 for r in reports] for key in ("known_ms", "modelled_ms"))
    time.barh(places, known, label="compiler's cycles")
    time.barh(places, modelled, left=known, label="model")
    both = [a + b for a, b in zip(known, modelled, strict=True)]
    if any(r["collective_ms"] for r in reports):
        time.barh(places, [r["collective_ms"] or 0.0 for r in reports], left=both, label="between chips")
    time.plot([r["lower_bound_ms"] for r in reports], places, "k|", markersize=14, label="lower bound")
    time.set_xlabel("ms of a train step, estimated")
    memory.barh(places, [r["argument_bytes"] / 1e9 for r in reports], label="arguments")
    memory.barh(
        places,
        [(r["temporary_bytes"] or 0) / 1e9 for r in reports],
        left=[r["argument_bytes"] / 1e9 for r in reports],
        label="temporaries",
    )
    memory.plot([r["hbm_bytes"] / 1e9 for r in reports], places, "k|", markersize=14, label="HBM")
    memory.set_xlabel("GB on the chip")
    names = list(dict.fromkeys(name for r in reports for name in list(r["parts_ms"])[:5]))
    left = [0.0] * len(reports)
    for name in names:
        widths = [r["parts_ms"].get(name, 0.0) / max(sum(r["parts_ms"].values()), 1e-9) for r in reports]
        share.barh(places, widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    share.set_xlabel("share of the train step's time")
    for axes in (time, memory, share):
        axes.set_yticks(places, labels)
        if axes.get_legend_handles_labels()[0]:  # no part has a time where nothing fits
            axes.legend(fontsize="small", ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(folder / "compare.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
