"""Hashing tricks: several ids share a row of a shorter table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.ids import divide_ids

# Knuth's multiplicative constant, floor(2^32 / golden ratio), as a signed 32-bit number.
_GOLDEN = 2654435769 - 2**32


def hash_rows(
    table: Table, inner: MakeBag, *, rows: int = 2000, method: Literal["mod", "multiply_shift"] = "mod"
) -> nn.Module:
    """Hashing trick: ids of a table above ``rows`` rows share that many by a hash.

        e_i = W[h(i)],  h(0) = 0,  h(i) = 1 + hash(i - 1) mod (rows - 1)

    With ``mod`` the ``rows`` - 1 hottest ids never meet each other, because ids are ordered by frequency. The row
    for missing ids is shared with nobody. Keeps rows x dim numbers; a table with no more rows stays as it is.

    Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning", section 2; multiplicative hash
    after Knuth, TAOCP 3, section 6.4.
    """
    if rows < 2:
        raise ValueError(f"hash_rows: rows is {rows}, but must be at least 2: one for missing ids, one for the rest")
    if table.num_rows <= rows:
        return inner(table)
    shorter = replace(table, name=f"{table.name}.hashed", num_rows=rows, std=table.start_std)
    buckets = rows - 1
    if method == "mod":
        return MappedIds(inner(shorter), lambda ids: torch.where(ids == 0, ids, 1 + (ids - 1) % buckets))

    def mixed(ids: Tensor) -> Tensor:
        # Masked before the shift: torch_xla 2.9 shifts a negative number as if it divided, rounding towards zero.
        product = ((ids - 1) * _GOLDEN).bitwise_and(0x7FFFFFFF)
        # The high bits are the well mixed ones.
        return torch.where(ids == 0, ids, 1 + ((product >> 15) ^ product) % buckets)

    return MappedIds(inner(shorter), mixed)


class MappedIds(nn.Module):
    """A bag over a table whose ids are computed from the feature's ids."""

    def __init__(self, bag: nn.Module, mapping: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bag = bag
        self.mapping = mapping

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        out_BD: Tensor = self.bag(self.mapping(ids_BL), weights_BL)
        return out_BD


def quotient_remainder(
    table: Table, inner: MakeBag, *, collisions: int = 4, op: Literal["mult", "add"] = "mult"
) -> nn.Module:
    """Compositional rows: one table of id quotients and one of remainders, multiplied or added.

        e_i = Q[i // collisions] op R[i mod collisions]

    Keeps (ceil(num_rows / collisions) + collisions) x dim numbers, and every id still has a row of its own. Rows
    are multiplied before the bag is summed. Q starts like the exact table and R with standard deviation 1 (mult),
    or each with 1/sqrt(2) of the exact table's (add), so that their combination starts like the exact table.

    Shi et al. 2020, "Compositional Embeddings Using Complementary Partitions", section 4.
    """
    if collisions < 2:
        raise ValueError(f"quotient_remainder: collisions is {collisions}, but must be at least 2")
    std = table.start_std
    std_q, std_r = (std, 1.0) if op == "mult" else (std / math.sqrt(2), std / math.sqrt(2))
    quotients = math.ceil(table.num_rows / collisions)
    remainders = min(collisions, table.num_rows)
    return QuotientRemainderBag(
        inner(replace(table, name=f"{table.name}.quotient", num_rows=quotients, std=std_q)),
        inner(replace(table, name=f"{table.name}.remainder", num_rows=remainders, std=std_r)),
        collisions,
        multiply=op == "mult",
    )


class QuotientRemainderBag(nn.Module):
    """out_b = sum_l w[b, l] (Q[i // c] op R[i mod c]), i = ids[b, l]."""

    def __init__(self, quotient: nn.Module, remainder: nn.Module, collisions: int, *, multiply: bool) -> None:
        super().__init__()
        self.quotient = quotient
        self.remainder = remainder
        self.collisions = collisions
        self.multiply = multiply

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        quotients_BL = divide_ids(ids_BL, self.collisions)
        remainders_BL = ids_BL % self.collisions
        if not self.multiply:
            out_BD: Tensor = self.quotient(quotients_BL, weights_BL) + self.remainder(remainders_BL, weights_BL)
            return out_BD
        # A bag of one slot gives the row itself, which is what must be multiplied.
        weights_N1 = weights_BL.reshape(-1, 1)
        ones_N1 = torch.ones_like(weights_N1)
        rows_ND: Tensor = self.quotient(quotients_BL.reshape(-1, 1), weights_N1) * self.remainder(
            remainders_BL.reshape(-1, 1), ones_N1
        )
        return rows_ND if ids_BL.shape[1] == 1 else rows_ND.view(*ids_BL.shape, -1).sum(1)
