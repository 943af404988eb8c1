"""The TPU compiler lab: what is traced is the step that runs, and what the compiler says is read right."""

import importlib.util
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import launch_script, needs_xla
from dlrm_xla_data.loader import Loader
from dlrm_xla_data.prepared import save_dataset
from dlrm_xla_data.synthetic import synthesize

from dlrm_xla import hlo, step_cost, tpu_compile
from dlrm_xla.batches import PackedBatch
from dlrm_xla.collectives import collectives
from dlrm_xla.config import resolve
from dlrm_xla.errors import UserError
from dlrm_xla.model import DLRM
from dlrm_xla.serving import model_settings
from dlrm_xla.steps import Steps
from dlrm_xla.tpu import CHIPS, lookup_seconds, storage_bytes

needs_compiler = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("jax", "libtpu"))),
    reason="no TPU compiler: pip install -e '.[tpu-compiler]'",
)
# Cut from what libtpu 0.0.42 made of a train step for v5e: an update in place, a loop, a gather, a copy of the table.
MODULE = """HloModule step, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }, entry={()}

%fused_gather (p.0: f32[4000,128], p.1: s32[512]) -> f32[512,128] {
  %p.0 = f32[4000,128]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[512]{0:T(512)S(1)} parameter(1)
  ROOT %gather.0 = f32[512,128]{1,0:T(8,128)S(1)} gather(%p.0, %p.1), offset_dims={1}, slice_sizes={1,128}
}

%cond (c: (s32[], f32[4000,128])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[4000,128]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(512)
  %count = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

%body (b: (s32[], f32[4000,128])) -> (s32[], f32[4000,128]) {
  %b = (s32[]{:T(128)}, f32[4000,128]{1,0:T(8,128)}) parameter(0)
  %rows = f32[4000,128]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %one = f32[1,16]{1,0:T(1,128)S(1)} fusion(%rows), kind=kLoop, calls=%o, backend_config={"estimated_cycles":"10"}
  %update = f32[4000,128]{1,0:T(8,128)} dynamic-update-slice(%rows, %one)
  ROOT %again = (s32[]{:T(128)}, /*index=1*/f32[4000,128]{1,0:T(8,128)}) tuple(%count, %update)
}

ENTRY %main (ids: s32[512], rows: f32[4000,128]) -> (f32[4000,128], f32[512,128]) {
  %ids.1 = s32[512]{0:T(512)} parameter(0), metadata={op_name="xla__device_data"}
  %rows.1 = f32[4000,128]{1,0:T(8,128)} parameter(1)
  %gather_fusion = f32[512,128]{1,0:T(8,128)S(1)} fusion(%rows.1, %ids.1), kind=kCustom, calls=%fused_gather, \
metadata={op_name="bags.20/aten__index_select"}, backend_config={"flag_configs":[]}
  %moved = f32[512,128]{1,0:T(8,128)S(1)} fusion(%gather_fusion), kind=kLoop, calls=%f, \
metadata={op_name="top.0 backward.7/aten__mm"}, backend_config={"window_config":{"estimated_cycles":"2000"}}
  %sparse_core = f32[512,128]{1,0:T(8,128)S(1)} sort(%moved), backend_config={"estimated_cycles":"18446744073709551615"}
  %relaid = f32[4000,128]{0,1:T(8,128)} copy(%rows.1), backend_config={"estimated_cycles":"7000"}
  %start = (s32[]{:T(128)}, f32[4000,128]{1,0:T(8,128)}) tuple(%zero, %relaid)
  %loop = (s32[]{:T(128)}, f32[4000,128]{1,0:T(8,128)}) while(%start), condition=%cond, body=%body, \
metadata={op_name="rows0 optimizer.3/scatter"}
  %new = f32[4000,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %result = (f32[4000,128]{1,0:T(8,128)}, f32[512,128]{1,0:T(8,128)S(1)}) tuple(%new, %sparse_core)
}
"""


@pytest.fixture
def module():
    return hlo.read(MODULE)


def test_the_schedule_follows_loops_and_counts_their_turns(module):
    times = {e.operation.name: e.times for e in module.schedule}
    assert times == {
        "gather_fusion": 1,
        "moved": 1,
        "sparse_core": 1,
        "relaid": 1,
        "one": 512,
        "update": 512,
        "less": 512,
    }
    assert hlo.sum_cycles(module.schedule) == 2000 + 7000 + 512 * 10
    assert module.aliased == {1}
    assert module.arguments()[1].dims == (4000, 128)


def test_what_the_compiler_does_not_count_is_modelled_and_said(module):
    chip = CHIPS["v5e"]
    costs = {c.operation.name: c for c in step_cost.costs(module, chip)}
    assert {name for name, c in costs.items() if c.modelled} == {"gather_fusion", "sparse_core", "update", "less"}
    assert costs["gather_fusion"].seconds == pytest.approx(512 * 5.3 / chip.clock_hz)  # docs/tpu.md, statement 3
    assert costs["moved"].seconds == pytest.approx(2000 / chip.clock_hz)


