"""Opens devices, the CPU and CUDA here; with host.py and the files xla_*.py what asks which device it is.

A new backend is a function that gives a `dlrm_xla.device.Device`, and one line in `_OPENERS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from dlrm_xla.device import HOST_GENERATOR, Counters, Device, RowAccess, as_it_is, machine_memory, parts, write
from dlrm_xla.errors import UserError, choices
from dlrm_xla.torch_tpu import open_torch_tpu
from dlrm_xla.xla_device import job_of_hosts, open_xla


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


def _cpu() -> Device:
    threads = torch.get_num_threads()
    description = f"CPU, {threads} thread{'s' * (threads > 1)}"
    device = torch.device("cpu")
    rows = RowAccess("a CPU", _gather, _scatter, _sum_rows, adds_duplicates=True, files=True)
    memory = machine_memory()
    return Device(
        "cpu",
        device,
        description,
        lambda m: m,
        as_it_is,
        lambda: None,
        Counters,
        rows,
        rows,
        memory,
        parts,
        HOST_GENERATOR,
        lambda m: m,
        lambda t: t,
        write,
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


def take_own_gpu() -> None:
    """Makes the GPU of this rank's number on its host, LOCAL_RANK, the one that this process works on.

    Before anything else asks for one, for every rank would then have the first. Does nothing without torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    _check_cuda()
    local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"LOCAL_RANK {local_rank}: each rank needs a GPU of its own, and this host shows {count}. Start as many "
            "ranks as there are (torchrun --nproc-per-node gpu), and look at CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(local_rank)


def _check_cuda() -> None:
    if not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver was found"
        )
        raise UserError(f"--device cuda: {built}. Check nvidia-smi and the torch build, or use --device cpu or xla.")


def _cuda() -> Device:
    _check_cuda()
    description = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    device = torch.device("cuda", torch.cuda.current_device())
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
        CapturedStep if rows.update_rows else as_it_is,
        torch.cuda.synchronize,
        Counters,
        rows,
        rows,
        0.9 * torch.cuda.get_device_properties(device).total_memory,
        parts,
        {**HOST_GENERATOR, "cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state)},
        lambda m: m.to(device),
        lambda t: t.to(device, non_blocking=True),
        write,
        loud,
        capturable=True,
        optional_graphs=rows.update_rows is not None,
        pinned=True,
    )


_OPENERS: dict[str, Callable[[], Device]] = {"cpu": _cpu, "cuda": _cuda, "xla": open_xla, "tpu": open_torch_tpu}
