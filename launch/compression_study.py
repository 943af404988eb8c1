"""When is the randomized algorithm enough? Truncated SVD of tables: optimal, by LAPACK, and randomized.

python launch/compression_study.py --rows 10000 100000 1000000 --dim 16 64 128 --out study.json
python launch/compression_study.py --rows 100000000 --dim 16 --file table.bin --out large.json
python launch/compression_study.py --trained RUN/checkpoints/best.safetensors --rank 4 --out trained.json

For tables of a decaying, a flat and a clustered spectrum: time, error over the least there is, and what the theorems of
Halko, Martinsson and Tropp allow. ``--file`` keeps the table on disk, where it is read in blocks. Writes JSON, one
object a row, and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dlrm_xla_plugins.directions import error_factor, gram, random_directions, top_directions
from torch import Tensor
from tqdm import tqdm

from dlrm_xla.device import Device
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.run_folder import versions
from dlrm_xla.tensor_file import opened
from dlrm_xla.trained_rows import BLOCK_ROWS, TrainedRows

SPECTRA = ("decaying", "flat", "clustered")
# LAPACK's full decomposition is left out beyond so many numbers: it takes minutes, and several copies of the table.
LAPACK_NUMBERS = 2**28


def block_of(spectrum: str, dim: int, start: int, count: int) -> Tensor:
    """Rows ``start`` on of a table, the same whenever they are asked for; another ``start`` draws other rows.

    decaying: normal times 0.8^j in random directions; flat: normal; clustered: 100 centres, and a tenth of noise.
    """
    shared = np.random.default_rng(1)
    directions = np.linalg.qr(shared.normal(size=(dim, dim)))[0]
    centres = shared.normal(size=(100, dim))
    own = np.random.default_rng([2, start])
    rows = own.standard_normal((count, dim), np.float32)
    if spectrum == "decaying":
        rows = rows * (0.8 ** np.arange(dim)).astype(np.float32) @ directions.astype(np.float32)
    elif spectrum == "clustered":
        rows = centres.astype(np.float32)[own.integers(0, 100, count)] + 0.1 * rows
    return torch.from_numpy(rows)


def table(spectrum: str, rows: int, dim: int, file: Path | None) -> TrainedRows:
    """A table in memory, or read from a file that is written now."""
    starts = range(0, rows, BLOCK_ROWS)
    if file is None:
        return TrainedRows.of(torch.cat([block_of(spectrum, dim, s, min(BLOCK_ROWS, rows - s)) for s in starts]))
    with file.open("wb") as out:
        for start in tqdm(starts, desc=f"writing {file}", unit="block", file=sys.stderr, disable=None):
            block_of(spectrum, dim, start, min(BLOCK_ROWS, rows - start)).numpy().tofile(out)

    def read(start: int, stop: int) -> Tensor:
        return torch.from_numpy(
            np.fromfile(file, np.float32, (stop - start) * dim, offset=start * dim * 4).reshape(-1, dim)
        )

    return TrainedRows(read, rows, dim)


def trained(path: Path) -> dict[str, Tensor]:
    """The larger exact tables of a checkpoint by name."""
    with opened(path) as file:
        names = [n for n in file.names if n.startswith("model.bags.") and n.endswith(".weight")]
        large = sorted((n for n in names if file.shape(n)[0] >= 1000), key=lambda n: int(n.split(".")[2]))
        tables = {f"table {n.split('.')[2]}": file.tensor(n).clone() for n in large}
    if not tables:
        raise UserError(f"{path} has no exact table of 1,000 rows and more")
    return tables


def lapack(rows: TrainedRows, rank: int) -> Tensor:
    """Leading directions by LAPACK's singular value decomposition of the whole table."""
    return torch.from_numpy(np.linalg.svd(rows.whole().numpy(), full_matrices=False)[2][:rank].copy())


def squared_loss(rows: TrainedRows, basis: Tensor) -> float:
    """||W - W V^T V||_F^2."""
    total = 0.0
    for _, block in rows.blocks():
        total += float((block - block @ basis.t() @ basis).double().square().sum())
    return total


