"""Hashing tricks: several ids share a row of a shorter table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from dlrm_xla.compression import set_table
from dlrm_xla.contract import MAX_ROWS, ComposedBag, Computation, MakeBag, RedirectedBag, Table, Wanted, sized
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla_plugins import hashes


@sized("rows", lambda table: range(2, table.num_rows))
def hash_rows(
    table: Table, inner: MakeBag, *, rows: int = 2000, method: Literal["mod", "multiply_shift", "signed"] = "mod"
) -> nn.Module:
    """Hashing trick: ids of a table above ``rows`` rows share that many by a hash.

        e_i = s(i) W[h(i)],  h(0) = 0,  h(i) = 1 + hash(i - 1) mod (rows - 1),  s(i) = 1, or +-1 with ``signed``

    With ``mod`` and ``signed`` the ``rows`` - 1 hottest ids never meet each other, because ids are ordered by
    frequency. ``multiply_shift`` mixes an id's bits by two multiplications and shifts first (`hashes.mixed`), so that
    ids meet as if at random. The row for missing ids is shared with nobody. Keeps 4 rows dim bytes; a table with no
    more rows stays as it is.

    Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning", section 2.
    """
    if rows < 2:
        raise ValueError(f"hash_rows: rows is {rows}, but must be at least 2: one for missing ids, one for the rest")
    if table.num_rows <= rows:
        return inner(table)
    shorter = replace(table, name=f"{table.name}.hashed", num_rows=rows, std=table.start_std)
    buckets = rows - 1

    def hashed(ids: Tensor) -> Tensor:
        found = hashes.bucket(ids - 1, buckets) if method == "multiply_shift" else (ids - 1) % buckets
        return torch.where(ids == 0, ids, 1 + found)

    return MappedIds(inner(shorter), rows, hashed, hashes.sign if method == "signed" else None)


class MappedIds(RedirectedBag):
    """A bag over a table whose ids are computed from the feature's ids, and a factor of each row too."""

    def __init__(
        self,
        bag: nn.Module,
        num_rows: int,
        mapping: Callable[[Tensor], Tensor],
        factor: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.bag = bag
        self.num_rows = num_rows
        self.mapping = mapping
        self.factor = factor

    def redirect(self, ids_BL: Tensor, weights_BL: Tensor) -> tuple[Tensor, Tensor]:
        if self.factor is not None:
            weights_BL = weights_BL * self.factor(ids_BL)
        return self.mapping(ids_BL), weights_BL

    def set_table(self, rows: TrainedRows) -> None:
        """A shared row is the mean of the rows that it stands for, by lookups: of all, the least squared error."""
        sums, counts = torch.zeros(self.num_rows, rows.dim), torch.zeros(self.num_rows)
        for start, block in rows.blocks():
            ids = torch.arange(start, start + len(block), dtype=torch.int32)
            places, weights = self.mapping(ids).long(), rows.weights(start, len(block))
            counts.index_add_(0, places, weights)
            signed = weights if self.factor is None else weights * self.factor(ids)
            sums.index_add_(0, places, block * signed.unsqueeze(1))
        means = sums / torch.where(counts == 0, 1, counts).unsqueeze(1)
        set_table(self.bag, TrainedRows.of(means, None if rows.lookups_R is None else counts))


@sized("rows", lambda table: range(4, table.num_rows))
def double_hash(table: Table, inner: MakeBag, *, rows: int = 2000) -> nn.Module:
    """Two hashes for each rare id, a row of its own for each frequent one.

        e_i = W[i] for i < rows / 2,  else (W[h1(i)] + W[h2(i)]) / sqrt(2),  h1, h2 from rows / 2 to rows - 1

    Two rare ids share their vector only if they share both rows. Keeps 4 rows dim bytes; a table with no more rows
    stays as it is.

    Zhang et al. 2020, "Model Size Reduction Using Frequency Based Double Hashing for Recommender Systems", figure 3:
    frequency hashing for frequent features, double hashing for the rest. Frequent ids need no table of their own here.
    """
    if rows < 4:
        raise ValueError(f"double_hash: rows is {rows}, but must be at least 4: two for hot ids, two for the rest")
    if table.num_rows <= rows:
        return inner(table)
    shorter = replace(table, name=f"{table.name}.double", num_rows=rows, std=table.start_std)
    return SketchBag(inner(shorter), rows, hot=rows // 2, num_hashes=2, signed=False)


@sized("rows", lambda table: range(3, table.num_rows))
def count_sketch(table: Table, inner: MakeBag, *, rows: int = 2000, hashes: int = 3) -> nn.Module:
    """Count sketch: each vector is the signed mean of a few shared rows, a linear random projection of the table.

        e_i = (s_1(i) W[h_1(i)] + ... + s_k(i) W[h_k(i)]) / sqrt(k),  each h_k into a part of rows / k rows of its own

    Keeps 4 rows dim bytes. All ids are treated alike; ``double_hash`` tells the frequent ones apart.

    The adjoint of the sketch of Charikar, Chen, Farach-Colton 2002, "Finding Frequent Items in Data Streams",
    section 3.
    """
    if not 1 <= hashes <= rows:
        raise ValueError(f"count_sketch: hashes is {hashes}, but must be from 1 to rows = {rows}")
    shorter = replace(table, name=f"{table.name}.sketch", num_rows=rows, std=table.start_std)
    return SketchBag(inner(shorter), rows, hot=0, num_hashes=hashes, signed=True)


class SketchBag(RedirectedBag):
    """Ids below ``hot`` have a row of their own, the others a sum of ``num_hashes`` shared rows, over its root."""

    def __init__(self, bag: nn.Module, rows: int, *, hot: int, num_hashes: int, signed: bool) -> None:
        super().__init__()
        self.bag = bag
        self.rows = rows
        self.hot = hot
        self.signed = signed
        # Signed sketches keep their hashes in parts of their own, so that no two terms of one id are one row.
        shared = rows - hot
        parts = num_hashes if signed else 1
        self.parts = [
            (hot + shared * p // parts, shared * (p + 1) // parts - shared * p // parts) for p in range(parts)
        ]
        self.num_hashes = num_hashes

    def redirect(self, ids_BL: Tensor, weights_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Places of all rows that a bag sums, and their factors: [B, L k] each."""
        places, weights = [], []
        cold_BL = (ids_BL >= self.hot).to(weights_BL.dtype)
        for k in range(self.num_hashes):
            start, size = self.parts[k % len(self.parts)]
            hashed_BL = start + hashes.bucket(ids_BL, size, k)
            weight_BL = weights_BL * (cold_BL / math.sqrt(self.num_hashes))
            if self.signed:
                weight_BL = weight_BL * hashes.sign(ids_BL, k)
            if self.hot:
                hashed_BL = torch.where(ids_BL < self.hot, ids_BL, hashed_BL)
                if k == 0:
                    weight_BL = weight_BL + weights_BL * (1 - cold_BL)
            places.append(hashed_BL)
            weights.append(weight_BL)
        return torch.cat(places, 1), torch.cat(weights, 1)

    def set_table(self, rows: TrainedRows) -> None:
        """Shared rows of least squares, by conjugate gradients on H^T diag(w) H Z = H^T diag(w) W.

        H [num_rows, rows kept] has the factors of each id and is computed again at each reading, so memory is that of
        Z. Preconditioned by the diagonal: else the rows of rare ids, whose residuals are small by their weights alone,
        stay near zero. Stops at a thousandth of the first residual, or after 50 iterations.
        """

        def adjoint(apply: Callable[[Tensor, Tensor, Tensor], Tensor], width: int) -> Tensor:
            total = torch.zeros(self.rows, width)
            for start, block in rows.blocks():
                ids = torch.arange(start, start + len(block), dtype=torch.int32).unsqueeze(1)
                places, factors = self.redirect(ids, torch.ones(len(block), 1))
                found = apply(block, places.long(), factors) * rows.weights(start, len(block)).view(-1, 1, 1)
                for k in range(places.shape[1]):
                    total.index_add_(0, places[:, k].long(), found[:, k] * factors[:, k : k + 1])
            return total

        def product(given: Tensor) -> Tensor:
            return adjoint(lambda block, at, by: _each(torch.einsum("nkd,nk->nd", given[at], by), by), rows.dim)

        diagonal = adjoint(lambda block, at, by: by.unsqueeze(2), 1)
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
        solution = torch.zeros(self.rows, rows.dim)
        residual = adjoint(lambda block, at, by: _each(block, by), rows.dim)
        direction = residual * inverse
        first = squared = (residual * direction).sum()
        for _ in range(50):
            if squared <= 1e-6 * first:
                break
            image = product(direction)
            step = squared / (direction * image).sum()
            solution, residual = solution + step * direction, residual - step * image
            before, squared = squared, (residual * residual * inverse).sum()
            direction = residual * inverse + squared / before * direction
        # A shared row counts by the lookups of the ids that it stands for, each by the square of its factor.
        set_table(self.bag, TrainedRows.of(solution, None if rows.lookups_R is None else diagonal[:, 0]))


def _each(rows_ND: Tensor, factors_NK: Tensor) -> Tensor:
    """The same rows for each of K factors, [N, K, D]."""
    return rows_ND.unsqueeze(1).expand(-1, factors_NK.shape[1], -1)


@sized("rows", lambda table: range(1, table.num_rows))
def hash_embeddings(table: Table, inner: MakeBag, *, rows: int = 1000, hashes: int = 2) -> nn.Module:
    """Shared rows weighted by numbers of the id's own.

        e_i = p[i, 1] B[h_1(i)] + ... + p[i, k] B[h_k(i)]

    Keeps 4 (rows dim + num_rows k) bytes, so no less than k / dim of the exact table. B starts like the exact
    table, p with variance 1 / k.

    Svenstrup, Hansen, Winther 2017, "Hash Embeddings for Efficient Word Representations", section 3.
    """
    if rows < 1 or hashes < 1:
        raise ValueError(f"hash_embeddings: rows is {rows} and hashes {hashes}, but both must be at least 1")
    return _weighted(table, inner, rows, hashes, "hash")


@sized("rows", lambda table: range(1, table.num_rows))
def memcom(table: Table, inner: MakeBag, *, rows: int = 1000) -> nn.Module:
    """A shared row times one number of the id's own.

        e_i = v[i] U[i mod rows]

    Keeps 4 (rows dim + num_rows) bytes, so no less than 1 / dim of the exact table. U starts like the exact table, v
    with variance 1.

    Pansare et al. 2022, "Learning Compressed Embeddings for On-Device Inference" (MEmCom, MLSys 2022): a table that
    entities share by hashing, and a second one of a weight for each entity.
    """
    if rows < 1:
        raise ValueError(f"memcom: rows is {rows}, but must be at least 1")
    return _weighted(table, inner, rows, 1, "mod")


def _weighted(table: Table, inner: MakeBag, rows: int, num_hashes: int, kind: str) -> nn.Module:
    rows = min(rows, table.num_rows)
    std = 1 / math.sqrt(num_hashes)
    return WeightedRowsBag(
        inner(replace(table, name=f"{table.name}.shared", num_rows=rows, std=table.start_std)),
        inner(replace(table, name=f"{table.name}.own", dim=num_hashes, std=std)),
        [_bucket_of(kind, rows, k) for k in range(num_hashes)],
    )


def _bucket_of(kind: str, rows: int, seed: int) -> Callable[[Tensor], Tensor]:
    return (lambda ids: ids % rows) if kind == "mod" else (lambda ids: hashes.bucket(ids, rows, seed))


class WeightedRowsBag(ComposedBag):
    """out_b = sum_l w[b, l] sum_k p[i, k] B[h_k(i)], i = ids[b, l]."""

    def __init__(self, shared: nn.Module, own: nn.Module, mappings: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.shared = shared
        self.own = own
        self.mappings = mappings

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        # A bag of one slot gives the row itself, times its weight.
        (own_NK,) = yield [Wanted(self.own, ids_BL.reshape(-1, 1), weights_BL.reshape(-1, 1))]
        weights_BLK = own_NK.view(*ids_BL.shape, len(self.mappings))
        places_BLK = torch.stack([mapping(ids_BL) for mapping in self.mappings], 2)
        (out_BD,) = yield [Wanted(self.shared, places_BLK.flatten(1), weights_BLK.flatten(1))]
        return out_BD


@sized("blocks", lambda table: range(1, min(table.num_rows * table.dim, MAX_ROWS)))
def robe(table: Table, inner: MakeBag, *, blocks: int = 4000, width: int = 4) -> nn.Module:
    """Random offset block embedding: a vector is put together from blocks of one shared array.

        e_i = [s_1(i) A[h_1(i)], ..., s_c(i) A[h_c(i)]],  c = ceil(dim / width) blocks of ``width`` numbers, s = +-1

    Keeps 4 blocks width bytes. Blocks begin at multiples of their width, so that a lookup is a row of the row store;
    the paper's begin anywhere. Each table has an array of its own, capped with the table's budget; the paper's is one
    for all tables.

    Desai, Chou, Shrivastava 2022, "Random Offset Block Embedding Array (ROBE) for CriteoTB Benchmark MLPerf DLRM
    Model", ROBE-Z with Z = ``width``, its universal hash (equation 2) replaced by that of ``hashes.py``.
    """
    if blocks < 1 or not 1 <= width <= table.dim:
        raise ValueError(
            f"robe: blocks is {blocks} and width {width}, but must be at least 1, width at most {table.dim}"
        )
    array = replace(table, name=f"{table.name}.blocks", num_rows=blocks, dim=width, std=table.start_std)
    return BlocksBag(inner(array), blocks, -(-table.dim // width), table.dim)


class BlocksBag(ComposedBag):
    """Concatenation of signed, pooled blocks; (ids_BL, weights_BL) -> out_BD."""

    def __init__(self, bag: nn.Module, blocks: int, num_parts: int, dim: int) -> None:
        super().__init__()
        self.bag = bag
        self.blocks = blocks
        self.num_parts = num_parts
        self.dim = dim

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        parts = yield [
            Wanted(self.bag, hashes.bucket(ids_BL, self.blocks, k), weights_BL * hashes.sign(ids_BL, k))
            for k in range(self.num_parts)
        ]
        return torch.cat(parts, 1)[:, : self.dim]
