"""How good a set of gates is: measured with hard masks, since a soft mask still lets information through."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .constraint import Constraint, divergence
from .gates import Gates
from .masking import MaskedModel, amortised_log_kept, hard_mask


@dataclass(frozen=True)
class Evaluation:
    """Figures over images, of masks that keep a patch where P(z > 0) > 0.5.

    Attributes:
        divergence: mean divergence in nats; see `constraint.divergence`.
        divergence_median: its median over images.
        divergence_95: its 95th percentile: the constraint is on the mean, so a few images may be ruined.
        agreement: share of images whose predicted class the mask does not change.
        kept: mean share of patches kept.
        divergence_all_masked: mean divergence where every patch is replaced; where it is small, empty masks are right.
        images: how many there were.
        seconds: wall time.
    """

    divergence: float
    divergence_median: float
    divergence_95: float
    agreement: float
    kept: float
    divergence_all_masked: float
    images: int
    seconds: float

    def meets(self, margin: float, agreement: float) -> bool:
        """Whether the constraint holds."""
        return self.divergence <= margin and self.agreement >= agreement


@torch.no_grad()
def evaluate(
    masked: MaskedModel,
    gates: Gates,
    batches: Iterable[Tensor],
    constraint: Constraint = "distribution",
    features: Tensor | None = None,
) -> Evaluation:
    """Measures gates on images.

    Args:
        masked: the model.
        gates: its gates, on the model's device.
        batches: images (B, channels, H, W).
        constraint: what the divergence is of; about the predicted class where it is of one class.
        features: (C, class_width) what tells the gates a class; None for gates that are not told one.
    """
    started = time.monotonic()
    divergences, alone, agreements, kept = [], [], [], []
    for images in batches:
        found = masked.read(images)
        classes = found.logits.argmax(1)
        mask = hard_mask(amortised_log_kept(gates, found, None if features is None else features[classes]))
        answer = masked.logits(found.images, mask, gates.replacement)
        nothing = masked.logits(found.images, torch.zeros_like(mask), gates.replacement)
        divergences.append(divergence(constraint, found.logits, answer, classes))
        alone.append(divergence(constraint, found.logits, nothing, classes))
        agreements.append((answer.argmax(1) == classes).float())
        kept.append(mask.mean(1))
    each = torch.cat(divergences).float()
    median, high = each.quantile(torch.tensor([0.5, 0.95], device=each.device)).tolist()
    return Evaluation(
        divergence=each.mean().item(),
        divergence_median=median,
        divergence_95=high,
        agreement=torch.cat(agreements).mean().item(),
        kept=torch.cat(kept).mean().item(),
        divergence_all_masked=torch.cat(alone).mean().item(),
        images=len(each),
        seconds=time.monotonic() - started,
    )
