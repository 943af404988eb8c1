"""Synthetic rows of Criteo's shape with a planted signal, so that the best reachable AUC is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dlrm_xla_data.bags import Bags
from dlrm_xla_data.prepared import PreparedDataset, day_split

NUM_DENSE = 13
ZIPF_EXPONENT = 1.05
MISSING_SHARE = 0.05


def synthesize(
    num_rows: int,
    table_rows: Sequence[int],
    bag_lengths: Sequence[int] = (),
    seed: int = 0,
    variable_bags: bool = False,
) -> tuple[PreparedDataset, float]:
    """Rows whose click probability is known, and the AUC of that probability on the test rows.

        logit = b + sum_j a_j dense_j + sum_f s mean_l u_f(id_l) + sum_(f, g) c v_f(id) v_g(id')

    with hidden normal effects u and v per id, so nothing but memory of ids and their pairs predicts clicks. Ids are
    Zipf distributed with exponent 1.05, a twentieth is missing. No model can be expected to do better on the test rows
    than the probability that drew their labels.

    table_rows: rows of each table, id 0 included, kept even for ids that never occur; bag_lengths: ids per bag, or with
    ``variable_bags`` the most per bag, where lengths are geometric, so that long bags are rare.
    """
    rng = np.random.default_rng(seed)
    bags = list(bag_lengths) or [1] * len(table_rows)
    splits = day_split(num_rows)
    num_train = splits["train"][1]
    dense = rng.exponential(size=(num_rows, NUM_DENSE)).astype(np.float32)
    num_tables = len(table_rows)
    logits = (dense - 1) @ rng.normal(scale=0.5 / np.sqrt(NUM_DENSE), size=NUM_DENSE)
    factors = np.zeros((num_tables, num_rows), np.float32)
    all_ids = np.empty((num_rows, sum(bags)), np.int32)
    lengths = _lengths(seed, num_rows, bags) if variable_bags else np.tile(np.array(bags), (num_rows, 1))
    counts = []
    for table, (rows, bag) in enumerate(zip(table_rows, bags, strict=True)):
        drawn = _zipf(rng, rows - 1, num_rows * bag)
        drawn[rng.random(len(drawn)) < MISSING_SHARE] = 0
        per_row = drawn.reshape(num_rows, bag)
        # An id of 0 has no effect, so a bag's sum is that of the ids that it has.
        per_row[np.arange(bag) >= lengths[:, table : table + 1]] = 0
        share = 1 / np.maximum(1, lengths[:, table])
        logits += 1.0 / np.sqrt(num_tables) * normal(seed, 2 * table, per_row).sum(1) * share
        factors[table] = normal(seed, 2 * table + 1, per_row).sum(1) * share
        ids, falling = _by_frequency(per_row, rows, num_train)
        all_ids[:, sum(bags[:table]) : sum(bags[: table + 1])] = ids
        counts.append(falling)
    pairs = [(f, (f + 1) % num_tables) for f in range(num_tables)]
    logits += sum(0.6 / np.sqrt(num_tables) * factors[f] * factors[g] for f, g in pairs)
    logits -= 1.2
    probability = 1 / (1 + np.exp(-logits))
    labels = (rng.random(num_rows) < probability).astype(np.int8)
    names = [f"C{k + 1}" for k in range(num_tables)]
    source = {"synthetic": True, "seed": seed}
    packed = _packed(all_ids, lengths, bags) if variable_bags else None
    dataset = PreparedDataset(labels, dense, all_ids, counts, names, bags, splits, source, packed)
    return dataset, _auc(labels, logits, splits["test"])


def _lengths(seed: int, num_rows: int, bags: Sequence[int]) -> NDArray[np.int64]:
    """Ids of each bag, [N, F], from 0: geometric with a mean of a quarter of the most."""
    rng = np.random.default_rng([seed, 1])
    drawn = np.stack(
        [rng.geometric(min(1.0, 4 / (bag + 3)), num_rows) - rng.integers(0, 2, num_rows) for bag in bags], 1
    )
    limited: NDArray[np.int64] = np.minimum(drawn, np.array(bags))
    return limited


def _packed(all_ids: NDArray[np.int32], lengths: NDArray[np.int64], bags: Sequence[int]) -> Bags:
    within = np.concatenate([np.arange(bag) for bag in bags])
    kept = within < np.repeat(lengths, bags, axis=1)
    return Bags(all_ids[kept], np.concatenate([[0], np.cumsum(lengths.ravel())]), len(bags))


def _auc(labels: NDArray[np.int8], logits: NDArray[np.float64], part: tuple[int, int]) -> float:
    from dlrm_xla.metrics import click_metrics

    rows = slice(*part)
    return click_metrics(labels[rows].astype(np.float32), logits[rows].astype(np.float32))["auc"]


def _zipf(rng: np.random.Generator, largest: int, size: int) -> NDArray[np.int64]:
    return zipf_ranks(rng.random(size), largest, ZIPF_EXPONENT) if largest >= 1 else np.zeros(size, np.int64)


def zipf_ranks(uniform: NDArray[np.float64], largest: int, exponent: float) -> NDArray[np.int64]:
    """Ranks 1 to ``largest``, P(r) about r^-exponent: the density inverted on [1, largest + 1), rounded down."""
    power = 1 - exponent
    if abs(power) < 1e-9:
        ranks = float(largest + 1) ** uniform
    else:
        ranks = ((float(largest + 1) ** power - 1) * uniform + 1) ** (1 / power)
    clipped: NDArray[np.int64] = np.minimum(ranks.astype(np.int64), largest)
    return clipped


def _by_frequency(ids: NDArray[np.int64], rows: int, num_train: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Renames ids 1.. by falling frequency in the training rows and gives 0 to those that do not occur there."""
    counts = np.bincount(ids[:num_train].ravel(), minlength=rows)[1:]
    order = np.argsort(-counts, kind="stable")
    renamed = np.zeros(rows, np.int32)
    renamed[1:][order] = np.arange(1, rows)
    renamed[1:][counts == 0] = 0
    return renamed[ids], counts[order].astype(np.int64)


def normal(seed: int, stream: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """A standard normal number for each (seed, stream, id), the same wherever it occurs; 0 for id 0.

    Two rounds of splitmix64 (Steele et al. 2014) and Box-Muller, so no table of effects is kept.
    """
    key = np.array([(seed * 1_000_003 + stream) % 2**64], dtype=np.uint64)
    first = splitmix(ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + splitmix(key))
    uniform = [(x >> np.uint64(11)).astype(np.float64) / 2**53 for x in (first, splitmix(first))]
    normal = np.sqrt(-2 * np.log1p(-uniform[0])) * np.cos(2 * np.pi * uniform[1])
    return np.where(ids == 0, 0, normal).astype(np.float32)


def splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)
