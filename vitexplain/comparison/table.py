"""The table of a comparison: agreement, faithfulness and cost, one row a map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..bench.formatting import show_seconds
from .agreement import Agreement, agreements
from .faithfulness import METRICS

if TYPE_CHECKING:
    from .comparison import Case, Comparison

_DASH = "–"
_ARROWS: Mapping[bool | None, str] = {True: " ↑", False: " ↓", None: ""}


@dataclass(frozen=True, eq=False, repr=False)
class ComparisonTable:
    """What is known of each map besides itself.

    Attributes:
        maps: by case and label of the method: a row with ``model``, ``image``, ``target``, ``name``, ``probability``,
            ``method``; ``agreement``, the mean rank correlation with the other methods; ``passes``; and, where they
            were asked for, ``deletion``, ``insertion``, ``saco``, and ``seconds`` an image and ``forwards``, the time
            in plain forward passes. NaN where there is no figure.
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
        """One row a map; ↑ where more is better and ↓ where less."""
        timed = "seconds" in self.rows[0]
        heads = ["image", "class", "model", "method", "agreement"]
        heads += [name + _ARROWS[better] for name, better in self.better.items()]
        heads += ["passes", *(["time", "in forwards"] if timed else [])]
        lines = [heads, ["---"] * len(heads)]
        for row in self.rows:
            line = [row["image"], f"{row['name']} {row['probability']:.0%}", row["model"], row["method"]]
            line += [show_figure(row[name]) for name in ("agreement", *self.better)]
            line += [row["passes"], *([show_seconds(row["seconds"]), f"{row['forwards']:.2f}"] if timed else [])]
            lines.append(line)
        return "\n".join(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in line)} |" for line in lines)

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


def show_figure(value: float) -> str:
    """Three decimals; a dash where there is no figure."""
    return f"{value:.3f}" if math.isfinite(value) else _DASH


def _mean_correlation(pairs: Sequence[Agreement], method: str) -> float:
    known = [each.rank_correlation for each in pairs if method in (each.first, each.second)]
    known = [each for each in known if math.isfinite(each)]
    return fmean(known) if known else math.nan
