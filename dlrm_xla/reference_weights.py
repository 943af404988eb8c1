"""Trained weights of the facebookresearch/dlrm script, in and out.

That script's ``DLRM_Net`` names embedding tables ``emb_l.N.weight``, the layers of its MLPs ``bot_l.N.weight``,
``bot_l.N.bias`` and ``top_l.N...``, N counting activations too (dlrm_s_pytorch.py, ``create_emb``, ``create_mlp``), and
saves them under "state_dict" with torch.save. Ids keep their rows: to score with imported weights, rows must have the
ids that the script gave them.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlrm_xla.errors import UserError

_NAMES = (
    (re.compile(r"emb_l\.(\d+)\.weight"), r"bags.\1.weight"),
    (re.compile(r"bot_l\.(\d+)\.(weight|bias)"), r"bottom.\1.\2"),
    (re.compile(r"top_l\.(\d+)\.(weight|bias)"), r"top.\1.\2"),
)
_BACK = (
    (re.compile(r"bags\.(\d+)\.weight"), r"emb_l.\1.weight"),
    (re.compile(r"bottom\.(\d+)\.(weight|bias)"), r"bot_l.\1.\2"),
    (re.compile(r"top\.(\d+)\.(weight|bias)"), r"top_l.\1.\2"),
)
_NUMBERS = {"f4", "f8", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))}


class _NumberType:
    """numpy.dtype of a pickled number: its name and byte order.

    numpy's own takes more of the file, such as flags that have it follow a number as if it were a pointer.
    """

    def __init__(self, name: str, align: bool, copy: bool) -> None:
        if name not in _NUMBERS:
            raise pickle.UnpicklingError(f"{name!r} is no type of numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        expected = (3, state[1], None, None, None, -1, -1, 0)
        if state != expected or state[1] not in ("<", ">", "|"):
            raise pickle.UnpicklingError(f"{state} is no state of a type of numbers")
        self.dtype = self.dtype.newbyteorder(state[1])


def _number(kind: _NumberType, data: bytes) -> int | float:
    number: int | float = np.frombuffer(data, kind.dtype, count=1)[0].item()
    return number


# What the losses and accuracies beside the weights are pickled as, by numpy 2 and before.
_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),
]
_DAMAGED = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError),
    *(KeyError, TypeError, AttributeError, IndexError),
)


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a file that the script wrote; nothing in the file is executed."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except _DAMAGED as error:
        # torch's own message advises to execute what is in the file.
        raise UserError(
            f"{path} is not a file of weights that is safe to load: it is damaged, or has something else than tensors "
            "and numbers in it. It must be what the script's --save-model writes."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state_dict; it must be what the script's --save-model writes")
    return state


def from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of `dlrm_xla.model.DLRM` with exact tables."""
    return _renamed(
        {name.removeprefix("module."): tensor for name, tensor in state.items()},
        _NAMES,
        "The script's quotient-remainder and mixed-dimension tables are not converted.",
    )


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a DLRM with exact tables and dot or cat interaction under the script's names."""
    return _renamed(state, _BACK, "The script knows exact tables and the interactions dot and cat only.")


def saved(state: Mapping[str, Tensor], steps: int, learning_rate: float) -> dict[str, Any]:
    """What --save-model writes: all that the script reads by --load-model, in its last version and those before it.

    It trains on by SGD from the start of a first epoch, for it leaves "iter" batches out of every epoch, and never ends
    where "epoch" is not 0. Losses and accuracies of its own are not known; the best so far, which it compares, are 0.
    """
    weights = to_reference(state)
    optimizer = torch.optim.SGD([tensor.detach() for tensor in weights.values()], lr=learning_rate)
    place = {"epoch": 0, "nepochs": 1, "iter": 0, "nbatches": max(1, steps), "nbatches_test": 0}
    unknown = dict.fromkeys(("train_loss", "train_acc", "test_loss"), math.nan)
    sums_and_best = dict.fromkeys(("total_loss", "total_accu", "test_acc", "test_auc"), 0.0)
    return {"state_dict": weights, "opt_state_dict": optimizer.state_dict(), **place, **unknown, **sums_and_best}


def describe(state: Mapping[str, Tensor], interaction: str | None = None) -> dict[str, Any]:
    """The model that renamed weights belong to, as `dlrm_xla.serving.build` takes it.

    The interaction follows from the width of the top MLP's input. Raises UserError where it is neither dot nor cat, or
    could be either and is not given.
    """

    def weights(part: str) -> list[Tensor]:
        found = [n for n in state if n.startswith(f"{part}.") and n.endswith(".weight")]
        if not found:
            raise UserError(f"these weights have no {part}: a DLRM has tables, a bottom and a top MLP")
        return [state[n] for n in sorted(found, key=lambda n: int(n.split(".")[1]))]

    bottom, top, tables = (weights(part) for part in ("bottom", "top", "bags"))
    dim, vectors = tables[0].shape[1], len(tables) + 1
    widths = {"dot": dim + vectors * (vectors - 1) // 2, "cat": dim * vectors}
    kinds = [kind for kind, width in widths.items() if width == top[0].shape[1]]
    if not kinds:
        raise UserError(
            f"the top MLP takes {top[0].shape[1]} numbers, but the dot interaction gives {widths['dot']} and cat "
            f"{widths['cat']}; products of a vector with itself (--arch-interaction-itself) are not supported"
        )
    if interaction and interaction not in kinds:
        raise UserError(
            f"the top MLP takes {top[0].shape[1]} numbers, as with the {kinds[0]} interaction; {interaction} would "
            f"give {widths[interaction]}"
        )
    if len(kinds) > 1 and interaction is None:
        raise UserError(
            f"of {len(tables)} tables of width {dim} the dot and the cat interaction give {widths['dot']} numbers "
            "each, so these weights do not say which it was; launch/convert.py takes --interaction"
        )
    return {
        "num_dense": bottom[0].shape[1],
        "bag_lengths": [1] * len(tables),
        "tables": [
            {"name": f"C{k}", "rows": len(table), "dim": dim, "plugin": "exact"} for k, table in enumerate(tables, 1)
        ],
        "bottom": [len(w) for w in bottom[:-1]],
        "top": [len(w) for w in top[:-1]],
        "interaction": interaction or kinds[0],
        "cross_layers": 1,
        "cross_rank": 1,
        "seed": 0,
    }


def _renamed(
    state: Mapping[str, Tensor], names: tuple[tuple[re.Pattern[str], str], ...], why: str
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        found = [pattern.sub(new, name) for pattern, new in names if pattern.fullmatch(name)]
        if not found:
            raise UserError(f"there is no place for the weights {name!r}. {why}")
        renamed[found[0]] = tensor
    return renamed
