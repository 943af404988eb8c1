"""--device tpu, without a TPU: its rows against numpy and the CPU's, and what it says where it fails."""

import importlib.util
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import launch_script
from spmd_steps import batches, make_steps

from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.torch_tpu import ROWS

launcher = launch_script("run")


@pytest.mark.parametrize("pack", [1, 8])
@pytest.mark.parametrize("add", [True, False])
def test_rows_are_written_as_numpy_writes_them_and_none_past_the_end(pack, add):
    rng = np.random.default_rng(pack)
    rows_RD = rng.normal(size=(40, 16)).astype(np.float32)
    ids_N = np.sort(rng.choice(48, 20, replace=False)).astype(np.int32)  # some of them past the end
    if add:
        ids_N[:3] = 5
    values_ND = rng.normal(size=(20, 16)).astype(np.float32)
    array = torch.from_numpy(rows_RD.copy()).view(-1, 16 * pack)
    ROWS.scatter(array, torch.from_numpy(ids_N), torch.from_numpy(values_ND), add)
    inside_N = ids_N < 40
    if add:
        np.add.at(rows_RD, ids_N[inside_N], values_ND[inside_N])
    else:
        rows_RD[ids_N[inside_N]] = values_ND[inside_N]
    np.testing.assert_allclose(array.view(-1, 16).numpy(), rows_RD, atol=1e-6)
    found_ND = ROWS.gather(array, torch.from_numpy(ids_N[inside_N]), 16)
    np.testing.assert_allclose(found_ND.numpy(), rows_RD[ids_N[inside_N]], atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_a_model_with_its_rows_trains_as_with_those_of_a_cpu(optimizer):
    cpu = open_device("cpu")
    others = replace(cpu, rows=ROWS, planned=ROWS, capturable=False)
    found = []
    for device, lanes in ((cpu, 0), (others, 128)):
        torch.manual_seed(0)
        steps = make_steps(f"exact/{optimizer}/{lanes}", device)
        losses = []
        for number, packed in enumerate(batches(20)):
            steps.train(packed, number)
            losses.append(steps.mean_loss())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_rows_of_bf16_are_refused():
    rows = torch.zeros(4, 16, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="row_precision"):
        ROWS.scatter(rows, torch.tensor([1]), torch.ones(1, 16), True)


@pytest.mark.skipif(importlib.util.find_spec("torch_tpu") is not None, reason="torch_tpu is installed")
def test_without_the_package_one_line_says_what_to_install(capsys):
    assert launcher.main(["--device", "tpu"]) == 2
    said = capsys.readouterr().err
    assert "pip install torch_tpu in an environment without the extras xla and distributed" in said
    assert "torch 2.11 to 2.15" in said
    assert said.count("\n") == 1


def test_with_the_package_but_no_tpu_one_line_says_so(capsys, monkeypatch):
    package = types.ModuleType("torch_tpu")
    package.__spec__ = importlib.util.spec_from_loader("torch_tpu", None)
    monkeypatch.setitem(sys.modules, "torch_tpu", package)
    assert launcher.main(["--device", "tpu"]) == 2
    said = capsys.readouterr().err
    assert "torch_tpu is installed, but it finds no TPU here" in said
    assert said.count("\n") == 1
