"""Rows as they are stored to serve: codes packed in bytes, few numbers of a row; looked up without being trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dlrm_xla.rows import RowTable

# Rows are packed in parts that make so many numbers on the way, so that a large table takes little more memory.
_PART_NUMBERS = 2**22


class StoredRows(nn.Module):
    """Weighted sum of stored rows; (ids_BL, weights_BL) -> out_BD."""

    def keep(self, table: RowTable, numbers: int, store: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        """Has as buffers what ``store`` makes of a table's float32 rows, a row of each for every row.

        ``numbers`` is how many a row makes on its way: so many rows are stored at a time that these stay few.
        """
        weight_RD = table.weight
        assert weight_RD is not None, "rows that a stack has taken are not stored"
        first = 0
        for part in torch.split(weight_RD.detach(), max(1, _PART_NUMBERS // numbers)):
            for name, values in store(part.float()).items():
                # Made once, for many small results between large ones keep an allocator from using their places again.
                if first == 0:
                    self.register_buffer(name, values.new_empty(len(weight_RD), *values.shape[1:]))
                self.get_buffer(name)[first : first + len(part)] = values
            first += len(part)

    def read(self, ids_N: Tensor) -> Tensor:
        """Rows float32 [N, D]."""
        raise NotImplementedError

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        rows_ND = self.read(ids_BL.reshape(-1))
        return (rows_ND * weights_BL.reshape(-1, 1)).view(*ids_BL.shape, -1).sum(1)


def pack(codes_NK: Tensor, bits: int) -> Tensor:
    """Codes from 0 to 2^bits - 1 side by side, the first in the lowest bits: [N, K] -> uint8 [N, ceil(K bits / 8)]."""
    if 8 % bits == 0:  # each code lies in one byte
        per_byte = 8 // bits
        places = torch.arange(per_byte, dtype=torch.int32, device=codes_NK.device) * bits
        padded = torch.nn.functional.pad(codes_NK.to(torch.int32), (0, -codes_NK.shape[1] % per_byte))
        bytes_NC: Tensor = (padded.view(len(padded), -1, per_byte) << places).sum(2, dtype=torch.int32)
        return bytes_NC.to(torch.uint8)
    bits_NB = _bits(codes_NK, bits)
    bits_NB = torch.nn.functional.pad(bits_NB, (0, -bits_NB.shape[1] % 8))
    return _numbers(bits_NB, 8).to(torch.uint8)


def unpack(bytes_NC: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` codes [N, count], int32, of each row that ``pack`` was given."""
    if 8 % bits == 0:  # each code lies in one byte
        places = torch.arange(8 // bits, dtype=torch.int32, device=bytes_NC.device) * bits
        codes_NCK = (bytes_NC.to(torch.int32).unsqueeze(2) >> places) & (2**bits - 1)
        codes_NK: Tensor = codes_NCK.flatten(1)[:, :count]
        return codes_NK
    return _numbers(_bits(bytes_NC, 8)[:, : count * bits], bits)


def _bits(numbers_NK: Tensor, bits: int) -> Tensor:
    places = torch.arange(bits, dtype=torch.int32, device=numbers_NK.device)
    return ((numbers_NK.to(torch.int32).unsqueeze(2) >> places) & 1).flatten(1)


def _numbers(bits_NB: Tensor, bits: int) -> Tensor:
    places = torch.arange(bits, dtype=torch.int32, device=bits_NB.device)
    numbers_NK: Tensor = (bits_NB.view(bits_NB.shape[0], -1, bits) << places).sum(2, dtype=torch.int32)
    return numbers_NK
