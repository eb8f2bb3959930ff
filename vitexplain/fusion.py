"""Heads fused while the model runs: for methods that read one matrix a block, and no gradient of it.

The model's own kernel never shows its attention, so reading it means computing it a second time. Computing it once,
here, in tiles that stay in the cache, costs less: its product with the values is what the model goes on with, its mean
(or maximum, or minimum) over the heads is all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .attention import TILE_BYTES, Attention, AttentionOperands, Rows
from .batch_parts import even_part
from .errors import CaptureError

Fusion = Literal["mean", "max", "min"]
"""How the heads of a block become one matrix."""

FUSE: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}
"""The reduction of each `Fusion`; takes a tensor and the axis of the heads."""


@dataclass(frozen=True, eq=False)
class FusedAttention(Attention):
    """One matrix in the place of a block's heads; values and gradients are not there to be read.

    Attributes:
        matrix: (B, 1, N, N).
        mean: it is the mean over the heads, so its rows sum to 1.
    """

    matrix: Tensor
    mean: bool

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        """Not kept."""
        raise self.refusal("the values")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, 1, N, N)."""
        batch, heads, rows, keys = self.matrix.shape
        return batch, heads, rows, keys

    @property
    def stochastic(self) -> bool:
        """True of a mean of distributions."""
        return self.mean

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """Rows of the matrix (B, 1, T, N)."""
        return self.matrix[:, :, rows]

    def gradient(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """Not kept."""
        raise self.refusal("the gradient")

    def follow(self, row: Tensor, residual: float = 0.0) -> Tensor:
        """A row (B, N) times the matrix, mixed with itself by the weight of the residual."""
        row = row[:, None].to(self.matrix.dtype)
        return torch.baddbmm(row, row, self.matrix[:, 0], beta=residual, alpha=1 - residual)[:, 0]

    def part(self, images: slice) -> FusedAttention:
        """The matrices of some images of the batch."""
        return FusedAttention(self.matrix[images], self.mean)

    def output(self, tracked: Tensor) -> Tensor:
        """Not kept."""
        raise self.refusal("the output")

    def refusal(self, what: str) -> CaptureError:
        """The error for what was not kept."""
        return CaptureError(
            f"{what} of this attention was not kept, since its heads were fused at once: ask for "
            "Needs(attention=True) without `fusion` or `fused_gradient`"
        )


def fuses_well(operands: AttentionOperands) -> bool:
    """Whether fusing at once saves time and memory: on the CPU, full precision, few tokens, no bias or mask.

    The matrix kept must not be larger than q and k, which are kept otherwise.
    """
    _, heads, tokens, keys = operands.shape
    return (
        operands.bias is None
        and operands.q.device.type == "cpu"
        and operands.q.element_size() >= 4
        and operands.q.dtype == operands.k.dtype == operands.v.dtype
        and tokens == keys <= 2 * heads * operands.q.shape[-1]
    )


class Tiles:
    """Query rows of one image in tiles (H, T, N) that stay in the cache, in memory that serves them all.

    New memory is slow: the system hands each page out empty.

    Args:
        q: queries (B, H, N, dh).
        keys: N.

    Attributes:
        rows: of each tile.
    """

    def __init__(self, q: Tensor, keys: int) -> None:
        _, self._heads, tokens, _ = q.shape
        step = even_part(tokens, max(1, TILE_BYTES // (self._heads * keys * q.element_size())))
        self.rows = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
        self._like, self._keys, self._size = q, keys, self._heads * step * keys

    def room(self) -> Tensor:
        """Memory for one tile after the other, flat."""
        return self._like.new_empty(self._size)

    def of(self, rows: slice, room: Tensor) -> Tensor:
        """A tile (H, T, N) in such memory; what was there before is lost."""
        height = rows.stop - rows.start
        size = self._heads * height * self._keys
        return (room if size == self._size else room[:size]).view(self._heads, height, self._keys)


def attend(operands: AttentionOperands, fusion: Fusion) -> tuple[FusedAttention, Tensor]:
    """A with its heads fused, and O = A v (B, H, N, dh); image by image, so that A stays in the cache."""
    batch, heads, tokens, keys = operands.shape
    matrix, output = operands.q.new_empty(batch, 1, tokens, keys), side_by_side(operands.v, tokens)
    tiles, share = Tiles(operands.q, keys), matrix.new_full((1, heads), 1 / heads)
    first, second = tiles.room(), tiles.room()
    for image in range(batch):
        q, k, v = operands.q[image], operands.k[image], operands.v[image]
        for rows in tiles.rows:
            weights = softmax_of(q[:, rows], k, operands.scale, tiles.of(rows, first), tiles.of(rows, second))
            if fusion == "mean":  # a matrix product is the faster sum over a few heads
                torch.mm(share, weights.flatten(1), out=matrix[image, :, rows].flatten(1))
            else:
                FUSE[fusion](weights, 0, out=matrix[image, 0, rows])
            torch.bmm(weights, v, out=output[image][:, rows])
    return FusedAttention(matrix, fusion == "mean"), output


def softmax_of(q: Tensor, k: Tensor, scale: float, room: Tensor, out: Tensor) -> Tensor:
    """Rows of A (H, T, N) of one image, from q (H, T, dh) and k (H, N, dh), in `out`.

    In `room` lies what the softmax is taken of: it may be the same memory, but is a fifth slower there.
    """
    torch.baddbmm(room, q, k.mT, beta=0, alpha=scale, out=room)
    return torch.softmax(room, -1, out=out)


def side_by_side(v: Tensor, tokens: int) -> Tensor:
    """Room for an output (B, H, N, dh) of attention on values; heads lie as a model puts them together next."""
    batch, heads, _, width = v.shape
    # not a view, which a model could not change in place
    return v.new_empty_strided((batch, heads, tokens, width), (tokens * heads * width, width, heads * width, 1))


def discard_lowest(fused: Tensor, ratio: float) -> Tensor:
    """A fused matrix (B, N, N) with the share `ratio` of each image's smallest entries set to 0.

    int(ratio · N²) entries are left out; of equal ones at the threshold, any. The smaller side is the one chosen.
    """
    flat = fused.flatten(1)
    out = int(flat.shape[1] * ratio)
    if 2 * out <= flat.shape[1]:
        lowest = flat.topk(out, dim=1, largest=False, sorted=False).indices
        return flat.scatter(1, lowest, 0.0).view_as(fused)
    kept = flat.topk(flat.shape[1] - out, dim=1, sorted=False)
    return torch.zeros_like(flat).scatter_(1, kept.indices, kept.values).view_as(fused)
