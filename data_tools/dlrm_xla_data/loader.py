"""Batches of one shape from a prepared dataset, in an order that the seed decides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlrm_xla.batches import PackedBatch
from dlrm_xla.errors import UserError
from dlrm_xla_data.bags import PADDING, Lengths, batches_of_buckets, bucket_lengths, bucket_of
from dlrm_xla_data.prepared import PreparedDataset


class Loader:
    """Static batches of every split; the last one is padded with samples labelled -1.

    Training rows are a full random permutation that (seed, epoch) decides; other splits come as they lie. Ids seen
    less often than ``min_count`` in training become 0, which needs one comparison, as ids fall in frequency.

    Bags of varying length: a training batch has rows of one bucket (`dlrm_xla_data.bags`), in the order in which
    batches fill up, and each bucket's last is padded; batches of other splits take the bucket of their longest row.
    """

    def __init__(self, dataset: PreparedDataset, batch_size: int, min_count: int = 0, seed: int = 0) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_rows = [dataset.num_rows(f, min_count) for f in range(len(dataset.names))]
        self._all_rows = [dataset.num_rows(f, 0) for f in range(len(dataset.names))]
        self._buckets = bucket_lengths(dataset.bag_lengths) if dataset.bags else [tuple(dataset.bag_lengths)]
        self._bucket_of_train = self._sort_into_buckets("train")

    def num_batches(self, split: str) -> int:
        """Batches in one pass over a split."""
        start, stop = self.dataset.splits[split]
        if split == "train" and self._bucket_of_train is not None:
            counts = np.bincount(self._bucket_of_train, minlength=len(self._buckets))
            return int((-(-counts // self.batch_size)).sum())
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
        if split == "train" and self._bucket_of_train is not None:
            bucket = self._bucket_of_train[order - start]
            for rows, number in itertools.islice(
                batches_of_buckets(order, bucket, len(self._buckets), self.batch_size), start_step, None
            ):
                yield self._batch(rows, number)
            return
        for first in range(start_step * self.batch_size, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            # In order, so the bucket is the one that holds all of them.
            bags = self.dataset.bags
            yield self._batch(rows, int(bucket_of(bags, rows, self._buckets).max()) if bags else 0)

    def _sort_into_buckets(self, split: str) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        if self.dataset.bags is None:
            return None
        return bucket_of(self.dataset.bags, np.arange(*self.dataset.splits[split]), self._buckets)

    def _batch(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]], bucket: int) -> PackedBatch:
        data, size, lengths = self.dataset, self.batch_size, self._buckets[bucket]
        dense = np.zeros((size, data.dense.shape[1]), np.float32)
        ids = np.zeros((size, sum(lengths)), np.int32)
        labels = np.full(size, -1, np.float32)
        count = len(rows)
        dense[:count], labels[:count] = data.dense[rows], data.labels[rows]
        ids[:count] = data.ids[rows] if data.bags is None else data.bags.padded(rows, lengths)
        least = 0 if data.bags is None else PADDING
        if (ids < least).any() or (ids >= np.repeat(self._all_rows, lengths)).any():
            raise self._bad_id(rows, ids, lengths, least)
        ids[ids >= np.repeat(self.num_rows, lengths)] = 0
        varying = None if data.bags is None else lengths
        return PackedBatch(torch.from_numpy(dense), torch.from_numpy(ids), torch.from_numpy(labels), None, varying)

    def _bad_id(
        self, rows: np.ndarray[tuple[int], np.dtype[np.int64]], ids: np.ndarray[Any, Any], lengths: Lengths, least: int
    ) -> UserError:
        ends = np.repeat(self._all_rows, lengths)
        place, slot = np.argwhere((ids < least) | (ids >= ends))[0]
        name = np.repeat(self.dataset.names, lengths)[slot]
        return UserError(
            f"row {rows[place]} of the data: feature {name} has the id {ids[place, slot]}, but its table has the ids "
            f"0 to {ends[slot] - 1}. The prepared data is damaged: delete it, give the raw log."
        )
