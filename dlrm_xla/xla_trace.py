"""A step as StableHLO, traced on shapes alone: the tables of a model take no memory, however large they are."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xla_builder
import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from dlrm_xla.contract import ComposedBag, Computation, RedirectedBag
from dlrm_xla.device import Device
from dlrm_xla.xla_spmd import Mesh
from dlrm_xla.xla_steps import RecordedStep, tensors_in

_XLAC = torch_xla._XLAC


@dataclass(frozen=True)
class Argument:
    """One argument of a traced step: its name in the model, shape and type.

    ``donated``: the step writes to it in place, so its buffer holds a result. ``sharding`` is what XLA calls it where
    there are several chips: cut along its first dimension, or whole on each.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    donated: bool
    sharding: str = ""


@dataclass(frozen=True)
class TracedStep:
    """A portable StableHLO artifact, the same as text without names, and its arguments in their order."""

    artifact: bytes
    text: str
    arguments: list[Argument]

    @property
    def donated(self) -> list[int]:
        """Places of the arguments that the step writes to."""
        return [place for place, argument in enumerate(self.arguments) if argument.donated]


def placeholder(tensor: Tensor) -> Tensor:
    """A tensor on the xla device that has a shape and a type, and no values."""
    made: Tensor = xla_builder.create_placeholder_tensor(tensor.shape, tensor.dtype)
    return made


class PlaceholderMesh(Mesh):
    """Several chips for placeholders, which carry no marks: it is known which are cut, and said of the arguments."""

    def __init__(self) -> None:
        self._cut = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]
        super().__init__()

    def send(self, tensor: Tensor) -> Tensor:
        """As for a step that runs."""
        sent = super().send(tensor)
        self._cut[sent] = None
        return sent

    def cut_placeholder(self, tensor: Tensor) -> Tensor:
        """A placeholder that chips share."""
        made = placeholder(tensor)
        self._cut[made] = None
        return made

    def sharding(self, tensor: Tensor) -> str:
        """How a tensor lies on the chips, in XLA's words."""
        ones = ",1" * (tensor.dim() - 1)
        return f"{{devices=[{self.count}{ones}]<=[{self.count}]}}" if tensor in self._cut else "{replicated}"

    def mark_results(self, results: Sequence[Tensor]) -> None:
        """Results lie as the argument does that they are written to, where that has values; outputs are whole."""
        for tensor in results:
            self._mark(tensor, tensor in self._cut)

    def _local(self, array: Tensor) -> Tensor:
        named = array.clone()  # another name of the argument, which must stay one
        self._mark(named, True)
        local: Tensor = _XLAC._spmd_full_to_shard_shape(named)
        return local

    def _mark(self, tensor: Tensor, cut: bool) -> None:
        spec = ("chips" if cut and not d else None for d in range(tensor.dim()))
        _XLAC._xla_annotate_custom_sharding(tensor, self._mesh.get_op_sharding(tuple(spec)))


