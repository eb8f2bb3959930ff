"""AttCAT: attentive class activation tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitexplain.cancellation import check_left_over
from vitexplain.capture import Capture
from vitexplain.method import AttentionMethod, GradientMethod
from vitexplain.needs import Needs
from vitexplain.registry import register_method


@register_method(
    "attcat",
    title="AttCAT",
    paper="Qiang et al., AttCAT: Explaining Transformers via Attentive Class Activation Tokens, NeurIPS 2022",
    class_specific=True,
    passes="1F + 1B",
    signed=True,
    aliases=("attentive_class_activation_tokens",),
)
@dataclass(frozen=True)
class AttCAT(GradientMethod, AttentionMethod):
    r"""What each token's features contribute to the target, weighted by how much attention the token gets.

    .. math:: m_j = \sum_l \underbrace{\frac{1}{HN} \sum_{h,i} A_{l,h,ij}}_{\text{attention that } j \text{ gets}}
        \; \sum_k x_{l,jk} \frac{\partial y}{\partial x_{l,jk}}

    with x the tokens that enter block l. The seed row plays no part, so the formula is the same for every head. Blocks
    are summed, not multiplied, as in the released code. Scores (B, N), signed: below zero is evidence against the
    target.
    """

    @property
    def needs(self) -> Needs:
        """Attention, the block inputs and their gradient."""
        return replace(super().needs, state_gradients=frozenset({"in"}))

    def attribute(self, capture: Capture) -> Tensor:
        """Contributions (B, N), summed over the blocks.

        Raises:
            UnsupportedModelError: nothing but rounding is left of them, since norms are all that reads the tokens.
        """
        blocks = self.blocks(capture)
        scores, magnitudes = [], []
        for block in blocks:
            terms = block.state("in") * block.state_gradient("in")
            uniform = terms.new_full(terms.shape[:2], 1 / terms.shape[1])
            received = block.propagate(uniform, lambda tile: tile.attention).mean(1)
            scores.append(blocks[0].receive(received * terms.sum(2)))
            magnitudes.append(blocks[0].receive(received * terms.abs().sum(2)))
        total, prefix = torch.stack(scores).sum(0), blocks[0].layout.prefix
        check_left_over(total[:, prefix:], torch.stack(magnitudes).sum(0)[:, prefix:])
        return total
