"""Relevance instead of gradients: what a capture records under the rules of layer-wise relevance propagation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import relevance_rules
from .attention import Attention, GivenAttention, Rows
from .combination import DifferentialOperands
from .errors import UnsupportedModelError
from .layout import Arrangement
from .models.adapter import first_weight
from .modified_backward import BackwardRules
from .relevance_pass import ALTERNATIVES, RelevancePass

if TYPE_CHECKING:
    from .record import BlockRecord

_AT_A_TIME = 4  # images; of 2 to 8 the fastest, or as fast as any, on ViT-Ti, ViT-S and ViT-B


@dataclass(frozen=True)
class RelevanceRules(BackwardRules):
    """Layer-wise relevance propagation; what arrives at a tensor in the backward pass is its relevance.

    Attributes:
        alpha: of the alpha-beta rule of linear maps.
        normalised: sums share by `normalised_addition` and linear maps by `linear_alpha_beta`, as Chefer et al.
            define it; else by `addition` and `linear_signs_apart`, as their LRP baselines do.
    """

    alpha: float = 1.0
    normalised: bool = True

    @property
    def linear(self) -> bool:
        """Not where sums share by their totals: relevance for and against then goes back apart."""
        return not self.normalised

    @property
    def widens(self) -> bool:
        """Relevance is divided by activations that cross zero."""
        return True

    def images_at_a_time(self, device: torch.device) -> int | None:
        """Few on the CPU: memory of states in double precision is then used again, and not asked for anew each time."""
        return _AT_A_TIME if device.type == "cpu" else None

    def watching(self, batch: int, arrangement: Arrangement) -> RelevancePass:
        """The mode that applies the rules, in double precision where the device has it."""
        return RelevancePass(batch, arrangement, alpha=self.alpha, normalised=self.normalised)

    def at_attention(self, attention: Attention, tracked: Tensor, arrived: Tensor) -> Tensor:
        """The gradient with which A ∘ dy/dA is the relevance of A, in the shape of `tracked`."""
        unit = relevance_rules.share(arrived, tracked.detach())
        return unit if isinstance(attention, GivenAttention) else unit / 2


@dataclass(frozen=True, eq=False)
class AttentionRelevance(Attention):
    """The relevance of attention in the place of attention itself: R (B, H, N, N), computed where it is read.

    Nothing is divided here any more, so it is in the model's own precision, float32 or wider.

    Attributes:
        attention: A.
        unit: what a capture under `RelevanceRules` recorded as the gradient at A.
        v: values (B, H, N, dh).
    """

    attention: Attention
    unit: Tensor
    v: Tensor

    @classmethod
    def of(cls, block: BlockRecord) -> AttentionRelevance:
        """Of a block captured under `RelevanceRules`.

        Raises:
            UnsupportedModelError: the block subtracts one attention from another, which has no rule.
        """
        attention = block.operands
        if isinstance(attention, DifferentialOperands):
            raise UnsupportedModelError(
                f"block {block.index} subtracts one attention from another, and the relevance of the difference is not "
                f"defined. {ALTERNATIVES}"
            )
        weight = first_weight(block.adapter.model)
        precision = torch.promote_types(torch.float32 if weight is None else weight.dtype, torch.float32)
        attention = _in_precision(attention, precision)
        return cls(attention, block.output_gradient.to(precision), attention.v)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, query rows, keys)."""
        return self.attention.shape

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """Rows of R (B, H, T, N)."""
        return self.attention.probabilities(rows) * self.attention.gradient(self.unit, rows)

    def gradient(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """The same rows of dy/dA (B, H, T, N)."""
        return self.attention.gradient(output_gradient.to(self.v.dtype), rows)

    def part(self, images: slice) -> AttentionRelevance:
        """That of some images of the batch."""
        return AttentionRelevance(self.attention.part(images), self.unit[images], self.v[images])

    def output(self, tracked: Tensor) -> Tensor:
        """A v."""
        return self.attention.output(tracked)


def _in_precision(attention: Attention, precision: torch.dtype) -> Attention:
    """The same attention with its tensors in a precision."""
    held = {each.name: getattr(attention, each.name) for each in fields(attention)}  # type: ignore[arg-type]
    tensors = {name: each for name, each in held.items() if isinstance(each, Tensor) and each.is_floating_point()}
    return replace(attention, **{name: each.to(precision) for name, each in tensors.items()})  # type: ignore[type-var]
