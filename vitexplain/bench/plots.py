"""Pictures of a benchmark, readable in print, on white and on black, and without seeing colours."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from ..files import write_whole
from .curve_bands import Curve

_INK = "#10151b"  # in inline pictures replaced by the page's own text colour
_COLOURS = (
    "#2e7bc4",
    "#c8600a",
    "#1e8a5a",
    "#b8509a",
    "#8064c8",
    "#9a6b2f",
    "#1b8a99",
    "#d1495b",
    "#7a828c",
)  # each at least 3:1 against white and against black
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX*<>"
_PIXELS_PER_INCH = 160


Rank: TypeAlias = tuple[int, int]
"""The first and the last rank that a method could have."""


@dataclass(frozen=True)
class CurvePanel:
    """The curves of all methods in one statistic.

    Attributes:
        title: above the panel.
        x: (S,) positions.
        x_label: what they are.
        y_label: what the curves show.
        curves: by method.
    """

    title: str
    x: npt.NDArray[np.float64]
    x_label: str
    y_label: str
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class Point:
    """What a method costs and how good it is: a ratio, and a figure with its interval."""

    cost: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CostPanel:
    """Cost against one figure, a point for each method."""

    title: str
    y_label: str
    points: Mapping[str, Point]


class Pictures:
    """Draws into a folder; a method looks the same in every picture.

    Args:
        folder: where the files go.
        methods: all of them, in the order that decides colours, dashes and markers.
    """

    def __init__(self, folder: Path, methods: Sequence[str]) -> None:
        self.folder = folder
        self.styles = {
            method: {
                "color": _COLOURS[index % len(_COLOURS)],
                "linestyle": _DASHES[index % len(_DASHES)],
                "marker": _MARKERS[index % len(_MARKERS)],
            }
            for index, method in enumerate(methods)
        }

    def curves(self, name: str, panels: Sequence[CurvePanel]) -> str:
        """Mean curves with their bands, a panel for each statistic. Returns the picture as inline SVG."""
        with _ink():
            figure, axes = _panels(len(panels), 4.3, 3.3)
            for axis, panel in zip(axes, panels, strict=True):
                for method, curve in panel.curves.items():
                    style, every = self.styles[method], max(1, len(panel.x) // 10)
                    axis.fill_between(panel.x, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
                    axis.plot(panel.x, curve.mean, label=_text(method), markevery=every, markersize=4, **style)
                axis.set(title=_text(panel.title), xlabel=_text(panel.x_label), ylabel=_text(panel.y_label))
                axis.margins(x=0.02)
            _legend(figure, axes)
            return self._save(figure, name)

    def costs(self, name: str, panels: Sequence[CostPanel]) -> str:
        """Figures against the time of one explanation. Returns the picture as inline SVG."""
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        with _ink():
            figure, axes = _panels(len(panels), 4.3, 3.3)
            for axis, panel in zip(axes, panels, strict=True):
                for method, point in panel.points.items():
                    style = self.styles[method]
                    # an interval that corrects for bias need not hold the value
                    error = np.maximum([[point.value - point.low], [point.high - point.value]], 0)
                    axis.errorbar(
                        point.cost,
                        point.value,
                        yerr=error,
                        label=_text(method),
                        color=style["color"],
                        marker=style["marker"],
                        markersize=7,
                        capsize=3,
                        linestyle="none",
                    )
                axis.set(title=_text(panel.title), ylabel=_text(panel.y_label))
                axis.set(xlabel="time, in plain forward passes", xscale="log")
                costs = [point.cost for point in panel.points.values()]
                axis.set_xlim(min(costs) / 1.6, max(costs) * 1.6)
                axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.xaxis.set_minor_formatter(NullFormatter())
            _legend(figure, axes)
            return self._save(figure, name)

    def ranks(self, name: str, metrics: Sequence[str], ranks: Mapping[str, Sequence[Rank | None]]) -> str:
        """Ranks as a table of shades. Returns the picture as inline SVG.

        Args:
            name: of the files.
            metrics: headings of the columns.
            ranks: for each method its first and last possible rank in each column, 1 the best; None where it has none.
        """
        from matplotlib.figure import Figure

        with _ink():
            longest = max(len(method) for method in ranks)
            width = 0.4 + 0.085 * longest + 0.85 * len(metrics)
            figure = Figure(figsize=(max(width, 3.2), 1.5 + 0.34 * len(ranks)), layout="constrained")
            axis = figure.add_subplot()
            worst = max([2, *(rank[1] for row in ranks.values() for rank in row if rank is not None)])
            for down, row in enumerate(ranks.values()):
                for across, rank in enumerate(row):
                    _rank_cell(axis, across, down, rank, worst)
            axis.set(xlim=(-0.5, len(metrics) - 0.5), ylim=(len(ranks) - 0.5, -0.5))
            axis.set_yticks(range(len(ranks)), [_text(method) for method in ranks])
            axis.set_xticks(
                range(len(metrics)), [_text(each) for each in metrics], rotation=35, ha="left", rotation_mode="anchor"
            )
            axis.xaxis.tick_top()
            axis.tick_params(length=0)
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set_visible(False)
            return self._save(figure, name)

    def _save(self, figure: Any, name: str) -> str:
        """Writes ``name.png`` and ``name.svg``; returns an SVG element in the page's own text colour."""
        from matplotlib import rc_context

        for suffix in ("png", "svg"):
            with rc_context({"svg.hashsalt": name}):
                buffer = io.BytesIO()
                figure.savefig(
                    buffer, format=suffix, dpi=_PIXELS_PER_INCH, facecolor="white", metadata=_NO_DATE[suffix]
                )
            content = buffer.getvalue()
            write_whole(self.folder / f"{name}.{suffix}", partial(_write, content))
        with rc_context({"svg.hashsalt": f"inline {name}"}):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", facecolor="none", metadata=_NO_DATE["svg"])
        svg = buffer.getvalue().decode()
        return svg[svg.index("<svg") :].replace(_INK, "currentColor")


