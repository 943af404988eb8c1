"""Damages a checkpoint in a thousand ways; each must be refused with a message, and none may load or crash.

python tests/campaigns/corruption.py --times 1000

Flipped bits (half of them in the header), truncation, bytes appended, bytes exchanged for zeros, files that are
missing, empty or a pickle. Prints one line of JSON; exit code 1 where a damaged checkpoint loaded or crashed.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dlrm_xla import checkpoint
from dlrm_xla.config import Config
from dlrm_xla.contract import Table
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.model import DLRM
from dlrm_xla.rows import RowTable
from dlrm_xla.steps import Steps

KINDS = ("bit", "header bit", "truncated", "appended", "zeros", "missing", "empty", "pickle")


class Malice:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def steps() -> Steps:
    """A small model with its optimizers."""
    tables = [Table("a", 20, 4), Table("b", 50, 4)]
    model = DLRM(3, tables, [RowTable] * 2, bottom=[4], top=[4])
    return Steps(model, [1, 2], open_device("cpu"), Config())


def damage(good: bytes, kind: str, chance: random.Random, trap: Path) -> bytes | None:
    """The bytes of a damaged file; None for no file."""
    data = bytearray(good)
    if kind in ("bit", "header bit"):
        end = 8 + int.from_bytes(good[:8], "little") if kind == "header bit" else len(good)
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    elif kind == "truncated":
        del data[chance.randrange(1, len(good)) :]
    elif kind == "appended":
        data += chance.randbytes(chance.randrange(1, 100))
    elif kind == "zeros":
        first = chance.randrange(len(good) - 1)
        count = min(chance.randrange(1, 4096), len(good) - first)
        data[first : first + count] = bytes(count)
    elif kind == "missing":
        return None
    elif kind == "empty":
        data.clear()
    else:
        data = bytearray(pickle.dumps(Malice(trap)))
    return bytes(data)


def campaign(times: int, seed: int, folder: Path) -> dict[str, Any]:
    """Damages, tries to load, counts."""
    target = steps()
    path, bad, trap = folder / "good.safetensors", folder / "bad.safetensors", folder / "executed"
    target.save(path, {"step": 0})
    good = path.read_bytes()
    before = {n: t.clone() for n, t in target.model.state_dict().items()}
    chance = random.Random(seed)
    refused: Counter[str] = Counter()
    failed = []
    unchanged = 0
    while sum(refused.values()) + len(failed) < times:
        kind = KINDS[(sum(refused.values()) + len(failed)) % len(KINDS)]
        data = damage(good, kind, chance, trap)
        if data == good:  # two flips of one bit, zeros for zeros
            unchanged += 1
            continue
        if data is None:
            bad.unlink(missing_ok=True)
        else:
            bad.write_bytes(data)
        try:
            checkpoint.load_training(bad, target.model, target.dense, target.rows)
            failed.append(f"{kind}: loaded")
        except UserError:
            refused[kind] += 1
        except Exception as error:
            failed.append(f"{kind}: {type(error).__name__}: {error}")
    if trap.exists():
        failed.append("a pickle was executed")
    if any(not torch.equal(t, before[n]) for n, t in target.model.state_dict().items()):
        failed.append("a refused checkpoint changed the model")
    checkpoint.load_training(path, target.model, target.dense, target.rows)
    return {"refused": dict(refused), "drawn_again": unchanged, "failed": failed}


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(given.times, given.seed, Path(folder))
    print(json.dumps(found))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
