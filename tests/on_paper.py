"""A model and an image on which attention, gradients and relevance can be written down by hand."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

FEATURES = torch.tensor([[0.4, 1.0], [-0.7, 2.0], [1.2, -0.5]])
"""Three patches, two features each; the model below is small enough for pen and paper."""


def make_paper_model() -> nn.Module:
    """One block, one head, no norms, no MLP: q = (1, 0), k = v = x, CLS = 0, logits = what CLS gathered.

    CLS then attends with A_j ∝ exp(x_j0 / √2), y_c = Σ_j A_j x_jc, and dy_c/dA_j = x_jc.
    """
    model = VisionTransformer(
        img_size=(1, 3), patch_size=1, embed_dim=2, depth=1, num_heads=1, num_classes=2, norm_layer=nn.Identity
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        block, identity = model.blocks[0], torch.eye(2)
        model.patch_embed.proj.weight[:, :2, 0, 0] = identity
        block.attn.qkv.bias[0] = 1.0
        block.attn.qkv.weight[2:4] = identity
        block.attn.qkv.weight[4:6] = identity
        block.attn.proj.weight.copy_(identity)
        model.head.weight.copy_(identity)
    return model
