"""How much two maps of the same thing agree: their ranks, and their highest patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import OptionError
from ..metrics.correlation import spearman
from ..metrics.ordering import shared_top

if TYPE_CHECKING:
    from .comparison import Case, Comparison

TOP_SHARE = 0.1
"""Share of the patches that `top_overlap` looks at, unless asked otherwise."""


@dataclass(frozen=True)
class Agreement:
    """Two methods on one case.

    Attributes:
        case: what both explain.
        first: label of the one method.
        second: label of the other.
        rank_correlation: Spearman's, over patches, in [-1, 1]; NaN where a map is flat or their grids differ.
        top_overlap: share of the highest patches that both have in common, in [0, 1]; NaN likewise.
    """

    case: Case
    first: str
    second: str
    rank_correlation: float
    top_overlap: float


def top_overlap(first: Tensor, second: Tensor, share: float = TOP_SHARE) -> Tensor:
    """Share of their k highest patches that two maps have in common; by chance it is about `share`.

    Where equal scores leave open which are the highest, it is what is expected if each has the same chance; maps with
    the same patches at the top, and the same left open, have all in common.

    Args:
        first: (B, h, w).
        second: (B, h, w).
        share: k as a share of the patches, in (0, 1]; at least one patch.

    Returns:
        (B,) float64 in [0, 1]; NaN where a map is flat or not finite.

    Raises:
        OptionError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise OptionError(f"found share={share!r}, expected a number in (0, 1]")
    flat = [each.detach().flatten(1) for each in (first, second)]
    count = max(1, round(share * flat[0].shape[1]))
    told = [each.isfinite().all(1) & (each.amax(1) > each.amin(1)) for each in flat]
    return shared_top(flat[0], flat[1], count).masked_fill(~(told[0] & told[1]), torch.nan)


def agreements(comparison: Comparison, share: float = TOP_SHARE) -> Iterator[Agreement]:
    """Each pair of methods on each case, cases in order."""
    for case in comparison.cases:
        for first, second in combinations(comparison.methods, 2):
            one, other = comparison.scores(case, first), comparison.scores(case, second)
            if one is None or other is None:
                continue
            if one.shape != other.shape:
                yield Agreement(case, first, second, torch.nan, torch.nan)
                continue
            correlation = spearman(one.flatten()[None], other.flatten()[None])
            yield Agreement(case, first, second, float(correlation), float(top_overlap(one[None], other[None], share)))
