"""Compositional rows: the digits of an id have tables of their own, whose rows are multiplied or added."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from dlrm_xla.contract import ComposedBag, Computation, MakeBag, Table, Wanted, sized
from dlrm_xla.ids import divide_ids


@sized("collisions", lambda table: range(math.isqrt(table.num_rows), 1, -1))
def quotient_remainder(
    table: Table, inner: MakeBag, *, collisions: int = 4, op: Literal["mult", "add"] = "mult"
) -> nn.Module:
    """Compositional rows: one table of id quotients and one of remainders, multiplied or added.

        e_i = Q[i // collisions] op R[i mod collisions]

    Keeps 4 (ceil(num_rows / collisions) + collisions) dim bytes, and every id still has a row of its own. Rows
    are multiplied before the bag is summed. Q starts like the exact table and R with standard deviation 1 (mult),
    or each with 1/sqrt(2) of the exact table's (add), so that their combination starts like the exact table.

    Shi et al. 2020, "Compositional Embeddings Using Complementary Partitions", section 4.
    """
    if collisions < 2:
        raise ValueError(f"quotient_remainder: collisions is {collisions}, but must be at least 2")
    return _compositional(table, inner, [collisions], op)


def _collisions(table: Table, parts: int) -> Sequence[int]:
    """From those of the fewest rows, near num_rows^(1 - 1 / parts), to two ids a digit."""
    digits = max(parts, 3) - 1
    near = max(2, math.floor(table.num_rows ** (1 / (digits + 1)) + 1e-9))
    radix = min(near, near + 1, key=lambda radix: math.ceil(table.num_rows / radix**digits) + digits * radix)
    return range(radix**digits, 2**digits - 1, -1)


@sized("collisions", _collisions)
def compositional(
    table: Table, inner: MakeBag, *, collisions: int = 64, parts: int = 3, op: Literal["mult", "add"] = "mult"
) -> nn.Module:
    """Compositional rows of more than two parts: the remainder is cut into digits with a table each.

        e_i = Q[i // c] op R_1[j_1] op ... op R_k-1[j_k-1],   i mod c -> digits j, radix ceil(c^(1 / (parts - 1)))

    Keeps 4 (ceil(num_rows / c) + (parts - 1) radix) dim bytes, c = radix^(parts - 1) >= collisions: down to about
    4 parts num_rows^(1 / parts) dim, and every id still has a row of its own. Starts as ``quotient_remainder``.

    Shi et al. 2020, "Compositional Embeddings Using Complementary Partitions", section 3, generalized
    quotient-remainder partitions.
    """
    if parts < 3 or collisions < 2 ** (parts - 1):
        raise ValueError(
            f"compositional: parts is {parts} and collisions {collisions}, but parts must be at least 3 (two are "
            "quotient_remainder) and collisions at least 2^(parts - 1)"
        )
    radix = math.ceil(collisions ** (1 / (parts - 1)) - 1e-9)
    return _compositional(table, inner, [radix] * (parts - 1), op)


def _compositional(table: Table, inner: MakeBag, radices: list[int], op: str) -> nn.Module:
    quotients = math.ceil(table.num_rows / math.prod(radices))
    names = ["quotient", "remainder", *(f"remainder{k}" for k in range(2, len(radices) + 1))]
    multiply = op == "mult"
    stds = (
        [table.start_std, *[1.0] * len(radices)] if multiply else [table.start_std / math.sqrt(len(names))] * len(names)
    )
    bags = [
        inner(replace(table, name=f"{table.name}.{name}", num_rows=min(rows, table.num_rows), std=std))
        for name, rows, std in zip(names, [quotients, *radices], stds, strict=True)
    ]
    return CompositionalBag(dict(zip(names, bags, strict=True)), radices, multiply=multiply)


class CompositionalBag(ComposedBag):
    """out_b = sum_l w[b, l] (Q[i // c] op R_1[j_1] op ...), i = ids[b, l], c the product of ``radices``."""

    def __init__(self, bags: dict[str, nn.Module], radices: list[int], *, multiply: bool) -> None:
        super().__init__()
        for name, bag in bags.items():
            self.add_module(name, bag)
        self.names = list(bags)
        self.radices = radices
        self.multiply = multiply

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        parts = []
        quotients_BL = ids_BL
        for radix in self.radices:
            parts.append(quotients_BL % radix)
            quotients_BL = divide_ids(quotients_BL, radix)
        parts.insert(0, quotients_BL)
        bags = [self.get_submodule(name) for name in self.names]
        if not self.multiply:
            added = yield [Wanted(bag, part, weights_BL) for bag, part in zip(bags, parts, strict=True)]
            return torch.stack(added).sum(0)
        # A bag of one slot gives the row itself, which is what must be multiplied.
        weights_N1 = weights_BL.reshape(-1, 1)
        ones_N1 = (weights_N1 != 0).to(weights_N1.dtype)  # padding is not looked up
        weights = [weights_N1, *[ones_N1] * len(self.radices)]
        factors = yield [
            Wanted(bag, part.reshape(-1, 1), weight_N1)
            for bag, part, weight_N1 in zip(bags, parts, weights, strict=True)
        ]
        rows_ND = functools.reduce(torch.mul, factors)
        return rows_ND if ids_BL.shape[1] == 1 else rows_ND.view(*ids_BL.shape, -1).sum(1)
