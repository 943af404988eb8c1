"""Batches of one shape from a prepared dataset, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlrm_xla.batches import PackedBatch
from dlrm_xla.errors import UserError
from dlrm_xla_data.prepared import PreparedDataset


class Loader:
    """Static batches of every split; the last one is padded with samples labelled -1.

    Training rows are a full random permutation that (seed, epoch) decides; other splits come as they lie. Ids seen
    less often than ``min_count`` in training become 0, which needs one comparison, as ids fall in frequency.
    """

    def __init__(self, dataset: PreparedDataset, batch_size: int, min_count: int = 0, seed: int = 0) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_rows = [dataset.num_rows(f, min_count) for f in range(len(dataset.names))]
        self._num_rows_S = np.repeat(np.array(self.num_rows, np.int32), dataset.bag_lengths)
        all_rows = [dataset.num_rows(f, 0) for f in range(len(dataset.names))]
        self._all_rows_S = np.repeat(np.array(all_rows, np.int32), dataset.bag_lengths)

    def num_batches(self, split: str) -> int:
        """Batches in one pass over a split."""
        start, stop = self.dataset.splits[split]
        return -(-(stop - start) // self.batch_size)

    def labels(self, split: str) -> Tensor:
        """Labels of a split, float32 [rows]."""
        start, stop = self.dataset.splits[split]
        return torch.from_numpy(self.dataset.labels[start:stop].astype(np.float32))

    def batches(self, split: str, epoch: int = 0, start_step: int = 0) -> Iterator[PackedBatch]:
        """One pass over a split, without its first ``start_step`` batches."""
        start, stop = self.dataset.splits[split]
        order = np.arange(start, stop)
        if split == "train":
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        for first in range(start_step * self.batch_size, len(order), self.batch_size):
            yield self._batch(order[first : first + self.batch_size])

    def _batch(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> PackedBatch:
        data, size = self.dataset, self.batch_size
        dense = np.zeros((size, data.dense.shape[1]), np.float32)
        ids = np.zeros((size, data.ids.shape[1]), np.int32)
        labels = np.full(size, -1, np.float32)
        count = len(rows)
        dense[:count], ids[:count], labels[:count] = data.dense[rows], data.ids[rows], data.labels[rows]
        if (ids < 0).any() or (ids >= self._all_rows_S).any():
            raise self._bad_id(rows, ids)
        ids[ids >= self._num_rows_S] = 0
        return PackedBatch(torch.from_numpy(dense), torch.from_numpy(ids), torch.from_numpy(labels))

    def _bad_id(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]], ids: np.ndarray[Any, Any]) -> UserError:
        place, slot = np.argwhere((ids < 0) | (ids >= self._all_rows_S))[0]
        name = np.repeat(self.dataset.names, self.dataset.bag_lengths)[slot]
        return UserError(
            f"row {rows[place]} of the data: feature {name} has the id {ids[place, slot]}, but its table has the ids "
            f"0 to {self._all_rows_S[slot] - 1}. The prepared data is damaged: delete it, give the raw log."
        )
