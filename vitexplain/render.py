"""Pictures from scores: upsampling, scaling to [0, 1], colours, overlays, PNG files.

Scores and heatmaps are tensors and stay on their device, where they are also coloured; pictures are uint8 RGB arrays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from vitexplain.colormaps import COLORMAPS, SIGNED_COLORMAP, UNSIGNED_COLORMAP, color_table
from vitexplain.device_painting import paint, paint_over
from vitexplain.errors import ExportError, InputError, OptionError
from vitexplain.files import write_whole
from vitexplain.patch_pixels import Extent, enlarged

__all__ = [
    "COLORMAPS",
    "SIGNED_COLORMAP",
    "UNSIGNED_COLORMAP",
    "Pixels",
    "colourise",
    "contours",
    "normalise",
    "overlay",
    "save_png",
    "upsample",
]

Pixels: TypeAlias = npt.NDArray[np.uint8]


def upsample(
    scores: Tensor,
    size: tuple[int, int],
    mode: Literal["bilinear", "nearest", "bicubic"] = "bilinear",
    extent: Extent | None = None,
) -> Tensor:
    """Brings patch-level scores to pixel resolution.

    Pixels that no patch takes up get what the nearest one gets at its edge.

    Args:
        scores: (..., h, w), any real type.
        size: height and width of the result.
        mode: ``"bilinear"`` (corners not aligned), ``"nearest"`` for visible patches, or ``"bicubic"``.
        extent: height and width, in pixels of the result, of what the patches take up from the top left corner on;
            None for just the result. See `Explanation.extent_in`.

    Returns:
        float32 (..., H, W) on the device of `scores`.

    Raises:
        OptionError: unknown mode, or a size below one pixel.
        InputError: the scores have fewer than two axes, or an empty grid.
    """
    if mode not in ("bilinear", "nearest", "bicubic"):
        raise OptionError(f"upsampling mode is {mode!r}, expected 'bilinear', 'nearest' or 'bicubic'.")
    if len(size) != 2 or min(size) < 1:
        raise OptionError(f"size is {size!r}, expected (height, width) of at least one pixel.")
    if scores.ndim < 2 or 0 in scores.shape[-2:]:
        raise InputError(f"found scores of shape {tuple(scores.shape)}, expected (..., h, w).")
    maps = scores.detach().to(torch.float32).reshape(-1, *scores.shape[-2:])
    pixels = enlarged(maps, size, "nearest-exact" if mode == "nearest" else mode, extent)
    return pixels.reshape(*scores.shape[:-2], *size)


def evidence(heat: Tensor, signed: bool) -> Tensor:
    """The part of heat in [0, 1] that speaks for the target, in [0, 1] again.

    That is all of it, or where scores are signed what lies above their zero at 0.5.
    """
    return (2 * heat - 1).clamp(min=0) if signed else heat


def normalise(
    maps: Tensor,
    signed: bool = False,
    scale: Literal["map", "shared"] | tuple[float, float] = "map",
    percentile: float = 100,
) -> Tensor:
    """Scales maps to [0, 1].

    Unsigned maps go from their minimum (0) to their maximum (1). Signed maps keep their zero in the middle: 0 becomes
    0.5 exactly and the largest magnitude 0 or 1. A map without contrast beyond float32 rounding becomes all 0, or all
    0.5 if signed. NaN counts as 0 and infinities as the largest magnitude.

    Args:
        maps: (..., H, W), any real type.
        signed: whether the sign means something.
        scale: ``"map"`` for a range of its own for each map, ``"shared"`` for one range for all (so that maps can be
            compared), or the range itself as ``(low, high)``.
        percentile: where the range ends, above 50 and at most 100; 99 keeps single outliers from hiding the rest.

    Returns:
        float32 (..., H, W) in [0, 1].

    Raises:
        OptionError: bad scale or percentile.
    """
    if not 50 < percentile <= 100:
        raise OptionError(f"percentile is {percentile!r}, expected above 50 and at most 100.")
    huge = torch.finfo(torch.float32).max / 4
    values = torch.nan_to_num(maps.detach().to(torch.float32), nan=0.0, posinf=huge, neginf=-huge).clamp(-huge, huge)
    if values.numel() == 0:
        return values
    if isinstance(scale, str):
        if scale not in ("map", "shared"):
            raise OptionError(f"scale is {scale!r}, expected 'map', 'shared' or a pair (low, high).")
        groups = values.flatten(-2) if scale == "map" else values.reshape(*(1,) * (values.ndim - 2), -1)
        low, high = (bound[..., None, None] for bound in _range(groups, signed, percentile))
        flat = _without_contrast(groups)[..., None, None]
    else:
        if len(scale) != 2 or not -huge <= scale[0] < scale[1] <= huge:
            raise OptionError(f"scale is {scale!r}, expected finite numbers (low, high) with low < high.")
        bounds = (-max(map(abs, scale)), max(map(abs, scale))) if signed else scale
        low, high = (values.new_tensor(bound) for bound in bounds)
        flat = torch.zeros((), dtype=torch.bool, device=values.device)
    if signed:
        return (values / high.clamp_min(torch.finfo(torch.float32).tiny) / 2 + 0.5).clamp(0, 1).masked_fill(flat, 0.5)
    span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return ((values - low) / span).clamp(0, 1).masked_fill(flat, 0.0)


def colourise(heatmaps: Tensor | npt.NDArray[Any], colormap: str = UNSIGNED_COLORMAP) -> Pixels:
    """Paints heatmaps through a table of 256 colours.

    Args:
        heatmaps: (..., H, W) in [0, 1]; values outside are clamped, NaN counts as 0.
        colormap: one of `COLORMAPS`.

    Returns:
        uint8 RGB (..., H, W, 3).

    Raises:
        UnknownNameError: no such colour map.
    """
    indices, table = _indices(heatmaps), color_table(colormap)
    if indices.device.type != "cpu":
        return _fetched(paint(indices, table))
    painted: Pixels = np.take(table, _fetched(indices), axis=0)
    return painted


def overlay(
    pictures: Pixels,
    heatmaps: Tensor | npt.NDArray[Any],
    *,
    colormap: str | None = None,
    alpha: float = 0.75,
    mode: Literal["weighted", "blend"] = "weighted",
    signed: bool = False,
) -> Pixels:
    """Lays heatmaps over the pictures they explain.

    Args:
        pictures: uint8 RGB (..., H, W, 3).
        heatmaps: (..., H, W) in [0, 1].
        colormap: one of `COLORMAPS`; None for the default of signed or unsigned maps.
        alpha: opacity in [0, 1]; where the heatmap is strongest if weighted.
        mode: ``"weighted"`` lets the opacity grow with the heat, so that what does not matter stays a photograph;
            ``"blend"`` uses one opacity everywhere.
        signed: whether 0.5 means nothing and both ends something.

    Returns:
        uint8 RGB (..., H, W, 3).

    Raises:
        InputError: shapes or types do not fit each other.
        OptionError: bad alpha or mode.
        UnknownNameError: no such colour map.
    """
    _check_pictures(pictures, tuple(heatmaps.shape))
    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha is {alpha!r}, expected a number in [0, 1].")
    if mode not in ("weighted", "blend"):
        raise OptionError(f"overlay mode is {mode!r}, expected 'weighted' or 'blend'.")
    table = color_table(colormap or (SIGNED_COLORMAP if signed else UNSIGNED_COLORMAP))
    heat = np.linspace(0, 1, 256)
    strength = np.abs(2 * heat - 1) if signed else heat
    # rising fast at first, so that middling heat does not vanish in a busy photograph
    weights = strength * (2 - strength) if mode == "weighted" else np.ones_like(strength)
    found = _indices(heatmaps)
    if found.numel() == 0:
        return np.empty_like(pictures)
    if found.device.type != "cpu":
        return _fetched(paint_over(pictures, found, table, alpha * weights))
    indices = _fetched(found).reshape(-1, pictures.shape[-2])  # the whole batch as one tall picture
    opacity = cv2.LUT(indices, (alpha * weights).astype(np.float32))
    colors = cv2.applyColorMap(indices, np.array(table)[:, None])  # keeps the order of the channels in the table
    photograph = np.ascontiguousarray(pictures).reshape(colors.shape)
    mixed: npt.NDArray[Any] = cv2.blendLinear(colors, photograph, opacity, 1 - opacity)
    return mixed.reshape(pictures.shape).astype(np.uint8, copy=False)


def contours(
    pictures: Pixels,
    heatmaps: Tensor | npt.NDArray[Any],
    *,
    levels: Sequence[float] = (0.5,),
    color: tuple[int, int, int] = (255, 255, 255),
    thickness: int = 2,
) -> Pixels:
    """Outlines the regions whose heat reaches given levels.

    Args:
        pictures: uint8 RGB (..., H, W, 3); left as they are.
        heatmaps: (..., H, W) in [0, 1].
        levels: heats at which to draw a line.
        color: red, green, blue of the line; it gets a dark rim to stand out anywhere.
        thickness: of the line in pixels, at least 1.

    Returns:
        uint8 RGB (..., H, W, 3).

    Raises:
        InputError: shapes or types do not fit each other.
    """
    _check_pictures(pictures, tuple(heatmaps.shape))
    drawn: Pixels = np.array(pictures, order="C")
    height, width = pictures.shape[-3:-1]
    indices = _fetched(_indices(heatmaps)).reshape(-1, height, width)
    for picture, heat in zip(drawn.reshape(-1, height, width, 3), indices, strict=True):
        for level in levels:
            reached = np.asarray(heat >= round(255 * level), dtype=np.uint8)
            lines, _ = cv2.findContours(reached, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(picture, lines, -1, (20, 20, 20), thickness + 2, cv2.LINE_AA)
            cv2.drawContours(picture, lines, -1, color, thickness, cv2.LINE_AA)
    return drawn


def save_png(image: Image.Image | Pixels, path: str | os.PathLike[str]) -> Path:
    """Writes a PNG file, whole or not at all.

    Args:
        image: a Pillow image, or uint8 (H, W), (H, W, 3) or (H, W, 4).
        path: where to; missing folders are made, an existing file is replaced.

    Returns:
        The path.

    Raises:
        ExportError: another suffix than ``.png``, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ExportError(f"cannot write {str(target)!r}: found suffix {target.suffix!r}, expected '.png'.")
    try:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    except (ValueError, TypeError) as error:
        raise ExportError(
            f"cannot write {str(target)!r}: {type(error).__name__}: {error}. Expected a Pillow image, or uint8 (H, W), "
            "(H, W, 3) or (H, W, 4)."
        ) from error
    return write_whole(target, lambda file: picture.save(file, format="PNG"))


