"""Sizes from a budget."""

import json
import re
from dataclasses import replace

import pytest
from conftest import install, launch_script

from dlrm_xla import plan, registry
from dlrm_xla.contract import Table, sized
from dlrm_xla.errors import UserError
from dlrm_xla.rows import RowTable
from dlrm_xla.sizing import Budget

launcher = launch_script("run")
TABLES = [Table(f"t{rows}", rows, 16) for rows in (3, 40, 583, 5000, 70_000, 1_000_003)]
WHOLE = sum(t.num_rows for t in TABLES) * 64


def _planned(spec, ratio, single=None, tables=TABLES, whole=WHOLE):
    budget = Budget(whole / ratio, lambda bag, table: plan.bytes_kept(bag), f"--ratio {ratio}", whole)
    return plan.plan(tables, spec, single or {}, 10**9, budget=budget)[0]


@pytest.mark.parametrize("ratio", [10, 100, 1000])
@pytest.mark.parametrize("name", ["tensorly_tt", "tensorly_cp", "hash_rows", "top_rows", "robe", "dhe", "count_sketch"])
def test_a_ratio_is_kept_and_nearly_used_up(name, ratio):
    plans = _planned(name, ratio)
    assert sum(p.bytes for p in plans) <= WHOLE / ratio
    if name not in ("tensorly_tt", "dhe"):  # whose sizes go in larger steps
        assert sum(p.bytes for p in plans) > 0.95 * WHOLE / ratio


@pytest.mark.parametrize(
    ("spec", "ratio"),
    [
        *(("count_sketch:hashes=4", 20), ("count_sketch:hashes=50", 100), ("compositional:parts=4", 20)),
        *(("compositional:parts=5", 20), ("svd+pq", 20), ("low_rank+robe:blocks=2000", 20)),
    ],
)
def test_sizes_that_other_options_or_plugins_refuse_are_passed_over(spec, ratio):
    plans = _planned(spec, ratio)
    assert sum(p.bytes for p in plans) <= WHOLE / ratio
    assert plans[-1].plugin.startswith(re.split("[:+]", spec)[0])


def test_sizes_refused_at_either_end_leave_those_between(monkeypatch):
    @sized("rank", lambda table: range(1, 1000))
    def picky(table, inner, *, rank: int = 500):
        if not 317 <= rank <= 611:
            raise ValueError(f"picky: rank is {rank}, but must be from 317 to 611")
        return inner(replace(table, num_rows=rank))

    install(monkeypatch, picky)
    table = Table("t", 5000, 16)
    for rows, kept in ((316, 317), (317.5, 317), (400, 400), (700, 611), (6000, 5000)):
        budget = Budget(rows * 64, lambda bag, _: plan.bytes_kept(bag), "--memory")
        if rows < 317:
            with pytest.raises(UserError, match=r"--memory 21kB is the least"):
                plan.plan([table], "picky", {}, 0, budget=budget)
        else:
            assert plan.plan([table], "picky", {}, 0, budget=budget)[0][0].bytes == kept * 64


