"""Transition attention maps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vitexplain.attention_gate import GatedAttentionMethod, read_rows
from vitexplain.capture import Capture
from vitexplain.needs import Needs
from vitexplain.registry import register_method


@register_method(
    "transition_attention",
    title="Transition attention maps",
    paper="Yuan et al., Explaining Information Flow Inside Vision Transformers Using Markov Chain, 2021",
    class_specific=True,
    passes="20F + 20B",
    aliases=("tam", "transition_attention_maps"),
)
@dataclass(frozen=True)
class TransitionAttention(GatedAttentionMethod):
    r"""A Markov chain down the blocks, gated by an integrated gradient of the last attention.

    .. math:: r_L = s\,\mathrm{E}_h A_L, \qquad r_l = r_{l+1} + r_{l+1}\,\mathrm{E}_h A_l, \qquad
        m = r_{l_0} \circ s\,\mathrm{E}_h\Bigl[\tfrac1n \sum_t G_{L,h}(t x)\Bigr]^+

    with s the seed row and G the derivative of the target's logit by the last attention at the input t x. The target
    enters through the gate alone. One file of the release starts at block 4 of 12, counted from zero, another at 0:
    `start_layer`. Scores (B, N) >= 0.
    """

    @property
    def needs(self) -> Needs:
        """Attention, and its gradient in the last block."""
        return replace(super().needs, attention_gradient=True)

    def attribute(self, capture: Capture) -> Tensor:
        """Gated chain (B, N).

        Raises:
            UnsupportedModelError: the model attends within windows.
        """
        seed = capture.seed_row()
        rows = read_rows(seed)
        gate = (seed[:, rows, None] * self.gate(capture, rows)).sum(1)
        *lower, last = self.blocks(capture)
        row = last.propagate(seed, lambda tile: tile.attention).mean(1)
        for block in reversed(lower):
            row = row + block.propagate(row, lambda tile: tile.attention).mean(1)
        return row * gate
