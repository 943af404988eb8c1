"""The exact table: the innermost bag, which every plugin ends at, and the arrays that hold many tables' rows.

A step must cost what it touches, not what the tables hold. So in training the gathered rows, not the array,
are the leaf of autograd; `dlrm_xla.row_optim` then updates exactly those rows in place.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dlrm_xla.contract import Table
from dlrm_xla.devices import Device, RowAccess
from dlrm_xla.errors import UserError
from dlrm_xla.fbgemm_rows import FbgemmRows
from dlrm_xla.trained_rows import TrainedRows

Placement = Literal["matmul", "dense", "sparse"]
# Initial values are drawn in parts, so that a table on disk never is in memory whole.
_INITIAL_ROWS = 2**18
# What a table takes from which on it is worth a file of its own.
LEAST_FILE_BYTES = 2**26


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


class RowFiles:
    """Files of a folder as arrays: what is read comes from disk, what is written goes there, memory is a cache."""

    def __init__(self, folder: Path, least_bytes: int = LEAST_FILE_BYTES) -> None:
        self.folder = folder
        self.least_bytes = least_bytes
        self._count = 0
        try:
            if folder.exists() and any(folder.iterdir()):
                raise UserError(f"row_files: {folder} is not empty; name a new folder, or empty it")
        except OSError as error:
            raise UserError(f"row_files: cannot use {folder}: {error.strerror}") from error

    def takes(self, table: Table, dtype: torch.dtype) -> bool:
        """Whether a table is large enough to be a file."""
        return table.num_rows * table.dim * dtype.itemsize >= self.least_bytes

    def create(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new file of zeros as an array, its blocks reserved; a UserError if the disk has no room."""
        if torch.get_default_device().type == "meta":  # a plan, which must leave nothing behind
            return torch.empty(shape, dtype=dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._count}.{name}.{str(dtype).removeprefix('torch.')}"
        self._count += 1
        numbers = math.prod(shape)
        free = shutil.disk_usage(self.folder).free
        try:
            # A file with holes would end the process at the first row that finds no room.
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, numbers * dtype.itemsize)
        except OSError as error:
            path.unlink(missing_ok=True)
            need = numbers * dtype.itemsize
            raise UserError(
                f"row_files: {path} needs {need / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB ({error.strerror})"
            ) from error
        return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(shape)


class Home(NamedTuple):
    """Where a table's rows are: row 0 is row ``base`` of the stack. A tuple, so that no table owns the stack."""

    stack: RowStack
    base: int


