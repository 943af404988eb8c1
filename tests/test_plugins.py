"""The contract over every installed plugin, and what each of ours promises beyond it."""

import importlib.util

import numpy as np
import pytest
import torch
from dlrm_xla_plugins.tensor_train import TensorTrainBag, column_radices, row_radices

from dlrm_xla import registry
from dlrm_xla.contract import Table
from dlrm_xla.rows import RowTable
from dlrm_xla.testing import BagContract

COMPOSITIONS = [
    "exact",
    "hash_rows:rows=500+random_projection",
    "quotient_remainder+random_projection:kind=sparse_sign",
    "hash_rows:rows=1500,method=multiply_shift",
    "quotient_remainder:op=add,collisions=7",
    "hash_rows:rows=4000+tensorly_tt:rank=3",
]


@pytest.mark.parametrize("spec", [*sorted(registry.installed()), *COMPOSITIONS])
class TestContract(BagContract):
    @pytest.fixture(autouse=True)
    def _spec(self, spec):
        self.plugin = spec
        # Hashing is meant to merge some ids; a hash of 1500 buckets still keeps most of 256 neighbours apart.
        self.distinct_share = 0.7 if "multiply_shift" in spec else 0.9


@pytest.mark.parametrize("num_rows", [1, 2, 7, 997, 7919, 104729, 10131227, 2**31 - 1])
def test_tensor_train_shapes_are_padded_up_a_little(num_rows):
    n = row_radices(num_rows)
    assert num_rows <= np.prod(n, dtype=object) <= 1.1 * num_rows + 4
    assert max(n) <= 2 * round(num_rows ** (1 / 3)) + 2


@pytest.mark.parametrize(("dim", "expected"), [(1, 1), (16, 16), (64, 64), (128, 128), (13, 16), (17, 20)])
def test_tensor_train_columns(dim, expected):
    assert dim <= np.prod(column_radices(dim)) <= expected


@pytest.mark.skipif(importlib.util.find_spec("tensorly") is None, reason="tensorly is not installed")
@pytest.mark.parametrize(("rows", "dim", "backend"), [(60, 8, "numpy"), (97, 13, "numpy"), (60, 8, "pytorch")])
def test_tensor_train_from_a_table_by_tensorly(rows, dim, backend):
    import tensorly as tl

    rng = np.random.default_rng(0)
    table = Table("t", rows, dim)
    weight = torch.from_numpy(rng.normal(size=(rows, dim)).astype(np.float32))
    ids = torch.arange(rows, dtype=torch.int32).unsqueeze(1)
    errors = []
    for rank in (1, 4, 64):
        with tl.backend_context(backend):  # whatever the rest of a program has chosen
            bag = TensorTrainBag.from_table(table, weight, rank)
        errors.append((bag(ids, torch.ones(rows, 1)) - weight).norm().item() / weight.norm().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5, "at full rank the train is the table"


@pytest.mark.skipif(importlib.util.find_spec("tltorch") is None, reason="tensorly-torch is not installed")
def test_tensor_train_rows_are_those_of_tensorlys_own_tt_matrix():
    import tensorly as tl

    bag = TensorTrainBag(Table("t", 60, 8), 3)
    cores = []
    for core, n, d, left, right in zip(
        (bag.core1, bag.core2, bag.core3), bag.rows, bag.columns, (1, 3, 3), (3, 3, 1), strict=True
    ):
        cores.append(core.detach().numpy().reshape(n, left, d, right).transpose(1, 0, 2, 3))
    with tl.backend_context("numpy"):
        full = tl.tt_matrix_to_matrix(tl.tt_matrix.TTMatrix(cores))
    ids = torch.arange(60, dtype=torch.int32).unsqueeze(1)
    np.testing.assert_allclose(bag(ids, torch.ones(60, 1)).detach().numpy(), full[:60, :8], atol=1e-6)


def test_tensor_train_never_builds_the_table():
    bag = TensorTrainBag(Table("huge", 2**31 - 1, 64), 4)
    ids = torch.tensor([[0], [2**31 - 2], [12345]], dtype=torch.int32)
    assert bag(ids, torch.ones(3, 1)).isfinite().all()


def test_hash_rows_keeps_hot_and_missing_ids_apart():
    bag = registry.compose(registry.parse("hash_rows:rows=100"), RowTable)(Table("t", 1000, 4))
    mapped = bag.mapping(torch.arange(1000, dtype=torch.int32))
    assert mapped[:100].tolist() == list(range(100)), "the hottest ids have rows of their own"
    assert (mapped[1:] > 0).all(), "nobody shares the row of missing ids"
    assert mapped.max() == 99


def test_quotient_remainder_multiplies_before_pooling():
    bag = registry.compose(registry.parse("quotient_remainder:collisions=3"), RowTable)(Table("t", 30, 4))
    q, r = bag.quotient.weight, bag.remainder.weight
    out = bag(torch.tensor([[4, 17]], dtype=torch.int32), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(out[0], q[1] * r[1] + 2 * q[5] * r[2])


@pytest.mark.parametrize("kind", ["gaussian", "sparse_sign"])
def test_random_projection_keeps_lengths_on_average(kind):
    torch.manual_seed(0)
    ratios = []
    for _ in range(200):
        bag = registry.compose(registry.parse(f"random_projection:dim=8,kind={kind}"), RowTable)(Table("t", 4, 64))
        row = bag.bag.weight[1]
        ratios.append(((row @ bag.matrix).square().sum() / row.square().sum() / 8).item())
    assert np.mean(ratios) == pytest.approx(1.0, rel=0.05)
