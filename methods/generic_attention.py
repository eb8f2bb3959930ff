"""Generic attention explainability."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vitexplain.attention import RowTile
from vitexplain.fused_rows import has_kernel
from vitexplain.method import GradientMethod, ResidualMethod
from vitexplain.needs import Needs
from vitexplain.record import BlockRecord
from vitexplain.registry import register_method


@register_method(
    "generic_attention",
    title="Generic attention",
    paper="Chefer, Gur & Wolf, Generic Attention-model Explainability, ICCV 2021, eq. 5-6",
    class_specific=True,
    passes="1F + 1B",
    aliases=("gae", "generic_attention_explainability", "transformer_mm", "chefer_iccv21"),
)
@dataclass(frozen=True)
class GenericAttention(GradientMethod, ResidualMethod):
    r"""Attention weighted by its own positive gradient, followed through all blocks.

    .. math:: R \leftarrow R + \mathrm{E}_h[(G_l \circ A_l)^+]\,R, \qquad m = s\,R

    with R = I at first, G the derivative of the target's score by the attention A, s the seed row. Scores (B, N) >= 0.
    """

    @property
    def needs(self) -> Needs:
        """Attention and its gradient; as one matrix, where no other `attribute` or `moved` may read more of them."""
        needs, kind = replace(super().needs, attention_gradient=True), type(self)
        as_one = kind.moved is GenericAttention.moved and kind.attribute is GenericAttention.attribute
        return replace(needs, fused_gradient="positive") if as_one else needs

    def moved(self, row: Tensor, block: BlockRecord) -> Tensor:
        """`row` · E_h[(G∘A)+]."""
        return block.follow(row, positive_gradient_attention)


@has_kernel(sum_heads=False)
def positive_gradient_attention(tile: RowTile) -> Tensor:
    """(G∘A)+ (B, H, T, N); where attention is never negative, the same as (G)+ ∘ A."""
    return tile.weighted().clamp_(min=0)