def methods(rows: TrainedRows, rank: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Makers of bases [rank, D] by name; ours stream, LAPACK has the table whole, on the host."""
    found: dict[str, Callable[[], Tensor]] = {"optimal, streamed": lambda: top_directions(rows, rank, device)}
    for power in (0, 1, 2):
        found[f"randomized, power {power}"] = partial(random_directions, rows, rank, power, device=device)
    if rows.num_rows * rows.dim <= LAPACK_NUMBERS:
        found["LAPACK"] = lambda: lapack(rows, rank)
    return found


def measure(spectrum: str, rows: TrainedRows, rank: int, repeat: int, device: Device) -> list[dict[str, Any]]:
    """One object per method: median seconds, error over the least, and the bound of that where there is one."""
    eigenvalues = torch.linalg.eigvalsh(gram(rows)).flip(0).clamp(min=0)
    least = float(eigenvalues[rank:].sum())
    found = []
    for name, make in methods(rows, rank, device.torch_device).items():
        if device.name == "xla":
            make()  # compiles
        seconds = []
        for _ in range(repeat if name != "LAPACK" else 1):
            began = time.perf_counter()
            basis = make()
            seconds.append(time.perf_counter() - began)
        found.append(
            {
                "name": name,
                "device": "cpu" if name == "LAPACK" else device.name,
                "spectrum": spectrum,
                "rows": rows.num_rows,
                "dim": rows.dim,
                "rank": rank,
                "seconds_median": statistics.median(seconds),
                "seconds_min": min(seconds),
                "error": math.sqrt(least / float(eigenvalues.sum())),
                "error_over_least": math.sqrt(squared_loss(rows, basis) / least) if least else 1.0,
                "bound": error_factor(rank, 8) if name.startswith("randomized") else 1.0,
                "peak_resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                "repeat": len(seconds),
            }
        )
    return found


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Time against width, and error over the least against its bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(r["name"] for r in results))
    largest = max(results, key=lambda r: r["rows"])
    most, spectrum = largest["rows"], largest["spectrum"]
    for colour, name in enumerate(names):
        mine = [r for r in results if r["name"] == name]
        shown = sorted((r["dim"], r["seconds_median"]) for r in mine if r["rows"] == most and r["spectrum"] == spectrum)
        if shown:
            left.plot(*zip(*shown, strict=True), marker="o", label=name, color=f"C{colour}")
        if name.startswith("randomized"):
            points = [(r["bound"], r["error_over_least"]) for r in mine]
            right.scatter(*zip(*points, strict=True), label=name, color=f"C{colour}", s=16)
    ends = [1, max(r["bound"] for r in results)]
    right.plot(ends, ends, linestyle="--", color="grey", label="bound without power iterations")
    left.set(xscale="log", yscale="log", xlabel="width", ylabel="seconds", title=f"{most:,} rows, {spectrum}")
    right.set(xlabel="bound of the expected error over the least", ylabel="observed", title="all tables")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def find_cases(given: argparse.Namespace) -> list[tuple[str, int, Callable[[], TrainedRows]]]:
    """Name, rank and maker of each table; a UserError for what cannot be meant, before anything is measured."""
    if not given.out.absolute().parent.is_dir():
        raise UserError(f"--out {given.out}: there is no folder {given.out.absolute().parent}")
    if given.repeat < 1:
        raise UserError(f"--repeat is {given.repeat}, but must be at least 1")
    if given.trained:
        tables = trained(given.trained)
        shapes = [(name, *tensor.shape, partial(TrainedRows.of, tensor)) for name, tensor in tables.items()]
    else:
        if given.file and given.file.exists():
            raise UserError(f"--file {given.file} is there already, and would be written over and removed")
        shapes = [
            (s, r, d, partial(table, s, r, d, given.file))
            for r in given.rows
            for d in given.dim
            for s in given.spectrum
        ]
    cases = []
    for name, rows, dim, make in shapes:
        rank = given.rank or dim // 8
        if not 1 <= rank < min(rows, dim):
            raise UserError(
                f"--rank {given.rank} must be below --dim {dim}, and that at least 8 where no rank is given; and below "
                f"the rows, which are {rows:,}"
            )
        cases.append((name, rank, make))
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the flags and returns the exit code: 0, 2 for the user's mistakes, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dim", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--rank", type=int, default=0, help="of the approximation; 0: an eighth of the width")
    parser.add_argument("--spectrum", choices=SPECTRA, nargs="+", default=list(SPECTRA))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda", "xla"], default="cpu")
    parser.add_argument(
        "--trained", type=Path, help="a checkpoint, whose exact tables of 1,000 rows and more are taken"
    )
    parser.add_argument("--file", type=Path, help="keep the table there instead of in memory; removed afterwards")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, with a plot beside it")
    given = parser.parse_args(arguments)
    try:
        cases = find_cases(given)
        study(cases, given, open_device(given.device))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the tables measured so far are kept", file=sys.stderr)
        return 130
    return 0


def study(
    cases: Sequence[tuple[str, int, Callable[[], TrainedRows]]], given: argparse.Namespace, device: Device
) -> None:
    """Measures all tables, and writes after each what there is."""
    results: list[dict[str, Any]] = []
    about = {"threads": torch.get_num_threads(), "versions": versions()}
    for name, rank, make in tqdm(cases, unit="table", file=sys.stderr, disable=None):
        try:
            made = make()
            found = measure(name, made, rank, given.repeat, device)
        finally:
            if given.file and not given.trained:
                given.file.unlink(missing_ok=True)
        for row in found:
            print(
                f"{row['spectrum']:<10}{row['rows']:>12,} x {row['dim']:<5}rank {row['rank']:<4}{row['name']:<22}"
                f"{row['seconds_median']:>9.3f} s  error {row['error']:.3f} x {row['error_over_least']:.4f}"
                f" (bound {row['bound']:.3f})  peak {row['peak_resident_gb']:.1f} GB"
            )
            results.append(row)
        del made
        given.out.write_text(json.dumps({"about": about, "rows": results}, indent=1) + "\n")
    plot(results, given.out.with_suffix(".png"))
    print(f"wrote {given.out} and {given.out.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main())
