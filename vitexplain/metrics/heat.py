"""Maps in the pixels of the model's input, as metrics of localisation and segmentation compare them with objects."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..render import normalise, upsample

Upsampling = Literal["bilinear", "nearest", "bicubic"]


def on_pixels(scores: Tensor, size: tuple[int, ...], mode: Upsampling = "bilinear") -> Tensor:
    """Scores (B, h, w) upsampled to (B, H, W), float32; a flat map stays flat, without the rounding of interpolation.

    It is done in float32, as the published protocols do, since equal values and values at a threshold hang on it.
    """
    height, width = size
    low, high = (bound[:, None, None].float() for bound in (scores.amin((1, 2)), scores.amax((1, 2))))
    return torch.where(low == high, low, upsample(scores, (height, width), mode))


def scaled_on_pixels(scores: Tensor, size: tuple[int, ...], mode: Upsampling = "bilinear") -> Tensor:
    """Scores (B, h, w) upsampled and then scaled to [0, 1], each map by its own range: (B, H, W); a flat map is 0."""
    return normalise(on_pixels(scores, size, mode))
