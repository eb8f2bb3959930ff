"""Layer-wise relevance propagation again: layer by layer, one image, every contribution written out, in float64.

One walk down timm's plain pre-norm transformers serves all sets of rules; a set says how each layer shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-9


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, stabilised, and 0 where b is."""
    return torch.where(b == 0, 0.0, a / (b + EPSILON))


def contributions(layer: nn.Linear, state: Tensor) -> Tensor:
    """x_i w_ji (N, E, D)."""
    return state[:, None, :] * layer.weight.detach()


class Normalised:
    """The rules of transformer attribution."""

    alpha = 1.0

    def linear(self, layer: nn.Linear, state: Tensor, relevance: Tensor) -> Tensor:
        parts = contributions(layer, state)
        positive = quotient(relevance, parts.clamp(min=0).sum(2))[:, :, None] * parts.clamp(min=0)
        negative = quotient(relevance, parts.clamp(max=0).sum(2))[:, :, None] * parts.clamp(max=0)
        return (self.alpha * positive - (self.alpha - 1) * negative).sum(1)

    def add(self, left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        relevance = quotient(relevance, left + right) * (left + right)
        parts = [each * quotient(relevance, left + right) for each in (left, right)]
        size = sum(part.sum().abs() for part in parts)
        first, second = (part / part.sum() * part.sum().abs() / size * relevance.sum() for part in parts)
        return first, second

    def norm(self, layer: nn.Module, state: Tensor, relevance: Tensor) -> Tensor:
        return relevance

    def activation(self, state: Tensor, relevance: Tensor) -> Tensor:
        return relevance

    def softmax(self, scores: Tensor, weights: Tensor, relevance: Tensor) -> Tensor:
        return relevance

    def scale(self, layer: nn.Module, state: Tensor, relevance: Tensor) -> Tensor:
        return relevance

    def product(self, equation: str, left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Half to each factor; every product of two entries on its own."""
        inputs, result = equation.split("->")
        first, second = inputs.split(",")
        everything = "".join(sorted(set(first + second)))
        unit = quotient(relevance, torch.einsum(equation, left, right)) / 2
        parts = torch.einsum(f"{first},{second},{result}->{everything}", left, right, unit)
        return torch.einsum(f"{everything}->{first}", parts), torch.einsum(f"{everything}->{second}", parts)

    def pool(self, tokens: Tensor, relevance: Tensor) -> Tensor:
        """The mean over tokens (N, D)."""
        return tokens * quotient(relevance, tokens.mean(0)) / len(tokens)

    def pixels(self, layer: nn.Conv2d, image: Tensor, relevance: Tensor) -> Tensor:
        """(C, H, W) from patches (P, D), patch by patch."""
        weight, size = layer.weight.detach().flatten(1), layer.kernel_size[0]
        patches = F.unfold(image[None], size, stride=size)[0].T  # (P, C·size²)
        low, high = image.min(), image.max()
        numerator = (
            patches[:, None] * weight - low * weight.clamp(min=0) - high * weight.clamp(max=0)
        )  # (P, D, C·size²)
        shared = (numerator * quotient(relevance, numerator.sum(2))[:, :, None]).sum(1)
        return F.fold(shared.T[None], image.shape[1:], size, stride=size)[0]


class Baseline(Normalised):
    """The rules of the LRP baselines."""

    def linear(self, layer: nn.Linear, state: Tensor, relevance: Tensor) -> Tensor:
        parts, result = contributions(layer, state), torch.zeros_like(state)
        for half in (state > 0, state < 0):
            own = torch.where(half[:, None, :], parts, 0.0).clamp(min=0)
            result += (own * quotient(relevance, own.sum(2))[:, :, None]).sum(1)
        return result

    def add(self, left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        relevance = quotient(relevance, left + right) * (left + right)
        return left * quotient(relevance, left + right), right * quotient(relevance, left + right)


@dataclass
class AttnLRPReference(Normalised):
    """The rules of AttnLRP, on relevance itself."""

    split: bool = True
    epsilon: float = 1e-8
    gamma: float = 0.0
    conv_gamma: float = 0.0

    def linear(self, layer: Any, state: Tensor, relevance: Tensor) -> Tensor:
        return self._linear(layer.weight.detach(), layer.bias, self.gamma, state, relevance)

    def _linear(self, weight: Tensor, bias: Tensor | None, gamma: float, state: Tensor, relevance: Tensor) -> Tensor:
        parts = state[:, None, :] * weight
        offset = torch.zeros(len(weight), dtype=state.dtype) if bias is None else bias.detach()
        total = parts.sum(2) + offset
        result = torch.zeros_like(state)
        for sign in (1.0, -1.0):
            boosted = parts + gamma * torch.where(sign * parts > 0, parts, 0.0)
            denominator = boosted.sum(2) + offset + gamma * torch.where(sign * offset > 0, offset, 0.0)
            unit = torch.where(sign * total > 0, relevance / (denominator + sign * self.epsilon), 0.0)
            result += (boosted * unit[:, :, None]).sum(1)
        return result

    def add(self, left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        return left * relevance / (left + right), right * relevance / (left + right)

    def norm(self, layer: nn.Module, state: Tensor, relevance: Tensor) -> Tensor:
        if not isinstance(layer, nn.LayerNorm):
            return relevance
        width = state.shape[-1]
        deviation = (state.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt()
        centring = torch.eye(width, dtype=state.dtype) - 1 / width
        matrix = (layer.weight.detach()[:, None] * centring) / deviation[..., None]  # (…, E, D)
        return (state[..., None, :] * matrix * (relevance / layer(state))[..., None]).sum(-2)

    def softmax(self, scores: Tensor, weights: Tensor, relevance: Tensor) -> Tensor:
        return scores * (relevance - weights * relevance.sum(-1, keepdim=True))

    def product(self, equation: str, left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        first, second = super().product(equation, left, right, relevance)
        return (first, second) if self.split else (0 * first, 2 * second)

    def pixels(self, layer: nn.Conv2d, image: Tensor, relevance: Tensor) -> Tensor:
        size = layer.kernel_size[0]
        patches = F.unfold(image[None], size, stride=size)[0].T
        shared = self._linear(layer.weight.detach().flatten(1), layer.bias, self.conv_gamma, patches, relevance)
        return F.fold(shared.T[None], image.shape[1:], size, stride=size)[0]


@dataclass
class Walk:
    """What one pass of relevance leaves.

    Attributes:
        attention: relevance (H, N, N) of each block's attention.
        tokens: relevance (N, D) of the tokens that enter the first block.
        pixels: relevance (C, H, W).
    """

    attention: list[Tensor]
    tokens: Tensor
    pixels: Tensor


def walk(model: Any, image: Tensor, target: int, rules: Normalised) -> Walk:
    """Relevance of one image (C, H, W) from the logit of a class down."""
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            kept[module] = (arguments[0][0].detach(), output[0].detach())

    handles = [module.register_forward_hook(keep) for module in model.modules()]
    for block in model.blocks:
        block.attn.fused_attn = False
    logits = model(image[None])[0].detach()
    for handle in handles:
        handle.remove()
    relevance = _head(model, kept, _start(logits, target, rules), rules)
    attentions = []
    for block in reversed(model.blocks):
        relevance, attention = _block(block, kept, relevance, rules)
        attentions.append(attention)
    entering = kept[model.blocks[0]][0]
    before = _before_positions(model, kept[model.patch_embed][1].flatten(0, -2))
    own, _ = rules.add(before, entering - before, relevance)
    pixels = rules.pixels(model.patch_embed.proj, image, own[model.num_prefix_tokens :])
    return Walk(attentions[::-1], relevance, pixels)


def _before_positions(model: Any, patches: Tensor) -> Tensor:
    """Tokens (N, D) before position embeddings are added."""
    prefix = [getattr(model, f"{name}_token", None) for name in ("cls", "dist", "reg")]
    return torch.cat([*(each[0].detach() for each in prefix if each is not None), patches])


def _start(logits: Tensor, target: int, rules: Normalised) -> Tensor:
    """What a relevance pass begins with: R, 1 at the class; for rules that conserve it, the logit."""
    start = torch.zeros_like(logits)
    start[target] = logits[target] if isinstance(rules, AttnLRPReference) else 1.0
    return start


def _head(model: Any, kept: dict[nn.Module, tuple[Tensor, Tensor]], relevance: Tensor, rules: Normalised) -> Tensor:
    tokens, normed = kept[model.norm]
    result = torch.zeros_like(normed)
    if hasattr(model, "head_dist"):
        outputs = [kept[head][1][None] / 2 for head in (model.head, model.head_dist)]
        for index, (head, part) in enumerate(
            zip((model.head, model.head_dist), rules.add(*outputs, relevance[None]), strict=True)
        ):
            result[index] = rules.linear(head, kept[head][0][None], part)[0]
        return rules.norm(model.norm, tokens, result)
    state, _ = kept[model.head]
    read = rules.linear(model.head, state[None], relevance[None])[0]
    if isinstance(model.fc_norm, nn.LayerNorm):
        read = rules.norm(model.fc_norm, kept[model.fc_norm][0][None], read[None])[0]
    if model.global_pool == "token":
        result[0] = read
    else:
        result[model.num_prefix_tokens :] = rules.pool(normed[model.num_prefix_tokens :], read)
    return rules.norm(model.norm, tokens, result)


def _block(
    block: Any, kept: dict[nn.Module, tuple[Tensor, Tensor]], relevance: Tensor, rules: Normalised
) -> tuple[Tensor, Tensor]:
    """Relevance of the tokens entering a block, and of its attention."""
    state, middle = kept[block][0], kept[block.norm2][0]
    stays, branch = rules.add(middle, kept[block.ls2][1], relevance)
    branch = rules.linear(block.mlp.fc2, kept[block.mlp.fc2][0], branch)
    branch = rules.linear(block.mlp.fc1, kept[block.mlp.fc1][0], branch)
    relevance = stays + rules.norm(block.norm2, middle, branch)

    stays, branch = rules.add(state, kept[block.ls1][1], relevance)
    attn, heads = block.attn, block.attn.num_heads
    by_heads = rules.linear(attn.proj, kept[attn.proj][0], branch).unflatten(1, (heads, -1)).transpose(0, 1)
    qkv = kept[attn.qkv][1].unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    q, k = attn.q_norm(qkv[0]).detach(), attn.k_norm(qkv[1]).detach()
    scores = attn.scale * q @ k.mT
    weights = scores.softmax(-1)
    of_attention, of_v = rules.product("hij,hjd->hid", weights, qkv[2], by_heads)
    of_q, of_k = rules.product("hid,hjd->hij", q, k, rules.softmax(scores, weights, of_attention))
    of_q, of_k = rules.norm(attn.q_norm, qkv[0], of_q), rules.norm(attn.k_norm, qkv[1], of_k)
    of_qkv = torch.stack([of_q, of_k, of_v]).permute(2, 0, 1, 3).flatten(1)
    branch = rules.linear(attn.qkv, kept[attn.qkv][0], of_qkv)
    return stays + rules.norm(block.norm1, state, branch), of_attention
