"""In which order a map's pixels are changed: upsampling, and a ranking that is the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..patch_pixels import Extent, at_pixels, enlarged

ORDERS = ("bilinear", "nearest", "patches")
"""Pixels by the map between patch centres; pixels by the map of visible patches; whole patches."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Which pixels come first.

    Attributes:
        ranks: (B, H, W) int32, 0 for what comes first; each pixel has its own, or each patch.
        count: how many ranks there are: pixels H·W, or patches P.
    """

    ranks: Tensor
    count: int

    def bounds(self, parts: int) -> list[int]:
        """Ranks that cut all of them into equal parts: parts + 1 numbers from 0 to `count`, rounded down.

        Raises:
            InputError: there are more parts than ranks.
        """
        if parts > self.count:
            raise InputError(
                f"found {self.count} patches or pixels to rank, expected at least {parts}, one a step: take fewer steps"
            )
        return [self.count * part // parts for part in range(parts + 1)]


def salience(scores: Tensor, size: tuple[int, int], order: str, extent: Extent | None = None) -> Tensor:
    """Scores at pixels, each map scaled to [0, 1]; an increasing function of the scores wherever they are constant.

    Patches with equal scores give exactly equal pixels between them: rounded sums would rank a plateau by chance.

    Args:
        scores: (B, h, w), finite.
        size: pixels (H, W).
        order: one of `ORDERS`; bilinear has corners not aligned, the others take the nearest patch.
        extent: pixels (height, width) that the grid takes up; None for just the image.

    Returns:
        (B, H, W) float32 on the device of the scores; 0 for a constant map.
    """
    wide = scores.detach().double()
    low, high = wide.amin((1, 2), keepdim=True), wide.amax((1, 2), keepdim=True)
    unit = ((wide - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)).float()
    if order != "bilinear":
        return at_pixels(unit, size, extent)
    # float32 values weighted in float64 and rounded back: equal neighbours come out as they went in
    return enlarged(unit.double(), size, "bilinear", extent).float()


def rank_pixels(
    scores: Tensor,
    size: tuple[int, int],
    order: str,
    *,
    most_relevant_first: bool = True,
    extent: Extent | None = None,
) -> Ranking:
    """The order of the pixels of B maps. Equal ones go row by row from the top left, in either direction.

    Args:
        scores: (B, h, w), finite.
        size: pixels (H, W).
        order: one of `ORDERS`.
        most_relevant_first: highest score first; else lowest first.
        extent: pixels (height, width) that the grid takes up; None for just the image. Others come with their nearest.
    """
    if order == "patches":
        ranks = rank(scores.flatten(1), most_relevant_first).reshape(scores.shape)
        return Ranking(at_pixels(ranks, size, extent), ranks[0].numel())
    pixels = salience(scores, size, order, extent)
    return Ranking(rank(pixels.flatten(1), most_relevant_first).reshape(pixels.shape), pixels[0].numel())


def rank(values: Tensor, most_relevant_first: bool = True) -> Tensor:
    """Ranks (B, n) int32 of values (B, n), each row by itself; the first of equal values comes first."""
    order = values.argsort(dim=1, descending=most_relevant_first, stable=True)
    places = torch.arange(values.shape[1], dtype=torch.int32, device=values.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places)


def shared_top(first: Tensor, second: Tensor, count: int) -> Tensor:
    """The share (B,) float64 of their `count` highest values that rows (B, n) have in common; count / n by chance.

    Of values that are equal where the highest end, each has the same chance to be among them, independently in both
    rows: what is expected is given. Rows whose highest are the same, with the same left open, share all.
    """
    one, other = (_among_highest(each, count) for each in (first, second))
    return torch.where((one == other).all(1), 1.0, (one * other).sum(1) / count)


def _among_highest(values: Tensor, count: int) -> Tensor:
    """The chance (B, n) float64 of each value to be among the `count` highest of its row."""
    least = values.topk(count).values[:, -1:]
    above, tied = values > least, (values == least).double()
    left = count - above.sum(1, keepdim=True)
    return above + tied * left / tied.sum(1, keepdim=True).clamp(min=1)
