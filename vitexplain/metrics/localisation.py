"""Localisation: does relevance fall on the object, and does its maximum?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..options import option
from .catalogue import Figure, register_metric
from .heat import on_pixels
from .metric import Metric, MetricBatch
from .objects import box_masks, object_masks, object_share, unknown_or_large


def energy_in_mask(scores: Tensor, masks: Tensor) -> Tensor:
    """Share of positive relevance that falls on the object.

    A patch counts by the share of its pixels that the mask covers; negative scores count as zero. The chance level
    is the mask's share of the image.

    Args:
        scores: (..., h, w) raw scores on the patch grid, or on pixels.
        masks: (..., H, W) exact pixel masks, bool or numbers: 1 object, 0 background, -1 left out; H and W are
            multiples of h and w.

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

    def covered(pixels: Tensor) -> Tensor:
        flat = pixels.float().reshape(-1, 1, height, width)
        return F.avg_pool2d(flat, (height // h, width // w)).reshape(scores.shape)

    positive = scores.float().clamp(min=0)
    return (positive * covered(masks == 1)).sum((-2, -1)) / (positive * covered(masks >= 0)).sum((-2, -1))


@dataclass(frozen=True)
class _Localisation(Metric):
    upsampling: Literal["bilinear", "nearest"] = option(
        "bilinear", "how patch scores come to pixels; nearest keeps whole patches", choices=("bilinear", "nearest")
    )
    largest_object: float = option(
        0.5, "objects that cover this share of the image or more are left out", minimum=0, maximum=1
    )

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means over images."""
        return dict(means)

    def _energy(self, batch: MetricBatch, masks: Tensor) -> dict[str, Tensor]:
        energy = energy_in_mask(on_pixels(batch, masks.shape[1:], self.upsampling), masks).double()
        energy = energy.masked_fill(unknown_or_large(masks, self.largest_object), torch.nan)
        return {"energy": energy, "chance": object_share(masks).masked_fill(energy.isnan(), torch.nan)}


_ENERGY_PAPER = "Wang et al., CVPR workshops 2020 (Score-CAM), section 4.2"
_ENERGY_FIGURES = (
    Figure("energy", "positive relevance on the object, share", True),
    Figure("chance", "the object's share of the image: what a flat map gets", None),
)


@register_metric(
    "energy_in_mask",
    title="Energy pointing game, masks",
    paper=_ENERGY_PAPER,
    requires=["masks"],
    figures=_ENERGY_FIGURES,
)
@dataclass(frozen=True)
class EnergyInMask(_Localisation):
    """Share of the upsampled map's positive relevance that falls on the object's mask.

    Negative values count as zero, and pixels that the mask leaves out do not count. Undefined (NaN) without an object,
    where the object covers `largest_object` of the image or more, and where no value is positive.
    """

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``energy`` and ``chance`` (B,), in [0, 1]."""
        return self._energy(batch, object_masks(batch))


@register_metric(
    "energy_in_box",
    title="Energy pointing game, boxes",
    paper=_ENERGY_PAPER,
    requires=["boxes", "inputs"],
    figures=_ENERGY_FIGURES,
)
@dataclass(frozen=True)
class EnergyInBox(_Localisation):
    """Share of the upsampled map's positive relevance that falls in any of the image's own boxes; see `EnergyInMask`.

    Boxes that overlap are one region, so that no relevance counts twice.
    """

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``energy`` and ``chance`` (B,), in [0, 1]."""
        return self._energy(batch, box_masks(batch))


@register_metric(
    "pointing_game",
    title="Pointing game",
    paper="Zhang et al., IJCV 2018 (Excitation Backprop), section 4.1",
    figures=(
        Figure("hit_rate", "most relevant pixel on the object, share of images", True),
        Figure("chance", "share of pixels that would be a hit: what a flat map gets", None),
    ),
)
@dataclass(frozen=True)
class PointingGame(_Localisation):
    """Whether the largest value of the upsampled map lies on the object: in its mask, or in one of its boxes.

    The mask is taken where the batch has one, else the boxes with `inputs`, in whose pixels they are. Pixels that the
    mask leaves out cannot be the largest. Values equal to the largest up to float32 rounding are tied, and the image
    counts by the share of them that hit: the expected result of choosing one by lot. So a flat map gets the chance
    level, not the corner's luck. With bilinear upsampling peaks inside the map are a little lower than equal ones at
    its border; with nearest they tie.

    The paper counts a hit within 15 pixels of the object, later work mostly without tolerance. Undefined (NaN)
    without an object, and where it covers `largest_object` of the image or more: there anything hits.
    """

    tolerance: int = option(0, "pixels around the object that still count as a hit, Euclidean distance", minimum=0)

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``hit_rate`` and ``chance`` (B,), in [0, 1]."""
        if batch.masks is None and batch.boxes is None:
            raise InputError(
                "pointing_game requires masks or boxes, and the batch has neither: pass MetricBatch(masks=…), or "
                "MetricBatch(boxes=…, inputs=…)"
            )
        masks = box_masks(batch) if batch.masks is None else object_masks(batch)
        counted = masks >= 0
        heat = on_pixels(batch, masks.shape[1:], self.upsampling).masked_fill(~counted, -torch.inf)
        largest = heat.amax((1, 2), keepdim=True)
        tied = heat >= largest - 4 * torch.finfo(heat.dtype).eps * largest.abs()
        hit = _within(masks == 1, self.tolerance)
        unknown = unknown_or_large(masks, self.largest_object)
        return {
            name: ((hit & region).double().sum((1, 2)) / region.sum((1, 2))).masked_fill(unknown, torch.nan)
            for name, region in (("hit_rate", tied), ("chance", counted))
        }


def _within(objects: Tensor, tolerance: int) -> Tensor:
    """Pixels at most `tolerance` away from an object's: (B, H, W) bool to the same."""
    if tolerance == 0:
        return objects
    elsewhere = (~objects).to(torch.uint8).cpu().numpy()
    distances = [cv2.distanceTransform(each, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for each in elsewhere]
    return torch.from_numpy(np.stack(distances) <= tolerance).to(objects.device)
