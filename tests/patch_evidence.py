"""A model whose probability is known on paper: each patch adds its own weight times its brightness to one logit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.predictor import Predictor
from vitexplain.models.adapter import ModelAdapter
from vitexplain.preprocessing import Preprocessing

GRID, PATCH = (3, 4), 8
SIZE = (24, 32)
COUNT = 12


class PatchEvidence(nn.Module):
    """Logits (0, Σ weight · mean of the patch): the probability of class 1 is a sigmoid."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images: Tensor) -> Tensor:
        evidence = (F.avg_pool2d(images.mean(1), PATCH) * self.weights).sum((1, 2))
        return torch.stack([torch.zeros_like(evidence), evidence], 1)


class PatchEvidenceAdapter(ModelAdapter):
    blocks = ()
    num_prefix_tokens = 0
    num_channels = 3

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return image_size[0] // PATCH, image_size[1] // PATCH

    def seed(self, num_tokens: int) -> Tensor:
        raise NotImplementedError

    output_weight = value_weight = seed


def distinct_weights() -> Tensor:
    """(3, 4), all different and positive, in no order."""
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    return (order.float() + 1).reshape(GRID) / 20


def white_images(count: int) -> Tensor:
    """Images (B, 3, 24, 32) that are 1 everywhere: a patch replaced by zeros takes its weight away."""
    return torch.ones(count, 3, *SIZE)


def evidence_batch(scores: Tensor, weights: Tensor | None = None, batch_size: int = 5, **more: Tensor) -> MetricBatch:
    """White images before a `PatchEvidence`, explained by these scores (B, 3, 4); class 1 is explained."""
    model = PatchEvidence(distinct_weights() if weights is None else weights)
    predictor = Predictor(
        PatchEvidenceAdapter(model), Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), batch_size
    )
    parts = {
        "targets": torch.ones(len(scores), dtype=torch.int64),
        "inputs": white_images(len(scores)),
        "predictor": predictor,
    }
    return MetricBatch(scores, **{**parts, **more})


def falling(weights: Tensor) -> Tensor:
    """(P + 1,) float64: probability of class 1 as patches with these weights (P,) vanish one by one, in this order."""
    flat = weights.flatten().double()
    gone = torch.cat([torch.zeros(1, dtype=torch.float64), flat.cumsum(0)])
    return (flat.sum() - gone).sigmoid()
