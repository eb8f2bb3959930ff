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
        text: ``value [low, high]``; empty where the method has no such figure.
        rank: ``"2"``, or ``"2–4"`` where the method cannot be told from others; empty where nothing is compared.
        best: significantly better than every other method.
        n: images it rests on.
    """

    text: str = ""
    rank: str = ""
    best: bool = False
    n: int = 0


@dataclass(frozen=True)
class Column:
    """A figure as the head of a column.

    Attributes:
        name: the figure's.
        title: what it is, with its unit.
        higher_is_better: None for a figure that only describes.
        chance: what a map without information gets; None where that depends on the data.
        ranked: whether any method has a rank by it.
    """

    name: str
    title: str
    higher_is_better: bool | None
    chance: float | None
    ranked: bool


@dataclass(frozen=True)
class Line:
    """One method in a table.

    Attributes:
        method: label.
        cells: one a column.
        counts: what all its figures rest on.
    """

    method: str
    cells: tuple[Cell, ...]
    counts: FigureRow

    @property
    def n(self) -> int:
        """Images that figures rest on, the most where these differ."""
        return max(cell.n for cell in self.cells)

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
        figures: the columns.
        lines: one a method, the best first.
    """

    model: str
    metric: str
    title: str
    paper: str
    figures: tuple[Column, ...]
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


def goodness(row: FigureRow | None) -> float:
    """A key that sorts the best value first, and unknown ones last."""
    if row is None or not math.isfinite(row.value):
        return math.inf
    return row.value if row.higher_is_better is False else -row.value


def rank_text(row: FigureRow) -> str:
    """The rank, with the last one it could be."""
    if row.rank is None or row.last_rank is None:
        return ""
    return str(row.rank) if row.rank == row.last_rank else f"{row.rank}–{row.last_rank}"


def _section(rows: list[FigureRow], title: str, paper: str) -> Section:
    methods: dict[str, dict[str, FigureRow]] = {}
    figures: dict[str, list[FigureRow]] = {}
    for row in rows:
        methods.setdefault(row.method, {})[row.figure] = row
        figures.setdefault(row.figure, []).append(row)
    first = next(iter(figures))
    ordered = sorted(methods.items(), key=lambda each: goodness(each[1].get(first)))
    decimals = {figure: decimals_for([asdict(row) for row in own]) for figure, own in figures.items()}
    lines = [
        Line(
            method,
            tuple(_cell(own.get(figure), decimals[figure]) for figure in figures),
            next(iter(own.values())),
        )
        for method, own in ordered
    ]
    columns = tuple(_column(own) for own in figures.values())
    return Section(rows[0].model, rows[0].metric, title, paper, columns, tuple(lines))


def _cell(row: FigureRow | None, decimals: int) -> Cell:
    return Cell() if row is None else Cell(show_estimate(asdict(row), decimals), rank_text(row), row.best, row.n)


def _column(rows: list[FigureRow]) -> Column:
    one = rows[0]
    ranked = any(row.rank is not None for row in rows)
    return Column(one.figure, one.title, one.higher_is_better, one.chance, ranked)
