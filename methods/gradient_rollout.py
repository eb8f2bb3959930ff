"""Gradient attention rollout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitexplain.attention import RowTile
from vitexplain.capture import Capture
from vitexplain.fusion import discard_lowest
from vitexplain.method import AttentionMethod, GradientMethod
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.registry import register_method


@register_method(
    "gradient_rollout",
    title="Gradient attention rollout",
    paper="Gildenblat, vit-explain, 2020 (VITAttentionGradRollout), after Abnar & Zuidema, ACL 2020",
    class_specific=True,
    passes="1F + 1B",
    aliases=("grad_rollout", "attention_gradient_rollout", "vit_explain"),
)
@dataclass(frozen=True)
class GradientRollout(GradientMethod, AttentionMethod):
    r"""Rollout of attention weighted by its gradient, the weakest entries left out.

    .. math:: F_l = \mathrm{discard}\bigl(\mathrm{E}_h[A_{l,h} \circ G_{l,h}]^+\bigr), \qquad
        \hat A_l = \mathrm{rownorm}(F_l + I), \qquad m = s\,\hat A_L \cdots \hat A_1

    with G the derivative of the target's score by the attention, s the seed row. The released code differs in ways that
    are not meant and are not repeated here: it pairs the attention of block l with the gradient of block L+1-l, takes
    the gradient before the softmax for that behind it, never empties its list of gradients, and discards in the first
    image of a batch alone. Its normalisation, which divides column j by the sum of row j, is ``"column"``. With these
    put right it is the published map. What I alone carries of the seed is left out, as in `ResidualMethod`.
    Scores (B, N) >= 0. A fused N×N matrix of a block is held at a time, of all blocks where they are small.
    """

    discard_ratio: float = option(0.9, "share of each block's smallest fused weights set to 0", minimum=0, maximum=0.99)
    normalisation: str = option("row", "what is divided by the row sums", choices=("row", "column"))

    @property
    def needs(self) -> Needs:
        """Attention and its gradient; as one matrix, where no other `attribute` may read more of them."""
        needs = replace(super().needs, attention_gradient=True)
        as_one = type(self).attribute is GradientRollout.attribute
        return replace(needs, fused_gradient="signed") if as_one else needs

    def attribute(self, capture: Capture) -> Tensor:
        """All that the blocks moved (B, N)."""
        seed = capture.seed_row()
        moved = torch.zeros_like(seed)
        for block in reversed(self.blocks(capture)):
            seed, moved = block.receive(seed), block.receive(moved)
            fused = discard_lowest(block.fused(RowTile.weighted).clamp(min=0), self.discard_ratio)
            share = 1 / (1 + fused.sum(2))
            rows, columns = (share, 1.0) if self.normalisation == "row" else (1.0, share)
            arrived = ((seed + moved) * rows).to(fused.dtype)[:, None] @ fused
            moved = (arrived[:, 0] + moved * rows) * columns
            seed = seed * share
        return moved
