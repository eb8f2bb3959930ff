"""The tables of a report: for each metric and model, the methods in their order with their figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from .configuration import BenchConfiguration
from .figures import FigureRow
from .formatting import decimals_for, show_estimate


@dataclass(frozen=True)
class Cell:
    """A figure as it stands in a table.

    Attributes:
        text: ``value [low, high]``.
        rank: ``"2"``, or ``"2–4"`` where the method cannot be told from others; empty where nothing is compared.
        best: significantly better than every other method.
    """

    text: str
    rank: str
    best: bool


@dataclass(frozen=True)
class Line:
    """One method in a table.

    Attributes:
        method: label.
        cells: one a figure.
        counts: what the figures rest on.
    """

    method: str
    cells: tuple[Cell, ...]
    counts: FigureRow

    @property
    def tied(self) -> str:
        """Share of patches that share their score, in percent."""
        return f"{self.counts.tied:.1%}"


@dataclass(frozen=True)
class Section:
    """One metric on one model.

    Attributes:
        model: label.
        metric: label.
        title: the metric's.
        paper: where the metric is defined.
        figures: what the columns are.
        lines: one a method, the best first.
    """

    model: str
    metric: str
    title: str
    paper: str
    figures: tuple[FigureRow, ...]
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """For headings and files."""
        return f"{self.metric}, {self.model}"


def make_sections(figures: Sequence[FigureRow], configuration: BenchConfiguration) -> Iterator[Section]:
    """The tables, metric by metric and in each model by model."""
    for metric in configuration.metrics:
        info = metric.create().info
        for model in configuration.models:
            rows = [row for row in figures if (row.model, row.metric) == (model.label, metric.label)]
            if rows:
                yield _section(rows, info.title, info.paper)


def goodness(row: FigureRow) -> float:
    """A key that sorts the best value first, and unknown ones last."""
    if not math.isfinite(row.value):
        return math.inf
    return row.value if row.higher_is_better is False else -row.value


def rank_text(row: FigureRow) -> str:
    """The rank, with the last one it could be."""
    if row.rank is None or row.last_rank is None:
        return ""
    return str(row.rank) if row.rank == row.last_rank else f"{row.rank}–{row.last_rank}"


def _section(rows: list[FigureRow], title: str, paper: str) -> Section:
    methods: dict[str, list[FigureRow]] = {}
    for row in rows:
        methods.setdefault(row.method, []).append(row)
    ordered = sorted(methods.values(), key=lambda own: goodness(own[0]))
    columns = list({row.figure: row for row in rows}.values())
    decimals = {
        each.figure: decimals_for([asdict(row) for row in rows if row.figure == each.figure]) for each in columns
    }
    lines = [
        Line(
            own[0].method,
            tuple(Cell(show_estimate(asdict(row), decimals[row.figure]), rank_text(row), row.best) for row in own),
            own[0],
        )
        for own in ordered
    ]
    return Section(rows[0].model, rows[0].metric, title, paper, tuple(columns), tuple(lines))
