"""How rows lie in an array: one to a line, or several where a device pads lines to its lanes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dlrm_xla.device import RowAccess

Placement = Literal["matmul", "dense", "sparse"]


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
