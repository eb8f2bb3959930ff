"""Class sensitivity: does a map change when another class is explained?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..errors import InputError
from ..options import option
from .catalogue import Figure, register_metric
from .correlation import pearson, spearman
from .metric import Metric, MetricBatch
from .ordering import shared_top
from .predictor import Predictor
from .responses import checked_classes


@register_metric(
    "class_sensitivity",
    title="Class sensitivity",
    paper="Chefer et al., CVPR 2021, section 4 (class-specific maps); rank correlation of maps as in Adebayo et al., "
    "NeurIPS 2018",
    requires=["targets", "inputs", "predictor", "explain"],
    figures=(
        Figure("spearman", "rank correlation of the maps of two classes", False, 0.0),
        Figure("pearson", "linear correlation of the maps of two classes", False, 0.0),
        Figure("top_overlap", "share of their most relevant patches that two classes have in common", False),
    ),
)
@dataclass(frozen=True)
class ClassSensitivity(Metric):
    """How alike the maps of two classes on the same image are: the explained class, and the likeliest of the others.

    For maps of the predicted class the other one is the second most probable. Methods that do not look at the class
    get 1. Low is better only where maps are faithful at all: maps without information get 0, and an overlap of
    `top_share`. Undefined (NaN) where the other map has NaN; correlations also where a map is flat.
    """

    top_share: float = option(0.1, "share of the patches that count as the most relevant", minimum=0, maximum=1)

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``spearman``, ``pearson``, ``top_overlap`` (B,)."""
        others = _other_maps(batch)
        sound = others.flatten(1).isfinite().all(1)
        first, second = (maps.double().flatten(1) for maps in (batch.scores, torch.nan_to_num(others)))
        count = max(1, round(self.top_share * first.shape[1]))
        statistics = {
            "spearman": spearman(first, second),
            "pearson": pearson(first, second),
            "top_overlap": shared_top(first, second, count),
        }
        return {name: value.masked_fill(~sound, torch.nan) for name, value in statistics.items()}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(means)


def _other_maps(batch: MetricBatch) -> Tensor:
    """Maps (B, h, w) of the likeliest class besides the explained one."""
    inputs, targets = cast("Tensor", batch.inputs), cast("Tensor", batch.targets)
    logits = cast("Predictor", batch.predictor).logits(inputs)
    if logits.shape[1] < 2:
        raise InputError("found a model with one output, expected at least two classes to compare maps of")
    others = logits.scatter(1, checked_classes(targets, logits)[:, None], -torch.inf).argmax(1)
    maps: Tensor = cast("Callable[[Tensor, Tensor], Tensor]", batch.explain)(inputs, others)
    if maps.shape != batch.scores.shape:
        raise InputError(
            f"found maps {tuple(maps.shape)} of another class beside scores {tuple(batch.scores.shape)}, expected the "
            "same shape: let explain be the method that gave the scores"
        )
    return maps.detach().to(batch.scores)
