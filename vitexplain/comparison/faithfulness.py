"""How faithful each map of a comparison is to the model, measured on the map's very image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch

from ..metrics.batches import InformedPredictor
from ..metrics.catalogue import create_metric
from ..metrics.curves import CurveMetric
from ..metrics.metric import Metric, MetricBatch
from ..metrics.tally import measure, own_statistics

if TYPE_CHECKING:
    from ..explanation import Explanation
    from .comparison import Case, Comparison

METRICS = ("deletion", "insertion", "saco")
"""Measured for each map, with the metrics' own options; but SaCo follows the class that the map explains."""

_OPTIONS = {"saco": {"of": "explained"}}
_FORWARD_SIZE = 64


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Figures and curves of each map.

    Attributes:
        metrics: the metrics by name.
        figures: each metric's first figure, by its name, the case and the method's label; NaN where there is none: for
            contrasts and functions of the logits, since all three follow the probability of one class.
        curves: probability (S,) of the explained class while pixels change, for the metrics that are curves, by the
            same; over `fractions` of the metric.
    """

    metrics: Mapping[str, Metric]
    figures: Mapping[tuple[str, Case, str], float]
    curves: Mapping[tuple[str, Case, str], npt.NDArray[np.float64]]


def measure_faithfulness(comparison: Comparison) -> Faithfulness:
    """Measures every map of a comparison.

    Raises:
        InputError: there are too few patches for a metric's steps.
    """
    metrics = {name: create_metric(name, **_OPTIONS.get(name, {})) for name in METRICS}
    figures: dict[tuple[str, Case, str], float] = {}
    curves: dict[tuple[str, Case, str], npt.NDArray[np.float64]] = {}
    cases = {(case.model, case.image, case.index): case for case in comparison.cases}
    for (model, method), explanation in comparison.explanations.items():
        for index in range(explanation.scores.shape[1]):
            told = [cases[model, image, index] for image in range(len(explanation))]
            if not told[0].is_class:
                figures |= {(name, case, method): math.nan for name in metrics for case in told}
                continue
            batch = _batch(comparison, model, explanation, index)
            for name, metric in metrics.items():
                statistics = {
                    key: torch.from_numpy(rows) for key, rows in own_statistics(measure(metric, batch)).items()
                }
                first = next(iter(metric.summarise(statistics).values()))
                for image, (case, value) in enumerate(zip(told, first.tolist(), strict=True)):
                    figures[name, case, method] = value
                    if isinstance(metric, CurveMetric):
                        curves[name, case, method] = statistics[metric.curves[0]][image].numpy()
    return Faithfulness(metrics, figures, curves)


def _batch(comparison: Comparison, model: str, explanation: Explanation, index: int) -> MetricBatch:
    subject, inputs = comparison.subjects[model], explanation.inputs
    predictor = InformedPredictor(
        subject.adapter, subject.preprocessing, _FORWARD_SIZE, inputs, explanation.logits.float()
    )
    targets = cast("torch.Tensor", explanation.targets)[:, index]
    return MetricBatch(explanation.scores[:, index].float(), targets, inputs, predictor, extent=explanation.extent)
