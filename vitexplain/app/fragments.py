"""Pieces of the page that are HTML: previews, maps side by side, figures."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from ..colormaps import SIGNED_COLORMAP, UNSIGNED_COLORMAP, color_table
from ..comparison import Comparison
from ..comparison.layers import picture_address
from ..comparison.picture import enlarged, heading, range_text, remark, shared_ranges
from ..comparison.table import make_table, show_figure
from ..comparison.views import COLOURED, draw_view, range_of
from ..metrics.catalogue import metric_info
from ..showing import png_address

_SIDE = 384  # pixels of a map, twice those at which it is shown


def preview_html(picture: Image.Image, name: str) -> str:
    """The visitor's picture."""
    return _render("preview.html.j2", address=picture_address(np.asarray(picture)), name=name)


def maps_html(comparison: Comparison, view: str, smooth: bool, share_scale: bool) -> str:
    """All maps: a row a class, a column a method.

    Args:
        comparison: what to show.
        view: one of `views.VIEWS`.
        smooth: bilinear between patch centres.
        share_scale: one range for all maps of a method.
    """
    ranges = shared_ranges(comparison) if share_scale else {}
    rows = []
    for case in comparison.cases:
        picture = enlarged(comparison.pictures[case.model][case.image], _SIDE)
        cells = []
        for label, method in comparison.methods.items():
            cell: dict[str, Any] = {
                "method": method.info.name,
                "heading": heading(comparison, label),
                "remark": remark(comparison, case, label),
                "address": None,
            }
            scores = comparison.scores(case, label)
            if scores is not None:
                explanation = comparison.explanations[case.model, label]
                signed = explanation.signed
                drawn = draw_view(
                    view,
                    picture,
                    scores,
                    signed=signed,
                    scale=ranges.get(label, "map"),
                    smooth=smooth,
                    extent=explanation.extent_in(picture.shape[:2]),
                )
                cell["address"] = picture_address(drawn)
                cell["range"] = range_text(ranges.get(label, range_of(scores)), signed)
                cell["bar"] = _bar(signed)
            cells.append(cell)
        rows.append({"case": case, "picture": picture_address(picture), "cells": cells})
    return _render("maps.html.j2", rows=rows, coloured=view in COLOURED)


def figures_html(comparison: Comparison) -> str:
    """Faithfulness of each map, and agreement of the methods; measures what was not measured before."""
    table = make_table(comparison, faithfulness=True, cost=False)
    columns = [(metric_info(name).figures[0].title, higher) for name, higher in table.better.items()]
    rows = [
        (
            row["name"],
            heading(comparison, row["method"]),
            [show_figure(row[each]) for each in ("agreement", *table.better)],
        )
        for row in table.rows
    ]
    return _render("figures.html.j2", columns=columns, rows=rows)


@cache
def _bar(signed: bool) -> str:
    return png_address(Image.fromarray(color_table(SIGNED_COLORMAP if signed else UNSIGNED_COLORMAP)[None]))


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(__package__ or "", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _render(template: str, /, **content: Any) -> str:
    text: str = _environment().get_template(template).render(content)
    return text
