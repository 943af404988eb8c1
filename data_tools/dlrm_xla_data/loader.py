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
from dlrm_xla_data.order import Rows, in_batches, prefetched, shuffled
from dlrm_xla_data.prepared import PreparedDataset


class Loader:
    """Static batches of every split; the last one is padded with samples labelled -1.

    Training rows come as `dlrm_xla_data.order.shuffled` says, other splits as they lie. Ids seen less often than
    ``min_count`` in training become 0, which needs one comparison, as ids fall in frequency.

    Bags of varying length: a training batch has rows of one bucket (`dlrm_xla_data.bags`), in the order in which
    batches fill up, and each bucket's last is padded; batches of other splits take the bucket of their longest row.

    ``part`` (k, n) gives the k-th of n equal parts of each batch and reads no other rows: a rank's share. The size of
    the whole batch is ``batch_size``. Up to ``ahead`` batches are made in the background, 0 for none; ``pinned`` puts
    them into memory from which CUDA copies while it computes.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        batch_size: int,
        min_count: int = 0,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
        ahead: int = 2,
        pinned: bool = False,
    ) -> None:
        assert batch_size % part[1] == 0, "the ranks divide a batch"
        self._part_size = batch_size // part[1]
        self._part_start = part[0] * self._part_size
        self._ahead = ahead
        self._pinned = pinned
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_rows = [dataset.num_rows(f, min_count) for f in range(len(dataset.names))]
        self._all_rows = [dataset.num_rows(f, 0) for f in range(len(dataset.names))]
        # A memory map's own indexing is slower than that of the array in it.
        self._arrays = [np.asarray(a) for a in (dataset.dense, dataset.labels, dataset.ids)]
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
        made = (self._batch(rows, bucket) for rows, bucket in self._rows(split, epoch, start_step))
        return prefetched(made, self._ahead) if self._ahead else made

    def _rows(self, split: str, epoch: int, start_step: int) -> Iterator[tuple[Rows, int]]:
        """Rows of each batch and the bucket that they take."""
        start, stop = self.dataset.splits[split]
        skip = start_step * self.batch_size
        if split != "train":
            for first in range(start + skip, stop, self.batch_size):
                rows = np.arange(first, min(first + self.batch_size, stop))
                # In order, so the bucket is the one that holds all of them.
                bags = self.dataset.bags
                yield rows, int(bucket_of(bags, rows, self._buckets).max()) if bags else 0
        elif self._bucket_of_train is None:
            for rows in in_batches(shuffled(start, stop, self.seed, epoch, skip), self.batch_size):
                yield rows, 0
        else:
            order = np.concatenate(list(shuffled(start, stop, self.seed, epoch)))
            bucket = self._bucket_of_train[order - start]
            batches = batches_of_buckets(order, bucket, len(self._buckets), self.batch_size)
            yield from itertools.islice(batches, start_step, None)

    def _sort_into_buckets(self, split: str) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        if self.dataset.bags is None:
            return None
        return bucket_of(self.dataset.bags, np.arange(*self.dataset.splits[split]), self._buckets)

    def _batch(self, rows: Rows, bucket: int) -> PackedBatch:
        size, lengths, bags = self._part_size, self._buckets[bucket], self.dataset.bags
        rows = rows[self._part_start : self._part_start + size]
        count = len(rows)
        all_dense, all_labels, all_ids = self._arrays
        dense = np.empty((size, all_dense.shape[1]), np.float32)
        labels = np.empty(size, np.float32)
        # "clip" spares numpy a copy; rows are never out of range.
        np.take(all_dense, rows, 0, out=dense[:count], mode="clip")
        labels[:count] = all_labels[rows]
        dense[count:], labels[count:] = 0, -1
        if bags is None:
            ids = np.empty((size, sum(lengths)), np.int32)
            np.take(all_ids, rows, 0, out=ids[:count], mode="clip")
        else:
            ids = np.concatenate([bags.padded(rows, lengths), np.empty((size - count, sum(lengths)), np.int32)])
        ids[count:] = 0
        # Without a sign negative ids are large ones, so one comparison finds both.
        least = 0 if bags is None else PADDING
        beyond = np.repeat((np.array(self._all_rows) - least).astype(np.uint32), lengths)
        if ((ids - least if least else ids).view(np.uint32) >= beyond).any():
            raise self._bad_id(rows, ids[:count], lengths, least)
        if self.num_rows != self._all_rows:
            np.putmask(ids, ids >= np.repeat(np.array(self.num_rows, np.int32), lengths), 0)
        dense_BI, ids_BS, labels_B = (
            torch.from_numpy(a).pin_memory() if self._pinned else torch.from_numpy(a) for a in (dense, ids, labels)
        )
        return PackedBatch(dense_BI, ids_BS, labels_B, None, None if bags is None else lengths)

    def _bad_id(self, rows: Rows, ids: np.ndarray[Any, Any], lengths: Lengths, least: int) -> UserError:
        ends = np.repeat(self._all_rows, lengths)
        place, slot = np.argwhere((ids < least) | (ids >= ends))[0]
        name = np.repeat(self.dataset.names, lengths)[slot]
        return UserError(
            f"row {rows[place]} of the data: feature {name} has the id {ids[place, slot]}, but its table has the ids "
            f"0 to {ends[slot] - 1}. The prepared data is damaged: delete it, give the raw log."
        )
