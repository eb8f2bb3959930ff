"""Curves of faithfulness as points in a drawing of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..metrics.curves import CurveMetric
from .table import show_figure

if TYPE_CHECKING:
    from .comparison import Case, Comparison

WIDTH, HEIGHT, MARGIN = 340, 190, 34
"""Size of a drawing in its own units, and how far its axes keep from the edges."""


@dataclass(frozen=True)
class Line:
    """One method's curve.

    Attributes:
        number: position of the method.
        points: as an SVG polyline wants them.
        figure: area under the curve, as text.
    """

    number: int
    points: str
    figure: str


@dataclass(frozen=True)
class Chart:
    """The curves of all methods on one case.

    Attributes:
        title: of the metric.
        better: "higher" or "lower".
        lines: one a method.
    """

    title: str
    better: str
    lines: Sequence[Line]


def make_charts(comparison: Comparison, case: Case) -> list[Chart]:
    """Deletion and insertion of every method on one case."""
    found = comparison.faithfulness
    charts = []
    for name, metric in found.metrics.items():
        if isinstance(metric, CurveMetric):
            lines = [
                Line(number, _points(metric.fractions, curve.tolist()), show_figure(found.figures[name, case, label]))
                for number, label in enumerate(comparison.methods)
                if (curve := found.curves.get((name, case, label))) is not None
            ]
            better = "higher" if metric.info.figures[0].higher_is_better else "lower"
            charts.append(Chart(metric.info.title, better, lines))
    return charts


def _points(x: Sequence[float], y: Sequence[float]) -> str:
    """Points of a curve in [0, 1] × [0, 1], the origin at the lower left; what is not finite is left out."""
    across, down = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    known = [(a, b) for a, b in zip(x, y, strict=True) if b == b]
    return " ".join(f"{MARGIN + across * a:.1f},{HEIGHT - MARGIN - down * b:.1f}" for a, b in known)
