"""Transformer attribution."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vitexplain.attention import widen
from vitexplain.capture import Capture
from vitexplain.method import ResidualMethod
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.record import BlockRecord
from vitexplain.registry import register_method
from vitexplain.relevance import AttentionRelevance, RelevanceRules

from .generic_attention import positive_gradient_attention


@register_method(
    "transformer_attribution",
    title="Transformer attribution",
    paper="Chefer, Gur & Wolf, Transformer Interpretability Beyond Attention Visualization, CVPR 2021, eq. 1-14",
    class_specific=True,
    passes="2F + 2B",
    aliases=("ta", "chefer_cvpr21", "beyond_attention"),
)
@dataclass(frozen=True)
class TransformerAttribution(ResidualMethod):
    r"""The relevance of each attention, weighted by its gradient, followed through all blocks.

    .. math:: \bar A_l = I + \mathrm{E}_h[(G_l \circ R_l)^+], \qquad m = s\,\bar A_L \cdots \bar A_{l_0}

    with G the derivative of the target's score by the attention, s the seed row and R the relevance of the attention:
    layer-wise relevance propagation from the target down, by the z⁺ rule in linear maps, an even split between the
    factors of a product, and a split between the summands of a residual sum that is normalised over the image; what
    is normed, activated or soft-maxed passes its relevance on. Biases take none. Scores (B, N) >= 0.

    Its forward is in double precision, and three products a linear map go back beside the gradient. Relevance is
    divided by activations that cross zero, and a forward in single precision does not know their sign: the released
    code, which stays in single precision, differs from itself in double precision by a median of 3 % and at worst by
    the whole map, while maps of a float32 and a float64 model agree here. Weights rounded to bfloat16 are another
    model, with another map. Sums over an image go over that image alone, where the released code takes one image at a
    time; its evaluation leaves the first block out (`start_layer=1`).
    """

    alpha: float = option(1.0, "weight of positive contributions to a linear map; 1 is the z⁺ rule", minimum=1)

    @property
    def needs(self) -> Needs:
        """The relevance of attention; its gradient is met beside it."""
        return replace(super().needs, attention_gradient=True, backward=RelevanceRules(alpha=self.alpha))

    def blocks(self, capture: Capture) -> list[BlockRecord]:
        """The blocks, with the relevance of attention in the place of attention."""
        relevant = super().blocks(capture)
        plain = capture.meeting(replace(self.needs, backward=None)).blocks[self.start_layer :]
        pairs = zip(plain, relevant, strict=True)
        return [block.with_attention(AttentionRelevance.of(other)) for block, other in pairs]

    def moved(self, row: Tensor, block: BlockRecord) -> Tensor:
        """`row` · E_h[(G∘R)+]."""
        return block.propagate(row, positive_gradient_attention).mean(1)

    def read_out(self, row: Tensor, capture: Capture) -> Tensor:
        """The row, no wider than the model's own scores."""
        return row.to(widen(capture.logits).dtype)
