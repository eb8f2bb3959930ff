"""Batches for patch masks: pictures with labels, and pictures with labels and masks, cropped and mirrored alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..boxes import boxes_to_masks
from ..data.batches import view_example
from ..data.example import Example
from ..errors import InputError
from ..images import load_image
from ..preprocessing import INTERPOLATIONS, Preprocessing
from .patch_mask_settings import PatchMaskSettings

_TRIES = 10
_LABELLED, _ANNOTATED, _CROPS = range(3)  # independent random streams


class PatchMaskBatch(NamedTuple):
    """What one training step sees.

    Attributes:
        images: (B + B_m, 3, H, W) float32, normalised; those with masks last.
        classes: (B + B_m,) int64; -1 for pictures without masks whose label nobody asks for.
        masks: (B_m, H, W) int8: 1 object, 0 background, -1 left out.
    """

    images: Tensor
    classes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Crop:
    """A part of a picture, brought to a size, and mirrored or not: the same for pixels and mask.

    Attributes:
        box: x0, y0, x1, y1 in pixels of the picture, edges exclusive.
        size: height and width of what comes out.
        mirrored: left and right are swapped at the end.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    mirrored: bool

    @classmethod
    def draw(
        cls, picture: tuple[int, int], size: tuple[int, int], settings: PatchMaskSettings, rng: np.random.Generator
    ) -> Crop:
        """A random crop of a picture of the given height and width.

        Its area is uniform between `smallest_crop` and all, the logarithm of its change of aspect ratio uniform too;
        where no such crop fits after some tries, it is the largest in the middle that keeps the proportions of `size`.
        """
        height, width = picture
        mirrored = settings.flip and bool(rng.random() < 0.5)
        squeeze = math.log(settings.most_squeezed)
        for _ in range(_TRIES):
            area = rng.uniform(settings.smallest_crop, 1.0) * height * width
            ratio = math.exp(rng.uniform(-squeeze, squeeze)) * size[1] / size[0]
            down, across = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 1 <= down <= height and 1 <= across <= width:
                top, left = int(rng.integers(height - down + 1)), int(rng.integers(width - across + 1))
                return cls((left, top, left + across, top + down), size, mirrored)
        scale = min(height / size[0], width / size[1])
        down, across = max(1, int(scale * size[0])), max(1, int(scale * size[1]))
        top, left = (height - down) // 2, (width - across) // 2
        return cls((left, top, left + across, top + down), size, mirrored)

    def picture(self, picture: Image.Image, interpolation: str) -> Image.Image:
        """The part of the picture."""
        return self._applied(picture, INTERPOLATIONS[interpolation])

    def mask(self, mask: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """The same part of a mask (H, W), to the nearest pixel."""
        stored = Image.fromarray(np.ascontiguousarray(mask, np.int8).view(np.uint8))
        return np.array(self._applied(stored, Image.Resampling.NEAREST)).view(np.int8)

    def _applied(self, picture: Image.Image, resampling: Image.Resampling) -> Image.Image:
        part = picture.resize((self.size[1], self.size[0]), resampling, box=self.box)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else part


def object_mask(example: Example, size: tuple[int, int]) -> npt.NDArray[np.int8]:
    """The mask of an example in the pixels of its picture; without one, its boxes are the mask.

    Args:
        example: with a mask or boxes.
        size: height and width of the picture.

    Raises:
        InputError: it has neither, or is of a picture of another size.
    """
    if example.size is not None and example.size != size:
        raise InputError(
            f"the annotation of {example.name!r} is of a picture of {example.size}, its picture {size} (height, "
            "width); expected the same"
        )
    if example.mask is not None:
        mask = example.mask
    elif example.boxes is not None:
        mask = boxes_to_masks([torch.from_numpy(example.boxes)], size)[0].numpy().astype(np.int8)
    else:
        raise InputError(f"{example.name!r} has neither mask nor boxes; expected one of them in the annotated examples")
    if mask.shape != size:
        raise InputError(f"the mask of {example.name!r} is {mask.shape}, its picture {size}; expected the same")
    return mask


class PatchMaskBatches(Dataset[PatchMaskBatch]):
    """The batches of a training by their number; each is a function of number and seed alone.

    Labelled examples come in a new order each time all have been seen; annotated ones are drawn with replacement.

    Args:
        labelled: examples with a class, which `distillation` does not ask for; their masks are not looked at.
        annotated: examples with a class, and a mask or boxes.
        preprocessing: how pictures become the model's input.
        settings: the recipe.
        num_classes: C.

    Raises:
        InputError: there are no examples of one kind.
    """

    def __init__(
        self,
        labelled: Sequence[Example],
        annotated: Sequence[Example],
        preprocessing: Preprocessing,
        settings: PatchMaskSettings,
        num_classes: int,
    ) -> None:
        for kind, examples in (("labelled", labelled), ("annotated", annotated)):
            if not len(examples):
                raise InputError(f"found no {kind} examples, expected at least one")
        self.labelled, self.annotated = labelled, annotated
        self.preprocessing, self.settings, self.num_classes = preprocessing, settings, num_classes
        self._whole = preprocessing.replace(crop_fraction=1.0)

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> PatchMaskBatch:
        settings = self.settings
        first = step * settings.batch_size
        places = [self._place(first + index) for index in range(settings.batch_size)]
        rng = np.random.default_rng((settings.seed, _ANNOTATED, step))
        drawn = rng.integers(len(self.annotated), size=settings.annotated_batch_size).tolist()
        plain = [self._view(self.labelled[place], step, index) for index, place in enumerate(places)]
        masked = [
            self._view(self.annotated[place], step, settings.batch_size + index, annotated=True)
            for index, place in enumerate(drawn)
        ]
        images, classes, masks = zip(*plain, *masked, strict=True)
        known = [torch.from_numpy(mask) for mask in masks if mask is not None]
        return PatchMaskBatch(torch.stack(images), torch.tensor(classes), torch.stack(known))

    def _place(self, number: int) -> int:
        """Which labelled example is the number-th that training sees."""
        count = len(self.labelled)
        return int(_order(count, self.settings.seed, number // count)[number % count])

    def _view(
        self, example: Example, step: int, index: int, *, annotated: bool = False
    ) -> tuple[Tensor, int, npt.NDArray[np.int8] | None]:
        """Image, class and mask of an example, cropped and mirrored as its place in the training decides."""
        settings = self.settings
        label = self._label(example) if annotated or not settings.distillation else -1
        picture = load_image(example.image)
        size = (picture.height, picture.width)
        mask = object_mask(example, size) if annotated else None
        rng = np.random.default_rng((settings.seed, _CROPS, step, index))
        if settings.smallest_crop < 1:
            crop = Crop.draw(size, self.preprocessing.size, settings, rng)
            image = self._whole(crop.picture(picture, self.preprocessing.interpolation))
            return image, label, None if mask is None else crop.mask(mask)
        seen = view_example(Example(example.name, picture, (label,), mask), self.preprocessing)
        mirrored = settings.flip and bool(rng.random() < 0.5)
        image = seen.inputs.flip(-1) if mirrored else seen.inputs
        shown = None if seen.mask is None else seen.mask.flip(-1) if mirrored else seen.mask
        return image, label, None if shown is None else shown.numpy()

    def _label(self, example: Example) -> int:
        if not example.labels or not 0 <= example.labels[0] < self.num_classes:
            raise InputError(
                f"found the labels {example.labels} of {example.name!r}, expected a class from 0 to "
                f"{self.num_classes - 1} first"
            )
        return example.labels[0]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, _LABELLED, epoch)).permutation(count)
