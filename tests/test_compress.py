"""Bags made from trained tables, against numpy's own decompositions and least squares."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, launch_script, needs_xla
from dlrm_xla_plugins.directions import random_directions, top_directions
from dlrm_xla_plugins.quantized import dequantize, quantize, search_scales

from dlrm_xla import listing, trained_rows
from dlrm_xla.compression import check_rows, set_table, table_error
from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.registry import compose, installed, load, package, parse
from dlrm_xla.rows import RowTable
from dlrm_xla.trained_rows import TrainedRows

ROWS, DIM = 300, 12


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tables of several blocks, the last one shorter."""
    monkeypatch.setattr(trained_rows, "BLOCK_ROWS", 70)


@pytest.fixture
def weight():
    rng = np.random.default_rng(0)
    decay = 0.7 ** np.arange(DIM)
    mixed = rng.normal(size=(ROWS, DIM)) * decay @ np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    return torch.from_numpy(mixed.astype(np.float32))


@pytest.fixture
def lookups():
    return torch.from_numpy((1e4 / (1 + np.arange(ROWS)) ** 1.2).astype(np.float32))


def _fitted(spec, weight, lookups=None):
    torch.manual_seed(0)
    bag = compose(parse(spec), RowTable)(Table("t", *weight.shape))
    set_table(bag, TrainedRows.of(weight, lookups))
    return bag


def _rows(bag, count=ROWS):
    with torch.no_grad():
        return bag(torch.arange(count, dtype=torch.int32).unsqueeze(1), torch.ones(count, 1))


def _best(weight, rank, lookups=None):
    """The best rows of a rank by numpy, weighted: rows are projected on leading directions of sqrt(w) W."""
    scale = 1 if lookups is None else lookups.double().sqrt().unsqueeze(1).numpy()
    vectors = np.linalg.svd(weight.double().numpy() * scale, full_matrices=False)[2][:rank]
    return torch.from_numpy((weight.double().numpy() @ vectors.T @ vectors).astype(np.float32))


