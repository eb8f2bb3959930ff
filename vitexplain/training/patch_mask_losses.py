"""What patches of an image with a mask are asked: which of them show the object, and of which class it is."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patch_pixels import framed
from ..patch_probability import log_partition

MaskLoss = Literal["balanced", "plain", "own_class", "background", "joint"]
"""Kinds of `mask_loss`."""

MASK_LOSSES: tuple[MaskLoss, ...] = get_args(MaskLoss)


def patch_cover(masks: Tensor, grid: tuple[int, int], extent: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """How much of each patch the object covers, and which patches count.

    Args:
        masks: (B, H, W) in pixels of the model's input: 1 object, 0 background, -1 left out.
        grid: (h, w) patches.
        extent: pixels (height, width) that they take up; None for just the masks. Padding counts as left out.

    Returns:
        t (B, N) in [0, 1], the object's share of the pixels that are not left out; and (B, N), 1 where at most half of
        the patch is left out, else 0. Both float32.
    """
    masks = framed(masks, extent, -1)
    known = F.adaptive_avg_pool2d((masks >= 0).float()[:, None], grid).flatten(1)
    shown = F.adaptive_avg_pool2d((masks == 1).float()[:, None], grid).flatten(1)
    return shown / known.clamp(min=torch.finfo(known.dtype).tiny), (known >= 0.5).float()


def mask_loss(loss: MaskLoss, logits: Tensor, classes: Tensor, cover: Tensor, counts: Tensor) -> Tensor:
    """The loss of each image (B,), in nats.

    With s_ic the logits, p = σ(s), t_i the object's share of patch i, y the object's class:

    - ``"balanced"``: ½ [Σ t_i bce_i / Σ t_i + Σ (1-t_i) bce_i / Σ (1-t_i)] with bce_i that of p_iy and t_i, so that
      small objects count as much as their background; plus the mean of -log(1 - p_ic) over patches and other classes.
    - ``"plain"``: mean binary cross-entropy of all patches and classes; with many classes the absent ones drown it.
    - ``"own_class"``: mean binary cross-entropy of p_iy; other classes are not asked.
    - ``"background"``: cross-entropy of a softmax over the classes and a background whose logit is 0.
    - ``"joint"``: -log Σ_i t_i p(y, i) with p a softmax over classes and patches, which is the cross-entropy of the
      classes' logsumexp over patches plus -log Σ_i t_i p(i | y).

    Args:
        loss: one of `MASK_LOSSES`.
        logits: s (B, N, C), float32 or wider.
        classes: y (B,).
        cover: t (B, N) in [0, 1].
        counts: (B, N), 0 for patches that are left out, else 1.
    """
    own = logits.gather(2, classes[:, None, None].expand(-1, logits.shape[1], 1))[:, :, 0]
    if loss == "background":
        return _mean(log_partition(logits) - cover * own, counts)
    if loss == "joint":
        shown = cover * counts
        none = ~shown.any(1, keepdim=True)
        inside = own + shown.clamp(min=torch.finfo(shown.dtype).tiny).log()
        inside = torch.where((shown > 0) | none, inside, -torch.inf)
        return torch.where(none[:, 0], 0.0, logits.flatten(1).logsumexp(1) - inside.logsumexp(1))
    entropy = F.softplus(own) - cover * own
    if loss == "own_class":
        return _mean(entropy, counts)
    others = (F.softplus(logits).sum(2) - F.softplus(own)) / max(1, logits.shape[2] - 1)
    if loss == "plain":
        count = logits.shape[2]
        return _mean((entropy + (count - 1) * others) / count, counts)
    object_, ground = (_mean(entropy, share * counts) for share in (cover, 1 - cover))
    return (object_ + ground) / 2 + _mean(others, counts)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over patches: (B, N) to (B,); 0 where nothing has weight."""
    return (values * weights).sum(1) / weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)
