"""Where cells live: a folder that the settings name, or that of a cell whose results are the same, however written."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dlrm_xla.errors import UserError
from dlrm_xla_studies.grid import SETTINGS_FILE, Cell, expanded
from dlrm_xla_studies.spec import TOOLS

_TRIAL = "trial"


def folder_of(study: Path, cell: Cell) -> Path:
    """Where a cell lives: its own folder, or one that has a report of the same results."""
    own = study / "cells" / cell.id
    return own if own.exists() else _reported(study).get(_key(cell), own)


def as_tried(study: Path, cells: Sequence[Cell]) -> list[Cell]:
    """The cells; those whose method has trials under another spelling are tuned under it, which seeds their sampler."""
    trials: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for folder, settings in _settings(study).items():
        if folder.name.startswith(_TRIAL) and settings:
            # Without its ratio and seed, a trial is of the method of its settings; what was tuned is not known here.
            trials.setdefault(str(settings.get("plugin")), []).append((folder.name, settings))
    spelled: dict[str, str] = {}
    for cell in cells:
        if cell.tuned and cell.method() not in spelled:
            near = trials.get(str(cell.settings.get("plugin")), [])
            found = Counter(filter(None, (_spelling(cell, name, settings) for name, settings in near)))
            usual = cell.method()
            spelled[usual] = usual if usual in found or not found else found.most_common(1)[0][0]
    return [replace(cell, spelled=spelled[cell.method()]) if cell.tuned else cell for cell in cells]


def _spelling(cell: Cell, name: str, settings: Mapping[str, Any]) -> str:
    """The method as the trial in a folder of this name spelled it; '' where it is one of another method."""
    own, plain = dict(cell.settings), expanded(cell.settings)
    # What the file holds has no variables left.
    with_variables = {k: own[k] if k in own and repr(plain[k]) == repr(v) else v for k, v in settings.items()}
    for raw in (with_variables, settings):
        method = replace(cell, settings=raw).method()
        values = {k: raw[k] for k in ("ratio", "seed", *cell.tuned) if k in raw}
        same = replace(cell, settings={k: v for k, v in own.items() if k != "ratio"} | values, tuned=())
        old = replace(same, settings=raw, trial=method)
        if old.id == name and _key(same, _TRIAL) == _key(old):
            return method
    return ""


def _key(cell: Cell, kind: str = "") -> str:
    plain = replace(cell, settings=expanded(cell.settings), trial="")
    return (kind or (_TRIAL if cell.trial else cell.tool)) + plain.result_key()


def _reported(study: Path) -> Mapping[str, Path]:
    try:
        return _index(study, (study / "cells").stat().st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=1)
def _index(study: Path, changed: int) -> dict[str, Path]:
    """The folders with a report, by what names their results."""
    found: dict[str, Path] = {}
    for folder in _settings(study):
        if (name := _named(folder)) and any((folder / part / "report.json").exists() for part in ("run", "")):
            found.setdefault(name, folder)
    return found


@functools.cache
def _named(folder: Path) -> str:
    """The key of the cell that a folder was made for; '' where that cannot be told."""
    kind, settings = folder.name.partition("-")[0], _read(folder)
    tool = next((tool for tool in TOOLS.values() if tool == ("run" if kind == _TRIAL else kind)), None)
    if settings is None or tool is None:
        return ""
    try:
        return _key(Cell(tool, settings), kind)
    except (UserError, LookupError, TypeError, ValueError):  # settings of another version
        return ""


def _settings(study: Path) -> dict[Path, dict[str, Any] | None]:
    cells = study / "cells"
    return {f: _read(f) for f in sorted(cells.iterdir()) if f.is_dir()} if cells.is_dir() else {}


@functools.cache
def _read(folder: Path) -> dict[str, Any] | None:
    try:
        read = yaml.safe_load((folder / SETTINGS_FILE).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return read if isinstance(read, dict) else None
