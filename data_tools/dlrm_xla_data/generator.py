"""Datasets of any size with a planted signal, in bounded memory: made twice, block by block, and never kept.

The first time ids are counted, so that they can be renamed by falling frequency; the second time they are written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dlrm_xla.errors import UserError
from dlrm_xla_data.assembly import Rows, sha256
from dlrm_xla_data.prepared import day_split, save_meta, written_whole
from dlrm_xla_data.synthetic import MISSING_SHARE, NUM_DENSE, normal, zipf_ranks

_BLOCK = 2**17
_BINS = 2**16


@dataclass(frozen=True)
class Recipe:
    """What to draw.

    ``table_rows`` with row 0; ``zipf`` the exponent of each table's ids, P(rank r) about r^-exponent; ``correlation``
    the chance that a feature's place in its distribution is the row's own, else it is drawn by itself;
    ``strength`` the standard deviation of the logit; ``click_rate`` that of a row in the middle.
    """

    num_rows: int
    table_rows: tuple[int, ...]
    bag_lengths: tuple[int, ...]
    zipf: tuple[float, ...]
    correlation: float = 0.0
    strength: float = 1.0
    click_rate: float = 0.25
    seed: int = 0

    def check(self) -> None:
        """Raises UserError where a number cannot be meant."""
        for what, given in (("--bags", self.bag_lengths), ("--zipf", self.zipf)):
            if len(given) != len(self.table_rows):
                raise UserError(f"{what} has {len(given)} numbers, but there are {len(self.table_rows)} tables")
        if min(self.table_rows) < 2:
            raise UserError("--tables: a table needs at least 2 rows: one for missing ids and one more")
        if max(self.table_rows) > 2**31 - 1:
            raise UserError("--tables: more rows than int32 ids can name")
        if not all(x >= 0 for x in self.zipf):
            raise UserError("--zipf: exponents must not be negative")
        if not 0 <= self.correlation <= 1:
            raise UserError(f"--correlation is {self.correlation}, but must be from 0 to 1")
        if not (self.strength >= 0 and 0 < self.click_rate < 1):
            raise UserError("--strength must not be negative, --click-rate between 0 and 1")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed {self.seed}: must be at least 0 and below {2**64}")


@dataclass
class _Block:
    dense: NDArray[np.float32]
    ids: list[NDArray[np.int64]]
    logits: NDArray[np.float64]
    labels: NDArray[np.int8]


def generate(folder: Path, recipe: Recipe) -> dict[str, float]:
    """Writes a prepared dataset and returns the best AUC and log loss that any model can have on its test rows.

        logit = b + strength / sqrt(3) (sum_j a_j (d_j - 1) + sum_f u_f / sqrt(F) + sum_f v_f v_f+1 / sqrt(F))
        u_f = sum_l u_f(id_l) / sqrt(L_f),  v_f alike

    with hidden normal effects u and v per id, which a hash gives, and a of length 1. Block k is drawn by Philox with
    the key (seed, k), so any machine makes the same.

    The best are those of the probability that drew the labels; the AUC is of probabilities in 65,536 bins.
    """
    recipe.check()
    splits = day_split(recipe.num_rows)
    num_train = splits["train"][1]
    if folder.exists():
        raise UserError(f"{folder} exists already. Delete it, or name another folder.")
    counts = [np.zeros(rows, np.int64) for rows in recipe.table_rows]
    for first, block in _blocks(recipe, "counting"):
        for k, ids in enumerate(block.ids):
            counts[k] += np.bincount(ids[: max(0, num_train - first)].ravel(), minlength=recipe.table_rows[k])
    names, falling = [], []
    for of_table in counts:
        order = np.argsort(-of_table[1:], kind="stable")
        new = np.zeros(len(of_table), np.int32)
        new[1:][order] = np.arange(1, len(of_table))
        new[1:][of_table[1:] == 0] = 0
        names.append(new)
        seen = of_table[1:][order]
        falling.append(seen[seen > 0])
    best = _Best()
    test = splits["test"]
    with written_whole(folder) as scratch:
        with (
            Rows(scratch / "labels.npy", np.int8, (recipe.num_rows,)) as labels_file,
            Rows(scratch / "dense.npy", np.float32, (recipe.num_rows, NUM_DENSE)) as dense_file,
            Rows(scratch / "ids.npy", np.int32, (recipe.num_rows, sum(recipe.bag_lengths))) as ids_file,
        ):
            for first, block in _blocks(recipe, "writing"):
                labels_file.write(first, block.labels)
                dense_file.write(first, block.dense)
                ids_file.write(first, np.concatenate([names[k][ids] for k, ids in enumerate(block.ids)], 1))
                inside = slice(max(0, test[0] - first), max(0, test[1] - first))
                best.add(block.logits[inside], block.labels[inside])
        np.save(scratch / "counts.npy", np.concatenate(falling))
        found = best.figures()
        source: dict[str, Any] = {"synthetic": True, **asdict(recipe), "best": found}
        save_meta(
            scratch,
            {
                "source": source,
                "num_rows": recipe.num_rows,
                "dense": [f"I{k}" for k in range(1, NUM_DENSE + 1)],
                "tables": [f"C{k}" for k in range(1, len(recipe.table_rows) + 1)],
                "bag_lengths": list(recipe.bag_lengths),
                "ids_per_table": [len(f) for f in falling],
                "splits": splits,
                "checksums": {n: sha256(scratch / f"{n}.npy") for n in ("labels", "dense", "ids", "counts")},
            },
        )
    print(f"wrote {recipe.num_rows:,} rows to {folder}", file=sys.stderr)
    return found


def _blocks(recipe: Recipe, doing: str) -> Iterator[tuple[int, _Block]]:
    firsts = range(0, recipe.num_rows, _BLOCK)
    for number, first in enumerate(tqdm(firsts, unit="block", desc=doing, disable=None)):
        yield first, _draw(recipe, number, min(_BLOCK, recipe.num_rows - first))


def _draw(recipe: Recipe, number: int, num_rows: int) -> _Block:
    rng, of_weights = (
        np.random.Generator(np.random.Philox(key=np.array([recipe.seed, k], np.uint64))) for k in (number, 2**63)
    )
    weights = of_weights.normal(size=NUM_DENSE)
    num_tables = len(recipe.table_rows)
    dense = rng.exponential(size=(num_rows, NUM_DENSE)).astype(np.float32)
    own = rng.random(num_rows)
    # Each of three groups of terms has a variance of about 1.
    signal = (dense - 1.0) @ (weights / np.sqrt((weights**2).sum()))
    effects = np.zeros(num_rows)
    means = []
    ids = []
    for k, (rows, bag) in enumerate(zip(recipe.table_rows, recipe.bag_lengths, strict=True)):
        uniform = rng.random((num_rows, bag))
        follows = rng.random(num_rows) < recipe.correlation
        uniform[follows, 0] = own[follows]
        drawn = zipf_ranks(uniform, rows - 1, recipe.zipf[k])
        drawn[rng.random((num_rows, bag)) < MISSING_SHARE] = 0
        ids.append(drawn)
        effects += normal(recipe.seed, 2 * k, drawn).mean(1) * np.sqrt(bag)
        means.append(normal(recipe.seed, 2 * k + 1, drawn).mean(1) * np.sqrt(bag))
    pairs = sum((means[k] * means[(k + 1) % num_tables] for k in range(num_tables)), np.zeros(num_rows))
    signal = signal + effects / np.sqrt(num_tables) + pairs / np.sqrt(num_tables)
    middle = np.log(recipe.click_rate / (1 - recipe.click_rate))
    logits = middle + recipe.strength / np.sqrt(3) * signal
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    return _Block(dense, ids, logits, labels)


class _Best:
    """AUC and log loss of the probabilities that drew the labels, without keeping them."""

    def __init__(self) -> None:
        self.histogram = np.zeros((2, _BINS), np.int64)
        self.loss = 0.0

    def add(self, logits: NDArray[np.float64], labels: NDArray[np.int8]) -> None:
        bins = np.minimum((_BINS / (1 + np.exp(-logits))).astype(np.int64), _BINS - 1)
        for label in (0, 1):
            self.histogram[label] += np.bincount(bins[labels == label], minlength=_BINS)
        self.loss += float(np.logaddexp(0, np.where(labels == 1, -logits, logits)).sum())

    def figures(self) -> dict[str, float]:
        without, clicked = self.histogram
        below = np.cumsum(without) - without
        pairs = max(1, int(without.sum()) * int(clicked.sum()))
        auc = float((clicked * (below + without / 2)).sum() / pairs)
        return {"auc": auc, "log_loss": self.loss / max(1, int(self.histogram.sum()))}
