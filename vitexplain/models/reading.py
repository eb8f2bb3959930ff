"""How a model's head reads the final tokens: measured, and never taken from a class.

A head without attention is measured: with all final tokens made equal, the gradient at each is proportional to the
weight with which the head reads it. One attention behind the last block is the seed row itself, where its keys are
found to be the final tokens. What is neither is refused, and so is a head that reads anything beside the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..borrowing import borrowed
from ..combination import Combination, WithoutFirstKeys
from ..errors import UnsupportedModelError
from ..randomness import DRAWN
from .adapter import BlockModules, ModelAdapter
from .probe import AttentionCall, Forward, watch
from .token_order import rows_moved

_DIRECTIONS = 3  # of the logits, to tell what these do not depend on from what half precision rounds to zero
_SCALES = (2.0**10, 1.0)  # of a gradient in half precision: the first that leaves it finite
_ALIKE, _ALIKE_IN_HALF = 1e-4, 1e-2  # of the largest logit
_STILL = 1e-4  # of what moves most: a mean over thousands of tokens still shows

WITHOUT_SEED = "Methods that need no seed row work: gradcam"


class UnmeasuredError(UnsupportedModelError):
    """How a head reads the tokens cannot be measured, which says nothing of how it does."""


@dataclass(frozen=True, eq=False)
class Reading:
    """How a head reads the final tokens, as it was found with images of one size.

    Attributes:
        prefix: number of prefix tokens.
        size: of the images (H, W).
        weights: (N,), sum 1: the weight of each token; None where that is no fixed one.
        pool: the attention whose own row says it; None for other heads.
        refusal: why there is no seed row; empty where there is.
    """

    prefix: int
    size: tuple[int, int]
    weights: Tensor | None = None
    pool: BlockModules | None = None
    refusal: str = ""

    def seed(self, num_tokens: int) -> Tensor:
        """The weights (N,); the patches' share spread evenly where there are more or fewer of them.

        Raises:
            UnsupportedModelError: there are none, or none for another number of patches.
        """
        if self.refusal:
            raise UnsupportedModelError(self.refusal)
        if self.weights is None:
            raise UnsupportedModelError("the head reads the tokens through attention; Capture.seed_row has its row")
        if num_tokens == len(self.weights):
            return self.weights
        prefix, patches = self.weights[: self.prefix], self.weights[self.prefix :]
        if not torch.allclose(patches, patches.mean(), rtol=1e-3, atol=0):
            raise UnsupportedModelError(
                f"the head weighs patches by their place, so its pooling of {num_tokens} tokens is not known; use "
                f"images of {self.size[0]}×{self.size[1]} pixels"
            )
        count = num_tokens - self.prefix
        return torch.cat([prefix, (patches.sum() / count).expand(count)])


def find_reading(adapter: ModelAdapter, seen: Forward, images: Tensor, *, carried: bool) -> Reading:
    """How the head reads the final tokens of a model whose blocks are known.

    Args:
        adapter: its blocks, grid and prefix tokens are known.
        seen: what was seen with these images.
        images: one image.
        carried: blocks hand all that is known of the image on to each other; where attention is a block of its own,
            beside what it is added to, nothing tells that from another block's output.

    Raises:
        UnsupportedModelError: the head does not read the last block, or picks tokens by their values.
    """
    size = (images.shape[-2], images.shape[-1])
    layout, last = adapter.layouts(adapter.grid(size))[-1], adapter.blocks[-1].block
    reading = Reading(layout.prefix, size)
    behind = [each for each in _behind(seen, last) if reads(adapter, each.parents[-1].module, images)]
    if behind:
        reading = _through_attention(reading, adapter, seen, images, behind)
    else:
        weights = measured_pooling(adapter, images)
        if len(weights) not in (layout.count, layout.prefix):
            refusal = f"the last block puts out {len(weights)} tokens, expected {layout.count}. {WITHOUT_SEED}"
            return replace(reading, refusal=refusal)
        # class attention puts out the prefix alone, and whoever reads more than that is refused below
        reading = replace(reading, weights=F.pad(weights, (0, layout.count - len(weights))))
    if reading.refusal or not carried or reads_alone(adapter, last, images):
        return reading
    return Reading(
        layout.prefix,
        size,
        refusal="with the last block's output held fixed, the logits still change with the image: the head reads other "
        f"blocks as well, or the image itself; expected one that reads the last block alone. {WITHOUT_SEED}",
    )


def reads(adapter: ModelAdapter, module: nn.Module, images: Tensor) -> bool:
    """Whether the logits depend on what a module puts out; some models compute a pool and go another way."""
    if module is adapter.model:
        return True
    before = _logits(adapter, images)
    with _replacing(module, lambda output: -output):
        return not torch.equal(before, _logits(adapter, images))


def reads_alone(adapter: ModelAdapter, module: nn.Module, images: Tensor) -> bool:
    """Whether all that the logits know of the image is what a module puts out: with that held, they stay the same."""
    if module is adapter.model:
        return True
    held: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        held.append(output.clone())
        return output

    with _replacing(module, keep):
        before = _logits(adapter, images)
    with _replacing(module, lambda _: held.pop(0)):
        after = _logits(adapter, 0.5 * images.flip(-1))
    tolerance = _ALIKE if before.dtype.itemsize > 2 else _ALIKE_IN_HALF
    return bool((after - before).abs().max() <= tolerance * before.abs().max())


def measured_pooling(adapter: ModelAdapter, images: Tensor) -> Tensor:
    """(N,), sum 1: the norms of the gradients at the tokens that leave the last block, all made equal.

    A head that picks tokens by their values (max pooling) has no such row and is refused; one that weighs them by
    a learned function of their content, without attention that can be seen, looks like a mean here.

    Raises:
        UnmeasuredError: the head does not read them, as far as gradients tell.
        UnsupportedModelError: it picks them by their values.
    """
    weights = _head_gradients(adapter, images, _all_equal).norm(dim=-1)
    weights = torch.where(weights < 1e-6 * weights.max(), 0.0, weights)
    unread = _head_gradients(adapter, images, lambda tokens: tokens, _DIRECTIONS) == 0
    partly = unread[weights > 0].any(0) & ~unread[weights > 0].all(0)
    if partly.any() or not unread[weights == 0].all() or _prefers_another(adapter, images, weights):
        raise UnsupportedModelError(
            f"the head picks tokens by their values (as max pooling does), so it has no seed row. {WITHOUT_SEED}"
        )
    if len(weights) > 2 and not weights[2:].any() and weights[:2].all():
        return torch.tensor([0.5, 0.5] + [0.0] * (len(weights) - 2))  # two heads, averaged
    return weights / weights.sum()


def _behind(seen: Forward, last: nn.Module) -> list[AttentionCall]:
    """The attention calls behind the last block."""
    start = max(call.start for call in seen.modules if call.module is last)
    return [
        each
        for each in seen.attentions
        if each.start > start and all(parent.module is not last for parent in each.parents)
    ]


def _through_attention(
    reading: Reading, adapter: ModelAdapter, seen: Forward, images: Tensor, behind: list[AttentionCall]
) -> Reading:
    """The attention that reads the final tokens; refused where several do, or one of another form."""
    if len(behind) > 1:
        refusal = (
            f"the head reads the tokens through {len(behind)} attentions, none of which says alone how much it reads "
            f"of each; expected one. {WITHOUT_SEED}"
        )
        return replace(reading, refusal=refusal)
    call = behind[0]
    module, keys = call.parents[-1].module, call.operands.num_keys
    tokens = adapter.layouts(adapter.grid(reading.size))[-1].count
    shift = keys - tokens
    pools = call.operands.num_tokens != tokens and (shift >= 0 or shift == -reading.prefix)
    if not pools or not _keys_are_tokens(adapter, seen, images, call, tokens):
        refusal = (
            f"the head reads the tokens through an attention of {call.operands.num_tokens} queries to {keys} keys; "
            f"expected queries whose last {tokens} keys are the final tokens (or {tokens - reading.prefix} of them, "
            f"without prefix), behind keys that know nothing of the image. {WITHOUT_SEED}"
        )
        return replace(reading, refusal=refusal)
    if not reads_alone(adapter, module, images):
        refusal = f"the head reads the tokens beside its attention pool too; expected through it alone. {WITHOUT_SEED}"
        return replace(reading, refusal=refusal)
    combination = WithoutFirstKeys(shift) if shift > 0 else Combination()
    return replace(reading, pool=BlockModules(module, module, combination=combination))


def _keys_are_tokens(adapter: ModelAdapter, seen: Forward, images: Tensor, call: AttentionCall, tokens: int) -> bool:
    """Whether the last keys of a pool are the final tokens in their order: where one changes, one value does."""
    token = tokens - 2 if tokens > 2 else tokens - 1

    def change(output: Tensor) -> Tensor:
        changed = output.clone()
        changed.flatten(0, -2)[token] *= -1  # a batch of one, so whatever the layout
        return changed

    with _replacing(adapter.blocks[-1].block, change):
        again = watch(adapter, images).attentions[seen.attentions.index(call)]
    moved = rows_moved(call.operands.v.flatten(0, 1), again.operands.v.flatten(0, 1))
    rows = (moved > _STILL * moved.max()).nonzero().flatten().tolist()
    return bool(rows == [token + call.operands.num_keys - tokens])


@contextmanager
def _replacing(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What a module puts out, or the first tensor of it, is changed inside."""

    def replaced(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (change(output[0]), *output[1:])
        raise UnsupportedModelError(
            f"a {type(module).__name__} puts out a {type(output).__name__}; expected a tensor, or a tuple that begins "
            "with one"
        )

    handle = module.register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()


def _logits(adapter: ModelAdapter, images: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), borrowed(adapter.model), adapter.prepared():
        return adapter.run(images)


def _prefers_another(adapter: ModelAdapter, images: Tensor, weights: Tensor) -> bool:
    """Whether one token among many equal ones is read by far more, or less, than its weight because it is another.

    It is the negative of the others: a norm has the same derivative there. A norm also hides from single elements of
    the gradient which tokens max pooling takes.
    """
    read = weights.nonzero().flatten()
    if len(read) < 4:  # too few to tell a weight from a share
        return False
    one, other = int(read[-1]), int(read[-2])

    def negated(tokens: Tensor) -> Tensor:
        tokens = _all_equal(tokens).clone()
        tokens[one] *= -1
        return tokens

    found = _head_gradients(adapter, images, negated).norm(dim=-1) / weights
    limit = len(read) ** 0.5 + 1
    return not bool(found[other] / limit < found[one] < found[other] * limit)


def _all_equal(tokens: Tensor) -> Tensor:
    return tokens[len(tokens) // 2].expand_as(tokens)


def _head_gradients(
    adapter: ModelAdapter, images: Tensor, put: Callable[[Tensor], Tensor], directions: int = 1
) -> Tensor:
    """Absolute gradients (N, D) of the logits at the final tokens, float32 on the CPU, up to a factor.

    Args:
        adapter: of the borrowed model.
        images: one image.
        put: gives the tokens (N, D) that are put in the place of those that leave the last block.
        directions: how many of the logits are followed.

    Raises:
        UnmeasuredError: there are no gradients, or none but zero.
    """
    leaf: list[Tensor] = []

    def replace_tokens(states: Tensor) -> Tensor:
        chosen = put(states.flatten(0, -2))  # a batch of one, so whatever the layout
        leaf.append(chosen.reshape(states.shape).detach().clone().requires_grad_(True))
        return leaf[0]

    with torch.inference_mode(False), torch.enable_grad(), borrowed(adapter.model), adapter.prepared():
        with _replacing(adapter.blocks[-1].block, replace_tokens):
            logits = adapter.logits(images).float()
        gradients = _absolute_gradients(logits, leaf[0], directions) if logits.requires_grad else None
    if gradients is None:
        raise UnmeasuredError(
            "no gradient leads from the logits to the blocks, so no seed row can be found: the head does not read the "
            "last block's tokens, or the model runs its blocks where gradients are switched off (torch.no_grad())"
        )
    if not gradients.any() or not gradients.isfinite().all():
        raise UnmeasuredError(
            "the head does not read the last block's tokens: no seed row can be found. Or its weights are all zero; "
            "train it first, or give it small random weights"
        )
    return gradients.flatten(0, -2).cpu()


def _absolute_gradients(logits: Tensor, leaf: Tensor, directions: int) -> Tensor | None:
    """Absolute gradients at a leaf, summed over directions of the logits; None where these do not depend on it."""
    total = torch.zeros(leaf.shape, device=leaf.device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(directions):
        direction = torch.randn(logits.shape, generator=generator, **DRAWN).to(logits.device)
        gradient = _finite_gradient(logits, leaf, direction)
        if gradient is None:
            return None
        total += gradient.float().abs()
    return total


def _finite_gradient(logits: Tensor, leaf: Tensor, direction: Tensor) -> Tensor | None:
    """A multiple of the gradient: in float16 the share of one of many tokens may be below the smallest number."""
    gradient = None
    for scale in _SCALES:
        (gradient,) = torch.autograd.grad(logits, leaf, scale * direction, retain_graph=True, allow_unused=True)
        if gradient is None or gradient.isfinite().all():
            break
    return gradient
