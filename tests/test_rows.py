"""The row store against dense twins: every optimizer, placement, packing and device."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import EVERY_DEVICE, HAS_CUDA, cuda_rows, needs_xla
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dlrm_xla import fbgemm_rows, row_store
from dlrm_xla.bags import BagCollection
from dlrm_xla.contract import Table
from dlrm_xla.dense_optim import dense_optimizer
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.lookup import Lookup
from dlrm_xla.row_files import RowFiles
from dlrm_xla.row_lines import rows_of, write_rows
from dlrm_xla.row_optim import combine_duplicates, combine_lookups, round_stochastically
from dlrm_xla.row_rules import RowSettings
from dlrm_xla.row_store import RowStore
from dlrm_xla.rows import RowStack, RowTable

ROWS, DIM, BATCH = (50, 7, 31), 6, 16
LENGTHS = (4, 1, 2)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**31 - 200), min_size=1, max_size=60), st.integers(1, 5), st.booleans())
def test_combined_duplicates_add_up(ids, dim, static):
    ids_N = torch.tensor(ids + ids[::2], dtype=torch.int32)
    grads_ND = torch.arange(len(ids_N) * dim, dtype=torch.float32).reshape(-1, dim) % 17 - 8
    if static:
        ids_U, sums_UD = combine_duplicates(ids_N, grads_ND, 2**31 - 199)
    else:
        leaf = torch.zeros(len(ids_N), 1, dim, requires_grad=True)
        leaf.grad = grads_ND.unsqueeze(1)
        lookup = Lookup(ids_N.unsqueeze(1), torch.ones(len(ids_N), 1), leaf, pooled=True, lengths=[1], names=["t"])
        ids_U, sums_UD = combine_lookups(ids_N, [lookup], open_device("cpu").rows)
    assert (ids_U[1:] > ids_U[:-1]).all(), "ids must rise and differ"
    kept = len(set(ids))
    assert set(ids_U[:kept].tolist()) == set(ids)
    assert len(ids_U) == (len(ids_N) if static else kept)
    for i, g in zip(ids_U[:kept].tolist(), sums_UD.numpy(), strict=False):
        np.testing.assert_array_equal(g, grads_ND[ids_N == i].sum(0).numpy())


@pytest.mark.parametrize("lengths", [(2, 2), (1, 3)])
def test_a_gradient_that_is_not_finite_is_laid_to_its_own_table(lengths):
    """Also where weights want gradients, so that rows and not bags are the leaf."""
    model = nn.Module()
    model.bags = BagCollection([RowTable(Table(name, 9, DIM)) for name in ("first", "second")])
    store = RowStore(model, open_device("cpu"), RowSettings("sgd"), 0.1)
    ids = [torch.zeros(BATCH, length, dtype=torch.int32) for length in lengths]
    weights = [torch.ones(BATCH, length, requires_grad=True) for length in lengths]
    (model.bags(ids, weights) * torch.tensor([1.0, np.nan]).view(2, 1)).sum().backward()
    store.step()
    with pytest.raises(UserError, match="the gradient of table second is not finite"):
        store.check_gradients()


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 3), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_rows_written_into_lines_come_back(pack, dim, left, counts):
    """Tables behind one another in lines of several rows, with columns left that stay zero."""
    rows = torch.arange(1.0, sum(counts) * dim + 1).view(-1, dim)
    lines = torch.zeros(-(-sum(counts) // pack), pack * dim + min(left, dim - 1))
    for part, first in zip(torch.split(rows, counts), np.cumsum([0, *counts]), strict=False):
        write_rows(lines, int(first), part)
    assert torch.equal(rows_of(lines, dim)[: len(rows)], rows)
    assert lines.count_nonzero() == rows.numel()


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 1300)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from(["sgd", "adagrad"]),
    st.integers(0, 3),
)
def test_cudas_kernels_add_up_ids_however_often_they_come(runs, dim, name, length):
    """Ids of one lookup and of many chunks, in any order; an id past the rows, 9, belongs to none."""
    kernels, rng = cuda_rows(), np.random.default_rng(0)
    place = "cuda" if HAS_CUDA else "cpu"
    ids_N = rng.permutation(np.repeat(*np.array(runs).T)).astype(np.int32)
    bags_N = np.arange(len(ids_N), dtype=np.int32) // length if length else rng.integers(0, 5, len(ids_N), np.int32)
    weights_N, grads_GD = rng.uniform(0.2, 1, len(ids_N)), rng.normal(size=(bags_N.max() + 1, dim))
    rows = rng.normal(size=(9, dim)).astype(np.float32)
    sums = np.zeros((10, dim))
    np.add.at(sums, ids_N, grads_GD[bags_N] * weights_N[:, None])
    sums, state = sums[:9], (np.square(sums[:9])).mean(1)
    expected = rows - 0.1 * (sums if name == "sgd" else sums / (np.sqrt(state)[:, None] + 1e-8))
    arrays = [torch.from_numpy(rows).to(place), *[torch.zeros(9, device=place)] * (name == "adagrad")]
    slots = [torch.from_numpy(a).to(place) for a in (ids_N, bags_N, weights_N.astype(np.float32))]
    slots[1] = length or slots[1]
    grads = torch.from_numpy(grads_GD.astype(np.float32)).to(place)
    step = torch.ones(1, dtype=torch.int32, device=place)
    bad = kernels.update_rows(arrays, *slots, grads, RowSettings(name), 0.1, step)
    assert bad.item() == 2**31 - 1
    np.testing.assert_allclose(arrays[0].cpu().numpy(), expected, rtol=1e-5, atol=2e-6 * len(ids_N) ** 0.5)
    if name == "adagrad":
        np.testing.assert_allclose(arrays[1].cpu().numpy(), state, rtol=1e-4)


@pytest.mark.parametrize("start", [0, 1, 31, 32, 33, 64])
def test_cudas_kernels_take_the_chunks_of_a_frequent_id_in_one_step(start):
    """Otherwise one program walks through all places of the id, wherever its first one is: 36 ms instead of 0.5."""
    kernels, where = cuda_rows(), "cuda" if HAS_CUDA else "cpu"
    ids_N = torch.tensor([0] * start + [1] * 3000 + [2] * 5, dtype=torch.int32, device=where)
    order_N, ones = torch.arange(len(ids_N), device=where), torch.ones(len(ids_N), 1, device=where)
    sums_CD, alike_C = kernels.sum_chunks(ids_N, order_N, order_N, ones[:, 0], ones, 1)
    second = start // 32 + 1
    whole = (start + 3000) // 32 - second
    assert alike_C[second] == whole
    assert sums_CD[second].item() == 32 * whole


class Twin:
    """The same tables trained by autograd through the whole table and torch's optimizers, or by hand."""

    def __init__(self, weights, name, lr, decay):
        self.weights = [nn.Parameter(torch.from_numpy(w.copy()).double()) for w in weights]
        self.name, self.lr, self.decay = name, lr, decay
        self.row_sums = [torch.zeros(len(w), dtype=torch.float64) for w in weights]
        kinds = {
            "sgd": lambda p: torch.optim.SGD(p, lr=lr),
            "adagrad_element": lambda p: torch.optim.Adagrad(p, lr=lr, eps=1e-8),
            "adam": lambda p: torch.optim.SparseAdam(p, lr=lr),
        }
        self.optimizer = kinds[name](self.weights) if name in kinds else None

    def step(self, *batches, rate=1.0):
        """One step of the gradients of all batches."""
        for w in self.weights:
            w.grad = None
        for ids, weights, target in batches:
            outs = [
                (w[i.long()] * v.double().unsqueeze(-1)).sum(1)
                for w, i, v in zip(self.weights, ids, weights, strict=True)
            ]
            out = torch.stack(outs, 1)
            torch.autograd.backward((out * target.double()).sum() + out.square().sum())
        for k, w in enumerate(self.weights):
            touched = torch.zeros(len(w), dtype=torch.bool)
            for ids, weights, _ in batches:
                touched[ids[k].long()[weights[k] != 0]] = True
            w.grad[touched] += self.decay * w.detach()[touched]
            if self.name == "adam":
                at = touched.nonzero().T
                w.grad = torch.sparse_coo_tensor(at, w.grad[touched], w.shape, check_invariants=False).coalesce()
            elif self.name == "adagrad":
                self.row_sums[k] += w.grad.square().mean(1)
                with torch.no_grad():
                    w -= rate * self.lr * w.grad / (self.row_sums[k].sqrt() + 1e-8).unsqueeze(1)
        if self.optimizer:
            self.optimizer.param_groups[0]["lr"] = rate * self.lr
            self.optimizer.step()


