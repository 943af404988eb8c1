"""Rows with a planted signal, as the command draws them."""

import json

import numpy as np
import pytest
from dlrm_xla_data.__main__ import main
from dlrm_xla_data.generator import Recipe, _draw
from dlrm_xla_data.prepared import open_prepared
from sklearn.metrics import log_loss, roc_auc_score

RECIPE = Recipe(9000, (40, 3000), (1, 2), (1.05, 0.7), correlation=0.8, strength=2.0, click_rate=0.1, seed=2**63 + 1)
FLAGS = (
    "--rows 9000 --tables 40,3000 --bags 1,2 --zipf 1.05 0.7 --correlation 0.8 --strength 2 --click-rate 0.1".split()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("synthetic") / "data"
    assert main(["synthesize", str(made), *FLAGS, "--seed", str(RECIPE.seed)]) == 0
    return made


def test_it_is_sound_and_named_by_falling_frequency(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    data = open_prepared(folder)
    drawn = _draw(RECIPE, 0, RECIPE.num_rows)
    np.testing.assert_array_equal(data.labels, drawn.labels)
    np.testing.assert_array_equal(data.dense, drawn.dense)
    train = slice(*data.splits["train"])
    for k, (columns, counts) in enumerate(zip((slice(0, 1), slice(1, 3)), data.counts, strict=True)):
        new, old = data.ids[:, columns].ravel(), drawn.ids[k].ravel()
        assert (np.diff(counts) <= 0).all()
        np.testing.assert_array_equal(np.bincount(data.ids[train, columns].ravel())[1:], counts)
        pairs = np.unique(np.stack([new, old])[:, new > 0], axis=1)
        assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1], "one new name for each id"
        assert set(old[new == 0]).isdisjoint(set(drawn.ids[k][train].ravel()) - {0}), "0 has what training lacks"


def test_its_best_are_those_of_the_probability_that_drew_the_labels(folder):
    data = open_prepared(folder)
    best = json.loads((folder / "meta.json").read_text())["source"]["best"]
    test = slice(*data.splits["test"])
    chance = 1 / (1 + np.exp(-_draw(RECIPE, 0, RECIPE.num_rows).logits[test]))
    assert best["auc"] == pytest.approx(roc_auc_score(data.labels[test], chance), abs=1e-4)
    assert best["log_loss"] == pytest.approx(log_loss(data.labels[test], chance), abs=1e-9)


def test_options_do_what_they_say():
    def drawn(**changes):
        return _draw(Recipe(**{**vars(RECIPE), **changes}), 0, 9000)

    plain, alike = drawn(), drawn(correlation=0.0)
    # Places in their distributions that are one and the same, or are drawn apart.
    ranks = [np.corrcoef(np.log1p(d.ids[0][:, 0]), np.log1p(d.ids[1][:, 0]))[0, 1] for d in (plain, alike)]
    assert ranks[0] > 0.4
    assert abs(ranks[1]) < 0.05
    assert np.ptp(drawn(strength=0.0).logits) == 0
    assert drawn(strength=0.0).labels.mean() == pytest.approx(0.1, abs=0.01)
    top = [np.bincount(drawn(zipf=(z, 0.7)).ids[0].ravel(), minlength=2)[1] for z in (0.0, 1.05, 2.0)]
    assert top[0] < top[1] < top[2]
    # Every seed is another one, large ones too.
    seeds = [drawn(seed=s).dense.sum() for s in (0, 1, 2**53, 2**53 + 1, 2**64 - 1)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--tables", "1,5"], "at least 2 rows"),
        (["--tables", "5"], "--bags has 2 numbers, but there are 1 tables"),
        (["--zipf", "1", "2", "3"], "--zipf has 3 numbers"),
        (["--zipf", "-1"], "must not be negative"),
        (["--correlation", "1.5"], "--correlation is 1.5"),
        (["--click-rate", "0"], "--click-rate between 0 and 1"),
        (["--seed", str(2**64)], "--seed 18446744073709551616: must be at least 0 and below"),
        (["--rows", "3"], "3 rows are too few for the day split"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed, words, tmp_path, capsys):
    assert main(["synthesize", str(tmp_path / "d"), *FLAGS, *changed]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("tables", ["1e4x", "1e4x0", "1e4x-2", "x3", "30,"])
def test_tables_that_are_no_numbers_are_refused(tables, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["synthesize", str(tmp_path / "d"), "--rows", "9000", "--tables", tables])
    assert "argument --tables: " in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_a_folder_is_not_written_over(folder, capsys):
    assert main(["synthesize", str(folder), *FLAGS]) == 2
    assert "exists already" in capsys.readouterr().err
