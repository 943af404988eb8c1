"""Training over several chips by XLA's SPMD partitioner: large arrays of rows and batches are sharded, the rest copied.

What touches rows is written for one chip, as in `jax.shard_map`: left to itself the partitioner gathers whole lines
of packed rows on every chip, and brings the rows that an update reads to chips that do not keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn

if TYPE_CHECKING:
    from dlrm_xla.device import RowAccess

_XLAC = torch_xla._XLAC


class Mesh:
    """All chips of the job in one line; implements `dlrm_xla.device.Chips`."""

    def __init__(self) -> None:
        self.count: int = xr.global_runtime_device_count()
        self.hosts: int = xr.process_count()
        self._mesh = xs.Mesh(np.arange(self.count), (self.count,), ("chips",))
        of_hosts = f" of {self.hosts} hosts" if self.hosts > 1 else ""
        self.description = f"{self.count} chips{of_hosts} by SPMD: batches and large tables cut, the rest whole on each"
        self._numbers = self.send(torch.arange(self.count, dtype=torch.int32))

    def send(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the chips, cut along its first dimension; no chip ever holds it whole.

        Every host has the whole tensor, and sends what its own chips keep.
        """
        sent = tensor.to(torch_xla.device())
        xs.mark_sharding(sent, self._mesh, ("chips", *[None] * (tensor.dim() - 1)))
        return sent

    def place(self, module: nn.Module, sharded: bool) -> nn.Module:
        """Moves a module to the chips, its arrays cut along their first dimension or whole on each."""
        host = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        module.to_empty(device=torch_xla.device())
        for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            old = host.pop(name).detach()
            tensor.data = self.send(old) if sharded else old.to(torch_xla.device())
        return module

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Sets a tensor on the chips to one of the host; ``copy_`` would be an operation, and so a graph."""
        sent = values.to(tensor.dtype).to(torch_xla.device())
        sharding = _XLAC._get_xla_op_sharding(tensor)
        if sharding is not None:
            _XLAC._xla_mark_sharding(sent, sharding)
        tensor.data = sent

    def host_parts(self, array: Tensor, part_lines: Callable[[Tensor], int]) -> Iterator[Tensor]:
        """An array that `place` made, part by part on the host and in order: no graph, as reading it whole is.

        Of several hosts each is given all parts, by the one whose chips have them; so all must ask.
        """
        own = {}
        places = _XLAC._get_local_shard_replica_and_indices([array])[0]
        for (shard, _), (_, where) in zip(_XLAC._get_local_shards([array])[0], places, strict=True):
            own[_first_line(where)] = shard
        owners = {start: host for host, starts in enumerate(self._told(sorted(own))) for start in starts}
        height = len(array) // len(owners)
        for start, host in sorted(owners.items()):
            shard = own[start] if start in own else torch.empty((height, *array.shape[1:]), dtype=array.dtype)
            for part in torch.split(shard, part_lines(shard)):
                if self.hosts > 1:
                    dist.broadcast(part, host)
                yield part

    def _told(self, mine: list[int]) -> list[list[int]]:
        if self.hosts == 1:
            return [mine]
        told: list[Any] = [None] * self.hosts
        dist.all_gather_object(told, mine)
        return told

    def returning_whole(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step with its results whole on each chip: to read a cut one is another graph."""

        def whole(*args: Any, **rate: float) -> Any:
            output = step(*args, **rate)
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if tensor is not None:
                    xs.mark_sharding(tensor, self._mesh, (None,) * tensor.dim())
            return output

        return whole

    def summed(self, access: RowAccess, part: Callable[..., Tensor], array: Tensor, *others: Tensor) -> Tensor:
        """Sum over chips of ``part(access, array, *others)`` [B, ...], cut along B: a reduce-scatter."""
        partial_B = part(self._bound(access), self._local(array), *map(self._everywhere, others))
        groups = [list(range(self.count))]
        mine = _XLAC._xla_spmd_reduce_scatter("sum", partial_B, 1.0, 0, self.count, groups)
        return self._whole(mine, partial_B.shape)

    def updated(
        self, access: RowAccess, update: Callable[..., None], arrays: Sequence[Tensor], *others: Tensor
    ) -> None:
        """Runs ``update(access, arrays, *others)`` on each chip with its part of the arrays, which it writes to."""
        mine = [self._local(array) for array in arrays]
        update(self._bound(access), mine, *map(self._everywhere, others))
        for array, part in zip(arrays, mine, strict=True):
            array.copy_(self._whole(part, array.shape))

    def _bound(self, access: RowAccess) -> RowAccess:
        """Access to a chip's part by ids of the whole: others read as 0, and are left out where it is written."""
        chip = self._local(self._numbers)

        def within(array: Tensor, ids_N: Tensor, dim: int) -> tuple[Tensor, int]:
            held = len(array) * (1 if array.dim() == 1 else array.shape[1] // dim)
            return ids_N - chip * held, held

        def gather(array: Tensor, ids_N: Tensor, dim: int) -> Tensor:
            own_N, held = within(array, ids_N, dim)
            found = access.gather(array, own_N.clamp(0, held - 1), dim)
            inside_N = (own_N >= 0) & (own_N < held)
            return torch.where(inside_N if found.dim() == 1 else inside_N.unsqueeze(1), found, 0)

        def scatter(array: Tensor, ids_N: Tensor, values: Tensor, add: bool) -> None:
            dim = 1 if values.dim() == 1 else values.shape[1]
            access.scatter(array, within(array, ids_N, dim)[0], values, add)

        return replace(access, gather=gather, scatter=scatter, chips=None)

    def _local(self, array: Tensor) -> Tensor:
        spec = ("chips", *[None] * (array.dim() - 1))
        local: Tensor = xs.enable_manual_sharding(array, spec, mesh=self._mesh).global_tensor
        return local

    def _everywhere(self, tensor: Tensor) -> Tensor:
        # A clone, for the mark stays on what it was put on.
        spec = (None,) * tensor.dim()
        local: Tensor = xs.enable_manual_sharding(tensor.clone(), spec, mesh=self._mesh).global_tensor
        return local

    def _whole(self, part: Tensor, shape: Sequence[int]) -> Tensor:
        spec: Any = ("chips", *[None] * (part.dim() - 1))
        whole: Tensor = xs.disable_manual_sharding(part, spec, torch.Size(shape), mesh=self._mesh).global_tensor
        return whole


def _first_line(where: Any) -> int:
    """Of what torch_xla says of a shard's place, a slice for each dimension or an ellipsis for the whole."""
    return 0 if where is Ellipsis else int(where[0].start or 0)
