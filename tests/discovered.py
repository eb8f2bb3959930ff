"""Tiny models of other libraries and of no library, which `DiscoveredAdapter` has to find out about."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from families import SIZE, Family, first_token, mean_of_patches
from torch import Tensor, nn

HUGGING_FACE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": 8,
    "num_labels": 7,
}
SQUARE = {**HUGGING_FACE, "image_size": 32}


def _hugging_face(name: str, options: dict[str, Any] = HUGGING_FACE, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name.split('For')[0]}Config")(**options, **more)
        return getattr(transformers, name)(config)

    return build


def _image_text(name: str, **vision: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        sizes = {**SQUARE, **vision}
        config = getattr(transformers, f"{name}Config")(vision_config=sizes, text_config=text, num_labels=7)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


class WithHead(nn.Module):
    """A headless backbone with a linear head on its pooled output, as users put them together."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(24, 7)
        self.image_size = backbone.config.image_size

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(pixel_values=images).pooler_output)


def _dinov3() -> nn.Module:
    import transformers

    return WithHead(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**HUGGING_FACE, num_register_tokens=2)))


def _siglip_pool() -> nn.Module:
    import transformers

    return WithHead(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SQUARE)))


def _siglip2() -> nn.Module:
    from vitexplain.models.patch_input import PatchInput

    return PatchInput(_image_text("Siglip2", num_patches=16)())


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, num_layers=3, num_heads=3, hidden_dim=24, mlp_dim=32, num_classes=7)
    nn.init.normal_(model.heads.head.weight)
    return model


class _OwnBlock(nn.Module):
    """Pre-norm block on `nn.MultiheadAttention`, with LayerScale."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(24), nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=batch_first)
        self.scale = nn.Parameter(torch.ones(24))
        self.feed_forward = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.before(tokens)
        tokens = tokens + self.scale * self.attention(normal, normal, normal, need_weights=False)[0]
        return tokens + self.feed_forward(self.after(tokens))


class Own(nn.Module):
    """A model of no library: `nn.MultiheadAttention`, two registers behind CLS, mean over all tokens."""

    image_size = SIZE

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.stem = nn.Conv2d(3, 24, 8, 8)
        self.extra = nn.Parameter(torch.zeros(1, 3, 24))
        self.places = nn.Parameter(torch.zeros(1, 27, 24))
        self.layers = nn.Sequential(*[_OwnBlock(batch_first) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 7)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(images), -1, -1), tokens], dim=1) + self.places
        if self.batch_first:
            return self.head(self.norm(self.layers(tokens)).mean(1))
        return self.head(self.norm(self.layers(tokens.transpose(0, 1))).mean(0))


class PooledByAttention(Own):
    """The same trunk with an attention-pooling head on `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = _Pool()

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(images), -1, -1), tokens], dim=1) + self.places
        return self.head(self.pool(self.norm(self.layers(tokens))))


class _Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.zeros(1, 1, 24)), nn.Linear(24, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        heads = [each.unflatten(-1, (3, 8)).transpose(1, 2) for each in (query, self.key(tokens), tokens)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(1)


def _halves(count: int) -> Tensor:
    return torch.tensor([0.5, 0.5] + [0.0] * (count - 2))


def _uniform(count: int) -> Tensor:
    return torch.full((count,), 1 / count)


_square = functools.partial(Family, grid=(4, 4), size=(32, 32))

DISCOVERED: dict[str, Family] = {
    "hf_vit": Family(_hugging_face("ViTForImageClassification"), 1, first_token),
    "hf_vit_eager": Family(_hugging_face("ViTForImageClassification", attn_implementation="eager"), 1, first_token),
    "hf_deit": Family(_hugging_face("DeiTForImageClassification"), 2, first_token),
    "hf_deit_two_heads": Family(_hugging_face("DeiTForImageClassificationWithTeacher"), 2, _halves),
    "hf_beit": _square(
        _hugging_face("BeitForImageClassification", SQUARE, use_relative_position_bias=True), 1, mean_of_patches(1)
    ),
    "hf_dinov2": _square(_hugging_face("Dinov2ForImageClassification", SQUARE), 1, None),
    "hf_dinov2_registers": _square(
        _hugging_face("Dinov2WithRegistersForImageClassification", SQUARE, num_register_tokens=3), 4, None
    ),
    "hf_dinov3": Family(_dinov3, 3, first_token),
    "hf_clip": _square(_image_text("CLIP"), 1, mean_of_patches(1)),
    "hf_siglip": _square(_image_text("Siglip"), 0, _uniform),
    "siglip_pool": _square(_siglip_pool, 0, None),
    "siglip2": Family(_siglip2, 0, _uniform, (5, 3), (40, 24)),
    "torchvision": _square(_torchvision, 1, first_token),
    "own": Family(Own, 3, _uniform),
    "own_batch_second": Family(functools.partial(Own, batch_first=False), 3, _uniform),  # as in OpenAI's CLIP
    "own_attention_pool": Family(PooledByAttention, 3, None),
}
