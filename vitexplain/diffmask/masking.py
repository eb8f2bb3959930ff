"""The frozen model, read at all depths and run again with some patch embeddings replaced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..borrowing import borrowed, callers_autocast
from ..capture import Capture
from ..errors import CaptureError, UnsupportedModelError
from ..layout import Arrangement, from_tokens, to_tokens
from ..models.patch_input import PatchInput
from ..needs import Needs
from .gates import Gates, log_kept

if TYPE_CHECKING:
    from ..models.adapter import ModelAdapter

STATE_NEEDS = Needs(states=frozenset({"in", "out"}))
"""What a capture has to hold for the gates."""


@dataclass(frozen=True, eq=False)
class PatchEmbedding:
    """Where patches become tokens, before positions are added.

    Attributes:
        module: its output holds one token a patch.
        entry: called with images, runs `module` once and little else.
        arrangement: the axes of the module's output where there are four.
    """

    module: nn.Module
    entry: Callable[[Tensor], Any]
    arrangement: Arrangement

    @classmethod
    def of(cls, adapter: ModelAdapter) -> PatchEmbedding:
        """Finds it: timm's own, else the last convolution outside the blocks.

        Raises:
            UnsupportedModelError: there is none.
        """
        model: Any = adapter.model
        if isinstance(model, PatchInput):
            return cls(model.embedding, adapter.logits, "BND")
        embeds = getattr(model, "embeds", None)
        if isinstance(embeds, nn.Module):  # NaFlexViT, where the same module adds positions
            return cls(embeds.get_submodule("norm"), embeds, "BHWD")
        embed = getattr(model, "patch_embed", None)
        if isinstance(embed, nn.Module):
            return cls(embed, embed, "BHWD")
        inside = {id(module) for block in adapter.blocks for module in block.block.modules()}
        stem = [each for each in model.modules() if isinstance(each, nn.Conv2d) and id(each) not in inside]
        if not stem:
            raise UnsupportedModelError(
                f"no patch convolution was found in a {type(model).__name__}, so no patch can be replaced in it; "
                "methods that replace none work: generic_attention, rollout, gradcam"
            )
        return cls(stem[-1], stem[-1] if len(stem) == 1 else adapter.logits, "BDHW")

    def tokens(self, images: Tensor) -> Tensor:
        """The embeddings (B, P, D) of images as the model takes them; no more of the model is run than needed."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            kept.append(to_tokens(output, self.arrangement).detach().clone())  # timm may add positions in place
            raise _ReachedError

        handle = self.module.register_forward_hook(keep)
        try:
            self.entry(images)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return kept[0]


class _ReachedError(Exception):
    """Ends a forward pass behind the patch embedding."""


@dataclass(frozen=True, eq=False)
class PatchStates:
    """What the gates read of a batch.

    Attributes:
        states: s₀ … s_{L+1}, each (B, P, D), without prefix tokens: the patch embedding, the input of each block, and
            the output of the last.
        prefix: the prefix tokens of s₁ … s_{L+1}, each (B, prefix, D).
        logits: (B, C) of the whole image.
        images: (B, channels, H, W) as the model took them.
    """

    states: tuple[Tensor, ...]
    prefix: tuple[Tensor, ...]
    logits: Tensor
    images: Tensor

    @classmethod
    def of(cls, capture: Capture, embeddings: Tensor) -> PatchStates:
        """From a capture after its forward pass, and the patch embeddings of its images.

        Raises:
            UnsupportedModelError: the model's tokens change from block to block.
            CaptureError: the embeddings are not one a patch.
        """
        if len(set(capture.layouts)) > 1 or any(each.modules.windows for each in capture.blocks):
            raise UnsupportedModelError(
                f"a {type(capture.adapter.model).__name__} merges or joins tokens between its blocks, so a patch has "
                "no state at every depth for the gates to read; what works: generic_attention, rollout, gradcam"
            )
        prefix, (h, w) = capture.layouts[0].prefix, capture.grid
        hidden = [block.state("in") for block in capture.blocks] + [capture.blocks[-1].state("out")]
        if embeddings.shape != hidden[0][:, prefix:].shape:
            raise CaptureError(
                f"found patch embeddings of shape {tuple(embeddings.shape)}, expected one of {hidden[0].shape[2]} "
                f"features for each of {h}×{w} patches; the model needs an adapter of its own"
            )
        states = (embeddings.to(hidden[0].dtype), *(each[:, prefix:] for each in hidden))
        return cls(states, tuple(each[:, :prefix] for each in hidden), capture.logits, capture.images)

    def with_class_token(self, token: Tensor) -> tuple[Tensor, ...]:
        """s₀ … s_{L+1}, each (B, 1 + P, D), with the class token (D,) as its own embedding in s₀."""
        first = token.to(self.states[0]).expand(len(self.logits), 1, -1)
        return tuple(
            torch.cat([ahead[:, :1], state], dim=1)
            for ahead, state in zip((first, *self.prefix), self.states, strict=True)
        )