def test_operations_are_named_after_their_module(module):
    parts = {c.operation.name: c.part for c in step_cost.costs(module, CHIPS["v5e"])}
    assert parts["gather_fusion"] == "bags"
    assert parts["moved"] == "top.0 backward"
    assert parts["one"] == "rows0 optimizer"  # that of the loop around it


def test_copies_of_whole_tables_are_found(module):
    tables = [step_cost.Table("rows", (4000, 128), sparse=True)]
    assert [e.operation.name for e, _ in step_cost.whole_table_copies(module, tables)] == ["relaid"]


STAGED_MODULE = """HloModule step, is_scheduled=true

ENTRY %main (rows: f32[4000,128], map: s32[5000000], ids: s32[2048], few: f32[100]) -> f32[2048,128] {
  %rows = f32[4000,128]{1,0:T(8,128)} parameter(0)
  %map = s32[5000000]{0:T(1024)} parameter(1)
  %ids = s32[2048]{0:T(1024)} parameter(2)
  %few = f32[100]{0:T(128)} parameter(3)
  %places = s32[2048]{0:T(1024)} gather(%map, %ids)
  %slice-start = ((f32[4000,128]{1,0:T(8,128)}), f32[2000,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%rows)
  %copy-start = (f32[4000,128]{1,0:T(8,128)S(1)}, f32[4000,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%rows)
  %weights = f32[2048]{0:T(1024)} gather(%few, %ids)
  %activations = f32[4010,128]{0,1:T(8,128)} copy(%other)
  %padded = f32[4010,128]{0,1:T(8,128)} pad(%rows, %few)
  ROOT %found = f32[2048,128]{1,0:T(8,128)} gather(%copy-start, %places), slice_sizes={1,128}
}
"""


def test_a_table_brought_on_the_chip_is_not_a_copy_of_it():
    module = hlo.read(STAGED_MODULE)
    dense = [step_cost.Table("rows", (4000, 128), sparse=False)]
    assert step_cost.whole_table_copies(module, dense) == []  # what is about as large is something else
    sparse = [step_cost.Table("rows", (4000, 128), sparse=True), step_cost.Table("others", (9000, 128), sparse=True)]
    assert [e.operation.name for e, _ in step_cost.whole_table_copies(module, sparse)] == ["padded"]
    assert step_cost.brought_on_chip(module, sparse) == ["rows"]


def test_a_map_is_looked_up_number_by_number_and_a_part_brought_as_a_part():
    module = hlo.read(STAGED_MODULE)
    v5e = CHIPS["v5e"]
    seconds = {e.operation.name: step_cost.modelled_seconds(module, e, v5e) for e in module.schedule}
    assert seconds["places"] == seconds["weights"] == lookup_seconds(v5e, 2048, 1)
    assert seconds["slice-start"] == 2000 * 512 / v5e.hbm_bytes_per_second  # the part alone


SCATTERS_MODULE = """HloModule step, is_scheduled=true

%into_small (p.0: f32[5925,128], p.1: s32[589824], p.2: f32[589824,128]) -> f32[5925,128] {
  %p.0 = f32[5925,128]{1,0:T(8,128)SPACE} parameter(0)
  %p.1 = s32[589824]{0:T(1024)} parameter(1)
  %p.2 = f32[589824,128]{1,0:T(8,128)} parameter(2)
  ROOT %scatter.1 = f32[5925,128]{1,0:T(8,128)SPACE} scatter(%p.0, %p.1, %p.2), update_window_dims={1}, to_apply=%sum
}

%from_small (p.3: f32[5925,128], p.4: s32[589824]) -> f32[589824,128] {
  %p.3 = f32[5925,128]{1,0:T(8,128)SPACE} parameter(0)
  %p.4 = s32[589824]{0:T(1024)} parameter(1)
  ROOT %gather.1 = f32[589824,128]{1,0:T(8,128)} gather(%p.3, %p.4), slice_sizes={1,128}
}

ENTRY %main (small: f32[5925,128], ids: s32[589824], rows: f32[589824,128], large: f32[600000,128]) -> f32[5925,128] {
  %small = f32[5925,128]{1,0:T(8,128)SPACE} parameter(0)
  %ids = s32[589824]{0:T(1024)} parameter(1)
  %rows = f32[589824,128]{1,0:T(8,128)} parameter(2)
  %large = f32[600000,128]{1,0:T(8,128)} parameter(3)
  %found = f32[589824,128]{1,0:T(8,128)} fusion(%small, %ids), kind=kCustom, calls=%from_small
  %far = f32[600000,128]{1,0:T(8,128)} scatter(%large, %ids, %rows), update_window_dims={1}, to_apply=%sum
  ROOT %near = f32[5925,128]{1,0:T(8,128)SPACE} fusion(%small, %ids, %rows), kind=kCustom, calls=%into_small
}
"""


@pytest.mark.parametrize("space", ["", "S(1)"])
def test_a_small_array_that_more_rows_are_scattered_to_is_not_a_large_one(space):
    """The kernel brings it to the chip whole: 7.1 bundles for each of 589,824 rows to 5,925 lines, not 65."""
    module = hlo.read(SCATTERS_MODULE.replace("SPACE", space))
    v5e = CHIPS["v5e"]
    seconds = {e.operation.name: step_cost.modelled_seconds(module, e, v5e) for e in module.schedule}
    assert seconds["near"] == pytest.approx(589_824 * 7.2 / v5e.clock_hz)
    assert seconds["far"] == pytest.approx(589_824 * 65 / v5e.clock_hz)
    assert seconds["found"] == pytest.approx(589_824 * (2.0 if space else 5.3) / v5e.clock_hz)


