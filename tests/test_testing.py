"""The contract's tests fail plugins that break it, and pass others that do not."""

from dataclasses import replace

import pytest
from conftest import HAS_XLA, install

from dlrm_xla.contract import RedirectedBag, Table
from dlrm_xla.testing import BagContract


def _contract(spec, table=BagContract.table):
    contract = BagContract()
    contract.plugin, contract.table = spec, table
    return contract


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
