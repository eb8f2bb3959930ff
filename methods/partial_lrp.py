"""Partial layer-wise relevance propagation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.attention import RowTile, widen
from vitexplain.capture import Capture
from vitexplain.method import Method
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.registry import register_method
from vitexplain.relevance import AttentionRelevance, RelevanceRules


@register_method(
    "partial_lrp",
    title="Partial LRP",
    paper="Voita et al., Analyzing Multi-Head Self-Attention, ACL 2019, sec. 4; as in Chefer et al., CVPR 2021",
    class_specific=True,
    passes="1F + 1B",
)
@dataclass(frozen=True)
class PartialLRP(Method):
    r"""The relevance of one block's attention, as the head reads it.

    .. math:: m = s\,\mathrm{E}_h[(R_l)^+]

    with R the relevance of the attention, propagated from the target down to that block alone, and s the seed row.
    The rules are those of `relevance_rules`; forward and relevance pass run in double precision, since relevance is
    divided by activations that cross zero. The attention of one block says more about the image than about the class:
    on some models two classes get nearly the same map. Scores (B, N) >= 0.
    """

    layer: int = option(-1, "block whose attention is read, zero-based; negative counts from the last")
    rules: str = option(
        "baseline",
        "how sums and linear maps share relevance: as the LRP baselines of Chefer et al., or normalised as in their "
        "transformer attribution",
        choices=("baseline", "normalised"),
    )

    @property
    def needs(self) -> Needs:
        """The relevance of one block's attention."""
        rules = RelevanceRules(normalised=self.rules == "normalised")
        return Needs(attention_gradient=True, from_block=self.layer, backward=rules)

    def attribute(self, capture: Capture) -> Tensor:
        """Seed row times the positive relevance of attention (B, N)."""
        own = capture.meeting(self.needs)
        block = own.blocks[self.layer]
        relevant = block.with_attention(AttentionRelevance.of(block))
        scores = relevant.propagate(own.seed_row(), _positive).mean(1)
        return scores.to(widen(capture.logits).dtype)


def _positive(tile: RowTile) -> Tensor:
    return tile.attention.clamp(min=0)
