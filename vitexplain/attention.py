"""Exact attention algebra in row tiles.

Explanations of the rollout kind ask for one row of a product of N×N matrices, ``e · M_L · … · M_1``. That row
is carried from the last block down, one vector-matrix product a block, so no matrix is ever multiplied with a
matrix. And no matrix is ever held: `propagate` visits each block's attention in tiles of query rows, recomputed
from q and k, together with its gradient, recomputed from the gradient at the attention output:

    A = softmax(scale · q kᵀ + bias)          (H, N, N) for an image
    O = A v                                   (H, N, dh)
    dy/dA = dy/dO · vᵀ                        exactly; autograd is never asked for it

Time is O(N²·D) a block, memory O(N·D). Shapes: B batch, H heads, N tokens, T query rows of a tile, dh head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .errors import UnsupportedModelError

TILE_BYTES = 2 * 2**20
"""How much one (B, H, T, N) tile may take, in bytes. Small enough for a core's own cache, large enough to keep the
number of kernel launches low; every tile size gives the same map."""

Rows = slice | Tensor
"""Query rows: a slice, or a (T,) int64 tensor of indices."""


class Attention(ABC):
    """One attention A on values v: what the algebra below needs of it, however the model computes it.

    Attributes:
        v: values (B, H, N, dh).
    """

    v: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, query rows, keys) of A."""

    @property
    def num_tokens(self) -> int:
        """Number of query rows: N, or the number of latents of an attention pool."""
        return self.shape[2]

    @property
    def num_keys(self) -> int:
        """N, the number of tokens attended to."""
        return self.shape[3]

    @property
    def stochastic(self) -> bool:
        """Whether the rows of A are known to sum to 1."""
        return False

    @abstractmethod
    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """The weights A that values are mixed with (B, H, T, N); float32 or wider, whatever the model's precision."""

    def scores(self, rows: Rows = slice(None)) -> Tensor:
        """What the softmax is taken of (B, H, T, N), float32 or wider.

        Raises:
            UnsupportedModelError: the attention is no softmax of scores that were seen.
        """
        raise UnsupportedModelError(
            "the model computes attention by hand, or as a difference, and what its softmax was taken of is not seen; "
            "let it call scaled_dot_product_attention (transformers: model.set_attn_implementation('sdpa')), or use a "
            "method that reads the weights, such as generic_attention"
        )

    @abstractmethod
    def gradient(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """dy/dA (B, H, T, N) from the gradient at the tensor that was tracked for this attention."""

    def weighted(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """dy/dA ∘ A (B, H, T, N), in memory of its own."""
        return self.gradient(output_gradient, rows) * self.probabilities(rows)

    @abstractmethod
    def part(self, images: slice) -> Attention:
        """The attention of some images of the batch."""

    @abstractmethod
    def output(self, tracked: Tensor) -> Tensor:
        """O = A v (B, H, N, dh), from the tensor that was tracked."""


@dataclass(frozen=True, eq=False)
class AttentionOperands(Attention):
    """What one call of scaled dot-product attention was given; its output O is tracked.

    Attributes:
        q: queries (B, H, N, dh).
        k: keys (B, H, N, dh).
        v: values (B, H, N, dh).
        scale: factor on q kᵀ.
        bias: None, or additive bias or boolean mask (True = may attend), broadcastable to (B, H, N, N).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, query rows, keys)."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[-2], self.k.shape[-2]

    @property
    def stochastic(self) -> bool:
        """True: a softmax."""
        return True

    def scores(self, rows: Rows = slice(None)) -> Tensor:
        """scale · q kᵀ + bias (B, H, T, N); minus infinity where a mask hides."""
        scores = _inner_products(widen(self.q[:, :, rows]), widen(self.k), self.scale)
        if self.bias is None:
            return scores
        bias = self.bias if self.bias.shape[-2] == 1 else self.bias[..., rows, :]
        return scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """Attention after the softmax (B, H, T, N)."""
        scores = AttentionOperands.scores(self, rows)
        # in its own memory, since new memory is slow
        return scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)

    def gradient(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """dy/dA (B, H, T, N) from dy/dO (B, H, N, dh): the exact derivative, without autograd."""
        return _inner_products(widen(output_gradient[:, :, rows]), widen(self.v))

    def weighted(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """dy/dA ∘ A (B, H, T, N), where dy/dA was."""
        return self.gradient(output_gradient, rows).mul_(self.probabilities(rows))

    def part(self, images: slice) -> AttentionOperands:
        """The attention of some images of the batch."""
        bias = self.bias
        if bias is not None and bias.ndim == 4 and len(bias) > 1:
            bias = bias[images]
        return replace(self, q=self.q[images], k=self.k[images], v=self.v[images], bias=bias)

    def output(self, tracked: Tensor) -> Tensor:
        """O, which is what was tracked."""
        return tracked


@dataclass(frozen=True, eq=False)
class GivenAttention(Attention):
    """Attention that the model wrote out as a tensor before it multiplied values with it; A itself is tracked.

    Attributes:
        matrix: A (B, H, N, N), as it met the values: after whatever the model did to its softmax.
        v: values (B, H, N, dh).
    """

    matrix: Tensor
    v: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, query rows, keys)."""
        batch, heads, rows, keys = self.matrix.shape
        return batch, heads, rows, keys

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """Rows of A (B, H, T, N)."""
        return widen(self.matrix[:, :, rows])

    def gradient(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """The same rows of dy/dA, which autograd gives here."""
        return widen(output_gradient[:, :, rows])

    def part(self, images: slice) -> GivenAttention:
        """The attention of some images of the batch."""
        return GivenAttention(self.matrix[images], self.v[images])

    def output(self, tracked: Tensor) -> Tensor:
        """A v."""
        return tracked @ self.v


class RowTile:
    """Some query rows of one block's attention, computed when asked for.

    Attributes:
        rows: which query rows.
    """

    def __init__(self, operands: Attention, output_gradient: Tensor | None, rows: Rows) -> None:
        self.rows = rows
        self._operands = operands
        self._output_gradient = output_gradient

    @cached_property
    def attention(self) -> Tensor:
        """A (B, H, T, N)."""
        return self._operands.probabilities(self.rows)

    @cached_property
    def scores(self) -> Tensor:
        """What the softmax is taken of (B, H, T, N); see `Attention.scores` for what raises."""
        return self._operands.scores(self.rows)

    @cached_property
    def gradient(self) -> Tensor:
        """dy/dA (B, H, T, N)."""
        return self._operands.gradient(self._present_gradient, self.rows)

    def weighted(self) -> Tensor:
        """dy/dA ∘ A (B, H, T, N), the caller's own to change; cheaper than the product of both."""
        return self._operands.weighted(self._present_gradient, self.rows)

    @property
    def _present_gradient(self) -> Tensor:
        if self._output_gradient is None:
            raise RuntimeError("the gradient of attention is read before the backward pass")
        return self._output_gradient


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is of a half precision, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _inner_products(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """scale · left rightᵀ (B, H, T, N), scaled in the product itself; no copy where B and H merge as they lie."""
    unused = left.new_empty(())
    with torch.autocast(left.device.type, enabled=False):  # a caller's is about the model
        product = torch.baddbmm(unused, left.flatten(0, 1), right.flatten(0, 1).mT, beta=0, alpha=scale)
    return product.view(*left.shape[:3], right.shape[2])


def row_tiles(operands: Attention, rows: Tensor | None = None, tile_rows: int | None = None) -> Iterator[Rows]:
    """Splits query rows into tiles of at most `TILE_BYTES`.

    Args:
        operands: gives B, H and N.
        rows: (R,) indices to visit; None for all N.
        tile_rows: rows a tile, instead of the number that follows from `TILE_BYTES`.
    """
    batch, heads, tokens, keys = operands.shape
    if tile_rows is None:
        tile_rows = max(1, TILE_BYTES // (4 * batch * heads * keys))
    for start in range(0, tokens if rows is None else len(rows), tile_rows):
        tile = slice(start, min(start + tile_rows, tokens))
        yield tile if rows is None else rows[tile]


def propagate(
    row: Tensor,
    operands: Attention,
    weigh: Callable[[RowTile], Tensor],
    *,
    output_gradient: Tensor | None = None,
    tile_rows: int | None = None,
) -> Tensor:
    """One row vector times a matrix that is made of attention, tile by tile.

    ``out[b, …, j] = Σ_i row[b, i] · M[b, …, i, j]`` where `weigh` gives M's rows from a tile of attention.
    Query rows on which `row` is zero for all images of a tile are never computed: with a CLS seed, the last block
    costs one query row.

    Args:
        row: (B, N) relevance of the tokens leaving the attention; or (B, R, N), R rows at once.
        operands: the attention.
        weigh: maps a `RowTile` to (B, H, T, N), or (B, T, N) where heads are already fused.
        output_gradient: the gradient at the tracked tensor, dy/dO (B, H, N, dh) or dy/dA, where `weigh` reads
            `RowTile.gradient`.
        tile_rows: rows a tile; by default chosen from `TILE_BYTES`. The result does not depend on it.

    Returns:
        (B, H, N) or (B, N), as `weigh` gives heads or not; with R rows (B, H, R, N) or (B, R, N). Float32 or wider.
    """
    batch, heads, tokens, keys = operands.shape
    group = max(1, TILE_BYTES // (4 * heads * tokens * keys))  # whole images first: larger products than row tiles
    if batch > group:
        parts = []
        for start in range(0, batch, group):
            some = slice(start, start + group)
            gradient = None if output_gradient is None else output_gradient[some]
            parts.append(
                propagate(row[some], operands.part(some), weigh, output_gradient=gradient, tile_rows=tile_rows)
            )
        return torch.cat(parts)
    stacked = row if row.ndim == 3 else row[:, None]
    rows = None if row.all() else stacked.flatten(0, 1).any(dim=0).nonzero().squeeze(1)
    rows = None if rows is not None and len(rows) == tokens else rows
    total: Tensor | None = None
    for tile_of_rows in row_tiles(operands, rows, tile_rows):
        weights = weigh(RowTile(operands, output_gradient, tile_of_rows))
        part = stacked[:, :, tile_of_rows].to(weights.dtype)
        product = (part[:, None] if weights.ndim == 4 else part) @ weights
        total = product if total is None else total + product
    if total is None:  # the row is zero everywhere, and so is its product: one tile tells the shape
        nothing = weigh(RowTile(operands, output_gradient, slice(0, 1)))
        total = torch.zeros_like(nothing[..., :1, :]).expand(*nothing.shape[:-2], stacked.shape[1], -1)
    return total if row.ndim == 3 else total.squeeze(-2)
