"""What the mask must not change: divergences between the model's answers to the whole and to the masked image."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Constraint = Literal["distribution", "class", "evidence"]
"""``distribution``: all class probabilities, the paper's; ``class``: the probability of one class against all others;
``evidence``: that one class does not become less probable."""

CONSTRAINTS: tuple[Constraint, ...] = ("distribution", "class", "evidence")


def divergence(constraint: Constraint, whole: Tensor, masked: Tensor, classes: Tensor | None = None) -> Tensor:
    """How far the masked image's answer is from the whole image's, in nats, at least 0, one an image (B,).

    Args:
        constraint: ``"distribution"``: KL(p ‖ p̂); ``"class"``: KL of (p_c, 1 - p_c) from (p̂_c, 1 - p̂_c);
            ``"evidence"``: max(0, log p_c - log p̂_c).
        whole: logits (B, C) of the whole image.
        masked: logits (B, C) of the masked image.
        classes: c (B,), for the last two.
    """
    with torch.autocast(whole.device.type, enabled=False):
        whole, masked = (_log_probabilities(_wide(each)) for each in (whole, masked))
        if constraint == "distribution":
            return F.kl_div(masked, whole, reduction="none", log_target=True).sum(1)
        if classes is None:
            raise ValueError(f"the constraint {constraint!r} is about one class an image; found none")
        ours, theirs = (torch.stack(_against_the_rest(each, classes), dim=1) for each in (whole, masked))
        if constraint == "class":
            return F.kl_div(theirs, ours, reduction="none", log_target=True).sum(1)
        return (ours[:, 0] - theirs[:, 0]).clamp(min=0)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Finite: a class that the model rules out, by a logit of -inf, takes no part, in place of making all NaN."""
    found = F.log_softmax(logits, dim=1)
    return found.clamp(min=torch.finfo(found.dtype).min)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _against_the_rest(log_probabilities: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """log p_c and log(1 - p_c), the latter summed over the other classes, so that it holds where p_c rounds to 1."""
    chosen = F.one_hot(classes, log_probabilities.shape[1]).bool()
    others = log_probabilities.masked_fill(chosen, -torch.inf).logsumexp(1)
    return log_probabilities.masked_fill(~chosen, -torch.inf).logsumexp(1), others
