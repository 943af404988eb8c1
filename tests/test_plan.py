"""What a plan says about bytes, against what training allocates."""

import dataclasses

import pytest
import torch
from conftest import install, launch_script, needs_xla

from dlrm_xla import plan
from dlrm_xla.config import resolve
from dlrm_xla.contract import ComposedBag, Table, Wanted
from dlrm_xla.devices import open_device
from dlrm_xla.errors import Refusal, UserError
from dlrm_xla.model import DLRM
from dlrm_xla.registry import compose, parse
from dlrm_xla.row_store import placement_rule, row_builder
from dlrm_xla.rows import RowTable
from dlrm_xla.steps import Steps

TABLES = [Table("a", 40, 16), Table("b", 20_000, 16), Table("c", 3000, 16)]


def _training(access, config, specs):
    place = placement_rule(config, access)
    makes = [compose(parse(s), RowTable) for s in specs]
    return [
        plan.training_bytes(plan.on_meta(make, t), 2, config, access, place)
        for make, t in zip(makes, TABLES, strict=True)
    ], makes


@pytest.mark.parametrize("lanes", [0, pytest.param(128, marks=needs_xla)])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_a_plan_counts_the_arrays_of_a_run(lanes, optimizer):
    device = open_device("xla" if lanes else "cpu")
    device = dataclasses.replace(device, rows=dataclasses.replace(device.rows, lanes=lanes))
    settings = {"row_optimizer": optimizer, "dense_optimizer": "sgd", "batch_size": 64, "placement": {"a": "dense"}}
    config, _ = resolve(settings, None)
    training, makes = _training(device.rows, config, ["exact", "exact", "random_projection:dim=8"])
    steps = Steps(DLRM(3, TABLES, makes, bottom=[4], top=[4]), [2, 2, 2], device, config)

    def held(tensors):
        return sum(plan.held_bytes(t.shape, t.dtype, device.rows) for t in tensors)

    arrays = [stack.rows for stack in steps.rows.stacks] + list(steps.model.bags.buffers())
    arrays = [a for a in arrays if a.dtype == torch.float32]
    states = [s for o in steps.rows.optimizers for s in o.states()]
    # Stacked, tables share the last line of an array, so a plan by table is above by less than that.
    assert held(arrays) <= sum(t.padded for t in training) <= 1.01 * held(arrays)
    assert held(states) <= sum(t.optimizer for t in training) <= 1.01 * held(states) + 512 * len(training)
    assert [t.placement for t in training] == ["dense", "sparse", "sparse"]
    rows = 64 * 2 * (128 if lanes else 16) * 4
    dense = plan.held_bytes((40, 16), torch.float32, device.rows)
    assert [t.gradient for t in training] == [dense, rows, rows if lanes else rows // 2]


def test_a_plugins_own_parameters_count_with_their_optimizer():
    config, _ = resolve({"dense_optimizer": "adam"}, None)
    (_, core, _), makes = _training(open_device("cpu").rows, config, ["exact", "tensorly_tt:rank=4", "exact"])
    bytes_of_cores = sum(p.numel() * 4 for p in makes[1](TABLES[1]).parameters())
    assert core == plan.TrainingBytes("dense", bytes_of_cores, 2 * bytes_of_cores, bytes_of_cores)


def test_memory_is_read_as_people_write_it():
    assert [plan.read_bytes(s) for s in ("16GB", "1.5 MB", "16e9", "700", "2T", "1KB")] == [
        16e9,
        1.5e6,
        16e9,
        700,
        2e12,
        1e3,
    ]
    with pytest.raises(UserError, match="'lots'; write it like 16GB"):
        plan.read_bytes("lots")


def test_what_does_not_fit_is_said_and_refused():
    config, _ = resolve({}, None)
    training, _ = _training(open_device("cpu").rows, config, ["exact"] * 3)
    plans, _ = plan.plan(TABLES, "exact", {}, 0)
    need = sum(t.padded + t.optimizer + t.gradient for t in training)
    assert ": fits in" in plan.text(plans, training, need)
    assert "DOES NOT FIT" in plan.text(plans, training, need - 1)
    plan.check_memory(training, need)
    with pytest.raises(UserError, match="training the tables needs"):
        plan.check_memory(training, need - 1)
    many, _ = resolve({"batch_size": 10_000_000}, None)
    training, _ = _training(open_device("cpu").rows, many, ["exact"] * 3)
    with pytest.raises(UserError, match=r"most of it for what one batch looks up.*Take a smaller --batch-size"):
        plan.check_memory(training, need)


@pytest.mark.parametrize(
    ("spec", "looked_up"),
    [
        ("exact", [2]),
        ("robe:blocks=100", [2 * 4]),
        ("count_sketch:hashes=3", [2 * 3]),
        ("hash_embeddings:hashes=2", [2, 2 * 2]),
        ("hot_cold:hot=9+int4", [2, 2]),
        ("tensorly_tt", []),
    ],
)
def test_a_plan_counts_every_lookup_of_a_plugin(spec, looked_up):
    bag = compose(parse(spec), RowTable)(Table("t", 5000, 16))
    assert sorted(count for _, count in plan.lookups(bag.to("meta"), 2)) == sorted(looked_up)
    config, _ = resolve({"batch_size": 64}, None)
    access = open_device("cpu").rows
    gradient = plan.training_bytes(bag, 2, config, access, placement_rule(config, access)).gradient
    rows = sum(64 * count * member.table.dim * 4 for member, count in plan.lookups(bag, 2))
    assert gradient == rows + sum(p.nbytes for n, p in bag.named_parameters() if not n.endswith("weight"))


class _Bag(torch.nn.Module):
    def __init__(self, table, out=lambda rows_BD: rows_BD, bytes_=None):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.randn(50, table.dim))
        self.out = out
        if bytes_ is not None:
            self.bytes_to_serve = lambda: bytes_

    def forward(self, ids_BL, weights_BL):
        return self.out((self.rows[ids_BL % 50] * weights_BL.unsqueeze(-1)).sum(1))


