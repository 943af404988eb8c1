"""Lookups of all bags of a model at once, against each bag by itself and autograd through whole tables."""

import copy

import numpy as np
import pytest
import torch
from conftest import needs_xla
from test_rows import _device
from torch import nn

from dlrm_xla import registry
from dlrm_xla.bags import BagCollection
from dlrm_xla.contract import ComposedBag, Table, Wanted
from dlrm_xla.row_rules import RowSettings
from dlrm_xla.row_store import RowStore
from dlrm_xla.rows import RowTable

DIM, BATCH, RATE = 8, 24, 0.1
SPECS = [
    "hash_rows:rows=20,method=signed",
    "count_sketch:rows=24",
    "dedup:rows=20",
    "quotient_remainder",
    "compositional:op=add,collisions=4",
    "low_rank:rank=2",
    "hash_embeddings:rows=8",
    "robe:blocks=30",
    "int4",
    "pq",
    "tensorly_tt:rank=2",
    "frequency_bands:full_rows=4,width=2",
    "hash_rows:rows=40+top_rows:rows=20",
    "hot_cold:hot=5+tensorly_tt:rank=2",
    "hash_embeddings:rows=20+quotient_remainder",
]
DEVICES = [
    "cpu",
    pytest.param("xla", marks=needs_xla),
    pytest.param("xla-packed", marks=[needs_xla, pytest.mark.slow]),
]


class Bags(nn.Module):
    def __init__(self, specs, lengths, any_order):
        super().__init__()
        torch.manual_seed(3)
        self.lengths = lengths
        tables = [Table(f"t{k}", 90 + 7 * k, DIM) for k in range(len(specs))]
        made = [
            registry.compose(registry.parse(spec), RowTable)(table) for spec, table in zip(specs, tables, strict=True)
        ]
        self.bags = BagCollection(made, any_order)

    def forward(self, ids, weights):
        return self.bags(ids, weights)

    def batch(self, seed):
        rng = np.random.default_rng(seed)
        ids = [rng.integers(0, 90, (BATCH, n)).astype(np.int32) ** 2 % 90 for n in self.lengths]
        weights = [rng.uniform(0.3, 1, i.shape).astype(np.float32) for i in ids]
        weights[1][:, -1] = 0
        target = rng.normal(size=(BATCH, len(ids), DIM)).astype(np.float32)
        return [torch.from_numpy(i) for i in ids], [torch.from_numpy(w) for w in weights], torch.from_numpy(target)


def _loss(out_BFD, target_BFD):
    return (out_BFD * target_BFD).sum() + out_BFD.square().sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS)
def test_bags_together_train_as_each_by_itself(spec, device):
    device = _device(device)
    # Between exact tables, so that bags of several kinds of lookup come in an order of their own.
    model = Bags(["exact", spec, "hash_rows:rows=30", spec, "exact"], (1, 3, 1, 2, 1), any_order=spec != "int4")
    twin = copy.deepcopy(model)
    store = RowStore(model, device, RowSettings("sgd"), RATE)
    order = model.bags.order
    assert sorted(order) == list(range(5))
    assert model.bags.any_order or order == list(range(5))
    model = device.place(model)
    dense = torch.optim.SGD(model.parameters(), RATE) if list(model.parameters()) else None

    def step(ids, weights, target_BFD):
        torch.autograd.backward(_loss(model(ids, weights), target_BFD))
        if dense:
            dense.step()
            dense.zero_grad(set_to_none=True)
        store.step()

    compiled = device.compile(step, f"together {spec}")
    for seed in range(3):
        ids, weights, target_BFD = model.batch(seed)
        by_itself = torch.stack([bag(i, w) for bag, i, w in zip(twin.bags, ids, weights, strict=True)], 1)
        grads = torch.autograd.grad(_loss(by_itself, target_BFD), list(twin.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(twin.parameters(), grads, strict=True):
                parameter -= RATE * grad
        where = device.torch_device
        sent = [i.to(where) for i in ids], [w.to(where) for w in weights], target_BFD[:, order].to(where)
        compiled(*sent)
    ids, weights, _ = model.batch(9)
    with torch.no_grad():
        expected = torch.stack([bag(i, w) for bag, i, w in zip(twin.bags, ids, weights, strict=True)], 1)
        where = device.torch_device
        model.eval()
        found = model([i.to(where) for i in ids], [w.to(where) for w in weights]).cpu()
    torch.testing.assert_close(found, expected[:, order], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("spec", [s for s in SPECS if "tensorly" not in s])
def test_lookups_do_not_grow_with_the_number_of_bags(spec):
    counts = []
    for number in (2, 9):
        model = Bags([spec] * number, (1,) * number, any_order=True)
        store = RowStore(model, _device("cpu"), RowSettings("sgd"), RATE)
        ids, weights, _ = model.batch(0)
        model(ids, [w.fill_(1) for w in weights])
        counts.append([len(stack.lookups) for stack in store.stacks])
    assert counts[0] == counts[1]


class Residual(ComposedBag):
    """Asks twice for what the first answer does not say, and calls the same bag by itself in between."""

    def __init__(self, bag):
        super().__init__()
        self.bag = bag

    def compute(self, ids_BL, weights_BL):
        first, again = yield [Wanted(self.bag, ids_BL, weights_BL), Wanted(self.bag, ids_BL + 1, weights_BL)]
        itself = self.bag(ids_BL + 2, weights_BL)
        (last,) = yield [Wanted(self.bag, ids_BL + 3, weights_BL * first.detach().sum(1, keepdim=True).sign())]
        return first + 2 * again + 3 * itself + 4 * last


class AsksNothing(Residual):
    def compute(self, ids_BL, weights_BL):
        assert (yield []) == []
        (found,) = yield [Wanted(self.bag, ids_BL, weights_BL)]
        return found


def test_a_bag_may_ask_for_nothing():
    model = nn.Module()
    model.bags = BagCollection([AsksNothing(RowTable(Table("t", 50, DIM)))])
    ids_B1, ones_B1 = torch.tensor([[0], [7], [46]], dtype=torch.int32), torch.ones(3, 1)
    alone = model.bags([ids_B1], [ones_B1])
    RowStore(model, _device("cpu"), RowSettings("sgd"), RATE)
    torch.testing.assert_close(model.bags([ids_B1], [ones_B1]), alone)


def test_a_bag_may_ask_in_rounds_and_call_bags_too():
    torch.manual_seed(0)
    table = RowTable(Table("t", 50, DIM))
    rows = table.weight.detach().clone()
    model = nn.Module()
    model.bags = BagCollection([Residual(table)])
    ids_B1, ones_B1 = torch.tensor([[0], [7], [46]], dtype=torch.int32), torch.ones(3, 1)
    alone = model.bags([ids_B1], [ones_B1])[:, 0]
    RowStore(model, _device("cpu"), RowSettings("sgd"), RATE)
    together = model.bags([ids_B1], [ones_B1])[:, 0]
    at = ids_B1[:, 0].long()
    sign_B1 = rows[at].sum(1, keepdim=True).sign()
    expected = rows[at] + 2 * rows[at + 1] + 3 * rows[at + 2] + 4 * rows[at + 3] * sign_B1
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(together, expected)
