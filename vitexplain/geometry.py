"""Where a picture comes to lie in the model's input: one resize and one crop, for pixels, masks and boxes alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import InputError
from .images import MAX_PIXELS


@dataclass(frozen=True)
class Placement:
    """A resize and a crop. All sizes are (height, width) in pixels.

    Attributes:
        source: size of the upright picture.
        resized: its size after resizing.
        corner: top and left of the crop in the resized picture, negative where the crop begins beside it.
        size: size of the crop.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def centred(cls, source: tuple[int, int], resized: tuple[int, int], size: tuple[int, int]) -> Placement:
        """The crop in the middle, rounded as timm rounds; a side that is too short is padded on both ends."""
        top, left = (_middle(side, kept) for side, kept in zip(resized, size, strict=True))
        return cls(source, resized, (top, left), size)

    @property
    def window(self) -> tuple[int, int, int, int]:
        """Top, left, bottom and right of the crop in pixels of the picture, to whole ones; beyond it where padded."""
        scales = [side / new for side, new in zip(self.source, self.resized, strict=True)]
        top, left = (round(edge * scale) for edge, scale in zip(self.corner, scales, strict=True))
        bottom, right = (
            round((edge + kept) * scale) for edge, kept, scale in zip(self.corner, self.size, scales, strict=True)
        )
        return top, left, max(bottom, top + 1), max(right, left + 1)

    def pixels(
        self, picture: Image.Image, resampling: Image.Resampling, fill: int | tuple[int, int, int]
    ) -> Image.Image:
        """The crop of the resized picture.

        Args:
            picture: an image of size `source`.
            resampling: how to resize.
            fill: value of padded pixels.
        """
        (height, width), (new_height, new_width), (top, left) = self.size, self.resized, self.corner
        if new_height * new_width > MAX_PIXELS and min(top, left) >= 0:  # a sliver: make only the part that is kept
            down, across = picture.height / new_height, picture.width / new_width
            right, bottom = min((left + width) * across, picture.width), min((top + height) * down, picture.height)
            return picture.resize((width, height), resampling, box=(left * across, top * down, right, bottom))
        resized = picture.resize((new_width, new_height), resampling)
        canvas = Image.new(picture.mode, (width, height), fill)
        canvas.paste(resized, (-left, -top))
        return canvas

    def mask(self, mask: npt.NDArray[np.integer | np.bool_]) -> npt.NDArray[np.int8]:
        """The part of a mask that the crop shows, by nearest neighbour.

        Args:
            mask: (H, W) of size `source`: 1 object, 0 background, -1 left out.

        Returns:
            int8 of `size`; padding is left out (-1).

        Raises:
            InputError: another shape, or other values.
        """
        if mask.shape != self.source or mask.dtype.kind not in "biu" or np.any((mask < -1) | (mask > 1)):
            raise InputError(
                f"found a mask of shape {mask.shape} and {mask.dtype}, expected {self.source} whole numbers: 1 object, "
                "0 background, -1 left out"
            )
        left_out = 255  # -1, as Pillow sees it
        stored = Image.fromarray(np.ascontiguousarray(mask, np.int8).view(np.uint8))
        return np.array(self.pixels(stored, Image.Resampling.NEAREST, left_out)).view(np.int8)

    def boxes(self, boxes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The parts of boxes that the crop shows.

        Args:
            boxes: (n, 4) x0, y0, x1, y1 in pixels of the picture, edges exclusive; what lies beside the picture is
                cut off.

        Returns:
            float64 (m, 4) in pixels of the crop, in the same order; boxes of which nothing is left are left out.

        Raises:
            InputError: another shape, numbers that are not finite, or edges in the wrong order.
        """
        found = np.asarray(boxes, np.float64)
        if found.ndim != 2 or found.shape[1] != 4 or not np.isfinite(found).all():
            raise InputError(f"found boxes of shape {found.shape}, expected (n, 4) finite numbers: x0, y0, x1, y1")
        if np.any(found[:, :2] > found[:, 2:]):
            wrong = found[np.any(found[:, :2] > found[:, 2:], axis=1)][0].tolist()
            raise InputError(f"found a box {wrong}, expected x0 <= x1 and y0 <= y1")
        (height, width), (new_height, new_width), (top, left) = self.source, self.resized, self.corner
        inside = np.clip(found, 0, [width, height, width, height])
        across, down = new_width / width, new_height / height
        moved = inside * [across, down, across, down] - [left, top, left, top]
        shown = np.clip(moved, 0, [self.size[1], self.size[0], self.size[1], self.size[0]])
        return shown[(shown[:, 0] < shown[:, 2]) & (shown[:, 1] < shown[:, 3])]


def _middle(side: int, kept: int) -> int:
    return round((side - kept) / 2) if side >= kept else -((kept - side) // 2)
