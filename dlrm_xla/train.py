"""The training loop: steps, validation, early stopping, checkpoints."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.batches import PackedBatch, Source
from dlrm_xla.graph_watch import GraphWatch, phase
from dlrm_xla.guards import doubts
from dlrm_xla.metrics import base_rate_metrics, click_metrics
from dlrm_xla.progress import Progress
from dlrm_xla.steps import Steps
from dlrm_xla.stopping import stop_signals


@dataclass
class Outcome:
    """What a training run came to, or how far it has come: with the seed, its place in the order of rows."""

    steps: int = 0
    samples: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    step_ms_median: float = math.nan
    best_step: int = 0
    best_log_loss: float = math.inf
    best_auc: float = math.nan
    validations_without_gain: int = 0
    stopped_early: bool = False
    interrupted: bool = False


def predict(steps: Steps, source: Source, split: str, watch: GraphWatch) -> NDArray[np.float32]:
    """Logits of every row of a split, in order."""
    logits = []
    for number, packed in enumerate(source.batches(split), 1):
        logits.append(steps.evaluate(packed))
        watch.after(phase("evaluation", packed), number)
    # One transfer per batch: a concatenation on the device would be one more graph.
    return steps.ranks.joined([b.cpu().numpy() for b in logits])[: len(source.labels(split))]


@dataclass(frozen=True)
class Reports:
    """Where a training run reports to.

    ``log`` takes one row per logging step and per validation, ``warn`` a line for the user, ``save`` the outcome so far
    and whether this is the best step yet.
    """

    log: Callable[[dict[str, Any]], None]
    warn: Callable[[str], None]
    save: Callable[[Outcome, bool], None]


def train(steps: Steps, source: Source, watch: GraphWatch, reports: Reports, outcome: Outcome | None = None) -> Outcome:
    """Trains for the configured epochs or until validation log loss stops falling.

    Saves after each validation, every `save_every` steps or `save_minutes`, and when interrupted: then it finishes the
    step at hand first. ``outcome`` is that of a checkpoint which ``steps`` hold, to go on from there.
    """
    training = _Training(steps, source, watch, reports, outcome or Outcome())
    shown, total = steps.ranks.first, training.per_epoch * steps.config.epochs
    with stop_signals(shown) as asked_to_stop, Progress(total, steps.config.batch_size, shown) as progress:
        training.run(asked_to_stop, progress)
    return training.outcome


class _Clock:
    """Milliseconds a step, over windows that end where the device is waited for; the first holds the compilation."""

    def __init__(self) -> None:
        self.windows: list[float] = []
        self.steps = 0
        self._start = time.perf_counter()
        self._warm = False

    def close(self) -> float:
        """Ends a window: its seconds, 0 of the first."""
        now = time.perf_counter()
        seconds = now - self._start if self._warm else 0.0
        if self._warm:
            self.windows.append(seconds / self.steps * 1000)
        self._start, self.steps, self._warm = now, 0, True
        return seconds

    def paused(self, seconds: float) -> None:
        """Takes out what was no step."""
        self._start += seconds


class _Training:
    """A training run: its outcome so far, and what follows a step when."""

    def __init__(
        self,
        steps: Steps,
        source: Source,
        watch: GraphWatch,
        reports: Reports,
        outcome: Outcome,
    ) -> None:
        self.steps, self.source, self.watch, self.reports = steps, source, watch, reports
        self.config, self.outcome = steps.config, outcome
        self.per_epoch = source.num_batches("train")
        per_epoch, parts = self.per_epoch, self.config.evals_per_epoch
        self.validations = {max(1, round(per_epoch * k / parts)) for k in range(1, parts + 1)}
        self.labels = source.labels("validation").numpy()
        self.base = base_rate_metrics(self.labels, float(source.labels("train").mean()))
        self.clock = _Clock()
        self.saved_at = time.monotonic()
        self.validated_at = 0
        self.doubted = False

    def run(self, asked_to_stop: Callable[[], bool], progress: Progress) -> None:
        """Trains to the end, or until it is asked to stop."""
        config, outcome, self.progress = self.config, self.outcome, progress
        self.progress.skip(outcome.steps)
        epoch, number = divmod(outcome.steps, self.per_epoch)
        outcome.stopped_early = 0 < config.patience <= outcome.validations_without_gain
        self.steps.check_bags()
        while epoch < config.epochs and not outcome.stopped_early and not outcome.interrupted:
            for packed in self.source.batches("train", epoch, number):
                if outcome.steps and (number or self.per_epoch) in self.validations:
                    # After the validation and what it saved, so that the best checkpoint is what was validated, and
                    # by the place in the data, so that a run that goes on does the same.
                    began = time.perf_counter()
                    self.steps.refresh()
                    self.watch.after("refresh", outcome.steps, 0)
                    self._paused_since(began)
                number += 1
                if self._step(packed, epoch, number, asked_to_stop):
                    outcome.interrupted = True
                    break
                if outcome.stopped_early:
                    break
            epoch, number = epoch + 1, 0
        if outcome.interrupted and self.validated_at != outcome.steps:
            # For the report only: what was saved before knows nothing of it, so the run goes on as if never stopped.
            if self.clock.steps:
                self._loss()
            result = self._validated()
            if not math.isfinite(outcome.best_log_loss):
                outcome.best_auc = result["auc"]
        windows = self.clock.windows
        outcome.step_ms_median = statistics.median(windows) if windows else math.nan

    def _step(self, packed: PackedBatch, epoch: int, number: int, asked_to_stop: Callable[[], bool]) -> bool:
        """The ``number``-th step of an epoch and what is due after it; whether to stop."""
        config, outcome, steps = self.config, self.outcome, self.steps
        steps.train(packed, outcome.steps)
        outcome.steps += 1
        to_save = (
            outcome.steps % config.save_every == 0
            if config.save_every
            else time.monotonic() - self.saved_at >= config.save_minutes * 60
        )
        # Ranks must stop and save after the same step, whichever of them was asked to.
        count, stop, due = steps.ranks.agree(int((packed.labels_B >= 0).sum()), asked_to_stop(), to_save)
        outcome.samples += count
        outcome.epochs = epoch + number / self.per_epoch
        self.clock.steps += 1
        self.watch.after(phase("train", packed), outcome.steps)
        self.progress.advance()
        validate = number in self.validations
        if outcome.steps == 1 or outcome.steps % config.log_every == 0 or validate:
            loss = self._loss()
            self.progress.show(loss=loss)
        if validate or due or stop:
            steps.device.synchronize()
        began = time.perf_counter()
        best = False
        if validate:
            result = self._validated()
            self.progress.show(loss=loss, validation_auc=result["auc"])
            best = self._judged(result)
        if validate or due or stop:
            self._save(best)
        self._paused_since(began)
        return bool(stop)

    def _loss(self) -> float:
        """Mean loss since the last call, logged; waits for the device, and fails where anything was not finite."""
        self.steps.check_finite()
        loss = self.steps.mean_loss()
        self.outcome.seconds += self.clock.close()
        self.reports.log({"step": self.outcome.steps, "samples": self.outcome.samples, "train_loss": loss})
        return loss

    def _validated(self) -> dict[str, float]:
        """Metrics of the validation rows, logged."""
        result = click_metrics(self.labels, predict(self.steps, self.source, "validation", self.watch))
        row = {f"validation_{k}": v for k, v in result.items()}
        self.reports.log({"step": self.outcome.steps, "samples": self.outcome.samples, **row})
        self.validated_at = self.outcome.steps
        return result

    def _judged(self, result: dict[str, float]) -> bool:
        """Whether a validation is the best yet; says whether to stop for want of gain, and warns of what looks wrong.

        By log loss: AUC on some ten thousand rows changes places at the fourth digit.
        """
        outcome, patience = self.outcome, self.config.patience
        best = result["log_loss"] < outcome.best_log_loss
        outcome.validations_without_gain += 1
        if best:
            outcome.best_log_loss, outcome.best_auc = result["log_loss"], result["auc"]
            outcome.best_step, outcome.validations_without_gain = outcome.steps, 0
        outcome.stopped_early = 0 < patience <= outcome.validations_without_gain
        doubt = doubts(result["auc"], result["log_loss"], self.base["log_loss"])
        long_enough = outcome.steps >= min(self.per_epoch, 500) or outcome.stopped_early
        if doubt and long_enough and not self.doubted:
            self.doubted = True
            self.reports.warn(f"step {outcome.steps}: {doubt}")
        return best

    def _save(self, best: bool) -> None:
        self.steps.check_finite()
        self.reports.save(self.outcome, best)
        self.watch.after("checkpoint", self.outcome.steps, len(self.steps.rows.arrays()))
        self.saved_at = time.monotonic()

    def _paused_since(self, began: float) -> None:
        """Takes what was no step out of the speeds."""
        seconds = time.perf_counter() - began
        self.clock.paused(seconds)
        self.progress.paused(seconds)
