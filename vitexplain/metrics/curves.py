"""Metrics that are curves: changed share of the image against what the model still says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..options import option
from .metric import Metric


@dataclass(frozen=True)
class CurveMetric(Metric):
    """Base of metrics that change the image in equal steps. Its curves are statistics, one row (S,) an image.

    ::

        rows = tally.rows
        plot(tally.metric.fractions, rows[tally.metric.curves[0]].mean(0))

    Attributes:
        curves: the statistics of shape (B, S) that are curves over `fractions`, the most telling first. One that needs
            more than the metric requires is missing where a batch lacks it.
        ends: whether the unchanged and the wholly changed image are points of the curve.
    """

    steps: int = option(10, "equal steps from the unchanged image to the wholly changed one", minimum=2)
    curves: ClassVar[tuple[str, ...]]
    ends: ClassVar[bool]

    @property
    def points(self) -> range:
        """Which of the steps are measured."""
        return range(self.steps + 1) if self.ends else range(1, self.steps)

    @property
    def fractions(self) -> tuple[float, ...]:
        """The share of the image that is changed at each of the S points, in [0, 1]."""
        return tuple(point / self.steps for point in self.points)

    def area(self, curve: Tensor) -> Tensor:
        """Area (…) under a curve (…, S) by trapezoids, over the range of `fractions`."""
        return torch.trapezoid(curve, dx=1 / self.steps)
