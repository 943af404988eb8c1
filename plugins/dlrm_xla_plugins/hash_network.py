"""Embeddings computed by a network from many hashes of the id: no rows at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import mish

from dlrm_xla.contract import MakeBag, Table, sized
from dlrm_xla_plugins.hashes import mixed


@sized("width", lambda table: range(1, 1025))
def dhe(table: Table, inner: MakeBag, *, width: int = 64, hashes: int = 32) -> nn.Module:
    """Deep hash embedding: an MLP over dense hashes of the id.

        x_k(i) = 2 hash_k(i) / 2^31 - 1,  e_i = std W3 mish(W2 mish(W1 x + b1) + b2)

    Hashes are shifts of one function (`hashes.mixed`): up to 34 of them have nothing in common in tables of up to 56
    million rows; in larger ones, or with more hashes, two ids may have some x_k at different k.

    Keeps 4 (hashes width + width^2 + width dim + 2 width) bytes, the last term biases, whatever the number of rows.
    Ends a composition: it asks ``inner`` for nothing. A lookup takes a multiplication for each weight, and no gather.

    Kang et al. 2021, "Learning to Embed Categorical Features without Embedding Tables for Recommendation",
    section 4.
    """
    if width < 1 or hashes < 1:
        raise ValueError(f"dhe: width is {width} and hashes {hashes}, but both must be at least 1")
    return HashNetworkBag(table, width, hashes)


class HashNetworkBag(nn.Module):
    """Weighted sum of the network's outputs; (ids_BL, weights_BL) -> out_BD."""

    def __init__(self, table: Table, width: int, num_hashes: int) -> None:
        super().__init__()
        self.table = table
        self.num_hashes = num_hashes
        # Uniform inputs have variance 1/3. Gains that keep a variance of 1 through mish, measured on normal inputs:
        # E[mish(x)^2] = 0.39 at x ~ normal(0, 1).
        self.first = nn.Linear(num_hashes, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, table.dim, bias=False)
        for layer, fan, power in (
            (self.first, num_hashes, 1 / 3),
            (self.second, width, 0.39),
            (self.last, width, 0.39),
        ):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(fan * power))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        ids_N = ids_BL.reshape(-1)
        x_NK = torch.stack([mixed(ids_N, k) for k in range(self.num_hashes)], 1).float() / 2**30 - 1
        rows_ND: Tensor = self.last(mish(self.second(mish(self.first(x_NK)))))
        weighted_ND = rows_ND * (weights_BL.reshape(-1, 1) * self.table.start_std)
        return weighted_ND.view(*ids_BL.shape, -1).sum(1)
