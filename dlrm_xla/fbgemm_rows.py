"""Rows looked up and updated by FBGEMM's table-batched embedding where it is installed: our arrays, its kernels."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from dlrm_xla.host import on_host

OPTIMIZERS = ("sgd", "adagrad")
# In fbgemm-gpu-cpu 1.4.2 row-wise Adagrad counts the bytes before a row in 32 bits: beyond them it updates one of the
# table's first rows instead. SGD and Adagrad per element find every row.
_ADAGRAD_BYTES = 2**32


def installed() -> bool:
    """Whether FBGEMM is there to be imported."""
    return importlib.util.find_spec("fbgemm_gpu") is not None


def finds_rows(num_bytes: int, optimizer: str) -> bool:
    """Whether its kernels for the CPU update the right rows of a float32 table of so many bytes."""
    return optimizer != "adagrad" or num_bytes <= _ADAGRAD_BYTES


class FbgemmRows:
    """FBGEMM's bag over an array of rows [R, D] and the optimizer's state, neither of them copied.

    Its forward keeps a graph whose backward is the exact update: gradients of equal ids are summed first. A stack is
    one table to it, and a step's bags are one batch, so ids need no other order. Only sums without weights: its
    backward of weighted ones takes twice as long, for it makes gradients of the weights too.

    Mudigere et al. 2022, "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation
    Models", has the operator.
    """

    def __init__(self, rows: Tensor, states: list[Tensor], optimizer: str, eps: float, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of parts of itself that it leaves out
            from fbgemm_gpu.split_embedding_configs import EmbOptimType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                ComputeDevice,
                EmbeddingLocation,
                SplitTableBatchedEmbeddingBagsCodegen,
            )
        kind = {"sgd": EmbOptimType.EXACT_SGD, "adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}[optimizer]
        # Its own arrays are zeros that no one touches, so they never take memory; ours replace them.
        self._bags: Any = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows.shape[0], rows.shape[1], EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=kind,
            eps=eps,
            bounds_check_mode=BoundsCheckMode.NONE,  # ids are checked before they come here
        )
        self._bags.weights_host = torch.nn.Parameter(rows.view(-1))
        if states:
            self._bags.momentum1_host = torch.nn.Parameter(states[0], requires_grad=False)

    @staticmethod
    def takes(rows: Tensor, optimizer: str, weight_decay: float) -> bool:
        """Whether it has kernels for this: float32 on the CPU, widths in fours, SGD or Adagrad by row, no decay.

        Adagrad up to 4 GiB of rows, see `finds_rows`.
        """
        plain = rows.dtype == torch.float32 and on_host(rows) and rows.shape[1] % 4 == 0
        plain = plain and finds_rows(rows.shape[0] * rows.shape[1] * 4, optimizer)
        return plain and optimizer in OPTIMIZERS and not weight_decay

    def look_up(self, ids_N: Tensor, ends_G: Tensor) -> Tensor:
        """Sums [G, D] of the rows of each bag, with the graph that ``update`` needs; ends_G [G + 1] from 0.

        The graph takes along the ``learning_rate`` of now: set later, it would count from the next lookup on.
        """
        self._bags.set_learning_rate(self.learning_rate)
        with torch.enable_grad():  # type: ignore[no-untyped-call]
            out: Tensor = self._bags(ids_N, ends_G)
        return out

    def update(self, out_GD: Tensor, grads_GD: Tensor) -> None:
        """Updates the rows that a lookup read by the gradients of its sums, at the lookup's learning rate."""
        torch.autograd.backward(out_GD, grads_GD)
