"""One folder per run: config.yaml, metrics.jsonl, TensorBoard events, report.json, a plot, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from dlrm_xla.checkpoint_folder import CheckpointFolder
from dlrm_xla.config import Config
from dlrm_xla.errors import UserError
from dlrm_xla.ranks import ALONE, Ranks

PACKAGES = (
    "dlrm_xla",
    "torch",
    "torch_xla",
    "tensorly",
    "torchrec",
    "fbgemm-gpu-cpu",
    "numpy",
    "pyarrow",
    "safetensors",
    "scikit-learn",
)


# In a folder whose tables are being compressed; gone once it has the checkpoint that a run goes on from.
COMPRESSING = "compression.unfinished"


class RunFolder:
    """Everything a run writes. The folder must be new or empty, so that no run overwrites another.

    A run that goes on gives the folder as ``resumed``, and the bytes of metrics.jsonl and the samples that its
    checkpoint knows of: rows written later are written again, and events of later samples are hidden.
    """

    def __init__(
        self,
        config: Config,
        origins: Mapping[str, str],
        resumed: Path | None = None,
        metrics_bytes: int = 0,
        samples: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.path = resumed or (Path(config.out) if config.out else fresh_folder(config))
        if resumed is None:
            check_out(str(self.path))
            ranks.remember(self.path)  # before the first file, for a folder that holds some is another's
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            settings = {
                name: {"value": value, "origin": origins[name]} for name, value in dataclasses.asdict(config).items()
            }
            self._write("config.yaml", yaml.safe_dump(settings, sort_keys=False))
            self._metrics = (self.path / "metrics.jsonl").open("a")
            self._metrics.truncate(min(metrics_bytes, self._metrics.tell()))
            self._metrics.seek(0, os.SEEK_END)  # truncating leaves the position past the end
            self.rows: list[dict[str, Any]] = [
                json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()
            ]
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.path}: {error.strerror}. Choose another --out."
            ) from error
        except ValueError as error:
            raise UserError(f"{self.path / 'metrics.jsonl'} is damaged: {error}. Delete it to go on.") from error
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(self.path), purge_step=samples if resumed else None)
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", config.keep_checkpoints, ranks)

    def log(self, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl and its figures to TensorBoard, over samples."""
        self.rows.append(row)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in row.items():
            if name not in ("step", "samples"):
                kind, _, rest = name.partition("_")
                self._events.add_scalar(f"{kind}/{rest}", value, row["samples"])

    @property
    def metrics_bytes(self) -> int:
        """How long metrics.jsonl is."""
        return self._metrics.tell()

    def report(self, report: Mapping[str, Any]) -> None:
        """Writes report.json in one piece; figures that do not exist are null, never NaN."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}
        self._write("report.json", json.dumps(clean, indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        unfinished = self.path / f"{name}.unfinished"
        with unfinished.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine may keep the new name and lose the text
        os.replace(unfinished, self.path / name)

    def plot(self, title: str, base_rate_log_loss: float, best_reachable_auc: float | None) -> None:
        """Loss and AUC over samples, as curves.png."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        figure.suptitle(title, fontsize=10)
        for key, label, axis, colour in (
            ("train_loss", "training, since the last point", left, "tab:blue"),
            ("validation_log_loss", "validation", left, "tab:orange"),
            ("validation_auc", "validation", right, "tab:orange"),
        ):
            points = [(row["samples"], row[key]) for row in self.rows if key in row]
            if points:
                marker = "o" if len(points) < 30 else ""
                axis.plot(*zip(*points, strict=True), marker=marker, label=label, color=colour)
        left.axhline(base_rate_log_loss, linestyle="--", color="grey", label="constant base rate (test rows)")
        if best_reachable_auc is not None:
            right.axhline(best_reachable_auc, linestyle="--", color="grey", label="best reachable (test rows)")
        left.set(xlabel="training samples", ylabel="log loss (nats)")
        right.set(xlabel="training samples", ylabel="AUC")
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.legend()
        figure.savefig(self.path / "curves.png", dpi=120)
        pyplot.close(figure)

    def close(self) -> None:
        """Flushes what is open."""
        self._metrics.close()
        self._events.close()


class NoRunFolder:
    """What the other ranks of a job have instead: they write their parts of checkpoints, and nothing else."""

    metrics_bytes = 0

    def __init__(self, path: Path, config: Config, ranks: Ranks) -> None:
        self.path = path
        self.checkpoints = CheckpointFolder(path / "checkpoints", config.keep_checkpoints, ranks)

    def log(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def report(self, report: Mapping[str, Any]) -> None:
        """Nothing."""

    def plot(self, title: str, base_rate_log_loss: float, best_reachable_auc: float | None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_finished(folder: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A finished run's report, its settings, and the bytes that training its tables took; a UserError if it is none."""
    try:
        report = json.loads((folder / "report.json").read_text())
        settings = yaml.safe_load((folder / "config.yaml").read_text())
    except OSError as error:
        raise UserError(f"{folder} is no finished run: {error.strerror} {error.filename}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: cannot read its report or config: {error}") from error
    for name, read in (("report.json", report), ("config.yaml", settings)):
        if not isinstance(read, dict) or not read:
            raise UserError(f"{folder / name} is damaged: it holds no names with values. Run it again.")
    plain = {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in settings.items()}
    try:
        trained = sum(t["padded"] + t["optimizer"] + t["gradient"] for t in report.get("tables", []))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'report.json'} is damaged: its tables lack bytes. Run it again.") from error
    return report, plain, trained


def check_out(out: str) -> None:
    """Raises a UserError where a run may not write: a folder that holds files, or a file."""
    path = Path(out)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--out {path} already holds files. Choose a new folder; runs are never overwritten.")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file. Choose a new folder.")


def fresh_folder(config: Config) -> Path:
    """A folder under runs/ that is not there yet, named after the time and the settings."""
    plugin = "".join(c if c.isalnum() or c in "+_=." else "-" for c in config.plugin)[:60]
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}-{plugin}-{config.device}-seed{config.seed}"
    path, count = Path("runs") / stem, 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{stem}-{count}"
    return path


def versions() -> dict[str, str]:
    """Versions of the packages that can change a result, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout the code runs from, marked where it has changes; None outside a checkout."""
    root = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-changed" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
