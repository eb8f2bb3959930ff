"""Pictures of comparisons: what is drawn is what the scores say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitexplain import Comparison, InputError, OptionError, UnknownNameError, compare
from vitexplain.colormaps import SIGNED_COLORMAP, color_table
from vitexplain.comparison.picture import draw, heading, remark, shared_ranges
from vitexplain.comparison.views import VIEWS, draw_view, heat_of, highest_patches, range_of
from vitexplain.data.scenes import SPLITS, make_scene
from vitexplain.registry import create_method

SIDE, MARGIN, GAP = 96, 20, 10


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    picture = Image.fromarray(make_scene(SPLITS["test"][0], num_objects=2).image)
    signed = create_method("gradcam", relu=False)
    return compare("scenes", picture, ["rollout", "tokentm", signed], top=2)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(60, 200, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def peak() -> torch.Tensor:
    """One patch of a 4×6 grid that stands out; each patch is 10×10 pixels of `picture`."""
    scores = torch.zeros(4, 6)
    scores[1, 4] = 3.0
    return scores


class TestViews:
    def test_patches_are_shown_and_the_rest_is_dim(self, picture: np.ndarray, peak: torch.Tensor) -> None:
        drawn = draw_view("patches", picture, peak, share=1 / 24)
        lit = (drawn == picture).all(-1)
        assert lit[10:20, 40:50].all()
        lit[10:20, 40:50] = False
        assert not lit.any()
        outside = np.delete(drawn.reshape(4, 10, 6, 10, 3).transpose(0, 2, 1, 3, 4).reshape(24, -1, 3), 10, 0)
        assert (outside == outside[..., :1]).all(), "the rest is grey"

    @pytest.mark.parametrize(("share", "count"), [(0.1, 2), (0.5, 12), (1.0, 24), (0.001, 1)])
    def test_so_many_patches_are_the_highest(self, share: float, count: int) -> None:
        scores = torch.randperm(24, generator=torch.Generator().manual_seed(1)).reshape(4, 6).float()
        chosen = highest_patches(scores, (40, 60), share)
        assert chosen.sum() == count * 100
        grid = torch.from_numpy(chosen[5::10, 5::10])
        assert set(scores[grid].tolist()) == set(range(24 - count, 24))

    def test_box_surrounds_what_is_hot(self, picture: np.ndarray, peak: torch.Tensor) -> None:
        drawn = draw_view("box", picture, peak, smooth=False, thickness=1)
        rows, columns = np.nonzero((drawn == 255).all(-1))
        assert (rows.min(), rows.max()) == (10, 19)
        assert (columns.min(), columns.max()) == (40, 49)
        assert (drawn[12:18, 42:48] == picture[12:18, 42:48]).all(), "nothing is drawn inside"

    def test_mask_keeps_what_reaches_half(self, picture: np.ndarray) -> None:
        scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * 4)
        kept = (draw_view("mask", picture, scores, smooth=False) == picture).all(-1)
        assert kept[:, 30:].all()
        assert not kept[:, :30].any()

    def test_contours_leave_what_is_far_from_them(self, picture: np.ndarray, peak: torch.Tensor) -> None:
        drawn = draw_view("contours", picture, peak, thickness=1)
        assert (drawn[:, :25] == picture[:, :25]).all()
        assert (drawn[:, 35:] != picture[:, 35:]).any()

    def test_unsmoothed_patches_are_flat(self, picture: np.ndarray) -> None:
        scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
        tiles = draw_view("heatmap", picture, scores, smooth=False).reshape(4, 10, 6, 10, 3).transpose(0, 2, 1, 3, 4)
        assert (tiles == tiles[:, :, :1, :1]).all()
        smooth = draw_view("heatmap", picture, scores).reshape(4, 10, 6, 10, 3).transpose(0, 2, 1, 3, 4)
        assert not (smooth == smooth[:, :, :1, :1]).all()

    def test_zero_of_a_signed_map_is_the_middle_colour(self, picture: np.ndarray) -> None:
        scores = torch.tensor([[-1.0, 0.0, 4.0]])
        drawn = draw_view("heatmap", picture, scores, signed=True, smooth=False)
        table = color_table(SIGNED_COLORMAP)
        assert (drawn[20, 30] == table[128]).all()
        assert (drawn[20, 55] == table[255]).all()
        assert (drawn[20, 5] == table[round(255 * 0.375)]).all()

    @pytest.mark.parametrize("view", ["mask", "box", "contours"])
    def test_evidence_against_is_no_evidence(self, picture: np.ndarray, view: str) -> None:
        scores = torch.zeros(4, 6)
        scores[0, 0], scores[3, 5] = -9.0, 4.0
        drawn = draw_view(view, picture, scores, signed=True, smooth=False)
        reference = picture if view != "mask" else draw_view("mask", picture, torch.zeros(4, 6))
        assert (drawn[:12, :12] == reference[:12, :12]).all()

    def test_a_given_range_is_used(self) -> None:
        heat = heat_of(torch.tensor([[0.0, 1.0]]), (2, 4), signed=False, scale=(0, 4), smooth=False)
        assert heat.tolist() == [[0, 0, 0.25, 0.25]] * 2

    def test_range_of_what_is_flat_or_broken(self) -> None:
        assert range_of(torch.tensor([2.0, 2.0])) == (2, 3)
        assert range_of(torch.tensor([torch.nan, 1.0, 3.0, torch.inf])) == (1, 3)
        assert range_of(torch.tensor([torch.nan])) == (0, 1)

    @pytest.mark.parametrize("view", VIEWS)
    def test_a_flat_map_is_drawn(self, picture: np.ndarray, view: str) -> None:
        assert draw_view(view, picture, torch.ones(4, 6)).shape == picture.shape

    def test_what_cannot_be_drawn_is_refused(self, picture: np.ndarray, peak: torch.Tensor) -> None:
        with pytest.raises(UnknownNameError, match="overlay"):
            draw_view("overlap", picture, peak)
        with pytest.raises(InputError, match="uint8"):
            draw_view("overlay", picture.astype(np.float32), peak)


def cells(image: Image.Image, rows: int, columns: int, top: int) -> np.ndarray:
    """Cells (rows, columns, SIDE, SIDE, 3) of a picture without text below them."""
    found = np.asarray(image)
    left = image.width - MARGIN - columns * SIDE - (columns - 1) * GAP
    return np.stack(
        [
            [
                found[top[row] : top[row] + SIDE, left + c * (SIDE + GAP) : left + c * (SIDE + GAP) + SIDE]
                for c in range(columns)
            ]
            for row in range(rows)
        ]
    )


class TestPicture:
    def test_class_specific_maps_change_with_the_class_and_others_stay(self, comparison: Comparison) -> None:
        drawn = np.asarray(draw(comparison, cell_size=SIDE, scale=1))
        input_ = comparison.pictures["scenes"][0]
        rows = [
            y
            for y in range(drawn.shape[0] - SIDE)
            for x in [drawn.shape[1] - MARGIN - 4 * SIDE - 3 * GAP]
            if (drawn[y : y + SIDE, x : x + SIDE] == input_).all()
        ]
        assert len(rows) == 2, "the model's input stands at the left of each row, pixel for pixel"
        found = cells(Image.fromarray(drawn), 2, 4, rows)
        same = [(found[0, column] == found[1, column]).all() for column in range(4)]
        assert same == [True, True, False, False]

    def test_is_as_sharp_as_asked(self, comparison: Comparison) -> None:
        one, two = (draw(comparison, cell_size=SIDE, scale=scale) for scale in (1, 2))
        assert abs(two.width - 2 * one.width) <= 4
        assert abs(two.height - 2 * one.height) <= 8

    def test_a_shared_range_holds_all_maps_of_a_method(self, comparison: Comparison) -> None:
        scores = comparison["tokentm"].scores
        assert shared_ranges(comparison)["tokentm"] == (scores.min().item(), scores.max().item())
        plain, shared = (draw(comparison, cell_size=SIDE, scale=1, share_scale=each) for each in (False, True))
        assert plain.size == shared.size
        assert (np.asarray(plain) != np.asarray(shared)).any()

    def test_views_without_colours_have_no_colour_bar(self, comparison: Comparison) -> None:
        heights = {view: draw(comparison, view=view, cell_size=SIDE, scale=1).height for view in VIEWS}
        assert heights["overlay"] == heights["heatmap"] > heights["mask"] == heights["patches"]

    def test_headings_and_remarks(self, comparison: Comparison) -> None:
        assert heading(comparison, "tokentm") == "TokenTM"
        assert heading(comparison, "gradcam(relu=False)") == "Grad-CAM\nrelu=False"
        case = comparison.cases[0]
        assert remark(comparison, case, "rollout") == "the same for every class"
        assert remark(comparison, case, "tokentm") == ""
        rough = replace(comparison["rollout"], approximate="windows")
        found = replace(comparison, explanations={**comparison.explanations, ("scenes", "rollout"): rough})
        assert remark(found, case, "rollout") == "the same for every class, approximate on this model"
        scores = comparison["tokentm"].scores
        kept = scores[0, 0].clone()
        try:
            scores[0, 0] = 1
            assert "constant" in remark(comparison, case, "tokentm")
            scores[0, 0, 0, 0] = torch.nan
            assert "NaN" in remark(comparison, case, "tokentm")
        finally:
            scores[0, 0] = kept

    @pytest.mark.parametrize("options", [{"cell_size": 20}, {"scale": 9}])
    def test_bad_sizes_are_refused(self, comparison: Comparison, options: dict[str, float]) -> None:
        with pytest.raises(OptionError, match="expected at least 48"):
            draw(comparison, **options)

    def test_files(self, comparison: Comparison, tmp_path: Path) -> None:
        with Image.open(comparison.save(tmp_path / "a.PNG", cell_size=SIDE)) as png:
            size = png.size
        content = comparison.save(tmp_path / "a.pdf", cell_size=SIDE).read_bytes()
        assert content.startswith(b"%PDF")
        (box,) = [line for line in content.split(b"\n") if b"MediaBox" in line]
        width, height = (float(each) for each in box.split(b"[")[1].split(b"]")[0].split()[2:])
        assert (width, height) == pytest.approx((size[0] * 72 / 192, size[1] * 72 / 192), abs=1)
        with pytest.raises(InputError, match="gif"):
            comparison.save(tmp_path / "a.gif")

    def test_notebooks_get_a_picture_without_script(self, comparison: Comparison) -> None:
        for each in (comparison, comparison["tokentm"]):
            html = each._repr_html_()
            assert html.startswith('<img src="data:image/png;base64,')
            assert html.count("<") == 1
