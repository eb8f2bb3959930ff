"""Stripes: tiny procedural images whose class is the direction of an object's stripes, with exact masks.

On noise lie a plain ellipse, the same for all classes, and an object: an ellipse with stripes in one of four
directions, of random phase and colours. With two objects, each has a class of its own. A decoy image has the same
objects, but its class is drawn anew, and shown by nothing but the colour of a small marker that hides in one patch
beside the object: what a model must look at is then known, and it is not the object.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .example import Example

__all__ = ["CLASSES", "PATCH", "SIZE", "Stripes", "StripesKind", "make_stripes", "stripes_examples"]

StripesKind = Literal["one", "two", "decoy"]

SIZE: Final = 32
"""Side of an image in pixels."""

PATCH: Final = 4
"""Side of a marker in pixels; a model with patches of this size sees it in one."""

CLASSES: Final = 4
"""Stripes at 0, 45, 90 and 135 degrees."""

_KINDS: tuple[StripesKind, ...] = ("one", "two", "decoy")
_PERIOD = 4.0  # pixels
_MARKERS = np.array([[0.95, 0.1, 0.1], [0.1, 0.9, 0.1], [0.15, 0.2, 1.0], [0.95, 0.9, 0.1]])
_TRIES = 200
_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE] + 0.5


@dataclass(frozen=True, eq=False)
class Stripes:
    """An image with striped objects.

    Attributes:
        image: (32, 32, 3), uint8, RGB.
        classes: labels: of each of the K objects; of the marker alone in a decoy image.
        masks: (K, 32, 32), bool: pixels of each object.
        evidence: (32, 32), bool: pixels that alone decide the label: the marker in a decoy image, else the objects.
    """

    image: NDArray[np.uint8] = field(repr=False)
    classes: tuple[int, ...]
    masks: NDArray[np.bool_] = field(repr=False)
    evidence: NDArray[np.bool_] = field(repr=False)


def make_stripes(seed: int, kind: StripesKind = "one") -> Stripes:
    """Makes the image of a seed; the same arguments give the same pixels every time.

    Args:
        seed: 0 or more.
        kind: ``"one"`` object, ``"two"`` of different classes, or one object and a ``"decoy"`` marker.

    Raises:
        InputError: a negative seed, or another kind.
    """
    if kind not in _KINDS or seed < 0:
        raise InputError(f"found seed {seed!r} and kind {kind!r}, expected 0 or more, and one of {', '.join(_KINDS)}")
    rng = np.random.default_rng((seed, _KINDS.index(kind)))
    count = 2 if kind == "two" else 1
    canvas = rng.normal(0.45, 0.1, (SIZE, SIZE, 3)) + rng.uniform(-0.1, 0.1, 3)
    ellipses = _apart(rng, count + 1)
    distractor, masks = ellipses[0], np.stack(ellipses[1:])
    canvas[distractor] = rng.uniform(0.1, 0.9, 3) + rng.normal(0, 0.04, (int(distractor.sum()), 3))
    directions = rng.permutation(CLASSES)[:count]
    for mask, direction in zip(masks, directions, strict=True):
        canvas[mask] = _striped(rng, int(direction))[mask]
    if kind != "decoy":
        shown: NDArray[np.bool_] = np.asarray(masks.any(0))
        return Stripes(_pixels(canvas), tuple(int(each) for each in directions), masks, shown)
    label = int(rng.integers(CLASSES))
    marker = _marker(rng, masks[0])
    canvas[marker] = _MARKERS[label] + rng.normal(0, 0.03, (int(marker.sum()), 3))
    return Stripes(_pixels(canvas), (label,), masks & ~marker, marker)


def stripes_examples(seeds: range, kind: StripesKind = "one") -> list[Example]:
    """Images as examples: one an object, with its label and mask.

    Args:
        seeds: of the images.
        kind: see `make_stripes`.
    """
    return [example for seed in seeds for example in _examples(seed, kind)]


def _examples(seed: int, kind: StripesKind) -> Iterator[Example]:
    from PIL import Image

    made = make_stripes(seed, kind)
    picture = Image.fromarray(made.image)
    for place, (label, mask) in enumerate(zip(made.classes, made.masks, strict=True)):
        yield Example(f"{kind}/{seed:06d}#{place}", picture, (label,), mask.astype(np.int8))


def _apart(rng: np.random.Generator, count: int) -> list[NDArray[np.bool_]]:
    """A small ellipse and large ones that do not touch; all of them smaller where there is no room."""
    longest = 8.5 if count < 3 else 7.5
    for attempt in range(_TRIES):
        shrink = 0.5 ** (attempt / _TRIES)
        found: list[NDArray[np.bool_]] = []
        for index in range(count):
            sizes = (6.0, longest) if index else (3.5, 5.5)
            ellipse = _ellipse(rng, shrink * rng.uniform(*sizes))
            if any((ellipse & other).any() for other in found):
                break
            found.append(ellipse)
        if len(found) == count:
            return found
    raise AssertionError("ellipses half as large find room at once")


def _ellipse(rng: np.random.Generator, long: float) -> NDArray[np.bool_]:
    """Pixels whose centre lies in an ellipse of a given longer half-axis, wholly in the image, at a random place."""
    short = long * rng.uniform(0.7, 0.9)
    y, x = rng.uniform(long, SIZE - long, 2)
    turn = rng.uniform(0, math.pi)
    right, down = _COLUMNS - x, _ROWS - y
    along = right * math.cos(turn) + down * math.sin(turn)
    across = down * math.cos(turn) - right * math.sin(turn)
    inside: NDArray[np.bool_] = (along / long) ** 2 + (across / short) ** 2 < 1
    return inside


def _striped(rng: np.random.Generator, direction: int) -> NDArray[np.float64]:
    """Stripes (32, 32, 3) of two colours that differ clearly."""
    angle = direction * math.pi / CLASSES
    place = _COLUMNS * math.cos(angle) + _ROWS * math.sin(angle)
    wave = np.sin(2 * math.pi * (place / _PERIOD + rng.random()))
    dark = rng.uniform(0.0, 0.3, 3)
    light = dark + rng.uniform(0.5, 0.7, 3)
    blend = (0.5 + 0.5 * wave)[..., None]
    noise = rng.normal(0, 0.04, (SIZE, SIZE, 3))
    striped: NDArray[np.float64] = dark + blend * (light - dark) + noise
    return striped


def _marker(rng: np.random.Generator, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a patch that the object does not reach."""
    reached = mask.reshape(SIZE // PATCH, PATCH, SIZE // PATCH, PATCH).any((1, 3))
    row, column = rng.choice(np.argwhere(~reached)) * PATCH
    marker = np.zeros((SIZE, SIZE), bool)
    marker[row : row + PATCH, column : column + PATCH] = True
    return marker


def _pixels(canvas: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
