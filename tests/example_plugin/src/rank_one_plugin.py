"""An approximation by somebody else: each id keeps one number, and all ids share a few directions."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dlrm_xla.contract import Table


def rank_one(table: Table, inner: Callable[[Table], nn.Module], *, rank: int = 1) -> nn.Module:
    """Low-rank rows e_i = u_i V, with u_i of `rank` numbers from the inner table and V trained."""
    if not 1 <= rank < table.dim:
        raise ValueError(f"rank_one: rank is {rank}, but must be from 1 to {table.dim - 1}")
    return RankOneBag(inner(replace(table, name=f"{table.name}.u", dim=rank, std=table.start_std)), rank, table.dim)


class RankOneBag(nn.Module):
    """out_BD = bag(ids_BL, weights_BL) V; the sum of a bag commutes with the product."""

    def __init__(self, bag: nn.Module, rank: int, dim: int) -> None:
        super().__init__()
        self.bag = bag
        self.directions = nn.Parameter(torch.empty(rank, dim).normal_(std=rank**-0.5))

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        out_BD: Tensor = self.bag(ids_BL, weights_BL) @ self.directions
        return out_BD
