"""The contract over every installed plugin, and what each of ours promises beyond it."""

import importlib.util
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import needs_xla
from dlrm_xla_plugins import fused_trains, hashes, multiplied_trains
from dlrm_xla_plugins.distinct_trains import distinct_rows
from dlrm_xla_plugins.grouped_trains import train_rows
from dlrm_xla_plugins.quantized import dequantize, quantize
from dlrm_xla_plugins.stored import pack, unpack
from dlrm_xla_plugins.tensor_factors import CPBag, TuckerBag
from dlrm_xla_plugins.tensor_train import TensorTrainBag, column_radices, row_radices
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dlrm_xla import registry
from dlrm_xla.codebooks import CodebookBag, multiply_codebooks
from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.plan import bytes_kept
from dlrm_xla.row_rules import RowSettings
from dlrm_xla.row_store import RowStore
from dlrm_xla.rows import RowTable
from dlrm_xla.testing import BagContract
from dlrm_xla.trained_rows import TrainedRows

COMPOSITIONS = [
    "exact",
    "hash_rows:rows=500+random_projection",
    "quotient_remainder+random_projection:kind=sparse_sign",
    "random_projection:dim=6,kind=very_sparse_sign",
    "hash_rows:rows=1500,method=multiply_shift",
    "quotient_remainder:op=add,collisions=7",
    "compositional:parts=4,op=add",
    "tensorly_cp:rank=8,block=true",
    "tensorly_tucker:rank=3,block=true",
    "hash_rows:rows=4000+tensorly_tt:rank=3",
    "hash_rows:rows=1500,method=signed",
    "hot_cold:hot=200+tensorly_tt",
    "tensorly_tt:rank=16",
    "hot_cold:hot=100+hash_rows:rows=500+random_projection",
    "quotient_remainder+int4",
    "frequency_bands:full_rows=16,width=2+int4",
    "count_sketch:rows=1000,hashes=1",
]
# What brings no smaller table of its own, and so stands before or behind another plugin.
COMPANIONS = {"hot_cold": "hot_cold+hash_rows:rows=500"}


@pytest.mark.parametrize(
    "spec", [*sorted({*registry.installed()} - {*COMPANIONS}), *COMPANIONS.values(), *COMPOSITIONS]
)
class TestContract(BagContract):
    @pytest.fixture(autouse=True)
    def _spec(self, spec):
        self.plugin = spec
        # Hashing is meant to merge some ids; a hash of 1500 buckets still keeps most of 256 neighbours apart.
        self.distinct_share = 0.7 if "multiply_shift" in spec else 0.0 if spec == "top_rows" else 0.9


@pytest.mark.parametrize("num_rows", [1, 2, 7, 997, 7919, 104729, 10131227, 2**31 - 1])
def test_tensor_train_shapes_are_padded_up_a_little(num_rows):
    n = row_radices(num_rows)
    assert num_rows <= np.prod(n, dtype=object) <= 1.1 * num_rows + 4
    assert max(n) <= 2 * round(num_rows ** (1 / 3)) + 2


@pytest.mark.parametrize(("dim", "expected"), [(1, 1), (16, 16), (64, 64), (128, 128), (13, 16), (17, 20)])
def test_tensor_train_columns(dim, expected):
    assert dim <= np.prod(column_radices(dim)) <= expected