BLOCKS_MODULE = """HloModule step, is_scheduled=true

ENTRY %main (core: f32[342,116,928], ids: s32[1024], square: f32[729,2048]) -> f32[342,116,928] {
  %core = f32[342,116,928]{1,2,0:T(8,128)SPACE} parameter(0)
  %ids = s32[1024]{0:T(1024)} parameter(1)
  %square = f32[2048,729]{0,1:T(8,128)S(1)} parameter(2)
  %found = f32[448,116,928]{1,2,0:T(8,128)} gather(%core, %ids), slice_sizes={1,116,928}
  %kept = f32[448,116,928]{1,2,0:T(8,128)S(1)} gather(%core, %ids), slice_sizes={1,116,928}
  %columns = f32[351,2048]{1,0:T(8,128)S(1)} gather(%square, %ids), slice_sizes={2048,1}
  ROOT %new = f32[342,116,928]{1,2,0:T(8,128)SPACE} \
scatter(%core, %ids, %found), update_window_dims={1,2}, to_apply=%sum
}
"""


@pytest.mark.parametrize("space", ["", "S(1)"])
def test_blocks_and_columns_are_looked_up_whole(space):
    """448 blocks, each one copy of 475,136 bytes; 351 columns of 16 lines each issue 6,684 bundles on v5e."""
    module = hlo.read(BLOCKS_MODULE.replace("SPACE", space))
    v5e = CHIPS["v5e"]
    seconds = {e.operation.name: step_cost.modelled_seconds(module, e, v5e) for e in module.schedule}
    once = 448 * 928 * 128 * 4 / v5e.hbm_bytes_per_second
    issued = 448 * (80 + 2 * 116) / v5e.clock_hz
    assert seconds["found"] == pytest.approx(once if space else 2 * once)
    assert seconds["kept"] == pytest.approx(issued if space else once)
    assert seconds["new"] == pytest.approx(once if space else 3 * once)
    assert seconds["columns"] * v5e.clock_hz == pytest.approx(6684, rel=0.1)


CHIPS_MODULE = """HloModule step, is_scheduled=true

%all-reduce-scatter (input: f32[2048,26,16]) -> f32[512,26,16] {
  %input = f32[2048,26,16]{2,1,0} parameter(0)
  ROOT %all-reduce.1 = f32[2048,26,16]{2,1,0} all-reduce(%input), channel_id=28, to_apply=%add
}

%part (p: s32[512,26]) -> s32[2048,26] {
  %p = s32[512,26]{1,0} parameter(0)
  ROOT %all-gather.2 = s32[2048,26]{1,0} all-gather(%p), channel_id=2, dimensions={0}
}

ENTRY %main (bags: f32[2048,26,16], ids: s32[512,26]) -> f32[512,26,16] {
  %bags = f32[2048,26,16]{2,1,0} parameter(0)
  %ids = s32[512,26]{1,0} parameter(1)
  %started = s32[2048,26]{1,0} fusion(%ids), kind=kCustom, calls=%part, metadata={op_name="bags.20/aten__add"}
  %done = s32[2048,26]{1,0} fusion(%ids), kind=kCustom, calls=%part
  %sum = (f32[16]{0}, f32[8,16]{1,0}) all-reduce(%a, %b), channel_id=5, to_apply=%add
  ROOT %mine = f32[512,26,16]{2,1,0} fusion(%bags), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_collectives_are_counted_once_by_their_channel_and_not_as_work():
    module = hlo.read(CHIPS_MODULE)
    assert [(c.kind, c.bytes) for c in collectives(module)] == [
        ("reduce-scatter", 2048 * 26 * 16 * 4),
        ("all-gather", 2048 * 26 * 4),
        ("all-reduce", 64 + 512),
    ]
    assert step_cost.costs(module, CHIPS["v5e"]) == []


# A table that is prefetched for this run and, by a copy that nobody reads, for the next; and parts put side by side.
PREFETCH_MODULE = """HloModule step, is_scheduled=true

