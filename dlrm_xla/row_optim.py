"""Optimizers that touch only the rows that a step looked up, in place, with static shapes.

Duplicate ids are combined by sort and segment sum into a buffer as long as the list of ids: no `unique`, whose
result has a shape that depends on the data and which torch-xla runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dlrm_xla.rows import RowTable

RowOptimizerName = Literal["sgd", "adagrad"]


def combine_duplicates(ids_N: Tensor, grads_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Sums the gradients of equal ids: (ids_N, grads_ND) -> (ids_U, grads_UD), U = N, rows past the last one zero.

    The unused end of ``ids_U`` repeats the largest id with a zero gradient, so that adding it changes nothing.
    """
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    is_first_N = torch.ones_like(sorted_N)
    is_first_N[1:] = (sorted_N[1:] != sorted_N[:-1]).to(sorted_N.dtype)
    segment_N = torch.cumsum(is_first_N, 0, dtype=torch.int32) - 1
    # torch_xla 2.9 aborts the process where index_select takes a result of sort as it is; .int() makes it another.
    sums_UD = torch.zeros_like(grads_ND).index_add_(0, segment_N, grads_ND.index_select(0, order_N.int()))
    ids_U = sorted_N[-1:].expand(len(sorted_N)).contiguous()
    # Ids of one segment are equal, so whichever of them is written last, the result is the same.
    ids_U = ids_U.scatter(0, segment_N.long(), sorted_N)
    return ids_U, sums_UD


class RowOptimizer:
    """SGD, or exact row-wise Adagrad, over the rows looked up since the last step.

    With g the gradient of a row summed over its duplicates:

        sgd      w -= lr g
        adagrad  s += mean(g^2);  w -= lr g / (sqrt(s) + eps)      one float of state per row

    Row-wise Adagrad as in FBGEMM's table-batched embedding (EXACT_ROWWISE_ADAGRAD).
    """

    def __init__(
        self, tables: Sequence[RowTable], name: RowOptimizerName, learning_rate: float, eps: float = 1e-8
    ) -> None:
        self.tables = list(tables)
        self.name = name
        self.learning_rate = learning_rate
        self.eps = eps
        self.state: list[Tensor] = []
        if name == "adagrad":
            # Made on the host: zeros made on xla would be one more graph to compile.
            self.state = [torch.zeros(len(t.weight)).to(t.weight.device) for t in self.tables]

    @torch.no_grad()
    def step(self) -> None:
        """Applies and forgets the gradients of all lookups since the last step."""
        for position, table in enumerate(self.tables):
            looked_up = [(ids_N, rows.grad) for ids_N, rows in table.lookups if rows.grad is not None]
            table.lookups.clear()
            if not looked_up:
                continue
            ids_N = torch.cat([ids for ids, _ in looked_up])
            grads_ND = torch.cat([grad for _, grad in looked_up])
            if self.name == "sgd":
                # Addition combines duplicates by itself.
                table.weight.index_add_(0, ids_N, grads_ND * -self.learning_rate)
                continue
            ids_U, sums_UD = combine_duplicates(ids_N, grads_ND)
            state_R = self.state[position]
            state_R.index_add_(0, ids_U, sums_UD.square().mean(1))
            scale_U = -self.learning_rate / (state_R.index_select(0, ids_U).sqrt() + self.eps)
            table.weight.index_add_(0, ids_U, sums_UD * scale_U.unsqueeze(1))

    def state_dict(self) -> dict[str, Tensor]:
        """The state of each table under ``<position>.<table name>``."""
        return {f"{i}.{t.table.name}": s for i, (t, s) in enumerate(zip(self.tables, self.state, strict=False))}
