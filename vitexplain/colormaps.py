"""Tables of 256 colours: perceptually uniform ones for strength, diverging ones for signed evidence."""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vitexplain.errors import UnknownNameError

__all__ = ["COLORMAPS", "SIGNED_COLORMAP", "UNSIGNED_COLORMAP", "color_table"]

_OPENCV_TABLES = {
    "inferno": cv2.COLORMAP_INFERNO,
    "magma": cv2.COLORMAP_MAGMA,
    "plasma": cv2.COLORMAP_PLASMA,
    "viridis": cv2.COLORMAP_VIRIDIS,
    "cividis": cv2.COLORMAP_CIVIDIS,
    "turbo": cv2.COLORMAP_TURBO,
    "jet": cv2.COLORMAP_JET,
}
# lightness of the middle and of the ends of the diverging tables
_DIVERGING_TABLES = {"blue_white_red": (97.0, 34.0), "blue_black_red": (8.0, 66.0)}

COLORMAPS = (*_OPENCV_TABLES, *_DIVERGING_TABLES, "grey")
"""Names that `colourise` and `overlay` know."""

UNSIGNED_COLORMAP = "inferno"
"""Default for heatmaps that run from nothing (0) to most (1)."""

SIGNED_COLORMAP = "blue_white_red"
"""Default for heatmaps with evidence against (0), none (0.5) and for (1)."""


@functools.cache
def color_table(colormap: str) -> npt.NDArray[np.uint8]:
    """Returns the 256 colours of a map, read-only uint8 RGB (256, 3).

    Raises:
        UnknownNameError: no such colour map.
    """
    if colormap in _OPENCV_TABLES:
        ramp = np.arange(256, dtype=np.uint8)[:, None]
        table: npt.NDArray[Any] = cv2.applyColorMap(ramp, _OPENCV_TABLES[colormap])[:, 0, ::-1]  # BGR to RGB
    elif colormap in _DIVERGING_TABLES:
        table = _diverging(*_DIVERGING_TABLES[colormap])
    elif colormap == "grey":
        table = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    else:
        raise UnknownNameError.listing("colour map", colormap, COLORMAPS)
    colors: npt.NDArray[np.uint8] = np.array(table, dtype=np.uint8)
    colors.setflags(write=False)
    return colors


def _diverging(middle_lightness: float, end_lightness: float) -> npt.NDArray[np.uint8]:
    """Builds a table whose two arms have equal lightness at equal distance from the middle (CIELAB)."""
    distance = (np.arange(128, dtype=np.float32) / 127)[:, None]
    arms = []
    for hue, chroma in ((274.0, 52.0), (33.0, 68.0)):
        lightness = middle_lightness + (end_lightness - middle_lightness) * distance
        angle = np.float32(np.deg2rad(hue))
        color = chroma * np.sin(distance * np.float32(np.pi / 2))
        lab = np.concatenate([lightness, color * np.cos(angle), color * np.sin(angle)], axis=1)
        rgb = cv2.cvtColor(lab[None].astype(np.float32), cv2.COLOR_Lab2RGB)[0]
        arms.append(np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8))
    return np.concatenate([arms[0][::-1], arms[1]])
