"""What is common to adapters of a library's classes: what a class says of its head is believed of the class alone.

Somebody may have derived from it, or put functions on an instance, that read other tokens or put them in another order.
Where that could be, both are measured, as with models of no known class.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..borrowing import all_modules, follows_library
from ..errors import InputError, UnsupportedModelError
from ..layout import to_tokens
from .adapter import ModelAdapter
from .probe import Forward, ModuleCall, watch
from .reading import Reading, UnmeasuredError, find_reading
from .token_order import bottom_left_changed, check_order

_PATCHES = (6, 4)  # of an image to find things out with, where the model takes any size


def patch_grid(embed: Any, image_size: tuple[int, int], *, dynamic: bool) -> tuple[int, int]:
    """Patch grid (h, w) that one of timm's patch embeddings makes; `dynamic` where it takes any size.

    Raises:
        InputError: it does not take images of this size.
    """
    height, width = embed.patch_size
    fixed = getattr(embed, "img_size", None)
    if dynamic or fixed is None:
        if not getattr(embed, "dynamic_img_pad", False) and (image_size[0] % height or image_size[1] % width):
            raise InputError(
                f"found images of {image_size[0]}×{image_size[1]} pixels, expected multiples of the patch size "
                f"{height}×{width}: resize or crop them"
            )
        rows, columns = -(-image_size[0] // height), -(-image_size[1] // width)
    else:
        if tuple(image_size) != tuple(fixed):
            raise InputError(
                f"found images of {image_size[0]}×{image_size[1]} pixels, expected {fixed[0]}×{fixed[1]}: resize "
                "them, or build the model with img_size=… or dynamic_img_size=True"
            )
        rows, columns = embed.grid_size
    return int(rows), int(columns)


def cut_size(embed: Any) -> tuple[int, int]:
    """Pixels (height, width) of the patches that one of timm's patch embeddings cuts."""
    height, width = embed.patch_size
    return int(height), int(width)


