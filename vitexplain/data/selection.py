"""Parts of a data set: the first few, every other, shuffled, with small objects only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InputError
from ..images import load_image
from .entries import Examples, ExampleSequence, FileEntry
from .example import Example


def first(examples: ExampleSequence, count: int) -> ExampleSequence:
    """The first examples, or all where there are fewer.

    Raises:
        InputError: `count` is below 1.
    """
    if count < 1:
        raise InputError(f"found count={count}, expected at least 1 example")
    return examples.select(range(min(count, len(examples))))


def every_other(examples: ExampleSequence, start: int = 0) -> ExampleSequence:
    """The examples at even (0) or odd (1) places: two halves that do not overlap.

    Raises:
        InputError: `start` is neither 0 nor 1.
    """
    if start not in (0, 1):
        raise InputError(f"found start={start}, expected 0 for even or 1 for odd places")
    return examples.select(range(start, len(examples), 2))


def shuffled(examples: ExampleSequence, seed: int) -> ExampleSequence:
    """All examples in an order that the seed alone decides."""
    return examples.select(np.random.default_rng(seed).permutation(len(examples)).tolist())


def chosen(examples: Sequence[Example], places: Sequence[int]) -> Sequence[Example]:
    """The examples at these places, in this order, not opened where they need not be."""
    if isinstance(examples, ExampleSequence):
        return examples.select(places)
    return [examples[place] for place in places]


def held_out(
    examples: Sequence[Example], order: Sequence[int], count: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """The first so many examples of an order, to measure on, and the rest, to train on; no picture is in both.

    Args:
        examples: of which several may show one picture: what stands before ``#`` in their names tells (`Example`). In
            sequences other than lists and readers' examples, each counts as a picture of its own.
        order: of all their places.
        count: how many are kept; with them go the other examples of their pictures.
    """
    pictures = _pictures(examples)
    kept = {pictures[place] for place in order[:count]}
    measured = [place for place in order if pictures[place] in kept]
    trained = [place for place in order if pictures[place] not in kept]
    return chosen(examples, measured), chosen(examples, trained)


def apart_from(examples: Sequence[Example], others: Sequence[Example]) -> Sequence[Example]:
    """The examples that show no picture of `others`, which come from the same data set; see `held_out`."""
    left_out = set(_pictures(others))
    return chosen(examples, [place for place, picture in enumerate(_pictures(examples)) if picture not in left_out])


def one_a_picture(examples: ExampleSequence) -> ExampleSequence:
    """The first example of each picture file, for what looks at pictures alone; others than of files stay all."""
    entries = examples.entries if isinstance(examples, Examples) else ()
    places: dict[object, int] = {}
    for place, entry in enumerate(entries):
        places.setdefault(entry.image if isinstance(entry, FileEntry) else place, place)
    return examples.select(list(places.values())) if entries else examples


def covering_less_than(examples: ExampleSequence, share: float) -> ExampleSequence:
    """The examples whose object covers less than a share of the picture; see `coverage`.

    Every mask is read. Examples whose files cannot be read stay, so that `load_examples` reports them.

    Args:
        examples: with masks or boxes.
        share: above 0 and at most 1; the usual limit for pointing is 0.5.

    Raises:
        InputError: the share is out of range, or an example has neither mask nor boxes.
    """
    if not 0 < share <= 1:
        raise InputError(f"found share={share}, expected a number above 0 and at most 1")
    return examples.select([index for index in range(len(examples)) if _covers_less(examples, index, share)])


def coverage(example: Example) -> float:
    """The share of the picture that the object covers: its pixels in the mask, or else the area of its boxes together.

    Raises:
        InputError: there is neither a mask nor boxes, or the picture cannot be read.
    """
    if example.mask is not None:
        return float(np.mean(example.mask == 1))
    if example.boxes is None:
        raise InputError(f"{example.name!r} has neither mask nor boxes, expected one of them to tell what it covers")
    height, width = example.size or _size(example)
    return united_area(np.clip(example.boxes, 0, [width, height, width, height])) / (height * width)


def united_area(boxes: npt.NDArray[np.float64]) -> float:
    """The area that boxes (n, 4) of x0, y0, x1, y1 cover together."""
    across, down = np.unique(boxes[:, 0::2]), np.unique(boxes[:, 1::2])
    covered = np.zeros((max(len(down) - 1, 0), max(len(across) - 1, 0)), bool)
    for x0, y0, x1, y1 in boxes:
        rows, columns = np.searchsorted(down, [y0, y1]), np.searchsorted(across, [x0, x1])
        covered[slice(*rows), slice(*columns)] = True
    return float(np.diff(down) @ covered @ np.diff(across)) if covered.size else 0.0


def _pictures(examples: Sequence[Example]) -> list[str]:
    """The picture that each shows, by what stands before ``#`` in its name."""
    return [name.rpartition("#")[0] or name for name in _names(examples)]


def _names(examples: Sequence[Example]) -> Sequence[str]:
    if isinstance(examples, ExampleSequence):
        return examples.names
    if isinstance(examples, list | tuple):
        return [example.name for example in examples]
    return [str(place) for place in range(len(examples))]  # names would take opening every file


def _covers_less(examples: Sequence[Example], index: int, share: float) -> bool:
    try:
        example = examples[index]
    except InputError:
        return True
    if example.mask is None and example.boxes is None:
        coverage(example)  # says what is missing
    try:
        return coverage(example) < share
    except InputError:
        return True


def _size(example: Example) -> tuple[int, int]:
    picture = example.image if isinstance(example.image, Image.Image) else load_image(example.image)
    return picture.height, picture.width
