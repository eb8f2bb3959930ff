"""Adapter for timm's Swin transformers: attention within shifted windows, on grids that halve from stage to stage."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..layout import TokenLayout, Windows
from .adapter import BlockModules
from .known import KnownAdapter, cut_size, patch_grid
from .reading import WITHOUT_SEED


def is_swin(model: nn.Module) -> bool:
    """Whether the model is of a timm class that `SwinAdapter` knows: Swin v1 and v2."""
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return isinstance(model, SwinTransformer | SwinTransformerV2)


class SwinAdapter(KnownAdapter):
    """timm `SwinTransformer` and `SwinTransformerV2`; blocks of all stages in forward order.

    Within a stage attention is exact: its windows are the blocks on the diagonal of the global matrix, whose shift and
    mask are undone. Between stages a merged token hands its relevance down in equal shares; that is the approximation.
    What lies on padding, where the grid is no multiple of the window, belongs to no token and is left out.
    """

    approximate = "relevance of tokens that were merged between stages is shared equally among their parts"
    num_prefix_tokens = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._swin: Any = cast("Any", model)  # timm's attributes are not declared on nn.Module
        self.blocks = tuple(_describe(block) for stage in self._swin.layers for block in stage.blocks)
        self._settle(self._swin.patch_embed, [getattr(self._swin.head, "fc", None)])

    @property
    def num_channels(self) -> int:
        """Channels that the patch embedding takes."""
        return int(self._swin.patch_embed.proj.in_channels)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w) of the first stage."""
        return patch_grid(self._swin.patch_embed, image_size, dynamic=self._swin.dynamic_img_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels (height, width) of a patch of the first stage."""
        return cut_size(self._swin.patch_embed)

    def layouts(self, grid: tuple[int, int]) -> tuple[TokenLayout, ...]:
        """Half the grid, rounded up, after each merging."""
        layouts: list[TokenLayout] = []
        for stage in self._swin.layers:
            if not isinstance(stage.downsample, nn.Identity):
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            layouts += [TokenLayout(0, grid)] * len(stage.blocks)
        return tuple(layouts)

    def class_seed(self, num_tokens: int) -> Tensor:
        """Uniform over the last stage's tokens, as the head averages them."""
        pooling = getattr(getattr(self._swin.head, "global_pool", None), "pool_type", type(self._swin.head).__name__)
        if pooling != "avg":
            raise UnsupportedModelError(
                f"the head pools tokens by {pooling!r}; expected 'avg', where the seed row of a rollout is known. "
                f"{WITHOUT_SEED}"
            )
        return torch.full((num_tokens,), 1 / num_tokens, device="cpu", dtype=torch.float32)

    def output_weight(self, block: int) -> Tensor:
        """Refused: values are cut into windows, and token states are not."""
        raise UnsupportedModelError(
            "the values of attention within windows are not in the order of the tokens; use tokentm with "
            "transformation='residual', generic_attention, rollout, raw_attention or gradcam"
        )

    value_weight = output_weight


def _describe(block: Any) -> BlockModules:
    """Swin v1 normalises before its branches, v2 after them."""

    def windows(grid: tuple[int, int]) -> Windows:
        return Windows(grid, tuple(block.window_size), tuple(block.shift_size))

    if hasattr(block.attn, "logit_scale"):
        return BlockModules(block, block.attn, None, block.mlp, block.norm2, arrangement="BHWD", windows=windows)
    return BlockModules(block, block.attn, block.norm1, block.norm2, arrangement="BHWD", windows=windows)
