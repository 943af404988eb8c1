"""The storage model, the chips and the lower bound: by hand, and against facts of libtpu's compiler."""

import functools
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_xla

from dlrm_xla import tpu
from dlrm_xla.errors import UserError


@pytest.mark.parametrize(
    ("shape", "dtype", "bytes"),
    [
        ((1000, 128), torch.float32, 1000 * 512),
        ((1001, 128), torch.float32, 1008 * 512),
        ((1000, 16), torch.float32, 16 * 1024 * 4),  # transposed: 1000 rows along lanes
        ((3, 16), torch.float32, 4 * 512),
        ((3, 16), torch.bfloat16, 4 * 256),
        ((1, 128), torch.int8, 4 * 128),
        ((1000, 16), torch.int64, 2 * 16 * 1024 * 4),
        ((3, 4, 130), torch.bfloat16, 3 * 4 * 256 * 2),
        ((130, 3, 4), torch.float32, 3 * 4 * 256 * 4),
        ((5,), torch.float32, 512),
        ((5,), torch.bfloat16, 512),
        ((2000,), torch.float32, 8192),
        ((), torch.int32, 512),
    ],
)
def test_arrays_take_whole_tiles(shape, dtype, bytes):
    assert tpu.storage_bytes(shape, dtype) == bytes


def test_a_chip_is_found_or_the_list_is_given():
    assert tpu.find_chip("v5e").clock_hz == 1.5e9
    with pytest.raises(UserError, match=r"no chip 'v5'; did you mean 'v5p'.*known are: tpu7x, v4, v5e, v5p, v6e"):
        tpu.find_chip("v5")


@pytest.mark.parametrize("chip", tpu.CHIPS.values(), ids=tpu.CHIPS)
def test_a_chips_clock_is_its_peak_over_flops_a_cycle(chip):
    flops_a_cycle = {"v4": 2**17, "v5e": 2**17, "v5p": 2**17, "v6e": 2**19, "tpu7x": 2**19}[chip.name]
    assert chip.bf16_flops / (chip.tensor_cores * flops_a_cycle) == pytest.approx(chip.clock_hz, rel=0.005)


def test_lower_bound_by_hand():
    chip = tpu.find_chip("v5e")
    kaggle = [tpu.Touched(26 * 2048, 16)]
    step = tpu.lower_bound(chip, kaggle, read_bytes=800, written_bytes=200, flops=1e9)
    assert step.bytes == 26 * 2048 * 512 * 3 + 1000  # read, read again and written
    assert step.memory_seconds == pytest.approx(81_789_928 / 819e9)
    assert step.matrix_seconds == pytest.approx(1e9 / 197e12)
    assert step.seconds == step.memory_seconds
    assert tpu.lower_bound(chip, kaggle, flops=1e12).seconds == pytest.approx(1e12 / 197e12)
    assert tpu.lower_bound(chip, kaggle, training=False).bytes == 26 * 2048 * 512
    adagrad = tpu.Touched(10, 200, row_states=1)
    assert adagrad.step_bytes == 10 * (3 * 1024 + 2 * 512)
    assert tpu.Touched(10, 200, states=2).step_bytes == 10 * 7 * 1024
    small = tpu.Touched(10_000, 16, states=1, row_states=1, array_bytes=512_000, row_state_bytes=4_096)
    assert small.forward_bytes == 512_000  # moved whole, that is less
    assert small.step_bytes == 2 * 512_000 + 2 * 512_000 + 2 * 4_096


def test_slices_and_their_exchanges_by_hand():
    v5e = tpu.find_chip("v5e")
    four = tpu.find_slice(v5e, "4")
    assert four == tpu.find_slice(v5e, "2x2") == tpu.Slice(4, "v5e:2x2", (2, 2))
    assert tpu.find_slice(tpu.find_chip("v4"), "16").topology == "v4:2x2x4"
    assert tpu.find_slice(tpu.find_chip("tpu7x"), "4").devices == 8
    # Three quarters of 1 MB through two links of 45 GB/s, and two hops.
    assert four.exchange_seconds(v5e, "all-gather", 10**6) == pytest.approx(0.75e6 / 90e9 + 2e-6)
    assert four.exchange_seconds(v5e, "all-reduce", 10**6) == pytest.approx(2 * (0.75e6 / 90e9 + 2e-6))
    with pytest.raises(UserError, match="--chips 3: v5e has slices of 1, 4, 8"):
        tpu.find_slice(v5e, "3")


