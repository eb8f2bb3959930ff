"""SaCo: do the sizes of the scores say how much the prediction changes?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import InputError
from ..options import option
from .catalogue import Figure, register_metric
from .metric import MetricBatch
from .ordering import salience
from .replacement import REPLACEMENTS
from .responses import PixelMetric, clean_responses, input_size

CLASSES = ("predicted", "explained")
"""Whose probability can be followed."""


@register_metric(
    "saco",
    title="SaCo: salience-guided faithfulness coefficient",
    paper="Wu et al.: On the Faithfulness of Vision Transformer Explanations, CVPR 2024",
    requires=("inputs", "predictor"),
    figures=(Figure("saco", "SaCo", higher_is_better=True, chance=0.0),),
)
@dataclass(frozen=True)
class SaCo(PixelMetric):
    """Pixels fall into groups of equal size by rank; each group alone is replaced by the image's mean colour.

    What counts is the fall of the probability of the class that the unchanged image is given; `of="explained"`, which
    is not published, takes the class that the map explains, so that maps of other classes are measured on what they
    say. For two groups, the
    difference of their salience counts for the map where the more salient one made the probability fall at least as
    far, against it otherwise. The salience of a group is its mean: for equal groups that is the paper's sum up to a
    factor that cancels, and groups that differ by a pixel do not upset it. Scaling and shifting the map change
    nothing; a constant map has no coefficient (NaN).
    """

    groups: int = option(10, "how many groups the pixels fall into", minimum=2)
    replacement: str = option("image_mean", "what replaces the pixels of a group", choices=REPLACEMENTS)
    of: str = option(
        "predicted", "whose probability: the class predicted, as published, or the one explained", choices=CLASSES
    )

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``saco`` (B,) in [-1, 1].

        Raises:
            InputError: the explained class is to be followed, and the batch does not say which it is.
        """
        if self.of == "explained" and batch.targets is None:
            raise InputError("saco with of='explained' requires targets: pass MetricBatch(targets=…)")
        classes = batch.targets if self.of == "explained" else None
        clean = clean_responses(batch, classes)
        ranking = self.ranking(batch)
        bounds = ranking.bounds(self.groups)
        alone = self.respond(batch, ranking, list(pairwise(bounds)), clean.predicted if classes is None else classes)
        pixels = salience(batch.scores, input_size(batch), self.order, batch.extent)
        group = torch.bucketize(ranking.ranks, torch.tensor(bounds[1:], device=pixels.device), right=True)
        means = _group_means(pixels.flatten(1).double(), group.flatten(1), self.groups)
        fall = clean.probability[:, None] - alone.probability
        return {"saco": saco_coefficient(means.to(fall), fall)}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over images."""
        return {"saco": means["saco"]}


def saco_coefficient(salience: Tensor, fall: Tensor) -> Tensor:
    """The coefficient from groups in order of descending salience.

    Args:
        salience: (…, K) of each group.
        fall: (…, K), by how much the probability fell without the group.

    Returns:
        (…) in [-1, 1]; NaN where all groups are equally salient.
    """
    weights = (salience[..., :, None] - salience[..., None, :]).triu(1)  # pairs i < j
    agrees = fall[..., :, None] >= fall[..., None, :]
    return torch.where(agrees, weights, -weights).sum((-2, -1)) / weights.abs().sum((-2, -1))


def _group_means(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Means (B, K) of values (B, n) over the groups (B, n) they belong to."""
    sums, sizes = (
        values.new_zeros(len(values), count).scatter_add_(1, group, each) for each in (values, torch.ones_like(values))
    )
    return sums / sizes
