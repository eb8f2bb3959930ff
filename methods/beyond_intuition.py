"""Beyond Intuition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitexplain.attention import propagate, row_tiles, widen
from vitexplain.attention_gate import GatedAttentionMethod, read_rows
from vitexplain.capture import Capture
from vitexplain.needs import Needs, State
from vitexplain.options import option
from vitexplain.record import BlockRecord
from vitexplain.registry import register_method


@register_method(
    "beyond_intuition",
    title="Beyond Intuition",
    paper="Chen et al., Beyond Intuition: Rethinking Token Attributions inside Transformers, TMLR 2023",
    class_specific=True,
    passes="20F + 20B",
    aliases=("bi", "bidirectional_transformers"),
)
@dataclass(frozen=True)
class BeyondIntuition(GatedAttentionMethod):
    r"""How tokens reach the head, times an integrated gradient that says whether the head then uses them.

    .. math:: m_j = \sum_i s_i \, F_{ij} \, \bigl[(I + \bar A_L) \cdots (I + \bar A_1)\bigr]_{ij}, \qquad
        F = \mathrm{E}_h\Bigl[\tfrac1n \sum_t G_{L,h}(t x)\Bigr]^+

    with s the seed row, G the derivative of the target's logit by the last attention at the input t x; by `variant`,

    * ``"token"``: :math:`\bar A = \mathrm{E}_h[A_h]\,\mathrm{diag}(\lVert v_j W_O\rVert / \lVert x_j\rVert)`, tokens
      weighted by how much longer the block makes them;
    * ``"head"``: :math:`\bar A = \sum_h \theta_h A_h`, with :math:`\theta_h` proportional to the mean of
      :math:`|A_h^\top G_h|`, sum 1.

    A CLS head reads one row of F and of the product. The released code starts at block 3 of 12 (``"head"``) or at 6
    (``"token"``), counted from zero: `start_layer`. With mean-pooled heads the gated rows are averaged, as there,
    so the whole product is carried, in O(N³). Scores (B, N) >= 0.
    """

    variant: str = option("token", "what a block's attention is weighted by", choices=("token", "head"))

    @property
    def needs(self) -> Needs:
        """Attention and its gradient; the block input for the token variant."""
        states: frozenset[State] = frozenset({"in"}) if self.variant == "token" else frozenset()
        return replace(super().needs, attention_gradient=True, states=states)

    def attribute(self, capture: Capture) -> Tensor:
        """Gated rows (B, N) of the product, weighted by the seed.

        Raises:
            UnsupportedModelError: the model attends within windows, or its heads' outputs are no linear map of values.
        """
        seed = capture.seed_row()
        rows = read_rows(seed)
        gate = self.gate(capture, rows)
        product = torch.eye(seed.shape[1]).to(gate)[rows].expand(len(seed), -1, -1)
        for block in reversed(self.blocks(capture)):
            heads = propagate(product, block.operands, lambda tile: tile.attention)  # (B, H, R, N)
            product = product + self._weighted(heads, block)
        return (seed[:, rows, None] * gate * product).sum(1)

    def _weighted(self, heads: Tensor, block: BlockRecord) -> Tensor:
        if self.variant == "head":
            return (_head_weights(block)[:, :, None, None] * heads).sum(1)
        return heads.mean(1) * _lengthening(block)[:, None]


def _lengthening(block: BlockRecord) -> Tensor:
    """‖v_j W_O‖ / ‖x_j‖ (B, N)."""
    values = torch.einsum("bhnd,hde->bne", widen(block.operands.v), block.output_weight)
    before = block.state("in").norm(dim=2)
    lengthening: Tensor = values.norm(dim=2) / before.clamp(min=torch.finfo(before.dtype).tiny)
    return lengthening


def _head_weights(block: BlockRecord) -> Tensor:
    """θ (B, H). G is linear in what was tracked, so Aᵀ goes to that first, and AᵀG comes out in tiles."""
    operands, gradient = block.operands, widen(block.output_gradient)
    tiles = list(row_tiles(operands))
    carried = torch.stack([operands.probabilities(rows).mT @ gradient[:, :, rows] for rows in tiles]).sum(0)
    sums = torch.stack([operands.gradient(carried, rows).abs().sum((2, 3)) for rows in tiles]).sum(0)
    return sums / sums.sum(1, keepdim=True).clamp(min=torch.finfo(sums.dtype).tiny)