def _range(groups: Tensor, signed: bool, percentile: float) -> tuple[Tensor, Tensor]:
    if signed:
        bound = _percentile(groups.abs(), percentile)
        return -bound, bound
    return _percentile(groups, 100 - percentile), _percentile(groups, percentile)


def _percentile(groups: Tensor, percentile: float) -> Tensor:
    if percentile == 100:
        return groups.amax(-1)
    if percentile == 0:
        return groups.amin(-1)
    ordered = groups.sort(-1).values  # torch.quantile refuses large tensors
    place = (groups.shape[-1] - 1) * percentile / 100
    below = int(place)
    above = min(below + 1, groups.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], place - below)


def _without_contrast(groups: Tensor) -> Tensor:
    low, high = groups.amin(-1), groups.amax(-1)
    return high - low <= 4 * torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())


def _indices(heatmaps: Tensor | npt.NDArray[Any]) -> Tensor:
    """Heat as uint8, on its device."""
    if isinstance(heatmaps, Tensor):
        heat = heatmaps.detach().to(torch.float32)
    else:
        heat = torch.from_numpy(np.array(heatmaps, dtype=np.float32, order="C"))
    return torch.nan_to_num(heat).mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _fetched(painted: Tensor) -> Pixels:
    fetched: Pixels = painted.cpu().numpy()
    return fetched


def _check_pictures(pictures: Pixels, heatmap_shape: tuple[int, ...]) -> None:
    if pictures.dtype != np.uint8 or pictures.ndim < 3 or pictures.shape != (*heatmap_shape, 3):
        raise InputError(
            f"found pictures {pictures.shape} of type {pictures.dtype} and heatmaps {heatmap_shape}, expected uint8 "
            f"(..., H, W, 3) and (..., H, W)."
        )
