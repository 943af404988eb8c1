"""What XLA makes of a train step: no operation as large as a table but the update in place."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
from conftest import needs_xla

OPTIMIZERS = ["sgd", "adagrad", "adagrad_element", "adam"]
TWO = [OPTIMIZERS[:2], pytest.param(OPTIMIZERS[2:], marks=pytest.mark.slow)]
FIRST_ROWS = 100_000


@pytest.fixture(scope="module", params=TWO)
def compiled(request, tmp_path_factory):
    """The compiled train step of two optimizers with each row packing, told apart by the number of rows."""
    folder = tmp_path_factory.mktemp("hlo")
    script = f"""
    import dataclasses, torch
    from dlrm_xla.devices import open_device
    device = open_device("xla")
    from dlrm_xla.batches import PackedBatch
    from dlrm_xla.config import resolve
    from dlrm_xla.contract import Table
    from dlrm_xla.model import DLRM
    from dlrm_xla.rows import RowTable
    from dlrm_xla.steps import Steps
    for number, name in enumerate({request.param}):
        for lanes in (0, 128):
            packed = dataclasses.replace(device, rows=dataclasses.replace(device.rows, lanes=lanes))
            config, _ = resolve({{"preset": "kaggle", "batch_size": 32, "row_optimizer": name}}, None)
            tables = [Table("a", {FIRST_ROWS} + 64 * number + lanes // 16, 16), Table("b", 50_000, 16)]
            steps = Steps(DLRM(13, tables, [RowTable] * 2, bottom=[8], top=[8]), [1, 1], packed, config)
            batch = PackedBatch(torch.zeros(32, 13), torch.zeros(32, 2, dtype=torch.int32), torch.ones(32))
            for step in range(2):
                steps.train(batch, step)
            device.synchronize()
    """
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train.*"
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=os.environ | {"XLA_FLAGS": flags})
    return [path.read_text() for path in folder.glob("*after_optimizations.txt")]


@needs_xla
@pytest.mark.parametrize("lanes", [0, 128])
@pytest.mark.parametrize("number", [0, 1])
def test_nothing_as_large_as_a_table_but_the_update_in_place(compiled, number, lanes):
    rows = FIRST_ROWS + 64 * number + lanes // 16 + 50_000
    shape = f"f32[{rows // 8},128]" if lanes else f"f32[{rows},16]"
    (module,) = [m for m in compiled if shape in m]
    large = []
    for line in module.splitlines():
        found = re.match(r"\s*(?:ROOT )?%(\S+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\((.*)", line)
        if found and _numbers(found[3]) >= rows:
            large.append((found[1], found[4], line))
    inside = {n for n, operation, _ in large if operation == "scatter"}
    assert inside, "the update is a scatter"
    for _, operation, line in large:
        if operation in ("call", "fusion"):
            assert "scatter" in line, line
        else:
            assert operation in ("parameter", "scatter", "get-tuple-element", "bitcast"), line
    # Rows and state are results in the buffers of their parameters.
    entry = module[module.index("\nENTRY") :]
    parameters = {
        int(number)
        for dims, number in re.findall(r"= f32\[([\d,]*)\]\S* parameter\((\d+)\)", entry)
        if _numbers(dims) >= rows
    }
    aliased = {int(n) for n in re.findall(r"\((\d+), \{\}, may-alias\)", module.splitlines()[0])}
    assert parameters
    assert parameters <= aliased


def _numbers(dims):
    total = 1
    for d in filter(None, dims.split(",")):
        total *= int(d)
    return total
