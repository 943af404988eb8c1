"""Centres of rows by k-means, and the nearest of them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def cluster(rows_ND: Tensor, weights_N: Tensor, count: int) -> Tensor:
    """At most ``count`` centres [K, D] of k-means over weighted rows; few squared errors, not the fewest."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    numbers, weights = rows_ND.detach().numpy(), weights_N.numpy().astype("float64")
    # Rows that nobody looks up count a little, so that a centre is near where there are no others.
    weights = weights + weights.mean() / 1000
    distinct = min(count, len(rows_ND))
    if len(numbers) * distinct <= 2**24:
        means = KMeans(distinct, n_init=1, max_iter=50, random_state=0)
    else:
        means = MiniBatchKMeans(distinct, n_init=1, batch_size=max(4096, 2 * distinct), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different rows than centres is no fault
        means.fit(numbers, sample_weight=weights)
    return torch.from_numpy(means.cluster_centers_).float()


def nearest(rows_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """Number of the nearest centre [N]."""
    found = []
    half_K = centres_KD.square().sum(1) / 2
    for part in torch.split(rows_ND, max(1, 2**24 // len(centres_KD))):
        found.append((part @ centres_KD.t() - half_K).argmax(1))
    return torch.cat(found)
