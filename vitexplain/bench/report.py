"""The report of a benchmark: one HTML page that needs nothing else, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from ..files import distinct_names, write_whole
from ..metrics.curves import CurveMetric
from .configuration import BenchConfiguration
from .curve_bands import mean_curve
from .figures import FigureRow
from .formatting import markdown_cell, show_seconds
from .plots import CostPanel, CurvePanel, Pictures, Point, Rank
from .results import BenchResults
from .sections import Section, make_sections


@dataclass(frozen=True)
class Picture:
    """A plot in the report.

    Attributes:
        file: its PNG, relative to the report.
        svg: the same for a page of any colour.
        text: what it shows, for those who cannot see it.
    """

    file: str
    svg: str
    text: str


def write_report(results: BenchResults, configuration: BenchConfiguration) -> None:
    """Writes ``report.html``, ``report.md`` and ``plots/`` from the tables of a run.

    Raises:
        ExportError: a file cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["seconds"] = show_seconds
    environment.filters["cell"] = markdown_cell
    content = _Report(results, configuration).content()
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.j2").render(content)
        write_whole(results.folder / name, partial(_write, text))


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


class _Report:
    def __init__(self, results: BenchResults, configuration: BenchConfiguration) -> None:
        self.results = results
        self.configuration = configuration
        self.figures = results.figures()
        self.models = list(dict.fromkeys(row.model for row in self.figures))
        self.pictures = Pictures(results.folder / "plots", [each.label for each in configuration.methods])

    def content(self) -> dict[str, Any]:
        """What the templates are told."""
        tables = list(make_sections(self.figures, self.configuration))
        files = distinct_names([f"curves-{each.metric}-{each.model}".replace(" ", "-") for each in tables])
        return {
            "run": self.results.run,
            "sections": [(each, self._curves(each, file)) for each, file in zip(tables, files, strict=True)],
            "ranks": self._each_model(self._ranks, "ranks"),
            "costs": self._each_model(self._costs, "costs"),
            "not_applicable": _merged(self.results.run["not_applicable"]),
        }

    def _each_model(self, draw: Callable[[str, str], Picture | None], file: str) -> list[Picture]:
        drawn = [draw(model, f"{file}-{index}") for index, model in enumerate(self.models, 1)]
        return [picture for picture in drawn if picture is not None]

    def _curves(self, section: Section, file: str) -> Picture | None:
        (metric,) = (each.create() for each in self.configuration.metrics if each.label == section.metric)
        if not isinstance(metric, CurveMetric):
            return None
        methods = [each.label for each in self.configuration.methods]
        measured = {line.method for line in section.lines}
        rows = {
            method: self.results.statistics(section.model, method, section.metric)
            for method in methods
            if method in measured
        }
        panels = [
            CurvePanel(
                name.replace("_", " "),
                np.array(metric.fractions),
                "share of the image changed",
                "mean over images",
                {method: mean_curve(own[name], self.configuration.seed) for method, own in rows.items() if name in own},
            )
            for name in metric.curves
        ]
        panels = [panel for panel in panels if panel.curves]
        if not panels:
            return None
        text = f"{section.title} on {section.model}: mean curves of each method with 95 % intervals"
        return self._picture(file, self.pictures.curves(file, panels), text)

    def _ranks(self, model: str, file: str) -> Picture | None:
        first = {(row.method, row.metric): row for row in self.figures if row.model == model and row.position == 0}
        metrics = [
            each.label
            for each in self.configuration.metrics
            if any(metric == each.label and row.rank is not None for (_, metric), row in first.items())
        ]
        ranks = {
            each.label: [_rank(first.get((each.label, metric))) for metric in metrics]
            for each in self.configuration.methods
            if any((each.label, metric) in first for metric in metrics)
        }
        text = f"Ranks of the methods by the first figure of each metric, on {model}"
        return self._picture(file, self.pictures.ranks(file, metrics, ranks), text) if ranks else None

    def _costs(self, model: str, file: str) -> Picture | None:
        costs = {cost["method"]: cost["ratio"] for cost in self.results.run["costs"] if cost["model"] == model}
        panels = []
        for metric in self.configuration.metrics:
            requires = metric.create().info.requires
            if "predictor" not in requires or "explain" in requires:  # what explains again is about maps
                continue
            rows = [
                row
                for row in self.figures
                if (row.model, row.metric, row.position) == (model, metric.label, 0)
                and row.higher_is_better is not None
                and row.method in costs
                and row.n > 1
            ]
            if rows:
                better = "higher" if rows[0].higher_is_better else "lower"
                points = {row.method: Point(costs[row.method], row.value, row.low, row.high) for row in rows}
                panels.append(
                    CostPanel(metric.label, f"{rows[0].figure.replace('_', ' ')} ({better} is better)", points)
                )
        if not panels:
            return None
        text = f"Faithfulness against the time of one explanation, on {model}"
        return self._picture(file, self.pictures.costs(file, panels), text)

    @staticmethod
    def _picture(file: str, svg: str, text: str) -> Picture:
        return Picture(f"plots/{file}.png", svg, text)


def _rank(row: FigureRow | None) -> Rank | None:
    return None if row is None or row.rank is None or row.last_rank is None else (row.rank, row.last_rank)


def _merged(refusals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Refusals of one model, metric and reason as one, with all their methods."""
    merged: dict[tuple[str, str | None, str], list[str]] = {}
    for each in refusals:
        methods = merged.setdefault((each["model"], each["metric"], each["reason"]), [])
        if each["method"] is not None:
            methods.append(each["method"])
    return [
        {"model": model, "metric": metric or "all", "methods": ", ".join(methods) or "all", "reason": reason}
        for (model, metric, reason), methods in merged.items()
    ]
