"""Quantized rows: trained in float32 as if they were stored in a few bits, and stored so."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlrm_xla.compression import set_table
from dlrm_xla.contract import ComposedBag, Computation, MakeBag, Table, Wanted
from dlrm_xla.rows import RowTable
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla_plugins.stored import StoredRows, pack, unpack


def int8(table: Table, inner: MakeBag) -> nn.Module:
    """Rows of 8-bit integers and a scale each, with quantization-aware training.

        e_i = s_i (q_i + 1/2),  q_i = floor(W[i] / s_i) in -2^(b-1) .. 2^(b-1) - 1,  s_i = max|W[i]| / (2^(b-1) - 1/2)

    Keeps num_rows x (dim b / 8 + 2) bytes: the scale is a float16. Levels lie symmetrically around zero, so that two
    bits have four. Training keeps W in float32 and takes the gradient of rounding as 1 (straight through).

    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    section 3; Guan et al. 2019, "Post-Training 4-bit Quantization on Embedding Tables", for a scale per row.
    """
    return _quantized(table, inner, 8)


def int4(table: Table, inner: MakeBag) -> nn.Module:
    """Rows of 4-bit integers and a scale each, with quantization-aware training; formula and sources as ``int8``.

    Keeps num_rows (ceil(dim / 2) + 2) bytes.
    """
    return _quantized(table, inner, 4)


def int2(table: Table, inner: MakeBag) -> nn.Module:
    """Rows of 2-bit integers and a scale each, with quantization-aware training; formula and sources as ``int8``.

    Keeps num_rows (ceil(dim / 4) + 2) bytes.
    """
    return _quantized(table, inner, 2)


def _quantized(table: Table, inner: MakeBag, bits: int) -> nn.Module:
    bag = inner(table)
    if not isinstance(bag, RowTable):
        raise ValueError(
            f"int{bits} stores rows, so nothing can stand behind it; write it last, as in hash_rows+int{bits}"
        )
    return QuantizedBag(bag, table, bits)


class QuantizedBag(ComposedBag):
    """Weighted sum of rows that are rounded to 2^bits levels; (ids_BL, weights_BL) -> out_BD."""

    def __init__(self, bag: RowTable, table: Table, bits: int) -> None:
        super().__init__()
        self.bag = bag
        self.table = table
        self.bits = bits

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        # A bag of one slot of weight 1 gives the row itself. Padded slots must not count as looked up, hence their 0.
        weights_N1 = weights_BL.reshape(-1, 1)
        real_N1 = (weights_N1 != 0).to(weights_BL.dtype)
        (rows_ND,) = yield [Wanted(self.bag, ids_BL.reshape(-1, 1), real_N1)]
        codes_ND, scales_N1 = quantize(rows_ND.detach(), self.bits)
        rounded_ND = rows_ND + (dequantize(codes_ND, scales_N1) - rows_ND).detach()
        return (rounded_ND * weights_N1).view(*ids_BL.shape, -1).sum(1)

    def set_table(self, rows: TrainedRows) -> None:
        """Rows at the levels of the best scale each; read again, such a row has that scale and these codes."""

        def at_levels(block: Tensor) -> Tensor:
            scales_N1 = search_scales(block, self.bits)
            return dequantize(quantize(block, self.bits, scales_N1)[0], scales_N1)

        set_table(self.bag, rows.map(at_levels, rows.dim))

    def bytes_to_serve(self) -> int:
        """Bytes of packed codes and scales."""
        return self.table.num_rows * (-(-self.table.dim * self.bits // 8) + 2)

    def served(self) -> nn.Module:
        """The rows as packed codes and scales."""
        return QuantizedRows(self)

    def extra_repr(self) -> str:
        return f"{self.table.name}, {self.bits} bits"


class QuantizedRows(StoredRows):
    """Rows as ``codes`` uint8 [R, ceil(D bits / 8)] and ``scales`` float16 [R, 1]."""

    codes: Tensor
    scales: Tensor

    def __init__(self, bag: QuantizedBag) -> None:
        super().__init__()
        self.dim, self.bits = bag.table.dim, bag.bits
        self.keep(bag.bag, self.dim, self._stored)

    def _stored(self, rows_ND: Tensor) -> dict[str, Tensor]:
        codes_ND, scales_N1 = quantize(rows_ND, self.bits)
        return {"codes": pack(codes_ND + 2 ** (self.bits - 1), self.bits), "scales": scales_N1}

    def read(self, ids_N: Tensor) -> Tensor:
        codes_ND = unpack(self.codes.index_select(0, ids_N), self.dim, self.bits) - 2 ** (self.bits - 1)
        return dequantize(codes_ND.float(), self.scales.index_select(0, ids_N))


def search_scales(rows_ND: Tensor, bits: int, steps: int = 24) -> Tensor:
    """float16 scales [N, 1] of least squared error among ``steps`` shares of the largest number's, evenly from 1 down.

    The last is (1 + 2 / steps) / 3, 0.36 of 24 steps.

    Clipping one large number may cost less than coarse levels for all others: the search of Guan et al. 2019,
    section 3 ("greedy search"), over a fixed grid.
    """
    half = 2 ** (bits - 1)
    whole_N1 = rows_ND.abs().amax(1, keepdim=True) / (half - 0.5)
    best_N1: Tensor = whole_N1.half()
    least_N1 = torch.full_like(whole_N1, torch.inf)
    for step in range(steps):
        scales_N1 = (whole_N1 * (1 - step * 2 / 3 / steps)).half()
        off = (dequantize(quantize(rows_ND, bits, scales_N1)[0], scales_N1) - rows_ND).square().sum(1, keepdim=True)
        better = off < least_N1
        best_N1, least_N1 = torch.where(better, scales_N1, best_N1), torch.where(better, off, least_N1)
    return best_N1


def quantize(rows_ND: Tensor, bits: int, scales_N1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Nearest of 2^bits levels: codes [N, D], whole numbers as float32 from -2^(bits-1), and float16 scales [N, 1].

    Scales are those that the largest number of each row asks for, unless given.
    """
    half = 2 ** (bits - 1)
    if scales_N1 is None:
        scales_N1 = (rows_ND.abs().amax(1, keepdim=True) / (half - 0.5)).half()
    # A row too small for float16 has the scale 0, and is 0.
    steps_N1 = torch.where(scales_N1 == 0, 1, scales_N1.float())
    return (rows_ND / steps_N1).floor().clamp(-half, half - 1), scales_N1


def dequantize(codes_ND: Tensor, scales_N1: Tensor) -> Tensor:
    """s (q + 1/2), float32 [N, D]."""
    return (codes_ND + 0.5) * scales_N1.float()
