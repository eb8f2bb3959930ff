"""FullGrad+: input times gradient, at every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitexplain.cancellation import check_left_over
from vitexplain.capture import Capture
from vitexplain.errors import UnsupportedModelError
from vitexplain.method import GradientMethod
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.record import BlockRecord
from vitexplain.registry import register_method


@register_method(
    "fullgrad_plus",
    title="FullGrad+",
    paper="Mehri et al., LibraGrad, CVPR 2025 (FullGrad+); after Srinivas and Fleuret, FullGrad, NeurIPS 2019",
    class_specific=True,
    passes="1F + 1B",
    signed=True,
)
@dataclass(frozen=True)
class FullGradPlus(GradientMethod):
    r"""Tokens entering each block, times the gradient there, summed over channels and blocks.

    .. math:: m_j = \sum_{l} \sum_k x^{l}_{jk} \frac{\partial y}{\partial x^{l}_{jk}}

    with x^l the tokens entering block l. FullGrad's bias terms, in which the image is seen through the gradient alone,
    are left out. In a last block that norms its input, patches score zero: nothing but the norm reads them, and it
    takes away what a token does to its own length. Where tokens are merged on the way up, a merged token's share is
    divided equally among its parts. Where the class token is handed past the patches (CaiT), what enters a block is
    never seen as a whole, and the method is refused. Scores (B, N) of the tokens that enter `start_layer`.
    """

    start_layer: int = option(0, "first block that takes part, zero-based", minimum=0)

    @property
    def needs(self) -> Needs:
        """The input of every block from `start_layer` on, and its gradient."""
        return replace(super().needs, state_gradients=frozenset({"in"}), from_block=self.start_layer)

    @property
    def follows_blocks(self) -> bool:
        """Several blocks take part, so merged tokens are divided among their parts."""
        return True

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, N).

        Raises:
            UnsupportedModelError: the sums of an image cancel on every patch, or a block takes some of its tokens apart
                from the others.
        """
        blocks = capture.meeting(self.needs).blocks[self.start_layer :]
        _check_whole(blocks)
        scores = magnitudes = torch.zeros((), device="cpu")
        for block in reversed(blocks):
            terms = block.state("in") * block.state_gradient("in")
            if block is not blocks[-1]:
                scores, magnitudes = block.receive(scores), block.receive(magnitudes)
            scores, magnitudes = scores + terms.sum(2), magnitudes + terms.abs().sum(2)
        prefix = blocks[0].layout.prefix
        check_left_over(scores[:, prefix:], magnitudes[:, prefix:])
        return scores


def _check_whole(blocks: Sequence[BlockRecord]) -> None:
    """Refuses blocks whose input is not all of their tokens."""
    for block in blocks:
        found, expected = block.state("in").shape[1], block.layout.count
        if found != expected:
            raise UnsupportedModelError(
                f"block {block.index} is given {found} of its {expected} tokens, and the others apart from them; "
                "fullgrad_plus sums over blocks that are given all their tokens. Use input_x_gradient, which is the "
                "same sum at the image alone, or contributions, generic_attention or gradcam"
            )
