from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitexplain.errors import InputError, OptionError, UnknownNameError
from vitexplain.lettering import DARK, LIGHT, Pen
from vitexplain.panels import Cell, colour_bar, panel

LONG = "koala, koala bear, kangaroo bear, native bear, Phascolarctos cinereus, and so on and on"
UNBROKEN = "generic_attention_with_gradient_rollout_and_an_incredibly_long_name" * 3


def plain(height: int = 64, width: int = 64, color: int = 120) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def inked_columns(image: Image.Image, rows: slice) -> np.ndarray:
    """Indices of the pixel columns in which something stands in the given rows."""
    values = np.asarray(image).astype(int)[rows]
    return np.flatnonzero((np.abs(values - np.asarray(image)[0, 0]).max(axis=-1) > 40).any(axis=0))


class TestPanel:
    def test_size_without_text(self) -> None:
        made = panel([[Cell(plain()), Cell(plain())], [Cell(plain()), Cell(plain())]], cell_size=100)
        assert made.mode == "RGB"
        assert made.size == (20 + 100 + 10 + 100 + 20, 20 + 100 + 10 + 100 + 20)

    def test_cells_stand_where_they_should(self) -> None:
        cells = [[Cell(plain(100, 100, 10 * (2 * row + column + 1))) for column in range(2)] for row in range(2)]
        made = np.asarray(panel(cells, cell_size=100))
        for row in range(2):
            for column in range(2):
                y, x = 20 + row * 110, 20 + column * 110
                assert (made[y : y + 100, x : x + 100] == 10 * (2 * row + column + 1)).all()

    def test_text_adds_room_and_scale_multiplies(self) -> None:
        cells = [[Cell(plain(), "tabby cat\n87 %")]]
        bare, titled = panel(cells), panel(cells, title="T", column_titles=["C"], row_titles=["R"])
        assert titled.width > bare.width
        assert titled.height > bare.height
        doubled = panel(cells, scale=2)
        assert abs(doubled.width - 2 * bare.width) <= 2
        assert abs(doubled.height - 2 * bare.height) <= 4

    @pytest.mark.parametrize("text", [LONG, UNBROKEN, "W" * 500, "a\nb\nc\nd", "x " * 300])
    @pytest.mark.parametrize("dark", [False, True])
    def test_captions_and_titles_stay_within_their_columns(self, text: str, dark: bool) -> None:
        size, gap, margin = 96, 10, 20
        background = plain(color=22 if dark else 255)
        made = panel(
            [[Cell(background, text), Cell(background, text)]], column_titles=[text] * 2, cell_size=size, dark=dark
        )
        top = (
            panel([[Cell(background), None]], column_titles=[text] * 2, cell_size=size, dark=dark).height
            - size
            - margin
        )
        for rows in (slice(0, top - 4), slice(top + size + 3, None)):
            inked = inked_columns(made, rows)
            assert inked.size
            assert inked.min() >= margin - 1
            assert inked.max() <= made.width - margin
            between = (inked > margin + size) & (inked < margin + size + gap - 1)
            assert not between.any()

    @pytest.mark.parametrize("text", [LONG, UNBROKEN, "short"])
    def test_row_titles_end_before_the_cells(self, text: str) -> None:
        made = panel([[Cell(plain(color=255))]], row_titles=[text], cell_size=200)
        left = made.width - 200 - 20
        inked = inked_columns(made, slice(22, -22))
        assert inked[inked < left - 2].min() >= 19
        assert not ((inked > left - 8) & (inked < left - 1)).any()

    def test_legends_stand_below_their_columns(self) -> None:
        cells = [[Cell(plain(color=255)), Cell(plain(color=255))]] * 2
        legend = Image.new("RGB", (60, 12), "#0000ff")
        bare, made = panel(cells, cell_size=100), panel(cells, cell_size=100, legends=[None, legend])
        assert made.height == bare.height + 10 + 12
        blue = (np.asarray(made) == (0, 0, 255)).all(-1)
        rows, columns = np.nonzero(blue)
        assert blue.sum() == 60 * 12
        assert (rows.min(), rows.max()) == (20 + 110 + 100 + 10, made.height - 20 - 1)
        assert (columns.min(), columns.max()) == (20 + 110 + 20, 20 + 110 + 79)
        with pytest.raises(OptionError, match="1 legends, expected 2"):
            panel(cells, legends=[legend])

    def test_aspect_ratio_is_kept(self) -> None:
        made = panel([[Cell(plain(50, 200, 0))]], cell_size=100)
        assert made.size == (140, 25 + 40)
        assert panel([[Cell(plain(200, 50, 0))]], cell_size=100).size == (90, 140)

    def test_holes_and_short_rows(self) -> None:
        made = panel([[Cell(plain()), None, Cell(plain())], [Cell(plain(), "last")], [None, None]], cell_size=64)
        assert made.width == 3 * 64 + 2 * 10 + 40

    def test_highlight_frames_the_cell(self) -> None:
        made = np.asarray(panel([[Cell(plain(), highlight=True)]], cell_size=64))
        accent = tuple(int(LIGHT.accent[place : place + 2], 16) for place in (1, 3, 5))
        assert tuple(made[18, 40]) == accent
        assert tuple(made[40, 85]) == accent
        assert (made[20:84, 20:84] == 120).all()

    def test_dark_and_light(self) -> None:
        for dark, theme in ((False, LIGHT), (True, DARK)):
            corner = "#" + bytes(panel([[Cell(plain())]], dark=dark).getpixel((0, 0))).hex()
            assert corner == theme.background

    def test_grey_cells(self) -> None:
        assert (np.asarray(panel([[Cell(plain()[..., 0])]], cell_size=64))[20:84, 20:84] == 120).all()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"column_titles": ["a", "b"]}, "found 2 column_titles, expected 1"),
            ({"row_titles": []}, "found 0 row_titles"),
            ({"cell_size": 3}, "cell_size 3"),
            ({"scale": 100}, "scale 100"),
            ({"font": "missing.ttf", "title": "T"}, "missing.ttf"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(OptionError) as caught:
            panel([[Cell(plain())]], **options)
        assert words in str(caught.value)

    def test_bad_cells(self) -> None:
        for rows in ([], [[]]):
            with pytest.raises(InputError, match="no cells"):
                panel(rows)
        for array in (plain() / 255, plain()[:, :0], np.zeros((2, 2, 4), np.uint8)):
            with pytest.raises(InputError, match="expected uint8"):
                Cell(array)


class TestColourBar:
    @pytest.mark.parametrize("signed", [False, True])
    def test_shows_the_table_from_end_to_end(self, signed: bool) -> None:
        made = np.asarray(colour_bar("grey", signed=signed, width=256))
        assert made.shape[1] == 256 + 16
        np.testing.assert_allclose(made[12, 8:-8, 0], np.arange(256), atol=1)

    def test_labels_change_and_unknown_maps_are_refused(self) -> None:
        assert colour_bar(low="", high="").height < colour_bar().height
        assert np.asarray(colour_bar(high="most")).tobytes() != np.asarray(colour_bar()).tobytes()
        with pytest.raises(UnknownNameError, match="colour map"):
            colour_bar("rainbow")
        with pytest.raises(OptionError, match="width 3"):
            colour_bar(width=3)


class TestPen:
    pen = Pen(LIGHT, 1, None)

    def wrap(self, text: str, width: int = 100, most: int = 2) -> list[str]:
        return self.pen.wrap(text, self.pen.font(12), width, most)

    @settings(deadline=None, max_examples=150)
    @given(st.text(max_size=120), st.integers(30, 200), st.integers(1, 4))
    def test_never_wider_or_longer_than_asked(self, text: str, width: int, most: int) -> None:
        lines = self.wrap(text, width, most)
        assert len(lines) <= most
        assert all(self.pen.width(line, self.pen.font(12)) <= width for line in lines)
        assert all(line.strip() for line in lines)

    def test_short_text_stays(self) -> None:
        assert self.wrap("tabby cat") == ["tabby cat"]
        assert self.wrap("  ") == []

    def test_breaks_at_words_and_underscores(self) -> None:
        assert self.wrap("African elephant, Loxodonta", 110, 3) == ["African elephant,", "Loxodonta"]
        assert self.wrap("generic_attention_rollout", 110, 3) == ["generic_attention_", "rollout"]

    def test_what_is_cut_shows_an_ellipsis(self) -> None:
        lines = self.wrap(LONG)
        assert len(lines) == 2
        assert lines[1].endswith("…")

    def test_the_number_on_the_second_line_survives(self) -> None:
        name, number = self.wrap(f"{LONG}\n8.2 %")
        assert name.startswith("koala")
        assert name.endswith("…")
        assert number == "8.2 %"

    def test_letters_that_the_font_lacks_are_replaced(self) -> None:
        assert self.wrap("Tüte – 漢 ≥ 1\t2", 300) == ["Tute - ? >= 1 2"]

    def test_a_font_of_ones_own(self, tmp_path: Path) -> None:
        font_file = pytest.importorskip("matplotlib").get_data_path() + "/fonts/ttf/DejaVuSans.ttf"
        own = Pen(LIGHT, 1, font_file)
        assert own.wrap("Tüte – Ω", own.font(12), 300, 1) == ["Tüte – Ω"]
