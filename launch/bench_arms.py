"""What `launch/bench.py` compares: our rows and other people's, each as a function of a step's number.

A maker takes a `Case` and returns a function that does one repetition and queues no more than it must; it returns
None where the case is not one for it, and raises ImportError where its package is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_xla.batches import PackedBatch
from dlrm_xla.config import Config, DenseOptimizerName, RowKernels, resolve
from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.dense_optim import dense_optimizer
from dlrm_xla.device import Device
from dlrm_xla.errors import UserError
from dlrm_xla.model import DLRM, mlp
from dlrm_xla.plan import bytes_kept, plan
from dlrm_xla.registry import parse
from dlrm_xla.row_lines import Placement
from dlrm_xla.row_rules import RowSettings
from dlrm_xla.row_store import RowStore
from dlrm_xla.rows import RowTable
from dlrm_xla.sizing import Budget
from dlrm_xla.steps import Steps

NUM_BATCHES = 8
LEARNING_RATE = 0.01
Repetition = Callable[[int], Any]
# What torch's optimizers do to rows, where a row optimizer of that name does something else.
TORCH_RULES = {
    "sparse": {"adagrad": "adagrad_element"},  # its SparseAdam is lazy, as ours
    "dense": {"adagrad": "adagrad_element", "adam": "adam_dense"},
}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark before it is measured.

    ``what``: "lookup" is a forward pass of one table in evaluation, "update" forward, backward and optimizer of one
    table, "step" a train step of a whole DLRM. ``table_rows`` has one table for the first two.
    """

    what: str
    device: Device
    table_rows: tuple[int, ...]
    dim: int
    batch: int
    bag: int
    zipf: float
    optimizer: str
    seed: int = 0
    id_rows: tuple[int, ...] = ()

    def ids(self) -> list[Tensor]:
        """The batches' ids, int32 [B, F L], Zipf distributed over each table (or over its first ``id_rows``)."""
        rng = np.random.default_rng(self.seed)
        limits = self.id_rows or self.table_rows
        return [
            torch.from_numpy(
                np.concatenate([_zipf(rng, rows, self.zipf, (self.batch, self.bag)) for rows in limits], 1)
            )
            for _ in range(NUM_BATCHES)
        ]

    def ids_looked_up(self) -> int:
        """Ids of one batch, duplicates counted."""
        return self.batch * self.bag * len(self.table_rows)

    def least_bytes(self) -> float:
        """Bytes that any implementation must move for one repetition of one table, counted on the batches' own ids.

        A lookup reads each looked-up row and writes each bag. An update reads each bag's gradient, then reads and
        writes each different row, and its state where there is one; "adam_dense", Adam that is not lazy, every row.
        """
        bags = self.batch * len(self.table_rows)
        moved = (self.ids_looked_up() + bags) * self.dim * 4.0
        if self.what == "update":
            every = self.optimizer == "adam_dense"
            written = sum(self.table_rows) if every else float(np.mean([len(torch.unique(ids)) for ids in self.ids()]))
            by_element = {"sgd": 0.0, "adagrad_element": 1.0, "adam": 2.0, "adam_dense": 2.0}
            state = 1.0 if self.optimizer == "adagrad" else by_element[self.optimizer] * self.dim
            moved += bags * self.dim * 4 + written * 2 * 4 * (self.dim + state)
        return moved


