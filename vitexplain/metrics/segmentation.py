"""Maps as segmentations of the object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .catalogue import Figure, register_metric
from .heat import on_pixels, scaled_on_pixels
from .metric import Metric, MetricBatch
from .objects import object_masks, object_share


@register_metric(
    "segmentation",
    title="Segmentation",
    paper="Guillaumin et al., IJCV 2014 (data); Chefer et al., CVPR 2021, section 4 (protocol)",
    requires=["masks"],
    figures=(
        Figure("pixel_accuracy", "pixels classified right, share of all", True),
        Figure("mean_iou", "mean of the IoU of background and object, share", True),
        Figure("mean_average_precision", "average precision of an image's map and its inverse, share", True, 0.5),
        Figure("iou_background", "intersection over union of the background, share", True),
        Figure("iou_object", "intersection over union of the object, share", True),
        Figure("f1_rows", "F1 of pixel rows, only for comparison with published mF1, share", None),
    ),
)
@dataclass(frozen=True)
class Segmentation(Metric):
    """The map, cut at its own mean, against the object's mask: the ImageNet-Segmentation protocol.

    Maps are upsampled bilinearly and scaled to [0, 1]; object is what exceeds the map's mean. Pixel accuracy and IoU
    are of all pixels of all images together, so that correct, intersection and union are summed before dividing.
    Average precision is an image's, without a cut: the map and one minus the map in one list, against object and
    background; a map without information gets about 0.5. Pixels that a mask leaves out do not count.

    ``f1_rows`` is the published mF1, whose code takes rows of pixels for images: the mean of the F1 of each row in
    which any pixel counts, rows without object counting 0. It says little, and is for comparison only, with masks that
    leave nothing out.

    A flat map is all background, as in the published protocol, and `Summary.constant` says how many there were. That
    protocol also takes maps with NaN for flat ones; here they are left out and counted in `Summary.broken`.
    """

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Counts (B,), of background and object (B, 2); ``average_precision`` and ``f1_rows`` (B,)."""
        masks = object_masks(batch)
        heat = scaled_on_pixels(batch, masks.shape[1:])
        found = heat > heat.mean((1, 2), keepdim=True)
        truth, counted = masks == 1, masks >= 0
        pairs = [(~found & counted, ~truth & counted), (found & counted, truth & counted)]
        statistics = {
            "counted": counted.sum((1, 2)),
            "correct": ((found == truth) & counted).sum((1, 2)),
            "intersection": torch.stack([(first & second).sum((1, 2)) for first, second in pairs], 1),
            "union": torch.stack([(first | second).sum((1, 2)) for first, second in pairs], 1),
            "average_precision": _both_ways(heat, truth, counted),
            "f1_rows": _f1_rows(*pairs[1], counted),
        }
        empty = ~counted.any(2).any(1)
        return {name: value.double().masked_fill(_like(empty, value), torch.nan) for name, value in statistics.items()}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        iou = means["intersection"] / means["union"]
        return {
            "pixel_accuracy": means["correct"] / means["counted"],
            "mean_iou": iou.mean(-1),
            "mean_average_precision": means["average_precision"],
            "iou_background": iou[..., 0],
            "iou_object": iou[..., 1],
            "f1_rows": means["f1_rows"],
        }


@register_metric(
    "auprc",
    title="AUPRC",
    paper="Gao et al., TPAMI 2022 (ImageNet-S, data)",
    requires=["masks"],
    figures=(
        Figure("auprc", "area under an image's precision and recall, mean over images, share", True),
        Figure("chance", "the object's share of the image: what a flat map gets", None),
    ),
)
@dataclass(frozen=True)
class AreaUnderPrecisionRecall(Metric):
    """Area under the precision-recall curve of an image's pixels, without a threshold; mean over images.

    The map is upsampled bilinearly. The area is the average precision, Σ_n (recall_n − recall_{n−1}) · precision_n,
    equal values being one threshold, without interpolation. Pixels that a mask leaves out do not count. Undefined
    (NaN) for images without an object.
    """

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``auprc`` and ``chance`` (B,), in [0, 1]."""
        masks = object_masks(batch)
        heat = on_pixels(batch, masks.shape[1:])
        areas = [
            average_precision(each[mask >= 0], mask[mask >= 0] == 1) for each, mask in zip(heat, masks, strict=True)
        ]
        area = torch.stack(areas)
        return {"auprc": area, "chance": object_share(masks).masked_fill(area.isnan(), torch.nan)}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(means)


def average_precision(values: Tensor, positive: Tensor) -> Tensor:
    """Σ_n (recall_n − recall_{n−1}) · precision_n over the distinct values from the highest down.

    Args:
        values: (n,), higher for what is more likely positive.
        positive: (n,) bool.

    Returns:
        () float64 in [0, 1]; NaN where nothing is positive.
    """
    if not bool(positive.any()):
        return torch.full((), torch.nan, dtype=torch.float64, device=values.device)
    ordered, order = values.sort(descending=True)
    ends = torch.cat([ordered[1:] != ordered[:-1], positive.new_ones(1)]).nonzero()[:, 0]
    true = positive[order].double().cumsum(0)[ends]
    gained = true.diff(prepend=true.new_zeros(1)) / true[-1]
    return (gained * true / (ends + 1)).sum()


def _both_ways(heat: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Average precision (B,) of background by 1 - heat and object by heat, as one list."""
    return torch.stack(
        [
            average_precision(torch.cat([1 - each[known], each[known]]), torch.cat([~right[known], right[known]]))
            for each, right, known in zip(heat, truth, counted, strict=True)
        ]
    )


def _f1_rows(found: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Mean F1 (B,) of the rows in which any pixel counts; `found` and `truth` hold counted pixels alone."""
    both, either = (found & truth).sum(2).double(), (found.sum(2) + truth.sum(2)).double()
    scores = 2 * both / either.clamp(min=1)
    return scores.sum(1) / counted.any(2).sum(1)


def _like(rows: Tensor, values: Tensor) -> Tensor:
    return rows.reshape(-1, *(1,) * (values.ndim - 1))
