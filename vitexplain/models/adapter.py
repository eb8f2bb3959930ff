"""The seam between a method and a model family: `ModelAdapter`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..borrowing import all_modules, attributes_set, is_watched
from ..combination import Combination
from ..errors import InputError, UnsupportedModelError
from ..layout import Arrangement, TokenLayout, Windows
from ..patch_pixels import grid_extent
from ..randomness import DRAWN

if TYPE_CHECKING:
    from ..needs import Needs, State


@dataclass(frozen=True, eq=False)
class BlockModules:
    """Where one transformer block is tapped. None: the block has no such module, so no such token state.

    Attributes:
        block: its input is state ``in``, its output state ``out``.
        attention: attention is computed inside it, once.
        attention_input: its output is state ``attention_input``.
        mid: its input is state ``mid``.
        mlp: its output is state ``mlp``; without one, that is ``out`` minus ``mid``.
        combination: how several attention calls of the block make one.
        arrangement: the axes of token states inside the block.
        windows: cuts the block's grid (h, w) into the windows that it attends within; None for one over all tokens.
        taken: without an `attention_input`, its input is that state; without either, the block's input is.
        straight: what goes into `mid` goes on to `mlp`, and nowhere else.
        between: modules inside `attention`, behind the first and before the second of which it is computed; None where
            that is not known.
    """

    block: nn.Module
    attention: nn.Module
    attention_input: nn.Module | None = None
    mid: nn.Module | None = None
    mlp: nn.Module | None = None
    combination: Combination = field(default_factory=Combination)
    arrangement: Arrangement = "BND"
    windows: Callable[[tuple[int, int]], Windows] | None = None
    taken: nn.Module | None = None
    straight: bool = False
    between: tuple[nn.Module, nn.Module] | None = None

    def place(self, state: State) -> tuple[nn.Module | None, bool]:
        """The module where a token state is; and whether that is its input, or its output."""
        if state in ("in", "out"):
            return self.block, state == "in"
        if state == "attention_input" and self.attention_input is None:
            return self.taken or self.block, True
        module: nn.Module | None = getattr(self, state)
        return module, state == "mid"


def linear_weight(module: nn.Module, width: int) -> Tensor:
    """The matrix (out, width) that a linear module multiplies with, also where adapters such as LoRA add to its weight.

    What hooks make of its input and output counts too, as in the model's forward.

    Args:
        module: `nn.Linear`, or a module that stands in for one and is affine.
        width: number of input features.
    """
    own = isinstance(module, nn.Linear) and getattr(module.forward, "__func__", None) is nn.Linear.forward
    if own and not is_watched(module):
        return cast("nn.Linear", module).weight.detach()
    reference = next((each for each in module.parameters() if each.is_floating_point()), torch.empty(0))
    with torch.no_grad():
        # one image of as many tokens, since what stands in for a linear map may count on three axes
        unit = torch.eye(width, device=reference.device, dtype=reference.dtype)[None]
        weight: Tensor = (module(unit) - module(torch.zeros_like(unit)))[0].T
        return weight


def first_weight(model: nn.Module) -> Tensor | None:
    """A weight of the layer that takes the images, which have to be on its device and in its precision.

    That is the first convolution; in a model without any, its first linear map; else any parameter.
    """
    layers = (each for kind in (nn.Conv2d, nn.Linear) for each in model.modules() if isinstance(each, kind))
    weights = chain((each.weight for each in layers), model.parameters())
    return next((each for each in weights if each.is_floating_point()), None)


class ModelAdapter(ABC):
    """One view of every supported model: its blocks, its tokens, its patch grid and its pooling.

    A family is supported by one subclass; `vitexplain.models.adapt` chooses it by inspecting the module. An
    instance may be passed wherever a model is expected.

    Attributes:
        model: the borrowed model.
        blocks: where each block is tapped, in forward order.
        num_prefix_tokens: tokens before the patch tokens (CLS, DIST, registers).
        pool: the attention pool that reads the final tokens; its attention is then the seed row. None for other heads.
        approximate: why following attention through several blocks is an approximation here; None where it is exact.
        batch: the one number of images that a forward of the model takes; None for any.
    """

    model: nn.Module
    blocks: tuple[BlockModules, ...]
    num_prefix_tokens: int
    pool: BlockModules | None = None
    approximate: str | None = None
    batch: int | None = None

    @abstractmethod
    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w) for images of (H, W) pixels.

        Raises:
            InputError: the model does not take images of this size.
        """

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """Pixels (height, width) of a patch, where patches lie side by side from the image's top left corner on.

        None where that is not known, or not so: the grid is then taken to spread evenly over the image.
        """
        return None

    def extent(self, image_size: tuple[int, int], grid: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Pixels (height, width) that a grid takes up of images of (H, W) pixels; None where just the image.

        Less than the image where the model leaves out what is no whole patch, more where it pads that to one.

        Args:
            image_size: pixels (H, W).
            grid: (h, w) of one of the `layouts`; the patch grid by default.

        Raises:
            InputError: the model does not take images of this size.
        """
        patches = self.grid(image_size)
        grids = [patches]
        if grid is not None and grid != patches:
            merged = [layout.grid for layout in self.layouts(patches)]
            grids += merged[: merged.index(grid) + 1] if grid in merged else []
        return grid_extent(image_size, self.patch_size, grids)

    @abstractmethod
    def seed(self, num_tokens: int) -> Tensor:
        """The seed row (N,), float32, sum 1: how much of each final token the head reads.

        Raises:
            UnsupportedModelError: the head's pooling is no fixed weighting of tokens.
        """

    @abstractmethod
    def output_weight(self, block: int) -> Tensor:
        """(H, dh, D): each head's slice of the output projection, LayerScale folded in.

        Raises:
            UnsupportedModelError: the head outputs do not enter the residual stream linearly.
        """

    @abstractmethod
    def value_weight(self, block: int) -> Tensor:
        """(H, D, dh): the linear map from the attention input to each head's values, without bias.

        Raises:
            UnsupportedModelError: the values are not such a map.
        """

    @property
    @abstractmethod
    def num_channels(self) -> int:
        """Channels of an input image."""

    def layouts(self, grid: tuple[int, int]) -> tuple[TokenLayout, ...]:
        """The tokens of each block, where patches form a grid (h, w); here the same in all."""
        return (TokenLayout(self.num_prefix_tokens, grid),) * len(self.blocks)

    def check_needs(self, needs: Needs) -> None:
        """Refuses what a method asks for and this family does not have; here, blocks beyond the last.

        Raises:
            UnsupportedModelError: no such block, attention or token states; says which methods work.
        """
        self.check_block(needs.from_block)

    def logits(self, images: Tensor) -> Tensor:
        """Runs the model once: images (B, channels, H, W), which stay as they are, to logits (B, C).

        Raises:
            UnsupportedModelError: the model's output is no such tensor.
        """
        output = self.model(images.clone())  # which the model may normalise in place
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor) or output.ndim != 2:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UnsupportedModelError(
                f"the model returned {found}; expected logits of shape (B, C), one row an image. Wrap it in a module "
                "that returns such scores"
            )
        return output

    def noise(self, size: tuple[int, int]) -> Tensor:
        """One image (1, channels, H, W) to find things out with, the same every time."""
        noise = torch.randn(1, self.num_channels, *size, generator=torch.Generator().manual_seed(0), **DRAWN)
        reference = first_weight(self.model)
        return noise if reference is None else noise.to(device=reference.device, dtype=reference.dtype)

    def run(self, images: Tensor) -> Tensor:
        """`logits`, with whatever the model raises as an `UnsupportedModelError` that says what to do."""
        try:
            return self.logits(images)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever an unknown model raises on an input it does not take
            raise UnsupportedModelError(
                f"a {type(self.model).__name__} could not be run on images of shape {tuple(images.shape)} to find out "
                f"how it works ({type(error).__name__}: {error}). If it takes another size, pass "
                "DiscoveredAdapter(model, image_size=(H, W)) as the model, or a FeatureAdapter for a pyramid; "
                "otherwise write a ModelAdapter"
            ) from error

    def prepared(self) -> AbstractContextManager[None]:
        """What the family needs while it is captured, put back on leaving: here, fused attention switched on."""
        parts = [*self.blocks, *([self.pool] if self.pool else [])]
        switches = dict.fromkeys(module for part in parts for module in all_modules(part.attention))
        kinds = {kind for kind in set(map(type, switches)) if hasattr(kind, "fused_attn")}
        switched = [each for each in switches if type(each) in kinds or "fused_attn" in vars(each)]
        return attributes_set(switched, "fused_attn", True)

    def check_images(self, images: Tensor) -> Tensor:
        """Images as the model takes them: (B, channels, H, W), on its device, in its precision.

        Args:
            images: (B, channels, H, W) or one image (channels, H, W); floating point, normalised.

        Raises:
            InputError: other shapes or dtypes, an empty batch, NaN or infinite values, a size the model refuses.
            UnsupportedModelError: the model is on the meta device.
        """
        if images.ndim == 3:
            images = images[None]
        expected = f"a float tensor (B, {self.num_channels}, H, W)"
        if images.ndim != 4 or images.shape[1] != self.num_channels or not images.numel():
            raise InputError(f"found a tensor of shape {tuple(images.shape)}, expected {expected}")
        if not images.is_floating_point():
            raise InputError(
                f"found a tensor of {images.dtype}, expected {expected}, normalised as the model was trained: "
                "pass files or PIL images to have that done, or use vitexplain.preprocessing.Preprocessing"
            )
        if not (images.sum().isfinite() or images.isfinite().all()):  # the sum alone is a tenth of the work
            raise InputError("the images hold NaN or infinite values; expected finite numbers")
        self.grid((images.shape[-2], images.shape[-1]))
        reference = first_weight(self.model)
        reference = images if reference is None else reference
        if reference.is_meta:
            raise UnsupportedModelError(
                f"found a {type(self.model).__name__} on the meta device, which has no weights to compute with; load "
                "them first"
            )
        return images.detach().to(device=reference.device, dtype=reference.dtype)

    def check_block(self, index: int | float) -> int:
        """The block index as a number from 0 to L-1; negative ones count from the end, a float is a share of L.

        Raises:
            UnsupportedModelError: the model has no such block.
        """
        count = len(self.blocks)
        if isinstance(index, float):
            index = min(round(index * count), count - 1)
        if not -count <= index < count:
            raise UnsupportedModelError(f"found block index {index}, expected {-count} to {count - 1} for this model")
        return index % count
