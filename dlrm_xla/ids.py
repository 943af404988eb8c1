"""Arithmetic on ids that is exact on every device, and the lines that they lead to."""

from __future__ import annotations

import torch
from torch import Tensor


def divide_ids(ids: Tensor, divisor: int) -> Tensor:
    """floor(ids / divisor) for ids from 0 to 2^31 - 1 and a divisor from 1 to 2^30, the type kept.

    torch_xla 2.9 divides integers as float32, whatever the rounding mode, and so is wrong beyond 2^24. Products and
    sums of int32 are exact, so the quotient is corrected by what it leaves: once by a division of that small
    remainder, once by one.
    """
    quotient = torch.div(ids, divisor, rounding_mode="floor")
    quotient = quotient + torch.div(ids - quotient * divisor, divisor, rounding_mode="floor")
    left = ids - quotient * divisor
    return quotient + (left >= divisor).to(ids.dtype) - (left < 0).to(ids.dtype)


def filled(lines_NV: Tensor, array: Tensor) -> Tensor:
    """Lines as wide as those of an array, with zeros for what they lack."""
    missing = array.shape[-1] - lines_NV.shape[-1] if array.dim() > 1 else 0
    return torch.nn.functional.pad(lines_NV, (0, missing)) if missing else lines_NV


def places(place_N: Tensor, pack: int) -> Tensor:
    """Which of the ``pack`` places of its line each row has, bool [N, pack]."""
    return place_N.unsqueeze(1) == torch.arange(pack, dtype=place_N.dtype, device=place_N.device)