ENTRY %main (rows: f32[71162,128], other: f32[4000,128]) -> f32[4000,128] {
  %rows = f32[71162,128]{1,0:T(8,128)} parameter(0)
  %other = f32[4000,128]{1,0:T(8,128)} parameter(1)
  %copy-start = (f32[71162,128]{1,0:T(8,128)S(1)}, f32[71162,128]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%rows), cross_program_prefetch_index=0
  %copy-done = f32[71162,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %cast = f32[4000,128]{1,0:T(8,128)S(1)} custom-call(%other, %other), custom_call_target="ConcatBitcast"
  %used = f32[4000,128]{1,0:T(8,128)S(1)} fusion(%copy-done, %cast), kind=kLoop, calls=%f
  %copy-start.2 = (f32[4000,128]{1,0:T(8,128)}, f32[4000,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%used)
  %copy-start.1 = (f32[71162,128]{1,0:T(8,128)S(1)}, f32[71162,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%rows)
  %copy-done.1 = f32[71162,128]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  ROOT %copy-done.2 = f32[4000,128]{1,0:T(8,128)} copy-done(%copy-start.2)
}
"""


def test_a_prefetch_for_the_next_run_and_a_bitcast_are_no_work_of_this_one():
    costs = step_cost.costs(hlo.read(PREFETCH_MODULE), CHIPS["v5e"])
    assert [c.operation.name for c in costs] == ["copy-start", "used", "copy-start.2"]


BRANCHES_MODULE = """HloModule step, is_scheduled=true

%cheap (a: f32[4000,128]) -> f32[4000,128] {
  %a = f32[4000,128]{1,0:T(8,128)} parameter(0)
  ROOT %few = f32[4000,128]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"10"}
}

%dear (b: f32[4000,128]) -> f32[4000,128] {
  %b = f32[4000,128]{1,0:T(8,128)} parameter(0)
  ROOT %many = f32[4000,128]{1,0:T(8,128)} fusion(%b), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"900"}
}

%uncounted (c: f32[4000,128]) -> f32[4000,128] {
  %c = f32[4000,128]{1,0:T(8,128)} parameter(0)
  ROOT %sorted = f32[4000,128]{1,0:T(8,128)} sort(%c)
}

ENTRY %main (which: s32[], rows: f32[4000,128]) -> f32[4000,128] {
  %which = s32[]{:T(128)} parameter(0)
  %rows = f32[4000,128]{1,0:T(8,128)} parameter(1)
  ROOT %one = f32[4000,128]{1,0:T(8,128)} conditional(%which, %rows, %rows), branch_computations={%cheap, %OTHER}
}
"""


@pytest.mark.parametrize(("other", "runs"), [("dear", "many"), ("uncounted", "sorted")])
def test_of_a_conditional_one_branch_runs(other, runs):
    module = hlo.read(BRANCHES_MODULE.replace("OTHER", other))
    assert [e.operation.name for e in module.schedule] == [runs]


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.read("nothing")


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--chip", "v9"], "known are: tpu7x, v4, v5e, v5p, v6e"),
        (["--chip", "v5e", "v6e"], "--compare makes a table of several"),
        (["--plugin", "tensorly_t"], "tensorly_tt"),
        (["--preset", "kagle"], "kaggle"),
        (["--chips", "5"], "v5e has slices of 1, 4, 8, 16, 32, 64, 128, 256 chips, or a topology as 2x2"),
        (["--chip", "v4", "--chips", "2x2"], "v4 has slices of"),
        (["--chips", "4", "--batch-size", "30"], "a batch of 30 cannot be cut into equal parts for 4 chips"),
        (["--out", "nowhere/else/x.json"], "a folder that exists"),
        (["--chips", "3x5"], "whole hosts, each of 2x2 chips; take 4x6, or 1 for one chip"),
        (["--chip", "tpu7x", "--chips", "1x1x1"], "take 2x2x1, or 1 for one of a chip's 2 devices"),
        (["--dim", "0"], "dim is 0"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, expected, capsys):
    assert launch_script("compile_tpu").main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error


def test_without_the_compiler_the_extra_is_named(monkeypatch, capsys):
    script = launch_script("compile_tpu")
    monkeypatch.setattr(tpu_compile.importlib.util, "find_spec", lambda name: None)
    assert script.main([]) == 2
    assert capsys.readouterr().err == (
        "error: the TPU compiler needs jax and libtpu: pip install -e '.[xla,tpu-compiler]'\n"
    )


@needs_xla
@needs_compiler
@pytest.mark.parametrize("place", ["/dev/null/x", "a file"])
def test_a_cache_that_cannot_be_written_is_told_before_anything_is_compiled(place, tmp_path, capsys):
    (tmp_path / "a file").write_text("")
    assert launch_script("compile_tpu").main(["--cache", str(tmp_path / place)]) == 2
    assert "compiled steps cannot be kept there" in capsys.readouterr().err


def answered(monkeypatch):
    """A compiler that answers at once; each of its runs adds to the list."""
    runs = []

    def run(folder, say):
        runs.append(folder)
        answer = {"error": "", "memory": {}, "cost": {}, "hlo": f"module {len(runs)}"}
        (folder / "answer.json").write_text(json.dumps(answer))
        return ""

    monkeypatch.setattr(tpu_compile, "_run", run)
    return runs


@needs_compiler
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"nothing packed"])
def test_a_result_that_cannot_be_read_is_compiled_anew(damage, monkeypatch, tmp_path):
    runs, said = answered(monkeypatch), []
    for _ in range(2):
        tpu_compile.compile_for("v5e:2x2", b"program", [], cache=tmp_path)
    assert len(runs) == 1
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert tpu_compile.compile_for("v5e:2x2", b"program", [], cache=tmp_path, say=said.append).hlo == "module 2"
    (line,) = said
    assert line.startswith(f"{kept} cannot be read (")
    assert tpu_compile.compile_for("v5e:2x2", b"program", [], cache=tmp_path).hlo == "module 2"


@needs_compiler
def test_what_cannot_be_kept_is_not_lost(monkeypatch, tmp_path):
    answered(monkeypatch)
    said = []
    (tmp_path / "file").write_text("")
    found = tpu_compile.compile_for("v5e:2x2", b"program", [], cache=tmp_path / "file", say=said.append)
    assert found.hlo == "module 1"
    assert "cannot be written" in said[0]


@needs_compiler
def test_a_step_compiled_under_flags_is_another(monkeypatch, tmp_path):
    runs = answered(monkeypatch)

    def compiled(**flags):
        for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
            monkeypatch.setenv(name, flags.get(name, ""))
        return tpu_compile.compile_for("v5e:2x2", b"program", [], cache=tmp_path).hlo

    assert compiled() == "module 1"
    assert compiled(LIBTPU_INIT_ARGS="--xla_jf_a=1") == "module 2"
    assert compiled(XLA_FLAGS="--xla_dump_to=x") == "module 3"
    assert compiled(XLA_FLAGS=" --xla_cpu_enable_fast_math=false") == "module 1"  # torch_xla's own
    assert compiled(LIBTPU_INIT_ARGS="--xla_jf_a=1") == "module 2"
    assert len(runs) == 3


@needs_xla
def test_programs_that_differ_in_a_packed_constant_are_told_apart(monkeypatch):
    from dlrm_xla import xla_trace

    line = '    %cst = stablehlo.constant dense<"0x{}"> : tensor<2xi32> loc("name.12")'
    texts = []
    for number in ("01020304", "01020305"):
        monkeypatch.setattr(xla_trace.xm, "get_stablehlo", lambda results, n=number: line.format(n))
        texts.append(xla_trace.plain_text([]))
    assert texts[0] == '    %cst = stablehlo.constant dense<"0x01020304"> : tensor<2xi32> loc()'
    assert texts[0] != texts[1]


def compared(monkeypatch, ending):
    """The launcher with steps that are not compiled: the second case ends in ``ending``."""
    script = launch_script("compile_tpu")
    reports = []

    def report(config, chip, slice, cache, tracers):
        if reports:
            raise ending
        reports.append({"fits": True, "plugin": config.plugin, "ratio": config.ratio})
        return reports[0]

    monkeypatch.setattr(script, "report_of_several", report)
    monkeypatch.setattr(script.tpu_compare, "markdown", lambda found: f"table of {len(found)}")
    monkeypatch.setattr(script.tpu_compare, "plot", lambda found, folder: None)
    return script, reports


@needs_xla
@needs_compiler
@pytest.mark.parametrize(("ending", "code"), [(UserError("no"), 2), (KeyboardInterrupt(), 130)])
def test_what_is_finished_is_written_where_a_later_case_ends(ending, code, monkeypatch, tmp_path, capsys):
    script, reports = compared(monkeypatch, ending)
    command = ["--compare", "--plugin", "exact", "hash_rows", "--ratio", "4", "--cache", str(tmp_path)]
    assert script.main([*command, "--out", str(tmp_path / "out" / "deep")]) == code
    assert json.loads((tmp_path / "out" / "deep" / "reports.json").read_text()) == reports
    assert reports[0]["ratio"] == 0  # exact tables have no size
    assert "table of 1" in capsys.readouterr().out


@needs_xla
@needs_compiler
@pytest.mark.parametrize(
    ("plugins", "expected"), [(["hash_rows", "nothing"], "no plugin named"), (["exact", "hash_rows"], "--ratio 1e+12")]
)
def test_a_case_that_cannot_be_planned_ends_before_any_is_compiled(plugins, expected, monkeypatch, tmp_path, capsys):
    script, reports = compared(monkeypatch, UserError("too late"))
    command = ["--compare", "--ratio", "1e12", "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "out")]
    assert script.main([*command, "--plugin", *plugins]) == 2
    assert reports == []
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_xla
@needs_compiler
def test_a_terminated_launcher_ends_its_compiler(monkeypatch, tmp_path):
    sleeps, pid = tmp_path / "sleeps", tmp_path / "pid"
    sleeps.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 60\n")
    sleeps.chmod(0o755)
    script = launch_script("compile_tpu")

    def terminate(line):
        if pid.exists():
            os.kill(os.getpid(), signal.SIGTERM)

    def compiles(*rest):
        tpu_compile.compile_for("v5e:2x2", b"", [], say=terminate)

    monkeypatch.setattr(script, "report_of_several", compiles)
    monkeypatch.setattr(tpu_compile, "SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(sys, "executable", str(sleeps))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match="143"):
            script.main(["--cache", str(tmp_path / "cache")])
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@needs_xla
def test_a_tracer_does_not_hear_of_ctrl_c_and_ends_with_the_launcher(monkeypatch):
    script = launch_script("compile_tpu")
    monkeypatch.setattr(sys.modules[script.Tracers.__module__], "trace_steps", time.sleep)
    tracers = script.Tracers()
    monkeypatch.setattr(futures.Future, "result", lambda future: future)
    future = tracers.trace(60, 4)
    (child,) = multiprocessing.active_children()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{child.pid}/status").read_text())
    assert int(blocked[1], 16) >> (signal.SIGINT - 1) & 1
    tracers.close()
    assert future.done()
    assert not child.is_alive()


@needs_xla
def test_tables_are_those_of_the_data(tmp_path, capsys):
    dataset, _ = synthesize(4000, [3000, 40], [2, 1], 0, True)
    save_dataset(tmp_path / "data", dataset)
    config = replace(small(), bottom=[8], top=[8], data=str(tmp_path / "data"))
    script = launch_script("compile_tpu")
    assert script.without_missing_data([config], None) == [config]
    (longest, _, *shorter), _ = tpu_steps().trace_steps(config)
    sent = [argument.shape for argument in longest.arguments if argument.name == "batch"]
    assert {(64, dataset.dense.shape[1]), (64, 3)} <= set(sent)
    assert shorter
    rows = sum(dataset.num_rows(feature, 0) for feature in range(2))
    assert max(a.shape[0] * a.shape[1] for a in longest.arguments if a.name.startswith("rows")) < 2 * 16 * rows
    missing = replace(config, data=str(tmp_path / "gone"))
    assert [c.data for c in script.without_missing_data([missing], tmp_path / "c.yaml")] == [""]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'c.yaml'}: its data {tmp_path / 'gone'} is not here; tables are synthetic")


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        ("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.", "it needs 21.47 of 16.91 GB"),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (25.00G) exceeds available HBM "
            "(15.75G).",
            "it needs 27.84 of 16.91 GB",
        ),
        ("something else", "something else"),
    ],
)
def test_a_refusal_says_how_much_is_missing(error, verdict):
    assert tpu_steps()._refusal(error, 10**9, CHIPS["v5e"]) == f"DOES NOT FIT: {verdict}"


def test_it_is_said_which_chips_cannot_hold_a_step():
    found = {"one_chip_ms": 1.5, "efficiency_at_this_batch": None}
    found |= {"one_chip_ms_of_its_part": None, "efficiency_at_this_batch_per_chip": None}

    def report(chip):
        return {"chip": chip, "device": CHIPS[chip].device, "scaling": found, "batch_size": 64, "devices": 4}

    lines = launch_script("compile_tpu")._scaling(report("v5e"))
    assert lines == [
        "\nscaling efficiency against one chip, estimated",
        "  the same batch of 64: 4 devices cannot hold it",
        "  the same batch per chip, 16: one chip cannot hold it",
    ]
    lines = launch_script("compile_tpu")._scaling(report("tpu7x"))
    assert lines[0] == "\nscaling efficiency against one of a chip's 2 devices, estimated"
    assert lines[2] == "  the same batch per device, 16: one of a chip's 2 devices cannot hold it"


@pytest.mark.parametrize(("chip", "where"), [("v5e", "one v5e"), ("tpu7x", "one of a tpu7x's 2 devices")])
def test_one_device_of_two_is_not_called_a_chip(chip, where):
    report = {"chip": chip, "devices": 1, "device": CHIPS[chip].device}
    assert launch_script("compile_tpu")._where(report) == where


def test_a_small_model_has_its_bytes_in_a_unit_that_shows_them():
    step = {"parameter_bytes": 2_900_000, "optimizer_bytes": 0, "argument_bytes": 2_163_000_000, "padding_bytes": None}
    lines = launch_script("compile_tpu")._memory(step | {"temporary_bytes": 51_200, "verdict": "fits"})
    assert [line.split(maxsplit=1)[-1] for line in (lines[0], lines[2])] == ["2.90 MB", "2.16 GB"]
    assert lines[1].endswith(" 0 B")
    assert lines[3].endswith("unknown")
    assert lines[4].endswith(" 51.20 kB")


def small(**settings):
    config, _ = resolve({"preset": "kaggle", "batch_size": 64, "device": "xla", **settings}, None)
    return config


def tpu_steps():
    return sys.modules[launch_script("compile_tpu").compile_step.__module__]


def texts_of(config, lengths, batches):
    """The modules of the train steps that a run with such batches records."""
    from dlrm_xla import xla_trace
    from dlrm_xla.devices import open_device
    from dlrm_xla.xla_steps import RecordedStep

    device = open_device("xla")
    device = replace(device, rows=device.planned)
    plan = tpu_steps().make_plan(config, device, device.rows, None)
    steps = Steps(DLRM(13, plan.tables, plan.make_bags, **model_settings(config)), lengths, device, config)
    texts = []

    def write(results):
        texts.append(xla_trace.plain_text(results))

    for batch in batches:
        sent = steps.arranged(batch).sent(device.send)
        RecordedStep(steps._train_step, "train").trace([sent], list(sent[:3]), {"rate": 1.0}, write)
    return texts


@needs_xla
def test_bags_that_vary_in_length_have_a_step_for_each_bucket():
    tables, bags = [3000, 40, 2000], [6, 1, 3]
    settings = {"synthetic_tables": tables, "synthetic_bags": bags, "bottom": [8], "top": [8]}
    config = replace(small(), **settings, synthetic_variable=True)
    (longest, forward, *shorter), _ = tpu_steps().trace_steps(config)
    dataset, _ = synthesize(4000, tables, bags, 0, True)
    batches = {batch.ids_BS.shape[1]: batch for batch in Loader(dataset, 64).batches("train")}
    assert [step.slots for step in (forward, *shorter, longest)] == [10, *sorted(batches)]
    # As trace_steps does, the longest first: arguments of a first trace are in another order.
    traced = [longest, *shorter]
    assert [step.text for step in traced] == texts_of(config, bags, [batches[step.slots] for step in traced])
    assert [sum(t.rows for t in step.touched) for step in shorter] == [64 * step.slots for step in shorter]


@needs_xla
@pytest.mark.parametrize("placement", ["sparse", "dense"])
def test_a_bound_is_of_what_a_step_must_move_and_padding_of_what_no_row_has(placement):
    """Two rows of 48 fill 96 of a line's 128 lanes; a small table is not read more often than once."""
    rows = 4000
    settings = {"row_optimizer": "sgd", "dense_optimizer": "sgd", "dim": 48, "batch_size": 4096, "near_bytes": 0}
    config = replace(small(**settings), synthetic_tables=[rows], bottom=[8, 48], top=[8], placement={"C1": placement})
    train, _ = tpu_steps().trace_steps(config)[0]
    (array,) = [a for a in train.arguments if a.name.startswith("rows0") and a.name.endswith(".rows")]
    whole = storage_bytes(array.shape, array.dtype)
    read, written = tpu_steps().whole_bytes(train)
    if placement == "dense":  # among what is read and written whole
        assert train.touched == []
        assert whole < written < read
        return
    (touched,) = train.touched
    assert (touched.rows, touched.step_bytes, touched.forward_bytes) == (4096, 2 * whole, whole)
    assert written < whole
    assert train.empty_bytes == (math.prod(array.shape) - rows * 48) * 4 > rows // 2 * 32 * 4 - 1


@needs_xla
@pytest.mark.parametrize("plugin", ["exact", "tensorly_tt", "quotient_remainder", "hash_embeddings"])
def test_traced_on_shapes_is_what_a_step_runs(plugin):
    """The same module, text for text, as from a model with rows and weights."""
    config = replace(small(plugin=plugin), synthetic_tables=[3000, 40, 2000], bottom=[8], top=[8])
    (train, _), _ = tpu_steps().trace_steps(config)
    batch = PackedBatch(torch.zeros(64, 13), torch.zeros(64, 3, dtype=torch.int32), torch.zeros(64))
    assert "index_select" not in train.text
    assert "stablehlo.scatter" in train.text
    assert [train.text] == texts_of(config, [1] * 3, [batch])
    if plugin == "quotient_remainder":  # what bags do in turns is named after each, what they have looked up is not
        assert re.search(rb"bags\.0\.\d+/aten__remainder", train.artifact)
        assert re.search(rb"bags\.2 backward\.\d+/aten__mul", train.artifact)
        assert re.search(rb"bags\.\d+/aten__index_select", train.artifact)


@needs_xla
@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 0), ("adagrad", 1), ("adam", 2)])
def test_a_bound_does_not_grow_with_rows_that_are_not_touched(optimizer, states):
    settings = {"row_optimizer": optimizer, "dense_optimizer": optimizer, "near_bytes": 0}
    found = []
    for rows in (4_000_000, 40_000_000):
        config = replace(small(**settings), synthetic_tables=[rows, 40, 2000], bottom=[8], top=[8])
        train, forward = tpu_steps().trace_steps(config)[0]
        found.append((tpu_steps().whole_bytes(train), tpu_steps().whole_bytes(forward)))
    assert found[0] == found[1]
    (read, written), (forward_read, nothing) = found[0]
    parameters = sum(
        storage_bytes(a.shape, a.dtype)
        for a in train.arguments
        if tpu_steps().kind_of(a.name) == "parameters" and a.donated and not a.name.startswith("rows0")
    )
    assert (1 + states) * parameters <= written <= (1 + states) * parameters + 512 * len(train.arguments)
    assert nothing == 0
    assert parameters < forward_read < read


