"""The table of a comparison: agreement, faithfulness and cost, one row a map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..bench.formatting import markdown_cell, show_seconds
from .agreement import Agreement, agreements
from .faithfulness import METRICS

if TYPE_CHECKING:
    from .comparison import Case, Comparison

_DASH = "–"
_ARROWS: Mapping[bool | None, str] = {True: " ↑", False: " ↓", None: ""}


NO_PROBABILITY = "deletion, insertion and SaCo follow the probability of one class; a contrast or a function has none."


@dataclass(frozen=True, eq=False, repr=False)
class ComparisonTable:
    """What is known of each map besides itself.

    Attributes:
        maps: by case and label of the method: a row with ``model``, ``image``, ``target``, ``name``, ``probability``,
            ``method``; ``agreement``, the mean rank correlation with the other methods; ``passes``; and, where they
            were asked for, ``deletion``, ``insertion``, ``saco``, and ``seconds`` an image and ``forwards``, the time
            in plain forward passes. NaN where there is no figure. For a contrast, ``target`` and ``probability`` are
            those of its first class.
        agreements: one a case and pair of methods.
        better: for each metric among the columns, whether higher is better.
    """

    maps: Mapping[tuple[Case, str], Mapping[str, Any]]
    agreements: Sequence[Agreement]
    better: Mapping[str, bool | None]

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The rows in order, as ``pandas.DataFrame`` takes them."""
        return list(self.maps.values())

    def to_markdown(self) -> str:
        """One row a map; ↑ where more is better and ↓ where less. A line below says why figures are missing."""
        timed = "seconds" in self.rows[0]
        heads = ["image", "class", "model", "method", "agreement"]
        heads += [name + _ARROWS[better] for name, better in self.better.items()]
        heads += ["passes", *(["time", "in forwards"] if timed else [])]
        lines = [heads, ["---"] * len(heads)]
        for (case, _), row in self.maps.items():
            line = [row["image"], _class_text(case), row["model"], row["method"]]
            line += [show_figure(row[name]) for name in ("agreement", *self.better)]
            line += [row["passes"], *([show_seconds(row["seconds"]), f"{row['forwards']:.2f}"] if timed else [])]
            lines.append(line)
        text = [f"| {' | '.join(markdown_cell(each) for each in line)} |" for line in lines]
        unmeasured = self.better and not all(case.is_class for case, _ in self.maps)
        note = ["", f"{_DASH}: {NO_PROBABILITY}"] if unmeasured else []
        return "\n".join([*text, *note])

    _repr_markdown_ = to_markdown

    def __repr__(self) -> str:
        return self.to_markdown()


def make_table(comparison: Comparison, *, faithfulness: bool, cost: bool) -> ComparisonTable:
    """The table of a comparison, with or without what has to be measured first."""
    pairs = list(agreements(comparison))
    metrics = comparison.faithfulness.metrics if faithfulness else {}
    maps: dict[tuple[Case, str], Mapping[str, Any]] = {}
    for case in comparison.cases:
        for label, method in comparison.methods.items():
            if (case.model, label) in comparison.refusals:
                continue
            row: dict[str, Any] = {
                "model": case.model,
                "image": comparison.images[case.image],
                "target": case.target,
                "name": case.name,
                "probability": case.probability,
                "method": label,
                "agreement": _mean_correlation([each for each in pairs if each.case == case], label),
                "passes": method.info.passes,
            }
            row |= {name: comparison.faithfulness.figures[name, case, label] for name in metrics}
            if cost:
                measured = comparison.costs[case.model, label]
                row |= {"seconds": measured["seconds"]}
                row |= {"forwards": measured["seconds"] / measured["forward_seconds"]}
            maps[case, label] = row
    better = {name: metrics[name].info.figures[0].higher_is_better for name in METRICS if name in metrics}
    return ComparisonTable(maps, pairs, better)


def percentages(case: Case) -> str:
    """The probability of a class, the two of a contrast; nothing for a function."""
    return " against ".join(f"{each:.0%}" for each in case.probabilities)


def _class_text(case: Case) -> str:
    return f"{case.name} {percentages(case)}".strip()


def show_figure(value: float) -> str:
    """Three decimals; a dash where there is no figure."""
    return f"{value:.3f}" if math.isfinite(value) else _DASH


def _mean_correlation(pairs: Sequence[Agreement], method: str) -> float:
    known = [each.rank_correlation for each in pairs if method in (each.first, each.second)]
    known = [each for each in known if math.isfinite(each)]
    return fmean(known) if known else math.nan
