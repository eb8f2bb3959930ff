"""Between pixels and patches: which pixels a grid takes up, which patch a pixel lies in, scores from one to the other.

A grid starts at the image's top left corner, and its patches are equally large. Where it takes up just the image, its
extent is None. A model may leave out what is no whole patch at the bottom and right (the extent is then less than the
image), or pad it to one (more). Pixels beyond the last patch have no score; where a map needs one, it is the nearest
patch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Extent: TypeAlias = tuple[float, float]
"""Pixels (height, width) that a grid takes up; whole numbers, but where a map is drawn in another size."""


def grid_extent(
    image_size: Sequence[int], patch_size: tuple[int, int] | None, grids: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """The extent of a grid; None where it takes up just the image.

    Args:
        image_size: pixels (H, W).
        patch_size: pixels (height, width) of a patch; None for a grid spread evenly over the image.
        grids: the model's patch grid (h, w); then, if the one meant is coarser, those that lie between and that one,
            each made of the one before by merging patches, as many to one as it takes to cover them all.
    """
    height, width = (
        _length(side, patch, counts)
        for side, patch, *counts in zip(image_size, patch_size or (0, 0), *grids, strict=True)
    )
    return None if (height, width) == tuple(image_size) else (height, width)


def scaled_extent(extent: Extent | None, image_size: Sequence[int], size: Sequence[int]) -> Extent | None:
    """An extent in pixels of images of `image_size` (H, W), in those of the same images drawn in another size."""
    if extent is None:
        return None
    height, width = (taken * drawn / side for taken, side, drawn in zip(extent, image_size, size, strict=True))
    return height, width


def patch_of_pixel(image_size: Sequence[int], grid: tuple[int, int], extent: Extent | None = None) -> Tensor:
    """(H, W) int64: the number of the patch that each pixel's centre lies in, row by row; of others, the nearest patch.

    Where the grid does not divide its extent, patches differ by one pixel in length.
    """
    rows, columns = _patches_along(image_size, grid, extent)
    return rows[:, None] * grid[1] + columns


def at_pixels(values: Tensor, size: Sequence[int], extent: Extent | None = None) -> Tensor:
    """Values of patches (…, h, w), of any type, at pixels (…, H, W): those of the patch that `patch_of_pixel` names."""
    grid = (values.shape[-2], values.shape[-1])
    for axis, patches in zip((-2, -1), _patches_along(size, grid, extent, values.device), strict=True):
        values = values.index_select(axis, patches)
    return values


def gather_by_patch(pixels: Tensor, grid: tuple[int, int], extent: Extent | None = None, *, mean: bool) -> Tensor:
    """Pixel scores (…, H, W) as patch scores (…, h, w): the sum over each patch's pixels, or their mean.

    Pixels that no patch takes up are left out, and so is padding.
    """
    pixels = covered(pixels, extent)
    for axis, patches in zip((-2, -1), _patches_along(pixels.shape[-2:], grid, extent), strict=True):
        members = F.one_hot(patches, grid[axis]).to(pixels)
        if mean:
            members = members / members.sum(0)
        pixels = torch.tensordot(pixels, members, dims=([axis], [0])).movedim(-1, axis)
    return pixels


def covered(pixels: Tensor, extent: Extent | None) -> Tensor:
    """The part of pixels (…, H, W) that patches take up."""
    return pixels if extent is None else pixels[..., : int(extent[0]), : int(extent[1])]


def framed(pixels: Tensor, extent: tuple[int, int] | None, padding: float) -> Tensor:
    """Pixels (…, H, W) cut, or padded, to just what patches take up (…, height, width)."""
    if extent is None:
        return pixels
    (height, width), (tall, wide) = pixels.shape[-2:], extent
    return F.pad(pixels, (0, wide - width, 0, tall - height), value=padding)


def with_covered(pixels: Tensor, part: Tensor) -> Tensor:
    """Pixels (1, …, H, W), once for each of the changed `covered` parts (n, …, h, w) that take their place in them."""
    if part.shape[-2:] == pixels.shape[-2:]:
        return part
    whole = pixels.repeat(len(part), *(1,) * (pixels.ndim - 1))
    whole[..., : part.shape[-2], : part.shape[-1]] = part
    return whole


def enlarged(maps: Tensor, size: Sequence[int], mode: str, extent: Extent | None = None) -> Tensor:
    """Patch scores (n, h, w) at pixels (n, H, W), of the same floating type.

    Args:
        maps: the scores.
        size: pixels (H, W).
        mode: ``"nearest-exact"``, or ``"bilinear"`` or ``"bicubic"`` between patch centres, and beyond the outermost
            of them as if the outermost patches went on for ever.
        extent: what the grid takes up of `size`.
    """
    corners = {} if mode == "nearest-exact" else {"align_corners": False}
    if extent is None:
        return F.interpolate(maps[:, None], size=tuple(size), mode=mode, **corners)[:, 0]
    lengths = [taken / count for taken, count in zip(extent, maps.shape[-2:], strict=True)]  # of a patch, in pixels
    beyond = [
        max(0, math.ceil(side / length) + 1 - count)
        for side, length, count in zip(size, lengths, maps.shape[-2:], strict=True)
    ]
    wide = F.pad(maps[:, None], (0, beyond[1], 0, beyond[0]), mode="replicate")
    large = F.interpolate(wide, scale_factor=tuple(lengths), mode=mode, recompute_scale_factor=False, **corners)
    return large[:, 0, : size[0], : size[1]]


def _length(side: int, patch: int, counts: Sequence[int]) -> int:
    """Pixels along one side of an image that patches take up; of patches merged again and again, the last ones."""
    taken = counts[0] * patch
    if abs(taken - side) >= patch:  # so that they cannot have been cut from the image as it is
        taken = side
    for count, merged in pairwise(counts):
        taken = taken * merged * -(-count // merged) // count
    return taken


def _patches_along(
    size: Sequence[int], grid: tuple[int, int], extent: Extent | None, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """For each side, the row or column of patches (length,) that each pixel's centre lies in, int64."""
    return [
        (((2 * torch.arange(side, device=device) + 1) * count) // (2 * taken)).long().clamp(max=count - 1)
        for side, count, taken in zip(size, grid, extent or size, strict=True)
    ]