class KnownAdapter(ModelAdapter):
    """A model of a class whose blocks, patch grid and pooling are known from its attributes.

    Subclasses end their initialiser with `_settle`.
    """

    _reading: Reading | None = None  # what was measured, where it is not what the class says

    @abstractmethod
    def class_seed(self, num_tokens: int) -> Tensor:
        """The seed row (N,), float32, sum 1, by what the class does.

        Raises:
            UnsupportedModelError: its pooling is no fixed weighting of tokens.
        """

    def seed(self, num_tokens: int) -> Tensor:
        """How the head reads the tokens: as its class does, or as was measured where somebody changed that."""
        return self.class_seed(num_tokens) if self._reading is None else self._reading.seed(num_tokens)

    def _settle(self, embed: Any, behind_pooling: Iterable[nn.Module | None]) -> None:
        """Measures how the head reads the tokens, unless all that decides it is a library's code, which costs nothing.

        Where nothing but the model's own `forward` is somebody's and nothing can be measured (weights of zero,
        gradients switched off, no weights at all), the class is believed.

        Args:
            embed: the patch embedding, with `patch_size` and maybe `img_size`.
            behind_pooling: modules that see pooled features alone, and may be anything.

        Raises:
            UnsupportedModelError: blocks are not modules of their own or run in another order, or tokens come in one.
        """
        self._check_apart()
        settled = [each.block for each in self.blocks] + [each for each in behind_pooling if each is not None]
        changed = [each for each in all_modules(self.model, without=settled) if not follows_library(each)]
        if not changed:
            return
        believed = changed == [self.model] and follows_library(self.model, but_for_forward=True)
        with torch.random.fork_rng(devices=[]):  # somebody's forward may draw lots
            self._measure(embed, believed=believed)

    def _measure(self, embed: Any, *, believed: bool) -> None:
        """Runs the model to find out how its head reads the tokens; where that fails, its class may be believed.

        Raises:
            UnmeasuredError: it cannot be run on noise, and its class is not believed.
            UnsupportedModelError: blocks run in another order, or tokens come in one.
        """
        try:
            images, seen = self._watched_on_noise(_probe_size(embed))
        except UnmeasuredError:
            if believed:
                return
            raise
        self._check_tokens(seen, images)
        try:
            reading = find_reading(self, seen, images, carried=True)
        except UnsupportedModelError as error:
            if believed and isinstance(error, UnmeasuredError):
                return
            reading = Reading(self.num_prefix_tokens, (images.shape[-2], images.shape[-1]), refusal=str(error))
        self.pool = reading.pool
        self._reading = None if self._as_the_class_says(reading) else reading

    def _watched_on_noise(self, size: tuple[int, int]) -> tuple[Tensor, Forward]:
        """An image of noise, and what was seen with it; somebody's forward may take none but colours from 0 to 1.

        Raises:
            UnmeasuredError: neither kind can be run, or gives finite numbers.
        """
        normal = self.noise(size)
        if normal.is_meta:
            raise UnmeasuredError(
                f"a {type(self.model).__name__} is not its library's code alone, so it has to be run to see which "
                "tokens its head reads, and on the meta device it cannot; load its weights first"
            )
        reason = "its tokens are not finite numbers"
        for images in (normal, normal.sigmoid()):
            try:
                seen = watch(self, images)
            except UnsupportedModelError as error:
                reason = str(error)
                continue
            entered = [call.input for call in self._block_calls(seen) if call.input is not None]
            if all(bool(each.isfinite().all()) for each in entered):
                return images, seen
        raise UnmeasuredError(
            f"a {type(self.model).__name__} is not its library's code alone, so it has to be run on noise to see which "
            f"tokens its head reads, and that fails: {reason}"
        )

    def _check_apart(self) -> None:
        places: dict[nn.Module, int] = {}
        for index, each in enumerate(self.blocks):
            first = places.setdefault(each.block, index)
            if first != index:
                raise UnsupportedModelError(
                    f"blocks {first} and {index} are one and the same module ({type(each.block).__name__}), so that "
                    "what one computes cannot be told from the other; expected blocks that are modules of their own, "
                    "such as copies (copy.deepcopy)"
                )

    def _check_tokens(self, seen: Forward, images: Tensor) -> None:
        """Blocks run in their order, and the first of them takes tokens in the order of its layout."""
        grid = self.grid((images.shape[-2], images.shape[-1]))
        extent = self.extent((images.shape[-2], images.shape[-1]))
        again = watch(self, bottom_left_changed(images, grid, extent))
        before, after = (self._block_calls(each)[0].input for each in (seen, again))
        if before is not None and after is not None:
            arrangement = self.blocks[0].arrangement
            first, layout = to_tokens(before, arrangement), self.layouts(grid)[0]

            def once_more() -> Tensor:
                entered = self._block_calls(watch(self, images))[0].input
                return first if entered is None else to_tokens(entered, arrangement)

            check_order(first, to_tokens(after, arrangement), layout, once_more)

    def _block_calls(self, seen: Forward) -> list[ModuleCall]:
        """The first call of each block.

        Raises:
            UnsupportedModelError: some were not called, or in another order.
        """
        places = {each.block: index for index, each in enumerate(self.blocks)}
        calls = {call.module: call for call in reversed(seen.modules) if call.module in places}
        found = sorted(calls.values(), key=lambda call: call.start)
        order = [places[call.module] for call in found]
        if order != list(range(len(self.blocks))):
            raise UnsupportedModelError(
                f"a {type(self.model).__name__} runs its blocks as {', '.join(map(str, order))}; expected 0 to "
                f"{len(self.blocks) - 1}, in this order. Leave out blocks that are not run, or write a ModelAdapter"
            )
        return found

    def _as_the_class_says(self, reading: Reading) -> bool:
        if reading.weights is None:
            return False
        try:
            said = self.class_seed(len(reading.weights))
        except UnsupportedModelError:
            return False
        return torch.allclose(reading.weights, said, rtol=0.02, atol=1e-6)  # rounding of half precision


def _probe_size(embed: Any) -> tuple[int, int]:
    height, width = getattr(embed, "img_size", None) or (
        count * int(side) for count, side in zip(_PATCHES, embed.patch_size, strict=True)
    )
    return int(height), int(width)
