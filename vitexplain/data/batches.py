"""From examples to batches of model inputs, with masks and boxes at the same places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from ..images import load_image
from ..preprocessing import Preprocessing
from .entries import ExampleSequence
from .example import Example

_FEW = 3  # of many reasons, how many an error lists


@dataclass(frozen=True)
class Unreadable:
    """An example that could not be used, and why.

    Attributes:
        name: the example's.
        reason: what was found and expected.
    """

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """B examples as the model sees them.

    Attributes:
        names: B names.
        inputs: (B, 3, H, W) float32, normalised.
        labels: for each image the classes that count as right; empty where unknown.
        masks: (B, H, W) int8: 1 object, 0 background, -1 left out (also padding, and everything in an image without
            mask); None if no image of the batch has a mask.
        boxes: B tensors (n, 4) float64 x0, y0, x1, y1 in pixels of the input, edges exclusive, n = 0 where the crop
            shows none; None if no image of the batch has boxes.
        unreadable: the examples before and among these that could not be used; with the last batch also those after it.
    """

    names: tuple[str, ...]
    inputs: Tensor
    labels: tuple[tuple[int, ...], ...]
    masks: Tensor | None
    boxes: list[Tensor] | None
    unreadable: tuple[Unreadable, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def load_examples(
    examples: Sequence[Example], preprocessing: Preprocessing, *, batch_size: int = 32, workers: int = 0
) -> Iterator[ExampleBatch]:
    """Batches of all examples, in their order.

    An example that cannot be read does not end the run: it is left out of its batch, which is smaller then, and
    reported in `ExampleBatch.unreadable`. A batch of which nothing is left is not given.

    Args:
        examples: what a reader gives, a part of it, or a list.
        preprocessing: how pictures, masks and boxes become the model's.
        batch_size: examples a batch; the last may have fewer.
        workers: processes that read ahead; 0 reads in this one. They are started afresh (spawned), so scripts need the
            usual ``if __name__ == "__main__":``.

    Raises:
        InputError: there are no examples, a number is out of range, or none of the examples can be read.
    """
    if not len(examples):
        raise InputError("found no examples, expected at least one; is the selection empty?")
    if batch_size < 1 or workers < 0:
        raise InputError(f"found batch_size={batch_size} and workers={workers}, expected at least 1 and at least 0")
    loader: DataLoader[ExampleView | Unreadable] = DataLoader(
        _Views(examples, preprocessing),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # the loader draws a seed, which must not move the user's random state
    )
    return _readable(loader, len(examples))


@dataclass(frozen=True, eq=False)
class ExampleView:
    """One example as the model sees it.

    Attributes:
        name: the example's.
        inputs: (3, H, W) float32, normalised.
        labels: the classes that count as right.
        mask: (H, W) int8: 1 object, 0 background, -1 left out; None where there is none.
        boxes: (n, 4) float64 x0, y0, x1, y1 in pixels of the input, edges exclusive; None where there are none.
    """

    name: str
    inputs: Tensor
    labels: tuple[int, ...]
    mask: Tensor | None
    boxes: Tensor | None


class _Views(Dataset["ExampleView | Unreadable"]):
    """Examples as the model sees them; goes to worker processes."""

    def __init__(self, examples: Sequence[Example], preprocessing: Preprocessing) -> None:
        self.examples = examples
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> ExampleView | Unreadable:
        name = self.examples.names[index] if isinstance(self.examples, ExampleSequence) else ""
        try:
            example = self.examples[index]
            name = example.name
            return view_example(example, self.preprocessing)
        except InputError as error:
            return Unreadable(name or f"example {index}", str(error))


def view_example(example: Example, preprocessing: Preprocessing) -> ExampleView:
    """Reads an example, and brings picture, mask and boxes to the same places of the model's input.

    Raises:
        InputError: the picture cannot be read, or its annotation is of a picture of another size.
    """
    picture = load_image(example.image)
    size = picture.height, picture.width
    for what, annotated in (("size", example.size), ("mask", None if example.mask is None else example.mask.shape)):
        if annotated is not None and annotated != size:
            turned = " It fits the picture as stored: write the picture upright, without EXIF rotation."
            raise InputError(
                f"the {what} of {example.name!r} is {annotated[0]} x {annotated[1]} (height x width), the upright "
                f"picture {size[0]} x {size[1]}; expected the same.{turned if annotated == size[::-1] else ''}"
            )
    mask = None if example.mask is None else torch.from_numpy(preprocessing.view_mask(example.mask))
    boxes = None if example.boxes is None else torch.from_numpy(preprocessing.view_boxes(example.boxes, size))
    return ExampleView(example.name, preprocessing(picture), example.labels, mask, boxes)


def _collate(views: list[ExampleView | Unreadable]) -> ExampleBatch:
    sound = [view for view in views if isinstance(view, ExampleView)]
    unreadable = tuple(view for view in views if isinstance(view, Unreadable))
    masks: Tensor | None = None
    if any(view.mask is not None for view in sound):
        unknown = torch.full(sound[0].inputs.shape[1:], -1, dtype=torch.int8)
        masks = torch.stack([unknown if view.mask is None else view.mask for view in sound])
    boxes: list[Tensor] | None = None
    if any(view.boxes is not None for view in sound):
        none = torch.from_numpy(np.zeros((0, 4)))
        boxes = [none if view.boxes is None else view.boxes for view in sound]
    return ExampleBatch(
        tuple(view.name for view in sound),
        torch.stack([view.inputs for view in sound]) if sound else torch.zeros(0, 3, 0, 0),
        tuple(view.labels for view in sound),
        masks,
        boxes,
        unreadable,
    )


def _readable(loader: DataLoader[ExampleView | Unreadable], count: int) -> Iterator[ExampleBatch]:
    """The batches that hold something; one is held back, so that the last can report what came after it."""
    held: ExampleBatch | None = None
    lost: tuple[Unreadable, ...] = ()
    for batch in loader:
        lost += batch.unreadable
        if not len(batch):
            continue
        if held is not None:
            yield held
        held, lost = replace(batch, unreadable=lost), ()
    if held is None:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in lost[:_FEW])
        raise InputError(f"none of the {count} examples can be read: {reasons}{'; …' if count > _FEW else ''}")
    yield replace(held, unreadable=held.unreadable + lost)
