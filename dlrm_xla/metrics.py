"""What a click model is judged by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.errors import UserError


def click_metrics(labels: NDArray[np.float32], logits: NDArray[np.float32]) -> dict[str, float]:
    """Exact AUC, log loss in nats, normalized entropy and accuracy at 0.5 of click logits [N].

    Normalized entropy is the log loss divided by the entropy of the labels' own click rate (He et al. 2014,
    "Practical Lessons from Predicting Clicks on Ads at Facebook", section 3). AUC by sorting all scores, ties
    counted half (scikit-learn).

    Raises UserError where labels are all the same, or a score is not finite.
    """
    from sklearn.metrics import roc_auc_score

    check_scores(logits)
    rate = float(labels.mean())
    if not 0 < rate < 1:
        raise UserError(
            f"all {len(labels):,} labels of the evaluated rows are {labels[0]:.0f}: there is no AUC. "
            "Check the label column (the first one) and the order of the rows."
        )
    z = logits.astype(np.float64)
    log_loss = float(np.mean(np.logaddexp(0, z) - labels * z))
    return {
        "auc": float(roc_auc_score(labels, z)),
        "log_loss": log_loss,
        "normalized_entropy": log_loss / _entropy(rate, rate),
        "accuracy": float(np.mean((z > 0) == (labels > 0.5))),
    }


def check_scores(logits: NDArray[np.float32]) -> None:
    """Raises a UserError where a score is not finite."""
    lost = len(logits) - int(np.isfinite(logits).sum())
    if lost:
        raise UserError(
            f"{lost:,} of {len(logits):,} scores are not finite, so there is no AUC. A model that training spoiled "
            "gives such: train with a lower --dense-lr or --row-lr, or take an earlier checkpoint."
        )


def base_rate_metrics(labels: NDArray[np.float32], train_rate: float) -> dict[str, float]:
    """The same metrics of the constant that predicts the training rows' click rate."""
    rate = float(labels.mean())
    log_loss = _entropy(rate, train_rate)
    return {
        "auc": 0.5,
        "log_loss": log_loss,
        "normalized_entropy": log_loss / _entropy(rate, rate),
        "accuracy": rate if train_rate > 0.5 else 1 - rate,
    }


def _entropy(rate: float, predicted: float) -> float:
    """Cross entropy in nats of clicks at ``rate`` under a constant prediction."""
    return float(-(rate * np.log(predicted) + (1 - rate) * np.log1p(-predicted)))
