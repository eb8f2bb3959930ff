"""Occlusion: a window of patches replaced, slid over the image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.captum_attribution import AblationAttribution
from vitexplain.errors import OptionError
from vitexplain.options import option
from vitexplain.patch_pixels import covered, gather_by_patch, with_covered
from vitexplain.registry import register_method
from vitexplain.target_response import ImageResponse


@register_method(
    "occlusion",
    title="Occlusion",
    paper="Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014, section 4.2",
    class_specific=True,
    passes="(2 + W)F",
    signed=True,
)
@dataclass(frozen=True)
class Occlusion(AblationAttribution):
    r"""What the class loses when a window is replaced, as a mean over the windows that cover a patch, by captum.

    .. math:: m_j = \frac{1}{|\{w \ni j\}|} \sum_{w \ni j} \bigl(y(x) - y(x_{w \leftarrow b})\bigr)

    with x_{w ← b} the image whose window w shows the baseline. One forward pass for each of the W windows, besides the
    capture's and one of the unchanged image: W = (h - 2)(w - 2) on a grid of h × w patches with the default options.
    A window that is longer than one side of the grid ends with it. Scores (B, h, w).
    """

    window: int = option(3, "side of the window, in patches", minimum=1)
    stride: int = option(1, "by how many patches it moves; no more than its side", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride > self.window:
            raise OptionError(
                f"occlusion: found stride={self.stride} with window={self.window}, expected a stride of no more than "
                "the window's side, so that every patch is covered"
            )

    def image_scores(self, one: ImageResponse, grid: tuple[int, int], extent: tuple[int, int] | None) -> Tensor:
        """Scores (1, h, w).

        Raises:
            OptionError: the window covers the whole grid, so that the map would be constant.
        """
        from captum.attr import Occlusion as CaptumOcclusion

        if self.window >= max(grid):
            raise OptionError(
                f"occlusion: found window={self.window} on a grid of {grid[0]}×{grid[1]} patches, all hidden by it; "
                "expected a smaller one, such as window=1"
            )
        image = one.image
        seen = covered(image, extent)
        channels, *sides = seen.shape[1:]
        # (pixels of a patch, patches of the window) along each side
        lengths = [
            (max(taken // count, 1), min(self.window, count))
            for taken, count in zip(extent or sides, grid, strict=True)
        ]
        windows = (min(patch * window, side) for (patch, window), side in zip(lengths, sides, strict=True))
        pixels = CaptumOcclusion(lambda changed: one(with_covered(image, changed))).attribute(
            seen,
            sliding_window_shapes=(channels, *windows),
            strides=(channels, *(patch * min(self.stride, window) for patch, window in lengths)),
            baselines=covered(one.baseline(self.baseline), extent),
            perturbations_per_eval=one.batch.forward_size,
        )
        return gather_by_patch(pixels[:, 0], grid, extent, mean=True)
