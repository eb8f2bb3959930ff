"""The classifier on single tokens: what the model's own final norm and linear head say of each of them.

Nothing is assumed from names. The modules outside the blocks are tried as norms and heads, and what is taken is what
turns the final tokens into the logits that the model gave; a head that cannot be put together so is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .adapter import ModelAdapter
from .image_text import ImageTextModel, SimilarityHead

if TYPE_CHECKING:
    from ..capture import Capture

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOOSE = 0.05  # half precisions
_MUCH_BETTER = 0.5


def _first(tokens: Tensor, prefix: int) -> Tensor:
    return tokens[:, 0]


def _second(tokens: Tensor, prefix: int) -> Tensor:
    return tokens[:, 1]


def _mean_of_patches(tokens: Tensor, prefix: int) -> Tensor:
    return tokens[:, prefix:].mean(1)


def _mean_of_all(tokens: Tensor, prefix: int) -> Tensor:
    return tokens.mean(1)


Reading = Callable[[Tensor, int], Tensor]
"""What a head takes of the final tokens (B, N, D) after the first of them, the prefix: (B, D)."""


@dataclass(frozen=True, eq=False)
class Branch:
    """One linear head and what it takes: one reading, or several side by side.

    Attributes:
        head: from D features a reading to C classes: affine, or their similarities with C texts.
        readings: in the order in which it takes them.
    """

    head: nn.Module
    readings: tuple[Reading, ...]


@dataclass(frozen=True, eq=False)
class TokenHead:
    """The end of a model, behind its last block: norm, pooling, norm, and linear heads that are averaged.

    Attributes:
        before: norm of each token before pooling; None where there is none.
        after: norm of the pooled features; None where there is none.
        branches: the heads.
        prefix: number of prefix tokens.
    """

    before: nn.Module | None
    after: nn.Module | None
    branches: tuple[Branch, ...]
    prefix: int

    def token_logits(self, tokens: Tensor) -> Tensor:
        """The logits that the model would give if all that its heads read were one and the same token.

        Args:
            tokens: (B, N, D) as they leave the last block; any of them.

        Returns:
            (B, N, C), differentiable, in the precision of the tokens. A norm behind the pooling is applied to each
            token. Averaged heads are averaged; one that takes several readings gets the token as each of them.
        """
        features = _applied(self.after, _applied(self.before, tokens))
        parts = [_applied(each.head, torch.cat([features] * len(each.readings), -1)) for each in self.branches]
        return torch.stack(parts).mean(0)

    def image_logits(self, tokens: Tensor) -> Tensor:
        """The model's own logits (B, C), from its final tokens (B, N, D), prefix and all."""
        tokens = _applied(self.before, tokens)
        return _pooled_logits(tokens, self.after, self.branches, self.prefix)

    @property
    def decomposes(self) -> bool:
        """Whether the mean of the patches' logits is the image's: heads of mean-pooled patches, no norm behind."""
        return self.after is None and all(each.readings == (_mean_of_patches,) for each in self.branches)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """The norms that there are."""
        return tuple(each for each in (self.before, self.after) if each is not None)

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The linear heads."""
        return tuple(each.head for each in self.branches)


_found: WeakKeyDictionary[ModelAdapter, TokenHead] = WeakKeyDictionary()


def token_head(capture: Capture) -> TokenHead:
    """The head of the captured model, checked on the numbers of this very forward pass.

    Args:
        capture: after its forward pass, with the state ``out`` of the last block.

    Raises:
        UnsupportedModelError: the head is no linear map of tokens or of their mean, nor the similarity of such a map
            with texts (attention pools, heads with hidden layers), or its weights are all zero, so that nothing tells
            what it reads.
    """
    adapter, tokens = capture.adapter, final_tokens(capture)
    known = _found.get(adapter)
    logits, prefix = capture.logits.to(tokens.dtype), capture.layouts[-1].prefix
    tolerance = _TOLERANCE.get(capture.logits.dtype, _LOOSE)
    if known is not None and _error(known.image_logits(tokens), logits) <= tolerance:
        return known
    outside = _outside(adapter)
    best, lowest = None, torch.inf
    for candidate in _candidates(adapter.model, outside, tokens.shape[2], logits.shape[1], prefix):
        error = _attempt(candidate, tokens, logits)
        if error < _MUCH_BETTER * lowest:  # among equals the one with fewer parts, which comes first
            best, lowest = candidate, error
    if best is None or not lowest <= tolerance:
        raise _refusal(adapter)
    weights = [each for head in best.heads for each in head.parameters() if each.ndim > 1]  # none where quantised
    if weights and not any(each.any() for each in weights):
        raise UnsupportedModelError(
            f"the classifier of this {type(adapter.model).__name__} has weights of zero, so that it says the same of "
            "all tokens; train it first, or give it small random weights"
        )
    _found[adapter] = best
    return best


def final_tokens(capture: Capture) -> Tensor:
    """What the head reads (B, N, D): the output of the last block, float32 or wider.

    Raises:
        UnsupportedModelError: the last block puts out something else, such as the class token alone.
    """
    tokens = capture.blocks[-1].state("out")
    if tokens.shape[1] != capture.layouts[-1].count:
        raise _refusal(capture.adapter)
    return tokens


def _refusal(adapter: ModelAdapter) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"no final norm and linear head were found in this {type(adapter.model).__name__} that make its logits of the "
        "last block's CLS token or mean token, so a single patch has no class scores. Methods that need no such head: "
        "generic_attention, rollout, gradcam"
    )


def _outside(adapter: ModelAdapter) -> list[nn.Module]:
    """The modules outside the blocks, last first: what ends a model is usually defined last."""
    inside = {id(module) for each in adapter.blocks for module in each.block.modules()}
    return [module for module in reversed(list(adapter.model.modules())) if id(module) not in inside]


def _candidates(
    model: nn.Module, outside: list[nn.Module], width: int, classes: int, prefix: int
) -> Iterator[TokenHead]:
    """All ends that the modules could form, with few norms first."""
    norms: list[nn.Module | None] = [None, *(each for each in outside if _is_norm(each, width))]
    pairs = [(before, after) for before in norms for after in norms if before is None or before is not after]
    texts = SimilarityHead.of(model, outside, width) if isinstance(model, ImageTextModel) else ()
    branches = list(_branches([*outside, *texts], width, classes, prefix))
    for before, after in sorted(pairs, key=lambda pair: (pair[1] is not None, pair[0] is not None)):
        for each in branches:
            yield TokenHead(before, after, each, prefix)


def _branches(outside: list[nn.Module], width: int, classes: int, prefix: int) -> Iterator[tuple[Branch, ...]]:
    heads: list[Any] = [each for each in outside if getattr(each, "out_features", None) == classes]
    plain = [each for each in heads if getattr(each, "in_features", None) == width]
    for head in plain:
        yield from ((Branch(head, (reading,)),) for reading in (_first, _mean_of_patches, _mean_of_all))
    if prefix >= 2:
        for one in plain:
            yield from ((Branch(one, (_first,)), Branch(other, (_second,))) for other in plain if other is not one)
    for head in heads:
        if getattr(head, "in_features", None) == 2 * width:
            yield (Branch(head, (_first, _mean_of_patches)),)


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module has what a norm of features has: a scale and a shift, or nothing."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return tuple(module.normalized_shape) == (width,)
    parameters = list(module.parameters(recurse=False))
    leaf = next(module.children(), None) is None and next(module.buffers(), None) is None
    return leaf and bool(parameters) and all(each.shape == (width,) for each in parameters)


def _attempt(candidate: TokenHead, tokens: Tensor, logits: Tensor) -> float:
    try:
        return _error(candidate.image_logits(tokens), logits)
    except (RuntimeError, TypeError, ValueError):  # a module that has a norm's parameters and is none
        return torch.inf


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    if found.shape != expected.shape:
        return torch.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))


def _pooled_logits(tokens: Tensor, after: nn.Module | None, branches: tuple[Branch, ...], prefix: int) -> Tensor:
    parts = []
    for each in branches:
        pooled = [_applied(after, reading(tokens, prefix)) for reading in each.readings]
        parts.append(_applied(each.head, torch.cat(pooled, -1)))
    return torch.stack(parts).mean(0)


def _applied(module: nn.Module | None, features: Tensor) -> Tensor:
    """What a module makes of features, in their precision: weights in half precision are widened."""
    if module is None:
        return features
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wide = {
        name: each.to(features.dtype)
        for name, each in tensors.items()
        if each.is_floating_point() and each.dtype != features.dtype
    }
    result: Tensor = torch.func.functional_call(module, wide, (features,)) if wide else module(features)
    return result
