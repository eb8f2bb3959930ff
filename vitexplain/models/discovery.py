"""Adapter for any plain transformer whose attention can be seen: found by watching it, and checked on the numbers.

Nothing is assumed from names. One forward on noise shows what `findings` and `projections` interpret; each finding is
verified, and what does not verify is left out or refused. How the head reads the tokens is measured, in `reading`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..borrowing import borrowed
from ..errors import InputError, UnsupportedModelError
from ..layout import to_tokens
from .findings import FoundBlock, carries_stream, find_blocks, find_grid
from .layer_scale import Joined, layer_scales
from .probe import first_tensor, watch
from .projections import describe
from .reading import find_reading
from .token_order import bottom_left_changed, check_order, check_values
from .unknown import UnknownModelAdapter

if TYPE_CHECKING:
    from ..needs import Needs


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
        seen = watch(self, images)
        blocks = find_blocks(seen)
        self._tokens = blocks[0].attention.operands.num_tokens
        self._stem, grid = find_grid(seen, self._tokens)
        self._probe_grid = grid
        self._cut_as_they_are = {(images.shape[-2], images.shape[-1])}  # sizes that the patch convolution was given
        self.num_prefix_tokens = self._tokens - grid[0] * grid[1]
        with torch.inference_mode(False), torch.no_grad(), borrowed(model):
            found = [describe(seen, block) for block in blocks]
            self._scales = layer_scales([joined for *_, joined in found], lambda: self._joined(images))
        self.blocks = tuple(modules for modules, *_ in found)
        self._projections = [projections for _, projections, _ in found]
        self._check_order(images, blocks[0])
        if seen.stacked:
            self._check_batches(images, blocks[0])
        self._reading = find_reading(self, seen, images, carried=carries_stream(blocks))
        self.pool = self._reading.pool

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
        return self._reading.seed(num_tokens)

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
        ours = threading.get_ident()  # the model may run in others

        def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = first_tensor((*arguments, *named.values()))
            if given is not None and threading.get_ident() == ours:
                sizes.append((given.shape[-2], given.shape[-1]))

        handle = stem.register_forward_pre_hook(note, with_kwargs=True)
        try:
            logits = super().logits(images)
        finally:
            handle.remove()
        return logits, sizes[0] if sizes else None

    def _joined(self, images: Tensor) -> list[Joined | None]:
        """How attention joins the stream in each block, with the parameters that the model has at the time."""
        seen = watch(self, images)
        return [describe(seen, block)[-1] for block in find_blocks(seen)]

    def _check_order(self, images: Tensor, first: FoundBlock) -> None:
        """Tokens come in the order of the layout, and attention mixes tokens: one that did not move keeps its value."""
        extent = self.extent((images.shape[-2], images.shape[-1]))
        again = find_blocks(watch(self, bottom_left_changed(images, self._probe_grid, extent)))[0]
        if first.call.input is None or again.call.input is None:
            return
        before, after = (to_tokens(each, first.arrangement) for each in (first.call.input, again.call.input))

        def once_more() -> Tensor:
            entered = find_blocks(watch(self, images))[0].call.input
            return before if entered is None else to_tokens(entered, first.arrangement)

        check_order(before, after, self.layouts(self._probe_grid)[0], once_more)
        check_values(before, after, first.attention.operands.v, again.attention.operands.v)

    def _check_batches(self, images: Tensor, first: FoundBlock) -> None:
        """Attention on (B·H, N, …) is cut into images rightly: the first of two keeps its own."""
        seen = watch(self, torch.cat([images, images.flip(-1)]))
        both, alone = seen.attentions[0].operands.probabilities(), first.attention.operands.probabilities()
        if both.shape[1:] != alone.shape[1:] or not torch.allclose(both[:1], alone, atol=1e-3):
            raise UnsupportedModelError(
                "the model stacks the attention of its heads and images in an order that mixes images; expected images "
                "first, (B·H, N, N) or (B, H, N, N)"
            )


def _margins(stem: nn.Conv2d) -> tuple[int, int]:
    """Pixels (rows, columns) by which a convolution pads at each end."""
    return (0, 0) if isinstance(stem.padding, str) else (stem.padding[0], stem.padding[1])
