"""The exact table: the innermost bag, which every plugin ends at, and the one place that holds large rows.

A step must cost what it touches, not what the table holds. So in training the gathered rows, not the table,
are the leaf of autograd; `dlrm_xla.row_optim` then updates exactly those rows in place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dlrm_xla.contract import Table


class RowTable(nn.Module):
    """Embedding bag over a table of rows: out_b = sum_l weights[b, l] * weight[ids[b, l]].

    ids_BL int32 in [0, num_rows), weights_BL float, result [B, D]. Rows start uniform with the table's standard
    deviation (for a plain table the reference's uniform(-1/sqrt(R), 1/sqrt(R)), facebookresearch/dlrm).
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        bound = math.sqrt(3) * table.start_std
        self.weight = nn.Parameter(torch.empty(table.num_rows, table.dim).uniform_(-bound, bound))
        self.row_sparse = False
        self.lookups: list[tuple[Tensor, Tensor]] = []

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        ids_N = ids_BL.reshape(-1)
        if self.row_sparse and self.training and torch.is_grad_enabled():
            rows_ND = self.weight.detach().index_select(0, ids_N).requires_grad_()
            self.lookups.append((ids_N, rows_ND))
        else:
            rows_ND = self.weight.index_select(0, ids_N)
        if ids_BL.shape[1] == 1:
            return rows_ND * weights_BL
        return (rows_ND.view(*ids_BL.shape, -1) * weights_BL.unsqueeze(-1)).sum(1)

    def extra_repr(self) -> str:
        return f"{self.table.name}, {self.table.num_rows} x {self.table.dim}"


def row_tables(model: nn.Module) -> list[RowTable]:
    """All exact tables inside a model, whatever plugins are around them."""
    return [module for module in model.modules() if isinstance(module, RowTable)]


def use_row_gradients(model: nn.Module) -> list[RowTable]:
    """Makes every exact table's rows a matter of the row optimizer; autograd no longer sees the tables."""
    tables = row_tables(model)
    for table in tables:
        table.row_sparse = True
        table.weight.requires_grad_(False)
    return tables
