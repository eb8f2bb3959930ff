"""Perturbation tests: pixels vanish in the order of the map, and the prediction goes with them, or stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..options import option
from .catalogue import Figure, register_metric
from .curves import CurveMetric
from .metric import MetricBatch
from .ordering import ORDERS
from .replacement import REPLACEMENTS
from .responses import PixelMetric, Responses, clean_responses

LEAST_PROBABILITY = 1e-12
"""Smaller probabilities count as this one in the log-odds."""

_CHEFER = (
    "Chefer, Gur, Wolf: Transformer Interpretability Beyond Attention Visualization, CVPR 2021, section 4; AOPC and "
    "log-odds as in Qiang et al.: AttCAT, NeurIPS 2022"
)
_DIFFMASK = "Nalmpantis et al.: Vision DiffMask, CVPR Workshops 2023, table 1"


@dataclass(frozen=True)
class RemovalMetric(PixelMetric, CurveMetric):
    """Base of tests that replace ever more pixels of the image.

    Attributes:
        most_relevant_first: highest scores go first; else lowest.
    """

    most_relevant_first: ClassVar[bool] = True

    def removed(self, batch: MetricBatch, classes: Tensor) -> Responses:
        """What the model says, (B, S), at each of `fractions`; round numbers of pixels are rounded down."""
        ranking = self.ranking(batch, most_relevant_first=self.most_relevant_first)
        bounds = ranking.bounds(self.steps)
        return self.respond(batch, ranking, [(0, bounds[point]) for point in self.points], classes)


@dataclass(frozen=True)
class PerturbationMetric(RemovalMetric):
    """10 % to 90 % of the pixels turn black; accuracy, agreement and probability along the way.

    Statistics of an image: ``probability`` (S,) of the explained class; ``agreement`` (S,), 1 where the prediction is
    still that of the unchanged image; ``accuracy`` (S,), 1 where it is the label, if the batch has labels;
    ``log_odds`` (S,), ln of the probability over that of the unchanged image, with probabilities below 1e-12 taken as
    1e-12; and ``clean_probability``, ``clean_accuracy``.

    The published areas are trapezoids over 0 to 90 %, the unchanged image first: so the authors said when asked, and
    that is the default. Others close the curve with 0 at 100 %, which adds up to a point, or average the nine values.
    AOPC and log-odds average the nine steps, the unchanged image left out; the sign of a drop is kept.
    """

    area_convention: str = option(
        "trapezoid_measured",
        "what AUC means: trapezoids from the unchanged image to the last step; the same, closed with 0 at 100 %; or "
        "the plain mean of the steps",
        choices=("trapezoid_measured", "trapezoid", "steps"),
    )
    curves = ("accuracy", "agreement", "probability")
    ends = False

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """The statistics named above."""
        targets = cast("Tensor", batch.targets)
        clean = clean_responses(batch, targets)
        found = self.removed(batch, targets)
        least = math.log(LEAST_PROBABILITY)
        statistics = {
            "agreement": (found.predicted == clean.predicted[:, None]).double(),
            "probability": found.probability,
            "clean_probability": clean.probability,
            "log_odds": found.log_probability.clamp(min=least) - clean.log_probability.clamp(min=least)[:, None],
        }
        if batch.labels is not None:
            labels = batch.labels.to(found.predicted)
            statistics["accuracy"] = (found.predicted == labels[:, None]).double()
            statistics["clean_accuracy"] = (clean.predicted == labels).double()
        return statistics

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Areas in percent; AOPC as a difference of probabilities; log-odds in nats."""
        figures = {}
        if "accuracy" in means:
            figures["accuracy_auc"] = self._percent(means["accuracy"], means["clean_accuracy"])
        agreement, probability, clean = (means[name] for name in ("agreement", "probability", "clean_probability"))
        figures["agreement_auc"] = self._percent(agreement, torch.ones_like(clean))
        figures["probability_auc"] = self._percent(probability, clean)
        figures["aopc"] = clean - probability.mean(-1)
        figures["log_odds"] = means["log_odds"].mean(-1)
        return figures

    def _percent(self, curve: Tensor, clean: Tensor) -> Tensor:
        """Area (…) in percent under the curve (…, S), which is `clean` (…) where nothing is removed."""
        if self.area_convention == "steps":
            return 100 * curve.mean(-1)
        last = [torch.zeros_like(clean)[..., None]] if self.area_convention == "trapezoid" else []
        return 100 * self.area(torch.cat([clean[..., None], curve, *last], -1))


