"""One annotated image, as every reader of a data set gives it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Example:
    """One image and one class shown in it; an image with objects of several classes gives several examples.

    Attributes:
        name: unique in the data set and the same in every run, e.g. ``"val/0001.jpg"`` or ``"000139.jpg#chair"``.
        image: the file, or the picture itself.
        labels: the model's classes that count as right for this object; empty where the class is not known.
        mask: (H, W) int8 in the pixels of the upright picture: 1 object, 0 background, -1 left out.
        boxes: (n, 4) float64 in the pixels of the upright picture: x0, y0, x1, y1, edges exclusive.
        size: height and width of the picture in pixels, as the annotation has it; None where it does not say.
    """

    name: str
    image: Path | Image
    labels: tuple[int, ...] = ()
    mask: npt.NDArray[np.int8] | None = None
    boxes: npt.NDArray[np.float64] | None = None
    size: tuple[int, int] | None = None
