"""Several chips by SPMD, as four virtual devices of XLA's CPU backend: the numbers of one, and what crosses chips."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest
from conftest import ROOT, needs_xla
from spmd_steps import make_steps

from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.steps import check_batch

pytestmark = [needs_xla, pytest.mark.slow]  # a process of four devices

QUICK = ["exact/adagrad/128"]
SLOW = [
    "hash_rows:rows=500/sgd/0",
    "exact/sgd/0",
    "exact/adam/128",
    "exact/adagrad/128/350000",
    "exact/adagrad_element/0",
    "tensorly_tt/adagrad/128",
    "quotient_remainder/adagrad/0",
    "low_rank/adagrad/128",
    "hash_embeddings/adagrad/128",
]
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


def on_chips(chips, steps, cases, dump=None, **more):
    env = os.environ | {"CPU_NUM_DEVICES": str(chips), "PJRT_DEVICE": "CPU"} | more
    if dump:
        env["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train.*"
    command = [sys.executable, ROOT / "tests" / "spmd_steps.py", str(steps), *cases]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chips"] == chips
    return found["cases"]


def agree(cases, steps, dump=None):
    single, several = on_chips(1, steps, cases), on_chips(4, steps, cases, dump)
    for case in cases:
        assert several[case]["losses"] == pytest.approx(single[case]["losses"], abs=1e-4), case
        assert several[case]["logits"] == pytest.approx(single[case]["logits"], abs=1e-3), case
        graphs = several[case]["compiles"]  # one to train, one to evaluate, which an earlier case may have made
        assert graphs == 2 if case == cases[0] else graphs in (1, 2), f"{case}: compiled {graphs} graphs"
        assert not several[case]["fallbacks"], case
        assert single[case]["losses"][-1] < single[case]["losses"][0], f"{case} learns"


def collectives(module):
    """(kind, bytes of the result on one chip) of each collective in a compiled module."""
    for line in module.splitlines():
        kind = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
        found = re.search(rf"= (.*?) {kind}(?:-start)?\(", line)
        if found:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
            yield found[2], sum(BYTES[t] * prod(int(d) for d in dims.split(",") if d) for t, dims in shapes)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hlo")
    agree(QUICK, 50, folder)
    return [path.read_text() for path in folder.glob("*after_optimizations.txt")]


def test_four_chips_train_as_one_does(quick):
    assert len(quick) == 1


def test_no_collective_is_as_large_as_a_table(quick):
    (module,) = quick
    found = list(collectives(module))
    assert {"all-gather", "reduce-scatter"} <= {kind for kind, _ in found}, "ids and gradients; pooled bags"
    # 32 samples of three bags of 16 numbers; the large tables have 320,192 and more bytes.
    assert max(size for _, size in found) == 32 * 3 * 16 * 4
    # 25,011 rows, 8 to a line: each chip has a quarter of the lines, and updates it in place.
    assert "f32[782,128]" in module
    assert "f32[3128,128]" not in module


@pytest.mark.parametrize("devices", ["abc", "0", "-2", ""])
def test_a_number_of_devices_that_is_none_is_told(devices, monkeypatch):
    monkeypatch.setenv("CPU_NUM_DEVICES", devices)
    with pytest.raises(UserError, match=f"CPU_NUM_DEVICES is '{devices}', but must be a number"):
        open_device("xla")


def test_a_batch_that_chips_cannot_share_is_refused():
    class Chips:
        count = 3

    device = open_device("xla")
    device = replace(device, rows=replace(device.rows, chips=Chips()))
    with pytest.raises(UserError, match="batch of 32 cannot be cut into equal parts for 3 chips: take --batch-size 33"):
        make_steps("exact/sgd/0", device)
    with pytest.raises(
        UserError, match=r"each of 8 micro-batches of a batch of 64 .* for 3 chips: take --batch-size 72"
    ):
        check_batch(64, 8, 3)


def test_a_checkpoint_goes_on_on_another_number_of_chips(tmp_path):
    """Six steps, then six more: on four chips and one, on one and four, as on one alone."""
    case = QUICK[0]
    on_chips(1, 6, [case], SAVE=str(tmp_path / "one"))
    saved = on_chips(4, 6, [case], SAVE=str(tmp_path / "four"))
    assert saved[case]["compiles_to_save"] == 0
    alone, after_four, after_one = (
        on_chips(chips, 6, [case], LOAD=str(tmp_path / name))[case]
        for chips, name in ((1, "one"), (1, "four"), (4, "one"))
    )
    for other in (after_four, after_one):
        assert other["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert other["logits"] == pytest.approx(alone["logits"], abs=1e-3)


def test_every_optimizer_and_more_plugins_train_on_four_chips_as_on_one():
    agree(SLOW, 50)
