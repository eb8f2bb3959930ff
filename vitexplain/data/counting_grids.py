"""Grids of coloured cells, labelled with the number of red ones: the counting task of the Vision DiffMask paper.

Two masks are faithful: all red cells, or all others; either one says how many are red.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from ..errors import InputError

COLOURS: Final = np.array(
    [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]],
    np.float32,
)
"""Red, then the others: corners of the RGB cube in -1..1 without black and white."""


@dataclass(frozen=True, eq=False)
class CountingGrids:
    """Images of the counting task.

    Attributes:
        images: (B, 3, S, S), float32 in -1..1; one colour a cell.
        labels: (B,), int64; the number of red cells.
        red: (B, P), bool; which cells are red, in reading order.
    """

    images: torch.Tensor
    labels: torch.Tensor
    red: torch.Tensor


def make_counting_grids(
    count: int, seed: int, *, side: int = 3, cell: int = 16, extremes: bool = True
) -> CountingGrids:
    """Images of the counting task; the same arguments give the same images.

    Args:
        count: how many images.
        seed: any non-negative integer.
        side: cells along an edge.
        cell: side of a cell in pixels.
        extremes: whether no red cell and nothing but red cells are possible; numbers of red cells are equally frequent.

    Raises:
        InputError: an argument is outside its range.
    """
    if count < 1 or side < 2 or cell < 1 or seed < 0:
        raise InputError(f"found count {count}, side {side}, cell {cell}, seed {seed}; expected at least 1, 2, 1 and 0")
    rng = np.random.default_rng((seed, side, cell))
    cells = side * side
    labels = rng.integers(0 if extremes else 1, cells + 1 if extremes else cells, count)
    red = rng.random((count, cells)).argsort(axis=1) < labels[:, None]
    chosen = np.where(red, 0, rng.integers(1, len(COLOURS), (count, cells)))
    grid = COLOURS[chosen].reshape(count, side, side, 3).transpose(0, 3, 1, 2)
    images = grid.repeat(cell, axis=2).repeat(cell, axis=3)
    return CountingGrids(torch.from_numpy(images.copy()), torch.from_numpy(labels), torch.from_numpy(red))
