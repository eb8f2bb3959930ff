"""Adapter for timm's `VisionTransformer`: ViT, DeiT (distilled too), AugReg, registers, mean pooling."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from .adapter import BlockModules, ModelAdapter


def is_timm_vit(model: nn.Module) -> bool:
    """Whether the model is an instance of timm's `VisionTransformer` or a subclass."""
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer)


class TimmViTAdapter(ModelAdapter):
    """timm `VisionTransformer` with pre-norm blocks; fused attention stays on.

    Raises:
        UnsupportedModelError: the blocks are of another kind than timm's `Block`.
    """

    def __init__(self, model: nn.Module) -> None:
        from timm.models.vision_transformer import Block

        self.model = model
        self._vit = cast("Any", model)  # timm's attributes are not declared on nn.Module
        for index, block in enumerate(self._vit.blocks):
            if not isinstance(block, Block) or not hasattr(block.attn, "qkv"):
                raise UnsupportedModelError(
                    f"block {index} is a {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}; "
                    "expected timm's Block with Attention. Write a ModelAdapter for it and pass that as the model"
                )
        self.blocks = tuple(
            BlockModules(block, block.attn, attention_input=block.norm1, mid=block.norm2, mlp=block.ls2)
            for block in self._vit.blocks
        )
        self.num_prefix_tokens = int(self._vit.num_prefix_tokens)

    @property
    def num_channels(self) -> int:
        """Channels that the first convolution takes."""
        for module in self._vit.patch_embed.modules():
            if isinstance(module, nn.Conv2d):
                return int(module.in_channels)
        return 3

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w); any size for models built with `dynamic_img_size`, else the one size they take."""
        embed = self._vit.patch_embed
        height, width = embed.patch_size
        if self._vit.dynamic_img_size or embed.img_size is None:
            if not getattr(embed, "dynamic_img_pad", False) and (image_size[0] % height or image_size[1] % width):
                raise InputError(
                    f"found images of {image_size[0]}×{image_size[1]} pixels, expected multiples of the patch size "
                    f"{height}×{width}: resize or crop them"
                )
            rows, columns = embed.dynamic_feat_size(image_size)
        else:
            if tuple(image_size) != tuple(embed.img_size):
                raise InputError(
                    f"found images of {image_size[0]}×{image_size[1]} pixels, expected {embed.img_size[0]}×"
                    f"{embed.img_size[1]}: resize them, or build the model with img_size=… or dynamic_img_size=True"
                )
            rows, columns = embed.grid_size
        return int(rows), int(columns)

    def seed(self, num_tokens: int) -> Tensor:
        """CLS; half CLS, half DIST; or uniform over the mean-pooled tokens, as the head reads them."""
        weights = torch.zeros(num_tokens)
        pool = "map" if self._vit.attn_pool is not None else self._vit.global_pool
        if hasattr(self._vit, "head_dist"):
            weights[:2] = 0.5
        elif pool == "token":
            weights[0] = 1.0
        elif pool == "avg":
            first = 0 if self._vit.pool_include_prefix else self.num_prefix_tokens
            weights[first:] = 1.0 / (num_tokens - first)
        else:
            raise UnsupportedModelError(
                f"the head pools tokens by {pool!r}; expected 'token' or 'avg', where the seed row of a rollout is "
                "known. Methods that need no seed row work: gradcam"
            )
        return weights

    def output_weight(self, block: int) -> Tensor:
        """`attn.proj` by heads, `ls1` folded in."""
        attention: Any = self.blocks[block].attention
        if (
            not isinstance(getattr(attention, "norm", None), nn.Identity)
            or getattr(attention, "gate", None) is not None
        ):
            raise UnsupportedModelError(
                f"block {block} normalises or gates its heads before the output projection, so a token's "
                "transformed vector is not linear in its value; use generic_attention or rollout"
            )
        weight: Tensor = attention.proj.weight  # (D, H·dh)
        gamma = getattr(self._vit.blocks[block].ls1, "gamma", None)
        if gamma is not None:
            weight = gamma[:, None] * weight
        return weight.detach().T.reshape(attention.num_heads, -1, len(weight))

    def value_weight(self, block: int) -> Tensor:
        """The value third of `attn.qkv`, by heads."""
        attention: Any = self.blocks[block].attention
        weight: Tensor = attention.qkv.weight.detach()  # (3·H·dh, D)
        return weight[-weight.shape[0] // 3 :].reshape(attention.num_heads, -1, weight.shape[1]).transpose(1, 2)
