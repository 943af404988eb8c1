"""Batches on their way from the host to the model.

A batch travels as few arrays as possible and is split into the contract's `Batch` inside the step's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dlrm_xla.contract import Batch


class PackedBatch(NamedTuple):
    """All features side by side: dense_BI float32, ids_BS int32, labels_B float32 (-1: padded sample).

    ``weights_BS`` is None where every slot of a real sample counts once. ``lengths`` are those of this batch's bags
    where they vary from batch to batch; slots that a bag does not fill have the id -1.
    """

    dense_BI: Tensor
    ids_BS: Tensor
    labels_B: Tensor
    weights_BS: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def sent(self, send: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch on a device, whose ``send`` is given."""
        dense_BI, ids_BS, labels_B = (send(t) for t in self[:3])
        weights_BS = None if self.weights_BS is None else send(self.weights_BS)
        return PackedBatch(dense_BI, ids_BS, labels_B, weights_BS, self.lengths)

    def split(self, parts: int) -> list[PackedBatch]:
        """Equal parts of the batch, in order."""
        if parts == 1:
            return [self]
        pieces = [(None,) * parts if t is None else t.chunk(parts) for t in self[:4]]
        return [PackedBatch(d, i, y, w, self.lengths) for d, i, y, w in zip(*pieces, strict=True)]


def unpack(packed: PackedBatch, bag_lengths: Sequence[int]) -> Batch:
    """Splits ids and weights by feature; slots of a padded sample, or that a bag does not fill, get weight 0."""
    real_B1 = (packed.labels_B >= 0).to(packed.dense_BI.dtype).unsqueeze(1)
    if packed.lengths is not None:
        filled_BS = (packed.ids_BS >= 0).to(packed.dense_BI.dtype) * real_B1
        ids = list(torch.split(packed.ids_BS.clamp(min=0), list(packed.lengths), dim=1))
        weights = list(torch.split(filled_BS, list(packed.lengths), dim=1))
        return Batch(packed.dense_BI, ids, weights, packed.labels_B)
    ids = list(torch.split(packed.ids_BS, list(bag_lengths), dim=1))
    if packed.weights_BS is None:
        weights = [real_B1.expand(-1, length) for length in bag_lengths]
    else:
        weights = list(torch.split(packed.weights_BS * real_B1, list(bag_lengths), dim=1))
    return Batch(packed.dense_BI, ids, weights, packed.labels_B)


class Source(Protocol):
    """What a training loop asks of a dataset; every batch has one shape, or one for each of a few bag lengths."""

    batch_size: int

    def num_batches(self, split: str) -> int:
        """Batches in one pass over a split: "train", "validation" or "test"."""

    def batches(self, split: str, epoch: int = 0, start_step: int = 0) -> Iterator[PackedBatch]:
        """One pass, without its first ``start_step`` batches; training rows in an order that only (seed, epoch)
        decides, others as they lie."""

    def labels(self, split: str) -> Tensor:
        """Labels of a split, float32, 0 or 1, in the order of ``batches`` of an evaluation split."""
