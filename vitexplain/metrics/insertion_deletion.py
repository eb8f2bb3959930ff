"""Insertion and deletion: the probability of a class while its evidence comes, or goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from ..options import option
from .catalogue import Figure, register_metric
from .curves import CurveMetric
from .metric import MetricBatch
from .replacement import REPLACEMENTS
from .responses import PixelMetric

_RISE = "Petsiuk, Das, Saenko: RISE, BMVC 2018"


@dataclass(frozen=True)
class CausalMetric(PixelMetric, CurveMetric):
    """The softmax of the explained class while pixels change, most relevant first; both ends are points of the curve.

    At 224 pixels a step is 8 × 224 of them, as is usual for transformers; RISE takes 224. The substrates are RISE's:
    the mean colour for deletion, the blurred image for insertion. Step and substrate change the ranking of methods:
    figures compare only where both are the same.

    Attributes:
        inserts: the image appears in the substrate; else the substrate in the image.
    """

    steps: int = option(28, "equal steps from the one image to the other", minimum=2)
    inserts: ClassVar[bool]
    curves = ("probability",)
    ends = True

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``probability`` (B, S) of the explained class."""
        ranking = self.ranking(batch)
        bounds = [ranking.bounds(self.steps)[point] for point in self.points]
        intervals = [(bound, ranking.count) if self.inserts else (0, bound) for bound in bounds]
        return {"probability": self.respond(batch, ranking, intervals, cast("Tensor", batch.targets)).probability}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The area by trapezoids, in [0, 1]."""
        return {"auc": self.area(means["probability"])}


@register_metric(
    "insertion",
    title="Insertion: most relevant pixels appear first",
    paper=_RISE,
    requires=("targets", "inputs", "predictor"),
    figures=(Figure("auc", "insertion AUC", higher_is_better=True),),
)
@dataclass(frozen=True)
class Insertion(CausalMetric):
    """A good map brings the class up at once."""

    replacement: str = option("blur", "the substrate in which the image appears", choices=REPLACEMENTS)
    inserts = True


@register_metric(
    "deletion",
    title="Deletion: most relevant pixels vanish first",
    paper=_RISE,
    requires=("targets", "inputs", "predictor"),
    figures=(Figure("auc", "deletion AUC", higher_is_better=False),),
)
@dataclass(frozen=True)
class Deletion(CausalMetric):
    """A good map brings the class down at once."""

    replacement: str = option("zeros", "the substrate that takes the image's place", choices=REPLACEMENTS)
    inserts = False
