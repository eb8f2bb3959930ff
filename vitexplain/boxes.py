"""Boxes: around the hot regions of heatmaps, as masks, on pictures, and how much two of them overlap.

A box is x0, y0, x1, y1 in pixels, edges exclusive.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import InputError, OptionError
from .render import Pixels

__all__ = [
    "ANNOTATED",
    "FOUND",
    "Boxes",
    "box_iou",
    "boxes_above",
    "boxes_to_masks",
    "check_boxes",
    "draw_boxes",
    "heat_levels",
    "heatmap_to_boxes",
]

Boxes = npt.NDArray[np.int64]

HIGHEST_LEVEL = 255
"""Level of a pixel of heat 1."""

FOUND, ANNOTATED = (255, 255, 255), (0, 200, 255)
"""Red, green and blue of boxes around hot regions, and of those from annotations."""

_RIM = (20, 20, 20)
_SIDE_TO_LINE = 112


def heatmap_to_boxes(heatmaps: Tensor, threshold: float = 0.5, *, largest: bool = False) -> list[Tensor]:
    """Boxes around the hot regions of each heatmap, as the published box metrics draw them.

    Heat is rounded down to 256 levels. Hot are the pixels above level int(threshold · highest level of the map); every
    contour of the hot regions gets a box, also that around a hole. A box ends behind its last pixel, but on the last
    pixel at the right and lower border, which is the published convention. A map without heat has no box (there: the
    box 0, 0, 0, 0).

    Source: Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, CVPR 2020; and its code.

    Args:
        heatmaps: (B, H, W) in [0, 1], as `Explanation.heatmap` gives them; of signed maps, their `render.evidence`.
        threshold: share of a map's highest level, in [0, 1).
        largest: only the box of the contour that encloses the largest area.

    Returns:
        B tensors (n, 4) int64 on the CPU.

    Raises:
        InputError: heatmaps of another shape, or with values outside [0, 1].
        OptionError: a threshold outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise OptionError(f"found threshold {threshold!r}, expected a number in [0, 1)")
    return [
        torch.from_numpy(boxes_above(levels, int(threshold * levels.max()), largest=largest))
        for levels in heat_levels(heatmaps)
    ]


def heat_levels(heatmaps: Tensor) -> Pixels:
    """Heatmaps (B, H, W) in [0, 1] as levels 0 to 255, rounded down; uint8 (B, H, W).

    Raises:
        InputError: heatmaps of another shape, or with values outside [0, 1].
    """
    if heatmaps.ndim != 3 or heatmaps.numel() == 0:
        raise InputError(f"found heatmaps of shape {tuple(heatmaps.shape)}, expected (B, H, W), none of them 0")
    heat = heatmaps.detach().float()
    if not bool(((heat >= 0) & (heat <= 1)).all()):
        raise InputError("found heat outside [0, 1] or NaN: scale the maps with vitexplain.render.normalise first")
    levels: Pixels = (heat * HIGHEST_LEVEL).to(torch.uint8).cpu().numpy()
    return levels


def boxes_above(levels: Pixels, cut: int, *, largest: bool = False) -> Boxes:
    """Boxes (n, 4) of the contours around pixels above a level; see `heatmap_to_boxes`.

    Args:
        levels: (H, W) uint8.
        cut: level, 0 to 255.
        largest: only the contour that encloses the largest area; the first of equals.
    """
    found, _ = cv2.findContours((levels > cut).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    contours = [max(found, key=cv2.contourArea)] if largest and found else found
    corners = np.array([cv2.boundingRect(contour) for contour in contours], np.int64).reshape(-1, 4)
    height, width = levels.shape
    corners[:, 2:] = np.minimum(corners[:, :2] + corners[:, 2:], (width - 1, height - 1))
    return corners


def box_iou(first: Boxes, second: Boxes) -> npt.NDArray[np.float64]:
    """Intersection over union of each pair, (n, m) in [0, 1], for boxes (n, 4) and (m, 4) of whole pixels.

    Both ends count as part of a box, as in the published box metrics: a side from 2 to 5 is 4 long.
    """
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low + 1, 0, None).prod(-1)
    area, other_area = ((boxes[:, 2:] - boxes[:, :2] + 1).prod(-1) for boxes in (first, second))
    union = area[:, None] + other_area[None] - shared
    return np.asarray(shared / union, np.float64)


