"""Has a bag rearrange its table, and holds it to what `dlrm_xla.contract.Refreshed` asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dlrm_xla.contract import Refreshed
from dlrm_xla.errors import UserError
from dlrm_xla.rows import RowTable


def refresh(bag: Refreshed, table: str) -> None:
    """Has a bag of a table rearrange it; a UserError where it fails or leaves what a step cannot go on with."""
    assert isinstance(bag, nn.Module)
    name = f"{type(bag).__name__} of table {table}"
    before = dict(bag.state_dict(keep_vars=True))
    kinds = {key: _kind(tensor) for key, tensor in before.items()}
    bag.eval()
    try:
        with _without_lookups(bag, name):
            bag.refresh()
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's bag raises
        raise UserError(
            f"refresh() of {name} fails: {type(error).__name__}: {error}. Leave its plugin out, or ask its authors."
        ) from error
    after = dict(bag.state_dict(keep_vars=True))
    for key in {**before, **after}:
        old, new = kinds.get(key, "none"), _kind(after[key]) if key in after else "none"
        if old != new:
            told = f"{key} was {old} and is {new}: shapes, types and devices must stay"
        elif isinstance(before[key], nn.Parameter) and after[key] is not before[key]:
            told = f"{key} is another Parameter, which no optimizer knows: put new values into {key}.data"
        else:
            continue
        raise UserError(f"refresh() of {name} breaks the contract (Refreshed): {told}. Ask its authors.")
    check_finite(bag, name, "after refresh()")


def check_finite(bag: nn.Module, name: str, when: str) -> None:
    """Raises a UserError where a parameter or a buffer of a bag is not finite."""
    for key, tensor in bag.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not tensor.detach().cpu().isfinite().all():
            raise UserError(
                f"{key} of {name} is not finite {when}; no learning rate mends that. Leave its plugin out, change its "
                "options, or ask its authors."
            )


def _kind(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


@contextmanager
def _without_lookups(bag: nn.Module, name: str) -> Iterator[None]:
    """Refuses lookups of the exact tables inside a bag: each would be a graph on xla, and on ranks wait for others."""

    def refuse(member: nn.Module, given: object) -> None:
        assert isinstance(member, RowTable)
        raise UserError(
            f"refresh() of {name} looks up rows of {member.table.name}, which are out of its reach then. Have its "
            "authors rearrange only what the bag itself holds (dlrm_xla.contract.Refreshed)."
        )

    hooks = [member.register_forward_pre_hook(refuse) for member in bag.modules() if isinstance(member, RowTable)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
