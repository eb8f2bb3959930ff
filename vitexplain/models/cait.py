"""Adapter for timm's CaiT: talking heads over patches, then a class token that alone asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention, Rows
from ..combination import Combination
from ..errors import UnsupportedModelError
from ..layout import TokenLayout
from .adapter import BlockModules
from .known import KnownAdapter, cut_size, patch_grid

if TYPE_CHECKING:
    from ..needs import Needs


def is_cait(model: nn.Module) -> bool:
    """Whether the model is a timm `Cait`."""
    from timm.models.cait import Cait

    return isinstance(model, Cait)


@dataclass(frozen=True, eq=False)
class ClassAttention(Attention):
    """Attention of the class token alone, as one over all tokens: patches stay as they are, so each attends to itself.

    Attributes:
        asked: the attention of the one query row (B, H, 1, N).
    """

    asked: Attention

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        """Values (B, H, N, dh)."""
        return self.asked.v

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, N)."""
        batch, heads, _, keys = self.asked.shape
        return batch, heads, keys, keys

    @property
    def stochastic(self) -> bool:
        """Whether the class token's row is."""
        return self.asked.stochastic

    def probabilities(self, rows: Rows = slice(None)) -> Tensor:
        """The class token's row, and rows of the identity (B, H, T, N)."""
        weights = self.asked.probabilities()
        identity = torch.eye(self.num_keys, dtype=weights.dtype, device=weights.device)
        tokens = torch.arange(self.num_tokens, device=weights.device)[rows]
        return torch.where((tokens == 0)[:, None], weights, identity[tokens])

    def gradient(self, output_gradient: Tensor, rows: Rows = slice(None)) -> Tensor:
        """That of the class token's row; zero in the others (B, H, T, N)."""
        gradient = self.asked.gradient(output_gradient)
        return F.pad(gradient, (0, 0, 0, self.num_tokens - 1))[:, :, rows]

    def part(self, images: slice) -> ClassAttention:
        """The attention of some images of the batch."""
        return ClassAttention(self.asked.part(images))

    def output(self, tracked: Tensor) -> Tensor:
        """That of the class token (B, H, 1, dh)."""
        return self.asked.output(tracked)


class _ClassQuery(Combination):
    """The one call of a class attention block."""

    def operands(self, calls: Sequence[Attention]) -> Attention:
        """The call, with the rows of the patches."""
        return ClassAttention(super().operands(calls))


class CaitAdapter(KnownAdapter):
    """timm `Cait`: blocks over patches, then blocks in which only the class token asks, and reads all tokens.

    Attention is what values are mixed with, after the heads have been mixed a second time behind the softmax: its
    weights may be negative, and rows need not sum to 1. Relevance of the class token ends where it enters.
    """

    approximate = "heads are mixed after the softmax, so attention has negative weights and rows that do not sum to 1"
    num_prefix_tokens = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._cait: Any = cast("Any", model)  # timm's attributes are not declared on nn.Module
        trunk = [BlockModules(each, each.attn, each.norm1, each.norm2) for each in self._cait.blocks]
        top = [
            BlockModules(each, each.attn, each.norm1, combination=_ClassQuery())
            for each in self._cait.blocks_token_only
        ]
        self.blocks = (*trunk, *top)
        self._settle(self._cait.patch_embed, [self._cait.head_drop, self._cait.head])

    @property
    def num_channels(self) -> int:
        """Channels that the patch embedding takes."""
        return int(self._cait.patch_embed.proj.in_channels)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w)."""
        return patch_grid(self._cait.patch_embed, image_size, dynamic=False)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels (height, width) of a patch."""
        return cut_size(self._cait.patch_embed)

    def layouts(self, grid: tuple[int, int]) -> tuple[TokenLayout, ...]:
        """Patches alone, and with the class token in the last blocks."""
        count = len(self._cait.blocks)
        return (TokenLayout(0, grid),) * count + (TokenLayout(1, grid),) * (len(self.blocks) - count)

    def class_seed(self, num_tokens: int) -> Tensor:
        """CLS, or uniform over the patches, as the head reads them."""
        weights = torch.zeros(num_tokens, device="cpu", dtype=torch.float32)
        if self._cait.global_pool == "token":
            weights[0] = 1.0
        else:
            weights[1:] = 1 / (num_tokens - 1)
        return weights

    def check_needs(self, needs: Needs) -> None:
        """Refuses token states beside attention: tokens cannot be compared across the class token's entrance.

        What attention takes in one block is read anywhere, on that block's own tokens.
        """
        super().check_needs(needs)
        if needs.any_attention and needs.seen_states - {"attention_input"}:
            raise self._refusal()

    def output_weight(self, block: int) -> Tensor:
        """Refused: heads are mixed, and the class token is updated alone."""
        raise self._refusal()

    value_weight = output_weight

    def _refusal(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            "a Cait's token states change their number, so how each is transformed is not defined; use "
            "generic_attention, rollout, raw_attention or gradcam"
        )
