"""Figures with their intervals: the bootstrap over images.

Images are drawn with replacement, and figures computed again from the means of what was drawn. Means are linear in the
weight of each image, so all resamples are one matrix product; pooled figures (ratios and maxima of means) come out as
they are defined, not as means over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError, OptionError
from .metric import Metric
from .tally import own_statistics

Summarise = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Means (R,) or (R, S) of statistics by name, to figures (R,) by name."""

_CHUNK = 2**22
"""Numbers in one array of a resampling, 32 MB."""


@dataclass(frozen=True)
class Estimate:
    """A figure and how far it is known.

    Attributes:
        value: the figure over all images; NaN where none allowed it.
        low: lower end of the interval; NaN where it rests on fewer than two images.
        high: upper end.
        n: images it rests on: those with every number that it is computed from. A figure of several statistics takes
            what other images have too, but they are not counted here.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


def estimates(
    metric: Metric,
    rows: Mapping[str, npt.NDArray[np.float64]],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The figures of a metric with intervals: what other images of the same kind would give.

    The same images are drawn for the same `seed` and number of images, so resamples of several methods on one data set
    are paired.

    Args:
        metric: the metric that measured the rows.
        rows: of `Tally.rows` or `measure`.
        confidence: share of such intervals that hold the true figure, in (0, 1).
        resamples: how often images are drawn.
        seed: number that other draws belong to.

    Returns:
        An estimate a figure, the most important first; the interval is that of `bootstrap_interval`.

    Raises:
        InputError: there are no rows.
        OptionError: a confidence or a number of resamples that makes no interval.
    """
    sample = Sample.of(own_statistics(rows), metric.summarise)
    found = estimate_figures(sample, confidence=confidence, resamples=resamples, seed=seed)
    return {figure.name: found[figure.name] for figure in metric.info.figures if figure.name in found}


