"""AGCAM: attention-guided CAM."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitexplain.attention import RowTile
from vitexplain.capture import Capture
from vitexplain.method import AttentionMethod, GradientMethod
from vitexplain.needs import Needs
from vitexplain.registry import register_method


@register_method(
    "agcam",
    title="AGCAM",
    paper="Leem and Seo, Attention Guided CAM, AAAI 2024 (arXiv 2402.04563)",
    class_specific=True,
    passes="1F + 1B",
    aliases=("attention_guided_cam",),
)
@dataclass(frozen=True)
class AGCAM(GradientMethod, AttentionMethod):
    r"""Positive gradients of attention, weighted by a sigmoid of the scores that the softmax is taken of.

    .. math:: m = \sum_l \sum_h s\,\bigl[(G_{l,h})^+ \circ \sigma(Z_{l,h})\bigr], \qquad A = \mathrm{softmax}(Z)

    with G the derivative of the target's score by the attention, s the seed row (CLS: the rows of CLS). Under a sigmoid
    a few peaks do not take all, as they do under a softmax. Blocks are summed; no attention is followed downwards.
    Scores (B, N) >= 0. Attention that the model writes out by hand does not show Z, and is refused.
    """

    @property
    def needs(self) -> Needs:
        """Attention and its gradient."""
        return replace(super().needs, attention_gradient=True)

    def attribute(self, capture: Capture) -> Tensor:
        """Guided gradients (B, N), summed over blocks and heads."""
        blocks, seed = self.blocks(capture), capture.seed_row()
        guided = [block.propagate(seed, _guided_gradient).sum(1) for block in blocks]
        return torch.stack([blocks[0].receive(row) for row in guided]).sum(0)


def _guided_gradient(tile: RowTile) -> Tensor:
    """(G)+ ∘ σ(Z) (B, H, T, N)."""
    return tile.gradient.clamp(min=0).mul_(tile.scores.sigmoid())
