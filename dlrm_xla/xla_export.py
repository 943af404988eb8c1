"""What of `dlrm_xla.export` needs torch_xla, which must be open."""

from __future__ import annotations

from pathlib import Path

from torch.export import ExportedProgram
from torch_xla.stablehlo import exported_program_to_stablehlo


def save_stablehlo(program: ExportedProgram, folder: Path) -> None:
    """Lowers an exported program to StableHLO and writes it with its weights."""
    exported_program_to_stablehlo(program).save(str(folder))