@dataclass(frozen=True, eq=False)
class Sample:
    """Statistics of n images, as what weights of images are multiplied with.

    Attributes:
        values: (n,) or (n, S) by name, zero where unknown.
        known: of the same shape, or with S of 1 where all columns are alike: 1 where known, else 0.
        summarise: gives the figures.
    """

    values: Mapping[str, Tensor]
    known: Mapping[str, Tensor]
    summarise: Summarise

    @classmethod
    def of(cls, statistics: Mapping[str, npt.NDArray[np.float64]], summarise: Summarise) -> Sample:
        """From statistics by name, NaN where unknown.

        Raises:
            InputError: there are no images.
        """
        if not statistics or not len(next(iter(statistics.values()))):
            raise InputError("found no rows to compute figures of, expected the statistics of at least one image")
        values, known = {}, {}
        for name, column in statistics.items():
            value = torch.from_numpy(np.ascontiguousarray(column, dtype=np.float64))
            there = ~value.isnan()
            if there.ndim > 1 and bool((there == there[:, :1]).all()):
                there = there[:, :1]
            values[name], known[name] = value.nan_to_num(nan=0.0), there.double()
        return cls(values, known, summarise)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def width(self) -> int:
        """Numbers that one image has."""
        return sum(value[0].numel() for value in self.values.values())

    def counts(self) -> dict[str, int]:
        """How many images each figure rests on; see `Estimate.n`.

        A figure is computed from the statistics without which it is NaN; from all of them, if it never is.
        """
        there = torch.stack([known.flatten(1).all(1) for known in self._columns(self.known)])
        kept = 1 - torch.eye(len(there)).double()  # each row leaves out one statistic, whose mean is 0 / 0
        lacking = (
            {name: torch.tensordot(row, each[name].sum(0), 0) for name, row in zip(each, kept, strict=True)}
            for each in (self.values, self.known)
        )
        lost = {name: figure.isnan() for name, figure in self.from_sums(*lacking).items()}
        return {name: int(there[each | ~each.any()].all(0).sum()) for name, each in lost.items()}

    def figures(self) -> dict[str, Tensor]:
        """The figures over all images, 0-dimensional."""
        return {name: value[0] for name, value in self.weighted(torch.ones(1, len(self)).double()).items()}

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        """Figures (r,), where image i counts `weights` (r, n) times."""
        return self.from_sums(*({name: weights @ each[name] for name in each} for each in (self.values, self.known)))

    def without_each(self) -> dict[str, Tensor]:
        """Figures (n,), each without one image."""
        parts = []
        step = max(1, _CHUNK // self.width)
        for start in range(0, len(self), step):
            rows = slice(start, start + step)
            left_out = (
                {name: each[name].sum(0) - each[name][rows] for name in each} for each in (self.values, self.known)
            )
            parts.append(self.from_sums(*left_out))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def from_sums(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Figures (r,) from sums and numbers of images, (r,) or (r, S)."""
        return dict(self.summarise({name: sums[name] / counts[name] for name in sums}))

    @staticmethod
    def _columns(statistics: Mapping[str, Tensor]) -> list[Tensor]:
        return [value if value.ndim > 1 else value[:, None] for value in statistics.values()]


def estimate_figures(sample: Sample, *, confidence: float, resamples: int, seed: int) -> dict[str, Estimate]:
    """`estimates` of any sample."""
    check_resampling(confidence, resamples)
    counts = sample.counts()
    found = {name: Estimate(float(value), math.nan, math.nan, counts[name]) for name, value in sample.figures().items()}
    if max(counts.values(), default=0) < 2:
        return found
    drawn = [sample.weighted(weights) for weights in drawn_weights(len(sample), resamples, sample.width, seed)]
    without = sample.without_each()
    for name, each in found.items():
        if each.n > 1:
            replicates = torch.cat([part[name] for part in drawn]).numpy()
            low, high = bootstrap_interval(each.value, replicates, without[name].numpy(), confidence)
            found[name] = replace(each, low=low, high=high)
    return found


def drawn_weights(images: int, resamples: int, width: int, seed: int) -> Iterator[Tensor]:
    """How often each image was drawn, (r, images) at a time, the same for any `width`; float64."""
    generator = np.random.default_rng(seed)
    for count in chunks(resamples, max(images, width)):
        rows = [np.bincount(generator.integers(images, size=images), minlength=images) for _ in range(count)]
        yield torch.from_numpy(np.stack(rows)).double()


def chunks(total: int, width: int) -> Iterator[int]:
    """How many of `total` rows with `width` numbers are worked on at once."""
    step = max(1, _CHUNK // width)
    return (min(step, total - start) for start in range(0, total, step))


def bootstrap_interval(
    value: float, replicates: npt.NDArray[np.float64], without_each: npt.NDArray[np.float64], confidence: float
) -> tuple[float, float]:
    """The bias-corrected and accelerated bootstrap interval (Efron, JASA 1987); NaN where the figure is.

    Where the correction is undefined, as with all replicates on one side of the figure, that of plain percentiles.

    Args:
        value: the figure.
        replicates: (R,) figures of resamples; NaN ones are left out.
        without_each: (n,) figures without one image each.
        confidence: in (0, 1).
    """
    from scipy.special import ndtr, ndtri

    replicates = replicates[~np.isnan(replicates)]
    if math.isnan(value) or not len(replicates):
        return math.nan, math.nan
    bias = ndtri(((replicates < value).mean() + (replicates <= value).mean()) / 2)
    tails = ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    if math.isfinite(bias):
        tails = bias + (bias + tails) / (1 - _acceleration(without_each) * (bias + tails))
    low, high = np.quantile(replicates, ndtr(tails))
    return float(low), float(high)


def check_resampling(confidence: float, resamples: int) -> None:
    """Refuses what makes no interval.

    Raises:
        OptionError: the confidence is not in (0, 1), or there is nothing to resample.
    """
    if not 0 < confidence < 1:
        raise OptionError(f"found confidence={confidence}, expected a number between 0 and 1, such as 0.95")
    if resamples < 1:
        raise OptionError(f"found resamples={resamples}, expected a whole number >= 1, such as 2000")


def _acceleration(without_each: npt.NDArray[np.float64]) -> float:
    """How fast the figure's spread changes with the figure: a sixth of the skewness of single images' influence."""
    known = without_each[np.isfinite(without_each)]
    influence = known.mean() - known if len(known) else known
    spread = float((influence**2).sum())
    return float((influence**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
