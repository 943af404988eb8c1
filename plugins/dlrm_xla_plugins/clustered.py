"""Rows shared by ids whose vectors turned out alike: clustered compositional embeddings."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_xla.codebooks import CodebookBag
from dlrm_xla.contract import MakeBag, Table, sized
from dlrm_xla_plugins import hashes

# Vectors per cluster that k-means looks at; the rest is only assigned.
SAMPLE = 32
# Rows whose vectors are in memory at once while they are assigned to clusters.
CHUNK = 2**18


@sized("rows", lambda table: range(2, min(table.num_rows, 2**15)))
def cce(table: Table, inner: MakeBag, *, rows: int = 256, columns: int = 2) -> nn.Module:
    """Clustered compositional embeddings: two codebooks a column, one of clusters and one of a hash.

        e_i = [A_1[a_1(i)] + B_1[b_1(i)], ..., A_c[a_c(i)] + B_c[b_c(i)]],   c = ``columns`` parts of dim / c numbers

    After each validation in training (`refresh`) a_k becomes the cluster of id i among the vectors A_k + B_k of all
    ids, A_k the clusters' centres, b_k a new hash, and B_k zero. Keeps 8 rows dim bytes and c codes an id, of one byte
    up to 256 rows and two above. Ends a composition: it asks ``inner`` for nothing.

    Tsang & Ahle 2023, "Clustering the Sketch: Dynamic Compression for Embedding Tables", algorithm 1; it clusters once
    an epoch.
    """
    if not 2 <= rows < 2**15 or not 1 <= columns <= table.dim:
        raise ValueError(
            f"cce: rows is {rows} and columns {columns}; rows must be from 2 to 32,767, columns from 1 to {table.dim}"
        )
    return ClusteredBag(table, min(rows, table.num_rows), columns)


class ClusteredBag(CodebookBag):
    """Embedding bag of ``cce``; (ids_BL, weights_BL) -> out_BD."""

    shift: Tensor

    def __init__(self, table: Table, rows: int, columns: int) -> None:
        super().__init__()
        self.table = table
        self.rows = rows
        self.widths = [len(part) for part in np.array_split(np.arange(table.dim), columns)]
        std = table.start_std / math.sqrt(2)
        self.clusters, self.hashed = (
            nn.ParameterList(torch.empty(rows, width).normal_(std=std) for width in self.widths) for _ in range(2)
        )
        ids = torch.arange(table.num_rows, dtype=torch.int32)
        for k in range(columns):
            # An array for each column: of one with a line an id a TPU makes one of a column a line at every step.
            codes_R = hashes.bucket(ids, rows, 2 * k).to(torch.uint8 if rows <= 256 else torch.int16)
            self.register_buffer(f"codes{k}", codes_R)
        # Added to ids before they are hashed, so that each clustering changes the hash without changing the graph.
        self.register_buffer("shift", torch.zeros(1, dtype=torch.int32))

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        ids_N = ids_BL.reshape(-1)
        parts = [
            self.chosen(clusters, self.codes(k).index_select(0, ids_N).to(torch.int32))
            + self.chosen(hashed, self._hash(ids_N, k))
            for k, (clusters, hashed) in enumerate(zip(self.clusters, self.hashed, strict=True))
        ]
        return (torch.cat(parts, 1) * weights_BL.reshape(-1, 1)).view(*ids_BL.shape, -1).sum(1)

    def codes(self, column: int) -> Tensor:
        """The cluster of each id in a column [R]."""
        return self.get_buffer(f"codes{column}")

    def _hash(self, ids_N: Tensor, column: int) -> Tensor:
        return hashes.bucket(ids_N + self.shift, self.rows, 2 * column + 1)

    def refresh(self) -> None:
        """Clusters the vectors of all ids anew; the same from the same state, on the host."""
        from sklearn.cluster import MiniBatchKMeans

        shift = self.shift.cpu()
        ids_R = torch.arange(self.table.num_rows, dtype=torch.int32)
        rng = np.random.default_rng(int(shift) % 2**32)
        for k, (clusters, hashed) in enumerate(zip(self.clusters, self.hashed, strict=True)):
            centres, second, old_R = clusters.detach().cpu(), hashed.detach().cpu(), self.codes(k).cpu()
            codes_R = torch.empty_like(old_R)

            def vectors(
                ids: Tensor, k: int = k, centres: Tensor = centres, second: Tensor = second, old_R: Tensor = old_R
            ) -> np.ndarray:
                other = hashes.bucket(ids + shift, self.rows, 2 * k + 1)
                found: np.ndarray = (centres[old_R[ids.long()].long()] + second[other.long()]).numpy()
                return found

            count = min(self.table.num_rows, SAMPLE * self.rows)
            sample = torch.from_numpy(rng.choice(self.table.num_rows, count, replace=False).astype(np.int32))
            # Random starts: as good here as k-means++ (1.36 against 1.35 at 300 clusters of 1,000 points), in a tenth
            # of its time.
            means = MiniBatchKMeans(
                self.rows,
                init="random",
                n_init=1,
                max_iter=5,
                batch_size=4096,
                random_state=int(rng.integers(2**31)),
            )
            means.fit(vectors(sample))
            for start in range(0, self.table.num_rows, CHUNK):
                assigned = torch.from_numpy(means.predict(vectors(ids_R[start : start + CHUNK])))
                codes_R[start : start + CHUNK] = assigned.to(codes_R.dtype)
            _put(clusters, torch.from_numpy(means.cluster_centers_.astype(np.float32)))
            _put(hashed, torch.zeros_like(second))
            _put(self.codes(k), codes_R)
        _put(self.shift, hashes.mixed(shift + 1))

    def extra_repr(self) -> str:
        return f"{self.table.name}, {self.rows} clusters of {self.widths} numbers"


def _put(target: Tensor, value: Tensor) -> None:
    # A new array rather than a copy into the old one, which on xla would be a graph of its own.
    target.data = value.to(target.device)