class Lookup(NamedTuple):
    """What one lookup of a step leaves for the optimizer.

    ``leaf`` is the leaf of autograd: the ``pooled`` bags [B, F, D], or, where a plugin's weights want gradients
    themselves, the gathered rows [B, S, D]. ``sums`` is what the leaf was made of where FBGEMM looked up.
    """

    ids_BS: Tensor
    weights_BS: Tensor
    leaf: Tensor
    pooled: bool
    lengths: Sequence[int]
    names: Sequence[str]
    sums: Tensor | None = None

    def gradient(self) -> Tensor:
        """The leaf's gradient."""
        assert self.leaf.grad is not None
        return self.leaf.grad

    def gradients(self, factor: float = 1.0) -> Tensor:
        """Gradient of each slot's row times a factor, [B S, D]."""
        grad = self.gradient()
        if not self.pooled:
            return self.spread(self.weights_BS, grad * factor)
        weights_BS = self.weights_BS * factor
        if len(set(self.lengths)) > 1:
            return self.spread(weights_BS, grad)
        # In one pass, which a TPU lays out worse than the passes of `spread`: 51,000 cycles of 444,485 on v5e.
        return (grad.unsqueeze(2) * weights_BS.view(*grad.shape[:2], -1, 1)).view(-1, grad.shape[2])

    def spread(self, weights_BS: Tensor, grad: Tensor) -> Tensor:
        """The leaf's gradient by slot, [B S, D]."""
        if self.pooled:
            if len(self.lengths) != self.ids_BS.shape[1]:
                runs = equal_runs(self.lengths)
                parts = torch.split(grad, [count for _, count in runs], 1)
                slots = [
                    part.unsqueeze(2).expand(-1, -1, length, -1).flatten(1, 2)
                    for part, (length, _) in zip(parts, runs, strict=True)
                ]
                grad = slots[0] if len(slots) == 1 else torch.cat(slots, 1)
            grad = grad * weights_BS.unsqueeze(2)
        return grad.reshape(-1, grad.shape[2])

    def bag_gradients(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the bags [B F, D], each slot's bag, and its weight; None where each slot is a bag by itself."""
        assert self.leaf.grad is not None
        grads_GD = self.leaf.grad.flatten(0, 1)
        if not self.pooled:
            return grads_GD, None, None
        single = len(self.lengths) == self.ids_BS.shape[1]
        slots = None if single else bag_of_slot(len(self.ids_BS), tuple(self.lengths), self.ids_BS.device)
        return grads_GD, slots, self.weights_BS.reshape(-1)

    @property
    def bag_length(self) -> int:
        """How many slots each of the bags has; 0 where they differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else 0

    def gradient_sums(self) -> Tensor:
        """One number per name, not finite where any gradient of that bag is not."""
        assert self.leaf.grad is not None
        # Over samples first: five times faster on a CPU than over samples and columns at once.
        sums = self.leaf.grad.flatten(1).sum(0).view(self.leaf.shape[1], -1).sum(1)
        if len(sums) == len(self.names):
            return sums
        if self.bag_length:
            return sums.view(len(self.names), -1).sum(1)
        return torch.stack([part.sum() for part in torch.split(sums, list(self.lengths))])


def pool(rows_ND: Tensor, weights_BS: Tensor, lengths: Sequence[int]) -> Tensor:
    """Weighted sum of each bag's rows: [B S, D], [B, S] -> [B, F, D], bag f of ``lengths[f]`` slots."""
    rows_BSD = rows_ND.view(*weights_BS.shape, -1) * weights_BS.unsqueeze(2)
    if len(lengths) == weights_BS.shape[1]:
        return rows_BSD
    runs = equal_runs(lengths)
    parts = torch.split(rows_BSD, [length * count for length, count in runs], 1)
    pooled = [
        part if length == 1 else part.reshape(-1, count, length, part.shape[2]).sum(2)
        for part, (length, count) in zip(parts, runs, strict=True)
    ]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)


def equal_runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours of one length as (length, how many)."""
    return [(length, len(list(run))) for length, run in itertools.groupby(lengths)]


class RowStack(nn.Module):
    """Rows of several tables of one width in one array.

    ``rows`` is [ceil(R / pack), width]: row r lies in line r // pack, from column (r mod pack) dim on. A TPU pads the
    last dimension to 128 lanes, so there narrow rows are packed several to a line, and what they leave of its lanes
    stays zero; elsewhere ``pack`` is 1 and the width dim.

    ``placement`` says how rows are read and how gradients of equal ids are added up:

        sparse   gather; sort and segment sum over the ids looked up       cost: ids looked up
        dense    gather; sum into a gradient of all rows                   cost: rows
        matmul   one-hot times rows, and its transpose times gradients     cost: rows x ids, on the matrix unit

    ``near``: so small that memory near the processor holds it whole (`dlrm_xla.devices.RowAccess.near_bytes`).
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
                sums = self.fbgemm.look_up(ids_BS.reshape(-1), _bag_ends(len(ids_BS), tuple(lengths), ids_BS.device))
                leaf = sums.detach()
            else:
                leaf = self.bags(ids_BS, weights_BS, lengths) if pooled else self.read(ids_BS.reshape(-1))
        leaf = leaf.view(len(ids_BS), -1, self.dim).requires_grad_()
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
        return sum_rows(self.rows, ids_BS.reshape(-1), starts_G, weights_BS.reshape(-1)).view(len(ids_BS), -1, self.dim)

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
        here = self.rows.device.type == "cpu"
        array = self.rows if here else torch.cat(list(self.device.host_parts(self.rows)))
        for table, base in zip(self.tables, self.bases, strict=True):
            first, end = base // self.pack, -(-(base + table.num_rows) // self.pack)
            yield rows_of(array[first:end], self.dim)[base - first * self.pack :][: table.num_rows]

    def extra_repr(self) -> str:
        return f"{len(self.tables)} tables, {self.num_rows} x {self.dim}, {self.placement}, {self.pack} rows a line"


