"""Trains small models on the xla device and prints their losses as JSON; run by test_spmd.py with one and four chips.

python tests/spmd_steps.py STEPS CASE...       CASE: plugin/row optimizer/lanes, such as hash_rows:rows=500/adagrad/128,
                                               and bytes of small tables in an array of their own
LOAD=FILE in the environment: a checkpoint to go on from; SAVE=FILE: one to write at the end.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from dlrm_xla import registry
from dlrm_xla.batches import PackedBatch
from dlrm_xla.config import resolve
from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.model import DLRM
from dlrm_xla.rows import RowTable
from dlrm_xla.steps import Steps

BATCH = 32
# Neither divides by four chips, and the last is smaller than what a line of 128 lanes holds for each of them.
ROWS = (20_001, 5_003, 7)
BAGS = (1, 3, 2)


def make_steps(case, device=None, rows=ROWS):
    plugin, optimizer, lanes, *near = case.split("/")
    device = device or open_device("xla")
    device = dataclasses.replace(device, rows=dataclasses.replace(device.rows, lanes=int(lanes)))
    settings = {"preset": "kaggle", "batch_size": BATCH, "row_optimizer": optimizer, "row_lr": 0.05, "dense_lr": 0.1}
    settings |= {"near_bytes": int(*near)}
    config, _ = resolve(settings, None)
    tables = [Table(f"t{k}", r, 16) for k, r in enumerate(rows)]
    made = [plugin if r > 1000 else "exact" for r in rows]
    bags = [registry.compose(registry.parse(p), RowTable) for p in made]
    return Steps(DLRM(13, tables, bags, bottom=[16], top=[16]), BAGS, device, config)


def batches(count, rows=ROWS):
    """Batches with many equal ids, padded samples and padded slots."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = [
            (torch.rand(BATCH, bag, generator=draw) ** 4 * r).int().clamp(max=r - 1)
            for r, bag in zip(rows, BAGS, strict=True)
        ]
        labels_B = (ids[0][:, 0] % 2 == 0).float()
        labels_B[-3:] = -1
        weights_BS = (torch.rand(BATCH, sum(BAGS), generator=draw) > 0.2).float()
        yield PackedBatch(torch.rand(BATCH, 13, generator=draw), torch.cat(ids, 1), labels_B, weights_BS)


def losses(case, count):
    steps = make_steps(case)
    if "LOAD" in os.environ:
        steps.load(Path(os.environ["LOAD"]))
    found = []
    for number, packed in enumerate(batches(count)):
        steps.train(packed, number)
        found.append(steps.mean_loss())
    return found, steps


if __name__ == "__main__":
    report = {}
    for case in sys.argv[2:]:
        before = open_device("xla").counters()
        found, steps = losses(case, int(sys.argv[1]))
        packed = next(batches(1))
        logits = steps.evaluate(packed).tolist()
        now = steps.device.counters()
        report[case] = {
            "losses": found,
            "logits": logits,
            "compiles": now.compiles - before.compiles,
            "fallbacks": now.fallbacks,
        }
        if "SAVE" in os.environ:
            steps.save(Path(os.environ["SAVE"]), {})
            report[case]["compiles_to_save"] = steps.device.counters().compiles - now.compiles
    print(json.dumps({"chips": open_device("xla").rows.num_chips, "cases": report}))
