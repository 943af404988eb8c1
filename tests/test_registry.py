import inspect
from importlib.metadata import EntryPoint

import pytest
import torch
from conftest import install

from dlrm_xla import listing, plan, registry
from dlrm_xla.contract import Table
from dlrm_xla.errors import UserError
from dlrm_xla.rows import RowTable

OURS = {"tensorly_tt", "hash_rows", "quotient_remainder", "random_projection"}


def test_our_plugins_come_through_the_same_door():
    rows = {row["name"]: row for row in listing.describe()}
    assert set(rows) >= OURS
    for name in OURS:
        assert rows[name]["package"].startswith("dlrm_xla ")
        assert rows[name]["summary"].endswith(".")
    assert "rank: int = 8" in rows["tensorly_tt"]["options"]


def test_specs_are_read_with_types():
    layers = registry.parse("hash_rows:rows=10,method=multiply_shift+random_projection:dim=2")
    assert [str(layer) for layer in layers] == ["hash_rows:rows=10,method=multiply_shift", "random_projection:dim=2"]
    assert layers[0].options == {"rows": 10, "method": "multiply_shift"}
    assert registry.parse("exact") == registry.parse("") == []


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("tensorly_t", "did you mean 'tensorly_tt'.*hash_rows"),
        ("tensorly_tt:rnk=3", "no option 'rnk'; did you mean 'rank'"),
        ("tensorly_tt:rank=many", "cannot be 'many'; it takes int"),
        ("tensorly_tt:rank=2.5", "cannot be '2.5'; it takes int"),
        ("tensorly_tt:rank=true", "cannot be 'true'"),
        ("hash_rows:method=md5", "'mod' | 'multiply_shift'"),
        ("tensorly_tt:rank", "cannot read the option 'rank'"),
        ("tensorly_tt+", "cannot read the plugin"),
        ("exact:rank=1+tensorly_tt", "cannot read the plugin"),
    ],
)
def test_what_cannot_be_read_says_what_can(spec, match):
    with pytest.raises(UserError, match=match):
        registry.parse(spec)


def _entry_points(monkeypatch, *entries):
    monkeypatch.setattr(registry, "_entry_points", lambda: entries)


def test_a_plugin_that_does_not_import_is_named_and_spoils_no_list(monkeypatch):
    _entry_points(
        monkeypatch,
        EntryPoint("broken", "no_such_module:plugin", registry.GROUP),
        EntryPoint("tensorly_tt", "dlrm_xla_plugins.tensor_train:tensorly_tt", registry.GROUP),
    )
    with pytest.raises(UserError, match=r"plugin 'broken'.*does not import.*no_such_module"):
        registry.parse("broken")
    rows = listing.describe()
    assert [row["name"] for row in rows] == ["broken", "tensorly_tt"]
    assert "BROKEN" in rows[0]["summary"]


_TYPED = """
from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from somewhere import Kind, Table

def fine(table: Table, inner: Kind, *, rank: int | None = 2, kind: Literal["a", "b"] = "a") -> Kind:
    "Types for checkers alone."
    return inner(table)

def unknown(table: Table, inner: Kind, *, kind: Kind = None):
    return inner(table)

@functools.wraps(fine)
def wrapped(*args, **options):
    return fine(*args, **options)

class Class:
    def __init__(self, table: Table, inner: Kind, *, rank: int | None = 2, kind: Literal["a", "b"] = "a") -> None: ...

class Object:
    def __call__(self, table: Table, inner: Kind, *, rank: int | None = 2, kind: Literal["a", "b"] = "a") -> Kind:
        return inner(table)

object_ = Object()
part = functools.partial(fine)
"""


def test_types_for_type_checkers_alone_spoil_no_list(monkeypatch, tmp_path):
    (tmp_path / "typed_plugins.py").write_text(_TYPED)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["Class", "fine", "object_", "part", "unknown", "wrapped"]
    _entry_points(monkeypatch, *(EntryPoint(name, f"typed_plugins:{name}", registry.GROUP) for name in names))
    rows = listing.describe()
    assert [row["name"] for row in rows] == names
    for row in rows:
        if row["name"] == "unknown":
            assert "BROKEN: the type 'Kind' of option 'kind' of plugin unknown (typed_plugins)" in row["summary"]
        else:
            assert row["options"] == "rank: int | None = 2, kind: 'a' | 'b' = 'a'"
    assert registry.parse("fine:rank=none,kind=b")[0].options == {"rank": None, "kind": "b"}
    with pytest.raises(UserError, match=r"of plugin unknown .*: NameError: name 'Kind'.*outside of if TYPE_CHECKING"):
        registry.parse("unknown:kind=1")


def test_two_packages_with_one_name_are_an_error(monkeypatch):
    _entry_points(monkeypatch, EntryPoint("x", "a:p", registry.GROUP), EntryPoint("x", "b:p", registry.GROUP))
    with pytest.raises(UserError, match="two packages bring a plugin named 'x'"):
        registry.installed()