class Tables(nn.Module):
    def __init__(self, dim=DIM):
        super().__init__()
        torch.manual_seed(0)
        self.bags = BagCollection([RowTable(Table(f"t{k}", r, dim)) for k, r in enumerate(ROWS)])

    def forward(self, ids, weights):
        return self.bags(ids, weights)


def _batch(rng, seed_rows=5, dim=DIM):
    # heavy duplication, both ends of every table, and padded slots
    ids = [
        (rng.integers(0, seed_rows, (BATCH, n)) ** 2 % r).astype(np.int32) for r, n in zip(ROWS, LENGTHS, strict=True)
    ]
    for i, r in zip(ids, ROWS, strict=True):
        i[0, 0], i[1, 0] = r - 1, 0
    weights = [rng.uniform(0.2, 1, i.shape).astype(np.float32) for i in ids]
    weights[0][:, -1] = 0
    target = rng.normal(size=(BATCH, len(ROWS), dim)).astype(np.float32) * 0.1
    return [torch.from_numpy(i) for i in ids], [torch.from_numpy(w) for w in weights], torch.from_numpy(target)


def _device(name):
    base, _, kind = name.partition("-")
    if kind == "cuda's kernels" and HAS_CUDA:
        base, kind = "cuda", ""
    device = open_device(base)
    # Rows of 6: two to a line of 16 with four columns left, one to a line of 8 with two left.
    packed, wide, rounding = {"lanes": 16}, {"lanes": 8}, {"rounds_matmul": True}
    if kind == "cuda's kernels":
        kernels = cuda_rows()
        rows = dataclasses.replace(device.rows, sum_rows=kernels.sum_rows, update_rows=kernels.update_rows)
        return dataclasses.replace(device, rows=dataclasses.replace(rows, gather=kernels.gather_rows))
    as_on_tpu = {"packed": packed, "wide": wide, "rounding": rounding, "as_tpu": packed | rounding, "": {}}[kind]
    return dataclasses.replace(device, rows=dataclasses.replace(device.rows, **as_on_tpu))


