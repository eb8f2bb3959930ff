"""Maps as transparent layers over a picture, and pictures as addresses that hold them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from ..colormaps import SIGNED_COLORMAP, UNSIGNED_COLORMAP, color_table
from ..patch_pixels import Extent
from ..render import Pixels
from ..showing import png_address
from .views import Scale, heat_of

_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Layer:
    """One map to be laid over its picture.

    Attributes:
        smooth: address of a PNG in the picture's size, bilinear between patch centres.
        patches: address of a PNG with one pixel a patch; in the picture's size where patches take up less or more.
    """

    smooth: str
    patches: str


def layer(
    scores: Tensor, size: tuple[int, ...], *, signed: bool, scale: Scale = "map", extent: Extent | None = None
) -> Layer:
    """A map (h, w) as layers whose opacity grows with the heat, as in `render.overlay`.

    Args:
        scores: (h, w), raw.
        size: height and width of the picture in pixels.
        signed: scores below zero are evidence against the target.
        scale: ``"map"`` for the map's own range, or ``(low, high)``.
        extent: pixels (height, width) of the picture that the patches take up; None for just all of it.
    """
    smooth = heat_of(scores, size, signed=signed, scale=scale, extent=extent)
    own = (scores.shape[0], scores.shape[1]) if extent is None else size
    patches = heat_of(scores, own, signed=signed, scale=scale, smooth=False, extent=extent)
    return Layer(*(png_address(_coloured(each, signed)) for each in (smooth, patches)))


def picture_address(picture: Pixels) -> str:
    """A picture (H, W, 3) as an address that holds all of it, as a JPEG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _coloured(heat: Tensor, signed: bool) -> Image.Image:
    """Heat (H, W) as a picture of 256 colours, each with its own opacity."""
    image = Image.fromarray((heat * 255).round().byte().numpy(), mode="P")
    image.putpalette(color_table(SIGNED_COLORMAP if signed else UNSIGNED_COLORMAP).tobytes())
    level = np.linspace(0, 1, 256)
    strength = np.abs(2 * level - 1) if signed else level
    image.info["transparency"] = np.rint(255 * strength * (2 - strength)).astype(np.uint8).tobytes()
    return image
