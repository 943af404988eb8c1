"""Steps on xla, recorded once and then run by the name of their graph.

torch_xla traces a step's operations anew each time it is called: 15 ms of Python for a DLRM of 26 exact tables, some
150 ms with tensor trains, where a TPU needs about one for the step itself. Here the graph's inputs are found at the
first call, and later calls hand XLA the buffers alone.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from dlrm_xla.errors import UserError
from dlrm_xla.host_rates import HostRates

_XLAC = torch_xla._XLAC
# Two rates at which a step is traced. What is proportional to them is no number that a step is likely to hold besides:
# torch_xla makes equal numbers one input, and at rate 1 a learning rate of 0.001 would also be Adam's 1 - 0.999. A
# power of two rounds nothing.
_RATE = 2.0**-41
_OTHER_RATE = 0.7071067811865476 * _RATE
# Tensors that only graphs have; equal ones of several traces may share a buffer.
_CONSTANTS = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Trace:
    """One traced step: what its graph reads and writes.

    ``inputs`` are in the graph's order, each a place in the arguments (int), a tensor that lives on, or a constant
    (a tensor that only the graph has). ``written`` and then ``outputs`` are the graph's results.
    """

    inputs: list[int | Tensor]
    constants: list[bool]
    written: list[Tensor]
    outputs: list[Tensor]
    single: bool
    graph: bytes


class RecordedStep:
    """A step as one XLA graph that is traced twice, compiled once and then run without tracing.

    ``step(*args)`` or ``step(*args, rate=float)`` takes tensors and tuples of tensors, and returns a tensor, a
    tuple of them or None.
    Whatever it writes to tensors that live on happens in place, in their own buffers. Numbers of Python in it must be
    the same at each call, or proportional to ``rate``; the two traces tell which is which, and refuse others.

    Raises UserError where the step is not one graph, and where a learning rate was changed that it would not see.
    """

    def __init__(self, step: Callable[..., Any], name: str) -> None:
        self._step = step
        self._name = name
        self._shapes: list[tuple[torch.Size, torch.dtype]] | None = None
        self._graph = b""
        self._inputs: list[int | Callable[[], Tensor | None]] = []
        self._written: list[weakref.ref[Tensor]] = []
        self._num_outputs, self._single = 0, False
        self._scaled: dict[int, tuple[float, torch.dtype]] = {}
        self._rate_inputs: tuple[float, dict[int, Tensor]] = (0.0, {})
        self._host_rates: HostRates | None = None

    def __call__(self, *args: Any, rate: float | None = None) -> Any:
        tensors = list(tensors_in(args))
        shapes = [(t.shape, t.dtype) for t in tensors]
        if self._shapes is None:
            self._record(args, tensors, rate)
            self._shapes = shapes
        elif shapes != self._shapes:
            raise UserError(
                f"the {self._name} step is not one XLA graph: it was recorded for arguments {_described(self._shapes)} "
                f"and now gets {_described(shapes)}. Give it batches of one shape and type: a shorter last one padded "
                "with weights and labels that count for nothing"
            )
        state = [ref() for ref in self._written]
        live = [source() for source in self._inputs if callable(source)]
        if any(t is None for t in (*state, *live)):
            # Something was replaced by another tensor since: the same graph with other buffers, so no second compile.
            self._record(args, tensors, rate)
            state = [ref() for ref in self._written]
            live = [source() for source in self._inputs if callable(source)]
        if self._host_rates and (changed := self._host_rates.changed()):
            raise UserError(
                f"the learning rate went from {changed}, which the {self._name} step, recorded before, does not see. "
                "Let it take a rate=, by which it multiplies the rates, and call it with one."
            )
        if any(_XLAC._check_tensor_need_materialization([*live, *tensors])):
            torch_xla.sync()
        scaled = self._at_rate(rate)
        inputs = [
            scaled[place] if place in scaled else tensors[source] if isinstance(source, int) else source()
            for place, source in enumerate(self._inputs)
        ]
        results = _XLAC._run_cached_graph(self._graph, inputs)
        assert len(results) == len(state) + self._num_outputs, "XLA left out equal results"
        for tensor, result in zip(state, results, strict=False):
            assert tensor is not None
            _take_over(tensor, result)
        outputs = results[len(state) :]
        return outputs[0] if self._single else tuple(outputs) or None

    def _record(self, args: Sequence[Any], tensors: list[Tensor], rate: float | None) -> None:
        rates = ({}, {}) if rate is None else ({"rate": _OTHER_RATE}, {"rate": _RATE})
        host_rates = HostRates()
        try:
            probe = self.trace(args, tensors, rates[0])
            for tensor in probe.written:
                _XLAC._set_buffer_donation(tensor, True)
            trace = self.trace(args, tensors, rates[1], _compile, probe.written)
        finally:
            host_rates.restore()  # which the step has set to multiples of the traces' rates
        self._scaled = self._proportional(probe, trace)
        self._rate_inputs = (0.0, {})
        self._inputs = [
            source if isinstance(source, int) else (lambda t: lambda: t)(source) if constant else weakref.ref(source)
            for source, constant in zip(trace.inputs, trace.constants, strict=True)
        ]
        self._written = [weakref.ref(t) for t in trace.written]
        self._num_outputs, self._single = len(trace.outputs), trace.single
        self._graph = trace.graph
        if rate is None:  # else the step sets them
            host_rates.keep_stepped()
            self._host_rates = host_rates

    def trace(
        self,
        args: Sequence[Any],
        tensors: list[Tensor],
        rate: dict[str, float],
        use: Callable[[list[Tensor]], None] = lambda results: None,
        order: Sequence[Tensor] = (),
    ) -> Trace:
        """Traces the step and takes back what it wrote, so that nothing has happened.

        ``use`` is given the results while they are still to be computed. ``order``: tensors that come first among those
        written, for XLA pairs results with buffers by their order.
        """
        torch_xla.sync()
        xm.wait_device_ops()
        live = _live_tensors()
        before = [torch.clone(t.detach()) for t in live]  # no copy: the buffer has two names
        kept = [t for t in live if t not in _CONSTANTS]
        owners: dict[int, int | Tensor] = dict(zip(_numbers(kept), kept, strict=True))
        owners |= {number: k for k, number in enumerate(_numbers(tensors))}
        try:
            _XLAC._set_current_graph_name(self._name)
            _XLAC._set_allow_execution(False)
            output = self._step(*args, **rate)
            _XLAC._set_allow_execution(True)
            outputs = list(tensors_in([output]))
            changed = _pending(live)
            written = [t for t in order if any(t is c for c in changed)]
            written += [t for t in changed if not any(t is w for w in written)]
            self._check_new(live, outputs)
            results = written + outputs
            if not results:
                raise UserError(f"the {self._name} step writes nothing and returns nothing")
            numbers, values = _XLAC._get_tensors_xla_device_data_node(results)
            with alias_with_buffer_donor_config():
                graph = _XLAC._get_graph_hash(results)
                use(results)
        except RuntimeError as error:
            raise UserError(
                f"the {self._name} step is not one XLA graph: {_first_line(error)}. Some module reads a device value "
                "on the host (.item(), an if on a tensor) or has shapes that depend on the data; look at the plugins."
            ) from error
        finally:
            _XLAC._set_allow_execution(True)
            _XLAC._set_current_graph_name("")
            for tensor, old in zip(live, before, strict=True):
                if _pending([tensor]):
                    _take_over(tensor, old)
            _XLAC._clear_pending_irs(str(torch_xla.device()))
        if torch_xla.runtime.is_spmd():
            numbers = _numbers(values)
        inputs = [owners.get(n, v) for n, v in zip(numbers, values, strict=True)]
        constants = [n not in owners for n in numbers]
        for value, constant in zip(values, constants, strict=True):
            if constant:
                _CONSTANTS[value] = None
        return Trace(inputs, constants, written, outputs, isinstance(output, Tensor), graph)

    def _check_new(self, live: list[Tensor], outputs: list[Tensor]) -> None:
        known = {id(t) for t in (*live, *outputs, *(t._base for t in outputs))}
        gc.collect()  # what only a cycle holds is not left
        new = [t for t in _pending(_live_tensors()) if id(t) not in known]
        if new:
            raise UserError(
                f"the {self._name} step leaves {len(new)} new tensors on the device, one of shape "
                f"{list(new[0].shape)}, where it must write to tensors that were there before (copy_). Set gradients "
                "to None at its end; look at the plugins."
            )

    def _proportional(self, probe: Trace, trace: Trace) -> dict[int, tuple[float, torch.dtype]]:
        """The constants that follow the rate, by their place: their values at rate 1, and their types."""
        if probe.constants != trace.constants or not _same(probe.written, trace.written):
            raise UserError(f"the {self._name} step is not one XLA graph: its second trace is another one")
        scaled = {}
        for place, (first, second, constant) in enumerate(
            zip(probe.inputs, trace.inputs, trace.constants, strict=True)
        ):
            if not constant or isinstance(first, int) or isinstance(second, int):
                continue
            was, now = first.cpu(), second.cpu()
            if torch.equal(was, now):
                continue
            if now.numel() != 1 or not torch.allclose(was, now * (_OTHER_RATE / _RATE), rtol=1e-5, atol=0):
                raise UserError(
                    f"the {self._name} step reads a number of the host that differs from call to call "
                    f"({was.flatten()[0]}, then {now.flatten()[0]}). Keep it in a tensor on the device, as a buffer; "
                    "look at the plugins."
                )
            scaled[place] = now.item() / _RATE, now.dtype
        return scaled

    def _at_rate(self, rate: float | None) -> dict[int, Tensor]:
        if rate is None or not self._scaled:
            return {}
        if self._rate_inputs[0] != rate or not self._rate_inputs[1]:
            device = torch_xla.device()
            self._rate_inputs = (
                rate,
                {p: torch.tensor(v * rate, dtype=kind).to(device) for p, (v, kind) in self._scaled.items()},
            )
            for tensor in self._rate_inputs[1].values():
                _CONSTANTS[tensor] = None
        return self._rate_inputs[1]


def _compile(results: list[Tensor]) -> None:
    _XLAC._xla_warm_up_cache(results, [])


def _numbers(tensors: list[Tensor]) -> list[int]:
    """What tells tensors apart as inputs of a graph.

    Under SPMD the number that a graph has of an input is that of whichever tensor had its buffer when it was last
    traced, so the buffers are compared. On one device equal numbers without a dimension share a buffer.
    """
    if torch_xla.runtime.is_spmd():
        return list(_XLAC._get_tensors_handle(tensors))
    return [_XLAC._xla_get_tensor_id(t) for t in tensors]


@torch.no_grad()
def _take_over(tensor: Tensor, other: Tensor) -> None:
    """Gives a tensor another's buffer, without an operation."""
    if torch_xla.runtime.is_spmd():
        tensor.data = other  # there a copy is an operation, which marks the sharding again
    else:
        tensor.copy_(other)


def _live_tensors() -> list[Tensor]:
    # Whatever a step wrote, some Python object has it; to ask each module and optimizer would be to forget one.
    live = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and _is_on_xla(t)]
    return sorted(live, key=_XLAC._xla_get_tensor_id)  # gc's order changes


def _is_on_xla(tensor: Tensor) -> bool:
    try:
        return tensor.device.type == "xla"
    except RuntimeError:  # a cycle held it and a view outlives it: torch has cleared it, and gc still has it
        return False


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _pending(tensors: list[Tensor]) -> list[Tensor]:
    """Those whose value is still to be computed."""
    needs = _XLAC._check_tensor_need_materialization(tensors)
    return [t for t, need in zip(tensors, needs, strict=True) if need]


def tensors_in(args: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple | list):
            yield from tensors_in(arg)


def _described(shapes: list[tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in shapes)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