def test_plan_keeps_small_tables_exact_and_says_why():
    tables = [Table("small", 500, 16), Table("middle", 1000, 16), Table("large", 100_000, 16)]
    plans, bags = plan.plan(tables, "tensorly_tt:rank=40", {}, min_rows=600)
    assert [p.plugin for p in plans] == ["exact", "exact", "tensorly_tt:rank=40"]
    assert "below 600 rows" in plans[0].note
    assert "no less than exact" in plans[1].note
    assert plans[2].bytes == sum(t.numel() * 4 for t in bags[2](tables[2]).parameters()) < plans[2].exact_bytes
    assert "large" in plan.text(plans)


def test_single_tables_may_have_plugins_of_their_own():
    tables = [Table("a", 50, 16), Table("b", 5000, 16), Table("c", 5000, 16)]
    plans, _ = plan.plan(tables, "exact", {"a": "hash_rows:rows=10", "c": "tensorly_tt"}, min_rows=1000)
    assert [p.plugin for p in plans] == ["hash_rows:rows=10", "exact", "tensorly_tt"]
    with pytest.raises(UserError, match="names a table 'z'"):
        plan.plan(tables, "exact", {"z": "tensorly_tt"}, min_rows=0)


def test_a_plan_of_impossible_tables_costs_nothing():
    plans, _ = plan.plan([Table("huge", 2**31 - 1, 128)], "tensorly_tt", {}, 0)
    assert plans[0].exact_bytes > 10**12 > plans[0].bytes


def test_a_plugins_refusal_is_told_with_the_table():
    with pytest.raises(UserError, match=r"random_projection:dim=99.*refuses table t \(2000 x 16\).*from 1 to 15"):
        plan.plan([Table("t", 2000, 16)], "random_projection:dim=99", {}, 0)


def test_composition_nests_from_the_outside_in():
    bag = registry.compose(registry.parse("hash_rows:rows=50+random_projection:dim=2"), RowTable)(Table("t", 999, 8))
    narrow = bag.bag.bag
    assert (narrow.table.num_rows, narrow.table.dim) == (50, 2)
    assert isinstance(narrow, RowTable)


def test_plugins_are_plain_functions_of_table_and_inner():
    for name in OURS:
        parameters = list(inspect.signature(registry.load(name)).parameters.values())
        assert [p.name for p in parameters[:2]] == ["table", "inner"]
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[2:])


def test_bytes_count_buffers_that_are_kept():
    bag = registry.compose(registry.parse("random_projection:dim=4"), RowTable)(Table("t", 100, 16))
    assert plan.bytes_kept(bag) == (100 * 4 + 4 * 16) * 4
    assert isinstance(bag.matrix, torch.Tensor)


def test_the_list_says_where_plugins_run_what_they_compose_with_and_their_floor():
    rows = {row["name"]: row["traits"] for row in listing.describe()}
    assert (
        rows["hash_rows"]
        == "runs on cpu, cuda, xla; composes anywhere; at most 500,000x by rows; from trained tables: yes"
    )
    assert (
        rows["low_rank"] == "runs on cpu, cuda, xla; composes anywhere; at most 16x by rank; from trained tables: yes"
    )
    assert rows["tensorly_tt"].startswith("runs on cpu, cuda, xla; composes last, for it asks for no rows; at most ")
    assert (
        rows["int4"]
        == "runs on cpu, cuda, xla; composes last, for it needs rows; at most 6.4x, not sized; from trained tables: yes"
    )
    assert rows["robe"].endswith("from trained tables: no")


def test_a_plugin_whose_shapes_depend_on_the_data_does_not_run_on_xla():
    def unique_ids(table, inner):
        class Bag(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bag = inner(table)

            def forward(self, ids_BL, weights_BL):
                assert len(ids_BL.unique()) >= 0
                return self.bag(ids_BL, weights_BL)

        return Bag()

    assert listing.traits(unique_ids).devices == "cpu, cuda"


def test_options_without_types_or_defaults_are_listed_and_read(monkeypatch):
    def untyped(table, inner, *, k=50, mode="a"):
        return inner(table)

    def needy(table, inner, *, k: int):
        return inner(table)

    install(monkeypatch, needy, untyped)
    needs, typed = listing.describe()
    assert (needs["options"], typed["options"]) == ("k: int, required", "k: any = 50, mode: any = 'a'")
    assert registry.parse("untyped:k=7,mode=other")[0].options == {"k": 7, "mode": "other"}
    with pytest.raises(UserError, match="plugin 'needy' needs the option 'k': write needy:k=VALUE"):
        plan.plan([Table("t", 2000, 16)], "needy", {}, 0)


def test_a_plugin_that_reads_rows_behind_it_composes_last(monkeypatch):
    def doubled(table, inner):
        bag = inner(table)
        bag.weight.data.mul_(2)
        return bag

    install(monkeypatch, doubled)
    assert "composes last, for it needs rows" in listing.describe()[0]["traits"]
