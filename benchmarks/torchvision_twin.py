"""timm Vision Transformers as torchvision's class, with the same weights: the one that torch-cam and lxt take."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_NAMES = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "norm": "encoder.ln",
    "head": "heads.head",
}
_BLOCK_NAMES = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv": "self_attention.in_proj",
    "attn.proj": "self_attention.out_proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


def torchvision_twin(model: nn.Module) -> nn.Module:
    """The same model as torchvision's `VisionTransformer`, in evaluation mode."""
    vision_transformer = importlib.import_module("torchvision.models.vision_transformer")
    timm: Any = model
    attention, mlp = timm.blocks[0].attn, timm.blocks[0].mlp
    twin: nn.Module = vision_transformer.VisionTransformer(
        image_size=timm.patch_embed.img_size[0],
        patch_size=timm.patch_embed.patch_size[0],
        num_layers=len(timm.blocks),
        num_heads=attention.num_heads,
        hidden_dim=timm.embed_dim,
        mlp_dim=mlp.fc1.out_features,
        num_classes=timm.num_classes,
    )
    twin.load_state_dict(dict(_renamed(timm.state_dict())))
    return twin.eval()


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        place, _, kind = name.rpartition(".")
        if name in _NAMES:
            yield _NAMES[name], tensor
        elif place in _NAMES:
            yield f"{_NAMES[place]}.{kind}", tensor
        else:
            _, index, module = place.split(".", 2)
            joint = "_" if module == "attn.qkv" else "."
            yield f"encoder.layers.encoder_layer_{index}.{_BLOCK_NAMES[module]}{joint}{kind}", tensor
