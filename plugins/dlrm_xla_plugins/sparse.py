"""Rows with few numbers kept, and rows merged by a stored map."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from dlrm_xla.compression import set_table
from dlrm_xla.contract import ComposedBag, Computation, MakeBag, RedirectedBag, Table, Wanted, sized
from dlrm_xla.rows import RowTable
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla_plugins import hashes
from dlrm_xla_plugins.clusters import cluster, nearest
from dlrm_xla_plugins.stored import StoredRows, pack, unpack

# Rows that centres are found on; all rows then take the nearest one.
_SAMPLE = 2**17


@sized("kept", lambda table: range(1, table.dim))
def prune(table: Table, inner: MakeBag, *, kept: int = 4) -> nn.Module:
    """Pruned rows: of each row the numbers of largest magnitude, the others zero, trained so.

        e_i = m(W[i]) * W[i],   m 1 where |W[i, j]| is among the ``kept`` largest of row i, else 0

    Keeps num_rows x (4 kept + ceil(dim / 8)) bytes: the numbers and a bit for each place. Training keeps W whole and
    takes the gradient of pruning as 1 (straight through), so a number once pruned can come back. Pruned rows start
    with the exact table's variance.

    Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", section 3.1, for
    training; Deng et al. 2021, "DeepLight", for pruned embeddings.
    """
    if not 1 <= kept < table.dim:
        raise ValueError(f"prune: kept is {kept}, but must be from 1 to {table.dim - 1}, below the table's width")
    # Of dim uniform numbers the j-th smallest in magnitude has the mean square j (j + 1) / ((dim + 1)(dim + 2)) of the
    # bound's, 3 times the variance: what the largest ``kept`` have of the variance is given to them in advance.
    left = sum(j * (j + 1) for j in range(table.dim - kept + 1, table.dim + 1))
    share = 3 * left / (table.dim * (table.dim + 1) * (table.dim + 2))
    bag = inner(replace(table, std=table.start_std / math.sqrt(share)))
    if not isinstance(bag, RowTable):
        raise ValueError("prune stores rows, so nothing can stand behind it; write it last, as in hash_rows+prune")
    return PrunedBag(bag, table, kept)


class PrunedBag(ComposedBag):
    """Weighted sum of rows with ``kept`` numbers each; (ids_BL, weights_BL) -> out_BD."""

    def __init__(self, bag: RowTable, table: Table, kept: int) -> None:
        super().__init__()
        self.bag = bag
        self.table = table
        self.kept = kept

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        # A bag of one slot of weight 1 gives the row itself. Padded slots must not count as looked up, hence their 0.
        weights_N1 = weights_BL.reshape(-1, 1)
        (rows_ND,) = yield [Wanted(self.bag, ids_BL.reshape(-1, 1), (weights_N1 != 0).to(weights_BL.dtype))]
        kept_ND = rows_ND + (self._pruned(rows_ND.detach()) - rows_ND).detach()
        return (kept_ND * weights_N1).view(*ids_BL.shape, -1).sum(1)

    def _pruned(self, rows_ND: Tensor) -> Tensor:
        return torch.where(are_kept(rows_ND, self.kept), rows_ND, 0)

    def set_table(self, rows: TrainedRows) -> None:
        """Each row's largest numbers: of all that keep as many, the nearest."""
        set_table(self.bag, rows.map(self._pruned, rows.dim))

    def bytes_to_serve(self) -> int:
        """Bytes of the numbers kept and of a bit for each place of a row."""
        return self.table.num_rows * (4 * self.kept + -(-self.table.dim // 8))

    def served(self) -> nn.Module:
        """The numbers kept and a bit for each place."""
        return PrunedRows(self)

    def extra_repr(self) -> str:
        return f"{self.table.name}, {self.kept} of {self.table.dim} numbers"


def are_kept(rows_ND: Tensor, kept: int) -> Tensor:
    """Which numbers of each row are among the ``kept`` largest in magnitude, the first of equal ones; bool [N, D]."""
    size_ND = rows_ND.abs()
    least_N1 = size_ND.topk(kept, 1).values[:, -1:]
    larger_ND, equal_ND = size_ND > least_N1, size_ND == least_N1
    left_N1 = kept - larger_ND.sum(1, keepdim=True)
    return larger_ND | (equal_ND & (equal_ND.cumsum(1) <= left_N1))


class PrunedRows(StoredRows):
    """Rows as ``numbers`` float32 [R, kept] in the order of their columns and ``places``, a bit a column, uint8."""

    numbers: Tensor
    places: Tensor

    def __init__(self, bag: PrunedBag) -> None:
        super().__init__()
        self.dim, self.kept = bag.table.dim, bag.kept
        self.keep(bag.bag, self.dim, self._stored)

    def _stored(self, rows_ND: Tensor) -> dict[str, Tensor]:
        kept_ND = are_kept(rows_ND, self.kept)
        return {"numbers": rows_ND[kept_ND].view(-1, self.kept), "places": pack(kept_ND, 1)}

    def read(self, ids_N: Tensor) -> Tensor:
        kept_ND = unpack(self.places.index_select(0, ids_N), self.dim, 1)
        column_ND = (kept_ND.cumsum(1) - 1).clamp(min=0)
        return self.numbers.index_select(0, ids_N).gather(1, column_ND) * kept_ND


@sized("rows", lambda table: range(2, min(table.num_rows, 2**15)))
def dedup(table: Table, inner: MakeBag, *, rows: int = 2000) -> nn.Module:
    """Merged rows: a stored map says which of ``rows`` rows an id has.

        e_i = W[map[i]]

    Keeps 4 rows dim bytes and two bytes an id for the map. Without a table to merge the map starts as a hash, the
    ``rows`` - 1 most frequent ids apart; taken over from a trained table it merges rows that are alike. A table with no
    more rows stays as it is.

    Zhang et al. 2023, "Experimental Analysis of Large-scale Learnable Vector Storage Compression" (VLDB 2024), method
    Dedup: it finds blocks that are alike by locality-sensitive hashing; here rows are merged, by k-means.
    """
    if not 2 <= rows < 2**15:
        raise ValueError(f"dedup: rows is {rows}, but must be from 2 to 32,767, for the map has two bytes an id")
    if table.num_rows <= rows:
        return inner(table)
    shorter = replace(table, name=f"{table.name}.merged", num_rows=rows, std=table.start_std)
    return MergedBag(inner(shorter), table, rows)


class MergedBag(RedirectedBag):
    """A bag over the rows that a stored map gives; (ids_BL, weights_BL) -> out_BD."""

    map: Tensor

    def __init__(self, bag: nn.Module, table: Table, rows: int) -> None:
        super().__init__()
        self.bag = bag
        self.table = table
        self.rows = rows
        ids = torch.arange(table.num_rows, dtype=torch.int32)
        hashed = torch.where(ids < rows - 1, ids, 1 + hashes.bucket(ids, rows - 1))
        self.register_buffer("map", hashed.to(torch.int16))

    def redirect(self, ids_BL: Tensor, weights_BL: Tensor) -> tuple[Tensor, Tensor]:
        places_N = self.map.index_select(0, ids_BL.reshape(-1)).to(torch.int32)
        return places_N.view(ids_BL.shape), weights_BL

    def set_table(self, rows: TrainedRows) -> None:
        """Rows that are alike become one by k-means, on a sample where there are many; id 0 keeps its own row."""
        centres_KD = cluster(*rows.sample(_SAMPLE), self.rows - 1)
        first_1D = rows.part(0, 1).whole()
        lookups_R = torch.zeros(self.rows)
        for start, block in rows.blocks():
            places = 1 + nearest(block, centres_KD)
            if start == 0:
                places[0] = 0
            self.map[start : start + len(block)] = places.to(torch.int16)
            lookups_R.index_add_(0, places, rows.weights(start, len(block)))
        merged = torch.cat([first_1D, centres_KD])
        padded = torch.nn.functional.pad(merged, (0, 0, 0, self.rows - len(merged)))
        set_table(self.bag, TrainedRows.of(padded, None if rows.lookups_R is None else lookups_R))