def _zipf(rng: np.random.Generator, rows: int, exponent: float, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Ids from 0 with P(i) about (i + 1)^-exponent, by inverting the density; 0 is uniform."""
    uniform = rng.random(shape)
    if exponent == 0:
        ids = uniform * rows
    elif exponent == 1:
        ids = float(rows + 1) ** uniform - 1
    else:
        power = 1 - exponent
        ids = ((float(rows + 1) ** power - 1) * uniform + 1) ** (1 / power) - 1
    return np.minimum(ids, rows - 1).astype(np.int32)


def _config(case: Case, kernels: RowKernels = "own", **more: Any) -> Config:
    given = {"row_optimizer": case.optimizer, "batch_size": case.batch, "dim": case.dim, "row_kernels": kernels}
    return resolve({"preset": "kaggle", **given, **more}, None)[0]


def _packed(case: Case) -> list[PackedBatch]:
    rng = np.random.default_rng(case.seed + 1)
    return [
        PackedBatch(
            torch.from_numpy(rng.random((case.batch, 13), np.float32)),
            ids,
            torch.from_numpy((rng.random(case.batch) < 0.25).astype(np.float32)),
        )
        for ids in case.ids()
    ]


def _tables(case: Case) -> list[Table]:
    return [Table(f"t{k}", rows, case.dim) for k, rows in enumerate(case.table_rows)]


def ours(case: Case, placement: Placement, kernels: RowKernels = "own", **settings: Any) -> Repetition:
    """The row store of this project; ``settings`` are those of a step."""
    device = case.device
    if case.what == "step":
        return _dlrm_step(case, [RowTable] * len(case.table_rows), kernels=kernels, **settings)
    model = nn.Module()
    model.bag = RowTable(_tables(case)[0])
    rule = RowSettings(case.optimizer)  # type: ignore[arg-type]
    store = RowStore(model, device, rule, LEARNING_RATE, lambda table: placement, kernels=kernels)
    return _one_table(case, device.place(model), model.bag, store.step)


def placed(case: Case, matmul_rows: int, dense_rows: int) -> Repetition:
    """The train step with tables of up to so many rows placed as matmul, the next as dense, the others as sparse."""
    return _dlrm_step(case, [RowTable] * len(case.table_rows), matmul_rows=matmul_rows, dense_rows=dense_rows)


def _dlrm_step(case: Case, make_bags: Sequence[MakeBag], kernels: RowKernels = "own", **settings: Any) -> Repetition:
    steps, batches = _steps(case, make_bags, kernels, **settings)
    return lambda k: steps.train(batches[k % NUM_BATCHES], k)


def _steps(
    case: Case, make_bags: Sequence[MakeBag], kernels: RowKernels = "own", **settings: Any
) -> tuple[Steps, list[PackedBatch]]:
    config = _config(case, kernels, **settings)
    model = DLRM(13, _tables(case), make_bags, bottom=config.bottom, top=config.top, seed=case.seed)
    return Steps(model, [case.bag] * len(case.table_rows), case.device, config), _packed(case)


def with_plugin(case: Case, spec: str, ratio: float) -> Repetition:
    """The train step of `plugin_steps`."""
    steps, batches = plugin_steps(case, spec, ratio)
    return lambda k: steps.train(batches[k % NUM_BATCHES], k)


def plugin_steps(case: Case, spec: str, ratio: float, **settings: Any) -> tuple[Steps, list[PackedBatch]]:
    """Steps of a DLRM with tables replaced by a plugin, sized to 1/``ratio`` of the exact bytes, and their batches.

    A ratio of 0 leaves sizes to the plugin's options. Raises a UserError where the plugin cannot reach the ratio.
    """
    budget = None
    if ratio and parse(spec):
        exact = sum(case.table_rows) * case.dim * 4
        budget = Budget(exact / ratio, lambda bag, table: bytes_kept(bag), f"--ratio {ratio:g}", exact)
    # Even where all tables are small, the largest get the plugin.
    least = min(_config(case).min_rows, max(case.table_rows))
    return _steps(case, plan(_tables(case), spec, {}, least, RowTable, budget)[1], **settings)


def naive(case: Case) -> Repetition | None:
    """Autograd through the table, as `nn.Embedding` does it, with a dense torch optimizer: what XLA gets by default."""
    device = case.device
    if case.what == "step":
        return _plain_dlrm(
            case, [RowTable(t) for t in _tables(case)], lambda p: torch.optim.SGD(p, lr=0.1, foreach=False)
        )
    model = nn.Module()
    model.bag = RowTable(_tables(case)[0])
    device.place(model)
    kinds: dict[str, DenseOptimizerName] = {"sgd": "sgd", "adam": "adam"}
    optimizer = dense_optimizer(kinds.get(case.optimizer, "adagrad"), [(model.parameters(), LEARNING_RATE)], device)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _one_table(case, model, model.bag, update)


def _one_table(case: Case, model: nn.Module, bag: nn.Module, update: Callable[[], list[Tensor] | None]) -> Repetition:
    device = case.device
    where = device.torch_device
    batches = [ids.to(where) for ids in case.ids()]
    weights = torch.ones(case.batch, case.bag).to(where)
    gradient = torch.randn(case.batch, case.dim).to(where)
    model.train(case.what == "update")

    def look_up(ids: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = bag(ids, weights)
            return out

    def train(ids: Tensor) -> list[Tensor] | None:
        torch.autograd.backward(bag(ids, weights), gradient)
        return update()

    step: Callable[..., Any] = look_up if case.what == "lookup" else train
    if not device.optional_graphs:  # a graph's results are copies, as much again as a lookup writes
        step = device.compile(step, case.what)
    return lambda k: step(batches[k % NUM_BATCHES])


class _TorchBag(nn.Module):
    def __init__(self, table: Table, sparse: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(table.num_rows, table.dim, mode="sum", sparse=sparse)

    def forward(self, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
        out: Tensor = self.bag(ids_BL)
        return out


def torch_bag(case: Case, *, sparse: bool) -> Repetition | None:
    """`nn.EmbeddingBag` in eager mode with the optimizer that torch has for its gradients."""
    if case.device.name == "xla":
        return None  # falls back to the CPU in training, one loop per bag in evaluation
    if not sparse and sum(case.table_rows) * case.dim > 2**28:
        return None  # a gradient of more than a gigabyte
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.SparseAdam if sparse else torch.optim.Adam}
    kind = kinds.get(case.optimizer, torch.optim.Adagrad)
    bags = [_TorchBag(table, sparse) for table in _tables(case)]
    if case.what == "step":
        return _plain_dlrm(case, bags, lambda p: torch.optim.SGD(p, lr=0.1))
    bag = bags[0].to(case.device.torch_device)
    optimizer = kind(bag.parameters(), lr=LEARNING_RATE)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _one_table(case, bag, bag, update)


class _PlainDLRM(nn.Module):
    """The model as the reference script writes it: interaction by fancy indexing, nothing of ours but the layers."""

    def __init__(self, bags: Sequence[nn.Module], case: Case) -> None:
        super().__init__()
        config = _config(case)
        n = len(bags) + 1
        self.bottom = mlp([13, *config.bottom, case.dim], relu_last=True)
        self.top = mlp([case.dim + n * (n - 1) // 2, *config.top, 1], relu_last=False)
        self.bags = nn.ModuleList(bags)
        self.li: Tensor
        self.lj: Tensor
        self.register_buffer("li", torch.tensor([i for i in range(n) for j in range(i)]))
        self.register_buffer("lj", torch.tensor([j for i in range(n) for j in range(i)]))

    def vectors(self, ids: Tensor, length: int) -> list[Tensor]:
        ones = torch.ones(len(ids), length).to(ids.device)
        return [bag(part, ones) for bag, part in zip(self.bags, torch.split(ids, length, 1), strict=True)]

    def forward(self, dense: Tensor, ids: Tensor, length: int) -> Tensor:
        x = self.bottom(dense)
        t = torch.stack([x, *self.vectors(ids, length)], 1)
        z = torch.bmm(t, t.transpose(1, 2))
        out: Tensor = self.top(torch.cat([x, z[:, self.li, self.lj]], 1))
        return out.squeeze(1)


def _plain_dlrm(
    case: Case,
    bags: Sequence[nn.Module],
    make: Callable[[Any], torch.optim.Optimizer],
    model: _PlainDLRM | None = None,
    graph: bool = False,
) -> Repetition | None:
    if case.optimizer != "sgd":
        return None
    device = case.device
    moved = device.place(model or _PlainDLRM(bags, case))
    optimizer = make([p for p in moved.parameters() if p.numel()])
    loss = nn.BCEWithLogitsLoss()

    def train(dense: Tensor, ids: Tensor, labels: Tensor) -> None:
        torch.autograd.backward(loss(moved(dense, ids, case.bag), labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step: Callable[..., Any] = train
    if graph or not device.optional_graphs:
        step = device.compile(train, "plain")
    batches = _packed(case)
    where = device.torch_device

    def repeat(k: int) -> None:
        dense, ids, labels = batches[k % NUM_BATCHES][:3]
        step(dense.to(where), ids.to(where), labels.to(where))

    for k in range(5 if graph else 0):  # so that what cannot be a graph is told here
        repeat(k)
    return repeat


def fbgemm(case: Case, graph: bool = False) -> Repetition | None:
    """FBGEMM's table-batched embedding with its fused exact optimizer, on CPU or CUDA; a step also as a CUDA graph."""
    if case.device.name == "xla":
        return None
    if case.dim % 4:
        raise UserError(f"takes widths in fours, not {case.dim}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of parts of itself that it leaves out
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            EmbeddingLocation,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

    on_gpu = case.device.name == "cuda"
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    kinds = {"sgd": EmbOptimType.EXACT_SGD, "adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
    if case.optimizer not in kinds:
        return None
    bags = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, case.dim, *place) for rows in case.table_rows],
        optimizer=kinds[case.optimizer],
        learning_rate=0.1 if case.what == "step" else LEARNING_RATE,
    )
    bags.init_embedding_weights_uniform(-0.01, 0.01)  # rows that nothing was written to share one page of zeros
    where = case.device.torch_device
    count = len(case.table_rows) * case.batch
    offsets = torch.arange(count + 1, dtype=torch.int32, device=where) * case.bag

    def by_table(ids: Tensor) -> Tensor:
        return ids.view(case.batch, -1, case.bag).transpose(0, 1).reshape(-1).contiguous()

    if case.what == "step":

        class Plain(_PlainDLRM):
            def vectors(self, ids: Tensor, length: int) -> list[Tensor]:
                pooled: Tensor = bags(by_table(ids), offsets)
                return list(pooled.view(len(ids), -1, case.dim).unbind(1))

        model = Plain([nn.Identity() for _ in case.table_rows], case)
        return _plain_dlrm(case, [], lambda p: torch.optim.SGD(p, lr=0.1), model, graph)
    batches = [by_table(ids).to(where) for ids in case.ids()]
    gradient = torch.randn(case.batch, case.dim, device=where)

    def look_up(k: int) -> Tensor:
        with torch.no_grad():
            out: Tensor = bags(batches[k % NUM_BATCHES], offsets)
            return out

    def train(k: int) -> None:
        torch.autograd.backward(bags(batches[k % NUM_BATCHES], offsets), gradient)

    return look_up if case.what == "lookup" else train


def tt(case: Case, rank: int) -> Repetition:
    """Our tensor-train bag, forward and backward."""
    from dlrm_xla_plugins.tensor_train import TensorTrainBag

    model = nn.Module()
    model.bag = TensorTrainBag(_tables(case)[0], rank)
    case.device.place(model)

    return _one_table(case, model, model.bag, lambda: _take_gradients(model))


def _take_gradients(model: nn.Module) -> list[Tensor]:
    # Returned, for XLA computes nothing that nobody can read.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients


def tltorch_tt(case: Case, rank: int) -> Repetition | None:
    """tensorly-torch's factorized embedding, block TT, forward and backward; eager only."""
    if case.device.name == "xla":
        return None  # its np.unravel_index reads ids on the host
    import tltorch

    rows = case.table_rows[0]
    layer = tltorch.FactorizedEmbedding(rows, case.dim, factorization="blocktt", rank=rank)
    layer.to(case.device.torch_device)

    class Bag(nn.Module):
        def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
            vectors: Tensor = layer(ids.long())
            return vectors.sum(1)

    bag = Bag()
    return _one_table(case, bag, bag, lambda: _take_gradients(layer))