@pytest.mark.parametrize("parts", [3, 4, 5])
@pytest.mark.parametrize("rows", [50, 5000, 1_000_000])
def test_compositional_sizes_begin_with_the_fewest_rows(rows, parts):
    kept = [
        plan.bytes_kept(plan.on_meta(registry.compose(registry.parse(spec), RowTable), Table("t", rows, 4)))
        for radix in range(2, 2 + rows // 2 if rows < 100 else 110)
        for spec in [f"compositional:parts={parts},collisions={radix ** (parts - 1)}"]
    ]
    table = Table("t", rows, 4)
    least = registry.load("compositional").size.values(table, parts=parts)[0]
    layers = registry.parse(f"compositional:parts={parts},collisions={least}")
    assert plan.bytes_kept(plan.on_meta(registry.compose(layers, RowTable), table)) == min(kept)


def test_a_table_that_is_refused_at_every_size_stays_exact_and_the_largest_is_an_error():
    tables = [Table("narrow", 90, 3), Table("large", 100_000, 16)]
    whole = sum(4 * t.num_rows * t.dim for t in tables)
    narrow, large = _planned("svd+pq:width=4", 20, tables=tables, whole=whole)
    assert (narrow.plugin, narrow.note) == ("exact", "below the cap")
    assert large.plugin.endswith("+pq:width=4")
    with pytest.raises(UserError, match=r"exact at every size, for it is refused: narrow"):
        _planned("svd+pq:width=4", 20, tables=[Table("narrow", 90_000, 3), tables[1]], whole=whole)
    with pytest.raises(UserError, match=r"'svd:rank=1\+pq:width=99' refuses table large .*width from 1 to 1"):
        _planned("svd+pq:width=99", 20, tables=tables, whole=whole)


def test_sizes_in_the_wrong_order_are_refused_with_plugin_and_option(monkeypatch):
    @sized("rows", lambda table: range(table.num_rows, 1, -1))
    def reverse(table, inner, *, rows: int = 100):
        return inner(replace(table, num_rows=rows))

    install(monkeypatch, reverse)
    with pytest.raises(UserError, match=r"plugin 'reverse' lists the values of 'rows' in the wrong order: .* 5000, of"):
        _planned("reverse", 20, tables=[Table("small", 50, 16), Table("t", 5000, 16)])


def test_values_that_depend_on_what_is_no_option_are_an_error():
    with pytest.raises(TypeError, match="values of 'rank' depend on 'parts', which is no option of plugin"):

        @sized("rank", lambda table, parts: range(1, parts))
        def plugin(table, inner, *, rank: int = 1):
            return inner(table)


def test_a_table_of_more_numbers_than_ids_reach_is_sized():
    table = Table("C1", 40_000_000, 128)  # 5.1e9 numbers, of which robe could keep that many blocks
    whole = 4 * table.num_rows * table.dim
    budget = Budget(whole / 100, lambda bag, table: plan.bytes_kept(bag), "--ratio 100", whole)
    (planned,) = plan.plan([table], "robe", {}, 10**9, budget=budget)[0]
    assert 0.99 * whole / 100 < planned.bytes <= whole / 100


def test_one_cap_for_all_tables():
    plans = _planned("hash_rows", 100)
    exact = [p for p in plans if p.plugin == "exact"]
    assert [p.rows for p in exact] == [3, 40, 583]
    cap = min(p.bytes for p in plans if p.plugin != "exact")
    assert all(p.bytes <= cap for p in exact)
    assert all(p.note == "below the cap" for p in exact)
    hashed = [p.bytes for p in plans if p.plugin != "exact"]
    assert max(hashed) - min(hashed) <= 64, "to a row the same"


def test_the_outermost_layer_without_a_size_is_sized():
    assert _planned("quotient_remainder+random_projection", 30)[-1].plugin.endswith("+random_projection")
    given = _planned("hash_rows:rows=9000+random_projection", 30)[-1].plugin
    assert given.startswith("hash_rows:rows=9000+random_projection:dim=")
    assert _planned("hash_rows+int4", 50)[-1].plugin.endswith("+int4")


def _offered(error):
    return float(str(error).split("Take --ratio ")[1].split(", or")[0])


@pytest.mark.parametrize("name", ["low_rank", "int4", "memcom"])
def test_a_ratio_out_of_reach_is_refused_with_one_that_is_not(name):
    with pytest.raises(UserError, match=rf"--ratio 1000: {name} takes at least .* a ratio from 1 to [\d.]+") as error:
        _planned(name, 1000)
    reachable = _offered(error.value)
    assert sum(p.bytes for p in _planned(name, reachable)) <= WHOLE / reachable


def test_a_budget_below_the_exact_small_tables_is_refused_with_one_that_works():
    small = sum(t.num_rows for t in TABLES[:2]) * 64
    with pytest.raises(UserError, match="hash_rows takes at least") as error:
        _planned("hash_rows", WHOLE / small * 10)
    reachable = _offered(error.value)
    assert reachable > 1000, "read as a flag is, without a comma"
    assert sum(p.bytes for p in _planned("hash_rows", reachable)) <= WHOLE / reachable
    for offered in (f"{reachable + 1:.1f}", f"{reachable * 2:.1f}"):
        with pytest.raises(UserError, match="is within its reach"):
            _planned("hash_rows", float(offered))


@pytest.mark.parametrize(
    ("spec", "idle"),
    [
        ("tensorly_tt+int8", "int8"),
        ("tensorly_tt:rank=2+hash_rows:rows=9", "hash_rows:rows=9"),
        ("hash_rows+dhe+int4", "int4"),
        ("hot_cold:hot=100+matmul_codes+low_rank+int4", r"low_rank\+int4"),
        ("hot_cold:hot=2000000+tensorly_tt", "tensorly_tt"),
    ],
)
def test_what_would_do_nothing_behind_another_is_refused(spec, idle):
    message = rf"cannot work: .* asks for no table behind it, not even for t1000003 \(1,000,003 x 16\), so {idle} "
    with pytest.raises(UserError, match=message + "would do nothing"):
        plan.plan(TABLES, spec, {}, 1000)
    with pytest.raises(UserError, match=message + "would do nothing"):
        plan.plan(TABLES, "exact", {"t1000003": spec}, 1000)
    if "hot=2" not in spec:
        with pytest.raises(UserError, match=f"so {idle} would do nothing"):
            _planned(spec, 100)


def test_compositions_of_which_every_part_works_are_planned():
    assert plan.plan(TABLES, "hot_cold:hot=100+tensorly_tt", {}, 1000)[0][-1].plugin == "hot_cold:hot=100+tensorly_tt"
    # hot_cold's own size is more rows than these tables have; a budget chooses another.
    budget = Budget(20_000, lambda bag, table: plan.bytes_kept(bag), "--memory 20kB")
    sized = plan.plan([Table("short", 583, 16)], "hot_cold+tensorly_tt:rank=1", {}, 10**9, budget=budget)[0]
    assert sized[0].plugin.startswith("hot_cold:hot=")


def test_tables_with_a_plugin_of_their_own_are_paid_for_first():
    plans = _planned("hash_rows", 20, {"t1000003": "quotient_remainder:collisions=50"})
    assert plans[-1].plugin == "quotient_remainder:collisions=50"
    assert sum(p.bytes for p in plans) <= WHOLE / 20


def test_what_is_offered_counts_tables_with_a_plugin_of_their_own():
    single = {"t1000003": "quotient_remainder:collisions=50"}
    with pytest.raises(UserError, match=r"beside .* of those with a plugin of their own") as error:
        _planned("int4", 1000, single)
    reachable = _offered(error.value)
    assert sum(p.bytes for p in _planned("int4", reachable, single)) <= WHOLE / reachable
    with pytest.raises(UserError, match=r"--memory 2kB: .* beside .*; --memory \d+kB is the least") as error:
        plan.plan(TABLES, "int4", single, 0, budget=Budget(2000, lambda bag, _: plan.bytes_kept(bag), "--memory 2kB"))
    least = int(re.search(r"--memory (\d+)kB is", str(error.value))[1]) * 1000
    budget = Budget(least, lambda bag, _: plan.bytes_kept(bag), "--memory")
    assert sum(p.bytes for p in plan.plan(TABLES, "int4", single, 0, budget=budget)[0]) <= least
    with pytest.raises(UserError, match="nothing to size"):
        _planned("int4", 10, {t.name: "int4" for t in TABLES})
    with pytest.raises(UserError, match="'low_rank:rank=99' refuses table t40"):
        _planned("int4", 10, {"t40": "low_rank:rank=99"})


def test_a_run_keeps_to_its_ratio_and_a_plan_to_its_memory(tmp_path, capsys):
    quick = ["--synthetic-rows", "4000", "--min-count", "1", "--batch-size", "256", "--plugin", "hash_rows"]
    assert launcher.main([*quick, "--ratio", "20", "--out", str(tmp_path / "r")]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert 20 <= report["compression_ratio"] < 21
    assert report["ratio_asked"] == 20
    assert f"1/{report['compression_ratio']:,.1f} of exact tables of nominal size" in capsys.readouterr().out
    assert launcher.main([*quick, "--memory", "30MB", "--plan"]) == 0
    assert "fits in 30.00 MB" in capsys.readouterr().out


def test_ratios_without_meaning_are_refused(capsys):
    assert launcher.main(["--ratio", "10"]) == 2
    assert "name one with --plugin" in capsys.readouterr().err
    assert launcher.main(["--ratio", "0.5", "--plugin", "hash_rows"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
    assert launcher.main(["--ratio", "nan", "--plugin", "hash_rows"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
