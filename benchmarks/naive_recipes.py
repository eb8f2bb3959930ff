"""Rollout and its gradient relatives as they are usually written, to be compared with: one image at a time.

Attention is materialised and kept in all blocks, autograd gives its gradient, N×N matrices are multiplied. Weights are
frozen, to the advantage of these recipes. For timm Vision Transformers with one prefix token, CLS, that the head reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .measuring import graph_from_first_block, kept_attention

Recipe = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Maps a model, images (B, 3, H, W) and one class an image (B,) to scores (B, P)."""


def rollout(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema, 2020): the CLS row of the product of rownorm(mean of heads + I)."""

    def explain(image: Tensor, _: int) -> Tensor:
        with torch.no_grad():
            kept, _logits = kept_attention(model, image)
            return _product([each[0].mean(0) for each in kept])

    return _one_by_one(explain, images, classes)


def gradient_rollout(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The same with the positive part of mean(A ∘ dy/dA), 90 % of whose entries are discarded (vit-explain, 2020)."""

    def explain(image: Tensor, target: int) -> Tensor:
        fused = []
        for attention, gradient in _attention_and_gradient(model, image, target):
            matrix = (attention * gradient).mean(0).clamp(min=0)
            lowest = matrix.flatten().topk(int(0.9 * matrix.numel()), largest=False).indices
            matrix.view(-1)[lowest] = 0
            fused.append(matrix)
        return _product(fused)

    return _one_by_one(explain, images, classes)


def generic_attention(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Generic attention (Chefer et al., ICCV 2021, eq. 5-6): R ← R + mean((A ∘ dy/dA)⁺) R, of which the CLS row."""

    def explain(image: Tensor, target: int) -> Tensor:
        pairs = _attention_and_gradient(model, image, target)
        relevance = torch.eye(pairs[0][0].shape[-1])
        for attention, gradient in pairs:
            relevance = relevance + (attention * gradient).clamp(min=0).mean(0) @ relevance
        return relevance[0, 1:]

    return _one_by_one(explain, images, classes)


RECIPES: dict[str, Recipe] = {
    "rollout": rollout,
    "gradient_rollout": gradient_rollout,
    "generic_attention": generic_attention,
}
"""Recipes by the registry's name of the method that they are."""


def _one_by_one(explain: Callable[[Tensor, int], Tensor], images: Tensor, classes: Tensor) -> Tensor:
    pairs = zip(torch.split(images, 1), classes.tolist(), strict=True)
    return torch.stack([explain(image, target).detach() for image, target in pairs])


def _product(fused: list[Tensor]) -> Tensor:
    """CLS row (P,) of the product of rownorm(F + I) over blocks, F (N, N)."""
    result = torch.eye(len(fused[0]))
    for matrix in fused:
        factor = matrix + torch.eye(len(matrix))
        result = (factor / factor.sum(1, keepdim=True)) @ result
    return result[0, 1:]


def _attention_and_gradient(model: nn.Module, image: Tensor, target: int) -> list[tuple[Tensor, Tensor]]:
    """A and dy/dA of every block, each (H, N, N), by autograd."""
    with graph_from_first_block(model):
        kept, logits = kept_attention(model, image)
        gradients = torch.autograd.grad(logits[0, target], kept)
    return [(attention.detach()[0], gradient[0]) for attention, gradient in zip(kept, gradients, strict=True)]