def on_shapes(device: Device) -> Device:
    """The device on which modules become placeholders, and rows lie as a TPU lays them out."""

    def placed(make: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
        return lambda module: module._apply(make)  # type: ignore[no-untyped-call]

    if device.rows.chips is None:
        place = placed(placeholder)
        return replace(device, place=place, place_rows=place, send=placeholder, rows=device.planned)
    mesh = PlaceholderMesh()
    return replace(
        device,
        place=placed(placeholder),
        place_rows=placed(mesh.cut_placeholder),
        send=mesh.cut_placeholder,
        rows=replace(device.planned, chips=mesh),
    )


def trace(
    step: Callable[..., Any],
    name: str,
    args: Sequence[Any],
    modules: Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    rate: float | None = None,
    mesh: PlaceholderMesh | None = None,
) -> TracedStep:
    """Traces ``step(*args, rate=rate)``, which reads and writes placeholders; nothing is run.

    ``mesh``: that of a device of several chips.

    ``modules`` are all that the step calls, by name, ``state`` what no module holds. In the module that comes back, an
    operation's own name follows that of the innermost one at work: ``top.2/aten::addmm``, or in its backward
    ``top.2 backward/aten::mm``.
    """
    # Names of operations and their scopes go into the module.
    os.environ["XLA_HLO_DEBUG"] = "1"
    _XLAC._set_ir_debug(True)
    tensors = list(tensors_in(args))
    written: list[tuple[bytes, str]] = []

    def scoped_step(*args: Any, **rates: float) -> Any:
        with _scopes(modules):
            return step(*args, **rates)

    def write(results: list[Tensor]) -> None:
        if mesh:
            mesh.mark_results(results)
        written.append((xm.get_stablehlo_bytecode(results), plain_text(results)))

    rates = {} if rate is None else {"rate": rate}
    traced = RecordedStep(scoped_step, name).trace(args, tensors, rates, write)
    owners = {
        id(tensor): f"{label}.{key}".removeprefix(".")
        for label, module in modules.items()
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    owners |= {id(tensor): label for label, tensor in state.items()}
    arguments = []
    for source, constant in zip(traced.inputs, traced.constants, strict=True):
        tensor = tensors[source] if isinstance(source, int) else source
        label = (
            "batch" if isinstance(source, int) else "constant" if constant else owners.get(id(tensor), "other state")
        )
        donated = any(tensor is t for t in traced.written)
        sharding = mesh.sharding(tensor) if mesh else ""
        arguments.append(Argument(label, tuple(tensor.shape), tensor.dtype, donated, sharding))
    return TracedStep(*written[0], arguments)


def plain_text(results: list[Tensor]) -> str:
    """Pending tensors as StableHLO without names of operations, their places in source and running numbers."""
    lines = str(xm.get_stablehlo(results)).splitlines()
    program = (line for line in lines if re.search(r"stablehlo\.|func\.|return|call |\^bb|\}\)", line))
    # What is left of strings is shardings, and constants of many numbers, which are packed.
    return re.sub(r'("\{[^"]*"|dense<"[^"]*")|\.\d+\b|"[^"]*"|#loc.*|\[unknown\]', r"\1", "\n".join(program))


@contextmanager
def _scopes(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Names operations after the module at work: in forward by its hooks, in backward by those of its tensors.

    A `ComposedBag` works in turns, between which others do.
    """
    names = {id(module): name for name, module in modules.items()}
    scopes = _Scopes()
    instead: dict[tuple[nn.Module, str], Callable[..., Any]] = {}

    def enter(module: nn.Module, inputs: Any) -> None:
        if id(module) in names:
            scopes.enter(names[id(module)])
            _after_all([t for t in tensors_in(inputs) if t.requires_grad], partial(scopes.leave, backward(module)))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if id(module) in names:
            scopes.leave(names[id(module)])
            _before_any(
                [t for t in tensors_in([output]) if t.requires_grad], partial(scopes.enter_backward, backward(module))
            )

    def backward(module: nn.Module) -> str:
        return f"{names[id(module)]} backward"

    def in_turns(module: ComposedBag, compute: Callable[..., Computation], *args: Tensor) -> Computation:
        computation = compute(*args)
        found: list[Tensor] | None = None
        while True:
            try:
                wanted = scopes.inside(names[id(module)], computation.send, found)
            except StopIteration as end:
                out_BD: Tensor = end.value
                if out_BD.requires_grad:
                    _before_any([out_BD], partial(scopes.enter_backward, backward(module)))
                return out_BD
            found = yield wanted
            _after_all([t for t in found if t.requires_grad], partial(scopes.leave, backward(module)))

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    for name, module in modules.items():
        # What is called without the module: an optimizer's step, and what a bag says that it wants.
        if callable(step := getattr(module, "step", None)):
            instead[module, "step"] = partial(scopes.inside, name, step)
        if isinstance(module, RedirectedBag):
            instead[module, "redirect"] = partial(scopes.inside, name, module.redirect)
        elif isinstance(module, ComposedBag):
            instead[module, "compute"] = partial(in_turns, module, module.compute)
    for (module, attribute), call in instead.items():
        setattr(module, attribute, call)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, attribute in instead:
            delattr(module, attribute)


# Not `register_multi_grad_hook`, which keeps a leaf's gradient alive.
def _after_all(tensors: Sequence[Tensor], call: Callable[[], None]) -> None:
    left = len(tensors)

    def count(grad: Tensor) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            call()

    for tensor in tensors:
        tensor.register_hook(count)  # type: ignore[no-untyped-call]


def _before_any(tensors: Sequence[Tensor], call: Callable[[], None]) -> None:
    called = False

    def once(grad: Tensor) -> None:
        nonlocal called
        if not called:
            called = True
            call()

    for tensor in tensors:
        tensor.register_hook(once)  # type: ignore[no-untyped-call]


class _Scopes(threading.local):
    """The names at work in this thread (backward has its own), of which XLA's scope is the last."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._open: Any = None

    def enter(self, name: str) -> None:
        self._names.append(name)
        self._reopen()

    def enter_backward(self, name: str) -> None:
        if not self._names:
            # What needs no gradient for its inputs is never left; and what a thread opened it must close.
            torch.autograd.Variable._execution_engine.queue_callback(self.leave_all)
        self.enter(name)

    def leave_all(self) -> None:
        self._names.clear()
        self._reopen()

    def leave(self, name: str) -> None:
        if name in self._names:
            self._names.reverse()
            self._names.remove(name)
            self._names.reverse()
            self._reopen()

    def inside(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.enter(name)
        try:
            return function(*args, **kwargs)
        finally:
            self.leave(name)

    def _reopen(self) -> None:
        self._open = None  # closes it: it is open for as long as it lives
        if self._names:
            self._open = _XLAC.profiler.scope_pusher(self._names[-1])