@needs_xla
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "plugin"),
    [
        ("v4", "exact"),
        ("v5e", "hash_rows:rows=4000000"),
        ("v5e", "count_sketch:rows=4000000"),
        ("v5p", "quotient_remainder:collisions=2"),
        ("v6e", "low_rank:rank=8"),
    ],
)
def test_a_small_model_compiles_for_a_chip(chip, plugin, tmp_path, monkeypatch, capsys):
    settings = tmp_path / "c.yaml"
    # 257 MB of rows: a table that fits the chip's own memory is fetched into it whole, and rightly so.
    settings.write_text("synthetic_tables: [8000000, 40, 20000]\nbottom: [16]\ntop: [16]\n")
    command = ["--chip", chip, "--preset", "kaggle", "--batch-size", "256", "--plugin", plugin]
    command += ["--config", str(settings), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "r.json")]
    script = launch_script("compile_tpu")
    assert script.main(command) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    wanted = "chip plugin preset batch_size known_cycles uncovered_operations bytes_accessed argument_bytes compiler"
    wanted += " temporary_bytes estimated_ms lower_bound_ms whole_table_copies fits"
    assert set(wanted.split()) <= set(report)
    for step in (report, report["forward"]):
        assert step["whole_table_copies"] == []
        assert step["argument_bytes"] == step["modelled_argument_bytes"]  # the storage model, to the byte
        assert step["estimated_ms"] == pytest.approx(step["known_ms"] + step["modelled_ms"])
        assert step["estimated_ms"] > step["lower_bound_ms"] > 0
    assert report["output_bytes"] < 100_000  # rows and weights are results in the buffers of their arguments
    assert report["temporary_bytes"] < 20e6
    assert "bags" in report["parts_ms"]
    # The second time nothing is compiled.
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert script.main(command) == 0
    capsys.readouterr()


