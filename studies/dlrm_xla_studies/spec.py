"""A study file: what it asks, what it may take, and blocks of settings whose combinations are its cells.

    question: Which approximation at which size?
    cores: 2                     # all that run at once
    memory: 16GB
    settings: {preset: small}    # of every training run
    runs:                        # each block: the product of its lists
      - {plugin: exact, seed: [0, 1, 2]}
      - {plugin: [hash_rows, robe], ratio: [10, 100], seed: [0, 1, 2]}
    compiles:                    # launch/compile_tpu.py, by its flags
      - {plugin: [exact, hash_rows], chip: [v5e, v6e]}
    benches:                     # launch/bench.py, by its flags
      - {what: plugins, device: cpu}
    tuning:                      # the same number of trials for each method
      trials: 4
      search: {row_lr: [0.01, 0.08]}

Every error names the line.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from dlrm_xla.config import Config, checked, resolve
from dlrm_xla.errors import UserError, choices
from dlrm_xla.plan import read_bytes
from dlrm_xla.registry import parse

Tool = Literal["run", "compile", "bench"]
TOOLS: dict[str, Tool] = {"runs": "run", "compiles": "compile", "benches": "bench"}
KEYS = ("question", "cores", "threads", "memory", "settings", *TOOLS, "tuning")
# A study chooses these itself.
_OWN = ("out",)
# Where a value is from, in messages.
_SOURCE = "study"
_NOT_TUNED = {
    "ratio": "a method is tuned for all its ratios",
    "save_minutes": "it changes no result",
    "rank_patience": "it changes no result",
}
# A list of these is one value: a grid over them takes a list of lists.
_LISTS = {f.name for f in fields(Config) if typing.get_origin(typing.get_type_hints(Config)[f.name]) is list}


@dataclass(frozen=True)
class Block:
    """The product of its lists, each combination a call of one tool."""

    tool: Tool
    values: Mapping[str, list[Any]]
    line: int


@dataclass(frozen=True)
class Tuning:
    """``trials`` for each method, over log-uniform ranges, on ``seed``."""

    trials: int
    search: Mapping[str, tuple[float, float]]
    seed: int = 0


@dataclass(frozen=True)
class Study:
    """A study file that was read and checked."""

    name: str
    path: Path
    question: str = ""
    cores: int = 1
    threads: int = 1
    memory: float = 8e9
    settings: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    tuning: Tuning | None = None


def read_study(path: Path, flags: Mapping[Tool, Collection[str]]) -> Study:
    """Reads a study file. ``flags`` are the fields of each tool but ``run``, whose fields are those of `Config`.

    Raises UserError with file and line where a field, plugin or value is not one.
    """
    try:
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read the study {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if node is None:
        raise UserError(f"{path} is empty; a study has at least one block under {', '.join(TOOLS)}")
    return _Reader(path, flags).study(node)


class _Reader:
    def __init__(self, path: Path, flags: Mapping[Tool, Collection[str]]) -> None:
        self.path, self.flags = path, flags

    def study(self, node: yaml.Node) -> Study:
        top = self.mapping(node, "a study")
        for key, value in top.items():
            if key not in KEYS:
                raise self.error(value, f"there is no field {key!r} of a study; {choices(key, KEYS)}")
        settings = self.settings(top["settings"]) if "settings" in top else {}
        blocks = []
        for key, tool in TOOLS.items():
            for part in self.sequence(top[key]) if key in top else ():
                blocks.append(self.block(part, tool, settings))
        if not blocks:
            raise self.error(node, f"the study has no cells; write a block under {', '.join(TOOLS)}")
        return Study(
            self.path.stem,
            self.path,
            str(self.value(top["question"])) if "question" in top else "",
            self.count(top, "cores"),
            self.count(top, "threads"),
            self.memory(top["memory"]) if "memory" in top else Study.memory,
            settings,
            tuple(blocks),
            self.tuning(top["tuning"]) if "tuning" in top else None,
        )

    def settings(self, node: yaml.Node) -> dict[str, Any]:
        found = {}
        for key, value in self.mapping(node, "settings").items():
            self.known(value, key, "run")
            found[key] = self.value(value)
            self.single(value, key, found[key], "run")
        return found

    def block(self, node: yaml.Node, tool: Tool, settings: Mapping[str, Any]) -> Block:
        values: dict[str, list[Any]] = {}
        for key, child in self.mapping(node, "a block").items():
            self.known(child, key, tool)
            value = self.value(child)
            is_grid = isinstance(value, list) and (key not in _LISTS or any(isinstance(v, list) for v in value))
            values[key] = value if is_grid else [value]
            if not values[key]:
                raise self.error(child, f"{key} has no values; leave it out, or give it one")
            parts = child.value if is_grid else [child]
            for part, one in zip(parts, values[key], strict=True):
                self.single(part, key, one, tool)
        if not values:
            raise self.error(node, "a block without a field has no cells")
        for combination in itertools.product(*values.values()) if tool == "run" else ():
            try:
                resolve({**settings, **dict(zip(values, combination, strict=True))}, None, _SOURCE)
            except UserError as error:
                raise self.error(node, str(error)) from error
        return Block(tool, values, node.start_mark.line + 1)

    def tuning(self, node: yaml.Node) -> Tuning:
        parts = self.mapping(node, "tuning")
        for key, child in parts.items():
            good = ("trials", "search", "seed")
            if key not in good:
                raise self.error(child, f"there is no field {key!r} of tuning; {choices(key, good)}")
        if "search" not in parts:
            raise self.error(node, "tuning has no search: write the settings to tune, as row_lr: [0.01, 0.08]")
        search = {}
        for key, child in self.mapping(parts["search"], "search").items():
            self.known(child, key, "run")
            value = self.value(child)
            numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
            if key in _NOT_TUNED:
                raise self.error(child, f"{key} cannot be tuned: {_NOT_TUNED[key]}")
            if typing.get_type_hints(Config)[key] is not float or not numbers or len(value) != 2:
                raise self.error(child, f"{key} cannot be tuned over {value!r}; it takes a float's [lowest, highest]")
            if not 0 < value[0] < value[1]:
                raise self.error(child, f"the range of {key} is {value}: it must rise and be above 0")
            search[key] = (float(value[0]), float(value[1]))
        if not search:
            raise self.error(parts["search"], "search is empty: write the settings to tune, as row_lr: [0.01, 0.08]")
        seed = self.value(parts["seed"]) if "seed" in parts else 0
        if type(seed) is not int or seed < 0:
            raise self.error(parts["seed"], f"seed is {seed!r}, but must be a whole number from 0")
        return Tuning(self.count(parts, "trials"), search, seed)

    def known(self, node: yaml.Node, key: str, tool: Tool) -> None:
        good = [n for n in typing.get_type_hints(Config) if n not in _OWN] if tool == "run" else list(self.flags[tool])
        if key not in good:
            raise self.error(node, f"there is no field {key!r} of a {tool}; {choices(key, good)}")

    def single(self, node: yaml.Node, key: str, value: Any, tool: Tool) -> None:
        """Refuses what no other setting could make right."""
        try:
            if tool == "run":
                checked(key, value, _SOURCE)
            if key == "plugin":
                parse(str(value))
            elif tool == "run" and key == "preset":
                resolve({key: value}, None, _SOURCE)
            elif tool == "run" and key == "tables":
                for plugin in value.values():
                    parse(plugin)
            elif tool == "run" and key == "memory" and value:
                read_bytes(value)
        except UserError as error:
            raise self.error(node, str(error)) from error

    def memory(self, node: yaml.Node) -> float:
        try:
            return float(read_bytes(str(self.value(node))))
        except UserError as error:
            raise self.error(node, str(error)) from error

    def count(self, parts: Mapping[str, yaml.Node], key: str) -> int:
        if key not in parts:
            return 1
        value = self.value(parts[key])
        if type(value) is not int or value < 1:
            raise self.error(parts[key], f"{key} is {value!r}, but must be a whole number from 1")
        return value

    def mapping(self, node: yaml.Node, what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what} must be lines of the form 'name: value'")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error(key, f"a name in {what} must be a word")
            if key.value in found:
                raise self.error(key, f"{key.value} is given twice")
            found[key.value] = value
        return found

    def sequence(self, node: yaml.Node) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(node, "blocks are a list: start each with '- '")
        return list(node.value)

    def value(self, node: yaml.Node) -> Any:
        return yaml.safe_load(yaml.serialize(node))

    def error(self, node: yaml.Node, text: str) -> UserError:
        return UserError(f"{self.path}:{node.start_mark.line + 1}: {text}")
