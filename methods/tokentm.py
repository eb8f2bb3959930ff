"""TokenTM: token transformation matters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitexplain.attention import RowTile, widen
from vitexplain.capture import Capture
from vitexplain.method import GradientMethod, ResidualMethod
from vitexplain.needs import Needs, State
from vitexplain.options import option
from vitexplain.record import BlockRecord, Change
from vitexplain.registry import register_method

from .generic_attention import positive_gradient_attention

_EPSILON = 1e-8


@register_method(
    "tokentm",
    title="TokenTM",
    paper="Wu, Duan, Kang, Tang & Yan, Token Transformation Matters, CVPR 2024, eq. 12-18",
    class_specific=True,
    passes="1F + 1B",
    aliases=("token_transformation_matters",),
)
@dataclass(frozen=True)
class TokenTM(GradientMethod, ResidualMethod):
    r"""Gradient-weighted attention in which every token also counts by how it is transformed.

    A token sent from state E to state Ẽ weighs by its change of length and by how well its direction is kept:

    .. math:: w_i = \frac{\lVert\tilde E_i\rVert}{\lVert E_i\rVert}\,
        \mathrm{softmax}_i \cos(E_i, \tilde E_i)
    .. math:: U_{MHSA} = I + \mathrm{E}_h[(G_h)^+ \circ A_h\,\mathrm{diag}(w^h)], \qquad
        U_{FFN} = I + \mathrm{diag}(w^{FFN})
    .. math:: m = s \prod_{l=L}^{1} U_{FFN}^l U_{MHSA}^l \;\mathrm{diag}(\lVert x^{(0)}_i\rVert)

    Scores (B, N) >= 0. The paper's text leaves open which states an attention transformation compares; the three
    readings that are in use:

    * ``"value"`` (default): the block input against what the token puts into the sum in each head, its value vector
      through the output projection; the feed-forward branch output against its input.
    * ``"literal"``: as ``"value"``, but the linear maps W_V W_O alone, without LayerNorm and bias.
    * ``"residual"``: block input against the residual stream after attention, and that against the block output;
      heads are averaged before attention and gradient meet.
    """

    transformation: str = option(
        "value", "which states of a token are compared", choices=("value", "literal", "residual")
    )
    necc_scale: float | str = option(
        1.0, "sum of the direction weights over tokens; 'tokens' for N, i.e. mean 1", choices=("tokens",), minimum=0
    )
    length: bool = option(True, "weigh by the change of length")
    direction: bool = option(True, "weigh by the kept direction")
    initialisation: bool = option(True, "start from the lengths of the tokens that enter the first block")
    feed_forward: bool = option(True, "count the transformation by the feed-forward branch")

    @property
    def needs(self) -> Needs:
        """Attention, its gradient, the block input, and how tokens change in both branches."""
        changes: set[tuple[State, State]] = set()
        if self.feed_forward:
            changes.add(self._feed_forward)
        if self.transformation == "residual":
            changes.add(("in", "mid"))
        return replace(super().needs, attention_gradient=True, states=frozenset({"in"}), changes=frozenset(changes))

    @property
    def _feed_forward(self) -> tuple[State, State]:
        """The states that the transformation by the feed-forward branch compares."""
        return "mid", "out" if self.transformation == "residual" else "mlp"

    def factor(self, block: BlockRecord) -> Tensor | float:
        """The diagonal of U_FFN."""
        if not self.feed_forward:
            return 1.0
        return 1 + self._weight(block.change(*self._feed_forward))

    def moved(self, row: Tensor, block: BlockRecord) -> Tensor:
        """`row` · (U_MHSA - I)."""
        if self.transformation == "residual":
            return block.propagate(row, _product_of_means) * self._weight(block.change("in", "mid"))
        return (block.propagate(row, positive_gradient_attention) * self._head_weight(block)).mean(1)

    def read_out(self, row: Tensor, capture: Capture) -> Tensor:
        """`row` · C⁰."""
        return row * self.blocks(capture)[0].state("in").norm(dim=2) if self.initialisation else row

    def _weight(self, change: Change) -> Tensor:
        return self._combine(change.before, change.after, change.product)

    def _head_weight(self, block: BlockRecord) -> Tensor:
        """Weights (B, H, N) of the transformation by each head, without a (B, H, N, D) tensor."""
        state, output = block.state("in"), block.output_weight
        literal = self.transformation == "literal"
        values = _by_heads(state, block.value_weight) if literal else widen(block.operands.v)
        # ‖v W‖² = v (W Wᵀ) vᵀ and x · (v W) = (x Wᵀ) · v; heads first, images and tokens merge as they lie
        by_head = values.transpose(0, 1).flatten(1, 2)
        squared = (by_head @ (output @ output.transpose(1, 2))).mul_(by_head).sum(-1)
        squared = squared.view(-1, *state.shape[:2]).transpose(0, 1)
        aligned = _by_heads(state, output.transpose(1, 2)).mul_(values).sum(-1)
        return self._combine(state.norm(dim=-1)[:, None], squared.clamp(min=0).sqrt(), aligned)

    def _combine(self, before: Tensor, after: Tensor, dot: Tensor) -> Tensor:
        weight = torch.ones_like(after)
        if self.direction:
            scale = dot.shape[-1] if isinstance(self.necc_scale, str) else self.necc_scale
            weight = (dot / (before * after).clamp(min=_EPSILON)).softmax(dim=-1) * scale
        if self.length:
            weight = weight * after / (before + _EPSILON)
        return weight


def _by_heads(state: Tensor, weight: Tensor) -> Tensor:
    """(B, N, D) times (H, D, dh), as one matrix product: (B, H, N, dh)."""
    heads = state @ weight.transpose(0, 1).flatten(1)
    return heads.reshape(*state.shape[:2], len(weight), -1).transpose(1, 2)


def _product_of_means(tile: RowTile) -> Tensor:
    return tile.gradient.clamp(min=0).mean(1).mul_(tile.attention.mean(1))