@needs_xla
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "dim", "optimizer", "near_bytes", "cycles", "ms"),
    [
        ("v5e", 16, "sgd", 0, 430_000, 2.9),
        ("v5e", 16, "sgd", -1, 450_000, 1.4),
        ("v6e", 16, "sgd", -1, 290_000, 1.1),
        ("v5e", 16, "adagrad", -1, 800_000, 2.3),
        ("v5e", 48, "sgd", -1, 930_000, 1.9),  # does not divide 128
    ],
)
def test_the_kaggle_step_keeps_to_its_cycles(chip, dim, optimizer, near_bytes, cycles, ms, tmp_path, capsys):
    """A change of a line elsewhere may cost a tenth of them by another layout, and nothing else would tell."""
    settings = tmp_path / "c.yaml"
    settings.write_text(f"near_bytes: {near_bytes}\n")
    command = ["--config", str(settings)]
    command += ["--chip", chip, "--preset", "kaggle", "--batch-size", "2048", "--row-optimizer", optimizer]
    command += ["--dim", str(dim)]
    command += ["--dense-optimizer", "sgd", "--cache", str(tmp_path), "--out", str(tmp_path / "r.json")]
    assert launch_script("compile_tpu").main(command) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert 100_000 < report["known_cycles"] <= cycles
    assert 0.5 < report["estimated_ms"] <= ms
    assert report["whole_table_copies"] == []
    capsys.readouterr()


