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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import CaptureError

TILE_BYTES = 8 * 2**20
"""How much one (B, H, T, N) tile may take, in bytes. Small enough to stay near the cache, large enough to
keep the number of kernel launches low; every tile size gives the same map."""

Rows = slice | Tensor
"""Query rows: a slice, or a (T,) int64 tensor of indices."""


@dataclass(frozen=True, eq=False)
class AttentionOperands:
    """What one call of scaled dot-product attention was given, and what came of it.

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
    def num_tokens(self) -> int:
        """Number of query rows: N, or the number of latents of an attention pool."""
        return self.q.shape[-2]

    @property
    def stochastic(self) -> bool:
        """Whether the rows of A sum to 1."""
        return True

    @property
    def num_keys(self) -> int:
        """N, the number of tokens attended to."""
        return self.k.shape[-2]

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """Attention after the softmax (B, H, T, N); float32 or wider, whatever the model's precision."""
        q, k = widen(self.q[:, :, rows]), widen(self.k)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if self.bias is not None:
            bias = self.bias
            if bias.shape[-2] != 1:
                bias = bias[..., rows, :]
            logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else logits + bias
        return logits.softmax(dim=-1)

    def gradient(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """dy/dA (B, H, T, N) from dy/dO (B, H, N, dh): the exact derivative, without autograd."""
        return widen(output_gradient[:, :, rows]) @ widen(self.v).transpose(-2, -1)


@dataclass(frozen=True, eq=False)
class DifferentialOperands(AttentionOperands):
    """Differential attention: A = A₁ - λ A₂ on shared values; rows sum to 1 - λ, entries may be negative.

    Attributes:
        second: q, k of A₂; its v is the same.
        weight: λ.
    """

    second: AttentionOperands | None = None
    weight: float = 0.0

    @property
    def stochastic(self) -> bool:
        """False: rows sum to 1 - λ."""
        return False

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """A₁ - λ A₂ (B, H, T, N)."""
        first = super().probabilities(rows)
        return first if self.second is None else first - self.weight * self.second.probabilities(rows)


class Combination:
    """How the attention calls of one block make one attention; this one expects a single call."""

    def operands(self, calls: Sequence[AttentionOperands]) -> AttentionOperands:
        """The block's operands from those of its calls, in order."""
        if len(calls) != 1:
            raise CaptureError(
                f"a block computed attention {len(calls)} times in one forward; expected once. Run the model once, and "
                "give blocks with several attentions an adapter that combines them"
            )
        return calls[0]

    def output_gradient(self, gradients: Sequence[Tensor]) -> Tensor:
        """The gradient at the block's attention output, from those at the outputs of its calls."""
        return gradients[0]


class SideBySide(Combination):
    """Attentions in parallel, all added to the stream: one attention with the heads of all."""

    def operands(self, calls: Sequence[AttentionOperands]) -> AttentionOperands:
        """All heads, in the order of the calls."""
        q, k, v = (torch.cat([getattr(call, name) for call in calls], dim=1) for name in "qkv")
        return AttentionOperands(q, k, v, calls[0].scale, calls[0].bias)

    def output_gradient(self, gradients: Sequence[Tensor]) -> Tensor:
        """All heads, in the order of the calls."""
        return torch.cat(list(gradients), dim=1)


@dataclass(frozen=True)
class Differential(Combination):
    """The two calls of differential attention, O = O₁ - λ O₂; dy/dO is the gradient at O₁.

    Attributes:
        weight: gives λ.
    """

    weight: Callable[[], float]

    def operands(self, calls: Sequence[AttentionOperands]) -> AttentionOperands:
        """The two calls as one."""
        first, second = calls
        return DifferentialOperands(first.q, first.k, first.v, first.scale, first.bias, second, self.weight())


class RowTile:
    """Some query rows of one block's attention, computed when asked for.

    Attributes:
        rows: which query rows.
    """

    def __init__(self, operands: AttentionOperands, output_gradient: Tensor | None, rows: Rows) -> None:
        self.rows = rows
        self._operands = operands
        self._output_gradient = output_gradient

    @cached_property
    def attention(self) -> Tensor:
        """A (B, H, T, N); rows sum to 1."""
        return self._operands.probabilities(self.rows)

    @cached_property
    def gradient(self) -> Tensor:
        """dy/dA (B, H, T, N)."""
        if self._output_gradient is None:
            raise RuntimeError("the gradient of attention is read before the backward pass")
        return self._operands.gradient(self._output_gradient, self.rows)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is of a half precision, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def row_tiles(operands: AttentionOperands, rows: Tensor | None = None, tile_rows: int | None = None) -> Iterator[Rows]:
    """Splits query rows into tiles of at most `TILE_BYTES`.

    Args:
        operands: gives B, H and N.
        rows: (R,) indices to visit; None for all N.
        tile_rows: rows a tile, instead of the number that follows from `TILE_BYTES`.
    """
    batch, heads, tokens, _ = operands.q.shape
    if tile_rows is None:
        tile_rows = max(1, TILE_BYTES // (4 * batch * heads * tokens))
    for start in range(0, tokens if rows is None else len(rows), tile_rows):
        tile = slice(start, min(start + tile_rows, tokens))
        yield tile if rows is None else rows[tile]


def propagate(
    row: Tensor,
    operands: AttentionOperands,
    weigh: Callable[[RowTile], Tensor],
    *,
    output_gradient: Tensor | None = None,
    tile_rows: int | None = None,
) -> Tensor:
    """One row vector times a matrix that is made of attention, tile by tile.

    ``out[b, …, j] = Σ_i row[b, i] · M[b, …, i, j]`` where `weigh` gives M's rows from a tile of attention.
    Query rows on which `row` is zero for the whole batch are never computed: with a CLS seed, the last block
    costs one query row.

    Args:
        row: (B, N) relevance of the tokens leaving the attention.
        operands: the attention's q, k, v.
        weigh: maps a `RowTile` to (B, H, T, N), or (B, T, N) where heads are already fused.
        output_gradient: dy/dO (B, H, N, dh), where `weigh` reads `RowTile.gradient`.
        tile_rows: rows a tile; by default chosen from `TILE_BYTES`. The result does not depend on it.

    Returns:
        (B, H, N) or (B, N), as `weigh` gives heads or not; float32 or wider.
    """
    support = (row != 0).any(dim=0).nonzero().squeeze(1)
    rows = support if len(support) < operands.num_tokens else None
    total: Tensor | None = None
    for tile_of_rows in row_tiles(operands, rows, tile_rows):
        weights = weigh(RowTile(operands, output_gradient, tile_of_rows))
        part = row[:, tile_of_rows].to(weights.dtype)
        part = part[:, None, None, :] if weights.ndim == 4 else part[:, None, :]
        product = (part @ weights).squeeze(-2)
        total = product if total is None else total + product
    if total is None:  # the row is zero everywhere, and so is its product: one tile tells the shape
        nothing = weigh(RowTile(operands, output_gradient, slice(0, 1)))
        total = torch.zeros_like(nothing[..., 0, :])
    return total