def test_seeds_of_the_hash_are_shifts_of_one_function_far_apart():
    def shift(seed):
        return seed * 0x3C6EF372 % 2**31

    ids = torch.arange(1000, dtype=torch.int32)
    for seed in (1, 7, 33):
        assert torch.equal(hashes.mixed(ids, seed), hashes.mixed(ids + shift(seed)))
        assert torch.equal(hashes.mixed(ids, seed), hashes.mixed(ids + shift(seed) - 2**31))
    for seeds, least in ((34, 56_502_930), (55, 6_669_304)):
        shifts = sorted(map(shift, range(seeds)))
        assert min(b - a for a, b in zip(shifts, [*shifts[1:], shifts[0] + 2**31], strict=True)) == least


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
            bag = TensorTrainBag(table, rank)
            bag.set_table(TrainedRows.of(weight))
        errors.append((bag(ids, torch.ones(rows, 1)) - weight).norm().item() / weight.norm().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5, "at full rank the train is the table"


@pytest.mark.parametrize(("count", "rows"), [(1, 5), (40, 5), (40, 100), (64, 1), (333, 21)])
@pytest.mark.parametrize(
    "way", ["grouped", "distinct", "fused", "fused in groups", "slices", "crossed", "groups on a matrix unit"]
)
def test_trains_of_many_lookups_are_those_of_single_ones_with_their_gradients(way, count, rows, monkeypatch):
    torch.manual_seed(0)
    cores = [torch.randn(rows, 2, 3), torch.randn(rows, 3, 4 * 3), torch.randn(rows, 3, 2)]
    cores = [c.double().requires_grad_() for c in cores]
    ids = (torch.rand(count) ** 3 * rows**3).to(torch.int32)  # skewed, with duplicates
    digits = [torch.from_numpy(i).int() for i in np.unravel_index(ids.numpy(), (rows, rows, rows))]
    first, second, third = (core[i.long()] for core, i in zip(cores, digits, strict=True))
    expected = ((first @ second).view(count, 8, 3) @ third).flatten(1)
    if way == "grouped":
        found = train_rows(cores, digits)
    elif way == "distinct":
        found = distinct_rows(cores, ids)
    elif way.startswith("fused"):
        monkeypatch.setattr(fused_trains, "GROUPED", 0 if way == "fused in groups" else 1000)
        found = fused_trains.fused_rows(cores, digits)
    else:
        kind = {"slices": "_Slices", "crossed": "_Crossed"}.get(way, "_Grouped")
        monkeypatch.setattr(multiplied_trains, "_middle", lambda *cores: getattr(multiplied_trains, kind))
        found = multiplied_trains.multiplied_rows(cores, digits)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, cores, grad), torch.autograd.grad(expected, cores, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "spec",
    [
        *("tensorly_tt:rank=2", "tensorly_tt:rank=8", "tensorly_cp", "tensorly_cp:rank=8,block=true"),
        *("tensorly_tucker", "tensorly_tucker:rank=3,block=true", "cce", "pq", "hot_cold:hot=20+tensorly_tt"),
    ],
)
def test_codebooks_that_are_multiplied_give_what_gathered_ones_do(spec):
    found = []
    for rows in (0, 10_000):
        model = nn.Module()
        torch.manual_seed(0)
        model.bag = registry.compose(registry.parse(spec), RowTable)(Table("t", 3001, 10))
        RowStore(model, open_device("cpu"), RowSettings("sgd"), 0.1)
        multiply_codebooks(model, rows)
        told = [m for m in model.modules() if isinstance(m, CodebookBag)]
        assert told
        assert all(m.codebook_rows == rows for m in told)
        draw = torch.Generator().manual_seed(1)
        ids_BL = (torch.rand(64, 3, generator=draw) ** 2 * 3001).int()
        out_BD = model.bag(ids_BL, torch.rand(64, 3, generator=draw))
        torch.autograd.backward((out_BD * torch.randn(64, 10, generator=draw)).sum())
        found.append([out_BD, *(p.grad for p in model.parameters())])
    assert len(found[0]) > 1
    assert found[0][1].abs().sum() > 0
    for multiplied, gathered in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(multiplied, gathered, atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize("op", ["mult", "add"])
def test_compositional_rows_are_made_of_the_digits_of_an_id(op):
    bag = _made(f"compositional:parts=4,collisions=27,op={op}", Table("t", 1000, 4))
    ids = torch.arange(1000)
    parts = [bag.quotient.weight[ids // 27], bag.remainder.weight[ids % 3]]
    parts += [bag.remainder2.weight[ids // 3 % 3], bag.remainder3.weight[ids // 9 % 3]]
    expected = torch.stack(parts).prod(0) if op == "mult" else torch.stack(parts).sum(0)
    torch.testing.assert_close(_rows(bag, 1000), expected.detach())
    assert bytes_kept(bag) == (38 + 3 * 3) * 4 * 4


@pytest.mark.parametrize("kind", ["gaussian", "sparse_sign", "very_sparse_sign"])
def test_random_projection_keeps_lengths_on_average(kind):
    torch.manual_seed(0)
    ratios = []
    for _ in range(200):
        bag = registry.compose(registry.parse(f"random_projection:dim=8,kind={kind}"), RowTable)(Table("t", 4, 64))
        row = bag.bag.weight[1]
        ratios.append(((row @ bag.matrix).square().sum() / row.square().sum() / 8).item())
    assert np.mean(ratios) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("kind", "nonzero"), [("sparse_sign", 11), ("very_sparse_sign", 4)])
def test_sparse_projections_have_as_many_signs_in_each_column(kind, nonzero):
    matrix = _made(f"random_projection:dim=32,kind={kind}", Table("t", 5, 64)).matrix
    assert ((matrix != 0).sum(0) == nonzero).all()
    torch.testing.assert_close(matrix[matrix != 0].abs(), torch.full((nonzero * 64,), nonzero**-0.5))
    assert -0.3 < matrix.sign().sum().item() / (nonzero * 64) < 0.3


def _rows(bag, count):
    with torch.no_grad():
        return bag(torch.arange(count, dtype=torch.int32).unsqueeze(1), torch.ones(count, 1))


def _made(spec, table):
    torch.manual_seed(0)
    return registry.compose(registry.parse(spec), RowTable)(table)


def test_top_rows_and_hot_cold_keep_the_frequent_ids_apart():
    top = _rows(_made("top_rows:rows=10", Table("t", 50, 4)), 50)
    assert len(top.unique(dim=0)) == 10
    assert (top[9:] == top[9]).all(), "the rest is one row"
    bag = _made("hot_cold:hot=10+hash_rows:rows=5", Table("t", 50, 4))
    assert torch.equal(_rows(bag, 10), bag.hot_bag.weight)
    assert len(_rows(bag, 50)[10:].unique(dim=0)) == 4, "one row of five is of missing ids, and those are hot"


def test_bands_of_rarer_ids_have_narrower_rows_around_one_that_they_share():
    bag = _made("frequency_bands:full_rows=10,width=3", Table("t", 200, 12))
    assert [len(m) for m in bag.matrices] == [6, 3], "no narrower than asked for"
    assert bag.ends == [10, 40, 200]
    assert bytes_kept(bag) == 4 * ((10 + 3) * 12 + 30 * 6 + 160 * 3 + 6 * 12 + 3 * 12)
    full, middle, rare = (b.weight.detach() for b in bag.bags)
    shared, (widen6, widen3) = full[10:], [m.detach() for m in bag.matrices]
    expected = torch.cat([full[:10] + shared[0], middle @ widen6 + shared[1], rare @ widen3 + shared[2]])
    expected[0] = full[0] + shared[2]
    torch.testing.assert_close(_rows(bag, 200), expected)


def test_bands_take_over_a_table_made_of_bands():
    made = _made("frequency_bands:full_rows=10,width=3", Table("t", 200, 12))
    rows = _rows(made, 200)
    for lookups in (None, torch.arange(200, 0, -1)):
        bag = _made("frequency_bands:full_rows=10,width=3", Table("t", 200, 12))
        bag.bags[0].weight.data.add_(1)
        bag.set_table(TrainedRows.of(rows, lookups))
        torch.testing.assert_close(_rows(bag, 200), rows, atol=1e-5, rtol=1e-4)


def test_double_hash_gives_rare_ids_two_shared_rows():
    bag = _made("double_hash:rows=20", Table("t", 500, 4))
    weight = bag.bag.weight.detach()
    rows = _rows(bag, 500)
    assert torch.equal(rows[:10], weight[:10])
    pairs = ((weight[10:, None] + weight[None, 10:]) / 2**0.5).reshape(-1, 4)
    assert (rows[10:, None] - pairs).norm(dim=2).amin(1).max() < 1e-6


def test_hash_embeddings_weigh_shared_rows_by_the_ids_own_numbers():
    bag = _made("hash_embeddings:rows=7,hashes=3", Table("t", 40, 4))
    ids = torch.arange(40, dtype=torch.int32)
    own, shared = bag.own.weight.detach(), bag.shared.weight.detach()
    expected = sum(own[:, k : k + 1] * shared[mapping(ids).long()] for k, mapping in enumerate(bag.mappings))
    torch.testing.assert_close(_rows(bag, 40), expected)


def test_robe_puts_vectors_together_from_blocks():
    bag = _made("robe:blocks=9,width=3", Table("t", 30, 7))
    blocks = {tuple(b) for b in torch.cat([bag.bag.weight, -bag.bag.weight]).tolist()}
    for row in _rows(bag, 30):
        assert tuple(row[:3].tolist()) in blocks
        assert tuple(row[3:6].tolist()) in blocks


@pytest.mark.parametrize("rows", [40, 300])
def test_cce_clusters_ids_of_like_vectors(rows):
    bag = _made(f"cce:rows={rows},columns=2", Table("t", 1000, 6))
    assert bytes_kept(bag) == 2 * rows * 6 * 4 + 1000 * 2 * (1 if rows <= 256 else 2) + 4
    with torch.no_grad():
        for hashed in bag.hashed:
            hashed.zero_()  # so that there are no more vectors than clusters
    before, codes, other = _rows(bag, 1000), [bag.codes(k).clone() for k in range(2)], bag._hash(torch.arange(1000), 0)
    bag.refresh()
    # Every vector is found again but for clusters that k-means starts in one place.
    assert (_rows(bag, 1000) - before).norm() < 0.2 * before.norm()
    for k in range(2):
        pairs = torch.stack([codes[k].int(), bag.codes(k).int()], 1).unique(dim=0)
        assert len(pairs) == len(codes[k].unique()), "ids of one vector are in one cluster"
    assert not torch.equal(bag._hash(torch.arange(1000), 0), other), "the second hash is another one"
    twin = _made(f"cce:rows={rows},columns=2", Table("t", 1000, 6))
    twin.load_state_dict(bag.state_dict())
    bag.refresh(), twin.refresh()
    assert all(torch.equal(twin.codes(k), bag.codes(k)) for k in range(2)), "the same from the same state"


def test_srht_rows_are_orthogonal_signs():
    matrix = _made("srht:dim=6", Table("t", 5000, 16)).matrix
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(6) * 16 / 6)
    assert matrix.abs().unique().numel() == 1


def test_mixed_dim_narrows_longer_tables():
    kept = [bytes_kept(_made("mixed_dim", Table("t", rows, 16))) / rows / 4 for rows in (500, 2000, 20_000, 200_000)]
    assert kept[0] == 16
    assert kept == sorted(kept, reverse=True)
    assert kept[3] == pytest.approx(16 * 200**-0.3, abs=0.5)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dim", [16, 5])
def test_quantized_rows_are_those_that_their_stored_bytes_give_back(bits, dim):
    table = Table("t", 200, dim)
    bag = _made(f"int{bits}", table)
    weight = bag.bag.weight.detach()
    codes, scales = quantize(weight, bits)
    packed = pack(codes + 2 ** (bits - 1), bits)
    assert packed.numel() + scales.numel() * 2 == bytes_kept(bag)
    stored = dequantize(unpack(packed, dim, bits) - 2.0 ** (bits - 1), scales)
    torch.testing.assert_close(_rows(bag, 200), stored, atol=1e-8, rtol=1e-6)
    levels = (torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) + 0.5) * scales.float().unsqueeze(2)
    nearest = (levels - weight.unsqueeze(2)).abs().amin(2)
    torch.testing.assert_close((stored - weight).abs(), nearest, atol=1e-6, rtol=1e-3)


def test_pruned_rows_keep_their_largest_numbers():
    bag = _made("prune:kept=3", Table("t", 50, 16))
    weight, rows = bag.bag.weight.detach(), _rows(bag, 50)
    assert ((rows != 0).sum(1) == 3).all()
    assert torch.equal(rows[rows != 0], weight[rows != 0])
    assert (weight.abs() * (rows == 0)).amax(1).lt(torch.where(rows == 0, 9, rows.abs()).amin(1)).all()
    assert bytes_kept(bag) == 50 * (3 * 4 + 2)


def test_of_equal_numbers_pruning_keeps_as_many_as_it_counts():
    bag = _made("prune:kept=2", Table("t", 4, 4))
    weight = [[1, -1, 0.5, 0.25], [3, 2, -2, 2], [1, 1, 1, 1], [0, 0, 0, 0]]
    bag.set_table(TrainedRows.of(torch.tensor(weight)))
    expected = [[1, -1, 0, 0], [3, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert _rows(bag, 4).tolist() == expected


def test_hot_rows_are_made_by_the_innermost_builder():
    make = registry.compose(registry.parse("hot_cold:hot=9+hash_rows:rows=5"), partial(RowTable, dtype=torch.bfloat16))
    for rows in (50, 9):
        tables = [m for m in make(Table("t", rows, 4)).modules() if isinstance(m, RowTable)]
        assert {m.weight.dtype for m in tables} == {torch.bfloat16}


@pytest.mark.parametrize(("dim", "width"), [(16, 2), (7, 3)])
def test_product_codes_are_those_of_the_nearest_centroids(dim, width):
    bag = _made(f"pq:bits=3,width={width}", Table("t", 50, dim))
    parts = -(-dim // width)
    weight = torch.nn.functional.pad(bag.bag.weight.detach(), (0, parts * width - dim)).view(50, parts, 1, width)
    nearest = (weight - bag.centroids.detach()).norm(dim=3).argmin(2)  # [rows, parts]
    expected = torch.stack([bag.centroids[k, nearest[:, k]] for k in range(parts)], 1).flatten(1)[:, :dim]
    torch.testing.assert_close(_rows(bag, 50), expected.detach())
    assert bytes_kept(bag) == 50 * -(-parts * 3 // 8) + 8 * parts * width * 4


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 2**20))
def test_packed_codes_come_back(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (5, count))
    packed = pack(torch.from_numpy(codes), bits)
    text = ["".join(f"{c:0{bits}b}"[::-1] for c in row) for row in codes]  # the lowest bit first
    expected = [[int(t[k : k + 8][::-1], 2) for k in range(0, len(t), 8)] for t in text]
    assert packed.tolist() == expected
    assert unpack(packed, count, bits).tolist() == codes.tolist()


@pytest.mark.parametrize("spec", ["int8", "int4", "int2", "prune:kept=3", "pq:bits=3", "pq:bits=4,width=3"])
def test_rows_that_fill_no_whole_byte_are_stored_in_the_bytes_that_are_counted(spec):
    contract = BagContract()
    contract.plugin, contract.table = spec, Table("t", 200, 5)
    contract.test_is_stored_in_the_bytes_that_are_counted()


def test_like_rows_are_merged():
    weight = torch.randn(20, 4).repeat(10, 1) + 0.001 * torch.randn(200, 4)
    bag = _made("dedup:rows=21", Table("t", 200, 4))
    bag.set_table(TrainedRows.of(weight))
    assert (_rows(bag, 200) - weight).norm() < 0.3 * weight.norm()
    assert torch.equal(bag.map[1:20], bag.map[21:40]), "ids of like rows share one"


def test_a_row_of_zeros_is_stored_as_zeros():
    codes, scales = quantize(torch.zeros(2, 4), 4)
    assert (dequantize(codes, scales) == 0).all()


def test_quantized_rows_go_last():
    with pytest.raises(ValueError, match=r"write it last, as in hash_rows\+int4"):
        _made("int4+hash_rows:rows=10", Table("t", 100, 8))


@pytest.mark.skipif(importlib.util.find_spec("tensorly") is None, reason="tensorly is not installed")
@pytest.mark.parametrize("kind", [CPBag, TuckerBag])
def test_a_table_of_low_rank_is_found_again_by_tensorly(kind):
    """A table made by a small bag is decomposed into a bag that gives the same rows."""
    table = Table("t", 4 * 5 * 3, 6)
    torch.manual_seed(3)
    weight = _rows(kind(table, 2), table.num_rows)
    bag = kind(table, 3)
    bag.set_table(TrainedRows.of(weight))
    found = _rows(bag, table.num_rows)
    # Alternating least squares stops where it hardly gains.
    assert (found - weight).norm() < 0.05 * weight.norm()


@pytest.mark.skipif(importlib.util.find_spec("tltorch") is None, reason="tensorly-torch is not installed")
@pytest.mark.filterwarnings("ignore:Given only one int for 'rank'")
@pytest.mark.parametrize(
    ("factorization", "spec"),
    [
        ("blocktt", "tensorly_tt:rank=2"),
        ("cp", "tensorly_cp:rank=2,block=true"),
        ("tucker", "tensorly_tucker:rank=2,block=true"),
    ],
)
def test_rows_are_those_of_tensorly_torchs_factorized_embedding(factorization, spec):
    import tltorch

    torch.manual_seed(0)
    twin = tltorch.FactorizedEmbedding(
        64,
        8,
        auto_tensorize=False,
        tensorized_num_embeddings=(4, 4, 4),
        tensorized_embedding_dim=(2, 2, 2),
        factorization=factorization,
        rank=2,
    )
    bag = _made(spec, Table("t", 64, 8))
    theirs = dict(twin.named_parameters())
    factors = [theirs[f"weight.factors.factor_{k}"].detach() for k in range(3 if factorization == "blocktt" else 6)]
    with torch.no_grad():
        if factorization == "blocktt":
            for core, factor in zip((bag.core1, bag.core2, bag.core3), factors, strict=True):
                core.copy_(factor.transpose(0, 1).reshape(core.shape))  # [left, row, column, right]
        else:
            for ours, factor in zip((bag.factor1, bag.factor2, bag.factor3, *bag.columns), factors, strict=True):
                ours.copy_(factor)
            if factorization == "cp":
                bag.factor1.mul_(theirs["weight.weights"].detach() / bag.scale)
            else:
                bag.core.copy_(theirs["weight.core"].detach().reshape(bag.core.shape) / bag.scale)
    expected = twin.weight.to_matrix().detach()
    torch.testing.assert_close(_rows(bag, 64), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


@needs_xla
def test_matmul_codes_are_looked_up_and_trained_without_gather_and_scatter():
    import torch_xla.core.xla_model as xm

    device = open_device("xla")
    ids = torch.arange(64, dtype=torch.int32).view(32, 2).to("xla")
    weights = torch.ones(32, 2).to("xla")
    texts = {}
    for spec in ("matmul_codes:hot=20", "tensorly_cp"):
        bag = device.place(_made(spec, Table("t", 5000, 16)))
        out = bag(ids, weights)
        grads = torch.autograd.grad(out.square().sum(), list(bag.parameters()))
        texts[spec] = xm.get_stablehlo([out, *grads])
    # Operations of any such name; a program's locations name functions, this one too.
    assert re.search(r"stablehlo\.\w*gather", texts["tensorly_cp"])
    assert not re.search(r"stablehlo\.\w*(gather|scatter)", texts["matmul_codes:hot=20"])
