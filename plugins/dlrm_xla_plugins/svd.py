"""Truncated SVD of trained tables."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from dlrm_xla.contract import MakeBag, Table, sized
from dlrm_xla_plugins.directions import random_directions
from dlrm_xla_plugins.projection import ProjectedBag


@sized("rank", lambda table: range(1, table.dim))
def svd(
    table: Table,
    inner: MakeBag,
    *,
    rank: int = 4,
    method: Literal["optimal", "randomized"] = "optimal",
    power: int = 2,
    oversampling: int = 8,
) -> nn.Module:
    """Truncated singular value decomposition of a trained table; ``low_rank`` that knows how to begin.

        W = U S V^T,   e_i = U'[i] V',   U' = U_r S_r = W V_r   [num_rows, rank],   V' = V_r^T   [rank, dim]

    ``optimal``: by ``top_directions``, of all maps with that many numbers a row the least squared error (weighted by
    lookups where they are given). ``randomized``: by ``random_directions``. Keeps 4 rank (num_rows + dim) bytes.
    Trained from the start it is ``low_rank``. U' may be approximated further, as in ``svd+int4``.

    Eckart & Young 1936, "The Approximation of One Matrix by Another of Lower Rank"; Halko, Martinsson, Tropp 2011,
    "Finding Structure with Randomness", algorithm 4.4.
    """
    if not 1 <= rank < table.dim:
        raise ValueError(f"svd: rank is {rank}, but must be from 1 to {table.dim - 1}, below the table's width")
    if power < 0 or oversampling < 0:
        raise ValueError(f"svd: power is {power} and oversampling {oversampling}; neither can be negative")
    narrow = replace(table, name=f"{table.name}.narrow", dim=rank, std=table.start_std)
    matrix = nn.Parameter(torch.empty(rank, table.dim).normal_(std=1 / math.sqrt(rank)))
    if method == "optimal":
        return ProjectedBag(inner(narrow), matrix)
    return ProjectedBag(inner(narrow), matrix, lambda rows: random_directions(rows, rank, power, oversampling))
