"""What a training loop, and what reads and writes rows, need of a device; each has its opener in devices.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Step = Callable[..., Any]
HOST_GENERATOR = {"host": (torch.get_rng_state, torch.set_rng_state)}
# Bytes of an array that are on the host at a time while it is read.
_PART_BYTES = 2**26


@dataclass(frozen=True)
class Counters:
    """Since the process began: graphs compiled, and operations run on the CPU instead, by name."""

    compiles: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


@runtime_checkable
class Forgetful(Protocol):
    """A compiled step that holds on to places in memory."""

    def forget(self) -> None:
        """Has it find them anew, after a tensor was put elsewhere."""


class Chips(Protocol):
    """Several chips that share large arrays of rows and the batch.

    Ids in what is passed to ``summed`` and ``updated`` are those of the whole array.
    """

    count: int

    def summed(self, access: RowAccess, part: Callable[..., Tensor], array: Tensor, *others: Tensor) -> Tensor:
        """Sum over chips of ``part(access, array, *others)`` [B, ...], each with its part of the array."""

    def updated(
        self, access: RowAccess, update: Callable[..., None], arrays: Sequence[Tensor], *others: Tensor
    ) -> None:
        """Runs ``update(access, arrays, *others)`` on each chip with its part of the arrays, which it writes to."""


@dataclass(frozen=True)
class RowAccess:
    """How a device reads and writes rows of large arrays, and what it makes of their layout.

    An array is [R] with one value per id, or [lines, width] with rows as `dlrm_xla.rows.RowStack` packs them.
    ``gather(array, ids_N, dim)`` gives [N, dim], or [N] of an array [R]. ``scatter(array, ids_N, values, add)`` works
    in place; where it does not add, ids must rise and differ. ``static_shapes``: no shape may depend on data, and a
    scatter leaves out ids past the array's end. ``adds_duplicates``: one that adds may have equal ids, and adds to
    each row in one order. ``sum_rows(rows, ids_N, starts_G, weights_N)`` gives the weighted sums [G, dim] of the rows
    of each group of neighbouring ids without laying the rows side by side, where the device can.
    ``update_rows``, where there is one, does an optimizer's whole work on rows looked up, as
    `dlrm_xla.cuda_rows.update_rows`.
    ``bits(tensor, type)`` reads bits as another type of the same size. ``lanes``: what the last dimension is padded to,
    0 for nothing. ``rounds_matmul``: matrix products cut bits off float32 factors. ``files``: arrays may be files
    mapped into memory. Tables of up to ``matmul_rows``, then up to ``dense_rows`` rows, are placed so where nothing
    else was asked for. ``near_bytes``: the smallest tables, up to so many bytes in all, are arrays apart from the
    others, for there is memory near the processor that a compiler keeps them in. ``codebook_rows``: arrays of a plugin
    of up to so many rows are multiplied with one-hot ids (`dlrm_xla.codebooks`), of twice as many where ids are few.
    ``chips`` share arrays of sparse placement, where there are several.
    """

    description: str
    gather: Callable[[Tensor, Tensor, int], Tensor]
    scatter: Callable[[Tensor, Tensor, Tensor, bool], None]
    sum_rows: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    update_rows: Callable[..., Tensor] | None = None
    bits: Callable[[Tensor, torch.dtype], Tensor] = torch.Tensor.view
    static_shapes: bool = False
    adds_duplicates: bool = False
    lanes: int = 0
    rounds_matmul: bool = False
    files: bool = False
    matmul_rows: int = 0
    dense_rows: int = 0
    near_bytes: int = 0
    codebook_rows: int = 0
    chips: Chips | None = None

    @property
    def num_chips(self) -> int:
        """Over how many chips arrays of sparse placement are cut."""
        return self.chips.count if self.chips else 1

    def summed(self, part: Callable[..., Tensor], array: Tensor, *others: Tensor) -> Tensor:
        """``part(access, array, *others)``, which adds up over parts of the array; result and others are not cut."""
        return self.chips.summed(self, part, array, *others) if self.chips else part(self, array, *others)

    def updated(self, update: Callable[..., None], arrays: Sequence[Tensor], *others: Tensor) -> None:
        """``update(access, arrays, *others)``, which writes to the arrays."""
        if self.chips:
            self.chips.updated(self, update, arrays, *others)
        else:
            update(self, arrays, *others)


@dataclass(frozen=True)
class Device:
    """What a training loop needs of a device.

    ``place(module)`` moves a module there, ``place_rows(module)`` one of whose arrays each chip keeps a part,
    ``send(tensor)`` a part of a batch; ``write(tensor, values)`` sets a tensor there to one of the host.
    ``compile(step, name)`` makes a step run as the device runs it best: as `dlrm_xla.xla_steps.RecordedStep` on xla,
    whose rules about a step hold for all; ``optional_graphs``: a step runs without that too.
    ``synchronize()`` waits for queued work, ``counters()`` reads the counts
    above, ``loud`` is a line that the user must not miss, ``slow_bf16`` one for those who ask for products in bf16.
    ``capturable``: an optimizer must keep its step counts on the device. ``pinned``: batches come faster out of pinned
    memory.

    ``rows`` is how rows are read and written here, ``planned`` the layout that a plan tells: that of a TPU for xla,
    whatever it runs on. ``memory``: bytes for tables and their training. ``host_parts(array)`` gives an array's lines
    on the host, part by part; ``random_states`` are its generators, each a pair of functions that get and set a state.
    """

    name: str
    torch_device: torch.device
    description: str
    place: Callable[[nn.Module], nn.Module]
    compile: Callable[[Step, str], Step]
    synchronize: Callable[[], None]
    counters: Callable[[], Counters]
    rows: RowAccess
    planned: RowAccess
    memory: float
    host_parts: Callable[[Tensor], Iterator[Tensor]]
    random_states: Mapping[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]
    place_rows: Callable[[nn.Module], nn.Module]
    send: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], None]
    loud: str = ""
    slow_bf16: str = ""
    capturable: bool = False
    optional_graphs: bool = False
    pinned: bool = False


def as_it_is(step: Step, name: str) -> Step:
    return step


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)


def part_lines(array: Tensor) -> int:
    return max(1, _PART_BYTES * len(array) // max(1, array.numel() * array.element_size()))


def parts(array: Tensor) -> Iterator[Tensor]:
    for part in torch.split(array, part_lines(array)):
        yield part.to("cpu")


def machine_memory() -> float:
    """Bytes of this machine's memory but for a tenth, which is for everything else."""
    return 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
