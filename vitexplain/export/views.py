"""Pictures of an export: overlays or bare heatmaps, encoded as image files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from ..errors import ExportError
from ..explanation import Explanation
from ..render import SIGNED_COLORMAP, UNSIGNED_COLORMAP, Pixels, colourise

SUFFIXES: Mapping[str, str] = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}
"""Suffix of the files of each format."""

_QUALITY: Mapping[str, list[int]] = {
    "jpeg": [cv2.IMWRITE_JPEG_QUALITY, 90],
    "png": [cv2.IMWRITE_PNG_COMPRESSION, 3],
    "webp": [cv2.IMWRITE_WEBP_QUALITY, 90],
}


def draw(explanation: Explanation, view: str, pictures: Pixels | None = None) -> Pixels:
    """Draws a batch; heatmaps are brought to pixels and normalised on the model's device.

    Args:
        explanation: of b images.
        view: ``"overlay"`` or ``"heatmap"``.
        pictures: what lies under the heatmaps, uint8 (b, H, W, 3); by default the model's input.

    Returns:
        uint8 RGB (b, K, H, W, 3).
    """
    if view == "overlay":
        drawn: np.ndarray[Any, Any] = explanation.overlay(pictures)
    else:
        drawn = colourise(explanation.heatmap(), SIGNED_COLORMAP if explanation.signed else UNSIGNED_COLORMAP)
    return drawn[:, None] if drawn.ndim == 4 else drawn


def encode(picture: Pixels, view_format: str) -> bytes:
    """A picture as the content of an image file.

    Args:
        picture: uint8 RGB (H, W, 3).
        view_format: one of `SUFFIXES`.

    Raises:
        ExportError: the format cannot hold it.
    """
    suffix = SUFFIXES[view_format]
    done, content = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), _QUALITY[view_format])
    if not done:
        raise ExportError(f"a picture of {picture.shape[1]}x{picture.shape[0]} pixels cannot be written as {suffix}")
    return content.tobytes()
