"""The object classes of the scenes, as outlines.

Each class is drawn once per variant at high resolution and kept as polygons (outer rings and holes, filled by
the even-odd rule), centred and scaled to unit area. Because every outline has the same area, the size of an
object in a scene says nothing about its class.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Outline = tuple[FloatArray, ...]
"""Polygons of one silhouette: arrays (points, 2) of x, y, filled by the even-odd rule."""

VARIANTS = 8
"""Number of drawings of each class (thicker, longer, more open, ...)."""

_RESOLUTION = 512
_FRACTION_BITS = 4


@dataclass(frozen=True)
class _Sheet:
    """A drawing surface with x to the right and y down, both about -1..1."""

    ink: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((_RESOLUTION, _RESOLUTION), np.uint8))

    @staticmethod
    def _pixels(points: Sequence[tuple[float, float]] | FloatArray) -> NDArray[np.int32]:
        scaled = (np.asarray(points, np.float64) * 0.45 + 0.5) * _RESOLUTION * 2**_FRACTION_BITS
        pixels: NDArray[np.int32] = np.round(scaled).astype(np.int32)
        return pixels

    def polygon(self, points: Sequence[tuple[float, float]] | FloatArray, erase: bool = False) -> None:
        """Fills a polygon, or cuts it out."""
        cv2.fillPoly(self.ink, [self._pixels(points)], 0 if erase else 255, shift=_FRACTION_BITS)

    def ellipse(
        self, x: float, y: float, width: float, height: float, degrees: float = 0.0, erase: bool = False
    ) -> None:
        """Fills an ellipse with half axes `width` and `height` turned clockwise by `degrees`, or cuts it out."""
        angle = np.linspace(0, 2 * math.pi, 90, endpoint=False)
        turn = math.radians(degrees)
        across, along = width * np.cos(angle), height * np.sin(angle)
        ring = np.stack(
            [
                x + across * math.cos(turn) - along * math.sin(turn),
                y + across * math.sin(turn) + along * math.cos(turn),
            ],
            1,
        )
        self.polygon(ring, erase)

    def stroke(self, points: Sequence[tuple[float, float]] | FloatArray, width: float) -> None:
        """Draws a line of the given width with round ends."""
        thickness = max(1, round(width * 0.45 * _RESOLUTION))
        cv2.polylines(self.ink, [self._pixels(points)], False, 255, thickness, shift=_FRACTION_BITS)


def _arc(x: float, y: float, radius: float, start: float, stop: float, squeeze: float = 1.0) -> FloatArray:
    """Points on an arc from `start` to `stop` degrees (0 to the right, 90 down)."""
    angle = np.radians(np.linspace(start, stop, 40))
    return np.stack([x + radius * np.cos(angle), y + squeeze * radius * np.sin(angle)], 1)


def _anchor(sheet: _Sheet, rng: np.random.Generator) -> None:
    width = rng.uniform(0.17, 0.24)
    reach = rng.uniform(0.66, 0.8)
    sheet.ellipse(0, -0.72, 0.24, 0.24)
    sheet.ellipse(0, -0.72, 0.1, 0.1, erase=True)
    sheet.stroke([(0, -0.5), (0, 0.8)], width)
    half = rng.uniform(0.38, 0.5)
    sheet.stroke([(-half, -0.32), (half, -0.32)], width * 0.9)
    sheet.stroke(_arc(0, 0.1, reach, 20, 160), width)
    for side in (-1, 1):
        tip_x, tip_y = side * reach * 0.95, 0.26
        sheet.polygon(
            [
                (tip_x - side * 0.3, tip_y + 0.02),
                (tip_x + side * 0.16, tip_y + 0.16),
                (tip_x + side * 0.06, tip_y - 0.3),
            ]
        )


def _arrow(sheet: _Sheet, rng: np.random.Generator) -> None:
    half, neck, head = rng.uniform(0.14, 0.22), rng.uniform(0.0, 0.2), rng.uniform(0.5, 0.62)
    barb = neck - rng.uniform(0.0, 0.15)
    sheet.polygon([(-0.95, -half), (neck, -half), (barb, -head), (0.95, 0), (barb, head), (neck, half), (-0.95, half)])


def _bolt(sheet: _Sheet, rng: np.random.Generator) -> None:
    lean, waist = rng.uniform(-0.05, 0.12), rng.uniform(0.0, 0.1)
    sheet.polygon(
        [
            (-0.1 + lean, -0.98),
            (0.5 + lean, -0.98),
            (0.16, -0.26 + waist),
            (0.62, -0.26 + waist),
            (-0.36 - lean, 1.0),
            (-0.06, 0.12 + waist),
            (-0.52, 0.12 + waist),
        ]
    )


def _butterfly(sheet: _Sheet, rng: np.random.Generator) -> None:
    spread, lower = rng.uniform(24, 38), rng.uniform(0.32, 0.42)
    for side in (-1, 1):
        sheet.ellipse(side * 0.5, -0.32, 0.52, 0.33, -side * spread)
        sheet.ellipse(side * 0.4, 0.42, lower, 0.25, side * 42)
        sheet.stroke([(0, -0.4), (side * 0.14, -0.74), (side * 0.28, -0.9)], 0.07)
    sheet.ellipse(0, 0, 0.11, 0.62)


def _crescent(sheet: _Sheet, rng: np.random.Generator) -> None:
    sheet.ellipse(0, 0, 0.95, 0.95)
    sheet.ellipse(rng.uniform(0.42, 0.56), rng.uniform(-0.12, 0.12), 0.76, 0.76, erase=True)


def _fish(sheet: _Sheet, rng: np.random.Generator) -> None:
    deep, tail = rng.uniform(0.36, 0.48), rng.uniform(0.36, 0.5)
    sheet.ellipse(-0.2, 0, 0.68, deep)
    sheet.polygon([(0.28, 0), (0.95, -tail), (0.78, 0), (0.95, tail)])
    sheet.polygon([(-0.35, -deep * 0.8), (0.12, -deep - 0.26), (0.22, -deep * 0.5)])
    sheet.polygon([(-0.15, deep * 0.8), (0.15, deep + 0.2), (0.2, deep * 0.5)])
    sheet.ellipse(-0.56, -0.1, 0.08, 0.08, erase=True)


def _heart(sheet: _Sheet, rng: np.random.Generator) -> None:
    angle = np.linspace(0, 2 * math.pi, 120, endpoint=False)
    tall = rng.uniform(0.9, 1.1)
    across = np.sin(angle) ** 3
    down = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)) / 16.5
    sheet.polygon(np.stack([across * 0.95, down * 0.92 * tall - 0.08], 1))


def _house(sheet: _Sheet, rng: np.random.Generator) -> None:
    wall, eaves = rng.uniform(0.58, 0.72), rng.uniform(-0.2, -0.02)
    chimney = rng.uniform(0.3, 0.45)
    sheet.polygon([(chimney, -0.85), (chimney + 0.22, -0.85), (chimney + 0.22, 0), (chimney, 0)])
    sheet.polygon([(-wall, eaves), (wall, eaves), (wall, 0.85), (-wall, 0.85)])
    sheet.polygon([(-wall - 0.22, eaves), (0, -0.95), (wall + 0.22, eaves)])
    door = rng.uniform(-0.36, -0.24)
    sheet.polygon([(door - 0.13, 0.3), (door + 0.15, 0.3), (door + 0.15, 0.85), (door - 0.13, 0.85)], erase=True)
    sheet.polygon([(0.12, 0.2), (0.44, 0.2), (0.44, 0.5), (0.12, 0.5)], erase=True)


def _key(sheet: _Sheet, rng: np.random.Generator) -> None:
    bow, width = rng.uniform(0.36, 0.44), rng.uniform(0.17, 0.22)
    sheet.ellipse(-0.55, 0, bow, bow)
    sheet.ellipse(-0.55, 0, bow * 0.48, bow * 0.48, erase=True)
    sheet.polygon([(-0.25, -width / 2), (0.95, -width / 2), (0.95, width / 2), (-0.25, width / 2)])
    drop = rng.uniform(0.3, 0.42)
    for left in (0.42, 0.75):
        sheet.polygon([(left, 0), (left + 0.19, 0), (left + 0.19, drop), (left, drop * rng.uniform(0.85, 1.1))])


def _mug(sheet: _Sheet, rng: np.random.Generator) -> None:
    taper, height = rng.uniform(0.0, 0.1), rng.uniform(0.6, 0.76)
    sheet.ellipse(0.42, 0, 0.5, height * 0.66)
    sheet.ellipse(0.42, 0, 0.3, height * 0.42, erase=True)
    sheet.polygon([(-0.8, -height), (0.42, -height), (0.42 - taper, height), (-0.8 + taper, height)])
    sheet.ellipse(-0.19, height, 0.61 - taper, 0.1)
    sheet.ellipse(-0.19, -height, 0.61, 0.1)


def _star(sheet: _Sheet, rng: np.random.Generator) -> None:
    inner = rng.uniform(0.38, 0.48)
    angle = np.radians(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2 == 0, 0.98, inner * 0.98)
    sheet.polygon(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1))


def _umbrella(sheet: _Sheet, rng: np.random.Generator) -> None:
    width, deep = rng.uniform(0.11, 0.16), rng.uniform(0.66, 0.82)
    sheet.polygon(_arc(0, 0, 0.95, 180, 360, deep))
    for middle in (-0.63, 0.0, 0.63):
        sheet.ellipse(middle, 0.02, 0.3, 0.17, erase=True)
    sheet.stroke([(0, -deep * 0.95 - 0.12), (0, 0.75)], width)
    hook = rng.uniform(0.17, 0.23)
    sheet.stroke(_arc(hook, 0.75, hook, 180, 10), width)


_DRAWINGS: dict[str, Callable[[_Sheet, np.random.Generator], None]] = {
    "anchor": _anchor,
    "arrow": _arrow,
    "bolt": _bolt,
    "butterfly": _butterfly,
    "crescent": _crescent,
    "fish": _fish,
    "heart": _heart,
    "house": _house,
    "key": _key,
    "mug": _mug,
    "star": _star,
    "umbrella": _umbrella,
}

CLASS_NAMES: tuple[str, ...] = tuple(_DRAWINGS)
"""Names of the classes; a label is an index into this tuple."""


@functools.cache
def outline(label: int, variant: int) -> Outline:
    """Returns one drawing of a class as polygons.

    Args:
        label: index into `CLASS_NAMES`.
        variant: which drawing, 0 to `VARIANTS` - 1.

    Returns:
        Arrays (points, 2) of x (right) and y (down), centred on the bounding box, enclosing an area of 1.
    """
    sheet = _Sheet()
    _DRAWINGS[CLASS_NAMES[label]](sheet, np.random.default_rng((label, variant)))
    rings, _ = cv2.findContours(sheet.ink, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # Thin to every third point: enough for smooth bends, few enough to fill quickly.
    polygons = [ring[::3, 0].astype(np.float64) for ring in rings if len(ring) > 30]
    everything = np.concatenate(polygons)
    centre = (everything.min(axis=0) + everything.max(axis=0)) / 2
    scale = 1 / math.sqrt(np.count_nonzero(sheet.ink))
    return tuple((polygon - centre) * scale for polygon in polygons)
