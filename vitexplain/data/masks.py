"""Masks from files: 1 object, 0 background, -1 left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InputError
from ..images import MAX_PIXELS

Mask = npt.NDArray[np.int8]

_EXACT_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # JPEG smears values over edges
_GREY = 127  # objects are hardly so many; smooth edges of a white object are brighter
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


class MaskSource(ABC):
    """Where a mask comes from."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files it is read from."""

    @abstractmethod
    def read(self) -> Mask:
        """The mask, int8 (H, W).

        Raises:
            InputError: the files cannot be used.
        """


@dataclass(frozen=True)
class MaskFile(MaskSource):
    """A picture whose pixel values (or palette entries) say what is object.

    Attributes:
        file: the picture.
        objects: values of the object; None for everything above 0 that is not left out.
        ignored: values that are left out.
        background: values of the background; None for all others.
    """

    file: Path
    objects: frozenset[int] | None = None
    ignored: frozenset[int] = frozenset()
    background: frozenset[int] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self) -> Mask:
        values = read_values(self.file)
        ignored = np.isin(values, list(self.ignored))
        shown = (values > 0) & ~ignored if self.objects is None else np.isin(values, list(self.objects))
        if self.objects is None and ignored.any() and not shown.any():
            raise InputError(
                f"the mask {str(self.file)!r} holds nothing but 0 and {', '.join(map(str, sorted(self.ignored)))}, "
                "which is left out; expected values above 0 on the object. If that value is the object, pass ignored=-1"
            )
        mostly_ignored = self.objects is None and np.count_nonzero(ignored) > np.count_nonzero(shown)
        if mostly_ignored and values[shown].max() > _GREY:
            raise InputError(
                f"the mask {str(self.file)!r} holds more of {', '.join(map(str, sorted(self.ignored)))}, which is left "
                f"out, than of other values above 0, up to {values[shown].max()}: grey levels, as of smooth edges, "
                "where the numbers of objects are expected. If white is the object, pass ignored=-1; else number the "
                f"objects from 1 to at most {_GREY}"
            )
        if self.background is not None:
            strange = values[~shown & ~ignored & ~np.isin(values, list(self.background))]
            if strange.size:
                raise InputError(
                    f"the mask {str(self.file)!r} holds the value {strange[0]}, expected "
                    f"{', '.join(map(str, sorted((self.objects or set()) | self.ignored | self.background)))}"
                )
        return combine(shown, ignored)


def combine(shown: npt.NDArray[np.bool_], ignored: npt.NDArray[np.bool_]) -> Mask:
    """One mask from what is object and what is left out; where both hold, it is object.

    Args:
        shown: (H, W).
        ignored: (H, W).
    """
    mask = np.zeros(shown.shape, np.int8)
    mask[ignored] = -1
    mask[shown] = 1
    return mask


def read_values(file: Path) -> npt.NDArray[np.integer[Any]]:
    """The numbers (H, W) that a picture stores: grey values, or palette entries, not their colours.

    Colour pictures count where their three channels are equal.

    Raises:
        InputError: the file is missing, no lossless picture, or in colours.
    """
    stored = _stored(file, (*_ONE_CHANNEL, "RGB"))
    if stored.ndim == 2:
        return stored
    if np.any(stored != stored[..., :1]):
        raise InputError(f"the mask {str(file)!r} is in colours, expected one number a pixel: greyscale or a palette")
    return stored[..., 0]


def read_channels(file: Path) -> npt.NDArray[np.integer[Any]]:
    """Red, green and blue (H, W, 3) of a picture, as stored.

    Raises:
        InputError: the file is missing, no lossless picture, or not in colours.
    """
    return _stored(file, ("RGB",))


def resize_nearest(mask: npt.NDArray[np.bool_], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """A mask (H, W) in another size (height, width), by nearest neighbour."""
    if mask.shape == size:
        return mask
    height, width = size
    resized = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized, bool)


def _stored(file: Path, modes: Iterable[str]) -> npt.NDArray[np.integer[Any]]:
    try:
        with Image.open(file, formats=_EXACT_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"the mask {str(file)!r} has {image.size} pixels, expected at most {MAX_PIXELS:,}")
            if image.mode not in modes:
                raise InputError(
                    f"the mask {str(file)!r} is stored as {image.mode}, expected {' or '.join(modes)}; save it as PNG"
                )
            values: npt.NDArray[np.integer[Any]] = np.asarray(image)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"the mask {str(file)!r} is missing; copy it there") from error
    except Exception as error:  # decoders raise nearly anything on broken content
        raise InputError(
            f"the mask {str(file)!r} cannot be read ({type(error).__name__}: {error}); expected a complete picture in "
            f"a lossless format: {', '.join(_EXACT_FORMATS)}"
        ) from error
    return values.astype(np.uint8) if values.dtype == bool else values