def test_storage_equals_the_compilers_facts():
    """Argument bytes that libtpu gave for v5e and the tables of the presets: docs/tpu.json, by launch/tpu_theory.py."""
    facts = json.loads((ROOT / "docs" / "tpu.json").read_text())["storage"]["facts"]
    assert len(facts) > 500
    for shape, dtype, bytes in facts:
        assert tpu.storage_bytes(shape, getattr(torch, dtype)) == bytes, (shape, dtype)


def test_lookups_and_updates_by_hand():
    v5e, v4 = tpu.find_chip("v5e"), tpu.find_chip("v4")
    assert tpu.lookup_seconds(v5e, 1000, 16) == pytest.approx(1000 * 5.3 / 1.5e9)  # bound by issuing copies
    assert tpu.lookup_seconds(v4, 1000, 128) == pytest.approx(1000 * 4.3 / 2 / 1.05e9)  # by two cores
    assert tpu.update_seconds(v5e, 10, (10**6, 128), is_sorted=True) == pytest.approx(2 * 512e6 / 819e9)
    assert tpu.update_seconds(v5e, 10, (10**6, 128), is_sorted=False) == pytest.approx(10 * 65 / 1.5e9)


def test_bundles_are_counted_as_often_as_their_loops_turn(tmp_path, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.syspath_prepend(ROOT / "launch")
    from tpu_programs import read_kernel

    path = tmp_path / "17-gather_fusion-71-final_bundles.txt"
    path.write_text(
        """
     0   :  { %3 = vsyncpa [#a], 0 }
   0x1 LB: > { %s1 = sphi %s0, %s2 } /* Start region 5 */
   0x2   : > { %4 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s7, /*size_in_granules=*/16, /*vmem=*/%s8 /*
strides: (1, 1, 1) */ }
   0x3   : > { %9 = shalt.err (!%p1) /* BoundsCheck for %4 = dma.hbm_to_vmem /*size_in_granules=*/16 */ }
   0x4   : > { %p8 = scmp.ge.s32.totalorder %s11, 417 /* loop exit test */ }
   0x5   : > { %10 = sbr.rel (!%p8) target = $region5 }
   0x6   : > { %12 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s7, /*size_in_granules=*/16, /*vmem=*/%s8 }
   0x7   :  {}
   0x8   :  {}
   0x9   :  {} /* End region 5 */
   0xa   :  { %13 = vsyncpa [#a], 1 }
"""
    )
    kernel = read_kernel(path, tpu.find_chip("v5e"))
    assert kernel.name == "gather_fusion"
    assert kernel.loops == [(9, 417)]  # a branch is taken four bundles later
    assert kernel.issued == 2 + 9 * 417
    assert kernel.copies == {"hbm_to_vmem": 2 * 417}
    assert kernel.copied_bytes == {"hbm_to_vmem": 2 * 417 * 512}


def test_the_kernel_updates_the_lines_counted_and_no_other():
    jax = pytest.importorskip("jax")
    from dlrm_xla.xla_kernels import update_lines

    update = jax.jit(functools.partial(update_lines, block=32, interpret=True))
    rng = np.random.default_rng(0)
    array, values = (rng.standard_normal((n, 128)).astype(np.float32) for n in (300, 96))
    for count in (0, 1, 31, 32, 70, 96):
        ids = np.full(96, 10**6, np.int32)  # past the end, as where duplicates were combined
        ids[:count] = np.sort(rng.permutation(300)[:count])
        expected = array.copy()
        expected[ids[:count]] += values[:count]
        np.testing.assert_array_equal(update(array, np.array([count], np.int32), ids, values), expected)


@needs_xla
def test_torch_xla_calls_the_kernel_in_place():
    pytest.importorskip("jax")
    import torch_xla.core.xla_builder as builder
    import torch_xla.core.xla_model as xm

    from dlrm_xla.xla_kernels import call_update_lines

    shapes = [((4096, 128), torch.float32), ((1,), torch.int32), ((512,), torch.int32), ((512, 128), torch.float32)]
    text = xm.get_stablehlo([call_update_lines(*(builder.create_placeholder_tensor(*shape) for shape in shapes))])
    assert "@tpu_custom_call" in text
    assert "output_operand_alias<output_tuple_indices = [], operand_index = 3" in text


def compiled(script):
    """What a script prints last, run by itself: libtpu reads its settings once in a process."""
    pytest.importorskip("libtpu")
    head = f"import json, sys; sys.path.insert(0, {str(ROOT / 'launch')!r}); import jax.numpy as jnp, tpu_programs\n"
    done = subprocess.run([sys.executable, "-c", head + textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_compiler_stores_arrays_as_the_model_says(chip):
    """A part of the grid, and every table of the presets that fits, compiled now, to the byte."""
    script = f"""
    import tpu_theory
    from dlrm_xla.tpu import CHIPS, storage_bytes
    wrong, compiled, room = [], 0, 0.8 * CHIPS[{chip!r}].hbm_bytes
    def check(part):
        shapes = [(shape, jnp.dtype(name)) for shape, name in part]
        found = tpu_programs.compile_for(CHIPS[{chip!r}], lambda *a: a[0].reshape(-1)[:1], shapes).argument_bytes
        if found != sum(storage_bytes(shape, tpu_theory.TYPES[name]) for shape, name in part):
            wrong.append(part)
    part, filled = [], 0
    for name, dtype in tpu_theory.TYPES.items():
        for shape in tpu_theory.grid_shapes()[::7] + tpu_theory.preset_shapes():
            bytes = storage_bytes(shape, dtype)
            if bytes > room:
                continue
            if filled + bytes > room or len(part) == 100:
                check(part)
                part, filled = [], 0
            part.append((shape, name))
            filled += bytes
            compiled += 1
    check(part)
    print(json.dumps([len(wrong), compiled]))
    """
    wrong, count = compiled(script)
    assert wrong == 0
    assert count > 1000


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_kernel_moves_and_issues_less_than_a_scatter(chip):
    script = f"""
    tpu_programs.read_kernels()
    from dlrm_xla.tpu import CHIPS
    from dlrm_xla.xla_kernels import update_lines
    ids, table, values = ((8192,), jnp.int32), ((10**6, 128), jnp.float32), ((8192, 128), jnp.float32)
    count = ((1,), jnp.int32)
    ours = tpu_programs.compile_for(CHIPS[{chip!r}], update_lines, [table, count, ids, values], [0])
    add = lambda table, ids, values: table.at[ids].add(values, mode="drop")
    theirs = tpu_programs.compile_for(CHIPS[{chip!r}], add, [table, ids, values], [0])
    found = [ours.kernel("update_lines"), theirs.kernel("scatter")]
    print(json.dumps([ours.temporary_bytes] + [[k.issued, sum(k.copied_bytes.values())] for k in found]))
    """
    temporary, (issued, copied), (issued_by_scatter, copied_by_scatter) = compiled(script)
    assert temporary == 0
    assert issued < issued_by_scatter / 3
    assert copied < copied_by_scatter / 3


@pytest.mark.parametrize("chip", tpu.CHIPS)
def test_rows_in_hbm_cost_what_their_programs_issue(chip):
    """The time model's constants against the bundles that were counted, of 53,248 ids in whole blocks."""
    counted, found = json.loads((ROOT / "docs" / "tpu.json").read_text())["programs"], tpu.find_chip(chip)

    def cycles(name):
        return sum(kernel["issued"] for kernel in counted.get(f"{chip} {name}", {"kernels": []})["kernels"]) / 53_248

    update = tpu.update_seconds(found, 1, (4_220_323, 128), is_sorted=False) * found.clock_hz
    assert update == pytest.approx(cycles("update float32 128"), abs=0.7)
    windows = counted[f"{chip} update float32 128 sorted"]["kernels"][0]["largest_copy"]
    assert windows == tpu.SCATTER_WINDOW_BYTES[chip]
    further = (tpu.lookup_seconds(found, 1, 256) - tpu.lookup_seconds(found, 1, 128)) * found.clock_hz
    if lookup := cycles("lookup float32 256"):
        assert further == pytest.approx(lookup - cycles("lookup float32 128"), abs=0.06)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
def test_rows_on_the_chip_cost_what_their_programs_issue(chip):
    """The time model's constants against the bundles that were counted; a line of 128 numbers a row."""
    counted = json.loads((ROOT / "docs" / "tpu.json").read_text())["on_chip"]
    found = tpu.find_chip(chip)

    def cycles(seconds):
        return seconds * found.clock_hz / 1000

    by_order = counted[f"{chip} update 71162 43008"]
    lookups = [counted[f"{chip} lookup {case}"]["gather_fusion"] for case in ("1070 28672", "71162 43008")]
    assert cycles(tpu.near_lookup_seconds(found, 1000, 128)) == pytest.approx(max(lookups), abs=0.06)
    small = counted[f"{chip} update 8960 28672"]["scatter_fusion"]
    assert cycles(tpu.near_update_seconds(found, 1000, 128, is_sorted=False)) == pytest.approx(small, abs=0.06)
    large = by_order["scatter_custom_fusion"]
    assert cycles(tpu.near_update_seconds(found, 1000, 128, is_sorted=True)) == pytest.approx(large, abs=0.06)
    assert cycles(tpu.sort_seconds(found, 1000)) == pytest.approx(by_order["sort"], abs=0.06)
