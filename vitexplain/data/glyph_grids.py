"""Grids of glyphs whose label rests on exactly two patches: tasks on which a mask can be right or wrong.

Each patch of the grid is grey noise or one coloured glyph. In the pair task the label is the shapes of the red and of
the blue glyph; in the pointer task, a blue glyph names a colour, and the label is the shape of the glyph of that
colour. In both, two patches are all that is needed, and neither can be left out. Some training images lack one of
them: then the label is spread evenly over what is left open, so that a model learns that nothing there means nothing
known, and no mask of nothing is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError

Task = Literal["pair", "pointer"]

PATCH: Final = 4
"""Side of a patch in pixels."""

SHAPES: Final = np.array(
    [
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]],
        [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]],
        [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
        [[1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0]],
    ],
    np.float32,
)
"""The four glyphs: ring, cross, bars lying, bars standing."""

_RED, _BLUE, _GREEN = (1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0)
_NAMED = (_RED, _GREEN, (1.0, 1.0, -1.0), (1.0, -1.0, 1.0))  # red, green, yellow, magenta
_ABSENT = 0.15
_MOST_DISTRACTORS = 6


@dataclass(frozen=True, eq=False)
class GlyphGrids:
    """Images of one task.

    Attributes:
        images: (B, 3, S, S), float32 in -1..1.
        targets: (B, C), float32; probabilities of the classes, one-hot where nothing is missing.
        evidence: (B, P), bool; the two patches that the label rests on, in reading order; one or none where missing.
    """

    images: torch.Tensor
    targets: torch.Tensor
    evidence: torch.Tensor


def num_classes(task: Task) -> int:
    """C: 16 pairs of shapes, or 4 shapes.

    Raises:
        InputError: there is no such task.
    """
    if task not in ("pair", "pointer"):
        raise InputError(f"found task {task!r}, expected 'pair' or 'pointer'")
    return len(SHAPES) ** 2 if task == "pair" else len(SHAPES)


def make_glyph_grids(task: Task, count: int, seed: int, *, side: int = 8, complete: bool = True) -> GlyphGrids:
    """Images of one task; the same arguments give the same images.

    Args:
        task: ``"pair"`` or ``"pointer"``.
        count: how many images.
        seed: any non-negative integer.
        side: patches along an edge, at least 4.
        complete: whether both patches are in every image; False leaves out each with a chance of 15 %.

    Raises:
        InputError: an argument is outside its range.
    """
    classes = num_classes(task)
    if count < 1 or side < 4 or seed < 0:
        raise InputError(f"found count {count}, side {side}, seed {seed}; expected at least 1, 4 and 0")
    rng = np.random.default_rng((seed, classes, side))
    cells = rng.normal(0.0, 0.1, (count, side * side, 1, PATCH, PATCH)).astype(np.float32).repeat(3, axis=2)
    targets = np.empty((count, classes), np.float32)
    evidence = np.zeros((count, side * side), np.bool_)
    paint = _paint_pair if task == "pair" else _paint_pointer
    for image, target, needed in zip(cells, targets, evidence, strict=True):
        missing = (False, False) if complete else (rng.random() < _ABSENT, rng.random() < _ABSENT)
        target[:] = paint(rng, image, needed, missing).ravel()
    images = cells.reshape(count, side, side, 3, PATCH, PATCH).transpose(0, 3, 1, 4, 2, 5)
    size = side * PATCH
    return GlyphGrids(
        torch.from_numpy(images.reshape(count, 3, size, size).copy()),
        torch.from_numpy(targets),
        torch.from_numpy(evidence),
    )


def _paint_pair(
    rng: np.random.Generator, image: NDArray[np.float32], needed: NDArray[np.bool_], missing: tuple[bool, bool]
) -> NDArray[np.float32]:
    """A red and a blue glyph, and up to six green ones; (red shape, blue shape) as probabilities (4, 4)."""
    shapes = rng.integers(len(SHAPES), size=2)
    places = rng.permutation(len(image))
    factors = []
    for shape, place, colour, absent in zip(shapes, places, (_RED, _BLUE), missing, strict=False):
        if not absent:
            _draw(image[place], int(shape), colour)
            needed[place] = True
        factors.append(_known(int(shape), absent))
    for place in places[2 : 2 + int(rng.integers(_MOST_DISTRACTORS + 1))]:
        _draw(image[place], int(rng.integers(len(SHAPES))), _GREEN)
    return np.outer(*factors)


def _paint_pointer(
    rng: np.random.Generator, image: NDArray[np.float32], needed: NDArray[np.bool_], missing: tuple[bool, bool]
) -> NDArray[np.float32]:
    """A blue pointer whose shape names a colour, and a glyph of each colour; the named one's shape (4,)."""
    named = int(rng.integers(len(_NAMED)))
    shapes = rng.integers(len(SHAPES), size=len(_NAMED))
    places = rng.permutation(len(image))
    if not missing[0]:
        _draw(image[places[-1]], named, _BLUE)
        needed[places[-1]] = True
    for index, colour in enumerate(_NAMED):
        if index != named or not missing[1]:
            _draw(image[places[index]], int(shapes[index]), colour)
    needed[places[named]] = not missing[1]
    return _known(int(shapes[named]), any(missing))


def _draw(cell: NDArray[np.float32], shape: int, colour: tuple[float, float, float]) -> None:
    ink = SHAPES[shape].astype(np.bool_)
    for channel, value in zip(cell, colour, strict=True):
        channel[ink] = value


def _known(shape: int, absent: bool) -> NDArray[np.float32]:
    """Probabilities (4,) of a shape: certain, or even where its glyph is missing."""
    return np.full(4, 0.25, np.float32) if absent else np.eye(4, dtype=np.float32)[shape]
