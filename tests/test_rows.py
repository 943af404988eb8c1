"""The exact table and its optimizers against dense twins."""

import numpy as np
import pytest
import torch
from conftest import needs_xla
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.row_optim import RowOptimizer, combine_duplicates
from dlrm_xla.rows import RowTable, use_row_gradients


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=60), st.integers(1, 5))
def test_combined_duplicates_add_up(ids, dim):
    ids_N = torch.tensor(ids + ids[::2], dtype=torch.int32)
    grads_ND = torch.arange(len(ids_N) * dim, dtype=torch.float32).reshape(-1, dim) % 17 - 8
    ids_U, sums_UD = combine_duplicates(ids_N, grads_ND)
    found: dict[int, np.ndarray] = {}
    for i, g in zip(ids_U.tolist(), sums_UD.numpy(), strict=True):
        if i in found:
            assert not g.any(), "only the first of an id's segments may hold a gradient"
        found.setdefault(i, g)
    assert set(found) == set(ids_N.tolist())
    for i in found:
        np.testing.assert_array_equal(found[i], grads_ND[ids_N == i].sum(0).numpy())


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("xla", marks=needs_xla)])
def test_optimizers_equal_numpy_by_hand(name, device):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    bag = RowTable(Table("t", 50, 6))
    weight = bag.weight.detach().numpy().astype(np.float64).copy()
    state = np.zeros(50)
    opened = open_device(device)
    bag = opened.place(bag)
    optimizer = RowOptimizer(use_row_gradients(bag), name, 0.3)
    untouched = np.ones(50, bool)

    def step(ids_BL, weights_BL, target_BD):
        out = bag(ids_BL, weights_BL)
        torch.autograd.backward((out * target_BD).sum() + out.square().sum())
        optimizer.step()

    compiled = opened.compile(step, "rows")
    for _ in range(30):
        ids = rng.integers(0, 12, (16, 4)).astype(np.int32) ** 2 % 50
        weights = rng.uniform(0, 2, (16, 4)).astype(np.float32)
        target = rng.normal(size=(16, 6)).astype(np.float32)
        untouched[np.unique(ids)] = False
        compiled(*(torch.from_numpy(a).to(opened.torch_device) for a in (ids, weights, target)))
        d = target + 2 * (weight[ids] * weights[..., None]).sum(1)
        gradient = np.zeros_like(weight)
        np.add.at(gradient, ids, d[:, None, :] * weights[..., None])
        if name == "sgd":
            weight -= 0.3 * gradient
        else:
            state += (gradient**2).mean(1)
            weight -= 0.3 * gradient / (np.sqrt(state) + 1e-8)[:, None]
        np.testing.assert_allclose(bag.weight.cpu().numpy(), weight, atol=1e-4, rtol=1e-4)
    assert untouched.any()
    if name == "adagrad":
        np.testing.assert_array_equal(optimizer.state[0].cpu().numpy()[untouched], 0)


def test_lookups_outside_training_leave_nothing_behind():
    bag = RowTable(Table("t", 5, 2))
    use_row_gradients(bag)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    bag.eval()
    bag(ids, torch.ones(1, 1))
    bag.train()
    with torch.no_grad():
        bag(ids, torch.ones(1, 1))
    assert bag.lookups == []


def test_a_table_looked_up_twice_in_a_step_gets_both_gradients():
    bag = RowTable(Table("t", 5, 2))
    optimizer = RowOptimizer(use_row_gradients(bag), "sgd", 1.0)
    before = bag.weight.clone()
    ids = torch.tensor([[3]], dtype=torch.int32)
    torch.autograd.backward((bag(ids, torch.ones(1, 1)) + bag(ids, torch.ones(1, 1))).sum())
    optimizer.step()
    torch.testing.assert_close(before - bag.weight, torch.tensor([[0.0] * 2] * 3 + [[2.0] * 2] + [[0.0] * 2]))


@pytest.mark.parametrize(("rows", "dim", "match"), [(0, 4, "0 rows"), (3, 0, "x 0"), (2**31, 4, "int32")])
def test_impossible_tables_are_refused(rows, dim, match):
    with pytest.raises(ValueError, match=match):
        Table("t", rows, dim)
