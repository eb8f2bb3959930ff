"""The picture of a comparison: a row a case, the input and then a column a method."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from ..errors import OptionError
from ..lettering import DARK, LIGHT
from ..panels import Cell, colour_bar, panel
from ..render import Pixels
from .table import percentages
from .views import COLOURED, TOP_SHARE, draw_view, range_of

if TYPE_CHECKING:
    from .comparison import Case, Comparison

_LINE = 1  # thickness of lines in logical pixels
_BAR_MARGIN = 8


def draw(
    comparison: Comparison,
    *,
    view: str = "overlay",
    share_scale: bool = False,
    smooth: bool = True,
    colormap: str | None = None,
    top_share: float = TOP_SHARE,
    title: str | None = None,
    cell_size: int = 192,
    scale: float = 2,
    dark: bool = False,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Draws every map of a comparison, aligned and labelled.

    Args:
        comparison: what to draw.
        view: one of `views.VIEWS`.
        share_scale: one range for all maps of a method, so that classes and images compare; otherwise each map has
            its own. Scores of different methods have no common unit, so no range is shared between them.
        smooth: bilinear between patch centres; otherwise patches are visible as such.
        colormap: one of `render.COLORMAPS`; None for the default of signed or unsigned maps.
        top_share: share of the patches that the view ``patches`` shows.
        title: heading of the whole.
        cell_size: longer side of each picture in logical pixels.
        scale: pixels for a logical pixel; 2 for high-resolution screens and print.
        dark: light text on a dark ground.
        font: a TrueType file, for text outside the Latin letters that Pillow's own font has.

    Raises:
        InputError: how the images were normalised is not known.
        OptionError: sizes that `panels.panel` does not take.
        UnknownNameError: no such view or colour map.
    """
    if cell_size < 48 or not 0.25 <= scale <= 8:
        raise OptionError(f"found cell_size {cell_size} and scale {scale}, expected at least 48, and 0.25 to 8.")
    ranges = shared_ranges(comparison) if share_scale else {}
    side = round(cell_size * scale)
    rows: list[list[Cell | None]] = []
    for case in comparison.cases:
        picture = enlarged(comparison.pictures[case.model][case.image], side)
        row: list[Cell | None] = [Cell(picture, comparison.images[case.image] if _named(comparison) else "")]
        for label in comparison.methods:
            scores = comparison.scores(case, label)
            if scores is None:
                empty = np.full_like(picture, ImageColor.getrgb((DARK if dark else LIGHT).background))
                row.append(Cell(empty, remark(comparison, case, label)))
                continue
            explanation = comparison.explanations[case.model, label]
            drawn = draw_view(
                view,
                picture,
                scores,
                signed=explanation.signed,
                scale=ranges.get(label, "map"),
                smooth=smooth,
                colormap=colormap,
                share=top_share,
                thickness=max(1, round(_LINE * scale)),
                extent=explanation.extent_in(picture.shape[:2]),
            )
            row.append(Cell(drawn, remark(comparison, case, label)))
        rows.append(row)
    legends: list[Image.Image | None] = [None]
    for label in comparison.methods:
        signed = any(each.signed for (_, method), each in comparison.explanations.items() if method == label)
        bar = _bar(ranges.get(label), signed, colormap, cell_size - 2 * _BAR_MARGIN, dark, scale, font)
        legends.append(bar if view in COLOURED else None)
    return panel(
        rows,
        title=title,
        column_titles=["Input", *(heading(comparison, label) for label in comparison.methods)],
        row_titles=[row_title(comparison, case) for case in comparison.cases],
        legends=legends if any(legends) else None,
        cell_size=cell_size,
        scale=scale,
        dark=dark,
        font=font,
    )


def shared_ranges(comparison: Comparison) -> dict[str, tuple[float, float]]:
    """Lowest and highest score of all maps of a method, by its label."""
    maps: dict[str, list[Tensor]] = {}
    for (_, label), each in comparison.explanations.items():
        maps.setdefault(label, []).append(each.scores.detach().float().flatten().cpu())
    return {label: range_of(torch.cat(parts)) for label, parts in maps.items()}


def enlarged(picture: Pixels, side: int) -> Pixels:
    """A picture (H, W, 3) brought to a longer side of so many pixels, so that maps over it are drawn sharp."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    kind = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
    return np.asarray(cv2.resize(picture, size, interpolation=kind), np.uint8)


def heading(comparison: Comparison, label: str) -> str:
    """What stands above a method's maps: its title, and below it the options that are not the usual ones."""
    info = comparison.methods[label].info
    if label == info.name:
        return info.title
    options = label.removeprefix(f"{info.name}(")
    return label if options == label else f"{info.title}\n{options.removesuffix(')')}"


def row_title(comparison: Comparison, case: Case) -> str:
    """What stands beside a case: the model where there are several, what is explained, how probable it is."""
    model = [case.model] if len(comparison.subjects) > 1 else []
    name = " against ".join(each.split(",")[0] for each in case.names)
    return "\n".join([*model, name, *filter(None, [percentages(case)])])


def remark(comparison: Comparison, case: Case, label: str) -> str:
    """What has to be said of one map, if anything."""
    scores = comparison.scores(case, label)
    if scores is None:
        return "not defined on this model"
    if not bool(scores.isfinite().all()):
        return "NaN or infinite scores"
    if bool(scores.amax() == scores.amin()):
        return "constant: tells no patches apart"
    several = any(each.index for each in comparison.cases)
    remarks = {
        "the same for every class": several and not comparison.methods[label].info.class_specific,
        "approximate on this model": comparison.explanations[case.model, label].approximate is not None,
    }
    return ", ".join(text for text, applies in remarks.items() if applies)


def range_text(bounds: tuple[float, float], signed: bool) -> tuple[str, str]:
    """The ends of a colour bar; symmetric about zero where scores are signed."""
    most = max(map(abs, bounds))
    low, high = (-most, most) if signed else bounds
    return f"{low:.2g}", f"{high:.2g}"


def _named(comparison: Comparison) -> bool:
    return len(comparison.images) > 1


def _bar(
    bounds: tuple[float, float] | None,
    signed: bool,
    colormap: str | None,
    width: int,
    dark: bool,
    scale: float,
    font: str | os.PathLike[str] | None,
) -> Image.Image:
    ends: tuple[str | None, str | None] = (None, None)
    if bounds is not None:
        ends = range_text(bounds, signed)
    return colour_bar(
        colormap, signed=signed, low=ends[0], high=ends[1], width=max(48, width), dark=dark, scale=scale, font=font
    )
