"""Masks made of what a model sees: channels of its tokens, alike ones taken together."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


def merged_channels(tokens: Tensor, distance: float) -> Tensor:
    """Channels as maps over patches, scaled to [0, 1]; those that are alike summed, and scaled again.

    Alike is what complete-linkage clustering by cosine distance puts together.

    Args:
        tokens: (P, D) features of an image's patches.
        distance: largest cosine distance within a cluster, 0 to 2.

    Returns:
        (K, P) in [0, 1], K at most D. A channel that is the same on all patches makes no mask.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    maps = _scaled(tokens.detach().T.double())
    if len(maps) < 2:
        return maps.to(tokens)
    distances = pdist(maps.cpu().numpy(), "cosine").clip(min=0)
    clusters = torch.from_numpy(fcluster(linkage(distances, "complete"), distance, "distance")).to(maps.device) - 1
    sums = maps.new_zeros(int(clusters.max()) + 1, maps.shape[1]).index_add_(0, clusters.long(), maps)
    return _scaled(sums).to(tokens)


def central_channels(tokens: Tensor, count: int, iterations: int, seed: int) -> Tensor:
    """Centroids (K, P) of the channels of tokens (P, D), K = min(count, D), by k-means from random channels on.

    Args:
        tokens: (P, D) features of an image's patches.
        count: how many centroids.
        iterations: of Lloyd's algorithm.
        seed: of the channels that it starts from.
    """
    from scipy.cluster.vq import kmeans2

    channels = tokens.detach().T.double().cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(channels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty cluster keeps its centroid, and that is meant
        centroids, _ = kmeans2(channels, channels[np.sort(order[:count])], iterations, minit="matrix")
    return torch.from_numpy(centroids).to(tokens)


def _scaled(maps: Tensor) -> Tensor:
    """Maps (K, P) from 0 to 1 each, without those that are constant."""
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    varied = (high > low)[:, 0]
    return ((maps - low) / (high - low))[varied]