def lines_of(num_rows: int, dim: int, access: RowAccess, placement: Placement) -> tuple[int, int]:
    """Shape of the array that holds rows: as many rows to a line as fit the lanes, where they are sparse."""
    if placement != "sparse":
        return num_rows, dim
    pack = max(1, access.lanes // dim)
    lines = -(-num_rows // pack)
    # All lanes, for of a narrower array a TPU would make rows of its columns where that takes less, and then copy it
    # whole into lines of rows, and back, at every step.
    width = -(-pack * dim // access.lanes) * access.lanes if access.lanes else dim
    return -(-lines // access.num_chips) * access.num_chips, width


def rows_of(lines_LW: Tensor, dim: int) -> Tensor:
    """The rows [L pack, dim] of lines, without what is beside them; a view where nothing is."""
    return lines_LW[:, : lines_LW.shape[1] // dim * dim].reshape(-1, dim)


def write_rows(lines_LW: Tensor, first: int, values_RD: Tensor) -> None:
    """Writes rows into lines from row ``first`` on: what fills the first line, whole lines, and what is left."""
    dim = values_RD.shape[1]
    pack = lines_LW.shape[1] // dim
    lines_LPD = lines_LW[:, : pack * dim].view(-1, pack, dim)
    line, place = divmod(first, pack)
    if place:
        begun = min(pack - place, len(values_RD))
        lines_LPD[line, place : place + begun] = values_RD[:begun]
        line, values_RD = line + 1, values_RD[begun:]
    whole, left = divmod(len(values_RD), pack)
    lines_LPD[line : line + whole] = values_RD[: whole * pack].reshape(whole, pack, dim)
    if left:
        lines_LPD[line + whole, :left] = values_RD[whole * pack :]


# Kept for good, as the two below: a recorded step reads them where they were.
@functools.cache
def bag_starts(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each bag starts among B S slots of bags that lie side by side, int32 [B F]."""
    within = [0, *itertools.accumulate(lengths)][:-1]
    starts = torch.arange(batch).unsqueeze(1) * sum(lengths) + torch.tensor(within)
    return starts.flatten().int().to(device)


@functools.cache
def _bag_ends(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    slots = torch.tensor([batch * sum(lengths)], dtype=torch.int32, device=device)
    return torch.cat([bag_starts(batch, lengths, device), slots])


@functools.cache
def bag_of_slot(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The bag of each slot, int32 [B S]."""
    bags = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return (torch.arange(batch).unsqueeze(1) * len(lengths) + bags).flatten().int().to(device)


def one_hot_product(ids_N: Tensor, rows_RD: Tensor, device: Device) -> Tensor:
    """Rows by a matrix product with one-hot ids: exact, for each result is one number times 1."""
    hot_NR = one_hot(ids_N, len(rows_RD))
    return (
        torch.cat([hot_NR @ part for part in matmul_parts(rows_RD, device)], 1)
        .view(len(ids_N), -1, rows_RD.shape[1])
        .sum(1)
    )


def one_hot(ids_N: Tensor, num_rows: int) -> Tensor:
    """[N, R] float32 with a 1 at each id; -1 is none. More dimensions in front stay."""
    return (ids_N.unsqueeze(-1) == torch.arange(num_rows, dtype=ids_N.dtype, device=ids_N.device)).float()


def matmul_parts(values: Tensor, device: Device) -> list[Tensor]:
    """Summands whose products with 0 and 1 lose nothing on the device's matrix unit.

    A TPU rounds float32 factors to bfloat16, 8 bits of 24. Cut by masks into three such parts, a number survives;
    a conversion to bfloat16 and back would be optimised away.
    """
    if not device.rows.rounds_matmul:
        return [values]
    parts = []
    for _ in range(2):
        head = device.rows.bits(device.rows.bits(values, torch.int32) & -65536, torch.float32)
        parts.append(head)
        values = values - head
    return [*parts, values]
