"""Small arrays of a plugin's own, its dense parameters, that each lookup chooses rows of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlrm_xla.device import RowAccess
from dlrm_xla.one_hot import one_hot

# By the compiler's figures on v5e, 32,767 rows of 8: a product is faster by some 50 us of 2,048 ids, whose gather and
# scatter lay the codebook out anew, and slower by 670 of 32,768. Of 4,900 rows it is the faster of either.
_FEW_IDS = 4096


def most_rows(access: RowAccess, ids: int) -> int:
    """Up to how many rows a device multiplies a codebook that a step looks so many ids up in."""
    return access.codebook_rows * (2 if ids <= _FEW_IDS else 1)


def multiply_codebooks(model: nn.Module, rows: int) -> None:
    """Has all bags of a model multiply codebooks of up to so many rows."""
    for module in model.modules():
        if isinstance(module, CodebookBag):
            module.codebook_rows = rows


class CodebookBag(nn.Module):
    """A bag with codebooks, which a device may multiply rather than gather from.

    Those of up to ``codebook_rows`` rows are chosen from by a product with one-hot ids, whose gradient is the
    transposed product: no gather, and no scatter of equal ids. `multiply_codebooks` sets it; 0 is none.
    """

    codebook_rows = 0

    def chosen(self, codebook: Tensor, ids: Tensor) -> Tensor:
        """Rows [N, K] of a codebook [R, K] at ids int32 [N], or [P, N, K] of P codebooks [P, R, K] at [P, N].

        By a product a TPU rounds them to bfloat16, and in training their gradients, as it does all factors.
        """
        num_rows = codebook.shape[-2]
        if num_rows <= self.codebook_rows:
            return one_hot(ids, num_rows).to(codebook.dtype) @ codebook
        if codebook.dim() == 2:
            return codebook.index_select(0, ids)
        first_P1 = torch.arange(len(codebook), dtype=ids.dtype, device=ids.device).unsqueeze(1) * num_rows
        return codebook.flatten(0, 1).index_select(0, (ids + first_P1).flatten()).view(*ids.shape, -1)
