"""What is known of the objects in a batch's images, checked, as masks in the pixels of the model's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..boxes import boxes_to_masks
from ..errors import InputError
from .metric import MetricBatch

_SIGNED = {
    torch.uint8: torch.int16,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.float64,
}
"""Types that hold all numbers of an unsigned one, or near enough to tell them from -1, 0 and 1."""


def object_masks(batch: MetricBatch) -> Tensor:
    """The masks of a batch: int8 (B, H, W) on the scores' device; 1 object, 0 background, -1 left out.

    Raises:
        InputError: other values, or another size than the input's.
    """
    masks = checked_masks(cast("Tensor", batch.masks)).to(batch.scores.device)
    if batch.inputs is not None and batch.inputs.shape[-2:] != masks.shape[-2:]:
        raise InputError(
            f"found masks of {tuple(masks.shape[-2:])} and an input of {tuple(batch.inputs.shape[-2:])} pixels, "
            "expected the same: resize masks as the images were, to the nearest pixel"
        )
    return masks


def checked_masks(masks: Tensor) -> Tensor:
    """Masks of any type as int8, (B, H, W) of 1, 0 and -1.

    Raises:
        InputError: other values, such as 255 for the object, or another shape.
    """
    # the highest unsigned number would equal -1
    signed = masks.to(_SIGNED[masks.dtype]) if masks.dtype in _SIGNED else masks
    if masks.ndim != 3 or not bool(((signed == 1) | (signed == 0) | (signed == -1)).all()):
        raise InputError(
            f"found masks of shape {tuple(masks.shape)} with values from {signed.amin()} to {signed.amax()}, expected "
            "(B, H, W) of 1 (object), 0 (background) and -1 (left out); masks of 0 and 255 are masks > 0"
        )
    return masks.to(torch.int8)


def box_masks(batch: MetricBatch) -> Tensor:
    """The boxes of a batch as masks: (B, H, W) on the scores' device; 1 in any box of the image, 0 elsewhere.

    Raises:
        InputError: no inputs that tell the size, or boxes that are none.
    """
    masks = boxes_to_masks(cast("Sequence[Tensor]", batch.boxes), input_size(batch))
    return masks.to(batch.scores.device, torch.int8)


def input_size(batch: MetricBatch) -> tuple[int, int]:
    """Height and width of the model's input.

    Raises:
        InputError: the batch has no inputs.
    """
    if batch.inputs is None:
        raise InputError("found boxes without the inputs in whose pixels they are: pass MetricBatch(inputs=…)")
    return batch.inputs.shape[-2], batch.inputs.shape[-1]


def object_share(masks: Tensor) -> Tensor:
    """The object's share of the pixels that count: masks (B, H, W) to (B,) float64; NaN where no pixel counts."""
    return (masks == 1).double().sum((1, 2)) / (masks >= 0).double().sum((1, 2))


def unknown_or_large(masks: Tensor, largest: float) -> Tensor:
    """Whether an image shows no object, or one that covers at least the share `largest`: (B,) bool."""
    share = object_share(masks)
    return ~((share > 0) & (share < largest))
