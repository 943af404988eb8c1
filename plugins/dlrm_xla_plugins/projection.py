"""Random projections: narrow trained rows, widened by a fixed random matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from dlrm_xla.compression import set_table
from dlrm_xla.contract import ComposedBag, Computation, MakeBag, Table, Wanted, sized
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla_plugins.directions import top_directions


@sized("dim", lambda table: range(1, table.dim))
def random_projection(
    table: Table,
    inner: MakeBag,
    *,
    dim: int = 4,
    kind: Literal["gaussian", "sparse_sign", "very_sparse_sign"] = "gaussian",
) -> nn.Module:
    """Narrow rows times a fixed random matrix.

        e_i = S[i] P,   P [dim, D] fixed, E[P_jk] = 0, E[P_jk^2] = 1 / dim

    ``gaussian``: normal(0, 1/dim). ``sparse_sign``: s = ceil(dim / 3) entries of each column are +-1/sqrt(s), the
    others 0: a third is Achlioptas's density, and a fixed number per column leaves none empty (Kane & Nelson).
    ``very_sparse_sign``: s = ceil(dim / sqrt(D)), the density of Li, Hastie and Church.
    Keeps 4 dim (num_rows + D) bytes. Rows start with the exact table's standard deviation.

    Johnson & Lindenstrauss 1984; Achlioptas 2003, "Database-friendly random projections", theorem 1.1; Li, Hastie,
    Church 2006, "Very Sparse Random Projections", section 3; Kane & Nelson 2014, "Sparser Johnson-Lindenstrauss
    Transforms", section 1.
    """
    if not 1 <= dim < table.dim:
        raise ValueError(
            f"random_projection: dim is {dim}, but must be from 1 to {table.dim - 1}, below the table's {table.dim}"
        )
    narrow = replace(table, name=f"{table.name}.narrow", dim=dim, std=table.start_std)
    if kind == "gaussian":
        matrix = torch.empty(dim, table.dim).normal_(std=1 / math.sqrt(dim))
    else:
        nonzero = math.ceil(dim / (3 if kind == "sparse_sign" else math.sqrt(table.dim)))
        places = torch.rand(dim, table.dim).argsort(0)
        sign = torch.randint(0, 2, (dim, table.dim)) * 2.0 - 1
        matrix = sign * (places < nonzero) / math.sqrt(nonzero)
    return ProjectedBag(inner(narrow), matrix)


@sized("dim", lambda table: range(1, table.dim))
def srht(table: Table, inner: MakeBag, *, dim: int = 4) -> nn.Module:
    """Subsampled randomized Hadamard transform: narrow rows times a few orthogonal rows of random signs.

        e_i = S[i] P,   P [dim, D] = sqrt(1 / dim) R H F: F random signs, H a Hadamard matrix, R ``dim`` of its rows

    Where D is a power of two P's rows are orthogonal, so nothing of a narrow row is lost, where gaussian ones may
    nearly coincide. Of another D H is the next power's, cut to D columns: rows are then no longer orthogonal, and close
    to D some may depend on one another. Keeps 4 dim (num_rows + D) bytes. Rows start with the exact table's standard
    deviation.

    Ailon & Chazelle 2009, "The Fast Johnson-Lindenstrauss Transform"; Tropp 2011, "Improved Analysis of the Subsampled
    Randomized Hadamard Transform", section 1.
    """
    if not 1 <= dim < table.dim:
        raise ValueError(f"srht: dim is {dim}, but must be from 1 to {table.dim - 1}, below the table's {table.dim}")
    hadamard = torch.ones(1, 1)
    while len(hadamard) < table.dim:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    chosen = torch.rand(len(hadamard)).argsort()[:dim]
    signs = torch.randint(0, 2, (table.dim,)) * 2.0 - 1
    matrix = hadamard.index_select(0, chosen)[:, : table.dim] * signs / math.sqrt(dim)
    narrow = replace(table, name=f"{table.name}.narrow", dim=dim, std=table.start_std)
    return ProjectedBag(inner(narrow), matrix)


class ProjectedBag(ComposedBag):
    """out_BD = bag(ids, weights) P: the sum of a bag is projected once, which is the same by linearity.

    P [d, D] is trained where it is a parameter, and fixed where it is not. ``directions`` finds a trained one for a
    table that is taken over; the best there is, unless given.
    """

    matrix: Tensor

    def __init__(
        self, bag: nn.Module, matrix: Tensor, directions: Callable[[TrainedRows], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.bag = bag
        self.directions = directions or (lambda rows: top_directions(rows, len(matrix)))
        if isinstance(matrix, nn.Parameter):
            self.matrix = matrix
        else:
            self.register_buffer("matrix", matrix)

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        (narrow_BD,) = yield [Wanted(self.bag, ids_BL, weights_BL)]
        return narrow_BD @ self.matrix

    def set_table(self, rows: TrainedRows) -> None:
        """A trained P becomes what ``directions`` finds; narrow rows are those of least squares, W P^+.

        Rows are solved one by one, so with a fixed P their weights change nothing.
        """
        if isinstance(self.matrix, nn.Parameter):
            with torch.no_grad():
                self.matrix.copy_(self.directions(rows))
        back = torch.linalg.pinv(self.matrix.detach().double()).float()
        set_table(self.bag, rows.map(lambda block: block @ back, len(self.matrix)))
