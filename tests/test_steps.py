"""Steps of a whole model: ids are checked, batches may be split, rows find their way back into a model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EVERY_DEVICE, SLOW_BUT_ON_CPU, needs_xla

from dlrm_xla import checkpoint
from dlrm_xla.batches import PackedBatch, arranged, unpack
from dlrm_xla.codebooks import CodebookBag
from dlrm_xla.config import resolve
from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.model import DLRM
from dlrm_xla.registry import compose, parse
from dlrm_xla.rows import RowTable
from dlrm_xla.steps import Steps

TABLES = [Table("a", 30, 8), Table("b", 2000, 8), Table("c", 500, 8)]
BAGS = [1, 3, 2]


def _model(spec="exact"):
    return DLRM(3, TABLES, [compose(parse(spec), RowTable)] * 3, bottom=[8], top=[8])


def _steps(device, model=None, **settings):
    config, _ = resolve({"preset": "kaggle", "batch_size": 8, **settings}, None)
    return Steps(model or _model(), BAGS, open_device(device), config)


def _batch(seed, size=8):
    rng = np.random.default_rng(seed)
    ids = np.concatenate(
        [rng.integers(0, t.num_rows, (size, n)) for t, n in zip(TABLES, BAGS, strict=True)], 1, dtype=np.int32
    )
    dense = rng.normal(size=(size, 3)).astype(np.float32)
    labels = rng.integers(0, 2, size).astype(np.float32)
    labels[-1] = -1
    return PackedBatch(*(torch.from_numpy(a) for a in (dense, ids, labels)))


def _everything(steps):
    return {n: t.cpu().clone() for n, t in (*steps.model.state_dict().items(), *steps.rows.tables())}


@pytest.mark.parametrize("device", EVERY_DEVICE)
@pytest.mark.parametrize(
    ("slot", "value", "feature", "last"), [(0, 30, "a", 29), (3, -1, "b", 1999), (5, 500, "c", 499)]
)
def test_an_id_that_a_table_does_not_have_is_named_before_anything_changes(device, slot, value, feature, last):
    steps = _steps(device)
    steps.train(_batch(0), 0)
    before = _everything(steps)
    batch = _batch(1)
    batch.ids_BS[5, slot] = value
    message = f"training step 2, row 5 of the batch: feature {feature} has the id {value}, .*the ids 0 to {last}"
    with pytest.raises(UserError, match=message):
        steps.train(batch, 1)
    with pytest.raises(UserError, match=f"feature {feature} has the id {value}"):
        steps.evaluate(batch)
    after = _everything(steps)
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("slot", "value", "feature", "last"), [(1, 30, "a", 29), (3, -2, "b", 1999), (6, 500, "c", 499)]
)
def test_ids_of_bags_of_varying_length_are_checked_by_their_lengths(slot, value, feature, last):
    steps, batch = _steps("cpu"), _batch(0)
    ids_BS = torch.full((8, 7), -1, dtype=torch.int32)
    ids_BS[5, slot] = value
    varying = PackedBatch(batch.dense_BI, ids_BS, batch.labels_B, lengths=(2, 4, 1))
    with pytest.raises(UserError, match=f"row 5 of the batch: feature {feature} has the id {value}, .*0 to {last}"):
        steps.train(varying, 0)
    ids_BS[5, slot] = -1
    steps.train(varying, 0)


@pytest.mark.parametrize("device", EVERY_DEVICE)
@pytest.mark.parametrize("spec", ["exact", pytest.param("quotient_remainder", marks=pytest.mark.slow)])
def test_accumulated_parts_of_a_batch_make_the_step_of_the_whole(device, spec):
    results = []
    for parts in (1, 4):
        steps = _steps(device, _model(spec), micro_batches=parts, row_optimizer="adagrad", dense_optimizer="sgd")
        for k in range(3):
            steps.train(_batch(k), k)
        results.append((steps.mean_loss(), _everything(steps)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("device", EVERY_DEVICE)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_steps_after_the_end_of_a_decay_leave_the_model_as_it_is(device, optimizer):
    row_optimizer = "adam" if optimizer == "adam" else "sgd"
    steps = _steps(device, dense_optimizer=optimizer, row_optimizer=row_optimizer, decay_steps=2)
    batch = _batch(0)
    batch.dense_BI[:, 0] = 0  # there are weights then whose gradients are all 0
    for step in range(2):
        steps.train(batch, step)
    before = _everything(steps)
    for step in range(2, 5):
        steps.train(batch, step)
    after = _everything(steps)
    for name, was in before.items():
        torch.testing.assert_close(after[name], was, rtol=0, atol=1e-9, msg=name)


def test_a_parameter_that_is_not_finite_is_not_saved(tmp_path):
    steps, path = _steps("cpu"), tmp_path / "last.safetensors"
    steps.train(_batch(0), 0)
    steps.save(path, {"step": 1})
    with torch.no_grad():
        steps.model.bottom[0].weight[0, 0] = float("inf")
    steps.check_finite()  # what the next step would find
    with pytest.raises(UserError, match=r"the parameter bottom\.0\.weight is not finite after step 1"):
        steps.save(path, {"step": 2})
    assert checkpoint.read_about(path)["step"] == 1


@pytest.mark.parametrize("device", EVERY_DEVICE)
@pytest.mark.parametrize("spec", ["exact", "hash_rows:rows=100+random_projection:dim=2"])
def test_a_checkpoint_gives_back_the_same_predictions_anywhere(device, spec, tmp_path):
    steps = _steps(device, _model(spec), row_optimizer="adam", placement={"a": "dense", "c": "matmul"})
    for k in range(3):
        steps.train(_batch(k), k)
    logits = steps.evaluate(_batch(7)).cpu()
    checkpoint.save(tmp_path / "c", steps.model, steps.dense, steps.rows, {"step": 3})
    plain = _model(spec)
    assert checkpoint.load_model(tmp_path / "c", plain)["step"] == 3
    torch.testing.assert_close(_steps("cpu", plain).evaluate(_batch(7)), logits, atol=1e-5, rtol=1e-4)
    steps.train(_batch(8), 3)
    checkpoint.load_model(tmp_path / "c", steps.model, steps.rows)
    torch.testing.assert_close(steps.evaluate(_batch(7)).cpu(), logits, atol=1e-6, rtol=1e-5)


def test_the_interaction_of_a_bf16_run_has_gradients_near_those_of_fp32():
    gradients = []
    for precision in ("fp32", "bf16"):
        steps = _steps("cpu", precision=precision, dense_optimizer="sgd")
        before = steps.model.bottom[0].weight.detach().clone()
        steps.train(_batch(0), 0)
        gradients.append(before - steps.model.bottom[0].weight.detach())
    torch.testing.assert_close(*gradients, atol=0.02 * gradients[0].abs().max().item(), rtol=0.1)


@pytest.mark.parametrize("device", SLOW_BUT_ON_CPU)
def test_plugins_own_parameters_have_a_rate_of_their_own(device):
    changes = []
    for rate in (0.0, 0.01):
        steps = _steps(device, _model("tensorly_tt:rank=2"), dense_optimizer="sgd", dense_lr=0.1, plugin_lr=rate)
        before = {n: p.detach().cpu().clone() for n, p in steps.model.named_parameters()}
        steps.train(_batch(0), 0)
        changes.append({n: p.detach().cpu() - before[n] for n, p in steps.model.named_parameters()})
    for name, change in changes[0].items():
        factor = 0.1 if name.startswith("bags.") else 1.0
        torch.testing.assert_close(changes[1][name], change * factor, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("device", EVERY_DEVICE)
def test_small_tables_in_an_array_of_their_own_train_alike(device):
    """Stacks, order of bags and order of the interaction are inside; losses and tables are those of one array."""
    found = []
    for near_bytes in (0, 150 * 16 * 4):
        given = {"batch_size": 8, "row_lr": 0.3, "dense_lr": 0.1, "dense_optimizer": "sgd", "near_bytes": near_bytes}
        config, _ = resolve({"preset": "kaggle", **given}, None)
        makes = [RowTable, RowTable, compose(parse("hash_rows:rows=90"), RowTable), RowTable]
        tables = [Table(f"t{k}", rows, 16) for k, rows in enumerate((50, 700, 9000, 300))]
        steps = Steps(DLRM(5, tables, makes, bottom=[8], top=[8]), [1, 2, 1, 1], open_device(device), config)
        assert len(steps.rows.stacks) == (2 if near_bytes else 1)
        draw = torch.Generator().manual_seed(2)
        losses = []
        for number in range(6):
            ids = [
                torch.randint(t.num_rows, (8, n), generator=draw).int()
                for t, n in zip(tables, (1, 2, 1, 1), strict=True)
            ]
            labels_B = (ids[0][:, 0] % 2).float()
            steps.train(PackedBatch(torch.rand(8, 5, generator=draw), torch.cat(ids, 1), labels_B), number)
            losses.append(steps.mean_loss())
        found.append((losses, dict(steps.rows.tables())))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert max(found[0][0]) - min(found[0][0]) > 0.01
    assert found[0][1].keys() == found[1][1].keys()
    for name, rows in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], rows, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("batch_size", "rows"), [(8, 200), (4096, 100)])
def test_a_device_multiplies_longer_codebooks_where_ids_are_few(batch_size, rows):
    cpu = open_device("cpu")
    device = replace(cpu, rows=replace(cpu.rows, codebook_rows=100))
    config, _ = resolve({"preset": "kaggle", "batch_size": batch_size}, None)
    steps = Steps(_model("tensorly_cp"), BAGS, device, config)
    assert {m.codebook_rows for m in steps.model.modules() if isinstance(m, CodebookBag)} == {rows}


@needs_xla
@pytest.mark.parametrize(
    "spec",
    [
        "tensorly_tt:rank=2",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("tensorly_tt:rank=40", "tensorly_cp", "cce")),
        "tensorly_tucker",
    ],
)
def test_a_step_on_xla_that_multiplies_codebooks_is_that_of_a_cpu_that_gathers(spec):
    found = []
    for device, rows in (("cpu", 0), ("xla", 10_000)):
        steps = _steps(device, _model(spec), dense_optimizer="sgd", dense_lr=0.1, codebook_rows=rows)
        for number in range(3):
            steps.train(_batch(number), number)
        found.append(_everything(steps))
    for name, values in found[0].items():
        torch.testing.assert_close(found[1][name], values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "weighted", "lengths of this batch"])
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0]])
def test_features_that_travel_in_another_order_arrive_by_feature(kind, order):
    packed = _batch(0)
    lengths = (2, 1, 3) if kind == "lengths of this batch" else None
    weights_BS = torch.rand(8, sum(BAGS)) if kind == "weighted" else None
    packed = packed._replace(weights_BS=weights_BS, lengths=lengths)
    sent = arranged(packed, BAGS, order)
    first = (lengths or BAGS)[order[0]]
    start = sum((lengths or BAGS)[: order[0]])
    torch.testing.assert_close(sent.ids_BS[:, :first], packed.ids_BS[:, start : start + first])
    expected, found = unpack(packed, BAGS), unpack(sent, BAGS, order)
    assert [i.shape[1] for i in found.ids] == list(lengths or BAGS)
    for ours, theirs in zip((*found.ids, *found.weights), (*expected.ids, *expected.weights), strict=True):
        torch.testing.assert_close(ours, theirs)
