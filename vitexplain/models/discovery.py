"""Adapter for any plain transformer whose attention can be seen: found by watching it, and checked on the numbers.

Nothing is assumed from names. One forward on noise shows what `findings` and `projections` interpret; each finding is
verified, and what does not verify is left out or refused. The head's pooling is measured: with all final tokens made
equal, the gradient at each is proportional to the weight with which the head reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..borrowing import borrowed
from ..errors import InputError, UnsupportedModelError
from ..layout import to_tokens
from ..patch_pixels import patch_of_pixel
from .adapter import BlockModules
from .findings import FoundBlock, find_blocks, find_grid, find_pool
from .layer_scale import Joined, layer_scales
from .probe import Forward, first_tensor, watched
from .projections import describe
from .unknown import UnknownModelAdapter

if TYPE_CHECKING:
    from ..needs import Needs

_DIRECTIONS = 3  # of the logits, to tell what these do not depend on from what half precision rounds to zero
_SCALES = (2.0**10, 1.0)  # of a gradient in half precision: the first that leaves it finite


class DiscoveredAdapter(UnknownModelAdapter):
    """A model whose structure was found by watching it: Hugging Face, torchvision, `nn.MultiheadAttention`, your own.

    Args:
        model: called with images (B, C, H, W), by keyword where it names its main input; returns logits (B, C), or an
            object that has `logits`.
        image_size: pixels (H, W) to probe with; by default what the model's configuration says, or 224×224.

    Raises:
        UnsupportedModelError: no attention could be seen, or it does not have the form of a plain transformer.
    """

    _stem: nn.Conv2d | None = None  # not known before the first forward

    def __init__(self, model: nn.Module, image_size: tuple[int, int] | None = None) -> None:
        super().__init__(model, image_size)
        images = self.noise(self._probe_size)
        if images.is_meta:
            raise UnsupportedModelError("a model on the meta device cannot be watched; load its weights first")
        seen = self._watch(images)
        blocks = find_blocks(seen)
        self._tokens = blocks[0].attention.operands.num_tokens
        self._stem, grid = find_grid(seen, self._tokens)
        self._probe_grid = grid
        self._cut_as_they_are = {
            (images.shape[-2], images.shape[-1])
        }  # image sizes that the patch convolution was given
        self.num_prefix_tokens = self._tokens - grid[0] * grid[1]
        with torch.inference_mode(False), torch.no_grad(), borrowed(model):
            found = [describe(seen, block) for block in blocks]
            self._scales = layer_scales([joined for *_, joined in found], lambda: self._joined(images))
        self.blocks = tuple(modules for modules, *_ in found)
        self._projections = [projections for _, projections, _ in found]
        self._check_order(images, blocks[0])
        if seen.stacked:
            self._check_batches(images, blocks[0])
        pool = find_pool(seen, self._tokens, self.num_prefix_tokens)
        if pool is not None and not self._reads(pool, images):
            pool = None
        self.pool = None if pool is None else BlockModules(pool, pool)
        self._seed = None if pool is not None else self._measured_pooling(images)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w): the output size of the patch convolution.

        Raises:
            InputError: no patch fits; or another size than probed, and the convolution is not the model's first layer.
        """
        if tuple(image_size) == tuple(self._probe_size):
            return self._probe_grid
        if self._stem is None:
            raise InputError(
                f"found images of {image_size[0]}×{image_size[1]} pixels, expected {self._probe_size[0]}×"
                f"{self._probe_size[1]}; for another size pass DiscoveredAdapter(model, image_size=(H, W)) as the model"
            )
        rows, columns = (
            (side + 2 * margin - width) // step + 1
            for side, margin, width, step in zip(
                image_size, _margins(self._stem), self._stem.kernel_size, self._stem.stride, strict=True
            )
        )
        if min(rows, columns) < 1:
            raise InputError(f"found images of {image_size[0]}×{image_size[1]} pixels, expected at least one patch")
        return rows, columns

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """The stride of the patch convolution; None where it overlaps, leaves gaps, pads, or is not the first layer."""
        stem = self._stem
        if stem is None or stem.kernel_size != stem.stride or any(_margins(stem)) or set(stem.dilation) != {1}:
            return None
        return stem.stride[0], stem.stride[1]

    def logits(self, images: Tensor) -> Tensor:
        """As for any adapter; of images of a new size, the patch convolution is watched the first time.

        Raises:
            InputError: the model resizes or pads such images before it cuts patches, so that the grid is not known.
        """
        size = (images.shape[-2], images.shape[-1])
        if self._stem is None or size in self._cut_as_they_are:
            return super().logits(images)
        found, cut = self._watching_stem(self._stem, images)
        if cut == size:
            self._cut_as_they_are.add(size)
        elif cut is not None:
            raise InputError(
                f"found images of {size[0]}×{size[1]} pixels, of which the model makes {cut[0]}×{cut[1]} before it "
                f"cuts patches, so that its patch grid is not known; expected {self._probe_size[0]}×"
                f"{self._probe_size[1]}: resize the images, or pass DiscoveredAdapter(model, image_size=(H, W)) as the "
                "model"
            )
        return found

    def check_needs(self, needs: Needs) -> None:
        """Refuses the attention input where no module puts it out, as where a block normalises in its own forward."""
        super().check_needs(needs)
        first = self.check_block(needs.from_block)
        unknown = [index for index, each in enumerate(self._projections) if index >= first and not each.input_known]
        if unknown and "attention_input" in needs.seen_states:
            raise UnsupportedModelError(
                f"no module puts out or takes alone what attention takes in block {unknown[0]} "
                f"({type(self.blocks[unknown[0]].block).__name__}), so gradcam cannot read it; use generic_attention, "
                "rollout or raw_attention, or give the block a normalisation module that it calls once"
            )

    def seed(self, num_tokens: int) -> Tensor:
        """The measured pooling; the patches' share spread evenly where there are more or fewer of them."""
        if self._seed is None:
            raise UnsupportedModelError("the head reads the tokens through attention; Capture.seed_row has its row")
        if num_tokens == self._tokens:
            return self._seed
        prefix, patches = self._seed[: self.num_prefix_tokens], self._seed[self.num_prefix_tokens :]
        if not torch.allclose(patches, patches.mean(), rtol=1e-3, atol=0):
            raise UnsupportedModelError(
                f"the head weighs patches by their place, so its pooling of {num_tokens} tokens is not known; use "
                f"images of {self._probe_size[0]}×{self._probe_size[1]} pixels"
            )
        count = num_tokens - self.num_prefix_tokens
        return torch.cat([prefix, (patches.sum() / count).expand(count)])

    def output_weight(self, block: int) -> Tensor:
        """The verified output projection by heads, LayerScale folded in."""
        found, scale = self._projections[block], self._scales[block]
        if found.output is None or self.blocks[block].mid is None:
            raise UnsupportedModelError(
                f"no linear map from the heads to the residual stream was found in block {block} "
                f"({type(self.blocks[block].block).__name__}); use generic_attention or rollout"
            )
        weight = found.output()
        if scale is not None:
            weight = scale().to(weight)[:, None] * weight
        return weight.T.reshape(found.heads, -1, len(weight))

    def value_weight(self, block: int) -> Tensor:
        """The verified value projection by heads."""
        found = self._projections[block]
        if found.value is None:
            raise UnsupportedModelError(
                f"no linear map from the tokens to the values was found in block {block}; use transformation='value', "
                "or generic_attention"
            )
        weight = found.value()
        return weight.reshape(found.heads, -1, weight.shape[1]).transpose(1, 2)

    def _watching_stem(self, stem: nn.Conv2d, images: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        """The logits, and the size (H, W) of what the patch convolution was given; None where it was not seen."""
        sizes: list[tuple[int, int]] = []

        def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = first_tensor((*arguments, *named.values()))
            if given is not None:
                sizes.append((given.shape[-2], given.shape[-1]))

        handle = stem.register_forward_pre_hook(note, with_kwargs=True)
        try:
            logits = super().logits(images)
        finally:
            handle.remove()
        return logits, sizes[0] if sizes else None

    def _watch(self, images: Tensor) -> Forward:
        with torch.no_grad(), self.prepared(), watched(self.model, len(images)) as seen:
            self.run(images)
        return seen

    def _joined(self, images: Tensor) -> list[Joined | None]:
        """How attention joins the stream in each block, with the parameters that the model has at the time."""
        seen = self._watch(images)
        return [describe(seen, block)[-1] for block in find_blocks(seen)]

    def _check_order(self, images: Tensor, first: FoundBlock) -> None:
        """Prefix tokens come first and patches row by row: a change at the bottom left reaches one place alone."""
        (h, w), (height, width) = self._probe_grid, images.shape[-2:]
        changed = images.clone()
        own = patch_of_pixel((height, width), (h, w), self.extent((height, width))) == (h - 1) * w
        changed = torch.where(own.to(images.device), -images, images)
        states = []
        for call in (first, find_blocks(self._watch(changed))[0]):
            if call.call.input is None:
                return
            states.append(to_tokens(call.call.input, call.arrangement))
        moved = (states[0] - states[1]).abs().amax((0, 2)).float()
        expected = self.num_prefix_tokens + (h - 1) * w
        reached = bool((moved[: self.num_prefix_tokens] > 1e-3 * moved.max()).any())
        if reached or int(moved.argmax()) != expected:
            raise UnsupportedModelError(
                f"the bottom left patch is token {int(moved.argmax())}; expected {expected}, after "
                f"{self.num_prefix_tokens} prefix tokens, with patches row by row. Another order needs a ModelAdapter"
            )

    def _check_batches(self, images: Tensor, first: FoundBlock) -> None:
        """Attention on (B·H, N, …) is cut into images rightly: the first of two keeps its own."""
        seen = self._watch(torch.cat([images, images.flip(-1)]))
        both, alone = seen.attentions[0].operands.probabilities(), first.attention.operands.probabilities()
        if both.shape[1:] != alone.shape[1:] or not torch.allclose(both[:1], alone, atol=1e-3):
            raise UnsupportedModelError(
                "the model stacks the attention of its heads and images in an order that mixes images; expected images "
                "first, (B·H, N, N) or (B, H, N, N)"
            )

    def _reads(self, pool: nn.Module, images: Tensor) -> bool:
        """Whether the logits depend on what an attention pool puts out; some models compute it and go another way."""

        def flip(_: nn.Module, __: Any, output: Any) -> Any:
            return (-output[0], *output[1:]) if isinstance(output, tuple) else -output

        with torch.no_grad(), borrowed(self.model), self.prepared():
            before = self.run(images)
            handle = pool.register_forward_hook(flip)
            try:
                after = self.run(images)
            finally:
                handle.remove()
        return not torch.equal(before, after)

    def _measured_pooling(self, images: Tensor) -> Tensor:
        """(N,), sum 1: the norms of the gradients at the final tokens, all made equal.

        A head that picks tokens by their values (max pooling) has no such row and is refused; one that weighs them by
        a learned function of their content, without attention that can be seen, looks like a mean here.
        """
        weights = self._head_gradients(images, equal=True).norm(dim=-1)
        weights = torch.where(weights < 1e-6 * weights.max(), 0.0, weights)
        unread = self._head_gradients(images, equal=False) == 0
        partly = unread[weights > 0].any(0) & ~unread[weights > 0].all(0)
        if partly.any() or not unread[weights == 0].all():
            raise UnsupportedModelError(
                "the head picks tokens by their values (as max pooling does), so it has no seed row; methods without "
                "one need an adapter for this model"
            )
        if not weights[2:].any() and weights[:2].all():
            return torch.tensor([0.5, 0.5] + [0.0] * (len(weights) - 2))  # two heads, averaged
        return weights / weights.sum()

    def _head_gradients(self, images: Tensor, equal: bool) -> Tensor:
        """Absolute gradients (N, D) of the logits at the final tokens, float32 on the CPU, up to a factor.

        Args:
            images: one image.
            equal: make the tokens equal, and follow one direction of the logits; else several.

        Raises:
            UnsupportedModelError: the head does not read them.
        """
        leaf: list[Tensor] = []

        def replace_tokens(_: nn.Module, __: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            middle = states.flatten(0, 1)[self._tokens // 2]  # a batch of one, so whatever the layout
            chosen = middle.expand_as(states) if equal else states
            leaf.append(chosen.detach().clone().requires_grad_(True))
            return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

        with torch.inference_mode(False), torch.enable_grad(), borrowed(self.model), self.prepared():
            handle = self.blocks[-1].block.register_forward_hook(replace_tokens)
            try:
                logits = self.logits(images).float()
            finally:
                handle.remove()
            directions = 1 if equal else _DIRECTIONS
            gradients = _absolute_gradients(logits, leaf[0], directions) if logits.requires_grad else None
        if gradients is None or not gradients.any():
            raise UnsupportedModelError("the head does not read the last block's tokens: no seed row can be found")
        return gradients.flatten(0, 1).cpu()


def _margins(stem: nn.Conv2d) -> tuple[int, int]:
    """Pixels (rows, columns) by which a convolution pads at each end."""
    return (0, 0) if isinstance(stem.padding, str) else (stem.padding[0], stem.padding[1])


def _absolute_gradients(logits: Tensor, leaf: Tensor, directions: int) -> Tensor | None:
    """Absolute gradients at a leaf, summed over directions of the logits; None where these do not depend on it."""
    total = torch.zeros(leaf.shape, device=leaf.device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(directions):
        direction = torch.randn(logits.shape, generator=generator).to(logits.device)
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
