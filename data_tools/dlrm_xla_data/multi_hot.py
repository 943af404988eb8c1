"""Bags of several ids made from one, as MLPerf's second DLRM benchmark does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dlrm_xla_data.synthetic import ZIPF_EXPONENT, splitmix, zipf_ranks


def more_ids(ids_NF: NDArray[np.int32], bags: Sequence[int], table_rows: Sequence[int], seed: int) -> NDArray[np.int32]:
    """Ids [n, S] with bags of the given lengths: the id itself, and further ones that follow from it.

        id_0 = id,  id_j = floor(inverse Zipf(u(seed, feature, id, j))),  j = 1 .. L - 1

    so that equal ids always have equal bags, as in the benchmark, which keeps a table of them instead; the further ids
    are Zipf distributed with exponent 1.05 over the table's rows but 0. A missing id stays alone: all others are 0.
    """
    columns = []
    for feature, (bag, rows) in enumerate(zip(bags, table_rows, strict=True)):
        ids = ids_NF[:, feature]
        columns.append(ids)
        for slot in range(1, bag):
            key = np.uint64((seed * 1_000_003 + feature) * 1009 + slot)
            bits = splitmix(splitmix(np.array([key])) + ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
            uniform = (bits >> np.uint64(11)).astype(np.float64) / 2**53
            drawn = zipf_ranks(uniform, max(1, rows - 1), ZIPF_EXPONENT)
            columns.append(np.where((ids == 0) | (rows < 2), 0, drawn).astype(np.int32))
    return np.stack(columns, 1)
