"""Mean curves over images, with their pointwise intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..metrics.statistics import Sample, drawn_weights
from .figures import CONFIDENCE, RESAMPLES


@dataclass(frozen=True)
class Curve:
    """A mean curve with its interval at each point; three arrays (S,)."""

    mean: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]


def mean_curve(curves: npt.NDArray[np.float64], seed: int) -> Curve:
    """The mean of curves over images, with 95 % percentile intervals from resampling images.

    Args:
        curves: (n, S), NaN where an image has none.
        seed: of the resampling; the same images are drawn for the same seed and n.
    """
    sample = Sample.of({"curve": curves}, dict)
    drawn = [sample.weighted(weights)["curve"] for weights in drawn_weights(len(sample), RESAMPLES, sample.width, seed)]
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = torch.cat(drawn).nanquantile(tails, 0).numpy()
    mean: npt.NDArray[np.float64] = sample.figures()["curve"].numpy()
    return Curve(mean, low, high)
