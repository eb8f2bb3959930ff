"""Text that is measured before it is drawn, for panels and legends."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from vitexplain.errors import OptionError

__all__ = ["DARK", "LIGHT", "Pen", "Theme"]

Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"

_FRAME, _HAIRLINE = 3, 1
# What the font that comes with Pillow has beyond ASCII, and what to write instead of some things it has not.
_DEFAULT_FONT_EXTRAS = "…·±"
_STAND_INS = str.maketrans(
    {
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "-",
        "\N{MINUS SIGN}": "-",
        "\N{RIGHTWARDS ARROW}": "->",
        "\N{MULTIPLICATION SIGN}": "x",
        "\N{GREATER-THAN OR EQUAL TO}": ">=",
        "\N{LESS-THAN OR EQUAL TO}": "<=",
        "\N{LATIN SMALL LETTER SHARP S}": "ss",
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    }
)


@dataclass(frozen=True)
class Theme:
    """Colours of a drawing."""

    background: str
    title: str
    text: str
    accent: str
    hairline: str


LIGHT = Theme(background="#ffffff", title="#16181d", text="#4a4f59", accent="#0b5fcc", hairline="#d4d7dd")
DARK = Theme(background="#14161a", title="#f2f4f7", text="#b4bac4", accent="#6fb3ff", hairline="#3a3f48")


class Pen:
    """Text that is measured before it is drawn, in one theme and at one scale."""

    def __init__(self, theme: Theme, scale: float, font: str | os.PathLike[str] | None) -> None:
        self.theme, self.scale, self._file = theme, scale, font
        self._fonts: dict[int, Font] = {}

    def px(self, length: float) -> int:
        """Returns a logical length in pixels."""
        return max(1, round(length * self.scale))

    def font(self, size: int) -> Font:
        """Returns the font at a logical size.

        Raises:
            OptionError: the font file cannot be read.
        """
        if size not in self._fonts:
            try:
                self._fonts[size] = (
                    ImageFont.load_default(size * self.scale)
                    if self._file is None
                    else ImageFont.truetype(os.fspath(self._file), size * self.scale)
                )
            except (OSError, ValueError) as error:
                raise OptionError(f"font is {self._file!r}, expected a TrueType file: {error}.") from error
        return self._fonts[size]

    def width(self, text: str, font: Font) -> int:
        """Returns how wide a line comes out, in pixels."""
        return math.ceil(font.getlength(text))

    def height(self, lines: Sequence[str], size: int) -> int:
        """Returns how high some lines come out, in pixels."""
        return self._line_height(size) * len(lines)

    def wrap(self, text: str, font: Font, width: int, most: int) -> list[str]:
        """Breaks text into at most `most` lines of at most `width` pixels; what is cut off shows as an ellipsis.

        Line breaks in the text are kept, and each line so given keeps its place: of a very long name and, on the next
        line, a number, letters of the name are cut, never the number.
        """
        paragraphs = [paragraph for paragraph in self._writable(text).split("\n") if paragraph.strip()]
        if len(paragraphs) > most:
            paragraphs = [*paragraphs[: most - 1], " ".join(paragraphs[most - 1 :])]
        lines: list[str] = []
        for index, paragraph in enumerate(paragraphs):
            still_to_come = len(paragraphs) - index - 1
            room = most - len(lines) - still_to_come
            broken = self._break(paragraph, font, width)
            if len(broken) > room:
                rest = "".join(broken[room - 1 :])
                kept = self._longest(rest, font, width, ending="…")
                broken = [*broken[: room - 1], rest[:kept].rstrip(" ,_-(") + "…"]
            lines += [line.rstrip() for line in broken]
        return lines

    def start(self, width: int, height: int) -> Image.Image:
        """Returns the empty picture on which the pen writes from now on."""
        canvas = Image.new("RGB", (width, height), self.theme.background)
        self._draw = ImageDraw.Draw(canvas)
        return canvas

    def write(self, lines: Sequence[str], size: int, x: int, y: int, color: str, anchor: str = "la") -> None:
        """Writes lines from (x, y) down; the anchor is Pillow's, with the ascender (``a``) as its second letter."""
        for index, line in enumerate(lines):
            place = (x, y + index * self._line_height(size))
            self._draw.text(place, line, fill=color, font=self.font(size), anchor=anchor)

    def frame(self, box: tuple[int, int, int, int], strong: bool) -> None:
        """Draws a line around a box (left, top, right, bottom), outside of it."""
        thickness = self.px(_FRAME if strong else _HAIRLINE)
        left, top, right, bottom = box
        self._draw.rectangle(
            (left - thickness, top - thickness, right + thickness - 1, bottom + thickness - 1),
            outline=self.theme.accent if strong else self.theme.hairline,
            width=thickness,
        )

    def _line_height(self, size: int) -> int:
        return self.px(size * 1.3)

    def _break(self, paragraph: str, font: Font, width: int) -> list[str]:
        """Breaks one paragraph; blanks stay at the ends of lines, so that joining them gives it back."""
        lines, line = [], ""
        for piece in _pieces(paragraph):
            if self.width((line + piece).rstrip(), font) <= width:
                line += piece
                continue
            if line.strip():
                lines.append(line)
            line = piece.lstrip()
            while self.width(line.rstrip(), font) > width and len(line) > 1:  # one word, wider than the line
                kept = self._longest(line, font, width)
                lines.append(line[:kept])
                line = line[kept:]
        return [*lines, line] if line.strip() else lines

    def _longest(self, text: str, font: Font, width: int, ending: str = "") -> int:
        """Returns how many letters fit, at least one."""
        fits, too_many = 1, min(len(text), width) + 1  # hardly a letter is narrower than a pixel
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.width(text[:middle] + ending, font) <= width:
                fits = middle
            else:
                too_many = middle
        return fits

    def _writable(self, text: str) -> str:
        text = "".join(letter if letter == "\n" or letter.isprintable() else " " for letter in text)
        if self._file is not None:
            return text
        folded = []
        for letter in text.translate(_STAND_INS):
            if not letter.isascii() and letter not in _DEFAULT_FONT_EXTRAS:
                base = "".join(part for part in unicodedata.normalize("NFKD", letter) if part.isascii())
                letter = base or ("" if unicodedata.combining(letter) else "?")
            folded.append(letter)
        return "".join(folded)


def _pieces(text: str) -> list[str]:
    """Cuts text after blanks and after the signs at which long names may be broken."""
    pieces, start = [], 0
    for index, letter in enumerate(text):
        if letter in " _-/":
            pieces.append(text[start : index + 1])
            start = index + 1
    return [*pieces, text[start:]]
