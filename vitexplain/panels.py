"""Grids of pictures with titles and captions, and colour bars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vitexplain.errors import InputError, OptionError
from vitexplain.lettering import DARK, LIGHT, Pen
from vitexplain.render import SIGNED_COLORMAP, UNSIGNED_COLORMAP, Pixels, colourise

__all__ = ["Cell", "colour_bar", "panel"]

# All lengths in logical pixels, multiplied by `scale` when drawn.
_MARGIN, _GAP, _ROW_GAP, _TEXT_GAP, _ROW_TITLE = 20, 10, 16, 6, 112
_TITLE_SIZE, _HEADING_SIZE, _CAPTION_SIZE = 20, 14, 12
_CELL_LINES, _ROW_TITLE_LINES = 2, 4


@dataclass(frozen=True)
class Cell:
    """One picture of a panel.

    Attributes:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        caption: what stands below, at most two lines: longer text is wrapped and cut. What stands after a line break,
            such as the probability after the class name, is never cut for what stands before it.
        highlight: whether to frame the picture.

    Raises:
        InputError: the image has another shape or type.
    """

    image: Pixels
    caption: str = ""
    highlight: bool = False

    def __post_init__(self) -> None:
        shape = self.image.shape
        fits = len(shape) == 2 or (len(shape) == 3 and shape[-1] == 3)
        if self.image.dtype != np.uint8 or not fits or 0 in shape:
            raise InputError(f"found a cell {shape} of type {self.image.dtype}, expected uint8 (H, W, 3) or (H, W).")


def panel(
    rows: Sequence[Sequence[Cell | None]],
    *,
    title: str | None = None,
    column_titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    legends: Sequence[Image.Image | None] | None = None,
    cell_size: int = 224,
    dark: bool = False,
    scale: float = 1.0,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Lays pictures out as an aligned grid with text.

    Args:
        rows: the cells, row by row; None leaves a place empty, and rows may end early.
        title: heading of the whole.
        column_titles: one for each column, above it.
        row_titles: one for each row, left of it.
        legends: one for each column, such as a `colour_bar` drawn at the same scale, below it; None for none.
        cell_size: longer side at which each picture is shown, in logical pixels; its aspect ratio is kept.
        dark: light text on a dark ground.
        scale: pixels for a logical pixel; 2 for high-resolution screens and print.
        font: a TrueType file, for text outside the Latin letters that Pillow's own font has.

    Returns:
        An RGB image.

    Raises:
        InputError: no cells.
        OptionError: numbers of titles or legends that do not match the grid, bad sizes, a font that cannot be read.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise InputError("found no cells, expected at least one row with one cell.")
    for name, given, count in (
        ("column_titles", column_titles, columns),
        ("row_titles", row_titles, len(rows)),
        ("legends", legends, columns),
    ):
        _check_count(name, given, count)
    if cell_size < 48 or not 0.25 <= scale <= 8:
        raise OptionError(f"found cell_size {cell_size} and scale {scale}, expected at least 48, and 0.25 to 8.")
    pen = Pen(DARK if dark else LIGHT, scale, font)

    side = pen.px(cell_size)
    grid = [[_fit(cell, side) if cell else None for cell in row] for row in rows]
    widest = max((image.width for row in grid for image in row if image), default=side)
    cell_width = max(widest, side // 2)  # narrow pictures need room for text, too
    heights = [max((image.height for image in row if image), default=side // 4) for row in grid]

    heading, caption = pen.font(_HEADING_SIZE), pen.font(_CAPTION_SIZE)
    top_texts = [pen.wrap(text, heading, cell_width, _CELL_LINES) for text in column_titles or ()]
    side_texts = [pen.wrap(text, heading, pen.px(_ROW_TITLE), _ROW_TITLE_LINES) for text in row_titles or ()]
    captions = [
        [pen.wrap(cell.caption if cell else "", caption, cell_width, _CELL_LINES) for cell in row] for row in rows
    ]

    margin, gap, text_gap = pen.px(_MARGIN), pen.px(_GAP), pen.px(_TEXT_GAP)
    row_gap = pen.px(_ROW_GAP) if any(lines for row in captions for lines in row) else gap
    row_title_width = max((pen.width(line, heading) for lines in side_texts for line in lines), default=0)
    left = margin + (row_title_width + text_gap * 2 if row_title_width else 0)
    width = left + columns * cell_width + (columns - 1) * gap + margin
    title_lines = pen.wrap(title or "", pen.font(_TITLE_SIZE), width - left - margin, 3)
    title_height = pen.height(title_lines, _TITLE_SIZE) + (2 * text_gap if title_lines else 0)
    top_height = max((pen.height(lines, _HEADING_SIZE) for lines in top_texts), default=0)
    first = margin + title_height + top_height + (text_gap if top_height else 0)
    below = [max((pen.height(lines, _CAPTION_SIZE) for lines in row), default=0) for row in captions]
    for index, text_height in enumerate(below):
        below[index] = text_height + (text_gap if text_height else 0)
        if side_texts:  # a row is never lower than its title
            heights[index] = max(heights[index], pen.height(side_texts[index], _HEADING_SIZE))
    legend_height = max((legend.height + row_gap for legend in legends or () if legend), default=0)
    height = first + sum(heights) + sum(below) + (len(rows) - 1) * row_gap + legend_height + margin

    canvas = pen.start(width, height)
    pen.write(title_lines, _TITLE_SIZE, left, margin, color=pen.theme.title)
    for column, lines in enumerate(top_texts):
        middle = left + column * (cell_width + gap) + cell_width // 2
        above = first - text_gap - pen.height(lines, _HEADING_SIZE)
        pen.write(lines, _HEADING_SIZE, middle, above, color=pen.theme.title, anchor="ma")
    top = first
    for index, row in enumerate(rows):
        if side_texts:
            lines = side_texts[index]
            beside = top + (heights[index] - pen.height(lines, _HEADING_SIZE)) // 2
            pen.write(lines, _HEADING_SIZE, left - 2 * text_gap, beside, color=pen.theme.title, anchor="ra")
        for column, cell in enumerate(row):
            image = grid[index][column]
            if cell is None or image is None:
                continue
            x = left + column * (cell_width + gap) + (cell_width - image.width) // 2
            y = top + (heights[index] - image.height) // 2
            canvas.paste(image, (x, y))
            pen.frame((x, y, x + image.width, y + image.height), strong=cell.highlight)
            color = pen.theme.accent if cell.highlight else pen.theme.text
            middle = left + column * (cell_width + gap) + cell_width // 2
            pen.write(captions[index][column], _CAPTION_SIZE, middle, top + heights[index] + text_gap, color, "ma")
        top += heights[index] + below[index] + row_gap
    for column, legend in enumerate(legends or ()):
        if legend is not None:
            middle = left + column * (cell_width + gap) + cell_width // 2
            canvas.paste(legend, (middle - legend.width // 2, top))
    return canvas


def colour_bar(
    colormap: str | None = None,
    *,
    signed: bool = False,
    low: str | None = None,
    middle: str | None = None,
    high: str | None = None,
    width: int = 224,
    dark: bool = False,
    scale: float = 1.0,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Draws the legend of a colour map.

    Args:
        colormap: a name from `render.COLORMAPS`; None for the default of signed or unsigned maps.
        signed: chooses the default colour map and labels.
        low: label at the left end; None for ``"low"`` or ``"against"``.
        middle: label in the middle; None for nothing or ``"0"``.
        high: label at the right end; None for ``"high"`` or ``"for"``.
        width: length of the bar in logical pixels.
        dark: light text on a dark ground.
        scale: pixels for a logical pixel.
        font: a TrueType file, as in `panel`.

    Returns:
        An RGB image.

    Raises:
        OptionError: bad sizes, or a font that cannot be read.
        UnknownNameError: no such colour map.
    """
    if width < 48 or not 0.25 <= scale <= 8:
        raise OptionError(f"found width {width} and scale {scale}, expected at least 48, and 0.25 to 8.")
    pen = Pen(DARK if dark else LIGHT, scale, font)
    defaults = ("against", "0", "for") if signed else ("low", "", "high")
    given = (low, middle, high)
    length, thickness, margin = pen.px(width), pen.px(12), pen.px(8)
    text_font = pen.font(_CAPTION_SIZE)
    labels = [
        pen.wrap(default if text is None else text, text_font, length // 3 - pen.px(2), 1)
        for text, default in zip(given, defaults, strict=True)
    ]
    text_height = max(pen.height(lines, _CAPTION_SIZE) for lines in labels)
    space = pen.px(4) if text_height else 0
    canvas = pen.start(length + 2 * margin, thickness + space + text_height + 2 * margin)
    ramp = np.tile(np.linspace(0, 1, length, dtype=np.float32), (thickness, 1))
    bar = colourise(ramp, colormap or (SIGNED_COLORMAP if signed else UNSIGNED_COLORMAP))
    canvas.paste(Image.fromarray(bar), (margin, margin))
    below = margin + thickness + space
    places = ((margin, "la"), (margin + length // 2, "ma"), (margin + length, "ra"))
    for lines, (x, anchor) in zip(labels, places, strict=True):
        pen.write(lines, _CAPTION_SIZE, x, below, pen.theme.text, anchor)
    return canvas


def _fit(cell: Cell, side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(cell.image)).convert("RGB")
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)


def _check_count(name: str, given: Sequence[object] | None, count: int) -> None:
    if given is not None and len(given) != count:
        raise OptionError(f"found {len(given)} {name}, expected {count}, one for each.")
