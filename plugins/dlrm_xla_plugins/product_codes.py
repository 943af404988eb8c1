"""Product quantization: parts of rows are one of a few centroids each, learned while the model trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlrm_xla.codebooks import CodebookBag
from dlrm_xla.compression import set_table
from dlrm_xla.contract import ComposedBag, Computation, MakeBag, Table, Wanted, sized
from dlrm_xla.rows import RowTable
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla_plugins.clusters import cluster
from dlrm_xla_plugins.stored import StoredRows, pack, unpack

_SAMPLE = 2**17


@sized("bits", lambda table: range(1, 9))
def pq(table: Table, inner: MakeBag, *, bits: int = 4, width: int = 2) -> nn.Module:
    """Product quantization with codes and centroids trained together.

        e_i = [C_1[q_1(i)], ..., C_p[q_p(i)]],  q_k(i) = argmin_j |W[i]_k - C_k[j]|,  p = ceil(dim / width) parts

    Keeps num_rows ceil(p bits / 8) bytes of codes and 4 2^bits p width of centroids. Training keeps W in float32; the
    gradient of e_i goes to the centroids chosen and, straight through, to W[i]. W and C start like the exact table.

    Jegou, Douze, Schmid 2011, "Product Quantization for Nearest Neighbor Search"; Chen, Li, Sun 2020, "Differentiable
    Product Quantization for End-to-End Embedding Compression", section 2.3.
    """
    if not 1 <= bits <= 8 or not 1 <= width <= table.dim:
        raise ValueError(f"pq: bits is {bits} and width {width}; bits from 1 to 8, width from 1 to {table.dim}")
    bag = inner(table)
    if not isinstance(bag, RowTable):
        raise ValueError("pq stores codes of rows, so nothing can stand behind it; write it last, as in hash_rows+pq")
    return ProductBag(bag, table, bits, width)


class ProductBag(ComposedBag, CodebookBag):
    """Weighted sum of rows put together from centroids; (ids_BL, weights_BL) -> out_BD."""

    def __init__(self, bag: RowTable, table: Table, bits: int, width: int) -> None:
        super().__init__()
        self.bag = bag
        self.table = table
        self.bits = bits
        self.width = width
        self.parts = -(-table.dim // width)
        self.centroids = nn.Parameter(torch.empty(self.parts, 2**bits, width).normal_(std=table.start_std))

    def compute(self, ids_BL: Tensor, weights_BL: Tensor) -> Computation:
        # A bag of one slot of weight 1 gives the row itself. Padded slots must not count as looked up, hence their 0.
        weights_N1 = weights_BL.reshape(-1, 1)
        (rows_ND,) = yield [Wanted(self.bag, ids_BL.reshape(-1, 1), (weights_N1 != 0).to(weights_BL.dtype))]
        chosen_ND = self._nearest(rows_ND.detach())
        # Worth the centroid; its gradient goes to the centroid and to the row.
        both_ND = chosen_ND + (rows_ND - rows_ND.detach())
        return (both_ND * weights_N1).view(*ids_BL.shape, -1).sum(1)

    def _nearest(self, rows_ND: Tensor) -> Tensor:
        chosen_PNW = self.chosen(self.centroids, self.codes(rows_ND))
        return chosen_PNW.transpose(0, 1).flatten(1)[:, : self.table.dim]

    def codes(self, rows_ND: Tensor) -> Tensor:
        """The nearest centroid of each part of rows, int32 [parts, N]."""
        padded = torch.nn.functional.pad(rows_ND, (0, self.parts * self.width - self.table.dim))
        rows_NPW = padded.view(-1, self.parts, self.width)
        fixed_PKW = self.centroids.detach()
        # |w - c|^2 less |w|^2, which is the same for all centroids.
        distance_PNK = fixed_PKW.square().sum(2).unsqueeze(1) - 2 * torch.bmm(
            rows_NPW.transpose(0, 1), fixed_PKW.transpose(1, 2)
        )
        return distance_PNK.argmin(2).to(torch.int32)

    def set_table(self, rows: TrainedRows) -> None:
        """Centroids by k-means of each part, on a sample where there are many rows; rows as they are."""
        sample_ND, weights_N = rows.sample(_SAMPLE)
        padded = torch.nn.functional.pad(sample_ND, (0, self.parts * self.width - self.table.dim))
        with torch.no_grad():
            for part, centroids_KW in zip(torch.split(padded, self.width, 1), self.centroids, strict=True):
                found = cluster(part.contiguous(), weights_N, len(centroids_KW))
                centroids_KW[: len(found)] = found
                centroids_KW[len(found) :] = found[0]
        set_table(self.bag, rows)

    def bytes_to_serve(self) -> int:
        """Bytes of packed codes and of centroids."""
        return self.table.num_rows * -(-self.parts * self.bits // 8) + self.centroids.numel() * 4

    def served(self) -> nn.Module:
        """The rows as packed codes, and the centroids."""
        return CodedRows(self)

    def extra_repr(self) -> str:
        return f"{self.table.name}, {self.parts} codes of {self.bits} bits"


class CodedRows(StoredRows):
    """Rows as ``codes`` uint8 [R, ceil(parts bits / 8)] of ``centroids`` [parts, 2^bits, width]."""

    codes: Tensor
    centroids: Tensor

    def __init__(self, bag: ProductBag) -> None:
        super().__init__()
        self.dim, self.bits = bag.table.dim, bag.bits
        distances = bag.centroids.shape[0] * bag.centroids.shape[1]
        self.keep(bag.bag, distances, lambda rows_ND: {"codes": pack(bag.codes(rows_ND).t(), bag.bits)})
        self.register_buffer("centroids", bag.centroids.detach())

    def read(self, ids_N: Tensor) -> Tensor:
        num_parts, num_codes, width = self.centroids.shape
        codes_NP = unpack(self.codes.index_select(0, ids_N), num_parts, self.bits)
        first_P = torch.arange(num_parts, dtype=torch.int32, device=ids_N.device) * num_codes
        rows_NPW = self.centroids.view(-1, width).index_select(0, (codes_NP + first_P).flatten())
        return rows_NPW.view(ids_N.shape[0], -1)[:, : self.dim]
