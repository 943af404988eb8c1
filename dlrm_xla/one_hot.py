"""Ids as one-hot rows, and products with them that lose nothing on any device's matrix unit."""

from __future__ import annotations

import torch
from torch import Tensor

from dlrm_xla.device import Device


def one_hot_product(ids_N: Tensor, rows_RD: Tensor, device: Device) -> Tensor:
    """Rows by a matrix product with one-hot ids: exact, for each result is one number times 1."""
    hot_NR = one_hot(ids_N, len(rows_RD))
    parts = [hot_NR @ part for part in matmul_parts(rows_RD, device)]
    return torch.cat(parts, 1).view(len(ids_N), len(parts), rows_RD.shape[1]).sum(1)


def one_hot(ids_N: Tensor, num_rows: int) -> Tensor:
    """[N, R] float32 with a 1 at each id; -1 is none. More dimensions in front stay."""
    return (ids_N.unsqueeze(-1) == torch.arange(num_rows, dtype=ids_N.dtype, device=ids_N.device)).float()


def matmul_parts(values: Tensor, device: Device) -> list[Tensor]:
    """Summands whose products with 0 and 1 lose nothing on the device's matrix unit.

    A TPU rounds float32 factors to bfloat16, 8 bits of 24. Cut by masks into three such parts, a number survives;
    a conversion to bfloat16 and back would be optimised away.
    """
    if not device.rows.rounds_matmul:
        return [values]
    parts = []
    for _ in range(2):
        head = device.rows.bits(device.rows.bits(values, torch.int32) & -65536, torch.float32)
        parts.append(head)
        values = values - head
    return [*parts, values]
