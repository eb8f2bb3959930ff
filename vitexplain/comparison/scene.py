"""The images of a report: each as one model sees it, with its maps as layers and its figures as text."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .agreement import Agreement
from .attention_rows import AttentionRows, attention_rows, count_bytes
from .charts import make_charts
from .layers import layer, picture_address
from .picture import enlarged, range_text, remark
from .table import ComparisonTable, show_figure
from .views import range_of

if TYPE_CHECKING:
    from .comparison import Case, Comparison

_PICTURE_SIDE = 320
_MOST_ATTENTION = 24 * 2**20  # bytes; a page of more is slow to open
_DIGITS = 4  # of scores, significant ones


class Scenes:
    """Gathers what the template is told of images, and the numbers that the page's script reads.

    Args:
        comparison: what is reported.
        table: its figures.
        ranges: shared range by label of the method; empty for a range of its own for each map.
        attention: write in what every token attends to.

    Attributes:
        maps: scores, grid and name of each map, in the order of the page.
        attention: rows of attention, one entry an image and model; None where there are none.
        attention_left_out: it was asked for, and is missing for some model.
    """

    def __init__(
        self,
        comparison: Comparison,
        table: ComparisonTable,
        ranges: Mapping[str, tuple[float, float]],
        attention: bool,
    ) -> None:
        self.comparison, self.table, self.ranges = comparison, table, ranges
        self.maps: list[dict[str, Any]] = []
        self.attention: list[dict[str, Any] | None] = []
        self._rows = self._capture() if attention else {}
        self.attention_left_out = attention and not all(self._rows.get(model) for model in comparison.subjects)

    def describe(self) -> list[dict[str, Any]]:
        """One entry an image and model."""
        comparison = self.comparison
        return [self._scene(model, image) for image in range(len(comparison.images)) for model in comparison.subjects]

    def _capture(self) -> dict[str, list[AttentionRows] | None]:
        inputs = {model: self.comparison.inputs(model) for model in self.comparison.subjects}
        subjects = self.comparison.subjects
        total = sum(
            len(each) * count_bytes(subjects[model], (each.shape[-2], each.shape[-1])) for model, each in inputs.items()
        )
        if total > _MOST_ATTENTION:
            return {}
        return {model: attention_rows(subjects[model], each) for model, each in inputs.items()}

    def _scene(self, model: str, image: int) -> dict[str, Any]:
        picture = enlarged(self.comparison.pictures[model][image], _PICTURE_SIDE)
        rows = self._rows.get(model)
        self.attention.append(None if rows is None else _encoded(rows[image]))
        return {
            "number": len(self.attention) - 1,
            "model": model,
            "image": self.comparison.images[image],
            "picture": picture_address(picture),
            "size": picture.shape[:2],
            "blocks": 0 if rows is None else len(rows[image].levels),
            "prefix": 0 if rows is None else rows[image].prefix,
            "cases": [
                self._case(case, picture.shape[:2])
                for case in self.comparison.cases
                if (case.model, case.image) == (model, image)
            ],
        }

    def _case(self, case: Case, size: tuple[int, ...]) -> dict[str, Any]:
        labels = list(self.comparison.methods)
        lines = [(number, self.table.maps.get((case, label))) for number, label in enumerate(labels)]
        shown = ("agreement", *self.table.better)
        return {
            "name": case.name,
            "probabilities": case.probabilities,
            "is_class": case.is_class,
            "predicted": case.predicted,
            "maps": [self._map(case, label, size) for label in labels],
            "charts": make_charts(self.comparison, case) if self.table.better and case.is_class else [],
            "figures": [(number, [show_figure(row[each]) for each in shown]) for number, row in lines if row],
            "agreement": self._agreement(case),
        }

    def _map(self, case: Case, label: str, size: tuple[int, ...]) -> dict[str, Any]:
        scores, note = self.comparison.scores(case, label), remark(self.comparison, case, label)
        if scores is None:
            return {"layer": None, "remark": note}
        explanation = self.comparison.explanations[case.model, label]
        signed = explanation.signed
        bounds = self.ranges.get(label, range_of(scores))
        low, high = range_text(bounds, signed)
        flat = scores.detach().float().cpu().flatten().tolist()
        self.maps.append(
            {
                "grid": list(scores.shape),
                "taken": explanation.extent_in((1, 1)) or (1, 1),
                "scores": [float(f"{each:.{_DIGITS}g}") if each - each == 0 else None for each in flat],
                "scene": len(self.attention) - 1,
            }
        )
        return {
            "number": len(self.maps) - 1,
            "layer": layer(
                scores,
                size,
                signed=signed,
                scale=self.ranges.get(label, "map"),
                extent=explanation.extent_in(size),
            ),
            "low": low,
            "high": high,
            "signed": signed,
            "remark": note,
        }

    def _agreement(self, case: Case) -> list[tuple[int, list[tuple[str, str] | None]]]:
        """Methods by methods: rank correlation and overlap as text; None on the diagonal."""
        pairs = {frozenset((each.first, each.second)): each for each in self.table.agreements if each.case == case}
        labels = list(self.comparison.methods)
        return [
            (number, [_both(pairs.get(frozenset((first, second)))) for second in labels])
            for number, first in enumerate(labels)
        ]


def _both(agreement: Agreement | None) -> tuple[str, str] | None:
    if agreement is None:
        return None
    return show_figure(agreement.rank_correlation), show_figure(agreement.top_overlap)


def _encoded(rows: AttentionRows) -> dict[str, Any]:
    return {
        "grid": list(rows.grid),
        "taken": rows.taken,
        "prefix": rows.prefix,
        "blocks": len(rows.levels),
        "levels": _base64(rows.levels),
        "peaks": _base64(rows.peaks.astype("<f4")),
        "onPatches": _base64(rows.on_patches.astype("<f4")),
    }


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
