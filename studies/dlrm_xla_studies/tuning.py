"""The tuning stage: the same number of trials for every method, chosen by Optuna, compared by validation log loss.

The sampler is seeded and told the same figures in the same order, so a study that goes on asks for the trials that it
had asked for, finds them finished, and needs no database beside its cells.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import fields, replace

from dlrm_xla.config import Config, resolve
from dlrm_xla_studies.grid import Cell
from dlrm_xla_studies.spec import Tuning


def tune(place: Cell, tuning: Tuning, loss_of: Callable[[Cell], float | None]) -> dict[str, float]:
    """The settings with the lowest validation log loss of ``trials`` runs; the first trial is the preset's own.

    ``loss_of`` runs a cell and gives its loss, None where it failed. Where all fail, the preset's settings are kept.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    method = place.method()
    seed = int.from_bytes(hashlib.sha256(method.encode()).digest()[:4], "big")
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, tuning.trials // 2))
    study = optuna.create_study(sampler=sampler, direction="minimize")
    start = _preset_values(place)
    for key, (low, high) in tuning.search.items():
        start[key] = min(max(start[key], low), high)
    study.enqueue_trial({key: start[key] for key in place.tuned})
    for _ in range(tuning.trials):
        trial = study.ask()
        values = {key: _rounded(trial.suggest_float(key, *tuning.search[key], log=True)) for key in place.tuned}
        told = tuple(dict.fromkeys((*place.told, *place.tuned)))
        loss = loss_of(replace(place, settings={**place.settings, **values}, trial=method, tuned=(), told=told))
        if loss is None or not math.isfinite(loss):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, loss)
    finished = [t for t in study.trials if t.state is optuna.trial.TrialState.COMPLETE]
    best = min(finished, key=lambda t: t.value or 0.0).params if finished else start
    return {key: _rounded(best[key]) for key in place.tuned}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _preset_values(place: Cell) -> dict[str, float]:
    config = resolve(dict(place.settings), None)[0]
    # A rate of 0 means that of the dense parameters.
    values = {f.name: getattr(config, f.name) for f in fields(Config) if isinstance(getattr(config, f.name), float)}
    return values | {"plugin_lr": config.plugin_lr or config.dense_lr}
