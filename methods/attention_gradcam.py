"""Grad-CAM on attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.method import GradientMethod
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.registry import register_method


@register_method(
    "attention_gradcam",
    title="Attention Grad-CAM",
    paper="Chefer, Gur & Wolf, Transformer Interpretability Beyond Attention Visualization, CVPR 2021 (a baseline)",
    class_specific=True,
    passes="1F + 1B",
    signed=True,
    aliases=("attn_gradcam", "cam_attn"),
)
@dataclass(frozen=True)
class AttentionGradCAM(GradientMethod):
    r"""Heads of one block's attention, each weighted by its mean gradient over the patches.

    .. math:: \alpha_h = \frac1P \sum_{j=1}^{P} (s\,G_h)_j, \qquad m_j = \mathrm{E}_h[\alpha_h (s\,A_h)_j]

    with s the seed row (CLS: the rows of CLS), G the derivative of the target's score by the attention. The
    published baseline ends with a ReLU, `relu=True`. Often the whole map is below zero before it and constant after it,
    in 6 of 22 maps of two tiny ImageNet models; so the default leaves it out. Scores (B, N), signed; prefix tokens are
    scored, but not averaged over.
    """

    layer: int = option(-1, "block whose attention is read, zero-based; negative counts from the last")
    relu: bool = option(False, "keep positive evidence only, as the published baseline does; often nothing is left")

    @property
    def needs(self) -> Needs:
        """Attention and its gradient in one block."""
        return replace(super().needs, attention_gradient=True, from_block=self.layer)

    @property
    def signed(self) -> bool:
        """Signed without the final ReLU."""
        return not self.relu

    def attribute(self, capture: Capture) -> Tensor:
        """Weighted attention (B, N)."""
        block, seed = capture.meeting(self.needs).blocks[self.layer], capture.seed_row()
        attention = block.propagate(seed, lambda tile: tile.attention)
        gradient = block.propagate(seed, lambda tile: tile.gradient)
        weights = gradient[:, :, block.layout.prefix :].mean(2, keepdim=True)
        scores = (weights * attention).mean(1)
        return scores.clamp(min=0) if self.relu else scores
