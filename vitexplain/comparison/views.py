"""Ways to look at one map: over the picture, alone, as lines, or as the part of the picture that it points to."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..boxes import draw_boxes, heatmap_to_boxes
from ..errors import InputError, UnknownNameError
from ..metrics.ordering import rank
from ..patch_pixels import Extent
from ..render import (
    SIGNED_COLORMAP,
    UNSIGNED_COLORMAP,
    Pixels,
    colourise,
    contours,
    evidence,
    normalise,
    overlay,
    upsample,
)

VIEWS = ("overlay", "heatmap", "contours", "mask", "box", "patches")
"""Names that `draw_view` knows."""

COLOURED = ("overlay", "heatmap")
"""Views that show scores as colours, to which a colour bar belongs."""

TOP_SHARE = 0.1
"""Share of the patches that the view of highest patches shows, unless asked otherwise."""

Scale = Literal["map"] | tuple[float, float]

_LEVELS = (0.25, 0.5, 0.75)
_THRESHOLD = 0.5
_DIMMED = 0.4


def draw_view(
    view: str,
    picture: Pixels,
    scores: Tensor,
    *,
    signed: bool = False,
    scale: Scale = "map",
    smooth: bool = True,
    colormap: str | None = None,
    share: float = TOP_SHARE,
    thickness: int = 2,
    extent: Extent | None = None,
) -> Pixels:
    """One map, in one way.

    - ``overlay``: colours over the picture, stronger where the map is.
    - ``heatmap``: the colours alone.
    - ``contours``: lines at a quarter, half and three quarters of the map's range.
    - ``mask``: what reaches half of the range; the rest is dim and grey.
    - ``box``: the box around the largest region that reaches half of the range.
    - ``patches``: the highest patches, as the model sees them; the rest is dim and grey.

    The last four show evidence for the target alone, where scores are signed.

    Args:
        view: one of `VIEWS`.
        picture: uint8 RGB (H, W, 3).
        scores: (h, w), raw.
        signed: scores below zero are evidence against the target.
        scale: ``"map"`` for the map's own range, or ``(low, high)``.
        smooth: bilinear between patch centres; otherwise patches are visible as such.
        colormap: one of `render.COLORMAPS`; None for the default of signed or unsigned maps.
        share: of the patches that ``patches`` shows.
        thickness: of lines in pixels.
        extent: pixels (height, width) of the picture that the patches take up; None for just all of it.

    Returns:
        uint8 RGB (H, W, 3).

    Raises:
        UnknownNameError: no such view or colour map.
        InputError: the picture is no uint8 (H, W, 3).
    """
    if view not in VIEWS:
        raise UnknownNameError.listing("view", view, VIEWS)
    if picture.dtype != np.uint8 or picture.ndim != 3:
        raise InputError(f"found a picture {picture.shape} of type {picture.dtype}, expected uint8 (H, W, 3)")
    heat = heat_of(scores, picture.shape[:2], signed=signed, scale=scale, smooth=smooth, extent=extent)
    if view == "heatmap":
        return colourise(heat, colormap or (SIGNED_COLORMAP if signed else UNSIGNED_COLORMAP))
    if view == "overlay":
        return overlay(picture, heat, signed=signed, colormap=colormap)
    hot = evidence(heat, signed)
    if view == "contours":
        return contours(picture, hot, levels=_LEVELS, thickness=thickness)
    if view == "mask":
        return _spotlight(picture, (hot >= _THRESHOLD).numpy())
    if view == "patches":
        return _spotlight(picture, highest_patches(scores, picture.shape[:2], share, extent))
    boxes = heatmap_to_boxes(hot[None], _THRESHOLD, largest=True)
    (boxed,) = draw_boxes(picture[None], boxes, thickness=thickness)
    return np.asarray(boxed, np.uint8)


def heat_of(
    scores: Tensor,
    size: tuple[int, ...],
    *,
    signed: bool,
    scale: Scale = "map",
    smooth: bool = True,
    extent: Extent | None = None,
) -> Tensor:
    """Scores (h, w) as heat (H, W) in [0, 1], on the CPU; zero is at 0.5 where scores are signed."""
    mode: Literal["bilinear", "nearest"] = "bilinear" if smooth else "nearest"
    pixels = upsample(scores.detach().float().cpu(), (size[0], size[1]), mode, extent)
    return normalise(pixels, signed=signed, scale=scale)


def highest_patches(
    scores: Tensor, size: tuple[int, ...], share: float = TOP_SHARE, extent: Extent | None = None
) -> npt.NDArray[np.bool_]:
    """Pixels (H, W) of the highest patches; of equal scores the first in reading order is the higher one."""
    count = max(1, round(share * scores.numel()))
    chosen = rank(scores.detach().cpu().flatten()[None]) < count
    found: npt.NDArray[np.bool_] = (
        upsample(chosen.reshape(scores.shape).float(), (size[0], size[1]), "nearest", extent).numpy() > 0
    )
    return found


def _spotlight(picture: Pixels, lit: npt.NDArray[np.bool_]) -> Pixels:
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    dim: Pixels = np.rint(grey * _DIMMED).astype(np.uint8)
    return np.where(lit[..., None], picture, dim)


def range_of(scores: Tensor) -> tuple[float, float]:
    """Lowest and highest finite score; where all are alike, a range that begins with it."""
    known = scores.detach().float()
    known = known[known.isfinite()]
    low, high = (float(known.amin()), float(known.amax())) if known.numel() else (0.0, 0.0)
    return low, high if high > low else low + 1
