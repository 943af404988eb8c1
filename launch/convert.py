#!/usr/bin/env python
"""Converts trained weights from and to the facebookresearch/dlrm script.

python launch/convert.py --from-reference dlrm.pt --out model.safetensors     then launch/run.py --evaluate or --export
python launch/convert.py --to-reference model.safetensors --out dlrm.pt       then dlrm_s_pytorch.py --load-model
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dlrm_xla import reference_weights, serving
from dlrm_xla.config import Config
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.run_folder import versions
from dlrm_xla.steps import Steps

# The script's own default.
LEARNING_RATE = 0.01


def from_reference(path: Path, out: Path, interaction: str | None = None) -> str:
    """Writes a checkpoint with the weights of the script's file."""
    state = reference_weights.from_reference(reference_weights.read(path))
    described = reference_weights.describe(state, interaction)
    model = serving.build(described)
    model.load_state_dict(state)
    config = Config(dim=described["tables"][0]["dim"], **{k: described[k] for k in ("bottom", "top", "interaction")})
    about = {"step": 0, "config": dataclasses.asdict(config), "model": described, "versions": versions()}
    Steps(model, described["bag_lengths"], open_device("cpu"), config).save(out, about)
    return f"{len(described['tables'])} tables, {described['interaction']} interaction"


def to_reference(path: Path, out: Path, learning_rate: float) -> str:
    """Writes a file as the script saves it, from a checkpoint with exact tables."""
    scorer, about = serving.load(path)
    content = reference_weights.saved(scorer.model.state_dict(), about["step"], learning_rate)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.unfinished")
    torch.save(content, unfinished)
    unfinished.replace(out)
    return f"{len(about['model']['tables'])} tables, step {about['step']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the flags and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from-reference", type=Path, metavar="FILE", help="what the script's --save-model wrote")
    way.add_argument("--to-reference", type=Path, metavar="CHECKPOINT", help="a checkpoint with exact tables")
    parser.add_argument("--out", type=Path, required=True, help="file to write; must not exist")
    parser.add_argument(
        "--interaction", choices=["dot", "cat"], help="of --from-reference, where the weights' shapes fit both"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help=f"of --to-reference: the rate of the file, which the script trains on with (default {LEARNING_RATE})",
    )
    given = parser.parse_args(arguments)
    rate = LEARNING_RATE if given.learning_rate is None else given.learning_rate
    try:
        if given.out.exists():
            raise UserError(f"--out {given.out} is there already. Choose a new name.")
        if given.interaction and given.to_reference:
            raise UserError("--interaction is of --from-reference; a checkpoint knows its own")
        if given.learning_rate is not None and given.from_reference:
            raise UserError("--learning-rate is of --to-reference; what is read has no rate")
        if not 0 < rate < float("inf"):
            raise UserError(f"--learning-rate is {rate:g}, but must be above 0")
        if given.from_reference:
            told = from_reference(given.from_reference, given.out, given.interaction)
        else:
            told = to_reference(given.to_reference, given.out, rate)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. Look at the disk and the permissions there.", file=sys.stderr)
        return 2
    print(f"{given.out}: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
