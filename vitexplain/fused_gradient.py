"""Attention and its gradient fused while the backward pass goes: for methods that read E_h[(dy/dA ∘ A)+] and no more.

The backward of attention needs A and dy/dA itself, and the model's own kernel shows neither. Reading their product
behind the backward pass means computing both a second time. Where one image's attention stays in the cache, attention's
backward is written out here instead: what it multiplies is multiplied once, and one matrix a block is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import AttentionOperands, Rows
from .fusion import FusedAttention


class FusedGradient(FusedAttention):
    """E_h[(dy/dA ∘ A)+] of the last backward pass, (B, 1, N, N); zero before it."""

    @classmethod
    def of(cls, operands: AttentionOperands) -> FusedGradient:
        """Room for that of an attention."""
        batch, _, tokens, keys = operands.shape
        return cls(operands.q.new_zeros(batch, 1, tokens, keys), False)

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """Not kept."""
        raise self.refusal("the attention")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """O = softmax(scale · q kᵀ) v (B, H, N, dh) on the graph of q, k or v; its backward fills the matrix."""
        output: Tensor = _Attend.apply(q, k, v, scale, self.matrix)
        return output

    def receive(self, operands: AttentionOperands, output_gradient: Tensor) -> None:
        """Fills the matrix where nothing goes back behind this attention, from dy/dO (B, H, N, dh)."""
        for image in range(len(output_gradient)):
            q, k, v = operands.q[image], operands.k[image], operands.v[image]
            _fuse(*_weighted(q, k, v, output_gradient[image], operands.scale)[1:], self.matrix[image])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.matrix = scale, matrix
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), scale, (arrived,) = ctx.saved_tensors, ctx.scale, gradients
        to_q, to_k, to_v = (each.new_empty(each.shape) for each in (q, k, v))
        unused = arrived.new_empty(())
        for image, gradient in enumerate(arrived):
            attention, weighted = _weighted(q[image], k[image], v[image], gradient, scale)
            torch.bmm(attention.mT, gradient, out=to_v[image])
            # of the softmax, on what it was taken of: dy/dA ∘ A less A times the sum of that over keys
            score = torch.addcmul(weighted, attention, weighted.sum(-1, keepdim=True), value=-1, out=attention)
            torch.baddbmm(unused, score, k[image], beta=0, alpha=scale, out=to_q[image])
            torch.baddbmm(unused, score.mT, q[image], beta=0, alpha=scale, out=to_k[image])
            _fuse(weighted, ctx.matrix[image])
        return to_q, to_k, to_v, None, None


def _weighted(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A and dy/dA ∘ A of one image, each (H, N, N); q, k, v and dy/dO are (H, N, dh)."""
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale)
    attention = torch.softmax(scores, -1, out=scores)
    return attention, torch.bmm(gradient, v.mT).mul_(attention)


def _fuse(weighted: Tensor, matrix: Tensor) -> None:
    """The mean over heads (1, N, N) of the positive part of (H, N, N)."""
    share = weighted.new_full((1, len(weighted)), 1 / len(weighted))
    torch.mm(share, weighted.clamp_(min=0).flatten(1), out=matrix.flatten(1))
