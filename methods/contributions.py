"""Contributions: what each token adds to the explained score through attention."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitexplain.attention import RowTile
from vitexplain.capture import Capture
from vitexplain.fused_rows import has_kernel
from vitexplain.method import GradientMethod, Method
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.registry import register_method


@register_method(
    "contributions",
    title="Contributions",
    paper="this project, docs/contributions.md; gradients as in Mehri et al., LibraGrad, CVPR 2025",
    class_specific=True,
    passes="1F + 1B",
    aliases=("auto",),
)
@dataclass(frozen=True)
class Contributions(GradientMethod, Method):
    r"""What tokens give to others, all heads together, by what that does to the explained score.

    .. math:: C_l = \Bigl(\sum_h G_{l,h} \circ A_{l,h}\Bigr)^+, \qquad
        p = \sum_{l \ge l_0} s\,C_l, \qquad q = \sum_{l \ge l_0} \mathbf{1} C_l
    .. math:: u = \frac{p}{\sum p} + \frac{q}{\sum q}, \qquad m = \frac{u^\gamma}{\sum u^\gamma}
        + \beta\,\frac{\bar u}{\sum \bar u}

    with G the balanced gradient of the score by the attention A, so that G ∘ A is the share of the score that goes from
    token j to token i; s the row with which the head reads tokens, 1 that of all tokens alike, and ū the mean of u over
    a patch's neighbourhood, a seventh of the grid to each side. All sums are over patches. No block is followed into
    another: the gradient at a block already knows what those above make of it. Scores (B, h, w) >= 0.
    """

    start: float = option(1 / 3, "share of the blocks that is left out, from the first on", minimum=0, maximum=1)
    sharpness: float = option(1.3, "γ: above 1, strong patches stand out more", minimum=0)
    surroundings: float = option(0.1, "β: weight of a patch's neighbourhood", minimum=0)
    _: KW_ONLY
    gradient: str = option(
        "balanced",
        "balanced: with the scales of norms, gates and attention held constant (LibraGrad); plain: the derivative",
        choices=("plain", "balanced"),
    )

    @property
    def needs(self) -> Needs:
        """Attention and its gradient, of the upper blocks."""
        return replace(super().needs, attention_gradient=True, from_block=float(self.start))

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, h, w)."""
        met = capture.meeting(self.needs)
        blocks = met.blocks[capture.adapter.check_block(self.needs.from_block) :]
        seed = met.seed_row()
        read = given = torch.zeros_like(seed)
        for block in reversed(blocks):
            seed, read, given = (block.receive(row) for row in (seed, read, given))
            read = read + block.propagate(seed, positive_contributions)
            given = given + block.propagate(torch.ones_like(seed), positive_contributions)
        layout = blocks[0].layout
        on_grid = (row[:, layout.prefix :].reshape(-1, *layout.grid) for row in (read, given))
        both = sum((_shares(each) for each in on_grid), torch.zeros((), device="cpu"))
        return _shares(both**self.sharpness) + self.surroundings * _shares(_neighbourhood(both))


@has_kernel(sum_heads=True)
def positive_contributions(tile: RowTile) -> Tensor:
    """(Σ_h G∘A)+ (B, T, N)."""
    return tile.weighted().sum(1).clamp_(min=0)


def _shares(scores: Tensor) -> Tensor:
    """Scores (B, h, w) over their sum; zero where that is zero."""
    return scores / scores.sum((1, 2), keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def _neighbourhood(scores: Tensor) -> Tensor:
    """Means (B, h, w) over the patches around each, those beside the grid left out."""
    reach = [round(side / 7) for side in scores.shape[1:]]
    sizes = [2 * each + 1 for each in reach]
    return F.avg_pool2d(scores[:, None], sizes, 1, reach, count_include_pad=False)[:, 0]
