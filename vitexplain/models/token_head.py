"""The classifier on single tokens: what the model's own final norm and linear head say of each of them.

Nothing is assumed from names. The modules outside the blocks are tried as norms and heads, and what is taken is what
turns the final tokens into the logits that the model gave; a head that cannot be put together so is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
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


@dataclass(frozen=True)
class Reading:
    """What a head takes of the final tokens: some of them, one by one, their mean, or pooled by attention.

    Attributes:
        taken: which tokens (B, n, D) of those (B, N, D), of which the first are the prefix, as many as is said.
        pool: pools them to (B, D); None for their mean.
    """

    taken: Callable[[Tensor, int], Tensor]
    pool: nn.Module | None = None

    def __call__(self, tokens: Tensor, prefix: int) -> Tensor:
        """Features (B, D) of tokens (B, N, D)."""
        return self._pooled(self.taken(tokens, prefix))

    def alone(self, tokens: Tensor) -> Tensor:
        """What it makes of each token (B, n, D) if it is all that there is: (B, n, D)."""
        if self.pool is None:
            return tokens
        return self._pooled(tokens.flatten(0, 1)[:, None]).reshape(*tokens.shape[:2], -1)

    def _pooled(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1) if self.pool is None else _applied(self.pool, tokens).flatten(1)


_first = Reading(lambda tokens, prefix: tokens[:, :1])
_second = Reading(lambda tokens, prefix: tokens[:, 1:2])
_mean_of_patches = Reading(lambda tokens, prefix: tokens[:, prefix:])
_mean_of_all = Reading(lambda tokens, prefix: tokens)


@dataclass(frozen=True, eq=False)
class Branch:
    """One linear head and what it takes: one reading, or several side by side.

    Attributes:
        head: from D features a reading to C classes: affine, or their similarities with C texts.
        readings: in the order in which it takes them.
    """

    head: nn.Module
    readings: tuple[Reading, ...]


Branches = tuple[Branch, ...]


@dataclass(frozen=True, eq=False)
class TokenHead:
    """The end of a model, behind its last block: norm, pooling, norm, and heads that are averaged.

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
        tokens, parts = _applied(self.before, tokens), []
        for each in self.branches:
            features = [_applied(self.after, reading.alone(tokens)) for reading in each.readings]
            parts.append(_applied(each.head, torch.cat(features, -1)))
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
    def below(self) -> tuple[nn.Module, ...]:
        """The norms and attention pools that there are."""
        pools = [reading.pool for each in self.branches for reading in each.readings]
        return tuple(each for each in (self.before, self.after, *pools) if each is not None)

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
        UnsupportedModelError: the head is no linear map of tokens, their mean or their attention pool, nor the
            similarity of such a map with texts (heads with hidden layers); or its weights are all zero, so that nothing
            tells what it reads.
    """
    adapter, tokens = capture.adapter, final_tokens(capture)
    known = _found.get(adapter)
    logits, prefix = capture.logits.to(tokens.dtype), capture.layouts[-1].prefix
    tolerance = _TOLERANCE.get(capture.logits.dtype, _LOOSE)
    if known is not None and _error(known.image_logits(tokens), logits) <= tolerance:
        return known
    outside = _outside(adapter)
    width, classes = tokens.shape[2], logits.shape[1]
    possible = [*outside, *_similarity_heads(adapter.model, outside, width)]
    heads = [each for each in possible if getattr(each, "out_features", None) == classes]
    pools = _pools(adapter, outside, tokens)  # which are looked for only where nothing else is the end
    for branches in (_branches(heads, width, prefix), _pooled_branches(heads, pools, width, prefix)):
        best, lowest = None, torch.inf
        for candidate in _candidates(outside, branches, width, prefix):
            error = _attempt(candidate, tokens, logits)
            if error < _MUCH_BETTER * lowest:  # among equals the one with fewer parts, which comes first
                best, lowest = candidate, error
        if lowest <= tolerance:
            break
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
        "last block's CLS token, mean token or attention pool, so a single patch has no class scores. Methods that "
        "need no such head: generic_attention, rollout, gradcam"
    )


def _outside(adapter: ModelAdapter) -> list[nn.Module]:
    """The modules outside the blocks, last first: what ends a model is usually defined last."""
    inside = {id(module) for each in adapter.blocks for module in each.block.modules()}
    return [module for module in reversed(list(adapter.model.modules())) if id(module) not in inside]


def _similarity_heads(model: nn.Module, outside: list[nn.Module], width: int) -> list[nn.Module]:
    """What could be the head of a model of images and texts."""
    return list(SimilarityHead.of(model, outside, width)) if isinstance(model, ImageTextModel) else []


def _pools(adapter: ModelAdapter, outside: list[nn.Module], tokens: Tensor) -> Iterator[nn.Module]:
    """The modules that make features (B, D) of tokens (B, N, D), such as attention pools, by trying them."""
    blocks = {id(each.block) for each in adapter.blocks}
    batch, _, width = tokens.shape
    for module in outside:
        inner = {id(each) for each in module.modules()}
        if len(inner) > 1 and not inner & blocks:
            try:
                found = _applied(module, tokens)
            except Exception:  # it is made for something else
                continue
            if isinstance(found, Tensor) and found.shape in ((batch, width), (batch, 1, width)):
                yield module


def _candidates(outside: list[nn.Module], branches: Iterable[Branches], width: int, prefix: int) -> Iterator[TokenHead]:
    """All ends that the modules could form, with few norms first."""
    norms: list[nn.Module | None] = [None, *(each for each in outside if _is_norm(each, width))]
    pairs = [(before, after) for before in norms for after in norms if before is None or before is not after]
    listed = list(branches)
    for before, after in sorted(pairs, key=lambda pair: (pair[1] is not None, pair[0] is not None)):
        for each in listed:
            yield TokenHead(before, after, each, prefix)


def _branches(heads: list[nn.Module], width: int, prefix: int) -> Iterator[Branches]:
    """Of single tokens and their means."""
    plain = _of_width(heads, width)
    for head in plain:
        yield from ((Branch(head, (reading,)),) for reading in (_first, _mean_of_patches, _mean_of_all))
    if prefix >= 2:
        for one in plain:
            yield from ((Branch(one, (_first,)), Branch(other, (_second,))) for other in plain if other is not one)
    for head in _of_width(heads, 2 * width):
        yield (Branch(head, (_first, _mean_of_patches)),)


def _pooled_branches(heads: list[nn.Module], pools: Iterable[nn.Module], width: int, prefix: int) -> Iterator[Branches]:
    """Of what a pool makes of all tokens, or of the patches."""
    for pool in pools:
        for reading in (_mean_of_patches, _mean_of_all) if prefix else (_mean_of_all,):
            for head in _of_width(heads, width):
                yield (Branch(head, (replace(reading, pool=pool),)),)


def _of_width(heads: list[nn.Module], width: int) -> list[nn.Module]:
    return [each for each in heads if getattr(each, "in_features", None) == width]


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
