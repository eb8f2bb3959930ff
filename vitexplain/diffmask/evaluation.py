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


@dataclass(frozen=True, eq=False)
class MaskReport:
    """What the hard mask of each image keeps and changes; all (B,).

    Attributes:
        kept: share of patches kept.
        divergence: of the model's answer to the masked image, in nats; see `constraint.divergence`.
        unchanged: whether the predicted class stays the same.
        divergence_all_masked: divergence where every patch is replaced; where it is small, an empty mask is right.
    """

    kept: Tensor
    divergence: Tensor
    unchanged: Tensor
    divergence_all_masked: Tensor


@torch.no_grad()
def judge(
    masked: MaskedModel,
    replacement: Tensor,
    images: Tensor,
    whole: Tensor,
    mask: Tensor,
    constraint: Constraint,
    classes: Tensor | None,
) -> MaskReport:
    """Runs the model on masked images, twice: as the masks say, and with every patch replaced.

    Args:
        masked: the model.
        replacement: b (D,).
        images: (B, channels, H, W).
        whole: logits (B, C) of the whole images.
        mask: (B, P), 1 where a patch is kept, else 0.
        constraint: what the divergence is of.
        classes: (B,) the classes that it is about, where it is of one class.
    """
    answer = masked.logits(images, mask, replacement)
    nothing = masked.logits(images, torch.zeros_like(mask), replacement)
    return MaskReport(
        kept=mask.mean(1),
        divergence=divergence(constraint, whole, answer, classes),
        unchanged=answer.argmax(1) == whole.argmax(1),
        divergence_all_masked=divergence(constraint, whole, nothing, classes),
    )


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
    started, reports = time.monotonic(), []
    for images in batches:
        found = masked.read(images)
        classes = found.logits.argmax(1)
        mask = hard_mask(amortised_log_kept(gates, found, None if features is None else features[classes]))
        reports.append(judge(masked, gates.replacement, found.images, found.logits, mask, constraint, classes))
    each = torch.cat([report.divergence for report in reports]).float()
    median, high = each.quantile(each.new_tensor([0.5, 0.95])).tolist()
    return Evaluation(
        divergence=each.mean().item(),
        divergence_median=median,
        divergence_95=high,
        agreement=torch.cat([report.unchanged for report in reports]).float().mean().item(),
        kept=torch.cat([report.kept for report in reports]).mean().item(),
        divergence_all_masked=torch.cat([report.divergence_all_masked for report in reports]).mean().item(),
        images=len(each),
        seconds=time.monotonic() - started,
    )
