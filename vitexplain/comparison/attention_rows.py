"""What each token attends to in each block, small enough to be written into a report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..capture import Capture
from ..errors import CaptureError, UnsupportedModelError
from ..needs import Needs
from ..patch_pixels import scaled_extent
from ..subject import Subject

_LEVELS = 255


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Rows of attention over the patches of one image, mean over heads.

    Attributes:
        levels: (L, N, P) uint8: each row divided by its own maximum, in steps of 1/255.
        peaks: (L, N) float32: that maximum, a share of the row's attention in [0, 1].
        on_patches: (L, N) float32: share of each row that lies on patches, the rest being on prefix tokens.
        prefix: prefix tokens, which are the first of the N rows.
        grid: patch grid (h, w), with P = h·w.
        taken: share of the image's height and width that it takes up; above 1 where the model pads.
    """

    levels: npt.NDArray[np.uint8]
    peaks: npt.NDArray[np.float32]
    on_patches: npt.NDArray[np.float32]
    prefix: int
    grid: tuple[int, int]
    taken: tuple[float, float] = (1, 1)


def attention_rows(subject: Subject, images: Tensor) -> list[AttentionRows] | None:
    """Rows of attention of every image; None where tokens change from block to block, or attention is not seen.

    Args:
        subject: the model.
        images: (B, 3, H, W), normalised.
    """
    needs = Needs(attention=True)
    try:
        subject.adapter.check_needs(needs)
        return [_of_one(subject, needs, image[None]) for image in images]
    except (UnsupportedModelError, CaptureError):
        return None


def count_bytes(subject: Subject, size: tuple[int, int]) -> int:
    """Bytes of `AttentionRows.levels` of one image of (H, W) pixels; an estimate where tokens change."""
    h, w = subject.adapter.grid(size)
    return len(subject.adapter.blocks) * (subject.adapter.num_prefix_tokens + h * w) * h * w


def _of_one(subject: Subject, needs: Needs, image: Tensor) -> AttentionRows:
    with Capture(subject.adapter, needs) as capture, torch.no_grad():
        capture.forward(image)
        layouts = set(capture.layouts)
        if len(layouts) > 1 or any(block.windows is not None for block in capture.blocks):
            raise UnsupportedModelError("tokens change from block to block, so that there are no rows to compare")
        (layout,) = layouts
        rows = torch.stack([block.attention().mean(1)[0].float().cpu() for block in capture.blocks])
    patches = rows[..., layout.prefix :]
    peaks = patches.amax(-1)
    relative = patches / peaks.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return AttentionRows(
        (relative.clamp(0, 1) * _LEVELS).round().to(torch.uint8).numpy(),
        peaks.numpy(),
        patches.sum(-1).numpy(),
        layout.prefix,
        layout.grid,
        scaled_extent(capture.extent, (image.shape[-2], image.shape[-1]), (1, 1)) or (1, 1),
    )
