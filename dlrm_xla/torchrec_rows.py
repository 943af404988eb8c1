"""Exact tables over several ranks: TorchRec's DistributedModelParallel in the place of the row store.

Plugins ask for rows in the middle of their forward, one table after the other; an exchange for each would be dozens of
small ones in a step. So the bags run twice. The first time they only say which rows they want, and get a stand-in; then
all are fetched in one exchange; the second time they get them. Hence one rule for plugins, which every linear bag
keeps: which rows are asked for may not depend on rows.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlrm_xla.contract import Table
from dlrm_xla.device import Device
from dlrm_xla.guards import FiniteWatch
from dlrm_xla.lookup import pool
from dlrm_xla.model import DLRM
from dlrm_xla.ranks import Ranks
from dlrm_xla.row_rules import RULES, Lines, RowSettings
from dlrm_xla.rows import Home, RowTable, initial_rows
from dlrm_xla.shapes import shapes_alone
from dlrm_xla.sharded_file import fill, write_shards
from dlrm_xla.tensor_file import TensorFile
from dlrm_xla.torchrec_plan import Shards, embedding_bags, quiet_torchrec, sharder

_PROBE = 64
# What bags get for rows while they are asked. Weights may come from rows, as memcom's do; this is neither 0 nor 1.
_STAND_IN = 0.37


class LateRows(RowTable):
    """An exact table without its rows: it remembers where in the random numbers they begin, and draws them later."""

    def __init__(self, table: Table) -> None:
        on_meta = torch.get_default_device().type == "meta"
        with shapes_alone():
            super().__init__(table)
        if not on_meta:
            self.random_state = torch.get_rng_state()
            for _ in initial_rows(table):
                pass

    def blocks(self) -> Iterator[Tensor]:
        """The rows that a single process starts with, in parts."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random_state)
            yield from initial_rows(self.table)


class _Ask(NamedTuple):
    """A lookup: which table, ids_NL and weights_NL, N a multiple of the batch."""

    table: int
    ids_NL: Tensor
    weights_NL: Tensor


class _Lookup(NamedTuple):
    """What a lookup is in TorchRec's terms: features one behind the other from ``first``, ``count`` of them.

    ``pooled``: TorchRec adds up a bag's rows, whose weights are 0 and 1. Otherwise each slot is a feature, and weights,
    which may want gradients, come in afterwards.
    """

    table: int
    bags: int
    length: int
    pooled: bool
    first: int

    @property
    def size(self) -> int:
        return self.bags if self.pooled else self.bags * self.length


class _Counter:
    """In the place of a row stack: hands a table's lookups to the store."""

    def __init__(self, store: TorchrecRows, number: int) -> None:
        self._store, self._number = store, number

    def look_up(
        self, ids_BS: Tensor, weights_BS: Tensor, lengths: Sequence[int], names: Sequence[str], training: bool
    ) -> Tensor:
        return self._store.look_up(_Ask(self._number, ids_BS, weights_BS))


