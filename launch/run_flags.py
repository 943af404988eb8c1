"""The flags of a run: one for each setting that has one."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dlrm_xla_data.prepared import SPLITS

from dlrm_xla.config import Config, resolve
from dlrm_xla.presets import PRESETS


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            first = getattr(namespace, self.dest)
            parser.error(f"--plugin is given twice; to compose plugins write --plugin {first}+{value}")
        setattr(namespace, self.dest, value)


def add_settings(
    parser: argparse.ArgumentParser, names: Collection[str], told: Callable[[str], str] | None = None
) -> None:
    """A flag for each of the named settings; ``told`` says what each is where it is not given, else a run's default."""
    hints = typing.get_type_hints(Config)
    usual = resolve({}, None)[0]
    for field in dataclasses.fields(Config):
        if field.name not in names:
            continue
        kind = hints[field.name]
        literal = typing.get_origin(kind) is typing.Literal
        value = getattr(usual, field.name)
        default = f"default {value}" if value != "" else ""
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=str if literal else kind,
            choices=typing.get_args(kind) if literal else None,
            action=_Once if field.name == "plugin" else "store",
            metavar=None if literal else kind.__name__.upper(),
            help=_help(field.metadata["help"], told(field.name) if told else default).replace("%", "%%"),
        )


def _help(text: str, default: str) -> str:
    """What a setting is, and ``default`` in place of what that says of none."""
    return f"{text.partition('; none:')[0]} ({default})" if default else text


def _short(value: Any) -> str:
    text = repr(value) if value != "" else "none"
    return text if len(text) < 30 else f"{text[:25]}...]"


def _without_flag() -> str:
    usual = resolve({}, None)[0]
    fields = [f for f in dataclasses.fields(Config) if not f.metadata["flag"]]
    return "\n".join(f"  {f.name:<18} {f.metadata['help']} (default {_short(getattr(usual, f.name))})" for f in fields)


def flags(description: str | None) -> argparse.ArgumentParser:
    """One flag per setting that has one, plus those that say what else than a run is wanted."""
    presets = "\n".join(f"  {name:<10} {preset.about}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"presets:\n{presets}\n\nsettings of a --config file that have no flag:\n{_without_flag()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_settings(parser, {f.name for f in dataclasses.fields(Config) if f.metadata["flag"]})
    parser.add_argument("--config", type=Path, default=None, help="YAML file of settings; a run's config.yaml works")
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument(
        "--resume", type=Path, default=None, metavar="RUN", help="run folder to go on with; its config.yaml holds"
    )
    commands.add_argument(
        "--start-from",
        type=Path,
        default=None,
        metavar="CHECKPOINT",
        help="a new run that begins with this model, its settings and its optimizers' states, on the rows of --data",
    )
    commands.add_argument(
        "--evaluate", type=Path, default=None, metavar="CHECKPOINT", help="score rows, write --out as Parquet, and stop"
    )
    parser.add_argument("--split", default=None, choices=SPLITS, help="the rows that --evaluate scores (default test)")
    commands.add_argument(
        "--export", type=Path, default=None, metavar="CHECKPOINT", help="write programs to the folder --out, and stop"
    )
    parser.add_argument("--plan", action="store_true", default=False, help="print what each table keeps, and stop")
    commands.add_argument(
        "--list-plugins", action="store_true", default=False, help="print the installed plugins, and stop"
    )
    return parser
