"""The directions that keep most of a table's rows: all of them found, or as good as found by a few random ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlrm_xla.trained_rows import TrainedRows

_HOST = torch.device("cpu")


def top_directions(rows: TrainedRows, rank: int, device: torch.device = _HOST) -> Tensor:
    """The ``rank`` leading right singular vectors [rank, D] of W: no others lose less of W when rows are projected.

        W^T diag(w) W = V diag(sigma^2) V^T,   error^2 = sum of sigma_j^2, j > rank

    One pass over the rows, D^2 numbers of memory, 2 R D^2 flops in float64, on ``device``. Eckart & Young 1936.
    """
    return _leading(gram(rows, device), rank)


def gram(rows: TrainedRows, device: torch.device = _HOST) -> Tensor:
    """W^T diag(w) W, float64 [D, D] on the host."""
    total = torch.zeros(rows.dim, rows.dim, dtype=torch.float64)
    for start, block in rows.blocks():
        scaled = (block.double() * rows.weights(start, len(block)).double().sqrt().unsqueeze(1)).to(device)
        total += (scaled.t() @ scaled).cpu()
    return total


def random_directions(
    rows: TrainedRows,
    rank: int,
    power: int = 2,
    oversampling: int = 8,
    seed: int = 0,
    device: torch.device = _HOST,
) -> Tensor:
    """Nearly the ``rank`` leading directions [rank, D], by subspace iteration from l = rank + oversampling random ones.

        Y = W^T (W X), ``power`` + 1 times from a random X [D, l], orthonormal after each;  then the rank best of span Y

    Each pass takes 4 R D l flops in float32 and D l numbers of memory: less than ``top_directions`` where
    (2 power + 3) l < D. What W loses by projection on Y, expected, is at most

        Frobenius:  sqrt(1 + rank / (p - 1)) of the least, p = oversampling, whatever ``power``
        spectral:   (1 + sqrt(rank / (p - 1)) + e sqrt(l) / p sqrt(D - rank))^(1 / (2 power + 1)) sigma_(rank + 1)

    Halko, Martinsson, Tropp 2011, "Finding Structure with Randomness", algorithm 4.4, theorem 10.5, corollary 10.10.
    """
    width = min(rank + oversampling, rows.dim)
    basis = torch.randn(rows.dim, width, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(basis).Q
    for _ in range(power + 1):
        total = torch.zeros(rows.dim, width, dtype=torch.float64)
        there = basis.to(device)
        for start, block in rows.blocks():
            block, weights = block.to(device), rows.weights(start, len(block)).to(device)
            total += (block.t() @ ((block @ there) * weights.unsqueeze(1))).cpu()
        basis = torch.linalg.qr(total).Q.float()
    there = basis.to(device)
    small = gram(rows.map(lambda block: (block.to(device) @ there).cpu(), width))
    found: Tensor = _leading(small, rank) @ basis.t()
    return found


def error_factor(rank: int, oversampling: int) -> float:
    """Bound of the expected Frobenius error over the best, without power iterations (theorem 10.5 there)."""
    return math.sqrt(1 + rank / (oversampling - 1)) if oversampling > 1 else math.inf


def _leading(square: Tensor, rank: int) -> Tensor:
    _, vectors = torch.linalg.eigh(square)  # by rising eigenvalue
    leading: Tensor = vectors[:, -rank:].flip(1).t().float().contiguous()
    return leading
