"""DLRM: bottom MLP on dense features, one bag per categorical feature, interaction, top MLP.

Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems"; the
low-rank cross interaction is DCN-V2, Wang et al. 2021, section 4.2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlrm_xla.bags import BagCollection
from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.host import chosen_columns, product_width, widened, without_diagonal

InteractionName = Literal["dot", "cat", "dcn"]


class PaddedLinear(nn.Linear):
    """A linear layer whose input may come with more columns than it has weights; they count for nothing."""

    def forward(self, x_BN: Tensor) -> Tensor:
        """[B, in_features and more] -> [B, out_features]."""
        more = x_BN.shape[1] - self.in_features
        weight = nn.functional.pad(self.weight, (0, more)) if more else self.weight
        return nn.functional.linear(x_BN, weight, self.bias)


def mlp(widths: Sequence[int], *, relu_last: bool, first: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """Linear layers with ReLU between them, initialised as the reference does; ``first`` is the type of the first.

    Weights [m, n] start normal(0, sqrt(2 / (m + n))), biases normal(0, sqrt(1 / m)), m outputs and n inputs
    (facebookresearch/dlrm, ``create_mlp``).
    """
    layers: list[nn.Module] = []
    for position, (n, m) in enumerate(itertools.pairwise(widths)):
        linear = (nn.Linear if position else first)(n, m)
        nn.init.normal_(linear.weight, std=math.sqrt(2 / (m + n)))
        nn.init.normal_(linear.bias, std=math.sqrt(1 / m))
        layers.append(linear)
        if relu_last or position < len(widths) - 2:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class DotInteraction(nn.Module):
    """Dense vector followed by the dot products of all pairs of vectors: [B, D], [B, F, D] -> [B, D + F(F+1)/2].

    Pairs (i, j), j < i, row by row, without a vector's product with itself, the dense vector first. On a CPU zeros
    follow up to a multiple of 16 columns: it multiplies 2048 x 368 by 368 x 512 and back in 26.5 ms, 2048 x 367 in
    33.6.
    """

    pairs: Tensor
    columns: Tensor
    different: Tensor

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        n = num_features + 1
        self.dim = dim
        self.out_width = dim + n * (n - 1) // 2
        for name in ("pairs", "columns", "different"):
            self.register_buffer(name, None, persistent=False)
        self.take_order(range(num_features))

    def take_order(self, order: Sequence[int]) -> None:
        """Takes the bags in this order of features from now on; the result stays that of features in order."""
        n = len(order) + 1
        at = {feature + 1: place + 1 for place, feature in enumerate(order)} | {0: 0}
        # Flat positions of the lower triangle, and for each position of the square the column that its pair's product
        # has; computed here because tril_indices falls back to the CPU on xla.
        pairs = [(at[i], at[j]) for i in range(n) for j in range(i)]
        columns = torch.zeros(n, n, dtype=torch.int32)
        for number, (i, j) in enumerate(pairs):
            columns[i, j] = columns[j, i] = self.dim + number
        self.pairs = torch.tensor([i * n + j for i, j in pairs], dtype=torch.int32)
        self.columns = columns.flatten()
        self.different = columns > 0

    def forward(self, dense_BD: Tensor, bags_BFD: Tensor) -> Tensor:
        padded = product_width(self.out_width, dense_BD)
        result: Tensor = _DotProducts.apply(dense_BD, bags_BFD, self.pairs, self.columns, self.different, padded)  # type: ignore[no-untyped-call]
        return result


class _DotProducts(torch.autograd.Function):
    """[v_0, p_(1,0), p_(2,0), p_(2,1), ..., 0] with p_(i,j) = v_i . v_j, of the dense vector v_0 and the bags.

    With the gradient of each product at both its places of a square G, symmetric and with a zero diagonal,
    dV = G V: one gather and one product, where autograd scatters the gather's gradient, multiplies twice, and cuts the
    gradient of the result into its parts.
    """

    @staticmethod
    def forward(
        ctx: Any, dense_BD: Tensor, bags_BFD: Tensor, pairs: Tensor, columns: Tensor, different: Tensor, padded: int
    ) -> Tensor:
        vectors_BVD = torch.cat([dense_BD.unsqueeze(1), bags_BFD], dim=1)
        ctx.save_for_backward(vectors_BVD, columns, different)
        pairs_BP = chosen_columns(torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2)).flatten(1), pairs)
        parts = [dense_BD, pairs_BP]
        if zeros := padded - dense_BD.shape[1] - pairs_BP.shape[1]:
            parts.append(pairs_BP.new_zeros(pairs_BP.shape[0], zeros))
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        vectors_BVD, columns, different = ctx.saved_tensors
        dim = vectors_BVD.shape[2]
        square_BVV = chosen_columns(grads[0], columns).view(vectors_BVD.shape[0], vectors_BVD.shape[1], -1)
        square_BVV = without_diagonal(square_BVV, different)
        grads_BVD = torch.bmm(square_BVV, vectors_BVD.to(square_BVV.dtype))
        return grads[0][:, :dim] + grads_BVD[:, 0], grads_BVD[:, 1:], None, None, None, None


class CatInteraction(nn.Module):
    """All vectors side by side: [B, D], [B, F, D] -> [B, (F + 1) D]."""

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.out_width = (num_features + 1) * dim

    def forward(self, dense_BD: Tensor, bags_BFD: Tensor) -> Tensor:
        return torch.cat([dense_BD, bags_BFD.flatten(1)], dim=1)


class LowRankCross(nn.Module):
    """DCN-V2 cross layers of low rank over the concatenated vectors x_0 [B, (F + 1) D].

        x_{l+1} = x_0 * (W_l V_l x_l + b_l) + x_l,    V_l [rank, width], W_l [width, rank]

    Wang et al. 2021, equation 2. Weights start Xavier normal and biases zero, as in MLPerf's DLRM-DCNv2.
    """

    def __init__(self, num_features: int, dim: int, num_layers: int, rank: int) -> None:
        super().__init__()
        self.out_width = (num_features + 1) * dim
        self.v = nn.ModuleList(nn.Linear(self.out_width, rank, bias=False) for _ in range(num_layers))
        self.w = nn.ModuleList(nn.Linear(rank, self.out_width) for _ in range(num_layers))
        for v, w in zip(self.v, self.w, strict=True):
            assert isinstance(v, nn.Linear)
            assert isinstance(w, nn.Linear)
            nn.init.xavier_normal_(v.weight)
            nn.init.xavier_normal_(w.weight)
            nn.init.zeros_(w.bias)

    def forward(self, dense_BD: Tensor, bags_BFD: Tensor) -> Tensor:
        x0 = x = torch.cat([dense_BD, bags_BFD.flatten(1)], dim=1)
        for v, w in zip(self.v, self.w, strict=True):
            x = x0 * w(v(x)) + x
        return x


class DLRM(nn.Module):
    """Click logits from dense features and bags: (dense_BI, ids, weights) -> logits_B.

    ``bottom`` and ``top`` are hidden widths: the bottom MLP goes num_dense - bottom... - dim, the top MLP from the
    interaction's width over ``top`` to 1. ReLU after every layer but the last of the top MLP, whose sigmoid belongs
    to the loss. ``make_bags`` gives the builder of each table's bag.

    The parameters of one part do not depend on another: each part draws from its own seed, so a run with another
    plugin starts from the same MLPs and the same untouched tables.
    """

    def __init__(
        self,
        num_dense: int,
        tables: Sequence[Table],
        make_bags: Sequence[MakeBag],
        *,
        bottom: Sequence[int],
        top: Sequence[int],
        interaction: InteractionName = "dot",
        cross_layers: int = 3,
        cross_rank: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        dims = {table.dim for table in tables}
        if len(dims) != 1:
            raise ValueError(f"all tables of a DLRM have one width, but these have {sorted(dims)}")
        dim = dims.pop()
        self.tables = tuple(tables)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.bottom = mlp([num_dense, *bottom, dim], relu_last=True, first=PaddedLinear)
            self.interaction: DotInteraction | CatInteraction | LowRankCross
            if interaction == "dot":
                self.interaction = DotInteraction(len(tables), dim)
            elif interaction == "cat":
                self.interaction = CatInteraction(len(tables), dim)
            else:
                self.interaction = LowRankCross(len(tables), dim, cross_layers, cross_rank)
            self.top = mlp([self.interaction.out_width, *top, 1], relu_last=False, first=PaddedLinear)
            bags = []
            for position, (table, make_bag) in enumerate(zip(tables, make_bags, strict=True)):
                torch.manual_seed(1_000_003 * (seed + 1) + position)
                bags.append(make_bag(table))
            self.bags = BagCollection(bags, any_order=interaction == "dot")

    def arrange(self) -> None:
        """Has the interaction take the bags in the order in which they come; the logits do not depend on it."""
        if isinstance(self.interaction, DotInteraction):
            self.interaction.take_order(self.bags.order)

    def forward(self, dense_BI: Tensor, ids: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        dense_BD = self.bottom(widened(dense_BI))
        logits_B1: Tensor = self.top(self.interaction(dense_BD, self.bags(ids, weights)))
        return logits_B1.squeeze(1)
