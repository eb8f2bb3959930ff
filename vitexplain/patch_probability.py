"""What logits of single patches say: each patch's classes, by one of several probability models."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

PATCH_SCORES = ("probability", "background", "joint", "logit")
"""Kinds of scores that `patch_scores` gives."""


def patch_scores(logits: Tensor, score: str) -> Tensor:
    """Scores (B, N, C) of patches and classes, from their logits s (B, N, C).

    Args:
        logits: s.
        score: ``"probability"``: σ(s_ic), classes independent of each other; ``"background"``:
            e^{s_ic} / (1 + Σ_k e^{s_ik}), one class or none a patch; ``"joint"``: e^{s_ic} / Σ_jk e^{s_jk}, one class
            and one place an image, all summing to 1; ``"logit"``: s itself.
    """
    if score == "probability":
        return logits.sigmoid()
    if score == "background":
        return (logits - log_partition(logits)[..., None]).exp()
    if score == "joint":
        return logits.flatten(1).softmax(1).view_as(logits)
    return logits


def log_partition(logits: Tensor) -> Tensor:
    """log(1 + Σ_k e^{s_ik}) (B, N): minus the log-probability of background, whose logit is fixed at 0."""
    return F.pad(logits, (1, 0)).logsumexp(-1)
