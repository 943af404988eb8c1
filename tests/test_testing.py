"""The contract's tests fail plugins that break it, and pass others that do not."""

from dataclasses import replace

import pytest
import torch
from conftest import HAS_XLA, install

from dlrm_xla.contract import ComposedBag, RedirectedBag, Table, Wanted, sized
from dlrm_xla.errors import UserError
from dlrm_xla.rows import RowTable
from dlrm_xla.testing import BagContract


def _contract(spec, table=BagContract.table):
    contract = BagContract()
    contract.plugin, contract.table = spec, table
    return contract


class _Around(ComposedBag):
    """The bag that it is around, with no more to it."""

    def __init__(self, bag):
        super().__init__()
        self.bag = bag

    def compute(self, ids_BL, weights_BL):
        (out_BD,) = yield [Wanted(self.bag, ids_BL, weights_BL)]
        return out_BD


@pytest.mark.parametrize(
    ("counted", "served", "error"),
    [
        (1, torch.nn.Identity(), "1 bytes are counted, 0 served"),
        (4999 * 64, RowTable(BagContract.table), "Tensor-likes are not close"),
        (9, None, r"cannot be stored: it has no served\(\)"),
    ],
)
@pytest.mark.parametrize("spec", ["stored", "hash_rows:rows=4999+stored"])
def test_a_bag_that_does_not_store_what_it_counts_fails(monkeypatch, spec, counted, served, error):
    def stored(table, inner):
        bag = _Around(inner(table))
        bag.bytes_to_serve = lambda: counted
        if served is not None:
            bag.served = lambda: served
        return bag

    def hash_rows(table, inner, *, rows: int):
        return _Around(inner(replace(table, num_rows=rows)))

    install(monkeypatch, stored, hash_rows)
    with pytest.raises((AssertionError, UserError), match=error):
        _contract(spec).test_is_stored_in_the_bytes_that_are_counted()


def test_sizes_in_the_wrong_order_fail(monkeypatch):
    @sized("rows", lambda table: range(table.num_rows, 1, -1))
    def reverse(table, inner, *, rows: int = 100):
        return inner(replace(table, num_rows=rows))

    install(monkeypatch, reverse)
    with pytest.raises(AssertionError, match="reverse keeps by rows, for 4,999 rows, these bytes"):
        _contract("reverse:rows=7").test_a_later_size_keeps_no_less()


@pytest.mark.parametrize(
    ("factor", "error"), [(0, "with an error of 100%"), (1 / 3, "with an error of 67%"), (torch.nan, "not finite")]
)
def test_a_bag_that_takes_over_another_table_fails(monkeypatch, factor, error):
    def around(table, inner):
        bag = _Around(inner(table))
        bag.set_table = lambda rows: bag.bag.set_table(rows.map(lambda block: block * factor, rows.dim))
        return bag

    install(monkeypatch, around)
    with pytest.raises(AssertionError, match=error):
        _contract("around").test_takes_over_a_table()


class _Centres(torch.nn.Module):
    """Rows of its own that ids share, and a refresh that does what it is told."""

    def __init__(self, table, inner, how):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.randn(99, table.dim) * table.start_std)
        self.bag = inner(replace(table, num_rows=99))
        self.how = how

    def forward(self, ids_BL, weights_BL):
        return self.bag(ids_BL % 99, weights_BL) + (self.rows[ids_BL % 99] * weights_BL.unsqueeze(-1)).sum(1)

    @torch.no_grad()
    def refresh(self):
        self.how(self)


def _refreshes(**hows):
    return [pytest.param(how, error, id=name) for name, (how, error) in hows.items()]


REFRESHES = _refreshes(
    fine=(lambda bag: bag.rows.mul_(2), None),
    random=(lambda bag: bag.rows.normal_(), "from the same state refresh() makes another rows"),
    fails=(lambda bag: bag.no_such, r"refresh\(\) of _Centres of table contract fails: AttributeError"),
    longer=(
        lambda bag: setattr(bag.rows, "data", torch.zeros(100, 16)),
        r"rows was \[99, 16\] float32 on cpu and is \[100, 16\]",
    ),
    another=(
        lambda bag: setattr(bag, "rows", torch.nn.Parameter(bag.rows.clone())),
        "rows is another Parameter, which no optimizer knows",
    ),
    nan=(lambda bag: bag.rows.fill_(torch.nan), r"rows of _Centres of table contract is not finite after refresh\(\)"),
    looks_up=(
        lambda bag: bag(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)),
        r"refresh\(\) of _Centres of table contract looks up rows of contract",
    ),
)


@pytest.mark.parametrize(("how", "error"), REFRESHES)
def test_a_refresh_that_breaks_the_contract_fails(monkeypatch, how, error):
    def centres(table, inner):
        return _Centres(table, inner, how)

    install(monkeypatch, centres)
    if error is None:
        _contract("centres").test_a_refresh_depends_on_the_state_alone()
        return
    with pytest.raises((AssertionError, UserError), match=error.replace("refresh() makes", r"refresh\(\) makes")):
        _contract("centres").test_a_refresh_depends_on_the_state_alone()


@pytest.mark.parametrize("dim", [12, 3])
def test_a_plugin_of_one_width_is_asked_for_no_other(monkeypatch, dim):
    class Shared(RedirectedBag):
        def __init__(self, bag):
            super().__init__()
            self.bag = bag

        def redirect(self, ids_BL, weights_BL):
            return ids_BL % 999, weights_BL

    def of_one_width(table, inner):
        if table.dim != dim:
            raise ValueError(f"of_one_width: the table is {table.dim} wide, but must be {dim}")
        return Shared(inner(replace(table, num_rows=999)))

    install(monkeypatch, of_one_width)
    contract = _contract("of_one_width", Table("t", 4999, dim))
    contract.test_large_ids_stay_distinct()
    if HAS_XLA:
        contract.test_large_ids_find_their_rows_on_xla()