@pytest.mark.parametrize("weighted", [False, True])
def test_svd_is_numpys(weight, lookups, weighted):
    given = lookups if weighted else None
    torch.testing.assert_close(_rows(_fitted("svd:rank=3", weight, given)), _best(weight, 3, given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_randomized_svd_loses_a_hundredth_more_at_most(weight, lookups, weighted):
    given = lookups if weighted else None
    scale = 1 if given is None else given.sqrt().unsqueeze(1)
    found = _rows(_fitted("svd:rank=3,method=randomized", weight, given))
    least = ((_best(weight, 3, given) - weight) * scale).norm()
    assert least <= ((found - weight) * scale).norm() * (1 + 1e-5) <= 1.01 * least * (1 + 1e-5)
    basis = random_directions(TrainedRows.of(weight, given), 3)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_mixed_dim_takes_the_best_rows_of_its_width(weight, lookups, weighted):
    given = lookups if weighted else None
    narrow = _fitted("mixed_dim:full_rows=3,alpha=0.3", weight, given)
    assert narrow.matrix.shape == (3, DIM), "12 (3 / 300)^0.3 = 3.01"
    torch.testing.assert_close(_rows(narrow), _best(weight, 3, given), atol=1e-5, rtol=0)
    assert torch.equal(_rows(_fitted("mixed_dim:full_rows=300", weight, given)), weight), "a short table stays exact"


def test_a_flat_spectrum_costs_the_randomized_one_no_more_than_its_bound():
    flat = torch.from_numpy(np.random.default_rng(1).normal(size=(2000, 64)).astype(np.float32))
    rows = TrainedRows.of(flat)

    def lost(basis):
        return (flat - flat @ basis.t() @ basis).norm().item()

    assert lost(random_directions(rows, 8, power=0)) <= (1 + 8 / 7) ** 0.5 * lost(top_directions(rows, 8))


def test_narrow_rows_of_a_fixed_matrix_are_least_squares(weight):
    for spec in ("random_projection:dim=4", "srht:dim=4"):
        bag = _fitted(spec, weight)
        matrix = bag.matrix.double().numpy()
        expected = np.linalg.lstsq(matrix.T, weight.double().numpy().T, rcond=None)[0].T @ matrix
        np.testing.assert_allclose(_rows(bag).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spec", ["hash_rows:rows=40", "hash_rows:rows=40,method=signed", "top_rows:rows=40"])
def test_shared_rows_are_least_squares(weight, lookups, spec, weighted):
    bag = _fitted(spec, weight, lookups if weighted else None)
    ids = torch.arange(ROWS, dtype=torch.int32)
    design = np.zeros((ROWS, 40))
    factor = 1 if bag.factor is None else bag.factor(ids).numpy()
    design[np.arange(ROWS), bag.mapping(ids).numpy()] = factor
    _compare(bag, design, weight, lookups if weighted else None, 1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spec", ["count_sketch:rows=40", "double_hash:rows=40"])
def test_sketches_are_least_squares(weight, lookups, spec, weighted):
    bag = _fitted(spec, weight, lookups if weighted else None)
    places, factors = bag.redirect(torch.arange(ROWS, dtype=torch.int32).unsqueeze(1), torch.ones(ROWS, 1))
    design = np.zeros((ROWS, 40))
    for k in range(places.shape[1]):
        np.add.at(design, (np.arange(ROWS), places[:, k].numpy()), factors[:, k].numpy())
    _compare(bag, design, weight, lookups if weighted else None, 0.02)


def _compare(bag, design, weight, lookups, tolerance):
    scale = np.ones((ROWS, 1)) if lookups is None else lookups.double().sqrt().unsqueeze(1).numpy()
    target = weight.double().numpy()
    best = design @ np.linalg.lstsq(design * scale, target * scale, rcond=None)[0]
    least = np.linalg.norm((best - target) * scale)
    assert np.linalg.norm((_rows(bag).double().numpy() - target) * scale) <= least * (1 + tolerance)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_stored_at_the_levels_of_the_scale_that_was_searched(weight, bits):
    weight[5, 0] = 30 * weight[5].abs().max()  # one number that is worth clipping at few bits
    weight[6] = 0
    found = _rows(_fitted(f"int{bits}", weight))
    scales = search_scales(weight, bits)
    torch.testing.assert_close(found, dequantize(quantize(weight, bits, scales)[0], scales), rtol=1e-3, atol=1e-5)
    plain = dequantize(*quantize(weight, bits))
    assert (found - weight).norm() <= (plain - weight).norm() * (1 + 1e-6)


def test_pruned_rows_keep_their_largest_numbers(weight):
    found = _rows(_fitted("prune:kept=4", weight)).numpy()
    for row, kept in zip(weight.numpy(), found, strict=True):
        largest = np.argsort(-np.abs(row))[:4]
        np.testing.assert_array_equal(kept[largest], row[largest])
        assert np.count_nonzero(kept) == 4


@pytest.mark.parametrize(
    "spec",
    [
        *("svd:rank=3", "count_sketch:rows=60", "hash_rows:rows=60", "pq:bits=3", "dedup:rows=40"),
        "frequency_bands:full_rows=10,width=3",
        *("tensorly_tt:rank=5", "tensorly_cp:rank=30", "tensorly_tucker:rank=4"),
    ],
)
def test_weights_lower_the_error_of_lookups(weight, lookups, spec):
    if "tensorly" in spec:
        pytest.importorskip("tensorly")
    rows = TrainedRows.of(weight)
    alike = table_error(_fitted(spec, weight), rows, lookups)
    weighted = table_error(_fitted(spec, weight, lookups), rows, lookups)
    assert weighted.lookups < min(1, alike.lookups)
    assert alike.rows < weighted.rows


def test_compositions_hand_their_rows_on(weight, lookups):
    narrow = _fitted("svd:rank=3", weight, lookups)
    both = _fitted("svd:rank=3+int8", weight, lookups)
    assert (_rows(both) - _rows(narrow)).norm() < 0.01 * _rows(narrow).norm()
    hot = _rows(_fitted("hot_cold:hot=50+svd:rank=3", weight, lookups))
    torch.testing.assert_close(hot[:50], weight[:50])
    torch.testing.assert_close(hot[50:], _best(weight[50:], 3, lookups[50:]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("outer", ["hash_rows", "double_hash", "count_sketch:hashes=1", "dedup"])
def test_compositions_hand_the_lookups_of_shared_rows_on(weight, lookups, outer):
    outer += ",rows=40" if ":" in outer else ":rows=40"
    bag = _fitted(outer, weight, lookups)
    ids = torch.arange(ROWS, dtype=torch.int32).unsqueeze(1)
    places, factors = bag.redirect(ids, torch.ones(ROWS, 1))
    summed = torch.zeros(40).index_add_(0, places.flatten().long(), (factors.square() * lookups.unsqueeze(1)).flatten())
    expected = _best(bag.bag.weight.detach(), 3, summed)
    torch.testing.assert_close(
        _fitted(f"{outer}+svd:rank=3", weight, lookups).bag(ids[:40], torch.ones(40, 1)), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("spec", ["tensorly_tt:rank=2", "tensorly_cp:rank=2", "tensorly_tucker:rank=2"])
def test_a_table_that_a_decomposition_has_no_memory_for_is_refused_before_it_is_read(spec, monkeypatch):
    monkeypatch.setattr(trained_rows, "machine_memory", lambda: 1e6)
    bag = compose(parse(spec), RowTable)(Table("t", 9000, DIM))
    with pytest.raises(UserError, match="takes a table whole"):
        set_table(bag, TrainedRows(lambda start, stop: pytest.fail("was read"), 9000, DIM))


def test_what_cannot_be_taken_over_is_refused(weight):
    with pytest.raises(UserError, match="has no set_table"):
        _fitted("robe", weight)
    weight[123, 4] = torch.nan
    with pytest.raises(UserError, match="table C1: row 123 is not finite"):
        check_rows("C1", TrainedRows.of(weight))


def test_the_methods_in_the_docs_are_those_of_all_plugins_that_take_tables():
    text = (ROOT / "docs" / "compression.md").read_text()
    table = text.split("## Methods")[1].split("##")[0]
    names = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = {name.partition("+")[0] for cell in names for name in re.findall("`(.+?)`", cell)}
    ours = {name for name, entry in installed().items() if package(entry).startswith("dlrm_xla ")}
    assert told == {name for name in ours if listing.traits(load(name)).post_training}


def test_a_sample_is_of_different_rows_with_their_weights(weight, lookups):
    rows, weights = TrainedRows.of(weight, lookups).sample(100)
    places = [(weight == row).all(1).nonzero().item() for row in rows]
    assert len(set(places)) == 100
    torch.testing.assert_close(weights, lookups[places])


@pytest.mark.parametrize(
    "spec", ["hot_cold:hot=100+pq", "hot_cold:hot=100+dedup:rows=40", "hot_cold:hot=100+svd:rank=3"]
)
def test_rows_that_nobody_looks_up_count_alike(weight, lookups, spec):
    lookups[90:] = 0
    found = _rows(_fitted(spec, weight, lookups))
    torch.testing.assert_close(found[:100], weight[:100])
    assert (found[100:] - weight[100:]).norm() < 0.9 * weight[100:].norm()
    weights = TrainedRows.of(weight[90:], lookups[90:]).sample(100)[1]
    assert torch.equal(weights, torch.ones(100))
    lookups[:-1], lookups[-1] = 0, 1  # looked up, but not by the sample
    weights = TrainedRows.of(weight, lookups).sample(2)[1]
    assert torch.equal(weights, torch.ones(2))


def test_the_study_compares_its_methods_and_its_bound(tmp_path, capsys):
    study = launch_script("compression_study")
    out = tmp_path / "s.json"
    assert study.main(["--rows", "500", "--dim", "16", "--repeat", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {r["spectrum"] for r in rows} == {"decaying", "flat", "clustered"}
    for row in rows:
        assert 1 - 1e-4 <= row["error_over_least"] <= row["bound"] + 1e-4
    assert out.with_suffix(".png").stat().st_size > 0
    kept = tmp_path / "kept.bin"
    kept.write_text("precious")
    for wrong, words in (
        (["--rank", "16"], "must be below --dim 16"),
        (["--rows", "2"], "below the rows, which are 2"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--file", str(kept)], "is there already"),
        (["--out", str(tmp_path / "no" / "s.json")], "there is no folder"),
    ):
        assert study.main(["--rows", "500", "--dim", "16", "--out", str(out), *wrong]) == 2
        assert words in capsys.readouterr().err
    assert kept.read_text() == "precious"
    again = ["--rows", "500", "--dim", "16", "--spectrum", "flat", "--repeat", "1", "--out", str(out)]
    assert study.main([*again, "--file", str(tmp_path / "new.bin")]) == 0
    assert not (tmp_path / "new.bin").exists()


@needs_xla
def test_directions_found_on_xla_are_those_found_on_the_host(weight, lookups):
    xla = open_device("xla").torch_device
    rows = TrainedRows.of(weight, lookups)
    for find in (top_directions, random_directions):
        here, there = find(rows, 3), find(rows, 3, device=xla)
        torch.testing.assert_close(here.t() @ here, there.t() @ there, atol=1e-4, rtol=0)