_NO_DATE: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _ink() -> Any:
    """Settings for drawing, put back afterwards."""
    from matplotlib import rc_context

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = dict.fromkeys(names, _INK)
    return rc_context(
        {
            **settings,
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 10.5,
            "axes.labelsize": 10,
            "font.size": 9.5,
            "grid.color": "#8a929c",
            "grid.alpha": 0.3,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "svg.fonttype": "path",
        }
    )


def _text(label: str) -> str:
    """A user's label as it is: no formula between dollars, and no underscore that leaves it out of a legend."""
    plain = label.replace("$", r"\$")
    return rf"$\_${plain[1:]}" if plain.startswith("_") else plain


def _panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with panels in rows of at most two, and room for a legend at the right."""
    from matplotlib.figure import Figure

    across = min(count, 2)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width * across + 2.2, height * down), layout="constrained")
    return figure, [figure.add_subplot(down, across, index + 1) for index in range(count)]


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside right upper")


def _rank_cell(axis: Any, across: int, down: int, rank: Rank | None, worst: int) -> None:
    from matplotlib.patches import Rectangle

    if rank is None:
        axis.text(across, down, "–", ha="center", va="center")
        return
    first, last = rank
    share = ((first + last) / 2 - 1) / (worst - 1)
    dark, light = np.array([8, 69, 135]), np.array([222, 233, 244])
    colour = tuple((dark + (light - dark) * share) / 255)
    axis.add_patch(Rectangle((across - 0.47, down - 0.45), 0.94, 0.9, facecolor=colour, edgecolor="none"))
    text, ink = str(first) if first == last else f"{first}–{last}", "white" if share < 0.4 else "#111111"
    axis.text(across, down, text, ha="center", va="center", color=ink)
