"""The exact table: the innermost bag, which every plugin ends at, and the arrays that hold many tables' rows.

A step must cost what it touches, not what the tables hold. So in training the gathered rows, not the array,
are the leaf of autograd; `dlrm_xla.row_optim` then updates exactly those rows in place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlrm_xla.contract import Table
from dlrm_xla.device import Device, RowAccess
from dlrm_xla.fbgemm_rows import FbgemmRows
from dlrm_xla.host import on_host
from dlrm_xla.lookup import Lookup, bag_ends, bag_starts, pool
from dlrm_xla.one_hot import one_hot_product
from dlrm_xla.row_files import RowFiles
from dlrm_xla.row_lines import Placement, lines_of, rows_of, write_rows
from dlrm_xla.trained_rows import TrainedRows

# Initial values are drawn in parts, so that a table on disk never is in memory whole.
_INITIAL_ROWS = 2**18


class RowTable(nn.Module):
    """Embedding bag over a table of rows: out_b = sum_l weights[b, l] * weight[ids[b, l]].

    ids_BL int32 in [0, num_rows), weights_BL float, result [B, D]. Rows start uniform with the table's standard
    deviation (for a plain table the reference's uniform(-1/sqrt(R), 1/sqrt(R)), facebookresearch/dlrm).

    Made alone it holds ``weight`` [R, D] and is a module like any other. Once a `RowStack` took its rows, ``weight``
    is None and ``home`` says where they are.
    """

    weight: nn.Parameter | None

    def __init__(self, table: Table, dtype: torch.dtype = torch.float32, files: RowFiles | None = None) -> None:
        super().__init__()
        self.table = table
        self.file_backed = files is not None and files.takes(table, dtype)
        shape = (table.num_rows, table.dim)
        weight = (
            files.create(table.name, shape, dtype) if files and self.file_backed else torch.empty(shape, dtype=dtype)
        )
        for part, values in zip(torch.split(weight, _INITIAL_ROWS), initial_rows(table), strict=True):
            part.copy_(values)
        self.weight = nn.Parameter(weight)
        self.home: Home | None = None

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        if self.home is not None:
            stack, base = self.home
            bags_B1D = stack.look_up(ids_BL + base, weights_BL, [ids_BL.shape[1]], [self.table.name], self.training)
            return bags_B1D.squeeze(1)  # of an index, the gradient would be zeros that it is copied into
        assert self.weight is not None
        return pool(self.weight.index_select(0, ids_BL.reshape(-1)), weights_BL, [ids_BL.shape[1]])[:, 0]

    def set_table(self, rows: TrainedRows) -> None:
        """Takes over the rows as they are."""
        assert self.weight is not None, "rows that a stack has taken are not set one by one"
        with torch.no_grad():
            for start, block in rows.blocks():
                self.weight[start : start + len(block)] = block

    def extra_repr(self) -> str:
        return f"{self.table.name}, {self.table.num_rows} x {self.table.dim}"


def initial_rows(table: Table) -> Iterator[Tensor]:
    """What a table starts with, in parts, drawn from torch's generator."""
    bound = math.sqrt(3) * table.start_std
    for first in range(0, table.num_rows, _INITIAL_ROWS):
        yield torch.empty(min(_INITIAL_ROWS, table.num_rows - first), table.dim).uniform_(-bound, bound)


class Home(NamedTuple):
    """Where a table's rows are: row 0 is row ``base`` of the stack. A tuple, so that no table owns the stack."""

    stack: RowStack
    base: int


class RowStack(nn.Module):
    """Rows of several tables of one width in one array.

    ``rows`` is [ceil(R / pack), width]: row r lies in line r // pack, from column (r mod pack) dim on. A TPU pads the
    last dimension to 128 lanes, so there narrow rows are packed several to a line, and what they leave of its lanes
    stays zero; elsewhere ``pack`` is 1 and the width dim.

    ``placement`` says how rows are read and how gradients of equal ids are added up:

        sparse   gather; sort and segment sum over the ids looked up       cost: ids looked up
        dense    gather; sum into a gradient of all rows                   cost: rows
        matmul   one-hot times rows, and its transpose times gradients     cost: rows x ids, on the matrix unit

    ``near``: so small that memory near the processor holds it whole (`dlrm_xla.device.RowAccess.near_bytes`).
    """

    rows: Tensor

    def __init__(
        self, tables: Sequence[RowTable], device: Device, placement: Placement = "sparse", near: bool = False
    ) -> None:
        super().__init__()
        widths = {t.table.dim for t in tables}
        if len(widths) != 1:
            raise ValueError(f"a stack has rows of one width, but these tables have {sorted(widths)}")
        self.dim = widths.pop()
        self.device = device
        self.placement = placement
        self.near = near
        self.tables = [t.table for t in tables]
        self.num_rows = sum(t.num_rows for t in self.tables)
        lines, width = lines_of(self.num_rows, self.dim, device.rows, placement)
        self.pack = width // self.dim
        self.lookups: list[Lookup] = []
        self.fbgemm: FbgemmRows | None = None
        ends = list(itertools.accumulate(t.num_rows for t in self.tables))
        self.bases = [0, *ends[:-1]]
        self.file_backed = any(t.file_backed for t in tables)
        first = tables[0].weight
        assert first is not None, f"{tables[0].table.name} is in a stack already"
        if len(tables) == 1 and first.shape == (lines, width):
            array = first.detach()  # as it is, for it may be a file
        else:
            assert not self.file_backed, "a file is a stack of its own"
            array = torch.zeros(lines, width, dtype=first.dtype, device=first.device)
        for member, base in zip(tables, self.bases, strict=True):
            assert member.weight is not None, f"{member.table.name} is in a stack already"
            if array.data_ptr() != member.weight.data_ptr():
                write_rows(array, base, member.weight.detach())
            # Given back one by one: the peak is the largest table above the stack, not twice the stack.
            member.weight = None
            member.home = Home(self, base)
            # On the device too: made in a step, it would be one more input of the second trace of it.
            member.register_buffer("base", torch.tensor([base], dtype=torch.int32), persistent=False)
        self.register_buffer("rows", array)
        self.in_one_pass = placement == "sparse" and device.rows.update_rows is not None
        if self.in_one_pass:
            self.register_buffer("ends", torch.tensor(ends, dtype=torch.int32), persistent=False)

    def look_up(
        self, ids_BS: Tensor, weights_BS: Tensor, lengths: Sequence[int], names: Sequence[str], training: bool
    ) -> Tensor:
        """Bags over the stack's own ids: [B, S] twice -> [B, F, D], ``lengths`` and ``names`` of F bags side by side.

        In training the result is, or comes from, a leaf that the optimizer finds in ``lookups``.
        """
        if not (training and torch.is_grad_enabled()):
            return self.bags(ids_BS, weights_BS, lengths)
        pooled = not weights_BS.requires_grad
        sums = None
        with torch.no_grad():
            if self.fbgemm is not None and pooled and bool((weights_BS == 1).all()):
                sums = self.fbgemm.look_up(ids_BS.reshape(-1), bag_ends(len(ids_BS), tuple(lengths), ids_BS.device))
                leaf = sums.detach()
            else:
                leaf = self.bags(ids_BS, weights_BS, lengths) if pooled else self.read(ids_BS.reshape(-1))
        leaf = leaf.view(len(ids_BS), len(lengths) if pooled else ids_BS.shape[1], self.dim).requires_grad_()
        self.lookups.append(Lookup(ids_BS, weights_BS.detach(), leaf, pooled, lengths, names, sums))
        return leaf if pooled else pool(leaf, weights_BS, lengths)

    def bags(self, ids_BS: Tensor, weights_BS: Tensor, lengths: Sequence[int]) -> Tensor:
        """Weighted sums of rows, [B, F, D]."""
        sum_rows = self.device.rows.sum_rows
        if self.placement == "sparse" and self.device.rows.num_chips > 1:
            # Pooled where the rows are, for there are fewer bags than ids to add up over chips.
            return self.device.rows.summed(partial(self._pooled, lengths), self.rows, ids_BS, weights_BS)
        if sum_rows is None or self.placement == "matmul" or self.rows.dtype != torch.float32:
            return pool(self.read(ids_BS.reshape(-1)), weights_BS, lengths)
        starts_G = bag_starts(len(ids_BS), tuple(lengths), ids_BS.device)
        sums_GD = sum_rows(self.rows, ids_BS.reshape(-1), starts_G, weights_BS.reshape(-1))
        return sums_GD.view(len(ids_BS), len(lengths), self.dim)

    def read(self, ids_N: Tensor) -> Tensor:
        """Rows of the stack's own ids, float32 [N, D]."""
        if self.placement == "matmul":
            rows_ND = one_hot_product(ids_N, self.rows.float(), self.device)
        elif self.placement == "sparse":
            rows_ND = self.device.rows.summed(self._gathered, self.rows, ids_N)
        else:
            rows_ND = self.device.rows.gather(self.rows, ids_N, self.dim)
        return rows_ND.float()

    def bad_tables(self, row: Tensor) -> Tensor:
        """For each table a number that is not finite where this row [1] is one of its, else 0."""
        ends_T = self.get_buffer("ends")
        starts_T = torch.nn.functional.pad(ends_T[:-1], (1, 0))
        return torch.where((starts_T <= row) & (row < ends_T), math.inf, 0.0)

    def _gathered(self, access: RowAccess, rows: Tensor, ids_N: Tensor) -> Tensor:
        return access.gather(rows, ids_N, self.dim)

    def _pooled(
        self, lengths: Sequence[int], access: RowAccess, rows: Tensor, ids_BS: Tensor, weights_BS: Tensor
    ) -> Tensor:
        return pool(access.gather(rows, ids_BS.reshape(-1), self.dim).float(), weights_BS, lengths)

    @property
    def end(self) -> int:
        """The first id past the array: of padding, where it must not count as an id that was looked up."""
        return self.rows.shape[0] * self.pack

    def tables_on_host(self) -> Iterator[Tensor]:
        """Each table's rows [R, D], on the CPU."""
        array = self.rows if on_host(self.rows) else torch.cat(list(self.device.host_parts(self.rows)))
        for table, base in zip(self.tables, self.bases, strict=True):
            first, end = base // self.pack, -(-(base + table.num_rows) // self.pack)
            yield rows_of(array[first:end], self.dim)[base - first * self.pack :][: table.num_rows]

    def extra_repr(self) -> str:
        return f"{len(self.tables)} tables, {self.num_rows} x {self.dim}, {self.placement}, {self.pack} rows a line"
