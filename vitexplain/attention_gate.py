"""Integrated gradients of the last block's attention, which gate the maps of methods that follow attention alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .capture import Capture
from .errors import UnsupportedModelError
from .method import AttentionMethod, GradientMethod
from .needs import Needs
from .options import option
from .record import BlockRecord
from .target_response import TargetResponse


@dataclass(frozen=True)
class GatedAttentionMethod(GradientMethod, AttentionMethod):
    """Base of methods whose map is gated by the integrated gradient of the last attention.

    The gradient is averaged over `points` copies of the input, t x for t from 0 to 1 in equal steps, both ends taken.
    The copy t = 1 is the capture's own. The others are run again for every target; their graph is the last block's.
    """

    points: int = option(20, "copies of the input, from 0 to itself, over which the gradient is averaged", minimum=2)

    def gate(self, capture: Capture, rows: Tensor) -> Tensor:
        r"""The gate F (B, R, N), float32 or wider: some rows of :math:`\mathrm{E}_h[(\frac1n \sum_t G_h(t x))^+]`.

        Args:
            capture: after its forward and backward pass.
            rows: (R,) int64, the tokens whose rows of the attention are wanted.

        Raises:
            UnsupportedModelError: blocks attend within windows, or over different tokens.
        """
        odd = next((each for each in capture.blocks if each.windows or each.layout != capture.layouts[-1]), None)
        if odd is not None:
            raise UnsupportedModelError(
                f"block {odd.index} attends within windows, or over other tokens than the head reads, so the gate of "
                "the last block does not fit it; use generic_attention or rollout"
            )
        response = TargetResponse.of(capture, self.info.name)
        everyone = torch.arange(len(capture.images), device="cpu")
        total = _gradient_rows(self.blocks(capture)[-1], rows)
        needs = Needs(attention_gradient=True, from_block=-1, backward=self.backward)
        for share in torch.linspace(0, 1, self.points, dtype=torch.float64)[:-1].tolist():
            with Capture(capture.adapter, needs) as scaled:
                logits = scaled.forward(capture.images.detach() * share)
                scaled.backward(response.read(logits, everyone).sum())
            total = total + _gradient_rows(scaled.blocks[-1], rows)
        return (total / self.points).clamp(min=0).mean(1)


def read_rows(seed: Tensor) -> Tensor:
    """The tokens (R,) that the head reads in any image, from a seed row (B, N)."""
    return (seed != 0).any(0).nonzero()[:, 0]


def _gradient_rows(block: BlockRecord, rows: Tensor) -> Tensor:
    """Some rows (B, H, R, N) of dy/dA."""
    return block.operands.gradient(block.output_gradient, rows)
