"""Steps on CUDA, recorded once as a CUDA graph and then run without Python.

A train step of a DLRM is some 250 kernels of a few microseconds each, and to queue them one by one takes a host several
times as long as a GPU takes to run them. A graph queues all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlrm_xla.errors import UserError
from dlrm_xla.host_rates import HostRates

# Calls that run as they are before a graph is recorded: what a step makes once it has then made, and a learning rate
# that still changes from step to step, as in warm-up and decay, is not recorded each time.
_PLAIN_CALLS = 3


class CapturedStep:
    """A step that becomes one CUDA graph once it was called a few times at one rate; until then it runs as it is.

    ``step(*args)`` or ``step(*args, rate=float)`` as for `dlrm_xla.xla_steps.RecordedStep`, whose rules about a step
    hold here too, though a number of the host that differs from call to call is not noticed, but for learning rates,
    for which it is recorded anew: what it reads and writes besides its arguments stays where it is, and it asks the
    device nothing. After something was put elsewhere call `forget`. Results are copies, so they outlive the next call.

    Raises UserError where the step cannot be recorded.
    """

    def __init__(self, step: Callable[..., Any], name: str) -> None:
        self._step = step
        self._name = name
        self._calls = 0
        self._kind: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Any = None
        self._host_rates: HostRates | None = None

    def forget(self) -> None:
        """Has the graph recorded anew."""
        self._calls, self._graph, self._inputs, self._output, self._host_rates = 0, None, [], None, None

    def __call__(self, *args: Any, **rate: float) -> Any:
        tensors = _leaves(args)
        kind = rate, [(t.shape, t.dtype) for t in tensors]
        if kind != self._kind or (self._host_rates and self._host_rates.changed()):
            self.forget()
            self._kind = kind
        if self._graph is None:
            if self._calls < _PLAIN_CALLS:
                self._calls += 1
                last = self._calls == _PLAIN_CALLS
                host_rates = HostRates() if last and not rate else None  # else the step sets them
                output = self._step(*args, **rate)
                if host_rates:
                    host_rates.keep_stepped()
                    self._host_rates = host_rates
                return output
            self._record(args, rate)
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        return _mapped(self._output, torch.clone)

    def _record(self, args: Any, rate: dict[str, float]) -> None:
        own = _mapped(args, torch.clone)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may pin memory for batches to come meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self._step(*own, **rate)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # which a recording that broke off leaves
            self._output = None
            # What ended the recording, which to end it then fails for too.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(cause, torch.OutOfMemoryError):
                advice = (
                    "A graph keeps memory of its own for a step: take a smaller --batch-size, or --cuda-graphs off."
                )
            else:
                advice = (
                    "Some module reads a device value on the host (.item(), an if on a tensor) or has shapes that "
                    "depend on the data; look at the plugins, or run with --cuda-graphs off."
                )
            said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise UserError(f"the {self._name} step cannot be recorded as a CUDA graph: {said}. {advice}") from error
        self._graph, self._inputs = graph, _leaves(own)


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _leaves(part)] if isinstance(value, tuple | list) else []


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
