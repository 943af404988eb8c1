"""Bags of varying length: every row once, a few shapes, and the numbers of bags padded to the longest."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import SLOW_BUT_ON_CPU, launch_script
from dlrm_xla_data.bags import Bags, batches_of_buckets, bucket_lengths, bucket_of
from dlrm_xla_data.loader import Loader
from dlrm_xla_data.prepared import open_prepared, save_dataset
from dlrm_xla_data.synthetic import synthesize
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_xla.batches import PackedBatch
from dlrm_xla.config import resolve
from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.model import DLRM
from dlrm_xla.rows import RowTable
from dlrm_xla.steps import Steps

launcher = launch_script("run")
TABLES, MOST = [50, 300, 80], [1, 9, 4]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 17)), min_size=1, max_size=40),
    st.integers(1, 7),
    st.integers(1, 5),
)
def test_every_row_comes_once_in_a_bucket_that_holds_it(lengths, size, buckets):
    counts = np.array(lengths)
    ids = np.arange(counts.sum(), dtype=np.int32)
    bags = Bags(ids, np.concatenate([[0], counts.ravel().cumsum()]), 2)
    limits = bucket_lengths([3, 17], buckets)
    assert limits[-1] == (3, 17)
    assert len(limits) <= buckets
    order = np.random.default_rng(0).permutation(len(counts))
    seen = []
    for rows, number in batches_of_buckets(order, bucket_of(bags, order, limits), len(limits), size):
        assert 1 <= len(rows) <= size
        assert (counts[rows] <= limits[number]).all()
        padded = bags.padded(rows, limits[number])
        for row, slots in zip(rows, padded, strict=True):
            first = counts[:row].sum()
            for part, count in zip(np.split(slots, [limits[number][0]]), counts[row], strict=True):
                np.testing.assert_array_equal(part[:count], np.arange(first, first + count))
                assert (part[count:] == -1).all()
                first += count
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(counts)))


@pytest.fixture(scope="module")
def dataset():
    return synthesize(1500, TABLES, MOST, seed=1, variable_bags=True)[0]


def test_a_prepared_folder_holds_them_and_numpy_reads_them(dataset, tmp_path):
    save_dataset(tmp_path / "p", dataset)
    again = open_prepared(tmp_path / "p")
    rows = np.arange(1500)
    np.testing.assert_array_equal(again.slots(rows), dataset.slots(rows))
    ids, offsets = np.load(tmp_path / "p" / "ids.npy"), np.load(tmp_path / "p" / "offsets.npy")
    bag = ids[offsets[7 * 3 + 1] : offsets[7 * 3 + 2]]
    np.testing.assert_array_equal(bag, dataset.slots(np.array([7]))[0, 1 : 1 + len(bag)])
    start, stop = dataset.splits["train"]
    slots = dataset.slots(np.arange(start, stop))[:, 1:10]
    assert dataset.lookups(1, "train") == (slots >= 0).sum()
    np.testing.assert_array_equal(dataset.counts[1], np.bincount(slots[slots > 0], minlength=300)[1:])


def test_the_loader_goes_on_anywhere_and_keeps_the_order_of_other_splits(dataset):
    loader = Loader(dataset, 64, seed=3)
    batches = list(loader.batches("train", epoch=1))
    assert len(batches) == loader.num_batches("train")
    assert 1 < len({b.lengths for b in batches}) <= 4
    assert sum(int((b.labels_B >= 0).sum()) for b in batches) == 1500 - 1500 // 7
    for one, other in zip(loader.batches("train", epoch=1, start_step=5), batches[5:], strict=True):
        assert one.lengths == other.lengths
        assert torch.equal(one.ids_BS, other.ids_BS)
    labels = torch.cat([b.labels_B for b in loader.batches("test")])
    assert torch.equal(labels[labels >= 0], loader.labels("test"))
    slots = sum(b.ids_BS.numel() for b in batches)
    assert slots < 0.7 * 64 * len(batches) * sum(MOST), "fewer slots than padding all to the longest"


@pytest.mark.parametrize("device", SLOW_BUT_ON_CPU)
def test_a_bucket_is_one_compile_and_trains_as_bags_padded_to_the_longest(dataset, device):
    config, _ = resolve({"dim": 4, "bottom": [8], "top": [8], "batch_size": 64, "row_lr": 0.1}, None)
    device = open_device(device)

    def made():
        tables = [Table(f"C{k}", rows, 4) for k, rows in enumerate(TABLES, 1)]
        model = DLRM(13, tables, [RowTable] * 3, bottom=[8], top=[8], seed=0)
        return Steps(model, MOST, device, config)

    batches = list(Loader(dataset, 64).batches("train"))
    steps, wide = made(), made()
    before = device.counters().compiles
    for number, packed in enumerate(batches):
        steps.train(packed, number)
    compiled = device.counters().compiles - before
    assert compiled == (len({b.lengths for b in batches}) if device.name == "xla" else 0)
    for number, packed in enumerate(batches):
        parts = torch.split(packed.ids_BS, list(packed.lengths), 1)
        padded = [
            torch.nn.functional.pad(p, (0, most - p.shape[1]), value=-1) for p, most in zip(parts, MOST, strict=True)
        ]
        wide.train(PackedBatch(packed.dense_BI, torch.cat(padded, 1), packed.labels_B, lengths=tuple(MOST)), number)
    for (name, rows), (_, expected) in zip(steps.rows.tables(), wide.rows.tables(), strict=True):
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("device", SLOW_BUT_ON_CPU)
def test_a_run_with_them_trains_evaluates_and_exports(device, tmp_path, capsys):
    settings = {"synthetic_tables": TABLES, "synthetic_bags": MOST, "synthetic_variable": True, "synthetic_rows": 2000}
    settings |= {"bottom": [8], "top": [8], "dim": 4, "batch_size": 128, "min_count": 0, "epochs": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "run"
    assert launcher.main(["--device", device, "--config", str(tmp_path / "c.yaml"), "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["one_graph_rule_broken"] == []
    assert report["samples"] == 2000 - 2000 // 7
    best = str(out / "checkpoints" / "best.safetensors")
    assert launcher.main(["--evaluate", best, "--out", str(tmp_path / "p.parquet")]) == 0
    assert f"{report['auc']:.4f}" in capsys.readouterr().out
    assert launcher.main(["--export", best, "--out", str(tmp_path / "program"), "--batch-size", "3"]) == 0
    assert json.loads((tmp_path / "program" / "interface.json").read_text())["padding_id"] == -1
