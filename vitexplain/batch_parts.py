"""How many images go into one pass on the CPU, where more take memory and gain no time."""

from __future__ import annotations

from math import ceil

from torch import Tensor

CPU_PIXELS = 2**20
"""How many pixels of images go into one pass. More gain no time on the CPU and may lose some, as what a block holds has
to fit a cache, while memory grows: 20 images of 224 pixels, one of 768."""


def images_that_pay(images: Tensor) -> int:
    """How many images of the size of these (…, H, W) go into one pass on the CPU, at least 1."""
    return max(1, CPU_PIXELS // max(1, images.shape[-2:].numel()))


def even_part(count: int, most: int) -> int:
    """The size of parts of `count` things, each of at most `most`, so that no small one is left over; at least 1."""
    return max(1, ceil(count / max(1, ceil(count / most))))
