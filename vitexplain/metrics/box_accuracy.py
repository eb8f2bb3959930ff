"""Box accuracy: do boxes drawn around the map's hot regions fit the object's?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..boxes import HIGHEST_LEVEL, Boxes, box_iou, boxes_above, check_boxes, heat_levels
from ..options import option
from ..render import Pixels
from .catalogue import Figure, register_metric
from .heat import scaled_on_pixels
from .metric import Metric, MetricBatch
from .objects import input_size

_PAPER = "Choe et al., CVPR 2020 (Evaluating Weakly Supervised Object Localization Methods Right), section 4.1"


@dataclass(frozen=True)
class _BoxAccuracy(Metric):
    thresholds: int = option(1000, "how many thresholds, evenly spaced from 0 to below 1", minimum=1)

    def _hits(self, batch: MetricBatch, overlaps: Sequence[float], *, largest: bool) -> dict[str, Tensor]:
        """For each overlap, whether a box reaches it: (B, S) at each of the levels that the thresholds amount to."""
        maps = heat_levels(scaled_on_pixels(batch, input_size(batch), "bicubic"))
        best = np.stack(
            [
                _best_overlaps(levels, self._cuts(), truth.numpy().astype(np.int64), largest)
                for levels, truth in zip(maps, check_boxes(cast("Sequence[Tensor]", batch.boxes)), strict=True)
            ]
        )
        return {
            _percent(overlap): torch.from_numpy(np.where(np.isnan(best), np.nan, best >= overlap))
            for overlap in overlaps
        }

    def _cuts(self) -> npt.NDArray[np.int64]:
        """The levels that the thresholds cut at: maps have 256 levels, so that many thresholds draw the same boxes."""
        return np.unique((self._thresholds() * HIGHEST_LEVEL).astype(np.int64))

    def _thresholds(self) -> npt.NDArray[np.float64]:
        return np.arange(self.thresholds, dtype=np.float64) * (1 / self.thresholds)


@register_metric(
    "max_box_accuracy",
    title="MaxBoxAcc",
    paper=_PAPER,
    requires=["boxes", "inputs"],
    figures=(
        Figure("max_box_accuracy", "images whose box overlaps by 0.5, share at the best threshold", True),
        Figure("threshold", "the best threshold, share of the map's largest value", None),
    ),
)
@dataclass(frozen=True)
class MaxBoxAccuracy(_BoxAccuracy):
    """Share of images in which the box around the map's largest hot region overlaps an annotated box by 0.5.

    Maps are upsampled bicubically and scaled to [0, 1] each, a flat one to 0; how boxes are drawn and their
    intersection over union is taken is said at `vitexplain.boxes.heatmap_to_boxes` and `box_iou`. Annotated boxes are
    cut to whole pixels. One threshold holds for all images, the best for them: so the figure is that of a threshold
    chosen on the same images. It is also known as localisation accuracy with the class known. Undefined (NaN) for
    images without boxes.
    """

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``hits`` (B, S): 1 where the box fits at each of S levels of the map, ascending, else 0."""
        return {"hits": self._hits(batch, [0.5], largest=True)["50"]}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        best, place = means["hits"].max(-1)
        thresholds = self._thresholds()
        reaching = np.searchsorted((thresholds * HIGHEST_LEVEL).astype(np.int64), self._cuts())
        chosen = torch.from_numpy(thresholds[reaching]).to(place.device)[place]
        return {"max_box_accuracy": best, "threshold": chosen.masked_fill(best.isnan(), torch.nan)}


@register_metric(
    "max_box_accuracy_v2",
    title="MaxBoxAccV2",
    paper="Choe et al., TPAMI 2022 (Evaluation for Weakly Supervised Object Localization), section 4.1",
    requires=["boxes", "inputs"],
    figures=(
        Figure("max_box_accuracy_v2", "mean of the three accuracies, share", True),
        Figure("box_accuracy_30", "images with a box that overlaps by 0.3, share at the best threshold", True),
        Figure("box_accuracy_50", "images with a box that overlaps by 0.5, share at the best threshold", True),
        Figure("box_accuracy_70", "images with a box that overlaps by 0.7, share at the best threshold", True),
    ),
)
@dataclass(frozen=True)
class MaxBoxAccuracyV2(_BoxAccuracy):
    """Mean over overlaps of 0.3, 0.5 and 0.7 of the share of images in which any box overlaps an annotated one by it.

    Every contour at a threshold gets a box, and the best pair of a drawn and an annotated box counts; each overlap has
    a best threshold of its own. All else as in `MaxBoxAccuracy`.
    """

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``hits_30``, ``hits_50``, ``hits_70`` (B, S): 1 where a box fits at each of S levels of the map, else 0."""
        hits = self._hits(batch, [0.3, 0.5, 0.7], largest=False)
        return {f"hits_{percent}": value for percent, value in hits.items()}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        best = {name.replace("hits", "box_accuracy"): value.amax(-1) for name, value in means.items()}
        return {"max_box_accuracy_v2": torch.stack(list(best.values())).mean(0), **best}


def _best_overlaps(levels: Pixels, cuts: npt.NDArray[np.int64], truth: Boxes, largest: bool) -> npt.NDArray[np.float64]:
    """The best IoU (S,) of a box drawn at each of S cuts (ascending) with an annotated one; NaN without annotation."""
    if not len(truth):
        return np.full(len(cuts), np.nan)
    # cuts between the same two levels of the map draw the same boxes
    below = np.searchsorted(np.unique(levels), cuts, side="right")
    _, first, place = np.unique(below, return_index=True, return_inverse=True)
    drawn = (boxes_above(levels, int(cut), largest=largest) for cut in cuts[first])
    return np.array([box_iou(boxes, truth).max(initial=0) for boxes in drawn])[place]


def _percent(overlap: float) -> str:
    return f"{100 * overlap:.0f}"