@needs_xla
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("plugin", "ms"), [("tensorly_tt", 1.05), ("tensorly_cp", 1.6), ("tensorly_tucker", 1.0)])
def test_tensor_decompositions_cost_about_what_exact_tables_do(plugin, ms, tmp_path, capsys):
    """By gathers and scatters of their cores they took 6.4, 8.4 and 9.7 ms on a v6e."""
    command = ["--chip", "v6e", "--preset", "kaggle", "--batch-size", "2048", "--plugin", plugin, "--ratio", "100"]
    command += ["--row-optimizer", "sgd", "--dense-optimizer", "sgd", "--cache", str(tmp_path)]
    assert launch_script("compile_tpu").main([*command, "--out", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert 0.5 < report["estimated_ms"] <= ms
    assert report["whole_table_copies"] == []
    capsys.readouterr()


@needs_xla
@needs_compiler
@pytest.mark.slow
def test_four_chips_share_a_step(tmp_path, capsys):
    settings = tmp_path / "c.yaml"
    settings.write_text("near_bytes: 0\n")  # one array, so one exchange of each kind
    command = ["--chip", "v5e", "--chips", "4", "--preset", "kaggle", "--batch-size", "256", "--config", str(settings)]
    command += ["--cache", str(tmp_path), "--out", str(tmp_path / "r.json"), "--row-optimizer", "sgd"]
    assert launch_script("compile_tpu").main(command) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["argument_bytes"] == report["modelled_argument_bytes"]  # a quarter of the rows, to the byte
    assert report["output_bytes"] < 1e6  # rows stay in their buffers
    assert not report["collective_as_large_as_a_table"]
    largest = {c["kind"]: c["bytes"] for c in reversed(report["collectives"])}
    bags, gradients = 256 * 26 * 16 * 4, 4 * 475_985  # of the MLPs' parameters
    assert gradients <= largest["all-reduce"] == report["largest_collective_bytes"] < 1.01 * gradients
    assert bags <= largest["all-gather"] < 1.1 * bags
    assert report["whole_table_copies"] == []
    assert 0 < report["scaling"]["efficiency_at_this_batch"] <= 1
    assert "between chips" in capsys.readouterr().out


@needs_xla
@needs_compiler
@pytest.mark.slow
def test_what_cannot_fit_says_so_and_exits_3(tmp_path, capsys):
    command = ["--chip", "v5e", "--preset", "terabyte", "--batch-size", "128", "--out", str(tmp_path / "r.json")]
    assert launch_script("compile_tpu").main([*command, "--cache", str(tmp_path)]) == 3
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["fits"]
    assert report["argument_bytes"] > 96e9
    assert report["known_cycles"] is None
    assert "DOES NOT FIT" in capsys.readouterr().out


@needs_compiler
def test_a_compiler_that_dies_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="ended without a result for v5e:2x2"):
        tpu_compile.compile_for("v5e:2x2", b"", [], cache=tmp_path)
    assert not list(tmp_path.iterdir())
