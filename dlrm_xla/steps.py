"""The train and the evaluation step of a model on a device, and what a configuration says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dlrm_xla import checkpoint
from dlrm_xla.batches import PackedBatch, arranged, unpack
from dlrm_xla.codebooks import most_rows, multiply_codebooks
from dlrm_xla.config import Config
from dlrm_xla.contract import Refreshed
from dlrm_xla.dense_optim import dense_optimizer
from dlrm_xla.device import Device, Forgetful
from dlrm_xla.errors import UserError
from dlrm_xla.guards import FiniteWatch
from dlrm_xla.model import DLRM
from dlrm_xla.ranks import ALONE, Ranks
from dlrm_xla.refresh import check_finite, refresh
from dlrm_xla.row_files import RowFiles
from dlrm_xla.row_rules import RowSettings
from dlrm_xla.row_store import RowStore, placement_rule
from dlrm_xla.torchrec_plan import Shards
from dlrm_xla.torchrec_rows import TorchrecRows

# At a rate of 0 the Adam that torch has for graphs divides by it: a weight whose gradients were all 0 becomes NaN. So
# small a share of a rate changes no float32 weight above 1e-8.
_LEAST_FACTOR = 1e-12


def learning_rate_factor(config: Config, step: int) -> float:
    """Share of the full learning rates at a step, counted from 0.

    Linear warm-up ((step + 1) / warmup_steps), then 1, then ((end - step) / decay_steps)^decay_power from
    decay_start to end = decay_start + decay_steps, never below 1e-12, which is as good as none. That of
    facebookresearch/dlrm's LRPolicyScheduler decays one step earlier, keeps (warmup_steps - 1) / warmup_steps between
    the two, and goes on with the last rate that it had.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay_steps and step >= config.decay_start:
        left = max(0, config.decay_start + config.decay_steps - step)
        return max(_LEAST_FACTOR, float((left / config.decay_steps) ** config.decay_power))
    return 1.0


def row_settings(config: Config) -> RowSettings:
    """The row optimizer's part of a configuration."""
    return RowSettings(config.row_optimizer, weight_decay=config.row_weight_decay, state=config.row_state)


def check_batch(size: int, micro_batches: int, chips: int) -> None:
    """Raises UserError where chips would have unequal parts of a batch, or of a micro-batch."""
    parts = micro_batches * chips
    if size % parts:
        which = f"each of {micro_batches} micro-batches of " if micro_batches > 1 else ""
        raise UserError(
            f"{which}a batch of {size} cannot be cut into equal parts for {chips} chips: take --batch-size "
            f"{-(-size // parts) * parts}, or fewer chips{' or micro_batches' if which else ''}"
        )


