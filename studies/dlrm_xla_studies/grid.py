"""The cells of a study: one call of one tool each, with a folder that its settings name."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dlrm_xla.config import Config, resolve
from dlrm_xla.errors import UserError
from dlrm_xla_studies.spec import Block, Study, Tool

SCRIPTS: dict[Tool, str] = {"run": "run", "compile": "compile_tpu", "bench": "bench"}
# In each folder: the settings that its cell was called with.
SETTINGS_FILE = "settings.yaml"
# Of a run's settings, those that its name tells, in this order.
_NAMED = ("plugin", "ratio", "preset", "device", "batch_size", "min_count", "chip", "what", "rows", "seed")
# What a method's cells may differ in.
_NOT_OF_METHOD = ("ratio", "seed")
# What every title names.
_IN_TITLE = ("plugin", "ratio", "min_count", "batch_size", "rows", "batch", "dim", "what", "preset", "chip", "device",
             "seed")  # fmt: skip
# Settings that say what is written where and when; they change no result.
OF_FILES = ("out", "data_cache", "row_files", "log_every", "save_every", "save_minutes", "keep_checkpoints",
            "rank_patience")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One call of a tool; ``trial``: it belongs to a method's tuning; ``told``: settings that its title names too.

    ``spelled``: its method, where trials of it were made that spell it otherwise.
    """

    tool: Tool
    settings: Mapping[str, Any]
    trial: str = ""
    tuned: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    spelled: str = ""
    id: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps([self.tool, self.trial, dict(self.settings)], sort_keys=True, default=str)
        plain = ("plugin", "preset", "device", "chip", "what")
        given = [key for key in _NAMED if key in self.settings]
        told = [f"{'' if key in plain else key}{self.settings[key]}" for key in given]
        name = "-".join(["trial" if self.trial else self.tool, *told])
        slug = re.sub(r"[^\w+.=-]", "_", name)[:90]
        object.__setattr__(self, "id", f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")

    @property
    def title(self) -> str:
        """What a person calls it."""
        parts = [str(self.settings.get("plugin", "exact" if self.tool == "run" else ""))]
        if self.settings.get("ratio"):
            parts.append(f"{self.settings['ratio']:g}x")
        sizes = {"min_count": "min count", "batch_size": "batch", "rows": "rows", "batch": "batch", "dim": "dim"}
        parts += [f"{words} {self.settings[key]}" for key, words in sizes.items() if key in self.settings]
        parts += [str(self.settings[key]) for key in ("what", "preset", "chip", "device") if key in self.settings]
        parts += told(self.settings, self.told)
        parts += [f"seed {self.settings['seed']}"] if "seed" in self.settings else []
        return " ".join(filter(None, [{"run": "", "compile": "compile", "bench": "bench"}[self.tool], *parts]))

    @property
    def device(self) -> str:
        """The device that it occupies alone, or '' for the CPU, whose cores are shared."""
        device = str(self.settings.get("device", "cpu"))
        return "tpu compiler" if self.tool == "compile" else "" if device == "cpu" else device

    def key(self, left_out: Collection[str] = ()) -> str:
        """The same for cells whose settings are the same, however they are written: 10 or 10.0, a default or nothing.

        What is to be tuned has no value yet.
        """
        given = {k: float(v) if type(v) is int else v for k, v in self.settings.items()}
        if self.tool == "run":
            defaults = _defaults(str(self.settings.get("preset", Config().preset)))
            given = defaults | {k: float(v) if isinstance(defaults[k], float) else v for k, v in self.settings.items()}
        compared = {k: v for k, v in given.items() if k not in left_out}
        return json.dumps([self.tool, self.trial, self.tuned, compared], sort_keys=True)

    def result_key(self) -> str:
        """The same for cells whose results are."""
        return self.key(OF_FILES)

    def method(self) -> str:
        """What is tuned as one: all settings but the ratio, the seed and those to tune."""
        if self.spelled:
            return self.spelled
        left = {k: v for k, v in self.settings.items() if k not in _NOT_OF_METHOD and k not in self.tuned}
        return json.dumps(left, sort_keys=True)

    def with_tuned(self, values: Mapping[str, float]) -> Cell:
        """The cell with what tuning found for it."""
        return replace(self, settings={**self.settings, **{k: values[k] for k in self.tuned}}, tuned=())

    def command(self, folder: Path) -> list[str]:
        """A script of launch/ and its arguments, for a call that starts in ``folder``."""
        script = SCRIPTS[self.tool]
        if self.tool == "run":
            return [script, "--config", str(folder / SETTINGS_FILE), "--out", str(folder / "run")]
        flags = itertools.chain.from_iterable(_flag(k, v) for k, v in self.settings.items())
        return [script, *flags, "--out", str(folder / "report.json")]

    def report(self, folder: Path) -> Path:
        """Where the tool leaves its figures."""
        return folder / "run" / "report.json" if self.tool == "run" else folder / "report.json"


def expanded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the environment's variables in their texts."""
    return {k: os.path.expandvars(v) if isinstance(v, str) else v for k, v in settings.items()}


@functools.cache
def _defaults(preset: str) -> dict[str, Any]:
    return asdict(resolve({"preset": preset}, None)[0])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _flag(key: str, value: Any) -> list[str]:
    name = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        return [name] if value else []
    return [name, *map(str, value)] if isinstance(value, list) else [name, str(value)]


def cells(study: Study) -> list[Cell]:
    """All cells in the order of the file, the last field of a block fastest; of equal cells, the first.

    Cells are equal where their settings are, however they are written. Raises UserError where two differ in nothing but
    `OF_FILES`.
    """
    found: dict[str, Cell] = {}
    results: dict[str, tuple[str, int]] = {}
    for block in study.blocks:
        for cell in _block_cells(study, block):
            key = cell.key()
            other, line = results.setdefault(cell.result_key(), (key, block.line))
            if other != key:
                raise UserError(
                    f"{study.path}:{block.line}: {cell.title} has the same results as in line {line}, for they differ "
                    f"in nothing but {', '.join(OF_FILES)}: leave one of the two out"
                )
            found.setdefault(key, cell)
    return _titled(list(found.values()))


def differing(group: Collection[Mapping[str, Any]]) -> list[str]:
    """The settings that are not the same in all."""
    names = dict.fromkeys(name for settings in group for name in settings)
    return [name for name in names if len({str(settings.get(name)) for settings in group}) > 1]


def told(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Settings of these names in words."""
    return [f"{name.replace('_', ' ')} {_short(settings[name])}" for name in names if name in settings]


def _titled(found: Sequence[Cell]) -> list[Cell]:
    """The cells with titles that tell them apart: of each tool, the settings that are not the same in all its cells."""
    names: dict[Tool, tuple[str, ...]] = {}
    for tool in SCRIPTS:
        group = [cell.settings for cell in found if cell.tool == tool]
        names[tool] = tuple(name for name in differing(group) if name not in _IN_TITLE)
    return [replace(cell, told=names[cell.tool]) for cell in found]


def _block_cells(study: Study, block: Block) -> Iterator[Cell]:
    for combination in itertools.product(*block.values.values()):
        own = dict(zip(block.values, combination, strict=True))
        if block.tool != "run":
            yield Cell(block.tool, own)
            continue
        search = study.tuning.search if study.tuning else {}
        # A block that sets what would be searched has decided it.
        tuned = tuple(key for key in search if key not in own)
        yield Cell("run", {"device": "cpu", "plugin": "exact", "seed": 0, **study.settings, **own}, tuned=tuned)


def methods(found: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells that wait for tuning, by method."""
    groups: dict[str, list[Cell]] = {}
    for cell in found:
        if cell.tuned:
            groups.setdefault(cell.method(), []).append(cell)
    return groups


def trial_place(group: Sequence[Cell], seed: int) -> Cell:
    """The cell of a method that its trials are made at: the middle one of its ratios."""
    ratios = sorted({cell.settings.get("ratio", 0) for cell in group})
    middle = ratios[len(ratios) // 2]
    chosen = next(cell for cell in group if cell.settings.get("ratio", 0) == middle)
    return replace(chosen, settings={**chosen.settings, "seed": seed})
