"""Putting shapes on a canvas: anti-aliased coverage, cast shadow, rounded shading.

A canvas is a float32 array (3, S, S), red, green and blue planes about 0..1; a canvas and all the pieces laid on it
are planar because arithmetic on long rows is several times faster than on pixels of three values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .textures import FloatImage

_OVERSAMPLING = 4
_FRACTION_BITS = 4
_SHADOW_REACH = 8
"""Margin around a shape that its shadow may darken, in pixels of a canvas of 96."""


@dataclass(frozen=True)
class Light:
    """Direction towards which shadows fall (a unit vector), and how strong shadow and relief are (0..1)."""

    right: float
    down: float
    shadow: float
    relief: float


@dataclass(frozen=True, eq=False)
class Stamp:
    """A shape on a canvas: its coverage in a window with room for the shadow.

    Attributes:
        window: rows and columns of the canvas.
        share: how much of each pixel in the window is inside the shape, float32 in 0..1.
    """

    window: tuple[slice, slice]
    share: FloatImage

    def mask(self, size: int) -> NDArray[np.bool_]:
        """Returns the pixels (size, size) of which at least half are inside the shape."""
        mask = np.zeros((size, size), bool)
        mask[self.window] = self.share >= 0.5
        return mask


def stamp(polygons: Sequence[NDArray[np.float64]], size: int) -> Stamp:
    """Returns the shape of some polygons on a canvas.

    Args:
        polygons: arrays (points, 2) of x, y in pixels, filled together by the even-odd rule.
        size: side of the canvas in pixels.
    """
    points = np.concatenate(polygons)
    margin = _SHADOW_REACH * size // 96
    left, top = np.clip(np.floor(points.min(axis=0)).astype(int) - margin, 0, size - 1).tolist()
    right, bottom = np.clip(np.ceil(points.max(axis=0)).astype(int) + margin, 1, size).tolist()
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    fine = np.zeros(((bottom - top) * _OVERSAMPLING, (right - left) * _OVERSAMPLING), np.uint8)
    # OpenCV puts integer coordinates at pixel centres; half a fine pixel moves them to pixel corners.
    scale, half = _OVERSAMPLING * 2**_FRACTION_BITS, 2 ** (_FRACTION_BITS - 1)
    rings = [np.round((ring - (left, top)) * scale - half).astype(np.int32) for ring in polygons]
    cv2.fillPoly(fine, rings, 255, shift=_FRACTION_BITS)
    share = cv2.resize(fine, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    return Stamp((slice(top, bottom), slice(left, right)), share.astype(np.float32) / np.float32(255))


def paint(canvas: FloatImage, shape: Stamp, fill: FloatImage, light: Light) -> None:
    """Lays a shape on the canvas with its shadow, in place.

    Args:
        canvas: image (3, S, S), float32.
        shape: where to paint.
        fill: surface of the shape (3, h, w), as large as the shape's window.
        light: direction and strength of shadow and relief.
    """
    unit = canvas.shape[1] / 96
    area = canvas[:, shape.window[0], shape.window[1]]
    soft = cv2.GaussianBlur(shape.share, (0, 0), 1.6 * unit)
    fall = np.array([[1, 0, 3 * unit * light.right], [0, 1, 3 * unit * light.down]], np.float32)
    shadow = cv2.warpAffine(soft, fall, (soft.shape[1], soft.shape[0]), flags=cv2.INTER_LINEAR)
    area *= 1 - np.float32(light.shadow) * shadow
    slope = np.array([[0, light.down, 0], [light.right, 0, -light.right], [0, -light.down, 0]], np.float32)
    relief = 1 + np.float32(light.relief * unit) * cv2.filter2D(soft, -1, slope)
    area += shape.share * (fill * relief - area)
