"""Draws docs/tpu.png from what launch/tpu_theory.py found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from dlrm_xla.tpu import CHIPS, LINE_BYTES, storage_bytes

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(found: dict[str, Any], path: Path) -> None:
    """Four panels: bytes a row, what an update moves, one-hot against gather, families by rows."""
    figure, ((left, right), (below, corner)) = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    _row_bytes(left, found["storage"], found["programs"])
    _updates(right, found["programs"])
    _one_hot(below, found)
    _families(corner, found["families"])
    figure.savefig(path, dpi=90)


def _row_bytes(axes: Any, storage: dict[str, Any], programs: dict[str, Any]) -> None:
    dims, rows = [2**k for k in range(2, 9)], 1_000_000
    axes.plot(dims, [storage_bytes((rows, d)) / rows for d in dims], "o-", label="stored, the compiler's layout")
    axes.plot(dims, [max(d, 128) * 4 for d in dims], "--", label="stored, if row-major")
    moved = {d: _moved(programs[f"v5e lookup float32 {d}"]) for d in (16, 64, 128, 256)}
    axes.plot(*zip(*moved.items(), strict=True), "s", label="moved by a lookup on v5e")
    axes.annotate(
        "after a copy of the table", (64, moved[64]), (0, 8), textcoords="offset points", ha="center", fontsize=7
    )
    axes.plot(dims, [max(d, 128) * 4 for d in dims], "x", label="moved by a lookup, packed")
    axes.set(xscale="log", yscale="log", xlabel="columns", ylabel="bytes a row", xticks=dims, xticklabels=dims)
    count = sum(v["grid"] + v["tables"] for k, v in storage.items() if k in CHIPS)
    wrong = sum(len(v["wrong"]) for k, v in storage.items() if k in CHIPS)
    axes.set_title(f"1, 2. Storage: model and compiler differ in {wrong} of {count:,} arrays", fontsize=9)
    axes.legend(fontsize=7)


def _moved(case: dict[str, Any]) -> float:
    """Bytes that a lookup's kernel copies from HBM for each of its rows, those of its last block among them."""
    kernel = case["kernels"][0]
    return float(kernel["copied_bytes"]["hbm_to_vmem"] / kernel["copies"]["hbm_to_vmem"])


def _updates(axes: Any, programs: dict[str, Any]) -> None:
    chips = [name for name in CHIPS if f"{name} update float32 128" in programs]
    ways = {"scatter, sorted": " sorted", "scatter": "", "kernel": " kernel"}
    for place, (label, suffix) in enumerate(ways.items()):
        times = []
        for name in chips:
            case = programs.get(f"{name} update float32 128{suffix}")
            times.append(update_ms(CHIPS[name], case, suffix == " sorted") if case else 0)
        axes.bar([i + 0.27 * place for i in range(len(chips))], times, 0.25, label=label)
    axes.set(yscale="log", ylabel="ms, no waiting", xticks=[i + 0.27 for i in range(len(chips))], xticklabels=chips)
    axes.set_title("4, 8. Update of 53,248 of 4.2M lines: bytes or bundles, the slower", fontsize=9)
    axes.legend(fontsize=7)


def update_ms(chip: Any, case: dict[str, Any], streams: bool) -> float:
    """The slower of moving what the program copies and of issuing its bundles."""
    kernel = case["kernels"][0]
    moved = 2 * 4_220_323 * LINE_BYTES if streams else sum(kernel["copied_bytes"].values())
    return float(1000 * max(moved / chip.hbm_bytes_per_second, kernel["issued"] / chip.clock_hz))


def _one_hot(axes: Any, found: dict[str, Any]) -> None:
    rows = [128, 512, 2048, 8192, 32768]
    for name, colour in (("v5e", "C0"), ("v6e", "C1")):
        for dim, style in ((16, "-"), (128, "--")):
            cycles = [found["one_hot"][f"{name} {dim} {r}"] for r in rows]
            axes.plot(rows, cycles, style, color=colour, marker="o", ms=3, label=f"{name}, {dim} columns")
        issued = found["programs"][f"{name} lookup float32 128"]["kernels"][0]["issued"] * 2048 / 53_248
        axes.axhline(issued, color=colour, ls=":", label=f"{name}, gather (issued)")
    axes.set(xscale="log", yscale="log", xlabel="rows of the table", ylabel="cycles for 2,048 ids")
    axes.set_title("6. One-hot product against gather", fontsize=9)
    axes.legend(fontsize=7)


def _families(axes: Any, families: dict[str, Any]) -> None:
    names = dict.fromkeys(key.split()[1] for key in families if key.startswith("v5e ") and "error" not in families[key])
    for name in names:
        cells = [(r, families.get(f"v5e {name} {r}", {})) for r in (10**4, 10**6, 10**8)]
        axes.plot(
            *zip(*[(r, c["argument_bytes"]) for r, c in cells if "argument_bytes" in c], strict=True), "o-", label=name
        )
    axes.set(xscale="log", yscale="log", xlabel="rows of the feature", ylabel="bytes on v5e")
    axes.set_title("7. Storage of one bag of 16 columns, by the compiler", fontsize=9)
    axes.legend(fontsize=6)
