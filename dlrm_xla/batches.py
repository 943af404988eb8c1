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


def arranged(packed: PackedBatch, bag_lengths: Sequence[int], order: Sequence[int]) -> PackedBatch:
    """The same batch with its features in another order, side by side as ``order`` names them."""
    lengths = packed.lengths or bag_lengths
    slots = torch.arange(sum(lengths)).split(list(lengths))  # type: ignore[no-untyped-call]
    columns = torch.cat([slots[feature] for feature in order])
    return packed._replace(
        ids_BS=packed.ids_BS.index_select(1, columns),
        weights_BS=None if packed.weights_BS is None else packed.weights_BS.index_select(1, columns),
        lengths=None if packed.lengths is None else tuple(packed.lengths[feature] for feature in order),
    )


def unpack(packed: PackedBatch, bag_lengths: Sequence[int], order: Sequence[int] | None = None) -> Batch:
    """Splits ids and weights by feature; slots of a padded sample, or that a bag does not fill, get weight 0.

    ``order``: that of an ``arranged`` batch. ``bag_lengths`` and the result are by feature.
    """
    order = range(len(bag_lengths)) if order is None else order
    lengths = list(packed.lengths or [bag_lengths[feature] for feature in order])
    real_B1 = (packed.labels_B >= 0).to(packed.dense_BI.dtype).unsqueeze(1)
    ids_BS, weights_BS = packed.ids_BS, packed.weights_BS
    if packed.lengths is not None:
        weights_BS = (ids_BS >= 0).to(packed.dense_BI.dtype)
        ids_BS = ids_BS.clamp(min=0)
    if weights_BS is None:
        weights = [real_B1.expand(-1, length) for length in lengths]
    else:
        weights = list(torch.split(weights_BS * real_B1, lengths, dim=1))
    found = dict(zip(order, zip(torch.split(ids_BS, lengths, dim=1), weights, strict=True), strict=True))
    ids_F, weights_F = zip(*(found[feature] for feature in range(len(found))), strict=True)
    return Batch(packed.dense_BI, list(ids_F), list(weights_F), packed.labels_B)


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