class _Yields(ComposedBag):
    def __init__(self, bag, what):
        super().__init__()
        self.bag, self.what = bag, what

    def compute(self, ids_BL, weights_BL):
        wanted = Wanted(self.bag, ids_BL % 50, weights_BL)
        yield {"wanted": wanted, "tuple": (wanted,), "list": [wanted]}[self.what]


class _YieldsNot(_Yields):
    def compute(self, ids_BL, weights_BL):
        return self.bag(ids_BL, weights_BL)


def _fails(rows_BD):
    raise KeyError("what")


BAD_BAGS = {
    "narrow": (lambda t: _Bag(t, lambda out: out[:, 1:]), r"must give \[B, 16\] float32; of B = 3 bags came \[3, 15\]"),
    "deep": (lambda t: _Bag(t, lambda out: out.unsqueeze(1)), r"came \[3, 1, 16\] float32"),
    "double": (lambda t: _Bag(t, torch.Tensor.double), r"came \[3, 16\] float64"),
    "fails": (lambda t: _Bag(t, _fails), "its bag _Bag fails in a lookup of B = 3 bags of 2 ids: KeyError: 'what'"),
    "no bag": (lambda t: None, "gives no bag for table b .*expected an nn.Module, came NoneType"),
    "no list": (lambda t: _Yields(_Bag(t), "wanted"), r"compute\(\) of _Yields yields Wanted, but must yield lists"),
    "tuple": (lambda t: _Yields(_Bag(t), "tuple"), "yields tuple, but must yield lists of Wanted"),
    "nothing": (lambda t: _Yields(_Bag(t), "list"), "came NoneType"),
    "no yield": (lambda t: _YieldsNot(_Bag(t), ""), r"compute\(\) of _YieldsNot has no yield: it gives Tensor"),
    "bug": (lambda t: _Bag(t, None + 1), r"fails on table b \(20000 x 16\): TypeError"),
    **{
        f"{given!r} bytes": (lambda t, given=given: _Bag(t, bytes_=given), rf"of _Bag gives {given!r}, but must give a")
        for given in (0, -5, 3.7, "9", True)
    },
}


