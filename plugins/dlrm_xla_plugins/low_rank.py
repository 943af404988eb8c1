"""Low rank: narrow rows, widened by a trained matrix."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from dlrm_xla.contract import MakeBag, Table, sized
from dlrm_xla_plugins.projection import ProjectedBag


@sized("rank", lambda table: range(1, table.dim))
def low_rank(table: Table, inner: MakeBag, *, rank: int = 4) -> nn.Module:
    """Narrow rows times a trained matrix.

        e_i = U[i] V,   U [num_rows, rank], V [rank, dim]

    Keeps 4 rank (num_rows + dim) bytes, so no less than 1 / dim of the exact table. U starts with the exact
    table's standard deviation, V normal(0, 1/rank).

    Eckart & Young 1936, "The Approximation of One Matrix by Another of Lower Rank", its theorem: no other matrix of
    that rank has fewer squared errors than the truncated SVD, which ``svd`` starts from.
    """
    if not 1 <= rank < table.dim:
        raise ValueError(f"low_rank: rank is {rank}, but must be from 1 to {table.dim - 1}, below the table's width")
    narrow = replace(table, name=f"{table.name}.narrow", dim=rank, std=table.start_std)
    matrix = torch.empty(rank, table.dim).normal_(std=1 / math.sqrt(rank))
    return ProjectedBag(inner(narrow), nn.Parameter(matrix))


@sized("full_rows", lambda table: range(1, table.num_rows))
def mixed_dim(table: Table, inner: MakeBag, *, full_rows: int = 1000, alpha: float = 0.3) -> nn.Module:
    """Mixed dimensions: the longer a table, the narrower its rows, widened by a trained matrix.

        d = max(1, round(dim (full_rows / num_rows)^alpha)),  e_i = U[i] V as in ``low_rank`` with rank d

    A table of up to ``full_rows`` rows, or one that would keep no less, stays as it is. Keeps 4 d (num_rows + dim)
    bytes.

    Ginart et al. 2021, "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems": the
    power rule with temperature alpha, as `alpha_power_rule` of facebookresearch/dlrm's tricks/md_embedding_bag.py has
    it, whose dimension is full at the smallest table instead of at ``full_rows``.
    """
    if full_rows < 1 or not 0 <= alpha <= 1:
        raise ValueError(f"mixed_dim: full_rows is {full_rows} and alpha {alpha}; at least 1, and from 0 to 1")
    rank = max(1, round(table.dim * (full_rows / table.num_rows) ** alpha))
    larger = rank * (table.num_rows + table.dim) >= table.num_rows * table.dim
    return inner(table) if larger else low_rank(table, inner, rank=rank)
