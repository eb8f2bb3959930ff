"""Attention and its gradient fused while the backward pass goes: for methods that read E_h[(dy/dA ∘ A)+] and no more.

The backward of attention needs A and dy/dA itself, and the model's own kernel shows neither. Reading their product
behind the backward pass means computing both a second time. Where one image's attention stays in the cache, attention's
backward is written out here instead: what it multiplies is multiplied once, and one matrix a block is kept. Of an image
that comes alone A is kept as well: it is in the cache still when it is asked for again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import AttentionOperands, Rows
from .fusion import FusedAttention, side_by_side


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
        q, k, v = operands.q, operands.k, operands.v
        first, second = _matrix(q, k), _matrix(q, k)
        for image, gradient in enumerate(output_gradient):
            attention = _attention(q[image], k[image], operands.scale, out=first)
            _fuse(_weighted(attention, v[image], gradient, out=second), self.matrix[image])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, matrix: Tensor) -> Tensor:
        ctx.scale, ctx.matrix = scale, matrix
        if len(q) > 1:
            ctx.save_for_backward(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        # of one image, it is in the cache still when it is asked for again
        attention = _attention(q[0], k[0], scale, out=_matrix(q, k))
        ctx.save_for_backward(q, k, v, attention)
        output = side_by_side(v, q.shape[2])
        torch.bmm(attention, v[0], out=output[0])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, *kept), scale, (arrived,) = ctx.saved_tensors, ctx.scale, gradients
        to_q, to_k, to_v = (each.new_empty(each.shape) for each in (q, k, v))
        first, second, unused = _matrix(q, k), _matrix(q, k), q.new_empty(())
        for image, gradient in enumerate(arrived):
            attention = kept[image] if kept else _attention(q[image], k[image], scale, out=first)
            weighted = _weighted(attention, v[image], gradient, out=second)
            torch.bmm(attention.mT, gradient, out=to_v[image])
            # of the softmax, on what it was taken of: dy/dA ∘ A less A times the sum of that over keys
            score = torch.addcmul(weighted, attention, weighted.sum(-1, keepdim=True), value=-1, out=first)
            torch.baddbmm(unused, score, k[image], beta=0, alpha=scale, out=to_q[image])
            torch.baddbmm(unused, score.mT, q[image], beta=0, alpha=scale, out=to_k[image])
            _fuse(weighted, ctx.matrix[image])
        return to_q, to_k, to_v, None, None


def _matrix(q: Tensor, k: Tensor) -> Tensor:
    """Room for a matrix (H, N, N), which serves all images: new memory is slow."""
    return q.new_empty(q.shape[1], q.shape[2], k.shape[2])


def _attention(q: Tensor, k: Tensor, scale: float, out: Tensor) -> Tensor:
    """A (H, N, N) of one image."""
    torch.baddbmm(out, q, k.mT, beta=0, alpha=scale, out=out)
    return torch.softmax(out, -1, out=out)


def _weighted(attention: Tensor, v: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
    """dy/dA ∘ A (H, N, N) of one image, from dy/dO (H, N, dh)."""
    return torch.bmm(gradient, v.mT, out=out).mul_(attention)


def _fuse(weighted: Tensor, matrix: Tensor) -> None:
    """The mean over heads (1, N, N) of the positive part of (H, N, N)."""
    share = weighted.new_full((1, len(weighted)), 1 / len(weighted))
    torch.mm(share, weighted.clamp_(min=0).flatten(1), out=matrix.flatten(1))
