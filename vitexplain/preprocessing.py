"""From a picture to the numbers a model was trained on, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile
from torch import Tensor, nn

from vitexplain.errors import InputError, OptionError, UnsupportedModelError
from vitexplain.geometry import Placement
from vitexplain.images import MAX_PIXELS, ImageSource, load_image

__all__ = ["CROP_MODES", "INTERPOLATIONS", "Preprocessing"]

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Names of the ways to resize."""

CROP_MODES = ("center", "squash", "border")
"""Names of the ways to bring a picture into the model's shape."""

_LEVELS = "; those of levels up to 255 divided by 255"


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become model inputs: resize, crop, scale to [0, 1], normalise.

    With ``scaled = floor(size / crop_fraction)``, the crop modes are

    - ``"center"``: resize until `scaled` is just covered, cut out the centre; the aspect ratio stays;
    - ``"squash"``: resize to `scaled` whatever the aspect ratio, cut out the centre;
    - ``"border"``: resize until the picture just fits into `scaled`, pad with the mean colour or cut to `size`.

    The result equals timm's evaluation transform of the same settings, pixel for pixel.

    Attributes:
        size: height and width of the input in pixels.
        mean: mean of each of the three channels, on the scale [0, 1].
        std: standard deviation of each channel, on the same scale: above 0 and at most 1.
        interpolation: one of `INTERPOLATIONS`.
        crop_fraction: part of the resized picture that the crop keeps, in (0, 1].
        crop_mode: one of `CROP_MODES`.

    Raises:
        OptionError: a value is outside what is said above.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_fraction: float = 0.9
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):  # lists come from JSON
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        _check_choice("crop_mode", self.crop_mode, CROP_MODES)
        if not _numbers(self.size, 2) or not all(isinstance(side, int) and side > 0 for side in self.size):
            raise OptionError(f"size is {self.size!r}, expected (height, width) in whole pixels, such as (224, 224).")
        if not _numbers(self.mean, 3) or not 0 <= min(self.mean) <= max(self.mean) <= 1:
            raise OptionError(f"mean is {self.mean!r}, expected three numbers from 0 to 1 (red, green, blue){_LEVELS}")
        if not _numbers(self.std, 3) or not 0 < min(self.std) <= max(self.std) <= 1:
            raise OptionError(
                f"std is {self.std!r}, expected three numbers above 0 and at most 1 (red, green, blue){_LEVELS}"
            )
        if not _numbers((self.crop_fraction,), 1) or not 0 < self.crop_fraction <= 1:
            raise OptionError(f"crop_fraction is {self.crop_fraction!r}, expected a number above 0 and at most 1.")

    @classmethod
    def from_timm(cls, model: nn.Module) -> Preprocessing:
        """Reads off how a timm model wants its inputs.

        Where the model was built for another input size than its pretrained weights, the model's own size counts.

        Args:
            model: a model made by ``timm.create_model``; any module falls back on timm's defaults (224 pixels, bicubic,
                ImageNet mean and deviation).

        Raises:
            UnsupportedModelError: the model takes other than three channels.
        """
        from timm.data import config as data_config

        resolve: Any = data_config.resolve_model_data_config
        config = resolve(model)
        channels, height, width = config["input_size"]
        patch_embed = getattr(model, "patch_embed", None)
        built_for = getattr(patch_embed, "img_size", None)
        if isinstance(built_for, (tuple, list)) and len(built_for) == 2:
            height, width = built_for
        stem = [] if patch_embed is None else [each for each in patch_embed.modules() if hasattr(each, "in_channels")]
        taken = stem[0].in_channels if stem else channels
        if taken != 3 or len(config["mean"]) != 3:
            raise UnsupportedModelError(
                f"the model takes {taken} channels, expected 3 (red, green, blue). Prepare its inputs yourself and "
                f"pass tensors."
            )
        return cls(
            size=(int(height), int(width)),
            mean=tuple(float(value) for value in config["mean"]),
            std=tuple(float(value) for value in config["std"]),
            interpolation=config["interpolation"],
            crop_fraction=float(config["crop_pct"]),
            crop_mode=config["crop_mode"],
        )

    def replace(self, **overrides: Any) -> Preprocessing:
        """Returns a copy with some settings changed.

        Raises:
            OptionError: an unknown setting or a bad value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            _check_choice("the setting", name, known)
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain JSON types; ``Preprocessing(**settings)`` reads them back."""
        settings = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    def view(self, image: ImageSource) -> Image.Image:
        """Returns what the model sees of a picture, before normalisation.

        Args:
            image: a Pillow image, or anything else that `load_image` reads.

        Returns:
            An RGB image of `size`.

        Raises:
            InputError: the picture cannot be read.
        """
        in_memory = isinstance(image, Image.Image) and not isinstance(image, ImageFile.ImageFile)
        picture = load_image(image, max_pixels=None if in_memory else MAX_PIXELS)
        black_or_mean = self.mean if self.crop_mode == "border" else (0.0, 0.0, 0.0)
        red, green, blue = (round(255 * value) for value in black_or_mean)
        placement = self.placement((picture.height, picture.width))
        return placement.pixels(picture, INTERPOLATIONS[self.interpolation], (red, green, blue))

    def view_mask(self, mask: npt.NDArray[np.integer | np.bool_]) -> npt.NDArray[np.int8]:
        """Returns what the model sees of a mask, by nearest neighbour.

        Args:
            mask: (H, W) in the pixels of the upright picture: 1 object, 0 background, -1 left out.

        Returns:
            int8 (h, w) of `size`, at the same places as in `view`; padding is left out (-1).

        Raises:
            InputError: another shape, or other values.
        """
        if mask.ndim != 2 or not mask.size:
            raise InputError(f"found a mask of shape {mask.shape}, expected (H, W) with at least one pixel.")
        return self.placement((mask.shape[0], mask.shape[1])).mask(mask)

    def view_boxes(self, boxes: npt.ArrayLike, picture_size: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Returns what the model sees of boxes.

        Args:
            boxes: (n, 4) x0, y0, x1, y1 in pixels of the upright picture, edges exclusive; what lies beside the
                picture is cut off.
            picture_size: height and width of that picture in pixels (Pillow's `size`, turned round).

        Returns:
            float64 (m, 4) in pixels of the input, at the same places as in `view`, clipped to it; boxes that the crop
            cuts away are left out, the others keep their order.

        Raises:
            InputError: another shape, numbers that are not finite, or edges in the wrong order.
        """
        if len(picture_size) != 2 or min(picture_size) < 1:
            raise InputError(f"found a picture of size {picture_size}, expected height and width of at least 1.")
        return self.placement(picture_size).boxes(boxes)

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Prepares one picture or a list of them for the model.

        Args:
            images: a Pillow image or anything else that `load_image` reads, or a list or tuple of those.

        Returns:
            float32, (3, h, w) for one picture and (B, 3, h, w) for a list.

        Raises:
            InputError: a picture cannot be read, or the list is empty.
        """
        if isinstance(images, (list, tuple)):
            if not images:
                raise InputError("found an empty list of images, expected at least one.")
            return self._normalised(np.stack([np.asarray(self.view(image)) for image in images]))
        return self._normalised(np.asarray(self.view(cast("ImageSource", images))))

    def picture(self, inputs: Tensor) -> npt.NDArray[np.uint8]:
        """Undoes the normalisation, for looking at what went into the model.

        Args:
            inputs: (B, 3, h, w), any floating type and device.

        Returns:
            uint8 RGB (B, h, w, 3), rounded and clamped.

        Raises:
            InputError: the tensor has another shape.
        """
        if inputs.ndim != 4 or inputs.shape[1] != 3:
            raise InputError(f"found inputs of shape {tuple(inputs.shape)}, expected (B, 3, h, w).")
        values = inputs.detach().to(torch.float32)
        mean, std = (values.new_tensor(numbers).view(3, 1, 1) for numbers in (self.mean, self.std))
        pixels = torch.nan_to_num((values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        picture: npt.NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return picture

    def placement(self, picture_size: tuple[int, int]) -> Placement:
        """Where an upright picture of this height and width comes to lie in the input."""
        height, width = picture_size
        scaled_height, scaled_width = (math.floor(side / self.crop_fraction) for side in self.size)
        if self.crop_mode == "squash":
            resized = scaled_height, scaled_width
        elif self.crop_mode == "center" and scaled_height == scaled_width:
            # timm rounds down for square inputs and to nearest for all others
            shorter = min(width, height)
            resized = int(scaled_height * height / shorter), int(scaled_height * width / shorter)
        else:
            ratios = height / scaled_height, width / scaled_width
            ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
            resized = max(1, round(height / ratio)), max(1, round(width / ratio))
        return Placement.centred(picture_size, resized, self.size)

    def _normalised(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        # in NumPy, since each thread that reads pictures would bring up torch's threads against those of the model
        values = np.array(np.moveaxis(pixels, -1, -3), dtype=np.float32, order="C")
        mean, std = (np.array(numbers, dtype=np.float32).reshape(3, 1, 1) for numbers in (self.mean, self.std))
        values /= np.float32(255)
        values -= mean
        values /= std
        return torch.from_numpy(values)


def _check_choice(what: str, value: object, possible: Sequence[str] | dict[str, Any]) -> None:
    if not isinstance(value, str) or value not in possible:
        raise OptionError(f"{what} is {value!r}, expected one of {', '.join(possible)}.")


def _numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )
