"""Random draws that belong to an image: the same alone and in any batch, and for every method."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def generators(inputs: Tensor, seed: int) -> list[torch.Generator]:
    """One generator an image, seeded by the image's own numbers, so that images are independent and methods paired.

    Args:
        inputs: (B, 3, H, W).
        seed: other draws for the same images.

    Returns:
        B generators on the CPU; draws are moved from there, so that they do not depend on the device.
    """
    images = inputs.detach().float().cpu().contiguous().numpy()
    return [torch.Generator().manual_seed(zlib.crc32(image.tobytes(), seed)) for image in images]