class Steps:
    """The train and the evaluation step of one model on one device, each one graph where the device has graphs."""

    def __init__(
        self,
        model: DLRM,
        bag_lengths: Sequence[int],
        device: Device,
        config: Config,
        files: RowFiles | None = None,
        ranks: Ranks = ALONE,
        shards: Shards | None = None,
    ) -> None:
        self.device = device
        self.ranks = ranks
        self.config = config
        self.bag_lengths = list(bag_lengths)
        check_batch(config.batch_size, config.micro_batches, device.rows.num_chips)
        settings = row_settings(config)
        self.rows: RowStore | TorchrecRows
        if shards:
            self.rows = TorchrecRows(model, device, settings, config.row_lr, shards, bag_lengths, ranks)
        else:
            place = placement_rule(config, device.rows)
            near, ids = config.near_bytes, 0
            if near < 0:  # the device's own, and that only where it helps
                near, ids = device.rows.near_bytes, config.batch_size * sum(bag_lengths)
            self.rows = RowStore(
                model, device, settings, config.row_lr, place, files, config.row_kernels, ranks, near, ids
            )
        most = most_rows(device.rows, config.batch_size * max(bag_lengths) // device.rows.num_chips)
        multiply_codebooks(model, most if config.codebook_rows < 0 else config.codebook_rows)
        self._num_rows_F = torch.tensor([t.num_rows for t in model.tables])
        self._names_F = [t.name for t in model.tables]
        own = {name for name, _ in model.bags.named_parameters(prefix="bags")}
        self.model = device.place(model)
        self._run = self.rows.runner(model)
        self._order = None if model.bags.order == sorted(model.bags.order) else model.bags.order
        # Cores and codebooks start small and must grow to the size of trained rows: their rate is one of their own.
        groups = [
            ([p for n, p in self.model.named_parameters() if n not in own], config.dense_lr),
            ([p for n, p in self.model.named_parameters() if n in own], config.plugin_lr or config.dense_lr),
        ]
        self.dense = dense_optimizer(config.dense_optimizer, groups, device)
        self._trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self._bags = list(model.bags)
        self._refreshed = {
            m: name
            for name, bag in zip(self._names_F, self._bags, strict=True)
            for m in bag.modules()
            if isinstance(m, Refreshed)
        }
        self._finite = FiniteWatch("parameter", len(self._trained), device)
        self.loss_and_count = torch.zeros(2).to(device.torch_device)
        # One graph each, or one for each of a few lengths of bags.
        self._compiled: dict[tuple[str, tuple[int, ...] | None], Callable[..., Any]] = {}
        self._plain = device.optional_graphs and (shards is not None or config.cuda_graphs == "off")

    def train(self, packed: PackedBatch, step: int) -> None:
        """One optimizer step; queued, not awaited. A UserError names an id that its table does not have."""
        self._check_ids(packed, f"training step {step + 1}")
        packed = self.arranged(packed)
        run = self._graph(self._train_step, "train", packed)
        run(packed.sent(self.device.send), rate=learning_rate_factor(self.config, step))

    def evaluate(self, packed: PackedBatch) -> Tensor:
        """Logits of one batch, float32, still on the device."""
        self._check_ids(packed, "evaluation")
        packed = self.arranged(packed)
        logits_B: Tensor = self._graph(self._evaluation_step, "evaluation", packed)(packed.sent(self.device.send))
        return logits_B

    def arranged(self, packed: PackedBatch) -> PackedBatch:
        """Features side by side as bags come: on the host, where it costs nothing but a copy of the ids."""
        return packed if self._order is None else arranged(packed, self.bag_lengths, self._order)

    def _graph(self, step: Callable[..., Any], name: str, packed: PackedBatch) -> Callable[..., Any]:
        key = name, packed.lengths
        if key not in self._compiled:
            self._compiled[key] = step if self._plain else self.device.compile(step, name)
        return self._compiled[key]

    def _check_ids(self, packed: PackedBatch, where: str) -> None:
        # On the host, where batches come from: one comparison per id, and nothing has been updated yet.
        lengths = torch.tensor(packed.lengths or self.bag_lengths)
        num_rows_S = self._num_rows_F.repeat_interleave(lengths)
        bad_BS = (packed.ids_BS < (0 if packed.lengths is None else -1)) | (packed.ids_BS >= num_rows_S)
        if bad_BS.any():
            row, slot = bad_BS.nonzero()[0].tolist()
            feature = int((lengths.cumsum(0) <= slot).sum())
            raise UserError(
                f"{where}, row {row} of the batch: feature {self._names_F[feature]} has the id "
                f"{int(packed.ids_BS[row, slot])}, but its table has the ids 0 to {int(num_rows_S[slot]) - 1}. "
                "Prepare the data again, or give the table more rows."
            )

    def check_bags(self) -> None:
        """Raises a UserError where a plugin's parameters or buffers are not finite; before the first step."""
        for table, bag in zip(self._names_F, self._bags, strict=True):
            check_finite(bag, f"{type(bag).__name__} of table {table}", "before training")

    def refresh(self) -> None:
        """Lets each plugin that has a ``refresh`` rearrange its table, on the host, between two steps."""
        for bag, table in self._refreshed.items():
            refresh(bag, table)
            for tensor in bag.state_dict(keep_vars=True).values():
                if self.ranks.size > 1:  # hosts may round differently
                    host = tensor.cpu()
                    self.ranks.copy_first(host)
                    self.device.write(tensor, host)
        if self._refreshed:
            for run in self._compiled.values():
                if isinstance(run, Forgetful):
                    run.forget()

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Writes a checkpoint of everything that the next step depends on; a UserError where a parameter is not finite.

        ``check_finite`` knows of the gradients, so not of what the last step has made of the parameters.
        """
        for name, parameter in self.model.named_parameters():
            if not parameter.detach().cpu().isfinite().all():
                step = int(self.rows.steps_done.cpu())
                raise UserError(
                    f"the parameter {name} is not finite after step {step}. Lower --dense-lr or --row-lr; checkpoints "
                    "saved before it are kept."
                )
        states = {f"random.{name}": get() for name, (get, _) in self.device.random_states.items()}
        run = {**states, "loss_and_count": self.loss_and_count}
        checkpoint.save(path, self.model, self.dense, self.rows, about, run)

    def load(self, path: Path) -> None:
        """Takes over a checkpoint, before the first step; of another device too."""
        _, run = checkpoint.load_training(path, self.model, self.dense, self.rows)
        self.device.write(self.loss_and_count, run["loss_and_count"])
        for name, (_, put) in self.device.random_states.items():
            if f"random.{name}" in run:
                put(run[f"random.{name}"])

    def check_finite(self) -> None:
        """Raises a UserError where the loss or a gradient was not finite so far; waits for the device."""
        self.rows.check_gradients()
        self._finite.check()
        loss = float(self.loss_and_count.cpu()[0])
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {int(self.rows.steps_done.cpu())}. Lower --dense-lr or --row-lr, or check "
                "the data; checkpoints saved before it are kept."
            )

    def mean_loss(self) -> float:
        """Mean loss of the samples since the last call; waits for the device."""
        loss, count = self.ranks.add(self.loss_and_count.cpu().clone()).tolist()
        self.device.write(self.loss_and_count, torch.zeros(2))
        return float(loss / count) if count else math.nan

    def _logits(self, packed: PackedBatch) -> Tensor:
        batch = unpack(packed, self.bag_lengths, self._order)
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.torch_device.type, torch.bfloat16, enabled=bf16):
            logits_B: Tensor = self._run(batch.dense_BI, batch.ids, batch.weights)
        return logits_B.float()

    def _train_step(self, packed: PackedBatch, rate: float) -> None:
        for group in self.dense.param_groups:
            group["lr"] = group["base_lr"] * rate
        self.rows.learning_rate = self.config.row_lr * rate
        self.model.train()
        count = (packed.labels_B >= 0).float().sum()
        # Gradients are averaged over the ranks, whatever share of the batch's samples each has.
        mean_count = self.ranks.mean(count)
        totals = []
        for part in packed.split(self.config.micro_batches):
            labels_B = part.labels_B
            losses_B = binary_cross_entropy_with_logits(self._logits(part), labels_B.clamp(min=0), reduction="none")
            total = (losses_B * (labels_B >= 0).float()).sum()
            # Gradients of the parts add up, those of table rows too: a step is one step of the whole batch.
            torch.autograd.backward(total / mean_count)
            totals.append(total.detach())
        with torch.no_grad():
            sums = {name: p.grad.sum() for name, p in self._trained if p.grad is not None}
        self.dense.step()
        self.dense.zero_grad(set_to_none=True)
        self.rows.step()
        with torch.no_grad():
            if sums:
                self._finite.note(list(sums), torch.stack(list(sums.values())), self.rows.steps_done)
            self.loss_and_count += torch.stack([torch.stack(totals).sum(), count])

    def _evaluation_step(self, packed: PackedBatch) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            return self._logits(packed)
