"""Devices, and with host.py what asks which it is; with the files xla_*.py all that imports torch_xla.

A new backend is one new function here and one line in `_OPENERS`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dlrm_xla.errors import UserError, choices
from dlrm_xla.ids import divide_ids, filled, places

Step = Callable[..., Any]
# Bytes of an array that are on the host at a time while it is read.
_PART_BYTES = 2**26
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_HOST_GENERATOR = {"host": (torch.get_rng_state, torch.set_rng_state)}


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


def open_device(name: str, hosts: bool = False) -> Device:
    """Opens "cpu", "cuda", "xla" or "tpu"; a UserError says what is missing.

    ``hosts``: the caller keeps step with those of the other hosts (`job_of_hosts`); refused otherwise where there are.
    """
    if name not in _OPENERS:
        raise UserError(f"there is no device {name!r}; {choices(name, _OPENERS)}")
    if not hosts and (job := job_of_hosts(name)):
        raise UserError(
            f"--device {name}: the chips of {job['WORLD_SIZE']} hosts are one device here, and only training runs on "
            "several hosts. Run this on one host with chips of its own, or with --device cpu."
        )
    return _OPENERS[name]()


def open_xla_first() -> bool:
    """Opens the xla device where torch_xla is installed; opened after the process's first backward, it fails.

    For test processes that use several devices. Returns whether it is installed.
    """
    if importlib.util.find_spec("torch_xla") is None:
        return False
    # By default 0 and 1 become constants of the graph, so a learning rate passing through 1.0 would compile again.
    os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
    # XLA warns at every partitioned compile that its partitioner has a successor, which torch_xla 2.9 does not use.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies' deprecations
        logging.disable(logging.WARNING)  # it says where it runs; `Device.loud` says so louder
        try:
            torch_xla = importlib.import_module("torch_xla")
            runtime = importlib.import_module("torch_xla.runtime")
            if runtime.global_runtime_device_count() > 1:
                runtime.use_spmd()
            torch_xla.device()
        finally:
            logging.disable(logging.NOTSET)
    return True


def job_of_hosts(name: str) -> dict[str, str]:
    """Where this process stands among the hosts whose chips the device joins, in torchrun's variables.

    Empty where there is one host. A process of each host must make the same calls in the same order, for they run one
    program.
    """
    if name != "xla" or not open_xla_first():
        return {}
    import torch_xla.runtime

    if torch_xla.runtime.process_count() == 1:
        return {}
    address = os.environ.get("MASTER_ADDR") or torch_xla.runtime.get_master_ip()
    return {
        "RANK": str(torch_xla.runtime.process_index()),
        "WORLD_SIZE": str(torch_xla.runtime.process_count()),
        "MASTER_ADDR": address,
        "MASTER_PORT": os.environ.get("MASTER_PORT", "29500"),
    }


def _as_it_is(step: Step, name: str) -> Step:
    return step


@torch.no_grad()
def _write(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)


def _gather(array: Tensor, ids_N: Tensor, dim: int) -> Tensor:
    return (array if array.dim() == 1 else array.view(-1, dim)).index_select(0, ids_N)


def _sum_rows(rows: Tensor, ids_N: Tensor, starts_G: Tensor, weights_N: Tensor) -> Tensor:
    starts_G = starts_G.to(ids_N.dtype)
    sums: Tensor = torch.nn.functional.embedding_bag(ids_N, rows, starts_G, mode="sum", per_sample_weights=weights_N)
    return sums


def _scatter(array: Tensor, ids_N: Tensor, values: Tensor, add: bool) -> None:
    rows = array.view(-1, *values.shape[1:])
    # torch's CPU kernel for int64 ids runs in parallel, that for int32 does not: 2 against 12 ms for 53,248 rows of 16.
    ids_N = ids_N.long()
    (rows.index_add_ if add else rows.index_copy_)(0, ids_N, values.to(array.dtype))


def _part_lines(array: Tensor) -> int:
    return max(1, _PART_BYTES * len(array) // max(1, array.numel() * array.element_size()))


def _parts(array: Tensor) -> Iterator[Tensor]:
    for part in torch.split(array, _part_lines(array)):
        yield part.to("cpu")


def _xla_parts(array: Tensor) -> Iterator[Tensor]:
    lines = _part_lines(array)
    if lines >= len(array):
        yield array.cpu()
        return
    for first in range(0, len(array), lines):
        # By index, for a slice at another place is another graph.
        at = torch.arange(first, first + lines, dtype=torch.int32).clamp(max=len(array) - 1)
        yield array.index_select(0, at.to(array.device)).cpu()[: len(array) - first]


def _cpu() -> Device:
    description = f"CPU, {torch.get_num_threads()} threads"
    device = torch.device("cpu")
    rows = RowAccess("a CPU", _gather, _scatter, _sum_rows, adds_duplicates=True, files=True)
    memory = machine_memory()
    return Device(
        "cpu",
        device,
        description,
        lambda m: m,
        _as_it_is,
        lambda: None,
        Counters,
        rows,
        rows,
        memory,
        _parts,
        _HOST_GENERATOR,
        lambda m: m,
        lambda t: t,
        _write,
        slow_bf16=_slow_bf16(),
    )


def _slow_bf16() -> str:
    # Not a public operation, so it may be gone one day; a hint is not worth a failure.
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    if torch.backends.mkldnn.is_available() and supported():  # type: ignore[no-untyped-call]
        return ""
    return (
        "THIS CPU HAS NO FAST PRODUCTS IN BF16: --precision bf16 makes a step many times slower here (1,434 ms instead "
        "of 60 on an AMD EPYC without AVX-512). Give --precision fp32 on this machine."
    )


def machine_memory() -> float:
    """Bytes of this machine's memory but for a tenth, which is for everything else."""
    return 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cuda() -> Device:
    if not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver was found"
        )
        raise UserError(f"--device cuda: {built}. Check nvidia-smi and the torch build, or use --device cpu or xla.")
    description = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    device = torch.device("cuda")
    from dlrm_xla.cuda_steps import CapturedStep

    rows = RowAccess("a GPU", _gather, _scatter, _sum_rows)
    loud = ""
    try:
        from dlrm_xla import cuda_rows as kernels

        # Triton compiles with the C compiler of the machine, which may not be there.
        kernels.gather_rows(torch.zeros(1, 1, device=device), torch.zeros(1, dtype=torch.int32, device=device), 1)
        rows = RowAccess("a GPU", kernels.gather_rows, _scatter, kernels.sum_rows, kernels.update_rows)
    except Exception as error:  # whatever keeps Triton from running, torch's operations do
        loud = (
            f"Triton does not run ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}), so torch's own "
            "operations look rows up and update them, at several times the bytes. Install triton in the version that "
            "this torch asks for, and a C compiler with Python's headers. Steps are not recorded as CUDA graphs then, "
            "for these operations ask how many ids differ"
        )
    return Device(
        "cuda",
        device,
        description,
        lambda m: m.to(device),
        CapturedStep if rows.update_rows else _as_it_is,
        torch.cuda.synchronize,
        Counters,
        rows,
        rows,
        0.9 * torch.cuda.get_device_properties(device).total_memory,
        _parts,
        {**_HOST_GENERATOR, "cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state)},
        lambda m: m.to(device),
        lambda t: t.to(device, non_blocking=True),
        _write,
        loud,
        capturable=True,
        optional_graphs=rows.update_rows is not None,
        pinned=True,
    )


def _xla() -> Device:
    if not open_xla_first():
        raise UserError(
            "--device xla needs torch_xla, which is not installed: pip install -e '.[xla]' "
            "(torch_xla 2.9.0 goes with torch 2.9.0), or use --device cpu."
        )
    import torch_xla
    import torch_xla.core.xla_model
    import torch_xla.debug.metrics as metrics
    import torch_xla.runtime

    from dlrm_xla import xla_rows
    from dlrm_xla.xla_spmd import Mesh
    from dlrm_xla.xla_steps import RecordedStep

    device = torch_xla.device()
    kind = torch_xla.runtime.device_type()
    loud = ""
    if kind == "CPU":
        loud = "XLA FOUND NO TPU: this run uses XLA's CPU backend. Results hold; times say nothing about a TPU."

    def place(module: nn.Module) -> nn.Module:
        host = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
        module.to_empty(device=device)
        # A view of a parameter is traced differently once the parameter was written in place, which every step does.
        # Written once before the first step, the first graph is that of all steps. Into empty ones, for no second copy
        # of a large table is made on the way: 50,000,000 rows of 16 took 5 s and 7.0 GB instead of 15 s and 11.6 GB.
        with torch.no_grad():
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
                tensor.copy_(host.pop(name))
        return module

    def send(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    chips = Mesh() if torch_xla.runtime.is_spmd() else None

    def synchronize() -> None:
        # A sync waits for the graph that it sends off; a compiled step has sent its own.
        torch_xla.core.xla_model.wait_device_ops()

    def counters() -> Counters:
        data = metrics.metric_data("CompileTime")
        names = [n for n in metrics.counter_names() if n.startswith("aten::")]
        return Counters(data[0] if data else 0, {n: int(metrics.counter_value(n)) for n in names})

    tpu = RowAccess(
        "a TPU",
        xla_rows.gather,
        xla_rows.scatter,
        bits=xla_rows.bits,
        static_shapes=True,
        lanes=128,
        rounds_matmul=True,
        near_bytes=_near_bytes(chips.count if chips else 1),
        codebook_rows=16_384,
        chips=chips,
    )
    rows, memory = tpu, 0.0
    compile: Callable[[Step, str], Step] = RecordedStep
    if kind == "CPU":
        compile = _in_memory_kept(RecordedStep)
        rows = replace(tpu, description="XLA's CPU backend", lanes=0, rounds_matmul=False)
        rows = replace(rows, near_bytes=0, codebook_rows=0)
        memory = machine_memory()
    else:
        memory = _chip_memory(lambda: torch_xla.core.xla_model.get_memory_info(device)["bytes_limit"])
    return Device(
        "xla",
        device,
        f"XLA on {kind}" if chips is None else f"XLA on {kind}, {chips.description}",
        place if chips is None else partial(chips.place, sharded=False),
        compile if chips is None else lambda step, name: compile(chips.returning_whole(step), name),
        synchronize,
        counters,
        rows,
        tpu,
        memory,
        _xla_parts if chips is None else partial(chips.host_parts, part_lines=_part_lines),
        _HOST_GENERATOR,
        place if chips is None else partial(chips.place, sharded=True),
        send if chips is None else chips.send,
        _write if chips is None else chips.write,
        loud,
        capturable=True,
    )


def _near_bytes(chips: int) -> int:
    """What small tables may take of the memory on so many TPU chips (docs/tpu.md, 4).

    None of more than eight: a part of large tables is then small enough for the compiler to stream it in order of ids.
    """
    return 40_000_000 * chips if chips <= 8 else 0


def _tpu() -> Device:
    """One TPU chip by Google's torch_tpu, for torch 2.11 to 2.15: a step's operations run one by one."""
    if importlib.util.find_spec("torch_tpu") is None:
        raise UserError(
            "--device tpu needs torch_tpu, which is not installed: on a TPU host, pip install torch_tpu in an "
            "environment without the extras xla and distributed, for they pin torch 2.9.0 and it takes torch 2.11 to "
            "2.15. Or use --device xla."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tcmalloc is not preloaded, that its device names are experimental
            importlib.import_module("torch_tpu")
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            if accelerator is None or accelerator.type != "tpu":
                raise UserError(
                    "--device tpu: torch_tpu is installed, but it finds no TPU here. Run on a TPU host, and let no "
                    "other process hold the chip; or use --device cpu."
                )
            found = torch.tpu.get_device_properties()  # type: ignore[attr-defined]
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"--device tpu: torch_tpu does not open with torch {torch.__version__}: {error}. It takes torch 2.11 to "
            "2.15, in an environment without torch_xla."
        ) from error
    device = torch.device("tpu")
    return Device(
        "tpu",
        device,
        f"{found.name} by torch_tpu, one chip",
        lambda m: m.to(device),
        _as_it_is,
        torch.accelerator.synchronize,
        Counters,
        _TORCH_TPU_ROWS,
        _TORCH_TPU_ROWS,
        0.9 * found.total_memory,
        _parts,
        _HOST_GENERATOR,
        lambda m: m.to(device),
        lambda t: t.to(device, non_blocking=True),
        _write,
        capturable=True,
    )


def _chip_memory(read: Callable[[], int]) -> float:
    try:
        return 0.9 * read()
    except RuntimeError:  # torch_xla does not tell it of the device that stands for all chips under SPMD
        return math.inf


def _in_memory_kept(compile: Callable[[Step, str], Step]) -> Callable[[Step, str], Step]:
    """From the first step on, the C library keeps freed memory for the next one.

    XLA's CPU backend asks for a step's temporary memory anew each time, and the system hands it out in cleared pages:
    8,923 page faults, 22 of 133 ms of processor time a step of the kaggle preset. Not before, for tables that have
    moved into a stack should leave memory.
    """

    def compiled(step: Step, name: str) -> Step:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # glibc
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        return compile(step, name)

    return compiled


def _line_gather(array: Tensor, ids_N: Tensor, dim: int) -> Tensor:
    pack = 1 if array.dim() == 1 else array.shape[1] // dim
    if pack == 1:
        rows_NW = array.index_select(0, ids_N)
        return rows_NW if array.dim() == 1 else rows_NW[:, :dim]
    lines_NPD = array.index_select(0, divide_ids(ids_N, pack))[:, : pack * dim].view(-1, pack, dim)
    return torch.where(places(ids_N % pack, pack).unsqueeze(2), lines_NPD, 0).sum(1)


def _lines(values_ND: Tensor, place_N: Tensor, pack: int) -> Tensor:
    """Rows at their places in lines that are zero beside them, [N, pack D]."""
    return torch.where(places(place_N, pack).unsqueeze(2), values_ND.unsqueeze(1), 0).view(len(values_ND), -1)


def _line_scatter(array: Tensor, ids_N: Tensor, values: Tensor, add: bool) -> None:
    """Adds whole lines in torch's own operations; static shapes, so what is past the end becomes a sum with zero."""
    if array.dtype != torch.float32:
        raise UserError(f"rows and states are float32 on --device tpu, not {array.dtype}: row_precision, row_state")
    dim = values.shape[1] if values.dim() > 1 else 1
    pack = array.numel() // len(array) // dim
    inside_N = ids_N < len(array) * pack
    ids_N = ids_N.clamp(max=len(array) * pack - 1)
    if not add:  # a line may hold several of the rows, so what is added is the change
        values = values - _line_gather(array, ids_N, dim)
    values = torch.where(inside_N if values.dim() == 1 else inside_N.unsqueeze(1), values, 0)
    if pack > 1:
        values = _lines(values, ids_N % pack, pack)
    array.index_add_(0, divide_ids(ids_N, pack) if pack > 1 else ids_N, filled(values, array))


_TORCH_TPU_ROWS = RowAccess("a TPU", _line_gather, _line_scatter, static_shapes=True, lanes=128, rounds_matmul=True)


_OPENERS: dict[str, Callable[[], Device]] = {"cpu": _cpu, "cuda": _cuda, "xla": _xla, "tpu": _tpu}