class TorchrecRows:
    """The exact tables of a model, those inside plugins too, on the ranks of a job; what `RowStore` is for one process.

    ``runner`` gives the model as all ranks run it together: dense parts and plugins' own parameters are copies whose
    gradients are averaged.
    """

    def __init__(
        self,
        model: DLRM,
        device: Device,
        settings: RowSettings,
        learning_rate: float,
        shards: Shards,
        bag_lengths: Sequence[int],
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.learning_rate = learning_rate
        self.device = device
        self.settings = settings
        self._shards = shards
        self._step = torch.zeros(1, dtype=torch.int32, device=device.torch_device)
        members = [(name, m) for name, m in model.named_modules() if isinstance(m, RowTable)]
        self.names = [f"{name}.weight".removeprefix(".") for name, _ in members]
        self.members = [m for _, m in members]
        assert [m.table for m in self.members] == list(shards.tables), "the plan is of another model"
        # Rows that a plugin made by itself are there, the others are drawn when it is known which stay here.
        self._made = [m.weight for m in self.members]
        for number, member in enumerate(self.members):
            member.weight = None
            member.home = Home(_Counter(self, number), 0)  # type: ignore[arg-type]
        self._asks: list[_Ask] | None = None
        self._answers: Iterator[tuple[_Lookup, list[Tensor]]] = iter(())
        self._lookups = self._probe(model, bag_lengths)
        self._order = [f"f{lo.first + k}" for lo in self._lookups for k in range(lo.size)]
        self._table_of_column: Tensor | None = None
        self._finite = FiniteWatch("table", len(members), device)
        self.values: Tensor | None = None
        self.leaf: Tensor | None = None

    def runner(self, model: DLRM) -> Callable[..., Tensor]:
        """The model over all ranks; called once, after it was placed."""
        features: list[list[str]] = [[] for _ in self.members]
        for lookup in self._lookups:
            features[lookup.table] += [f"f{lookup.first + k}" for k in range(lookup.size)]
        with quiet_torchrec():
            from torchrec.distributed.model_parallel import DistributedModelParallel

            rows = embedding_bags(self._shards.tables, features) if self.members else None
            self._whole = _Whole(self, model, rows)
            self._parallel: Any = DistributedModelParallel(
                self._whole,
                device=self.device.torch_device,
                plan=self._shards.plan,
                sharders=[sharder(self.settings)],
                init_parameters=False,
            )
        self._fused = self._parallel.fused_optimizer
        self._copies = self._find_copies()
        self._set_rows()
        run: Callable[..., Tensor] = self._parallel
        return run

    def ask(self, bags: Callable[[], Tensor], batch: int) -> Any:
        """Runs the bags of so many samples once to hear which rows they want; TorchRec's jagged tensor of all."""
        if torch.is_grad_enabled() and self._whole.rows is not None:
            for group in self._fused.param_groups:
                group["lr"] = self.learning_rate
            # No update: it hands the rate to the kernels, whose forward takes it along for the update.
            self._fused.step()
        self._asks = []
        try:
            with torch.no_grad():
                bags()
            return self._jagged(self._asks, batch)
        finally:
            self._asks = None

    def answer(self, pooled: Any) -> None:
        """Takes what came back, so that the bags can run; the leaf of autograd is one array of all of it."""
        if pooled is None:
            return
        values_BK: Tensor = pooled.values()
        if values_BK.requires_grad:
            self.values, leaf_BK = values_BK, values_BK.detach().requires_grad_()
            self.leaf = leaf_BK
        else:
            leaf_BK = values_BK
        by_key = dict(zip(pooled.keys(), torch.split(leaf_BK, pooled.length_per_key(), 1), strict=True))
        self._columns = pooled.keys(), pooled.length_per_key()
        self._answers = iter(
            [(lookup, [by_key[f"f{lookup.first + k}"] for k in range(lookup.size)]) for lookup in self._lookups]
        )

    def look_up(self, ask: _Ask) -> Tensor:
        """Vectors [N, 1, D] of a lookup: stand-ins while the bags are asked, then what came back."""
        if self._asks is not None:
            self._asks.append(ask)
            dim = self.members[ask.table].table.dim
            return torch.full((), _STAND_IN, device=ask.ids_NL.device).expand(len(ask.ids_NL), 1, dim)
        lookup, pieces = next(self._answers)
        num_bags, length = ask.ids_NL.shape
        assert lookup.table == ask.table, "the bags ask in another order than before"
        dim = self.members[ask.table].table.dim
        used = num_bags // len(pieces[0]) * (1 if lookup.pooled else length)  # fewer than pieces where bags are short
        vectors_ND = (pieces[0] if used == 1 else torch.stack(pieces[:used], 1)).flatten(0, -2)[:, :dim]
        return vectors_ND.unsqueeze(1) if lookup.pooled else pool(vectors_ND, ask.weights_NL, [length])

    @torch.no_grad()
    def step(self) -> None:
        """Sends the gradients of a step's lookups to where the rows are, which updates them."""
        self._step += 1
        if self.values is None or self.leaf is None:
            return
        assert self.leaf.grad is not None
        self._watch(self.leaf.grad)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function")
            torch.autograd.backward(self.values, self.leaf.grad)
        for copy in self._copies:
            copy.step(self.learning_rate, self._step, self.settings)
        for copy in self._copies:  # only now, for they are slices of one array with one gradient
            copy.rows.grad = None
        self.values = self.leaf = None

    def _watch(self, grad_BK: Tensor) -> None:
        if self._table_of_column is None:
            keys, widths = self._columns
            table_of = {f"f{lo.first + k}": lo.table for lo in self._lookups for k in range(lo.size)}
            tables = torch.tensor([table_of[key] for key in keys]).repeat_interleave(torch.tensor(widths))
            self._table_of_column = tables.to(grad_BK.device)
        sums = torch.zeros(len(self.members), device=grad_BK.device).index_add_(
            0, self._table_of_column, grad_BK.sum(0)
        )
        self._finite.note([m.table.name for m in self.members], sums, self._step)

    @property
    def steps_done(self) -> Tensor:
        """Steps since the start of training, int32 [1] on the device."""
        return self._step

    def check_gradients(self) -> None:
        """Raises a UserError if a table's gradient was not finite on this rank; waits for the device."""
        self._finite.check()

    def arrays(self) -> list[Tensor]:
        """This rank's arrays: rows and the optimizer's state."""
        return [piece for value in (*self.tables(), *self.states()) for piece in _pieces(value[1])]

    @property
    def num_parameters(self) -> int:
        """Numbers in all rows, on whichever rank."""
        return sum(m.table.num_rows * m.table.dim for m in self.members)

    def tables(self) -> Iterator[tuple[str, Any]]:
        """Each table's rows, a sharded tensor or where each rank has a copy a tensor, under its name in the model."""
        found = self._whole.rows.state_dict() if self._whole.rows is not None else {}
        for k, name in enumerate(self.names):
            rows, dim = found[f"embedding_bags.t{k}.weight"], self.members[k].table.dim
            yield name, rows[:, :dim] if _is_copy(rows) else rows

    def states(self) -> Iterator[tuple[str, Any]]:
        """The optimizer's states in the same way, under names such as ``TABLE.state0``; of this rank's tables."""
        found = self._fused.state_dict()["state"] if self._whole.rows is not None else {}
        copies = {copy.name: copy for copy in self._copies}
        for k, name in enumerate(self.names):
            if name in copies:
                yield from ((f"{name}.state{n}", state) for n, state in enumerate(copies[name].states))
                continue
            here = found.get(f"rows.embedding_bags.t{k}.weight", {})  # of tables with rows on this rank
            by_kind = {kind.rpartition(".")[2]: state for kind, state in here.items()}
            kinds = {"adam": ["exp_avg_sq", "momentum1"]}.get(self.settings.name, ["momentum1"])
            for n, kind in enumerate(kinds[: len(RULES[self.settings.name].states)] if here else ()):
                yield f"{name}.state{n}", by_kind[kind]

    def write(self, path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Writes tables, the rows' optimizer and ``tensors`` as a folder, every rank what it holds."""
        own = {f"model.{name}": value for name, value in self.tables()}
        own = {name: value.contiguous() if _is_copy(value) else value for name, value in own.items()}
        own |= {f"row_optimizer.{name}": value for name, value in self.states()}
        own["row_optimizer.step"] = self._step.cpu()
        own |= {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        write_shards(path, own, about, self.ranks)

    def load_from(self, file: TensorFile, optimizer: bool) -> None:
        """Sets this rank's rows, and the optimizer's state, from a checkpoint however it was cut."""
        targets = {f"model.{name}": value for name, value in self.tables()}
        if optimizer:
            targets |= {f"row_optimizer.{name}": value for name, value in self.states()}
            self._step.copy_(file.tensor("row_optimizer.step"))
            for part in self._whole.rows.modules() if self._whole.rows is not None else ():
                if hasattr(part, "set_optimizer_step"):
                    part.set_optimizer_step(int(self._step))
        fill(file, targets)

    def _find_copies(self) -> list[_Copy]:
        if self._whole.rows is None:
            return []
        parameters = dict(self._whole.rows.named_parameters())
        pairs = zip(self.names, self._shards.kinds, strict=True)
        return [
            _Copy(name, parameters[f"embedding_bags.t{k}.weight"], self.members[k].table.dim, self.settings)
            for k, (name, kind) in enumerate(pairs)
            if kind == "data_parallel"
        ]

    @torch.no_grad()
    def _set_rows(self) -> None:
        """Gives the rows of this rank what a single process starts with, however they are cut."""
        for (_, target), member, made in zip(self.tables(), self.members, self._made, strict=True):
            blocks = member.blocks() if isinstance(member, LateRows) else iter([made])
            first = 0
            for block_RD in blocks:
                assert block_RD is not None
                for offsets, piece in _placed_pieces(target):
                    begin, end = (min(max(at - offsets[0], 0), len(piece)) for at in (first, first + len(block_RD)))
                    if begin < end:
                        rows = block_RD[begin + offsets[0] - first : end + offsets[0] - first]
                        piece[begin:end] = rows[:, offsets[1] : offsets[1] + piece.shape[1]]
                first += len(block_RD)
        self._made.clear()

    def _probe(self, model: DLRM, bag_lengths: Sequence[int]) -> list[_Lookup]:
        """What a step looks up, from what the bags ask for some made-up samples."""
        generator = torch.Generator().manual_seed(0)
        ids, weights = [], []
        for table, length in zip(model.tables, bag_lengths, strict=True):
            ids.append(torch.randint(table.num_rows, (_PROBE, length), generator=generator, dtype=torch.int32))
            weights.append(torch.ones(_PROBE, length))
        asks: list[_Ask] = []
        self._asks = asks
        model.bags(ids, weights)
        self._asks = None
        lookups: list[_Lookup] = []
        first = 0
        for ask in asks:
            num_bags, length = ask.ids_NL.shape
            assert num_bags % _PROBE == 0, "a bag has looked up a number of bags that the batch does not divide"
            plain = bool(((ask.weights_NL == 0) | (ask.weights_NL == 1)).all()) and not ask.weights_NL.requires_grad
            lookups.append(_Lookup(ask.table, num_bags // _PROBE, length, plain, first))
            first += lookups[-1].size
        return lookups

    def _jagged(self, asks: Sequence[_Ask], batch: int) -> Any:
        if not asks:
            return None
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        assert len(asks) == len(self._lookups), "the bags ask more or less often than before"
        flat_ids, flat_real, lengths = [], [], []
        # Neighbours of one shape at a time: 26 tables one by one were 14 % of a rank's main thread, by samples.
        alike = itertools.groupby(
            zip(asks, self._lookups, strict=True), lambda pair: (pair[0].ids_NL.shape, pair[1].size, pair[1].pooled)
        )
        for ((_, length), size, pooled), pairs in alike:
            run = [ask for ask, _ in pairs]
            ids_KBGL = torch.stack([ask.ids_NL for ask in run]).view(len(run), batch, -1, length)
            weights_KBGL = torch.stack([ask.weights_NL.detach() for ask in run]).view(len(run), batch, -1, length)
            if not pooled:  # every slot is a feature
                ids_KBGL, weights_KBGL = (t.view(len(run), batch, -1, 1) for t in (ids_KBGL, weights_KBGL))
            else:
                torch._assert_async(((weights_KBGL == 0) | (weights_KBGL == 1)).all())
            real_KGBL = weights_KBGL.transpose(1, 2) != 0
            flat_ids.append(ids_KBGL.transpose(1, 2).reshape(-1))
            flat_real.append(real_KGBL.reshape(-1))
            spare = size - real_KGBL.shape[1]  # shorter bags than the longest
            lengths.append(torch.nn.functional.pad(real_KGBL.sum(3, dtype=torch.int32), (0, 0, 0, spare)).reshape(-1))
        ids_N, real_N = torch.cat(flat_ids), torch.cat(flat_real)
        # Padding is left out rather than given a weight of 0: it must not count as looked up.
        return KeyedJaggedTensor(keys=self._order, values=ids_N[real_N], lengths=torch.cat(lengths), stride=batch)


class _Copy:
    """A small table that every rank holds, and the state of its rows; its gradients come averaged over the ranks."""

    def __init__(self, name: str, rows: nn.Parameter, dim: int, settings: RowSettings) -> None:
        self.name = name
        self.rows = rows
        kinds = RULES[settings.name].states
        self.dim = dim
        self.states = [torch.zeros_like(rows[:, 0] if kind == "row" else rows[:, :dim]).detach() for kind in kinds]

    def step(self, learning_rate: float, step: Tensor, settings: RowSettings) -> None:
        """One step of all rows: those without a gradient stay as they are."""
        assert self.rows.grad is not None
        change, new = RULES[settings.name].update(
            self.rows.grad[:, : self.dim], self.states, learning_rate, step, settings, Lines()
        )
        self.rows[:, : self.dim] += change
        for state, value in zip(self.states, new, strict=True):
            state.copy_(value)


def _is_copy(value: Any) -> bool:
    return not hasattr(value, "local_shards")


def _placed_pieces(value: Any) -> list[tuple[Sequence[int], Tensor]]:
    """This rank's pieces of a table, each with the row and the column where it begins."""
    if _is_copy(value):
        return [([0, 0], value)]
    return [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]


def _pieces(value: Any) -> list[Tensor]:
    return [piece for _, piece in _placed_pieces(value)]


class _Whole(nn.Module):
    """A model and the rows that it looks up, as one module for TorchRec to distribute."""

    def __init__(self, store: TorchrecRows, model: DLRM, rows: nn.Module | None) -> None:
        super().__init__()
        self._store = store
        self.model = model
        self.rows: Any = rows

    def forward(self, dense_BI: Tensor, ids: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        jagged = self._store.ask(lambda: self.model.bags(ids, weights), len(dense_BI))
        if self.rows is not None:
            self._store.answer(self.rows(jagged))
        logits_B: Tensor = self.model(dense_BI, ids, weights)
        return logits_B