@pytest.mark.parametrize("kind", BAD_BAGS)
def test_a_bag_that_breaks_the_contract_is_told_with_its_plugin_and_table(monkeypatch, kind):
    def bad(table, inner):
        return BAD_BAGS[kind][0](table)

    install(monkeypatch, bad)
    with pytest.raises(UserError, match=BAD_BAGS[kind][1]) as error:
        plan.plan(TABLES, "bad", {}, 5000)
    assert not isinstance(error.value, Refusal)
    assert "bytes" in kind or ("plugin 'bad'" in str(error.value) and "table b" in str(error.value))


@pytest.mark.parametrize("look", [torch.Tensor.item, torch.Tensor.unique, torch.Tensor.tolist, torch.Tensor.numpy])
def test_a_bag_that_does_not_run_on_shapes_alone_is_planned_all_the_same(monkeypatch, look):
    def looking(table, inner):
        return _Bag(table, lambda out: (look(out.detach()[0, 0]), out)[1])

    install(monkeypatch, looking)
    assert [p.plugin for p in plan.plan(TABLES, "looking", {}, 5000)[0]] == ["exact", "looking", "exact"]


def test_files_take_no_memory_but_the_rest_does(tmp_path):
    config, _ = resolve({"row_files": str(tmp_path / "files"), "batch_size": 8}, None)
    device = open_device("cpu")
    make, _ = row_builder(config, device)
    table, small = Table("large", 2_000_000, 16), Table("small", 1_000_000, 4)
    place = placement_rule(config, device.rows)
    large, kept = (plan.training_bytes(plan.on_meta(make, t), 1, config, device.rows, place) for t in (table, small))
    assert large.in_files == large.padded + large.optimizer == 2_000_000 * 17 * 4
    assert large.in_memory == large.gradient
    assert kept.in_files == 0
    plans, _ = plan.plan([table, small], "exact", {}, 0, make)
    assert "beside 136.00 MB in files" in plan.text(plans, [large, kept], 1e9)
    with pytest.raises(UserError, match="training the tables needs"):
        plan.check_memory([large, kept], 1e6)
    assert not (tmp_path / "files").exists()


def test_a_budget_counts_what_lies_in_files(tmp_path, capsys):
    tables = "synthetic_tables: [30, 3000000, 2000000]\n"
    for more in ("", f"row_files: {tmp_path / 'files'}\n"):
        (tmp_path / "c.yaml").write_text(tables + more)
        flags = ["--plan", "--config", str(tmp_path / "c.yaml"), "--plugin", "hash_rows", "--memory", "20MB"]
        assert launch_script("run").main(flags) == 0
        assert "hash_rows:rows=" in capsys.readouterr().out


def test_a_name_with_dots_is_one_name():
    access = open_device("cpu").rows
    config, _ = resolve({"placement": {"user.id": "dense", "item": "dense"}}, None)
    rule = placement_rule(config, access)
    names = ["user.id", "user.id.quotient", "user", "user.name", "item.left.quotient"]
    assert [rule(Table(name, 10, 4)) for name in names] == ["dense", "dense", "sparse", "sparse", "dense"]


def test_placement_goes_by_rows_or_by_name():
    access = dataclasses.replace(open_device("cpu").rows, matmul_rows=50, dense_rows=5000)
    config, _ = resolve({}, None)
    assert [placement_rule(config, access)(t) for t in TABLES] == ["matmul", "sparse", "dense"]
    config, _ = resolve({"dense_rows": 0, "placement": {"b": "dense"}}, None)
    rule = placement_rule(config, access)
    assert [rule(t) for t in (*TABLES, Table("b.narrow", 9999, 4))] == ["matmul", "dense", "sparse", "dense"]
    with pytest.raises(UserError, match="placement of table b cannot be 'sparce'; did you mean 'sparse'"):
        resolve({"placement": {"b": "sparce"}}, None)
