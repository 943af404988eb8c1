#!/usr/bin/env python
"""Looks at this machine and says what is wrong for training here, and how to mend it.

python launch/doctor.py [--device xla]        exit code 0: nothing is wrong; 1: something is, with the fix beside it
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from dlrm_xla_data.loader import Loader
from dlrm_xla_data.synthetic import synthesize

from dlrm_xla import registry
from dlrm_xla.contract import Table
from dlrm_xla.device import Device
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.plan import on_meta
from dlrm_xla.rows import RowTable
from dlrm_xla.run_folder import PACKAGES

WATCHED = (*PACKAGES, "torchvision", "tensorly-torch", "fbgemm-gpu", "jax", "libtpu", "torch_tpu")
OPENED = ("cpu", "cuda", "xla", "tpu")


class Finding(NamedTuple):
    """One line of the report; ``fix`` is empty where nothing is wrong, ``there`` false of what this machine lacks."""

    text: str
    fix: str = ""
    there: bool = True

    @property
    def mark(self) -> str:
        """In front of the line."""
        return "WRONG" if self.fix else "ok" if self.there else "none"


def installed() -> dict[str, str]:
    """Versions of the packages that matter here, those that are installed."""
    found = {}
    for package in WATCHED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def conflicts(found: Mapping[str, str], python: tuple[int, ...]) -> Iterator[Finding]:
    """Combinations of versions that are known not to work."""
    minor = {name: ".".join(text.split("+")[0].split(".")[:2]) for name, text in found.items()}
    if python < (3, 11):
        yield Finding(f"Python {'.'.join(map(str, python))}", "install Python 3.11 or newer")
    for package in ("torch", "numpy", "pyarrow", "safetensors", "scikit-learn"):
        if package not in found:
            yield Finding(f"{package} is missing", "pip install -e .")
    if "torch" in found and tuple(map(int, minor["torch"].split("."))) < (2, 9):
        yield Finding(f"torch {found['torch']} is too old", "pip install 'torch>=2.9'")
    if "torch_xla" in found and minor["torch_xla"] != minor.get("torch"):
        yield Finding(
            f"torch_xla {found['torch_xla']} is built against torch {minor['torch_xla']} and no other, not "
            f"{found.get('torch')}",
            "pip install -e '.[xla]' takes the pair that works",
        )
    if "torch_tpu" in found and (
        "torch_xla" in found or not (2, 11) <= tuple(map(int, minor["torch"].split("."))) <= (2, 15)
    ):
        yield Finding(
            f"torch_tpu {found['torch_tpu']} takes torch 2.11 to 2.15 and stands without torch_xla, not beside torch "
            f"{found.get('torch')}",
            "install it in an environment of its own: pip install torch_tpu -e .",
        )
    if "fbgemm-gpu" in found and "fbgemm-gpu-cpu" in found:
        yield Finding(
            "fbgemm-gpu and fbgemm-gpu-cpu write the same folder",
            "pip uninstall both, then install one: fbgemm-gpu-cpu where there is no CUDA driver",
        )
    elif "fbgemm-gpu" in found and not torch.cuda.is_available():
        yield Finding("fbgemm-gpu does not import without a CUDA driver", "install fbgemm-gpu-cpu instead")
    if "torchrec" in found and not {"fbgemm-gpu", "fbgemm-gpu-cpu"} & set(found):
        yield Finding("torchrec does not import without fbgemm", "pip install -e '.[distributed]'")
    pair = found.get("jax"), found.get("libtpu")
    if all(pair) and pair not in (("0.10.2", "0.0.42"), ("0.7.1", "0.0.21")):
        yield Finding(f"jax {pair[0]} with libtpu {pair[1]} was never seen to work", "pip install -e '.[tpu-compiler]'")


def devices(wanted: str) -> Iterator[Finding]:
    """What opens, and whether xla is a TPU; only a device that was asked for must be there."""
    for name in OPENED:
        try:
            device = open_device(name)
        except UserError as error:
            yield Finding(f"{name}: {error}", "see there" if name == wanted else "", there=False)
            continue
        except Exception as error:  # a broken install may raise anything
            yield Finding(f"{name}: {type(error).__name__}: {error}", "install the package of this device again")
            continue
        yield Finding(f"{name}: {device.description}, {device.memory / 1e9:.1f} GB for tables")
        yield from _xla(device, name == wanted)


def _xla(device: Device, wanted: bool) -> Iterator[Finding]:
    if device.name != "xla" or not device.loud:
        return
    here = [str(path) for path in (*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*"))]
    if here:
        yield Finding(
            f"xla is NOT a TPU, though {here[0]} is there",
            "set PJRT_DEVICE=TPU, pip install -e '.[tpu]' (its libtpu is another than that of tpu-compiler), and let "
            "no other process hold the chip",
        )
    else:
        yield Finding("xla is NOT a TPU but XLA's CPU backend: times say nothing about a TPU")
    if wanted and os.environ.get("PJRT_DEVICE") == "TPU":
        yield Finding("PJRT_DEVICE=TPU, but no TPU opened", "run on a TPU machine, or unset PJRT_DEVICE")


def available_memory() -> int:
    """Bytes that processes can have now: free ones, and where the kernel tells it those that it would give up."""
    told = Path("/proc/meminfo")
    if told.is_file() and (found := re.search(r"MemAvailable: +(\d+) kB", told.read_text())):
        return 1024 * int(found[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def space(folder: Path) -> Iterator[Finding]:
    """Memory and disk."""
    memory = available_memory()
    yield Finding(f"memory: {memory / 1e9:.1f} GB available now", "" if memory > 1e9 else "end other processes")
    free = shutil.disk_usage(folder).free
    yield Finding(
        f"disk: {free / 1e9:.1f} GB free at {folder.resolve()}", "" if free > 1e9 else "free space, or run elsewhere"
    )


def loader() -> Iterator[Finding]:
    """Whether two processes of one job would train on different rows."""
    seen = []
    dataset, _ = synthesize(140, [5, 5])
    for rank in ("0", "1"):
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}):
            batches = Loader(dataset, 10).batches("train")
            seen.append({row.tobytes() for packed in batches for row in np.asarray(packed.dense_BI) if row.any()})
    shards = not seen[0] & seen[1]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    text = "the loader gives each process its own rows" if shards else "the loader gives every process all rows"
    if shards or world == 1:
        yield Finding(f"{text}; {world} process{'es' * (world > 1)} here")
    else:
        yield Finding(f"{text}, and there are {world} processes", "start one process (WORLD_SIZE=1)")


def plugins() -> Iterator[Finding]:
    """Every plugin found, and whether it imports and makes a bag."""
    try:
        names = sorted(registry.installed())
    except UserError as error:
        yield Finding(str(error), "see there")
        return
    if not names:
        yield Finding("no plugin is installed", "pip install -e . (entry points are read at install time)")
    for name in names:
        try:
            make = registry.compose(registry.parse(name), RowTable)
            on_meta(make, Table("doctor", 5000, 16), name)
        except Exception as error:  # whatever a stranger's plugin makes of it
            reason = str(error).strip() or type(error).__name__
            yield Finding(f"plugin {name}: {reason}", "install what it needs, or uninstall its package")
        else:
            yield Finding(f"plugin {name}")


def determinism() -> Iterator[Finding]:
    """Settings of the process that change bits."""
    threads = torch.get_num_threads()
    yield Finding(f"{threads} thread{'s' * (threads > 1)}: runs with another number may differ in the last bits")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=OPENED, help="a device that must be there (default cpu)")
    wanted = parser.parse_args(arguments).device
    found = installed()
    parts = {
        "versions": [
            Finding(f"Python {sys.version.split()[0]}, " + ", ".join(f"{n} {v}" for n, v in found.items())),
            *conflicts(found, sys.version_info[:3]),
        ],
        "devices": list(devices(wanted)),
        "space": list(space(Path.cwd())),
        "data": list(loader()),
        "plugins": list(plugins()),
        "determinism": list(determinism()),
    }
    wrong = 0
    for part, findings in parts.items():
        print(part)
        for finding in findings:
            wrong += bool(finding.fix)
            print(f"  {finding.mark:<5} {finding.text}")
            if finding.fix:
                print(f"        fix: {finding.fix}")
    print(f"{wrong} wrong" if wrong else "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
