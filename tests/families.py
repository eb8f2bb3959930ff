"""Tiny models of every supported family: never all square, never all CLS-only, weights far from symmetric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
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
        pooling: the weight (N,) with which its head reads each token, written down by hand; None where it depends
            on the image.
    """

    build: Callable[[], nn.Module]
    prefix: int
    pooling: Callable[[int], Tensor] | None
    grid: tuple[int, int] = (4, 6)
    size: tuple[int, int] = SIZE


def first_token(count: int) -> Tensor:
    return torch.eye(count)[0]


def mean_of_patches(prefix: int) -> Callable[[int], Tensor]:
    return lambda count: torch.tensor([0.0] * prefix + [1 / (count - prefix)] * (count - prefix))


def _small(kind: type[nn.Module], **options: object) -> Callable[[], nn.Module]:
    return lambda: kind(**{"img_size": SIZE, **DIMENSIONS, **options})


def _vit(**options: object) -> Callable[[], nn.Module]:
    return _small(VisionTransformer, **options)


def _eva(**options: object) -> Callable[[], nn.Module]:
    return _small(Eva, **options)


def _naflex() -> nn.Module:
    return NaFlexVit(
        NaFlexVitCfg(patch_size=8, embed_dim=24, depth=3, num_heads=3, reg_tokens=2, global_pool="avg"), num_classes=7
    )


TIMM: dict[str, Family] = {
    "cls": Family(_vit(), 1, first_token),
    "registers": Family(_vit(reg_tokens=4, init_values=0.3), 5, first_token),
    "mean_pooled": Family(
        _vit(global_pool="avg", class_token=False, reg_tokens=2, fc_norm=False), 2, mean_of_patches(2)
    ),
    "mean_pooled_with_cls": Family(_vit(global_pool="avg", qk_norm=True, qkv_bias=False), 1, mean_of_patches(1)),
    "distilled": Family(
        lambda: VisionTransformerDistilled(img_size=SIZE, **DIMENSIONS),
        2,
        lambda count: torch.tensor([0.5, 0.5] + [0.0] * (count - 2)),
    ),
    "dynamic": Family(
        _vit(dynamic_img_size=True, drop_path_rate=0.2, attn_drop_rate=0.2), 1, first_token, (5, 3), (40, 24)
    ),
    "attention_pool": Family(_vit(global_pool="map", class_token=False, reg_tokens=1), 1, None),
    "post_norm": Family(_vit(block_fn=ResPostBlock, init_values=1e-5), 1, first_token),
    "parallel": Family(
        _vit(block_fn=ParallelScalingBlock, class_token=False, global_pool="avg"), 0, mean_of_patches(0)
    ),
    "differential": Family(_vit(block_fn=DiffParallelScalingBlock), 1, first_token),
    "several_attentions": Family(_vit(block_fn=ParallelThingsBlock), 1, first_token),
    "eva": Family(_eva(), 1, mean_of_patches(1)),
    "eva_rope": Family(
        _eva(num_reg_tokens=3, global_pool="token", use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True),
        4,
        first_token,
    ),
    "eva_rope_mixed": Family(
        _eva(use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", use_abs_pos_emb=False, init_values=0.4),
        1,
        mean_of_patches(1),
    ),
    "beit": Family(_small(Beit, init_values=0.4, use_abs_pos_emb=False, use_rel_pos_bias=True), 1, mean_of_patches(1)),
    "beit_shared_bias": Family(
        _small(Beit, global_pool="token", use_shared_rel_pos_bias=True, init_values=None), 1, first_token
    ),
    "relative_positions": Family(_small(VisionTransformerRelPos, class_token=False), 0, mean_of_patches(0)),
    "naflex": Family(_naflex, 2, mean_of_patches(2), (5, 3), (40, 24)),
}

FEW_FAMILIES = ("cls", "mean_pooled", "attention_pool", "parallel", "eva_rope", "hf_vit_eager", "own", "torchvision")
"""One of each kind, for tests of what hardly depends on the family."""

EXACT_STATES = ("cls", "registers", "mean_pooled", "mean_pooled_with_cls", "distilled", "dynamic")
"""Families of timm's plain pre-norm block, on which methods are compared with the slow references."""

NOT_DEFINED: dict[tuple[str, str], str] = {
    ("tokentm", "post_norm"): "heads pass a norm before they join the stream",
    ("tokentm", "parallel"): "attention and feed-forward leave the block as one sum",
    ("tokentm", "differential"): "attention and feed-forward leave the block as one sum",
    ("tokentm", "several_attentions"): "a token has several values in one block",
    ("transformer_attribution", "differential"): "one attention is subtracted from another, which has no relevance",
    ("partial_lrp", "differential"): "one attention is subtracted from another, which has no relevance",
    ("agcam", "differential"): "the difference of two softmaxes is none",
    ("attention_flow", "differential"): "negative weights are no capacities",
    ("attcat", "relative_positions"): "features times gradient cancel behind norms",
    ("hirescam", "several_attentions"): "features times gradient cancel before a norm",
    ("fullgrad_plus", "relative_positions"): "features times gradient cancel before a norm",
    **{
        ("beyond_intuition", family): "the outputs of heads are no linear map of values"
        for family in ("post_norm", "parallel", "differential", "several_attentions")
    },
    **{
        ("tis", family): "blocks do not treat tokens as a set"
        for family in (
            "beit",
            "beit_shared_bias",
            "eva_rope",
            "eva_rope_mixed",
            "hf_beit",
            "hf_dinov3",
            "relative_positions",
            "siglip2",
        )
    },
}
"""Methods that a family's mathematics does not allow, and why; they must raise `UnsupportedModelError`."""


def all_families() -> dict[str, Family]:
    """timm's families and those of `discovered`."""
    from discovered import DISCOVERED

    return {**TIMM, **DISCOVERED}


def make_model(family: str) -> nn.Module:
    """A model of a family with weights that make attention, gradients and class scores differ clearly."""
    torch.manual_seed(sum(map(ord, family)))
    return with_own_weights(all_families()[family].build())


def with_own_weights(model: nn.Module) -> nn.Module:
    """The model with such weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.4 if "qkv" in name else 0.25))
            elif name.endswith(("bias", "bias_table")):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_images(family: str, batch: int = 2, seed: int = 0) -> Tensor:
    """Normalised images (B, 3, H, W) of the size that the family's model takes."""
    return torch.randn(batch, 3, *all_families()[family].size, generator=torch.Generator().manual_seed(seed))
