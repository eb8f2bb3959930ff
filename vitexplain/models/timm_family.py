"""Adapter for timm's plain transformers: the families whose tokens stay one sequence from patch embedding to head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..combination import Combination, Differential, SideBySide
from ..errors import UnsupportedModelError
from .adapter import BlockModules, linear_weight
from .known import KnownAdapter, cut_size, patch_grid
from .reading import WITHOUT_SEED


def is_timm_transformer(model: nn.Module) -> bool:
    """Whether the model is of a timm class that `TimmAdapter` knows: ViT, EVA, BEiT, RelPos ViT, NaFlexViT."""
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVit
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return isinstance(model, VisionTransformer | Eva | Beit | VisionTransformerRelPos | NaFlexVit)


_BEHIND_POOLING = ("fc_norm", "head_drop", "head", "head_dist")

_NORMED_KEYS = frozenset({"Attention", "AttentionRope", "EvaAttention"})
"""Attention modules that norm their keys, if only by an identity, right before they attend."""


def _pre_norm(block: Any) -> BlockModules:
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""
    branch = getattr(block, "ls2", None)
    return BlockModules(
        block,
        block.attn,
        attention_input=block.norm1,
        mid=block.norm2,
        mlp=branch,
        combination=_calls_of(block.attn),
        straight=branch is not None and _of_timm(block),
        between=_around_attention(block.attn),
    )


def _of_timm(module: nn.Module) -> bool:
    """Whether a module is of timm's own class, and not of one derived from it."""
    return type(module).__module__.startswith("timm.")


def _calls_of(attention: Any) -> Combination:
    """How the calls of an attention module make one attention: differential attention makes two."""
    if not hasattr(attention, "_compute_lambda"):
        return Combination()
    return Differential(partial(_lambda, attention))


def _lambda(attention: Any) -> float:
    return float(attention._compute_lambda().item())


def _around_attention(attention: Any) -> tuple[nn.Module, nn.Module] | None:
    """The norm of keys, and that of the output or the projection: timm's own attention is computed between them."""
    known = _of_timm(attention) and type(attention).__name__ in _NORMED_KEYS and hasattr(attention, "k_norm")
    return (attention.k_norm, getattr(attention, "norm", None) or attention.proj) if known else None


def _post_norm(block: Any) -> BlockModules:
    """x + norm1(attn(x)), then x + norm2(mlp(x))."""
    return BlockModules(block, block.attn, mid=block.mlp, mlp=block.norm2, combination=_calls_of(block.attn))


def _parallel(block: Any) -> BlockModules:
    """x + ls(attention and feed-forward of in_norm(x)), computed by the block itself."""
    return BlockModules(block, block, attention_input=block.in_norm)


def _differential(block: Any) -> BlockModules:
    """As `_parallel`, with differential attention."""
    return BlockModules(block, block, attention_input=block.in_norm, combination=_calls_of(block))


def _several(block: Any) -> BlockModules:
    """x + Σ attentions(x), then x + Σ feed-forwards(x)."""
    return BlockModules(block, block, mid=block.ffns[0], combination=SideBySide())


def _block_kinds() -> dict[type, Callable[[Any], BlockModules]]:
    from timm.models import beit, eva, vision_transformer, vision_transformer_relpos

    return {
        vision_transformer.Block: _pre_norm,
        vision_transformer.ResPostBlock: _post_norm,
        vision_transformer.ParallelScalingBlock: _parallel,
        vision_transformer.DiffParallelScalingBlock: _differential,
        vision_transformer.ParallelThingsBlock: _several,
        vision_transformer_relpos.RelPosBlock: _pre_norm,
        vision_transformer_relpos.ResPostRelPosBlock: _post_norm,
        beit.Block: _pre_norm,
        eva.EvaBlock: _pre_norm,
        eva.EvaBlockPostNorm: _post_norm,
    }


