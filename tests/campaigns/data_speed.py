"""How fast raw logs are prepared, in how much memory, and how fast batches come: logs made from a real sample.

    python tests/campaigns/data_speed.py --sample criteo.tsv.gz --scratch FOLDER [--rows 1e6 5e6 2e7] [--out FILE]

Each log repeats the sample; in every repetition a tenth of the categories' values get other last digits, so that tables
grow with the log. Prints and writes rows a second and the peak memory of each preparation, a process of its own, and
rows a second of the loader: shuffled training batches from the page cache, the median of passes over a part of them;
and ms in which the encoder of a service takes so many rows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

CHILD = """
import resource, sys, time
from dlrm_xla_data.__main__ import main
began = time.perf_counter()
code = main(["prepare", sys.argv[1], sys.argv[2], "--format", "criteo"])
seconds = time.perf_counter() - began
print("SECONDS", seconds, "PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""

LOADER = """
import json, statistics, sys, time
from pathlib import Path
import numpy as np
from dlrm_xla_data.loader import Loader
from dlrm_xla_data.prepared import open_prepared
dataset = open_prepared(Path(sys.argv[1]))
for array in (dataset.dense, dataset.ids, dataset.labels):
    np.asarray(array).sum()  # into the page cache
found = {}
for batch in (512, 2048, 65536):
    rates = []
    for epoch in range(7):
        batches = Loader(dataset, batch).batches("train", epoch)
        next(batches)  # the order is drawn
        began, rows = time.perf_counter(), 0
        for packed in batches:
            rows += len(packed.labels_B)
            if rows >= 2_000_000:
                break
        rates.append(rows / (time.perf_counter() - began))
        batches.close()
    found[batch] = {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}
print(json.dumps(found))
"""


ENCODER = """
import itertools, json, statistics, sys, time
from dlrm_xla_data.encoder import Encoder
names = ["label", *(f"I{k}" for k in range(1, 14)), *(f"C{k}" for k in range(1, 27))]
with open(sys.argv[1]) as file:
    rows = [dict(zip(names, line.rstrip("\\n").split("\\t"))) for line in itertools.islice(file, 16384)]
encode = Encoder(sys.argv[2])
found = {}
for count in (1, 16, 256, 4096):
    times = []
    for first in range(0, 16384 if count > 1 else 200, count):
        began = time.perf_counter()
        encode(rows[first : first + count])
        times.append(1000 * (time.perf_counter() - began))
    found[count] = {"median": statistics.median(times), "lowest": min(times), "highest": max(times)}
print(json.dumps(found))
"""


def write_log(sample: Path, path: Path, rows: int, seed: int = 0) -> None:
    """Repeats the sample to so many rows, each time with other last digits in a tenth of the categories' fields."""
    opener = gzip.open if sample.suffix == ".gz" else open
    with opener(sample, "rb") as file:
        whole = file.read()
    lines = whole.split(b"\n")[:-1]
    rng = np.random.default_rng(seed)
    with path.open("wb") as out:
        written = 0
        while written < rows:
            chosen = lines[: rows - written]
            data = np.frombuffer(b"\n".join(chosen) + b"\n", np.uint8).copy()
            if written:
                # The last digit before a tab or a line's end, where the field is a category: those have 8 digits.
                ends = np.flatnonzero((data == 9) | (data == 10))
                wide = ends[np.diff(ends, prepend=-1) == 9]
                changed = wide[rng.random(len(wide)) < 0.1]
                for back in (1, 2, 3):
                    data[changed - back] = np.frombuffer(b"0123456789abcdef", np.uint8)[
                        rng.integers(0, 16, len(changed))
                    ]
            out.write(data.data)
            written += len(chosen)


def main() -> int:
    """Measures every size once."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 5e6, 2e7])
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    results = []
    for rows in map(int, given.rows):
        log, folder = given.scratch / "log.tsv", given.scratch / "prepared"
        write_log(given.sample, log, rows)
        done = subprocess.run([sys.executable, "-c", CHILD, log, folder], capture_output=True, text=True, check=True)
        seconds, peak = (float(x) for x in done.stdout.split("SECONDS")[1].replace("PEAK", "").split())
        meta = json.loads((folder / "meta.json").read_text())
        loader = subprocess.run([sys.executable, "-c", LOADER, folder], capture_output=True, text=True, check=True)
        encoder = subprocess.run(
            [sys.executable, "-c", ENCODER, log, folder], capture_output=True, text=True, check=True
        )
        results.append(
            {
                "rows": rows,
                "bytes": log.stat().st_size,
                "table_rows": sum(meta["ids_per_table"]) + 26,
                "seconds": seconds,
                "rows_per_second": rows / seconds,
                "peak_memory_gb": peak / 1e9,
                "loader_rows_per_second": json.loads(loader.stdout),
                "encoder_ms": json.loads(encoder.stdout),
            }
        )
        print(json.dumps(results[-1]), flush=True)
        log.unlink()
        subprocess.run(["rm", "-r", str(folder)], check=True)
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
