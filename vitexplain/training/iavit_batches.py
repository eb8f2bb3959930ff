"""Batches for IA-ViT by their number: readings kept in memory, or labelled pictures, cropped and mirrored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..data.batches import view_example
from ..data.example import Example
from ..errors import InputError
from ..iavit.trunk import TrunkReading, read_frozen
from ..models.adapter import ModelAdapter
from ..preprocessing import Preprocessing
from .iavit_learners import LabelledImages
from .iavit_settings import IAViTSettings

_ORDER, _CROPS = range(2)  # independent random streams


def read_images(adapter: ModelAdapter, batches: Iterable[Any], limit: int | None, *, attention: bool) -> TrunkReading:
    """Reads a frozen model on the first images of some batches; on the CPU, in float32, all images in one size.

    Args:
        adapter: the model.
        batches: of normalised images, or tuples that begin with them.
        limit: how many images are read at most; None reads all.
        attention: whether the attention that patches receive is read.

    Raises:
        InputError: there are no images, or they differ in size.
    """
    from .diffmask_module import images_of  # imports Lightning

    parts: list[TrunkReading] = []
    left = limit
    for batch in batches:
        images = images_of(batch)[:left]
        parts.append(TrunkReading(*(each.float().cpu() for each in read_frozen(adapter, images, attention=attention))))
        if parts[-1].tokens.shape[1:] != parts[0].tokens.shape[1:]:
            raise InputError("found images of several sizes, expected one: an interpreter learns from one grid")
        left = None if left is None else left - len(images)
        if left == 0:
            break
    if not parts:
        raise InputError("found no batches of images, expected at least one")
    return TrunkReading(*(torch.cat(each) for each in zip(*parts, strict=True)))


def rows_of(reading: TrunkReading, places: Sequence[int] | slice) -> TrunkReading:
    """Some images of a reading."""
    return TrunkReading(*(each[places] for each in reading))


class ReadingBatches(Dataset[TrunkReading]):
    """Batches of readings in a new order each time all have been seen.

    Args:
        readings: of all images.
        settings: the recipe.
    """

    def __init__(self, readings: TrunkReading, settings: IAViTSettings) -> None:
        self.readings, self.settings = readings, settings

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> TrunkReading:
        return rows_of(self.readings, places_in_step(step, len(self.readings.tokens), self.settings))


class PictureBatches(Dataset[LabelledImages]):
    """Batches of pictures with labels in a new order each time all have been seen, cropped and mirrored.

    Args:
        examples: with a class.
        preprocessing: how pictures become the model's input.
        settings: the recipe.
        num_classes: C.
    """

    def __init__(
        self, examples: Sequence[Example], preprocessing: Preprocessing, settings: IAViTSettings, num_classes: int
    ) -> None:
        self.examples, self.preprocessing = examples, preprocessing
        self.settings, self.num_classes = settings, num_classes

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> LabelledImages:
        places = places_in_step(step, len(self.examples), self.settings)
        batch = labelled_images([self.examples[place] for place in places], self.preprocessing, self.num_classes)
        rng = np.random.default_rng((self.settings.seed, _CROPS, step))
        return LabelledImages(cropped(batch.images, self.settings, rng), batch.classes)


def labelled_images(examples: Sequence[Example], preprocessing: Preprocessing, num_classes: int) -> LabelledImages:
    """Examples as the model sees them, with their first label.

    Raises:
        InputError: a picture cannot be read, or an example has no class of the model.
    """
    bare = [replace(example, mask=None, boxes=None, size=None) for example in examples]  # nothing there is looked at
    views = [view_example(example, preprocessing) for example in bare]
    for view in views:
        if not view.labels or not 0 <= view.labels[0] < num_classes:
            raise InputError(
                f"found the labels {view.labels} of {view.name!r}, expected a class from 0 to {num_classes - 1} first"
            )
    return LabelledImages(
        torch.stack([view.inputs for view in views]), torch.tensor([view.labels[0] for view in views])
    )


def labelled_batches(
    examples: Sequence[Example], preprocessing: Preprocessing, num_classes: int, batch_size: int
) -> Iterator[LabelledImages]:
    """All examples in their order, as the model sees them."""
    for start in range(0, len(examples), batch_size):
        part = [examples[place] for place in range(start, min(start + batch_size, len(examples)))]
        yield labelled_images(part, preprocessing, num_classes)


def cropped(images: Tensor, settings: IAViTSettings, rng: np.random.Generator) -> Tensor:
    """Each image at a random place, of a random share of its area, and mirrored or not; bilinear, the size stays.

    Args:
        images: (B, channels, H, W).
        settings: `smallest_crop` and `flip`.
        rng: decides.
    """
    count = len(images)
    sides = np.sqrt(rng.uniform(settings.smallest_crop, 1.0, count))
    corners = rng.uniform(-1, 1, (count, 2)) * (1 - sides)[:, None]
    mirrored = np.where(settings.flip & (rng.random(count) < 0.5), -1.0, 1.0)
    if settings.smallest_crop == 1:  # nothing moves, so no pixel is mixed with its neighbours
        flips = torch.from_numpy(mirrored < 0)[:, None, None, None]
        return torch.where(flips, images.flip(-1), images)
    maps = np.zeros((count, 2, 3))
    maps[:, 0, 0], maps[:, 1, 1], maps[:, :, 2] = sides * mirrored, sides, corners
    grid = F.affine_grid(torch.from_numpy(maps).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def places_in_step(step: int, count: int, settings: IAViTSettings) -> list[int]:
    """Which of `count` images a step sees."""
    numbers = range(step * settings.batch_size, (step + 1) * settings.batch_size)
    return [int(_order(count, settings.seed, number // count)[number % count]) for number in numbers]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(count)
