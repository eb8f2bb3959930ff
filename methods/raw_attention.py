"""Raw attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.method import Method
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.registry import register_method


@register_method(
    "raw_attention",
    title="Raw attention",
    paper="Vaswani et al., Attention Is All You Need, NeurIPS 2017 (the attention itself)",
    class_specific=False,
    passes="1F",
    aliases=("last_layer_attention", "attention"),
)
@dataclass(frozen=True)
class RawAttention(Method):
    r"""How much the tokens that the head reads attend to each token in one block.

    .. math:: m_j = \sum_i s_i \, \mathrm{E}_h A_{h,ij}

    with s the seed row (CLS: its row of the attention, averaged over heads). Scores (B, N) in [0, 1], sum 1.
    """

    layer: int = option(-1, "block whose attention is read, zero-based; negative counts from the last")

    @property
    def needs(self) -> Needs:
        """Attention of one block."""
        return Needs(attention=True, from_block=self.layer)

    def attribute(self, capture: Capture) -> Tensor:
        """Attention (B, N) out of the seed row."""
        return capture.blocks[self.layer].propagate(capture.seed_row(), lambda tile: tile.attention).mean(1)
