import gc
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dlrm_xla import registry
from dlrm_xla.config import resolve
from dlrm_xla.xla_device import open_xla_first

# a package of its own, tested as installed by test_example_plugin.py
collect_ignore = ["example_plugin"]

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read as Triton is first imported, by whatever library
HAS_XLA = open_xla_first()
ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DLRM_XLA_SHARED", ROOT.parent / "shared"))


def install(monkeypatch, *plugins):
    """Has these plugins installed, by their functions' names, and no others."""
    entries = [SimpleNamespace(name=p.__name__, value=p.__name__, dist=None, load=lambda p=p: p) for p in plugins]
    monkeypatch.setattr(registry, "_entry_points", lambda: entries)


needs_xla = pytest.mark.skipif(not HAS_XLA, reason="torch_xla is not installed: pip install -e '.[xla]'")
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device was found")
_OTHERS = {"xla": needs_xla, "cuda": needs_cuda}
EVERY_DEVICE = ["cpu", *(pytest.param(device, marks=needs) for device, needs in _OTHERS.items())]
SLOW_BUT_ON_CPU = ["cpu", *(pytest.param(name, marks=[pytest.mark.slow, needs]) for name, needs in _OTHERS.items())]


def pytest_collection_finish() -> None:
    """What is imported by now stays: not looked through at each recorded step, which looks for tensors everywhere."""
    gc.collect()
    if HAS_XLA:
        assert not importlib.import_module("dlrm_xla.xla_steps")._live_tensors(), "frozen, they would be missed"
    gc.freeze()


def cuda_rows() -> ModuleType:
    """The kernels of `--device cuda`; without such a device Triton runs them with numpy, operation by operation."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch's CUDA builds")
    return importlib.import_module("dlrm_xla.cuda_rows")


def launch_script(name: str) -> ModuleType:
    """A script of launch/ as a module; scripts there import each other, as they do when they are run."""
    if str(ROOT / "launch") not in sys.path:
        sys.path.insert(0, str(ROOT / "launch"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared_file(name: str) -> Path:
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"{name} is not here: set DLRM_XLA_SHARED to the folder whose data/ holds it")
    return path


@pytest.fixture(scope="session")
def criteo_sample() -> Path:
    return shared_file("criteo_kaggle_sample137k.tsv.gz")


@pytest.fixture(scope="session")
def reference_steps() -> dict[str, np.ndarray]:
    with np.load(shared_file("reference_dlrm_dot_20_steps.npz")) as file:
        return dict(file)


def criteo_line(rng: np.random.Generator, label: int | None = None) -> str:
    """A made-up line of a Criteo log; a tenth of the fields is missing."""
    fields = [str(rng.integers(0, 2) if label is None else label)]
    fields += ["" if rng.random() < 0.1 else str(rng.integers(-2, 500)) for _ in range(13)]
    fields += ["" if rng.random() < 0.1 else f"{rng.zipf(1.5) % 1000 * 2654435761 % 2**32:08x}" for _ in range(26)]
    return "\t".join(fields)


def made_up_run(folder: Path, auc: float, replaced: int = 0, **settings: Any) -> Path:
    """The folder of a run that was never trained: what a study reads of it, with these figures and settings."""
    folder.mkdir(parents=True)
    config, origins = resolve(settings, None)
    named = {name: {"value": getattr(config, name), "origin": origin} for name, origin in origins.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(named))
    report = {key: getattr(config, key) for key in ("device", "plugin", "preset", "seed", "epochs", "batch_size")}
    report |= {"auc": auc, "log_loss": 1.25 - auc, "validation_log_loss": 1.25 - auc, "interrupted": False}
    report |= {"embedding_bytes": 500, "exact_embedding_bytes": 1000, "compression_ratio": 2.0, "steps": 300}
    report |= {"train_samples_per_second": 1000.0, "step_ms_median": 50.0, "versions": {"torch": "2.9.0"}}
    report |= {"commit": "abc", "data": {"rows": "a"}, "tables_with_plugin": replaced}
    report["tables"] = [{"rows": 100, "padded": 1, "optimizer": 2, "gradient": 3}]
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def small_log(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    path = tmp_path / "small.tsv"
    path.write_text("".join(criteo_line(rng) + "\n" for _ in range(700)))
    return path
