"""A trained model as programs that need nothing of this project: torch.export and StableHLO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlrm_xla.contract import Stored
from dlrm_xla.errors import UserError
from dlrm_xla.serving import Scorer
from dlrm_xla.whole_folder import whole_folder
from dlrm_xla.xla_device import open_xla_first

TORCH, STABLEHLO = "model.pt2", "stablehlo"


def store(model: nn.Module, served: dict[nn.Module, nn.Module] | None = None) -> None:
    """Puts in the place of each bag what it is stored as; a UserError where one only counts it.

    ``served`` has those that are stored already.
    """
    served = {} if served is None else served
    for name, module in list(model._modules.items()):  # a module under two names is among them twice
        if module is None:
            continue
        if isinstance(module, Stored):
            if module not in served:
                served[module] = module.served()
            setattr(model, name, served[module])
        elif hasattr(module, "bytes_to_serve"):
            raise UserError(
                f"{type(module).__name__} says in how many bytes it is stored (bytes_to_serve), but cannot be stored: "
                "it has no served(), which dlrm_xla.contract.Stored asks for. Look at its plugin."
            )
        else:
            store(module, served)


def _freeze(module: nn.Module) -> None:
    """Makes parameters buffers: as parameters they want gradients again in what torch loads."""
    buffers = {parameter: parameter.detach() for parameter in module.parameters()}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, buffers[parameter])


def _widen(module: nn.Module) -> None:
    """Makes bfloat16 buffers float32, the same numbers."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.dtype == torch.bfloat16:
                setattr(part, name, buffer.float())


def export(scorer: Scorer, about: dict[str, Any], folder: Path, batch: int) -> list[str]:
    """Writes `model.pt2` for any batch size, `stablehlo/` for ``batch`` samples, and `interface.json`; returns names.

    Both map (dense_BI float32, ids_BS int32) to click probabilities [B]. Tables are in them as they are stored to
    serve, codes of quantized rows packed, so ``scorer`` cannot be trained any more; but for bfloat16 ones, which are
    float32 in StableHLO: torch_xla writes its arrays by numpy, which has no bfloat16. StableHLO needs torch_xla and is
    left out where that is missing. The folder appears when it is whole.

    Raises UserError where a plugin cannot be exported.
    """
    described = about["model"]
    width = sum(described["bag_lengths"])

    def example(samples: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(samples, described["num_dense"]), torch.zeros(samples, width, dtype=torch.int32)

    store(scorer)
    _freeze(scorer.eval())
    size = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            # From an example of one sample torch takes the size for fixed.
            flexible = torch.export.export(scorer, example(max(2, batch)), dynamic_shapes=({0: size}, {0: size}))
            lowered = open_xla_first()
            if lowered:
                _widen(scorer)
                fixed = torch.export.export(scorer, example(batch))
    except Exception as error:  # whatever torch makes of a stranger's plugin
        first = str(error).partition("\n")[0]
        raise UserError(
            f"torch.export cannot take this model: {first} Look at the plugins: a len() of a tensor or a Python number "
            "made of a shape ties a program to one batch size."
        ) from error
    interface = {
        "inputs": {"dense_BI": ["batch", described["num_dense"]], "ids_BS": ["batch", width]},
        "types": {"dense_BI": "float32", "ids_BS": "int32"},
        "dense": "as the prepared data has them: changed as its layout says, log(1 + x) for Criteo, 0 where missing",
        "ids": "as the prepared data has them, the slots of all tables side by side; one that is not within the rows "
        "of its table counts as 0, which stands for missing values and for those that training saw too rarely"
        + ("; slots that a bag does not fill are -1" if described.get("variable_bags") else ""),
        "output": "click probability [batch]",
        "stablehlo_batch": batch,
        "bag_lengths": described["bag_lengths"],
        "padding_id": -1 if described.get("variable_bags") else None,
        "tables": described["tables"],
        "step": about["step"],
    }
    written = [TORCH]
    with whole_folder(folder) as scratch:
        torch.export.save(flexible, scratch / TORCH)
        if lowered:
            from dlrm_xla.xla_export import save_stablehlo

            save_stablehlo(fixed, scratch / STABLEHLO)
            written.append(STABLEHLO)
        (scratch / "interface.json").write_text(json.dumps(interface, indent=1) + "\n")
    return [*written, "interface.json"]