def _stepper(model, store, device):
    full_rate = store.learning_rate

    def step(*batches, rate):
        model.train()
        store.learning_rate = full_rate * rate
        for ids, weights, target in batches:
            out = model(ids, weights)
            torch.autograd.backward((out * target).sum() + out.square().sum())
        store.step()

    compiled = device.compile(step, "rows")

    def run(*batches, rate=1.0):
        where = device.torch_device
        sent = [
            ([i.to(where) for i in ids], [w.to(where) for w in weights], t.to(where)) for ids, weights, t in batches
        ]
        compiled(*sent, rate=rate)

    return run


DEVICES = [
    *EVERY_DEVICE,
    *(pytest.param(d, marks=[needs_xla, pytest.mark.slow]) for d in ("xla-packed", "xla-wide", "xla-rounding")),
]


OPTIMIZERS = ["sgd", "adagrad", "adagrad_element", "adam"]


def _equal_the_twin(device, name, placement, decay, near_bytes=0, steps=50):
    """Trains tables and their twin, compares them, and gives back the store."""
    rng, model = np.random.default_rng(0), Tables()
    lr = 0.01
    start = [bag.weight.detach().numpy().copy() for bag in model.bags]
    twin = Twin(start, name, lr, decay)
    settings = RowSettings(name, weight_decay=decay)
    store = RowStore(model, device, settings, lr, lambda table: placement, near_bytes=near_bytes)
    step = _stepper(device.place(model), store, device)
    before = device.counters()
    for k in range(steps):
        batch, rate = _batch(rng), min(1, (k + 1) / 10)
        step(batch, rate=rate)
        twin.step(batch, rate=rate)
    after = device.counters()
    assert after.compiles - before.compiles <= 1
    assert after.fallbacks == before.fallbacks
    trained = dict(store.tables())
    for k, (expected, initial) in enumerate(zip(twin.weights, start, strict=True)):
        rows = trained[f"bags.{k}.weight"].numpy()
        np.testing.assert_allclose(rows, expected.detach().numpy(), atol=1e-6, rtol=0, err_msg=f"t{k}")
        assert not np.array_equal(rows, initial)
        untouched = np.setdiff1d(np.arange(len(initial)), [0, len(initial) - 1, *np.arange(5) ** 2 % len(initial)])
        np.testing.assert_array_equal(rows[untouched], initial[untouched])
    return store


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("placement", ["sparse", "dense", "matmul"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("device", DEVICES)
def test_fifty_steps_equal_the_dense_twin(device, name, placement, decay):
    _equal_the_twin(_device(device), name, placement, decay)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cudas_kernels_equal_the_dense_twin(name, decay):
    """Few steps, for without a GPU they are interpreted."""
    _equal_the_twin(_device("cpu-cuda's kernels"), name, "sparse", decay, steps=4)


@pytest.mark.parametrize("device", ["cpu", "cpu-cuda's kernels"])
def test_weights_that_are_a_view_of_others_count_as_they_are(device):
    """As a bag gets them that a plugin calls by itself, of a feature beside others."""
    device, model = _device(device), nn.Module()
    model.bag = RowTable(Table("t", 5, 2))
    rows = model.bag.weight.detach().clone()
    store = RowStore(model, device, RowSettings("sgd"), 1.0)
    ids, weights = torch.tensor([[3], [1], [3], [0]], dtype=torch.int32), torch.rand(4, 3)
    bag = device.place(model).bag.train()
    out = bag(ids.to(device.torch_device), weights.to(device.torch_device)[:, 1:2])
    torch.testing.assert_close(out.detach().cpu(), rows[ids[:, 0].long()] * weights[:, 1:2])
    torch.autograd.backward(out.sum())
    store.step()
    ((_, after),) = store.tables()
    torch.testing.assert_close(rows.index_add(0, ids[:, 0], -weights[:, 1:2].expand(4, 2)), after)


def test_cudas_kernels_give_no_numbers_for_ids_without_a_row():
    kernels, where = cuda_rows(), "cuda" if HAS_CUDA else "cpu"
    rows = torch.ones(4, 3, device=where)
    ids_N = torch.tensor([0, 4, -1, 3], dtype=torch.int32, device=where)
    starts_G = torch.arange(4, dtype=torch.int32, device=where)
    for found in (kernels.gather_rows(rows, ids_N, 3), kernels.sum_rows(rows, ids_N, starts_G, rows[:, 0])):
        assert found.isnan().all(1).tolist() == [False, True, True, False]
        assert (found[[0, 3]] == 1).all()


@needs_xla
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS[1:])
@pytest.mark.parametrize(
    "device", [*(pytest.param(d, marks=pytest.mark.slow) for d in ("xla", "xla-wide")), "xla-as_tpu"]
)
def test_small_arrays_that_a_step_goes_through_equal_the_dense_twin(device, name, decay):
    near_bytes = (ROWS[1] + ROWS[2]) * DIM * 4  # all but the first table
    store = _equal_the_twin(_device(device), name, "sparse", decay, near_bytes)
    through = {
        stack.num_rows: optimizer.updates_all(stack, BATCH * sum(LENGTHS[1:]), len(stack.rows))
        for stack, optimizer in zip(store.stacks, store.optimizers, strict=True)
    }
    assert through == {ROWS[0]: False, ROWS[1] + ROWS[2]: True}


@pytest.mark.parametrize(
    ("near_bytes", "step_ids", "stacks"),
    [
        (0, 0, [(sum(ROWS), False)]),
        ((ROWS[1] + ROWS[2]) * DIM * 4, 12, [(ROWS[0], False), (ROWS[1] + ROWS[2], True)]),
        ((ROWS[1] + ROWS[2]) * DIM * 4, 13, [(sum(ROWS), False)]),  # 88 lines, fewer than 7 to an id
        (sum(ROWS) * DIM * 4, 13, [(sum(ROWS), True)]),  # nothing large to be streamed
    ],
)
def test_small_tables_are_apart_where_sgd_does_not_stream_large_ones(near_bytes, step_ids, stacks):
    store = RowStore(Tables(), open_device("cpu"), RowSettings("sgd"), 0.1, near_bytes=near_bytes, step_ids=step_ids)
    assert [(stack.num_rows, stack.near) for stack in store.stacks] == stacks


@pytest.mark.parametrize("placement", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_gradients_of_several_batches_make_one_step_of_the_dense_twin(device, name, placement):
    device, rng, model = _device(device), np.random.default_rng(0), Tables()
    twin = Twin([bag.weight.detach().numpy().copy() for bag in model.bags], name, 0.01, 0.1)
    store = RowStore(model, device, RowSettings(name, weight_decay=0.1), 0.01, lambda table: placement)
    step = _stepper(device.place(model), store, device)
    for _ in range(10):
        batches = [_batch(rng, seed_rows) for seed_rows in (5, 2, 4)]
        step(*batches)
        twin.step(*batches)
    for (name, rows), expected in zip(store.tables(), twin.weights, strict=True):
        np.testing.assert_allclose(rows.numpy(), expected.detach().numpy(), atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_stochastic_rounding_is_right_on_average_and_the_same_everywhere(device):
    device = open_device(device)
    # between two bfloat16 numbers, at a quarter of the way
    values = torch.tensor([1 + 2**-7 / 4, -3 - 2**-6 / 4, 1e-20, 0.0, float("inf")]).repeat(20_000, 1)
    keys = torch.arange(20_000, dtype=torch.int32)
    on_device = round_stochastically(values.to(device.torch_device), keys.to(device.torch_device), device).cpu()
    assert torch.equal(on_device, round_stochastically(values, keys, open_device("cpu")))
    mean = on_device.double().mean(0)
    assert mean[0].item() == pytest.approx(1 + 2**-7 / 4, abs=5 * 2**-7 * (3 / 16 / 20_000) ** 0.5)
    assert mean[1].item() == pytest.approx(-3 - 2**-6 / 4, abs=5 * 2**-6 * (3 / 16 / 20_000) ** 0.5)
    assert set(on_device[:, 0].tolist()) == {1.0, 1 + 2**-7}
    assert (on_device[:, 3] == 0).all()
    assert on_device[:, 4].isinf().all()


@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_bf16_tables_follow_updates_smaller_than_their_precision(device):
    device = _device(device)
    torch.manual_seed(0)
    model = nn.Module()
    model.bag = RowTable(Table("t", 400, 8, std=1.0), dtype=torch.bfloat16)
    start = model.bag.weight.detach().float().clone()
    # adagrad_element keeps a state of two bytes too
    store = RowStore(model, device, RowSettings("sgd", state="bf16"), 1e-4)
    bag = device.place(model).bag
    ids = torch.arange(400, dtype=torch.int32).unsqueeze(1)

    def step(ids, weights):
        bag.train()
        torch.autograd.backward(bag(ids, weights).sum())
        store.step()

    compiled = device.compile(step, "rows")
    for _ in range(200):
        compiled(ids.to(device.torch_device), torch.ones(400, 1).to(device.torch_device))
    ((_, rows),) = store.tables()
    assert rows.dtype == torch.bfloat16
    # Rounded to the nearest, rows above 1/32 would not have moved at all.
    assert (start - rows.float()).mean().item() == pytest.approx(0.02, rel=0.05)


@needs_xla
def test_rows_of_bf16_in_lines_are_what_was_written():
    """Every pair of a bfloat16 number before and one after it, up to a power of two that both have."""
    from dlrm_xla import xla_rows

    device = open_device("xla")
    mantissas = torch.arange(128) / 128 + 1
    before = torch.cat([mantissas, -mantissas, torch.zeros(1)])
    after = torch.cat([mantissas * 2.0**k for k in range(-20, 21)] + [torch.zeros(1)])
    pairs_N2 = torch.cartesian_prod(before, after)
    dim, pack = 48, 2
    pairs_N2 = pairs_N2[: len(pairs_N2) // dim * dim]
    old, new = (part.reshape(-1, dim) for part in pairs_N2.unbind(1))
    rows = torch.randperm(len(old), generator=torch.Generator().manual_seed(0)).int()  # of the array, in another order
    held = torch.zeros(len(old) + len(old) % pack, dim)
    held[rows.long()] = old
    array = torch.nn.functional.pad(held.view(-1, pack * dim), (0, 128 - pack * dim)).bfloat16()
    kept = len(old) // 3  # that nothing is written to
    on_device = array.to(device.torch_device)
    xla_rows.scatter(on_device, rows[kept:].to(device.torch_device), new[kept:].to(device.torch_device), add=False)
    found = on_device.cpu()[:, : pack * dim].reshape(-1, dim)[rows.long()].float()
    assert torch.equal(found[kept:], new[kept:])
    assert torch.equal(found[:kept], old[:kept])


@pytest.mark.parametrize("name", ["adagrad", "adagrad_element", "adam"])
@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_bf16_state_stays_near_the_dense_twin(device, name):
    device, rng, model = _device(device), np.random.default_rng(0), Tables()
    start = [bag.weight.detach().numpy().copy() for bag in model.bags]
    twin = Twin(start, name, 0.05, 0.0)
    store = RowStore(model, device, RowSettings(name, state="bf16"), 0.05)
    step = _stepper(device.place(model), store, device)
    for _ in range(50):
        batch = _batch(rng)
        step(batch)
        twin.step(batch)
    assert {s.dtype for o in store.optimizers for s in o.states()} == {torch.bfloat16}
    for (name, rows), expected, initial in zip(store.tables(), twin.weights, start, strict=True):
        error = np.abs(rows.numpy() - expected.detach().numpy())
        moved = np.abs(expected.detach().numpy() - initial)
        # bfloat16 has 8 bits: what rounding does to 50 steps is below some of the last one of them
        assert 0 < error.max() < 0.03 * moved.max(), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cudas_kernels_round_to_bf16_as_every_device_does(name):
    trained = []
    for device in ("cpu", "cpu-cuda's kernels"):
        torch.manual_seed(0)
        model, device = nn.Module(), _device(device)
        model.bag = RowTable(Table("t", 40, 5, std=1.0), dtype=torch.bfloat16)
        store = RowStore(model, device, RowSettings(name, state="bf16"), 0.01)
        bag = device.place(model).bag.train()
        for step in range(3):
            # No sums, whose order may differ.
            ids = torch.arange(step, 37, dtype=torch.int32).unsqueeze(1).to(device.torch_device)
            out = bag(ids, torch.ones_like(ids, dtype=torch.float32))
            torch.autograd.backward((out * torch.linspace(-1, 1, 5).to(out.device)).sum())
            store.step()
        trained.append([rows.float() for _, rows in store.tables()] + [a.float().cpu() for a in store.arrays()])
    for one, other in zip(*trained, strict=True):
        assert (one != other).float().mean() < 0.02  # by the last bit of a root or a quotient
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", ["adagrad", "adam"])
def test_tables_in_files_train_like_tables_in_memory(tmp_path, name):
    finals = []
    for files in (None, RowFiles(tmp_path / "rows", least_bytes=900)):
        model, rng, device = nn.Module(), np.random.default_rng(0), open_device("cpu")
        torch.manual_seed(0)
        model.bags = BagCollection([RowTable(Table(f"t{k}", r, DIM), files=files) for k, r in enumerate(ROWS)])
        model.forward = model.bags.forward
        store = RowStore(model, device, RowSettings(name), 0.05, files=files)
        step = _stepper(model, store, device)
        for _ in range(5):
            step(_batch(rng))
        finals.append({n: rows.clone() for n, rows in store.tables()})
    assert {p.name.split(".")[1] for p in (tmp_path / "rows").iterdir()} >= {"t0"}
    for table, rows in finals[0].items():
        assert torch.equal(rows, finals[1][table])
    on_disk = np.fromfile(tmp_path / "rows" / "0.t0.float32", np.float32).reshape(-1, DIM)
    np.testing.assert_array_equal(on_disk, finals[0]["bags.0.weight"].numpy())
    with pytest.raises(UserError, match="has not ended"):
        RowFiles(tmp_path / "rows").create("t", (1, 1), torch.float32)
    files.release()
    RowFiles(tmp_path / "rows").create("t", (1, 1), torch.float32)
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == ["0.t.float32", "rows.json"]
    (tmp_path / "rows" / "mine").touch()
    with pytest.raises(UserError, match="holds mine"):
        RowFiles(tmp_path / "rows")


@pytest.mark.parametrize("device", ["cpu", "cpu-cuda's kernels"])
def test_a_table_looked_up_twice_in_a_step_gets_both_gradients(device):
    model, device = nn.Module(), _device(device)
    model.bag = RowTable(Table("t", 5, 2))
    store = RowStore(model, device, RowSettings("sgd"), 1.0)
    device.place(model)
    ((_, before),) = [(n, r.clone()) for n, r in store.tables()]
    ids, ones = (t.to(device.torch_device) for t in (torch.tensor([[3]], dtype=torch.int32), torch.ones(1, 1)))
    torch.autograd.backward((model.bag(ids, ones) + model.bag(ids, ones)).sum())
    store.step()
    ((_, after),) = store.tables()
    torch.testing.assert_close(before - after, torch.tensor([[0.0] * 2] * 3 + [[2.0] * 2] + [[0.0] * 2]))


@pytest.mark.parametrize("device", ["cpu", "cpu-cuda's kernels"])
def test_weights_that_a_plugin_learns_get_gradients(device):
    model, device = nn.Module(), _device(device)
    model.bag = RowTable(Table("t", 5, 2))
    dense = [model.bag.weight.detach().clone().requires_grad_(), torch.rand(4, 3, requires_grad=True)]
    store = RowStore(model, device, RowSettings("sgd"), 0.5)
    ids = torch.tensor([[3, 0, 3], [1, 1, 4], [0, 0, 0], [2, 4, 1]], dtype=torch.int32)
    learned = dense[1].detach().to(device.torch_device).clone().requires_grad_()
    torch.autograd.backward(device.place(model).bag(ids.to(device.torch_device), learned).square().sum())
    torch.autograd.backward((dense[0][ids.long()] * dense[1].unsqueeze(-1)).sum(1).square().sum())
    torch.testing.assert_close(learned.grad.cpu(), dense[1].grad)
    store.step()
    ((_, rows),) = store.tables()
    torch.testing.assert_close(rows, dense[0].detach() - 0.5 * dense[0].grad)


@pytest.mark.parametrize("placement", ["sparse", "dense", "matmul"])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 2), (2, 1)])
def test_an_empty_batch_is_looked_up(placement, lengths):
    ids_BS = torch.zeros(0, sum(lengths), dtype=torch.int32)
    weights_BS = torch.ones(ids_BS.shape)
    bag = RowTable(Table("t", 5, DIM))
    assert bag(ids_BS, weights_BS).shape == (0, DIM)
    stack = RowStack([bag], open_device("cpu"), placement)
    for training in (True, False):
        assert stack.look_up(ids_BS, weights_BS, lengths, ["t", "t"], training).shape == (0, 2, DIM)
        learned = weights_BS.clone().requires_grad_()
        assert stack.look_up(ids_BS, learned, lengths, ["t", "t"], training).shape == (0, 2, DIM)
    assert bag(ids_BS, weights_BS).shape == (0, DIM)
    for lookup in stack.lookups:
        lookup.leaf.grad = torch.zeros_like(lookup.leaf)
        assert lookup.gradients().shape == (0, DIM)


def test_lookups_outside_training_leave_nothing_behind():
    model = nn.Module()
    model.bag = RowTable(Table("t", 5, 2))
    store = RowStore(model, open_device("cpu"), RowSettings("sgd"), 1.0)
    ids, ones = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    model.eval()
    model.bag(ids, ones)
    model.train()
    with torch.no_grad():
        model.bag(ids, ones)
    assert store.stacks[0].lookups == []


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
@pytest.mark.parametrize("placement", ["sparse", "dense"])
def test_a_step_that_broke_off_does_not_count(name, placement):
    def trained(*accidents):
        torch.manual_seed(0)
        model = nn.Module()
        model.bag = RowTable(Table("t", 50, 4))
        store = RowStore(model, open_device("cpu"), RowSettings(name), 0.1, lambda table: placement)
        for k in range(4):
            if k in accidents:
                model.bag(torch.full((3, 1), 7, dtype=torch.int32), torch.ones(3, 1))  # and its loss fails
            ids = torch.arange(k, k + 6, dtype=torch.int32).view(3, 2)
            model.bag(ids, torch.ones(3, 2)).square().sum().backward()
            store.step()
        ((_, rows),) = store.tables()
        return rows

    torch.testing.assert_close(trained(0, 2), trained(), atol=0, rtol=0)


def test_rows_without_any_gradient_are_told_of():
    model = nn.Module()
    model.bag = RowTable(Table("t", 5, 2))
    store = RowStore(model, open_device("cpu"), RowSettings("sgd"), 1.0)
    out = model.bag(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    with pytest.raises(UserError, match=r"have no gradients: call backward\(\)"):
        store.step()
    out.sum().backward()
    store.step()


def test_gradients_may_be_forgotten():
    model = nn.Module()
    model.bag = RowTable(Table("t", 5, 2))
    store = RowStore(model, open_device("cpu"), RowSettings("sgd"), 1.0)
    before = [rows.clone() for _, rows in store.tables()]
    model.bag(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)).sum().backward()
    store.zero_grad()
    store.step()
    assert torch.equal(next(store.tables())[1], before[0])


def test_what_a_library_user_mistypes_is_named():
    with pytest.raises(UserError, match="'adagradd'; did you mean 'adagrad'"):
        RowSettings("adagradd")
    with pytest.raises(UserError, match="did you mean 'fp32'"):
        RowSettings("sgd", state="fp23")
    with pytest.raises(UserError, match="'adamm'; did you mean 'adam'"):
        dense_optimizer("adamm", [], open_device("cpu"))
    for wrong in ("100", 10.5):
        with pytest.raises(ValueError, match=f"num_rows is {wrong!r}, but must be a whole number"):
            Table("x", wrong, 8)
    model = nn.Module()
    model.bag = RowTable(Table("items", 5, 2))
    with pytest.raises(UserError, match=r"rate of rows is -0.1"):
        RowStore(model, open_device("cpu"), RowSettings("sgd"), -0.1)
    store = RowStore(model, open_device("cpu"), RowSettings("sgd"), 0.0)
    with pytest.raises(UserError, match="rate of rows is nan"):
        store.learning_rate = float("nan")
    with pytest.raises(UserError, match="items is in a row store already"):
        RowStore(model, open_device("cpu"), RowSettings("sgd"), 0.1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, where kernels are interpreted
@pytest.mark.parametrize("device", [*EVERY_DEVICE, "cpu-cuda's kernels"])
def test_a_gradient_that_is_not_finite_is_told_with_table_and_first_step(device):
    device, model, rng = _device(device), Tables(), np.random.default_rng(0)
    store = RowStore(model, device, RowSettings("adagrad"), 0.1)
    step = _stepper(device.place(model), store, device)
    for number in range(4):
        ids, weights, target = _batch(rng)
        if number >= 2:
            target[3, 1, 0] = float("inf")
        step((ids, weights, target))
        if number < 2:
            store.check_gradients()
    with pytest.raises(UserError, match="gradient of table t1 is not finite at step 3"):
        store.check_gradients()


@pytest.mark.slow
@pytest.mark.parametrize("device", [*EVERY_DEVICE, pytest.param("xla-packed", marks=needs_xla), "cpu-cuda's kernels"])
def test_both_ends_of_forty_million_rows(device):
    device, rows = _device(device), 40_000_000
    model = nn.Module()
    model.bag = RowTable(Table("t", rows, 4))
    ids = torch.tensor([[0], [1], [2**24 + 1], [rows - 2], [rows - 1]], dtype=torch.int32)
    start = model.bag.weight.detach()[ids[:, 0].long()].clone()
    before = model.bag.weight.detach()[[2, 2**24, 2**24 + 2, rows - 3]].clone()
    store = RowStore(model, device, RowSettings("adagrad"), 0.5)
    bag = device.place(model).bag

    def step(ids, weights):
        bag.train()
        out = bag(ids, weights)
        torch.autograd.backward((out * torch.arange(1.0, 6.0).to(out.device).unsqueeze(1)).sum())
        store.step()
        return out.detach()

    out = device.compile(step, "rows")(ids.to(device.torch_device), torch.ones(5, 1).to(device.torch_device))
    torch.testing.assert_close(out.cpu(), start)
    ((_, after),) = store.tables()
    torch.testing.assert_close(after[ids[:, 0].long()], start - 0.5)  # g / sqrt(mean(g^2)) is 1
    assert torch.equal(after[[2, 2**24, 2**24 + 2, rows - 3]], before)


@pytest.mark.parametrize(("rows", "dim", "match"), [(0, 4, "0 rows"), (3, 0, "x 0"), (2**31, 4, "int32")])
def test_impossible_tables_are_refused(rows, dim, match):
    with pytest.raises(ValueError, match=match):
        Table("t", rows, dim)


def test_stacks_stay_within_int32_and_take_as_many_tables_as_fit():
    most = row_store.MAX_STACK_ROWS
    with torch.device("meta"):
        tables = [RowTable(Table(f"t{k}", r, 1)) for k, r in enumerate([5, most - 2, 3, 2**30, 2**30 - 2**27, 7])]
        too_large = RowTable(Table("huge", most + 1, 1))
    groups = [[t.table.name for t in g] for *_, g in row_store._grouped(tables, lambda table: "sparse", set())]
    assert groups == [["t0"], ["t1"], ["t2", "t3"], ["t4", "t5"]]
    with pytest.raises(UserError, match=r"table huge has .* rows, but .* are the most"):
        list(row_store._grouped([too_large], lambda table: "sparse", set()))


def test_two_tables_of_one_description_keep_rows_of_their_own(tmp_path):
    table = Table("same", 20, 3)

    def model():
        both = nn.Module()
        both.left, both.right = RowTable(table), RowTable(table)
        return both

    start = model()
    expected = {n: p.detach().clone() for n, p in start.named_parameters()}
    store = RowStore(start, open_device("cpu"), RowSettings("sgd"), 1.0)
    assert sorted(store.names) == ["left.weight", "right.weight"]
    assert all(torch.equal(rows, expected[name]) for name, rows in store.tables())
    other = RowStore(model(), open_device("cpu"), RowSettings("sgd"), 1.0)
    other.load_tables(expected.__getitem__)
    assert all(torch.equal(rows, expected[name]) for name, rows in other.tables())


@pytest.mark.skipif(not fbgemm_rows.installed(), reason="fbgemm is not installed (extra: distributed)")
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_fbgemm_trains_the_same_arrays_to_the_same_numbers(name):
    device, rng = open_device("cpu"), np.random.default_rng(0)
    stores, steps, models = [], [], []
    for kernels in ("own", "fbgemm"):
        models.append(Tables(dim=8))
        stores.append(RowStore(models[-1], device, RowSettings(name), 0.01, kernels=kernels))
        steps.append(_stepper(models[-1], stores[-1], device))
    assert stores[1].stacks[0].fbgemm is not None
    addresses = [a.data_ptr() for a in stores[1].arrays()]
    for k in range(50):
        ids, weights, target = _batch(rng, dim=8)
        # Weighted bags take the other way, and both ways take turns.
        weights = weights if k % 5 == 0 else [torch.ones_like(w) for w in weights]
        for step in steps:
            step((ids, weights, target), rate=20 / (k + 1))
    assert [a.data_ptr() for a in stores[1].arrays()] == addresses
    for ours, theirs in zip(stores[0].arrays(), stores[1].arrays(), strict=True):
        np.testing.assert_allclose(theirs.numpy(), ours.numpy(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "rows", "taken"),
    [
        ("adagrad", 2**26, True),
        ("adagrad", 2**26 + 1, False),
        ("sgd", 2**26 + 1, True),
    ],
)
def test_fbgemm_takes_no_rows_that_its_adagrad_does_not_find(optimizer, rows, taken):
    array = torch.empty(1).expand(rows, 16)  # of no bytes
    assert fbgemm_rows.FbgemmRows.takes(array, optimizer, 0.0) == taken


@pytest.mark.slow
@pytest.mark.skipif(not fbgemm_rows.installed(), reason="fbgemm is not installed (extra: distributed)")
def test_fbgemm_finds_rows_beyond_4_gib_with_sgd():
    """Of zeros that nobody reads, so that next to nothing of them is in memory."""
    num_rows, dim = 70_000_000, 16
    rows = torch.from_numpy(np.zeros((num_rows, dim), np.float32))
    bags = fbgemm_rows.FbgemmRows(rows, [], "sgd", 1e-8, 1.0)
    ids_N = torch.tensor([0, 2**26 - 1, 2**26 + 1, num_rows - 1])
    bags.update(bags.look_up(ids_N, torch.arange(5)), torch.ones(4, dim))
    assert (rows[ids_N] == -1).all()
    assert (rows[[1, num_rows - 1 - 2**26]] == 0).all()


@pytest.mark.skipif(not fbgemm_rows.installed(), reason="fbgemm is not installed (extra: distributed)")
@pytest.mark.parametrize(("optimizer", "decay", "dim"), [("adam", 0.0, 8), ("sgd", 0.1, 8), ("sgd", 0.0, 6)])
def test_fbgemm_that_was_asked_for_is_not_left_out_in_silence(optimizer, decay, dim):
    settings = RowSettings(optimizer, weight_decay=decay)
    with pytest.raises(UserError, match="row_kernels: fbgemm takes none of these tables"):
        RowStore(Tables(dim=dim), open_device("cpu"), settings, 0.01, kernels="fbgemm")


def test_sgd_adds_equal_ids_in_one_order_on_cpu():
    """Bit for bit, for a run that is resumed is to end as one that was not."""
    rng = np.random.default_rng(5)
    ids = torch.from_numpy((rng.random((512, 40)) ** 4 * 300).astype(np.int32))
    target = torch.from_numpy(rng.normal(size=(512, 8)).astype(np.float32))
    tables = []
    for _ in range(3):
        torch.manual_seed(0)
        model = nn.Module()
        model.bag = RowTable(Table("a", 300, 8))
        store = RowStore(model, open_device("cpu"), RowSettings("sgd"), 0.1)
        for _ in range(5):
            ((model.bag(ids, torch.ones(512, 40)) - target) ** 2).mean().backward()
            store.step()
        tables.append(store.stacks[0].rows.clone())
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])
