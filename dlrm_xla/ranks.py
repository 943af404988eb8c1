"""The ranks of one job: what they tell one another, and how a lost one is found.

A process that torchrun did not start is alone, and everything here is then a plain answer. Figures that the host needs
go through gloo on every device; TorchRec's own exchanges go through nccl on CUDA.
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from dlrm_xla.errors import UserError

_T = TypeVar("_T")
_BEAT = 1.0
# What a collective, or torch's own look into the store, may take: in a rank that is slower than others by minutes, as
# where it saves more than they do, nothing is wrong, and of one that is lost the watch hears.
_LONG = timedelta(days=7)


class Ranks:
    """Rank ``rank`` of ``size`` processes, and here the only one."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this one speaks, and writes the run folder."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """Which part of every batch this one reads, and of how many; what was learned from them is put together."""
        return 0, 1

    def agree(self, samples: int, *asked: bool) -> tuple[int, ...]:
        """Samples of the whole batch, and of each question whether any rank asked it."""
        return samples, *asked

    def add(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        return tensor

    def copy_first(self, tensor: Tensor) -> None:
        """Gives a tensor of the host the first rank's values."""

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What the first rank makes; the others wait for it, however long it takes."""
        return make()

    def in_turn(self, make: Callable[[], _T]) -> _T:
        """What every rank makes, the first of each host before the others there."""
        return make()

    def tell(self, name: str, value: _T) -> list[_T]:
        """Every rank's value."""
        return [value]

    def joined(self, parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Batches one behind the other, each put together from every rank's part of it."""
        return np.concatenate(parts)

    def wait(self) -> None:
        """Goes on once every rank is here."""

    def remember(self, folder: Path) -> None:
        """Leaves the name of this job's run folder to the processes that torchrun starts in the place of lost ones."""

    def remembered(self) -> Path | None:
        """The run folder that this job had made before torchrun started it again; None the first time."""
        return None

    def failed(self, error: BaseException) -> str:
        """Tells the others why this rank stops; what to print about it."""
        return f"error: {error}"

    def end(self, code: int) -> int:
        """Ends a process that failed; alone it only returns its exit code."""
        return code

    def leave(self) -> None:
        """Ends the exchange with the others."""


ALONE = Ranks()


class TorchrunRank(Ranks):
    """A process that torchrun started, and the only one: it has no others, but what was before it.

    Its store, and so that of `TorchrunRanks`, is torchrun's, which lives as long as the job and no longer.
    """

    def __init__(self, patience: float, environment: Mapping[str, str] = os.environ) -> None:
        self.rank, self.size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.patience = patience
        self._environment = environment
        self._of_job = self._open_store()

    def _open_store(self) -> Any:
        address, port = self._environment["MASTER_ADDR"], self._environment["MASTER_PORT"]
        hosted = self._environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = TCPStore(
                address,
                int(port),
                world_size=self.size,
                is_master=self.rank == 0 and not hosted,
                timeout=timedelta(seconds=self.patience),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"rank {self.rank} cannot reach {address}:{port}: {_line(error)}. Start every rank with torchrun, and "
                "look at host and port."
            ) from error
        store.set_timeout(_LONG)
        return PrefixStore("dlrm_xla", store)

    def remember(self, folder: Path) -> None:
        self._of_job.set("folder", str(folder.absolute()))

    def remembered(self) -> Path | None:
        return Path(self._of_job.get("folder").decode()) if self._of_job.check(["folder"]) else None


class TorchrunRanks(TorchrunRank):
    """A process that torchrun started among several.

    Every rank writes a sign of life to torchrun's store once a second. Whoever finds that one has given none for
    ``patience`` seconds says which, and ends: also where it waits for a collective, which would never come back.
    """

    def __init__(self, patience: float, environment: Mapping[str, str] = os.environ) -> None:
        super().__init__(patience, environment)
        self.local_rank = int(environment.get("LOCAL_RANK", 0))
        self._counts: dict[str, int] = {}
        start = self._meet()
        self.store: Any = PrefixStore(start, self._of_job)
        # A thread may not use the store's connection while another waits on it.
        self._watch = _Watch(self, PrefixStore(start, self._open_store()))
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore("torch", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=_LONG,
            )
        except RuntimeError as error:
            told = UserError(
                f"rank {self.rank} cannot connect to the others: {self._watch.verdict() or _line(error)}. Look at the "
                "network between the hosts; GLOO_SOCKET_IFNAME names the interface to take."
            )
            self.failed(told)
            raise told from error

    def _meet(self) -> str:
        """Waits until all ranks are here; a name for this start of the job.

        What the processes of an earlier start wrote is still in the store, and torchrun's count of restarts does not
        tell them apart: only the agent of the host where a process failed counts one. So the first rank makes a name,
        every rank signs under the newest that it sees, and goes on under the one whose list has its own signature.
        """
        store, mine = self._of_job, secrets.token_hex(8)
        if self.first:
            store.set("start", mine)
        deadline = time.monotonic() + self.patience
        while True:
            missing = [0]
            if store.check(["start"]):
                start: str = store.get("start").decode()
                signatures = [f"{start}/here/{k}" for k in range(self.size)]
                store.set(signatures[self.rank], mine)
                if self.first and store.check(signatures):
                    store.set(f"{start}/all", pickle.dumps([store.get(key).decode() for key in signatures]))
                if store.check([f"{start}/all"]) and mine in pickle.loads(store.get(f"{start}/all")):
                    return start
                missing = [k for k, key in enumerate(signatures) if not store.check([key])] or missing
            if time.monotonic() > deadline:
                raise UserError(
                    f"{_named(missing)} of {self.size} did not start within {self.patience:g} s. Look at the output of "
                    "that process and its host; rank_patience sets the seconds."
                )
            time.sleep(0.2)

    @property
    def part(self) -> tuple[int, int]:
        return self.rank, self.size

    def agree(self, samples: int, *asked: bool) -> tuple[int, ...]:
        sums = torch.tensor((samples, *asked), dtype=torch.int64)
        dist.all_reduce(sums)
        return tuple(sums.tolist())

    def add(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return self.add(tensor.clone()) / self.size

    def copy_first(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, 0)

    def from_first(self, make: Callable[[], _T]) -> _T:
        key = self._key("first")
        if self.first:
            made = make()
            self.store.set(key, pickle.dumps(made))
            return made
        while not self.store.check([key]):  # no time-out: the watch knows whether the first is alive
            time.sleep(0.1)
        result: _T = pickle.loads(self.store.get(key))
        return result

    def in_turn(self, make: Callable[[], _T]) -> _T:
        made = make() if self.local_rank == 0 else None
        self.wait()
        return make() if made is None else made

    def tell(self, name: str, value: _T) -> list[_T]:
        key = self._key(name)
        self.store.set(f"{key}/{self.rank}", pickle.dumps(value))
        keys = [f"{key}/{k}" for k in range(self.size)]
        while not self.store.check(keys):
            time.sleep(0.05)
        return [pickle.loads(self.store.get(k)) for k in keys]

    def joined(self, parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        mine_NB = torch.from_numpy(np.stack(parts))
        all_NB = [torch.empty_like(mine_NB) for _ in range(self.size)]
        dist.all_gather(all_NB, mine_NB)
        whole: NDArray[np.float32] = torch.cat(all_NB, 1).flatten().numpy()
        return whole

    def wait(self) -> None:
        self.tell("wait", None)

    def failed(self, error: BaseException) -> str:
        with suppress(ValueError):  # torchrun ends this rank as soon as another has died; it is to say first which
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not isinstance(error, UserError):  # most likely for want of another, which the watch then names
            verdict = self._watch.verdict()
            if not verdict:
                traceback.print_exception(error)
            error = UserError(verdict or f"{type(error).__name__}: {str(error)[:300]}")
        self._watch.stop()
        with suppress(RuntimeError):  # the store may be gone too
            self.store.set(f"failed/{self.rank}", str(error))
        return f"error: rank {self.rank}: {error}"

    def end(self, code: int) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an exit in order would wait for collectives of others

    def leave(self) -> None:
        self.wait()
        self._watch.stop()
        self._watch.join()
        dist.destroy_process_group()
        # The store may be the first rank's, so that one goes last.
        self.store.set(f"gone/{self.rank}", "")
        while self.first and not self.store.check([f"gone/{k}" for k in range(self.size)]):
            time.sleep(0.05)

    def _key(self, name: str) -> str:
        count = self._counts[name] = self._counts.get(name, 0) + 1
        return f"{name}/{count}"


class HostRanks(TorchrunRanks):
    """A process of one of several hosts whose chips are one device.

    Each has the whole batch and makes every call that the others make, and what the chips learn is put together by
    them; so the hosts only agree on what to do.
    """

    @property
    def part(self) -> tuple[int, int]:
        return 0, 1

    def agree(self, samples: int, *asked: bool) -> tuple[int, ...]:
        return samples, *super().agree(0, *asked)[1:]

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor

    def joined(self, parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.concatenate(parts)


class _Watch(threading.Thread):
    """Writes this rank's signs of life and reads the others'."""

    def __init__(self, ranks: TorchrunRanks, store: Any) -> None:
        super().__init__(name="watch over the ranks", daemon=True)
        self._ranks = ranks
        self._store = store
        self._stopped = threading.Event()
        self._seen = {k: (b"", time.monotonic()) for k in range(ranks.size) if k != ranks.rank}
        self._lock = threading.Lock()
        self.start()

    def run(self) -> None:
        count = 0
        while not self._stopped.wait(_BEAT):
            count += 1
            try:
                self._store.set(f"beat/{self._ranks.rank}", str(count))
                verdict = self._look(self._ranks.patience)
            except RuntimeError:  # its host is gone, and with it torchrun's agent or the first rank
                verdict = "the store of rank 0's host cannot be reached any more: that host was lost"
            if verdict and not self._stopped.is_set():
                print(f"error: rank {self._ranks.rank} stops: {verdict}", file=sys.stderr, flush=True)
                os._exit(1)

    def stop(self) -> None:
        """No more signs of life, and no more verdicts."""
        self._stopped.set()

    def verdict(self) -> str:
        """Who was lost, or why one stopped; waits a few seconds for signs of life. Empty where all are well."""
        self._stopped.set()
        self.join(2 * _BEAT)
        deadline = time.monotonic() + 6 * _BEAT
        try:
            while not (found := self._look(4 * _BEAT)) and time.monotonic() < deadline:
                time.sleep(_BEAT / 4)
                self._store.set(f"beat/{self._ranks.rank}", str(time.monotonic()))
        except RuntimeError:
            return "the store of rank 0's host cannot be reached any more: that host was lost"
        return found

    def _look(self, patience: float) -> str:
        now = time.monotonic()
        silent = []
        for k, (last, since) in self._seen.items():
            if self._store.check([f"failed/{k}"]):
                return f"rank {k} stopped: {self._store.get(f'failed/{k}').decode()}"
            beat = self._store.get(f"beat/{k}") if self._store.check([f"beat/{k}"]) else b""
            if beat != last:
                self._seen[k] = beat, now
            elif now - since > patience:
                silent.append(k)
        if not silent:
            return ""
        return (
            f"{_named(silent)} was lost: no sign of it for {patience:g} s. Look at its host and its output; a run goes "
            "on from its last checkpoint with --resume, or by itself under torchrun --max-restarts"
        )


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def open_ranks(patience: float, hosts: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that torchrun started this process among; `ALONE` where it did not.

    ``hosts`` is what `dlrm_xla.xla_device.job_of_hosts` says.
    """
    if hosts:
        return HostRanks(patience, {**os.environ, "LOCAL_RANK": "0", **hosts})
    if among_several():
        return TorchrunRanks(patience)
    return TorchrunRank(patience) if agent_has_store() else ALONE


def among_several() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def agent_has_store() -> bool:
    """Whether torchrun's agent holds the store, so that it outlives the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
