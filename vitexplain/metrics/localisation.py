"""Localisation: does the relevance fall on the object?"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def energy_in_mask(scores: Tensor, masks: Tensor) -> Tensor:
    """Share of positive relevance that falls on the object.

    A patch counts by the share of its pixels that the mask covers; negative scores count as zero. The chance level
    is the mask's share of the image.

    Args:
        scores: (..., h, w) raw scores on the patch grid.
        masks: (..., H, W) bool or 0/1, exact pixel masks; H and W are multiples of h and w.

    Returns:
        (...) in [0, 1], float32; NaN where no score is positive.

    Raises:
        InputError: shapes that do not fit.
    """
    (h, w), (height, width) = scores.shape[-2:], masks.shape[-2:]
    if scores.shape[:-2] != masks.shape[:-2] or height % h or width % w:
        raise InputError(
            f"found scores {tuple(scores.shape)} and masks {tuple(masks.shape)}; expected the same leading shape, and "
            "mask sides that are multiples of the grid's"
        )
    flat = masks.float().reshape(-1, 1, height, width)
    covered = F.avg_pool2d(flat, (height // h, width // w)).reshape(scores.shape)
    positive = scores.float().clamp(min=0)
    return (positive * covered).sum((-2, -1)) / positive.sum((-2, -1))
