"""Which methods are better: paired differences, corrected for their number, and ranks that allow ties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, UnknownNameError
from .metric import Metric
from .statistics import Estimate, Sample, check_resampling, chunks, estimate_figures
from .tally import Rows, own_statistics


@dataclass(frozen=True)
class PairedDifference:
    """One method against another on the same images.

    Attributes:
        first: label of the one.
        second: label of the other.
        difference: figure of the first minus figure of the second, over the images that both measured.
        p_value: of the permutation test that swaps the two on each image; NaN where no image was measured by both.
        corrected: the same after Holm's correction for all pairs compared.
    """

    first: str
    second: str
    difference: Estimate
    p_value: float
    corrected: float


@dataclass(frozen=True)
class Comparison:
    """Methods by one figure.

    Attributes:
        figure: its name.
        pairs: every pair of methods.
        ranks: best and worst rank of each method that is consistent with the pairs that differ significantly; rank 1
            is the best. Empty for a figure that only describes.
        significance: corrected p-values below it count as differences.
    """

    figure: str
    pairs: tuple[PairedDifference, ...]
    ranks: Mapping[str, tuple[int, int]]
    significance: float

    def to_markdown(self) -> str:
        """A table, one row a pair: difference, its interval and images, p-value, and that corrected for all pairs."""
        lines = [
            f"| {each.first} − {each.second} | {each.difference} | {each.difference.n} "
            f"| {each.p_value:.2g} | {each.corrected:.2g} |"
            for each in self.pairs
        ]
        return "\n".join([f"| {self.figure} | difference | n | p | p, all pairs |", "|---|---|---|---|---|", *lines])

    _repr_markdown_ = to_markdown


def compare_rows(
    metric: Metric,
    rows: Mapping[str, Rows],
    figure: str | None = None,
    *,
    significance: float = 0.05,
    resamples: int = 2000,
    permutations: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Compares methods by one figure of a metric, measured on the same images in the same order.

    Each pair of methods is compared on the images that both measured, since a method must not gain from images that it
    leaves out. Intervals are those of `estimates`, of the difference. P-values are those of the paired permutation
    test: where methods do not differ, their rows may be swapped on any image. That holds for pooled figures too.

    Args:
        metric: the metric that measured the rows.
        rows: by label of the method.
        figure: name; the metric's most important one by default.
        significance: corrected p-values below it count as differences, and 1 minus it is the confidence of intervals.
        resamples: of the bootstrap.
        permutations: of the test; p-values are not below 1 / (permutations + 1).
        seed: number that other draws belong to.

    Raises:
        InputError: fewer than two methods, different numbers of images, or rows without what the figure needs.
        UnknownNameError: the metric has no such figure.
        OptionError: a significance or a number of draws that allows no test.
    """
    check_resampling(1 - significance, min(resamples, permutations))
    known = {each.name: each for each in metric.info.figures}
    figure = figure or metric.info.figures[0].name
    if figure not in known:
        raise UnknownNameError.listing(f"figure of {metric.info.name}", figure, known)
    lengths = {label: len(next(iter(each.values()))) for label, each in rows.items()}
    if len(lengths) < 2 or len(set(lengths.values())) > 1:
        raise InputError(
            f"found rows of {lengths} images, expected at least two methods on the same images in the same order"
        )
    pairs = []
    for first, second in combinations(rows, 2):
        pair = _Pair.of(metric, figure, rows[first], rows[second])
        if figure not in pair.one.figures():
            raise InputError(
                f"{figure} needs what {first} and {second} were not both measured with: pass labels or masks"
            )
        difference = estimate_figures(pair.sample, confidence=1 - significance, resamples=resamples, seed=seed)[figure]
        p_value = pair.permutation_test(difference.value, permutations, seed)
        pairs.append(PairedDifference(first, second, difference, p_value, math.nan))
    corrected = holm([pair.p_value for pair in pairs])
    found = tuple(replace(pair, corrected=value) for pair, value in zip(pairs, corrected, strict=True))
    better = known[figure].higher_is_better
    ranks = {} if better is None else _ranks(list(rows), found, significance, higher_is_better=better)
    return Comparison(figure, found, ranks, significance)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values after Holm's step-down correction (Scandinavian Journal of Statistics 1979), in the same order.

    NaN stays NaN and does not count as a test.
    """
    corrected, largest = [math.nan] * len(p_values), 0.0
    order = sorted((index for index, each in enumerate(p_values) if not math.isnan(each)), key=p_values.__getitem__)
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - position) * p_values[index]))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two methods on the images that both measured.

    Attributes:
        figure: what is compared.
        one: the first method's statistics.
        other: the second's.
    """

    figure: str
    one: Sample
    other: Sample

    @classmethod
    def of(cls, metric: Metric, figure: str, first: Rows, second: Rows) -> _Pair:
        first, second = own_statistics(first), own_statistics(second)
        shared = [name for name in first if name in second]
        both = {name: first[name] + second[name] for name in shared}  # NaN where either is
        samples = (
            Sample.of({name: np.where(np.isnan(both[name]), np.nan, rows[name]) for name in shared}, metric.summarise)
            for rows in (first, second)
        )
        return cls(figure, *samples)

    @property
    def sample(self) -> Sample:
        """Both as one sample, whose only figure is the difference."""

        def summarise(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
            one, other = (
                sample.summarise({name: means[f"{side} {name}"] for name in sample.values})
                for side, sample in (("one", self.one), ("other", self.other))
            )
            return {self.figure: one[self.figure] - other[self.figure]}

        return Sample(self._joined("values"), self._joined("known"), summarise)

    def _joined(self, part: Literal["values", "known"]) -> dict[str, Tensor]:
        sides = (("one", self.one), ("other", self.other))
        return {f"{side} {name}": value for side, sample in sides for name, value in getattr(sample, part).items()}

    def permutation_test(self, observed: float, permutations: int, seed: int) -> float:
        """Share of swaps with a difference at least as large, the observed one among them, in (0, 1]."""
        if math.isnan(observed):
            return math.nan
        generator, images = np.random.default_rng(seed), len(self.one)
        moved = {name: self.other.values[name] - value for name, value in self.one.values.items()}
        counts = {name: known.sum(0) for name, known in self.one.known.items()}
        as_large = 0
        for count in chunks(permutations, max(images, self.one.width)):
            swaps = torch.from_numpy(generator.integers(2, size=(count, images), dtype=np.int8)).double()
            shift = {name: swaps @ value for name, value in moved.items()}
            one, other = (
                sample.from_sums({name: sample.values[name].sum(0) + sign * shift[name] for name in shift}, counts)
                for sample, sign in ((self.one, 1), (self.other, -1))
            )
            difference = (one[self.figure] - other[self.figure]).abs()
            as_large += int((difference >= abs(observed) * (1 - 1e-9)).sum())  # sums in another order round otherwise
        return (as_large + 1) / (permutations + 1)


def _ranks(
    labels: list[str], pairs: Sequence[PairedDifference], significance: float, *, higher_is_better: bool
) -> dict[str, tuple[int, int]]:
    """One more than the methods significantly better, and the number of methods less those significantly worse."""
    above, below = dict.fromkeys(labels, 0), dict.fromkeys(labels, 0)
    for pair in pairs:
        if pair.corrected < significance:
            wins = (pair.difference.value > 0) == higher_is_better
            winner, loser = (pair.first, pair.second) if wins else (pair.second, pair.first)
            above[loser] += 1
            below[winner] += 1
    return {label: (above[label] + 1, len(labels) - below[label]) for label in labels}
