"""Between pixels and patches: which patch a pixel lies in, and pixel scores gathered by patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_of_pixel(image_size: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """(H, W) int64: the number of the patch that each pixel lies in, row by row.

    Where the grid does not divide the image, patches differ by one pixel in length.
    """
    rows, columns = (_patch_along(length, count) for length, count in zip(image_size, grid, strict=True))
    return rows[:, None] * grid[1] + columns


def gather_by_patch(pixels: Tensor, grid: tuple[int, int], *, mean: bool) -> Tensor:
    """Pixel scores (…, H, W) as patch scores (…, h, w): the sum over each patch's pixels, or their mean."""
    for axis, count in ((-2, grid[0]), (-1, grid[1])):
        members = F.one_hot(_patch_along(pixels.shape[axis], count), count).to(pixels)
        if mean:
            members = members / members.sum(0)
        pixels = torch.tensordot(pixels, members, dims=([axis], [0])).movedim(-1, axis)
    return pixels


def _patch_along(length: int, count: int) -> Tensor:
    return torch.arange(length) * count // length
