"""Plugins: found through entry points, written as ``a:key=value+b``, composed from the outside in.

``hash_rows:rows=1000+random_projection`` asks hash_rows for the bag, hash_rows asks random_projection for the
shorter table, and random_projection asks the exact table for the narrower one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any

from dlrm_xla.contract import MakeBag, Plugin, Table, innermost
from dlrm_xla.errors import UserError, choices

GROUP = "dlrm_xla.plugins"
EXACT = "exact"


@dataclass(frozen=True)
class Layer:
    """One plugin of a composition with the options that were set."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def installed() -> dict[str, EntryPoint]:
    """Entry points by name, not yet imported. Two packages with one name are an error, never a silent choice."""
    found: dict[str, EntryPoint] = {}
    for entry in _entry_points():
        other = found.get(entry.name)
        if other is not None and (other.value != entry.value or package(other) != package(entry)):
            raise UserError(
                f"two packages bring a plugin named {entry.name!r}: {package(other)} ({other.value}) and "
                f"{package(entry)} ({entry.value}). Uninstall one of them, or have it choose another name."
            )
        found[entry.name] = entry
    return found


@functools.cache  # reads a file of each installed package: 13 ms
def _entry_points() -> EntryPoints:
    return entry_points(group=GROUP)


def package(entry: EntryPoint) -> str:
    """Name and version of the package that brings an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown package"


def load(name: str) -> Plugin:
    """Imports one plugin. An unknown name lists the known ones; a failing import names package and reason."""
    known = installed()
    if name not in known:
        raise UserError(f"there is no plugin named {name!r}; {choices(name, [*known, EXACT])}")
    entry = known[name]
    try:
        plugin: Plugin = entry.load()
    except Exception as error:  # whatever a stranger's module raises on import
        raise UserError(
            f"plugin {name!r} of {package(entry)} does not import ({entry.value}): {type(error).__name__}: {error}. "
            "Install what it needs, reinstall that package, or leave the plugin out."
        ) from error
    return plugin


def options_of(plugin: Plugin) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a plugin, with evaluated annotations.

    Only those are: the others may have types that are imported for type checkers alone. Raises UserError where one of
    these cannot be evaluated.
    """
    parameters = inspect.signature(plugin).parameters.values()
    return {p.name: _evaluated(plugin, p) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _evaluated(plugin: Plugin, parameter: inspect.Parameter) -> inspect.Parameter:
    if not isinstance(parameter.annotation, str):
        return parameter
    # What has the signature: behind wrappers and partial, a class's __init__, an object's __call__.
    function: Any = inspect.unwrap(plugin)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    if not hasattr(function, "__globals__"):
        function = getattr(function, "__init__" if isinstance(function, type) else "__call__")
    try:
        return parameter.replace(annotation=eval(parameter.annotation, function.__globals__))
    except Exception as error:  # whatever a stranger's annotation raises
        name = getattr(plugin, "__name__", type(plugin).__name__)
        raise UserError(
            f"the type {parameter.annotation!r} of option {parameter.name!r} of plugin {name} ({function.__module__}) "
            f"cannot be evaluated: {type(error).__name__}: {error}. It must be known when the plugin runs: have its "
            "authors import it outside of if TYPE_CHECKING."
        ) from error


def parse(spec: str) -> list[Layer]:
    """Reads ``a:key=value,key=value+b`` into layers, outermost first; ``exact`` and '' are no layers."""
    layers = []
    for part in spec.split("+"):
        name, _, rest = part.strip().partition(":")
        if name in (EXACT, ""):
            if (name == "" or rest) and spec not in ("", EXACT):
                raise UserError(f"cannot read the plugin {spec!r}; write a, a+b or a:key=value,key=value+b")
            continue
        plugin = load(name)
        given: dict[str, Any] = {}
        for item in filter(None, rest.split(",")):
            key, equals, text = item.partition("=")
            if not equals:
                raise UserError(f"cannot read the option {item!r} of plugin {name!r}; write {name}:key=value,key=value")
            if key.strip() in given:
                raise UserError(f"plugin {part.strip()!r} has the option {key.strip()!r} twice")
            given[key.strip()] = _value(name, plugin, key.strip(), text.strip())
        layers.append(Layer(name, given))
    return layers


def _value(name: str, plugin: Plugin, key: str, given: Any) -> Any:
    """The value of an option in the type its parameter asks for, read from text where it came as text."""
    parameters = options_of(plugin)
    if key not in parameters:
        raise UserError(f"plugin {name!r} has no option {key!r}; {choices(key, parameters)}")
    annotation = parameters[key].annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for kind in typing.get_args(annotation) if is_union else (annotation,):
        value = given
        if isinstance(given, str) and kind is not str and typing.get_origin(kind) is not typing.Literal:
            try:
                value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(given.lower(), given))
            except (ValueError, SyntaxError):
                if not _is_any(kind):
                    continue
        if _fits(value, kind):
            return value
    raise UserError(f"option {key!r} of plugin {name!r} cannot be {given!r}; it takes {type_name(annotation)}")


def _is_any(kind: Any) -> bool:
    return kind is inspect.Parameter.empty or kind is Any


def _fits(value: Any, kind: Any) -> bool:
    if _is_any(kind):
        return True
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind is type(None) or kind is None:
        return value is None
    plain = typing.get_origin(kind) or kind
    if plain is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if plain is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, plain) if isinstance(plain, type) else True


def type_name(annotation: Any) -> str:
    """A type as a user would write it: ``int``, ``int | None``, ``'mod' | 'signed'``."""
    if _is_any(annotation):
        return "any"
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def compose(layers: list[Layer], innermost: MakeBag) -> MakeBag:
    """Nests the layers around ``innermost``; the first layer is asked for the bag."""
    make = innermost
    for layer in reversed(layers):
        plugin = load(layer.name)
        for name, parameter in inspect.signature(plugin).parameters.items():
            is_option = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            if is_option and parameter.default is inspect.Parameter.empty and name not in layer.options:
                raise UserError(f"plugin {layer.name!r} needs the option {name!r}: write {layer.name}:{name}=VALUE")
        make = _around(layer, plugin, make)
    return make


def _around(layer: Layer, plugin: Plugin, inner: MakeBag) -> MakeBag:
    def make(table: Table) -> Any:
        return plugin(table, inner, **layer.options)

    make.innermost = innermost(inner)  # type: ignore[attr-defined]
    return make
