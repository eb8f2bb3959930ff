"""Attention and its gradient fused while the backward pass goes: for methods that read one matrix of both and no more.

The backward of attention needs A and dy/dA itself, and the model's own kernel shows neither. Reading their product
behind the backward pass means computing both a second time. Attention's backward is written out here instead, in tiles
that stay in the cache: what it multiplies is multiplied once, and one matrix a block is kept. Of a small image that
comes alone A is kept as well: it is in the cache still when it is asked for again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import AttentionOperands, Rows
from .errors import CaptureError
from .fusion import FusedAttention, Tiles, side_by_side, softmax_of

GradientFusion = Literal["signed", "positive"]
"""How dy/dA ∘ A of the heads becomes one matrix: their mean, or the mean of their positive parts."""


@dataclass(frozen=True, eq=False)
class FusedGradient(FusedAttention):
    """E_h[dy/dA ∘ A] or E_h[(dy/dA ∘ A)+] of the last backward pass, (B, 1, N, N); zero before it.

    Attributes:
        fusion: which of the two.
    """

    fusion: GradientFusion = "positive"

    @classmethod
    def of(cls, operands: AttentionOperands, fusion: GradientFusion) -> FusedGradient:
        """Room for that of an attention.

        Raises:
            CaptureError: there is no such fusion.
        """
        if fusion not in get_args(GradientFusion):
            expected = " or ".join(map(repr, get_args(GradientFusion)))
            raise CaptureError(f"found Needs(fused_gradient={fusion!r}), expected {expected}, or None")
        batch, _, tokens, keys = operands.shape
        return cls(operands.q.new_zeros(batch, 1, tokens, keys), False, fusion)

    def part(self, images: slice) -> FusedGradient:
        """The matrices of some images of the batch."""
        return replace(self, matrix=self.matrix[images])

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """Not kept."""
        raise self.refusal("the attention")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """O = softmax(scale · q kᵀ) v (B, H, N, dh) on the graph of q, k or v; its backward fills the matrix."""
        output: Tensor = _Attend.apply(q, k, v, scale, self)
        return output

    def receive(self, operands: AttentionOperands, output_gradient: Tensor) -> None:
        """Fills the matrix where nothing goes back behind this attention, from dy/dO (B, H, N, dh)."""
        q, k, v = operands.q, operands.k, operands.v
        tiles = Tiles(q, k.shape[2])
        first, second = tiles.room(), tiles.room()
        for image, gradient in enumerate(output_gradient):
            for rows in tiles.rows:
                room = tiles.of(rows, second)
                attention = softmax_of(q[image, :, rows], k[image], operands.scale, room, tiles.of(rows, first))
                weighted = _weighted(attention, v[image], gradient[:, rows], room)
                self.take(weighted, image, rows)

    def take(self, weighted: Tensor, image: int, rows: slice) -> None:
        """Fuses dy/dA ∘ A (H, T, N) of some rows of an image, which may change for it."""
        if self.fusion == "positive":
            weighted = weighted.clamp_(min=0)
        share = weighted.new_full((1, len(weighted)), 1 / len(weighted))
        torch.mm(share, weighted.flatten(1), out=self.matrix[image, :, rows].flatten(1))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, fused: FusedGradient) -> Tensor:
        ctx.scale, ctx.fused = scale, fused
        tiles = Tiles(q, k.shape[2])
        if len(q) > 1 or len(tiles.rows) > 1:
            ctx.save_for_backward(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        # of one small image, it is in the cache still when it is asked for again
        room, kept = (tiles.of(tiles.rows[0], tiles.room()) for _ in range(2))
        attention = softmax_of(q[0], k[0], scale, room, kept)
        ctx.save_for_backward(q, k, v, attention)
        output = side_by_side(v, q.shape[2])
        torch.bmm(attention, v[0], out=output[0])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, *kept), scale, (arrived,) = ctx.saved_tensors, ctx.scale, gradients
        to_q, to_k, to_v = (each.new_empty(each.shape) for each in (q, k, v))
        tiles = Tiles(q, k.shape[2])
        first, second = tiles.room(), tiles.room()
        for image, gradient in enumerate(arrived):
            for rows in tiles.rows:
                place, room = tiles.of(rows, first), tiles.of(rows, second)
                arriving, further = gradient[:, rows], int(rows.start > 0)
                attention = kept[0] if kept else softmax_of(q[image, :, rows], k[image], scale, room, place)
                weighted = _weighted(attention, v[image], arriving, room)
                torch.baddbmm(to_v[image], attention.mT, arriving, beta=further, out=to_v[image])
                # of the softmax, on what it was taken of: dy/dA ∘ A less A times the sum of that over keys
                score = torch.addcmul(weighted, attention, weighted.sum(-1, keepdim=True), value=-1, out=place)
                into = to_q[image, :, rows]
                torch.baddbmm(into, score, k[image], beta=0, alpha=scale, out=into)
                torch.baddbmm(to_k[image], score.mT, q[image, :, rows], beta=further, alpha=scale, out=to_k[image])
                ctx.fused.take(weighted, image, rows)
        return to_q, to_k, to_v, None, None


def _weighted(attention: Tensor, v: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
    """dy/dA ∘ A (H, T, N) of some rows of one image, from dy/dO (H, T, dh)."""
    return torch.bmm(gradient, v.mT, out=out).mul_(attention)
