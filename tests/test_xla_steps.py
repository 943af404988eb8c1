"""Steps that are recorded once: what they do must be what tracing at each call does."""

import gc

import pytest
import torch
from conftest import needs_xla
from torch import nn

from dlrm_xla.contract import Table
from dlrm_xla.dense_optim import dense_optimizer
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.row_rules import RowSettings
from dlrm_xla.row_store import RowStore
from dlrm_xla.rows import RowTable

pytestmark = needs_xla


@pytest.fixture
def device():
    return open_device("xla")


def _pair(device):
    """The same layer and optimizer on the host and on the device."""
    host = nn.Linear(4, 3)
    moved = nn.Linear(4, 3)
    moved.load_state_dict(host.state_dict())
    device.place(moved)
    return [(layer, torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)) for layer in (host, moved)]


def _stepper(layer, optimizer):
    def step(x, rate):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * rate
        loss = layer(x).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def test_steps_at_changing_rates_are_those_of_the_host_with_one_compile(device):
    (host, host_sgd), (moved, moved_sgd) = _pair(device)
    eager, recorded = _stepper(host, host_sgd), device.compile(_stepper(moved, moved_sgd), "rates")
    before = device.counters().compiles
    for k, rate in enumerate([0.1, 0.5, 1.0, 1.0, 0.25, 0.0]):
        x = torch.full((2, 4), float(k))
        loss = recorded(x.to("xla"), rate=rate)
        assert loss.item() == pytest.approx(eager(x, rate).item(), rel=1e-5)
        torch.testing.assert_close(moved.weight.detach().cpu(), host.weight.detach())
    assert device.counters().compiles == before + 1


def test_a_rate_changed_behind_the_back_of_a_recorded_step_is_refused(device):
    model = torch.nn.Module()
    model.bag, model.top = RowTable(Table("t", 9, 4)), torch.nn.Linear(4, 1)
    rows = RowStore(model, device, RowSettings("sgd"), 0.5)
    dense = dense_optimizer("sgd", [(device.place(model).parameters(), 0.25)], device)

    def step(ids):
        model.top(model.bag(ids, torch.ones_like(ids, dtype=torch.float32))).sum().backward()
        dense.step()
        dense.zero_grad()
        rows.step()

    def scheduled(ids, rate):
        rows.learning_rate, dense.param_groups[0]["lr"] = 0.5 * rate, 0.25 * rate
        step(ids)

    ids = device.send(torch.zeros(2, 1, dtype=torch.int32))
    recorded = device.compile(step, "train")
    for change in (lambda: setattr(rows, "learning_rate", 0.1), lambda: dense.param_groups[0].update(lr=0.1)):
        recorded(ids)
        change()
        with pytest.raises(UserError, match=r"the learning rate went from 0\.\d+ to 0\.1, which the train step"):
            recorded(ids)
        rows.learning_rate, dense.param_groups[0]["lr"] = 0.5, 0.25
        recorded(ids)
    other = device.compile(scheduled, "scheduled")
    for rate in (1.0, 0.5, 0.0):
        before = [t.clone() for _, t in rows.tables()]
        other(ids, rate=rate)
        moved = (next(rows.tables())[1] - before[0]).abs().max().item()
        assert (moved > 0) == (rate > 0)
        rows.learning_rate = 0.7  # which is set again by the step
    rows.learning_rate, dense.param_groups[0]["lr"] = 0.5, 0.25
    recorded(ids)  # whatever another step sets them to while it is recorded


@pytest.mark.parametrize(
    "make", [lambda: torch.optim.SGD([torch.ones(1)], lr=-1.0), lambda: _Rateless([torch.ones(1)], {})]
)
def test_an_optimizer_that_is_no_good_does_not_matter(make, device):
    kept = None
    try:
        kept = make()
    except ValueError as error:
        kept = error.__traceback__
    weight = torch.ones(2).to("xla")

    def step(x):
        weight.add_(x)

    recorded = device.compile(step, "alone")
    recorded(torch.ones(2).to("xla"))
    recorded(torch.ones(2).to("xla"))
    assert kept is not None
    assert weight.cpu().tolist() == [3, 3]


