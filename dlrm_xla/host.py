"""What is done otherwise where a tensor is in the host's memory, told by the tensor, for modules without a `Device`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# A CPU multiplies matrices faster whose inner dimension is a multiple of this.
_COLUMNS = 16


def on_host(tensor: Tensor) -> bool:
    """Whether a tensor is in the host's memory, where its CPU computes with it."""
    return tensor.device.type == "cpu"


def has_values(ids: Tensor) -> bool:
    """Whether sizes may depend on these ids: on the host, and neither traced nor without data."""
    return on_host(ids) and type(ids) is Tensor and not torch.compiler.is_compiling()


def autocasts(tensor: Tensor) -> bool:
    """Whether products of what lies where this tensor does run in another type now."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def fuses_sums(tensor: Tensor) -> bool:
    """Whether a sum of products is a loop that writes the sums alone: where XLA compiles it."""
    return tensor.device.type == "xla"


def product_width(width: int, like: Tensor) -> int:
    """How many columns a matrix of so many should have as a factor, zeros behind its own: on a CPU a multiple of 16.

    512 x 2048 by 2048 x 13 takes 0.62 ms on two cores, by 2048 x 16 half of it.
    """
    return width + (-width % _COLUMNS if on_host(like) else 0)


def widened(x_BN: Tensor) -> Tensor:
    """A factor with as many columns as `product_width` says."""
    more = product_width(x_BN.shape[1], x_BN) - x_BN.shape[1]
    return nn.functional.pad(x_BN, (0, more)) if more else x_BN


def chosen_columns(x_BN: Tensor, columns_K: Tensor) -> Tensor:
    """Some columns of a matrix, [B, K]."""
    if not on_host(x_BN):
        return x_BN.index_select(1, columns_K)
    # Row by row; index_select goes column by column, each of which meets every cache line of the rows again.
    return x_BN.gather(1, columns_K.long().expand(x_BN.shape[0], -1))


def without_diagonal(square_BVV: Tensor, different_VV: Tensor) -> Tensor:
    """Square matrices with zeros on their diagonals, which ``different_VV`` is false at; the argument may change."""
    if on_host(square_BVV):
        square_BVV.diagonal(dim1=1, dim2=2).zero_()
        return square_BVV
    return torch.where(different_VV, square_BVV, 0)  # which XLA does within what reads it
