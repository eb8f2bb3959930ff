"""What a metric is: statistics of each image, and figures that are functions of their means over images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..options import Configurable

if TYPE_CHECKING:
    from .catalogue import MetricInfo
    from .predictor import Predictor

Part = Literal["targets", "inputs", "predictor", "labels", "masks", "boxes", "explain"]
"""A part of a `MetricBatch` that a metric may require, besides the scores."""


@dataclass(frozen=True, eq=False)
class MetricBatch:
    """What metrics look at: the maps of one method on B images, and what is known of these images.

    Attributes:
        scores: (B, h, w) raw scores on the patch grid.
        targets: (B,) int64, the class that each map explains.
        inputs: (B, 3, H, W) normalised model input.
        predictor: the model.
        labels: (B,) int64, the class each image shows by its annotation.
        masks: (B, H, W) int8 in the pixels of the input: 1 object, 0 background, -1 left out.
        boxes: B tensors (n, 4) of x0, y0, x1, y1 in pixels of the input, edges exclusive.
        explain: inputs (b, 3, H, W) and targets (b,) to scores (b, h, w), by the same method.
        extent: pixels (height, width) of the input that the grid takes up; None for just all; see `Explanation.extent`.
    """

    scores: Tensor
    targets: Tensor | None = None
    inputs: Tensor | None = None
    predictor: Predictor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None
    boxes: Sequence[Tensor] | None = None
    explain: Callable[[Tensor, Tensor], Tensor] | None = None
    extent: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.scores.ndim != 3 or not self.scores.is_floating_point():
            raise InputError(
                f"found scores of shape {tuple(self.scores.shape)} and {self.scores.dtype}, expected floating point "
                "(B, h, w): one map an image. Maps of several targets are measured one target at a time"
            )
        for each in fields(self):
            value = None if each.name == "extent" else getattr(self, each.name)
            if isinstance(value, Tensor | list | tuple) and len(value) != len(self.scores):
                raise InputError(f"found {len(value)} {each.name} for {len(self.scores)} maps, expected one an image")

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Metric(Configurable):
    """Base of all metrics. Options are the fields; an instance is one fully configured metric.

    A metric gives statistics of each image, and its figures are functions of the statistics' means over images: the
    mean itself, or a ratio or a maximum of means, as pooled figures are. So results of parts of a data set add up, an
    interval comes from resampling images, and one table of rows holds everything.

    Attributes:
        info: what the decorator was told: name, title, source, figures.
    """

    info: ClassVar[MetricInfo]

    @abstractmethod
    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Statistics of each image: (B,) or (B, S) by name, floating point, NaN where an image allows none.

        Maps with NaN or infinite scores never arrive here. A statistic may be missing where the batch lacks what it
        needs beyond what the metric requires.
        """

    @abstractmethod
    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Figures (…) by name, from the statistics' means (…) or (…, S) over images; leading axes are resamples.

        A figure whose statistics are missing is left out.
        """


def diagnose(scores: Tensor) -> dict[str, Tensor]:
    """What makes a map hard to rank.

    Args:
        scores: (B, h, w).

    Returns:
        ``broken`` (B,) bool, NaN or infinite scores; ``constant`` (B,) bool, all patches alike; ``tied`` (B,) in
        [0, 1], the share of patches whose score another patch has too.
    """
    flat = scores.flatten(1)
    ordered = flat.sort(dim=1).values
    same = ordered[:, 1:] == ordered[:, :-1]
    edge = same.new_zeros(len(flat), 1)
    tied = torch.cat([edge, same], 1) | torch.cat([same, edge], 1)
    broken = ~flat.isfinite().all(1)
    return {
        "broken": broken,
        "constant": (flat.amax(1) == flat.amin(1)) & ~broken,
        "tied": tied.double().mean(1),
    }