def _figures(falls: bool) -> tuple[Figure, ...]:
    """The figures of a test in which a good map makes the prediction fall, or makes it last."""
    areas = [
        Figure(f"{name}_auc", f"AUC of {name} (%)", higher_is_better=not falls)
        for name in ("accuracy", "agreement", "probability")
    ]
    return (*areas, Figure("aopc", "AOPC", falls), Figure("log_odds", "log-odds", not falls))


@register_metric(
    "positive_perturbation",
    title="Positive perturbation: most relevant pixels blackened first",
    paper=_CHEFER,
    requires=("targets", "inputs", "predictor"),
    figures=_figures(falls=True),
)
class PositivePerturbation(PerturbationMetric):
    """A good map makes accuracy fall at once."""


@register_metric(
    "negative_perturbation",
    title="Negative perturbation: least relevant pixels blackened first",
    paper=_CHEFER,
    requires=("targets", "inputs", "predictor"),
    figures=_figures(falls=False),
)
class NegativePerturbation(PerturbationMetric):
    """A good map lets accuracy last."""

    most_relevant_first = False


@dataclass(frozen=True)
class DiffMaskPerturbation(RemovalMetric):
    """Noise instead of black, from no pixel to all, following the class that the unchanged image is given.

    At 224 pixels a step is 1,792 of them. Statistics of an image: ``probability`` (S,) of that class, and
    ``negative_log_likelihood`` (S,) in nats, which the paper calls D_KL. The figures are areas by trapezoids over 0 to
    100 %; the published ones have steps of width 1, so they are 28 times as large. Saturated maps have ties, within
    which pixels go row by row: `order="patches"` removes whole patches instead.
    """

    order: str = option("nearest", "what is ranked: pixels of the nearest or bilinear map, or patches", choices=ORDERS)
    replacement: str = option("noise", "what replaces the pixels that are taken away", choices=REPLACEMENTS)
    steps: int = option(28, "equal steps from the unchanged image to the wholly changed one", minimum=2)
    curves = ("probability", "negative_log_likelihood")
    ends = True

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """The statistics named above."""
        found = self.removed(batch, clean_responses(batch).predicted)
        return {"probability": found.probability, "negative_log_likelihood": -found.log_probability}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Areas under both curves."""
        return {f"{name}_auc": self.area(means[name]) for name in self.curves}


def _diffmask_figures(falls: bool) -> tuple[Figure, ...]:
    return (
        Figure("probability_auc", "AUC of probability", higher_is_better=not falls),
        Figure("negative_log_likelihood_auc", "AUC of -ln p (nats)", higher_is_better=falls),
    )


@register_metric(
    "diffmask_positive_perturbation",
    title="Positive perturbation as in Vision DiffMask: noise, most relevant pixels first",
    paper=_DIFFMASK,
    requires=("inputs", "predictor"),
    figures=_diffmask_figures(falls=True),
)
class DiffMaskPositivePerturbation(DiffMaskPerturbation):
    """A good map makes the probability fall at once."""


@register_metric(
    "diffmask_negative_perturbation",
    title="Negative perturbation as in Vision DiffMask: noise, least relevant pixels first",
    paper=_DIFFMASK,
    requires=("inputs", "predictor"),
    figures=_diffmask_figures(falls=False),
)
class DiffMaskNegativePerturbation(DiffMaskPerturbation):
    """A good map lets the probability last."""

    most_relevant_first = False
