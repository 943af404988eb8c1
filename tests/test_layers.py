"""Imports point one way: launch -> data tools and plugins -> core; torch_xla only in the device layer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = {
    "dlrm_xla": ROOT / "dlrm_xla",
    "dlrm_xla_plugins": ROOT / "plugins" / "dlrm_xla_plugins",
    "dlrm_xla_data": ROOT / "data_tools" / "dlrm_xla_data",
}
MAY_IMPORT = {
    "dlrm_xla": {"dlrm_xla"},
    "dlrm_xla_plugins": {"dlrm_xla", "dlrm_xla_plugins"},
    "dlrm_xla_data": {"dlrm_xla", "dlrm_xla_data"},
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FOLDERS))
def test_imports_point_one_way(package):
    files = list(FOLDERS[package].rglob("*.py"))
    assert files
    for file in files:
        ours = imported(file) & {*FOLDERS, "launch", *(script.stem for script in (ROOT / "launch").glob("*.py"))}
        assert ours <= MAY_IMPORT[package], f"{file.name} imports {ours - MAY_IMPORT[package]}"


def test_only_the_device_layer_imports_torch_xla():
    for folder in FOLDERS.values():
        for file in folder.rglob("*.py"):
            assert "torch_xla" not in imported(file) or file.name.startswith("xla_"), file


def compared_to_a_device(file: Path) -> list[int]:
    """Lines that compare a device, its type or its name with a text; "meta", where there are no values, may be."""
    lines = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute):
            of_device = node.left.attr in ("type", "name") and "device" in ast.unparse(node.left.value)
            texts = [c.value for c in node.comparators if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            of_device |= node.left.attr == "device"  # of a configuration
            if (of_device and texts and texts != ["meta"]) or node.left.attr in ("is_cuda", "is_cpu", "is_xla"):
                lines.append(node.lineno)
    return lines


def test_only_the_device_layer_asks_which_device_it_is():
    asking = {
        f"{file.name}:{line}"
        for folder in FOLDERS.values()
        for file in folder.rglob("*.py")
        if not file.name.startswith("xla_")
        for line in compared_to_a_device(file)
    }
    assert {place.split(":")[0] for place in asking} == {"host.py"}, asking


def test_core_imports_with_torch_alone():
    """Everything but torch and what it needs itself is blocked; the contract, the rows and the devices still import."""
    script = """
import sys
import torch
class Block:
    def find_spec(self, name, path=None, target=None):
        extras = {"torch_xla", "tensorly", "pyarrow", "sklearn", "safetensors", "matplotlib", "tensorboard"}
        if name.split(".")[0] in extras:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import dlrm_xla.contract, dlrm_xla.registry, dlrm_xla.rows, dlrm_xla.row_optim, dlrm_xla.model, dlrm_xla.plan
import dlrm_xla.devices, dlrm_xla.batches, dlrm_xla.dense_optim, dlrm_xla.metrics, dlrm_xla.checkpoint
import dlrm_xla.run_folder, dlrm_xla.train
import dlrm_xla_plugins.tensor_train, dlrm_xla_plugins.hashing, dlrm_xla_plugins.projection
import dlrm_xla_data.loader, dlrm_xla_data.prepare
print(dlrm_xla.devices.open_device("cpu").name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "cpu\n", done.stderr