def boxes_to_masks(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Pixels whose centre lies in any of an image's boxes.

    Args:
        boxes: B tensors (n, 4); n may differ and be 0.
        size: height and width of the masks.

    Returns:
        (B, H, W) bool on the CPU.

    Raises:
        InputError: boxes of another shape, not finite, or without area.
    """
    height, width = size
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, box in zip(masks, check_boxes(boxes), strict=True):
        x0, y0, x1, y1 = box.T[:, :, None]
        across, down = (columns >= x0) & (columns < x1), (rows >= y0) & (rows < y1)
        mask |= (down[:, :, None] & across[:, None]).any(0)
    return masks


def draw_boxes(
    pictures: Pixels,
    boxes: Sequence[Tensor | npt.NDArray[Any]],
    *,
    color: tuple[int, int, int] = FOUND,
    thickness: int | None = None,
) -> Pixels:
    """Outlines boxes on pictures; sides that lie outside of the picture are drawn at its border.

    Args:
        pictures: uint8 RGB (B, H, W, 3); left as they are.
        boxes: for each picture (n, 4), in its pixels; n may differ and be 0.
        color: red, green, blue of the line; it gets a dark rim to stand out anywhere.
        thickness: of the line in pixels, at least 1; the line lies inside of the box. By default a pixel for every 112
            of the pictures' shorter side.

    Returns:
        uint8 RGB (B, H, W, 3).

    Raises:
        InputError: shapes or types do not fit each other, or boxes are not finite or without area.
        OptionError: a line thinner than a pixel.
    """
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or len(boxes) != len(pictures):
        raise InputError(
            f"found pictures {pictures.shape} of type {pictures.dtype} and boxes of {len(boxes)} pictures, expected "
            "uint8 (B, H, W, 3) and boxes of B pictures"
        )
    height, width = pictures.shape[1:3]
    thickness = max(1, round(min(height, width) / _SIDE_TO_LINE)) if thickness is None else thickness
    if thickness < 1:
        raise OptionError(f"found thickness {thickness!r}, expected a whole number of at least 1")
    drawn: Pixels = np.array(pictures, order="C")
    edges = torch.tensor([width, height, width, height])
    for picture, own in zip(drawn, check_boxes([torch.as_tensor(each) for each in boxes]), strict=True):
        corners = own.round().long().clamp(min=0).minimum(edges).tolist()
        # all rims first, so that no rim crosses the line of another box
        for line, steps in ((_RIM, (-1, thickness)), (color, range(thickness))):
            for (x0, y0, x1, y1), step in itertools.product(corners, steps):
                if x0 + step < x1 - step and y0 + step < y1 - step:
                    cv2.rectangle(picture, (x0 + step, y0 + step), (x1 - 1 - step, y1 - 1 - step), line, 1)
    return drawn


def check_boxes(boxes: Sequence[Tensor]) -> list[Tensor]:
    """The boxes of B images as float64 (n, 4) on the CPU.

    Raises:
        InputError: boxes of another shape, not finite, or without area.
    """
    checked = [each.detach().double().cpu() for each in boxes]
    for each in checked:
        if each.ndim != 2 or each.shape[1] != 4:
            raise InputError(
                f"found boxes of shape {tuple(each.shape)}, expected (n, 4) for each image: x0, y0, x1, y1"
            )
        if not bool((each.isfinite().all(1) & (each[:, 2:] > each[:, :2]).all(1)).all()):
            raise InputError(f"found boxes {each.tolist()}, expected finite x0 < x1 and y0 < y1 in pixels")
    return checked
