"""Pixel average precision: do the map's values separate object from background over a whole data set?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..options import option
from .catalogue import Figure, register_metric
from .heat import scaled_on_pixels
from .metric import Metric, MetricBatch
from .objects import object_masks


@register_metric(
    "pixel_average_precision",
    title="PxAP",
    paper="Choe et al., CVPR 2020 (Evaluating Weakly Supervised Object Localization Methods Right), section 4.1",
    requires=["masks"],
    figures=(
        Figure("pixel_average_precision", "area under precision and recall of all pixels, share", True),
        Figure("chance", "the objects' share of all pixels: what a flat map gets", None),
    ),
)
@dataclass(frozen=True)
class PixelAveragePrecision(Metric):
    """Area under the precision-recall curve of the pixels of all images together, one threshold for all of them.

    Maps are upsampled bicubically and scaled to [0, 1] each, a flat one to 0. Pixels are counted in bins between
    thresholds, and the largest value in one of its own; with precision and recall of what lies at or above threshold
    τ_l, from the highest down: PxAP = Σ_l precision(τ_l) · (recall(τ_l) − recall(τ_{l−1})), recall starting at 0.
    Pixels that a mask leaves out do not count. Large objects weigh more than small ones: `auprc` is the same curve an
    image at a time. Undefined (NaN) where a mask leaves out everything.
    """

    thresholds: int = option(1000, "how many thresholds, evenly spaced from 0 to below 1, besides 1", minimum=1)

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``on_object`` and ``on_background`` (B, thresholds + 1): how many pixels lie in each bin."""
        masks = object_masks(batch)
        heat = scaled_on_pixels(batch, masks.shape[1:], "bicubic")
        edges = torch.from_numpy(np.append(np.arange(self.thresholds) * (1 / self.thresholds), 1)).to(heat.device)
        bins = torch.bucketize(heat.double(), edges, right=True) - 1
        empty = (masks < 0).all(2).all(1)[:, None]
        return {
            name: _histograms(bins, masks == value, len(edges)).masked_fill(empty, torch.nan)
            for name, value in (("on_object", 1), ("on_background", 0))
        }

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        true, false = (means[name].flip(-1).cumsum(-1) for name in ("on_object", "on_background"))
        recall = true / true[..., -1:]
        gained = recall.diff(dim=-1, prepend=torch.zeros_like(recall[..., :1]))
        precision = true / (true + false)
        area = torch.where(true + false == 0, 0, precision * gained).sum(-1)
        return {"pixel_average_precision": area, "chance": precision[..., -1]}


def _histograms(bins: Tensor, counted: Tensor, count: int) -> Tensor:
    """How many counted pixels of each image lie in each bin: (B, H, W) whole numbers to (B, count) float64."""
    images = torch.arange(len(bins), device=bins.device)[:, None, None] * count
    histogram = torch.bincount((bins + images)[counted], minlength=len(bins) * count)
    return histogram.reshape(len(bins), count).double()