class TimmAdapter(KnownAdapter):
    """timm `VisionTransformer`, `Eva`, `Beit`, `VisionTransformerRelPos`, `NaFlexVit`; fused attention stays on.

    Raises:
        UnsupportedModelError: a block is of a kind that timm does not have, or is there twice; or somebody changed the
            order in which tokens come or blocks run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._vit: Any = cast("Any", model)  # timm's attributes are not declared on nn.Module
        self._embed: Any = getattr(model, "patch_embed", None) or self._vit.embeds
        kinds = _block_kinds()
        modules = []
        for index, block in enumerate(self._vit.blocks):
            describe = next((kinds[kind] for kind in type(block).__mro__ if kind in kinds), None)
            if describe is None:
                if hasattr(block, "_orig_mod"):
                    raise UnsupportedModelError(
                        f"block {index} was replaced by what torch.compile made of it, in which nothing can be "
                        "watched; expected the block itself: compile it in its place (model.blocks[i].compile()), "
                        "compile the whole model, or put it back (model.blocks[i] = model.blocks[i]._orig_mod)"
                    )
                raise UnsupportedModelError(
                    f"block {index} is a {type(block).__module__}.{type(block).__name__}; expected one of timm's: "
                    f"{', '.join(kind.__name__ for kind in kinds)}. Write a ModelAdapter for it and pass that "
                    "as the model"
                )
            modules.append(describe(block))
        self.blocks = tuple(modules)
        self.num_prefix_tokens = int(self._vit.num_prefix_tokens)
        pool = getattr(model, "attn_pool", None)
        if pool is not None and hasattr(pool, "latent"):
            self.pool = BlockModules(pool, pool)
        self._settle(self._embed, (getattr(model, name, None) for name in _BEHIND_POOLING))

    @property
    def num_channels(self) -> int:
        """Channels that the patch embedding takes."""
        for module in self._embed.modules():
            if isinstance(module, nn.Conv2d):
                return int(module.in_channels)
        return int(getattr(self._embed, "in_chans", 3))

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w); any size for models with dynamic sizes, else the one size they take."""
        return patch_grid(self._embed, image_size, dynamic=getattr(self._vit, "dynamic_img_size", False))

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels (height, width) of a patch; of a hybrid's, in the feature map that it is cut from."""
        return cut_size(self._embed)

    def class_seed(self, num_tokens: int) -> Tensor:
        """CLS; half CLS, half DIST; or uniform over the mean-pooled tokens, as the head reads them."""
        weights = torch.zeros(num_tokens, device="cpu", dtype=torch.float32)
        pool = "map" if getattr(self._vit, "attn_pool", None) is not None else self._vit.global_pool
        if hasattr(self._vit, "head_dist"):
            weights[:2] = 0.5
        elif pool == "token":
            weights[0] = 1.0
        elif pool == "avg":
            first = 0 if getattr(self._vit, "pool_include_prefix", False) else self.num_prefix_tokens
            weights[first:] = 1.0 / (num_tokens - first)
        else:
            raise UnsupportedModelError(
                f"the head pools tokens by {pool!r}; expected 'token', 'avg' or an attention pool with latents, where "
                f"the seed row of a rollout is known. {WITHOUT_SEED}"
            )
        return weights

    def output_weight(self, block: int) -> Tensor:
        """The output projection by heads, LayerScale folded in."""
        module: Any = self.blocks[block].block
        attention: Any = getattr(module, "attn", None)
        linear = attention is not None and self.blocks[block].attention_input is not None
        if linear and getattr(attention, "norm", None) is not None:
            linear = isinstance(attention.norm, nn.Identity)
        normed = isinstance(self.blocks[block].combination, Differential)  # each head by itself, before the projection
        if not linear or normed or getattr(attention, "gate", None) is not None:
            raise UnsupportedModelError(
                f"block {block} ({type(module).__name__}) normalises, gates or shares its heads' output, so that a "
                "token's transformed vector is not linear in its value; use tokentm with transformation='residual', or "
                "generic_attention"
            )
        heads = attention.num_heads * getattr(attention, "head_dim", self._vit.embed_dim // attention.num_heads)
        weight = _weight(attention.proj, heads)  # (D, H·dh)
        scale = getattr(getattr(module, "ls1", None), "gamma", getattr(module, "gamma_1", None))
        if scale is not None:
            weight = scale.detach()[:, None] * weight
        return weight.T.reshape(attention.num_heads, -1, len(weight))

    def value_weight(self, block: int) -> Tensor:
        """The value third of the input projection, by heads."""
        attention: Any = getattr(self.blocks[block].block, "attn", None)
        if attention is None:
            raise UnsupportedModelError(f"block {block} has no attention module with a value projection of its own")
        if getattr(attention, "qkv", None) is not None:
            weight = _weight(attention.qkv, self._vit.embed_dim)  # (3·H·dh, D)
            weight = weight[-len(weight) // 3 :]
        else:
            weight = _weight(attention.v_proj, self._vit.embed_dim)
        own = int(getattr(attention, "num_kv_heads", attention.num_heads))  # fewer where heads share values
        by_head = weight.reshape(own, -1, weight.shape[1]).transpose(1, 2)
        return by_head.repeat_interleave(attention.num_heads // own, dim=0)


def _weight(module: Any, width: int) -> Tensor:
    """The matrix of a linear module of so many input features, unless it says of how many itself."""
    return linear_weight(module, getattr(module, "in_features", width))
