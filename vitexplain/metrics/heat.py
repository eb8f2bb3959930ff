"""Maps in the pixels of the model's input, as metrics of localisation and segmentation compare them with objects."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..render import normalise, upsample
from .metric import MetricBatch

Upsampling = Literal["bilinear", "nearest", "bicubic"]


def on_pixels(batch: MetricBatch, size: tuple[int, ...], mode: Upsampling = "bilinear") -> Tensor:
    """A batch's scores upsampled to its input's pixels (B, H, W), float32; a flat map stays flat, without rounding.

    It is done in float32, as the published protocols do, since equal values and values at a threshold hang on it.
    """
    scores, (height, width) = batch.scores, size
    low, high = (bound[:, None, None].float() for bound in (scores.amin((1, 2)), scores.amax((1, 2))))
    return torch.where(low == high, low, upsample(scores, (height, width), mode, batch.extent))


def scaled_on_pixels(batch: MetricBatch, size: tuple[int, ...], mode: Upsampling = "bilinear") -> Tensor:
    """The same (B, H, W) and then scaled to [0, 1], each map by its own range; a flat map is 0."""
    return normalise(on_pixels(batch, size, mode))
