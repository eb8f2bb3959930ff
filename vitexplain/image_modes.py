"""From every way a file stores its pixels to 8-bit RGB as a viewer shows it."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

__all__ = ["to_rgb"]

_TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_270,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_90,),
}
_ORIENTATION = 0x0112


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns a loaded picture of any mode into upright 8-bit RGB.

    Args:
        image: any Pillow image whose pixels are loaded; it is left as it is.

    Returns:
        A new image in mode RGB without metadata, so that nothing can rotate it a second time.

    Raises:
        ValueError: Pillow knows no way from this mode to RGB.
    """
    turns = _TURNS.get(_orientation(image), ())
    if image.mode == "F" or image.mode == "I" or image.mode.startswith("I;"):
        image = _shallow(image)
    elif image.mode == "CMYK" and image.info.get("icc_profile"):
        image = _through_profile(image, image.info["icc_profile"])
    elif image.mode == "LAB":
        image = _convert_profile(image, ImageCms.createProfile("LAB"))
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    image = image.convert("RGB")
    for turn in turns:
        image = image.transpose(turn)
    image.info = {}
    return image


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # a picture with a broken EXIF block is still a picture
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def _shallow(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    if image.mode != "F" and values.min() >= 0 and values.max() <= 65535:
        grey: npt.NDArray[Any] = (values.astype(np.uint32) + 128) // 257
    else:
        grey = _stretch(values.astype(np.float64), keep_ranges=image.mode == "F")
    shallow = Image.fromarray(grey.astype(np.uint8))
    if isinstance(transparent, int):
        shallow.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return shallow


def _stretch(values: npt.NDArray[np.float64], keep_ranges: bool) -> npt.NDArray[np.float64]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    if keep_ranges and low >= 0 and high <= 255:
        return np.rint(values * 255 if high <= 1 else values)
    return np.rint((values - low) * (255 / (high - low))) if high > low else np.zeros_like(values)


def _through_profile(image: Image.Image, profile: bytes) -> Image.Image:
    with contextlib.suppress(Exception):  # a broken or foreign profile: Pillow's plain conversion is next best
        return _convert_profile(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    return image


def _convert_profile(image: Image.Image, profile: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if converted is None:
        raise ValueError("the colour profile did not apply")
    return converted
