"""Blocks that compute attention more than once: how their calls make one attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import Attention, AttentionOperands, Rows
from .errors import CaptureError


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

    def scores(self, rows: Rows = slice(None)) -> Tensor:
        """Refused: the difference of two softmaxes is none."""
        return Attention.scores(self, rows)

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """A₁ - λ A₂ (B, H, T, N)."""
        first = super().probabilities(rows)
        return first if self.second is None else first - self.weight * self.second.probabilities(rows)

    def part(self, images: slice) -> DifferentialOperands:
        """The attention of some images of the batch."""
        first = AttentionOperands.part(self, images)
        second = None if self.second is None else self.second.part(images)
        return replace(self, q=first.q, k=first.k, v=first.v, bias=first.bias, second=second)


@dataclass(frozen=True, eq=False)
class LastKeys(Attention):
    """Attention to the last keys alone; its rows sum to what they do not give to the first ones, which are left out.

    Attributes:
        whole: the attention to all keys.
        first: how many are left out.
    """

    whole: Attention
    first: int

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        """Values (B, H, N, dh)."""
        return self.whole.v[:, :, self.first :]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, query rows, last keys)."""
        *others, keys = self.whole.shape
        return others[0], others[1], others[2], keys - self.first

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """The weights of the last keys (B, H, T, N)."""
        return self.whole.probabilities(rows)[..., self.first :]

    def gradient(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """That by the weights of the last keys (B, H, T, N)."""
        return self.whole.gradient(output_gradient, rows)[..., self.first :]

    def part(self, images: slice) -> LastKeys:
        """The attention of some images of the batch."""
        return LastKeys(self.whole.part(images), self.first)

    def output(self, tracked: Tensor) -> Tensor:
        """That of the whole attention."""
        return self.whole.output(tracked)


class Combination:
    """How the attention calls of one block make one attention; this one expects a single call."""

    def operands(self, calls: Sequence[Attention]) -> Attention:
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


@dataclass(frozen=True)
class WithoutFirstKeys(Combination):
    """The one call of a pool that also attends to keys that are no tokens, such as its own query.

    Those know nothing of the image: `Capture.seed_row` shares out among the tokens alone what the head reads.

    Attributes:
        count: how many of the first keys are no tokens.
    """

    count: int

    def operands(self, calls: Sequence[Attention]) -> Attention:
        """The call, without them."""
        return LastKeys(super().operands(calls), self.count)


class SideBySide(Combination):
    """Attentions in parallel, all added to the stream: one attention with the heads of all."""

    def operands(self, calls: Sequence[Attention]) -> Attention:
        """All heads, in the order of the calls."""
        parts = _fused(calls)
        q, k, v = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in "qkv")
        return AttentionOperands(q, k, v, parts[0].scale, parts[0].bias)

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

    def operands(self, calls: Sequence[Attention]) -> Attention:
        """The two calls as one."""
        first, second = _fused(calls)
        return DifferentialOperands(first.q, first.k, first.v, first.scale, first.bias, second, self.weight())


def _fused(calls: Sequence[Attention]) -> list[AttentionOperands]:
    found = [call for call in calls if isinstance(call, AttentionOperands)]
    if len(found) != len(calls):
        raise CaptureError(
            "a block with several attentions wrote one out by hand; expected scaled_dot_product_attention in all"
        )
    return found
