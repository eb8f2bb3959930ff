"""Figures of all methods by one metric, with intervals, ranks, and what they rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics.metric import Metric
from ..metrics.ranking import compare_rows
from ..metrics.statistics import estimates
from ..metrics.tally import Rows, summarise
from .store import Columns

CONFIDENCE = 0.95
RESAMPLES = 2000
PERMUTATIONS = 9999


@dataclass(frozen=True)
class FigureRow:
    """One figure of one method on one model.

    Attributes:
        model: label.
        metric: label.
        method: label.
        figure: its name.
        title: what it is, with its unit.
        position: 0 for the metric's most important figure.
        higher_is_better: None for a figure that only describes.
        chance: what a map without information gets; None where that depends on the data.
        value: over all images.
        low: lower end of the 95 % interval, by resampling images.
        high: upper end.
        n: images it rests on; see `Estimate`.
        rank: one more than the number of methods that are significantly better; None where nothing is compared.
        last_rank: the number of methods less those that are significantly worse.
        best: significantly better than every other method.
        images: how many were given.
        unmeasured: of these, how many lack a statistic.
        broken: of these, maps with NaN or infinite scores.
        constant: flat maps; they count.
        tied: mean share of patches whose score another patch has too, in [0, 1].
    """

    model: str
    metric: str
    method: str
    figure: str
    title: str
    position: int
    higher_is_better: bool | None
    chance: float | None
    value: float
    low: float
    high: float
    n: int
    rank: int | None
    last_rank: int | None
    best: bool
    images: int
    unmeasured: int
    broken: int
    constant: int
    tied: float


def compute_figures(metric: Metric, rows: Mapping[str, Rows], seed: int) -> Columns:
    """Figures of methods measured on the same images, one row a method and figure.

    Differences are tested pair by pair on the images that both measured, and corrected by Holm for all pairs of a
    figure.

    Args:
        metric: what measured the rows.
        rows: by label of the method.
        seed: of resampling and permuting.

    Returns:
        Columns ``method``, ``figure``, ``value``, ``low``, ``high``, ``n``, ``rank``, ``last_rank`` (NaN: none),
        ``images``, ``unmeasured``, ``broken``, ``constant``, ``tied``.
    """
    found: list[dict[str, str | float]] = []
    for method, own in rows.items():
        summary = summarise(metric, own)
        rests_on = {name: getattr(summary, name) for name in ("images", "unmeasured", "broken", "constant", "tied")}
        for figure, estimate in estimates(metric, own, confidence=CONFIDENCE, resamples=RESAMPLES, seed=seed).items():
            place: dict[str, str | float] = {
                "method": method,
                "figure": figure,
                "rank": math.nan,
                "last_rank": math.nan,
            }
            found.append(
                {
                    **place,
                    "value": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "n": estimate.n,
                    **rests_on,
                }
            )
    for figure in (each.name for each in metric.info.figures if each.higher_is_better is not None):
        known = [row for row in found if row["figure"] == figure and math.isfinite(float(row["value"]))]
        if len(known) < 2:
            continue
        compared = compare_rows(
            metric,
            {str(row["method"]): rows[str(row["method"])] for row in known},
            figure,
            significance=1 - CONFIDENCE,
            resamples=RESAMPLES,
            permutations=PERMUTATIONS,
            seed=seed,
        )
        for row in known:
            row["rank"], row["last_rank"] = compared.ranks[str(row["method"])]
    texts = ("method", "figure")
    return {name: np.array([row[name] for row in found], object if name in texts else np.float64) for name in found[0]}


def figure_rows(model: str, label: str, metric: Metric, columns: Columns, order: Sequence[str]) -> list[FigureRow]:
    """The rows of `compute_figures` with what the metric says of its figures.

    They are in the metric's order of figures, and within a figure in the given order of methods.
    """
    figures = {each.name: (position, each) for position, each in enumerate(metric.info.figures)}
    rows = []
    for index, name in enumerate(columns["figure"].tolist()):
        position, figure = figures[name]
        number = {key: float(values[index]) for key, values in columns.items() if key not in ("method", "figure")}
        rank, last = (None if math.isnan(number[key]) else int(number[key]) for key in ("rank", "last_rank"))
        rows.append(
            FigureRow(
                model=model,
                metric=label,
                method=str(columns["method"][index]),
                figure=name,
                title=figure.title,
                position=position,
                higher_is_better=figure.higher_is_better,
                chance=figure.chance,
                value=number["value"],
                low=number["low"],
                high=number["high"],
                n=int(number["n"]),
                rank=rank,
                last_rank=last,
                best=rank == last == 1,
                images=int(number["images"]),
                unmeasured=int(number["unmeasured"]),
                broken=int(number["broken"]),
                constant=int(number["constant"]),
                tied=number["tied"],
            )
        )
    return sorted(rows, key=lambda row: (row.position, order.index(row.method)))
