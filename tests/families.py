"""Tiny models of every supported family: never all square, never all CLS-only, weights far from symmetric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIZE = (32, 48)
DIMENSIONS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        build: makes the model.
        grid: its patch grid for images of `size`.
        prefix: its prefix tokens.
        size: image size (H, W).
        pooling: the weight (N,) with which its head reads each token, written down by hand.
    """

    build: Callable[[], nn.Module]
    prefix: int
    pooling: Callable[[int], Tensor]
    grid: tuple[int, int] = (4, 6)
    size: tuple[int, int] = SIZE


def _cls(count: int) -> Tensor:
    return torch.eye(count)[0]


def _mean(prefix: int) -> Callable[[int], Tensor]:
    return lambda count: torch.tensor([0.0] * prefix + [1 / (count - prefix)] * (count - prefix))


def _vit(**options: object) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(**{"img_size": SIZE, **DIMENSIONS, **options})


FAMILIES: dict[str, Family] = {
    "cls": Family(_vit(), 1, _cls),
    "registers": Family(_vit(reg_tokens=4, init_values=0.3), 5, _cls),
    "mean_pooled": Family(_vit(global_pool="avg", class_token=False, reg_tokens=2, fc_norm=False), 2, _mean(2)),
    "mean_pooled_with_cls": Family(_vit(global_pool="avg", qk_norm=True, qkv_bias=False), 1, _mean(1)),
    "distilled": Family(
        lambda: VisionTransformerDistilled(img_size=SIZE, **DIMENSIONS),
        2,
        lambda count: torch.tensor([0.5, 0.5] + [0.0] * (count - 2)),
    ),
    "dynamic": Family(_vit(dynamic_img_size=True, drop_path_rate=0.2, attn_drop_rate=0.2), 1, _cls, (5, 3), (40, 24)),
}


def make_model(family: str) -> nn.Module:
    """A model of a family with weights that make attention, gradients and class scores differ clearly."""
    torch.manual_seed(sum(map(ord, family)))
    model = FAMILIES[family].build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.4 if "qkv" in name else 0.25))
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_images(family: str, batch: int = 2, seed: int = 0) -> Tensor:
    """Normalised images (B, 3, H, W) of the size that the family's model takes."""
    return torch.randn(batch, 3, *FAMILIES[family].size, generator=torch.Generator().manual_seed(seed))
