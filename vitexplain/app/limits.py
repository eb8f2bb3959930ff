"""What the app accepts from its visitors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import InputError
from ..images import load_image

_MEGA = 10**6


@dataclass(frozen=True)
class Limits:
    """Largest uploads.

    Attributes:
        image_bytes: of a picture file.
        image_pixels: width × height of a picture, read from its header before it is decoded.
        checkpoint_bytes: of a file of weights; also what the server takes at all.
    """

    image_bytes: int = 20 * _MEGA
    image_pixels: int = 40 * _MEGA
    checkpoint_bytes: int = 500 * _MEGA


def read_upload(path: str | os.PathLike[str], limits: Limits) -> bytes:
    """The content of an uploaded picture, once it is known to be one.

    Raises:
        InputError: it is too large, or no picture that can be read. The message names the file, and no path.
    """
    name = Path(path).name
    try:
        size = os.stat(path).st_size
        if size > limits.image_bytes:
            raise InputError(
                f"{name} has {size / _MEGA:.1f} MB, expected at most {limits.image_bytes / _MEGA:g} MB: scale the "
                "picture down first"
            )
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{name} is no longer there: choose the picture again") from error
    try:
        open_upload(content, limits)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return content


def open_upload(content: bytes, limits: Limits) -> Image.Image:
    """The picture in the content of a file, as 8-bit RGB.

    Raises:
        InputError: it has too many pixels, or cannot be read.
    """
    return load_image(content, max_pixels=limits.image_pixels)