class MaskedModel:
    """A borrowed model whose patches can be replaced at the patch embedding.

    Args:
        adapter: the model's adapter.

    Raises:
        UnsupportedModelError: the model has no patch embedding that could be found.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self.embedding = PatchEmbedding.of(adapter)
        self._verified = False

    def read(self, images: Tensor) -> PatchStates:
        """One forward pass without a graph: what the gates read.

        Args:
            images: (B, channels, H, W), normalised.

        Raises:
            UnsupportedModelError: the model does not give its patch embedding the images as they are.
        """
        seen: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            seen.append(to_tokens(output, self.embedding.arrangement).detach().clone())

        with Capture(self.adapter, STATE_NEEDS) as capture:
            handle = self.embedding.module.register_forward_hook(keep)
            try:
                capture.forward(images)
            finally:
                handle.remove()
            if len(seen) != 1:
                raise UnsupportedModelError(f"the patch embedding ran {len(seen)} times in one forward, expected once")
            if not self._verified:
                self._verify(capture.images, seen[0])
            return PatchStates.of(capture, seen[0])

    def logits(self, images: Tensor, kept: Tensor, replacement: Tensor) -> Tensor:
        """Logits (B, C) where each patch is z · e + (1 - z) · b, differentiable in z and b.

        Args:
            images: (B, channels, H, W), as `PatchStates` has them.
            kept: z (B, P) in [0, 1].
            replacement: b (D,).
        """

        def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            with torch.autocast(output.device.type, enabled=False):
                tokens = to_tokens(output, self.embedding.arrangement)
                z, b = kept[..., None], replacement
                mixed = (z * tokens.to(z.dtype) + (1 - z) * b).to(output.dtype)
                return from_tokens(mixed, self.embedding.arrangement, output.shape)

        with torch.inference_mode(False), ExitStack() as stack:
            stack.enter_context(borrowed(self.adapter.model))
            stack.enter_context(self.adapter.prepared())
            stack.callback(self.embedding.module.register_forward_hook(replace).remove)
            stack.enter_context(callers_autocast())
            return self.adapter.logits(images)

    def _verify(self, images: Tensor, seen: Tensor) -> None:
        """Embeddings computed apart from the model are those inside it."""
        with torch.no_grad():
            apart = self.embedding.tokens(images)
        if apart.shape != seen.shape or not torch.allclose(apart.float(), seen.float(), rtol=1e-2, atol=1e-3):
            raise UnsupportedModelError(
                f"a {type(self.adapter.model).__name__} changes images before its patch embedding reads them; expected "
                "images as they are: take such a step (normalising, resizing) out of the model into the preprocessing"
            )
        self._verified = True


def hard_mask(log_probability: Tensor) -> Tensor:
    """1 where a patch is more likely kept than dropped, else 0; float, of the shape of its log-probability."""
    return (log_probability > torch.tensor(0.5).log()).to(log_probability.dtype)


def class_token(adapter: ModelAdapter) -> Tensor:
    """The model's class token (D,), without a position.

    Raises:
        UnsupportedModelError: it has no parameter of that name, or further prefix tokens.
    """
    for name, parameter in adapter.model.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "class_token", "class_embedding"):
            if adapter.num_prefix_tokens == 1:
                return parameter.detach().flatten()
            break
    raise UnsupportedModelError(
        f"found no class token that is the only prefix token of a {type(adapter.model).__name__}, expected one to "
        "count in the sparsity, as count_class_token=True asks for: set it to False"
    )


def class_features(adapter: ModelAdapter, num_classes: int) -> Tensor:
    """By what a class is told to the gates: its row of the classifier (C, D), scaled to unit length.

    Where no linear layer has one output a class, the rows of the identity (C, C), by which each class is learnt alone.
    """
    layers = [each for each in adapter.model.modules() if isinstance(each, nn.Linear)]
    heads = [each.weight.detach().float() for each in layers if each.out_features == num_classes]
    rows = heads[-1] if heads else torch.eye(num_classes)
    return torch.nn.functional.normalize(rows, dim=1)


def amortised_log_kept(gates: Gates, found: PatchStates, classes: Tensor | None = None) -> Tensor:
    """log of the probability (B, P) that all gates keep a patch; `classes` as for `Gates.lean`."""
    return log_kept(gates(found.states, classes))[:, -1]
