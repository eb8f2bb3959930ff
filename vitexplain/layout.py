"""Where tokens are: a block's layout and the way between two of them, windows on a grid, and the axes of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CaptureError

Arrangement = Literal["BND", "NBD", "BHWD", "BDHW"]
"""The axes of a token state inside a model: B images, N tokens, or H×W of them on a grid, D channels."""


@dataclass(frozen=True)
class TokenLayout:
    """The tokens that one block works on: prefix tokens first, then the patches of a grid, row by row.

    Attributes:
        prefix: number of prefix tokens.
        grid: (h, w).
    """

    prefix: int
    grid: tuple[int, int]

    @property
    def count(self) -> int:
        """N."""
        return self.prefix + math.prod(self.grid)


def hand_down(row: Tensor, layouts: Sequence[TokenLayout]) -> Tensor:
    """Relevance of the first layout's tokens, from that of the tokens of any of them.

    A token that was merged from several gives each of them an equal share: how much each of them put into it is not
    asked, so this step is an approximation, and the only one. A prefix token that is not there yet keeps what it has.

    Args:
        row: (B, N) relevance of the tokens of one of the layouts.
        layouts: from the block below up to the head, one a block.

    Returns:
        (B, N) over the tokens of `layouts[0]`; the same tensor where that is the row's own layout.

    Raises:
        CaptureError: no layout has that many tokens.
    """
    if row.shape[1] == layouts[0].count and layouts.count(layouts[0]) == len(layouts):
        return row
    path = list(layouts)
    while path and path[-1].count != row.shape[1]:
        path.pop()
    if not path:
        counts = ", ".join(str(each.count) for each in dict.fromkeys(layouts))
        raise CaptureError(f"found relevance of {row.shape[1]} tokens, expected {counts}")
    for above, below in zip(path[:0:-1], path[-2::-1], strict=True):
        if above != below:
            row = _shared_out(row, above, below)
    return row


def _shared_out(row: Tensor, above: TokenLayout, below: TokenLayout) -> Tensor:
    patches = row[:, above.prefix :].reshape(-1, *above.grid)
    for axis in (0, 1):
        step = -(-below.grid[axis] // above.grid[axis])
        parents = torch.arange(below.grid[axis], device=row.device) // step
        children = parents.bincount(minlength=above.grid[axis])  # fewer at an edge that had to be padded
        shares = (patches.movedim(axis + 1, -1) / children)[..., parents]
        patches = shares.movedim(-1, axis + 1)
    return torch.cat([row[:, : below.prefix], patches.flatten(1)], dim=1)


@dataclass(frozen=True)
class Windows:
    """A grid cut into windows, after a cyclic shift and padding at the end to whole windows.

    Attributes:
        grid: (h, w) tokens.
        size: (height, width) of a window.
        shift: by how many tokens the grid is rolled up and left.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    @property
    def area(self) -> int:
        """n, the places in a window."""
        return math.prod(self.size)

    @cached_property
    def places(self) -> Tensor:
        """(W, n): which token is at each place of each window; h·w for padding."""
        count = math.prod(self.grid)
        tokens = torch.arange(count).reshape(self.grid).roll([-each for each in self.shift], dims=(0, 1))
        below, right = (-side % length for side, length in zip(self.grid, self.size, strict=True))
        padded = F.pad(tokens, (0, right, 0, below), value=count)
        (height, width), (rows, columns) = self.size, padded.shape
        cut = padded.reshape(rows // height, height, columns // width, width)
        return cut.transpose(1, 2).reshape(-1, self.area)

    def split(self, row: Tensor) -> Tensor:
        """Windows (B·W, n) of a row (B, h·w); zero on padding."""
        return F.pad(row, (0, 1))[:, self.places.to(row.device)].flatten(0, 1)

    def merge(self, windows: Tensor) -> Tensor:
        """The row (B, …, h·w) of windows (B·W, …, n); what lies on padding is left out."""
        order = self.places.flatten().argsort()[: math.prod(self.grid)].to(windows.device)
        images = windows.reshape(-1, len(self.places), *windows.shape[1:])
        return images.movedim(1, -2).flatten(-2)[..., order]


def to_tokens(state: Tensor, arrangement: Arrangement) -> Tensor:
    """A token state as (B, N, D); three axes are tokens already, except for ``"NBD"``."""
    if arrangement == "NBD":
        return state.transpose(0, 1)
    if state.ndim == 3:
        return state
    return state.flatten(1, 2) if arrangement == "BHWD" else state.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, arrangement: Arrangement, shape: torch.Size) -> Tensor:
    """The state of the given shape that `to_tokens` made (B, N, D) of; some tokens of it where it has three axes."""
    if arrangement == "NBD":
        return tokens.transpose(0, 1)
    if len(shape) == 3:
        return tokens
    return (tokens.transpose(1, 2) if arrangement == "BDHW" else tokens).reshape(shape)