class _Rateless(torch.optim.Optimizer):
    pass


def test_a_rate_may_equal_another_number_of_the_step(device):
    """As a learning rate of 0.001 and Adam's 1 - 0.999 do."""
    total = torch.ones(2).to("xla")

    def step(x, rate):
        total.copy_(total * 0.001 + x * (0.001 * rate))

    recorded, expected = device.compile(step, "equal numbers"), 1.0
    for k, rate in enumerate([1.0, 0.5, 1.0]):
        recorded(torch.full((2,), float(k + 1)).to("xla"), rate=rate)
        expected = expected * 0.001 + (k + 1) * 0.001 * rate
        assert total.tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_a_view_that_outlives_a_tensor_which_a_cycle_held_does_not_matter(device):
    class Holder:
        pass

    holder = Holder()
    holder.me, holder.rows = holder, torch.arange(8.0)
    kept = holder.rows[2:]
    del holder
    gc.collect()
    recorded = device.compile(lambda x: x + 1, "views")
    assert recorded(torch.ones(2).to("xla")).cpu().tolist() == [2, 2]
    assert kept[0] == 2


def test_what_happens_to_a_tensor_between_calls_is_seen(device):
    total = torch.zeros(2).to("xla")

    def add(x):
        total.add_(x)

    recorded = device.compile(add, "add")
    one = torch.ones(2).to("xla")
    recorded(one)
    total.mul_(10)
    recorded(one)
    assert total.tolist() == [11, 11]
    total.copy_(torch.tensor([5.0, 6.0]))
    recorded(one)
    assert total.tolist() == [6, 7]


def test_a_tensor_put_in_the_place_of_another_is_found(device):
    module = nn.Module()
    module.register_buffer("total", torch.zeros(2).to("xla"))

    def add(x):
        module.total.add_(x)

    recorded = device.compile(add, "add again")
    one = torch.ones(2).to("xla")
    recorded(one)
    before = device.counters().compiles
    module.total = torch.full((2,), 7.0).to("xla")
    recorded(one)
    recorded(one)
    assert module.total.tolist() == [9, 9]
    assert device.counters().compiles == before, "the same graph"


def test_outputs_come_back_as_they_were_given(device):
    recorded = device.compile(lambda x: [x + 1, x * 2], "two")
    for k in range(3):
        plus, times = recorded(torch.tensor([float(k)]).to("xla"))
        assert (plus.item(), times.item()) == (k + 1, 2 * k)


def test_a_number_of_python_that_changes_is_refused(device):
    calls = []

    def step(x):
        calls.append(1)
        return x * (3.0 + len(calls))

    with pytest.raises(UserError, match=r"changing step reads a number of the host .* \(4\.0, then 5\.0\)"):
        device.compile(step, "changing")(torch.ones(2).to("xla"))


def test_another_shape_is_refused(device):
    recorded = device.compile(lambda x: x + 1, "shape")
    recorded(torch.ones(2).to("xla"))
    with pytest.raises(UserError, match=r"recorded for arguments float32\[2\] and now gets float32\[3\]"):
        recorded(torch.ones(3).to("xla"))


def test_gradients_left_behind_are_refused(device):
    weight = nn.Parameter(torch.ones(2).to("xla"))

    def step(x):
        torch.autograd.backward((weight * x).sum())
        assert weight.grad is not None
        return weight * 2

    with pytest.raises(UserError, match=r"leaves 1 new tensors on the device, one of shape \[2\]"):
        device.compile(step, "leaving")(torch.ones(2).to("xla"))


def test_a_step_without_result_is_refused(device):
    def nothing(x):
        x + 1

    with pytest.raises(UserError, match="writes nothing and returns nothing"):
        device.compile(nothing, "idle")(torch.ones(2).to("xla"))


def test_a_refused_step_leaves_everything_as_it_was(device):
    total = torch.zeros(2).to("xla")

    def step(x):
        total.add_(x)
        return x * x.sum().item()

    with pytest.raises(UserError, match="not one XLA graph"):
        device.compile(step, "peeking")(torch.ones(2).to("xla"))
    assert total.tolist() == [0, 0]
