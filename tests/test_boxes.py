"""Boxes on pictures: drawn by hand, over explanations, and by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vitexplain import Explanation, InputError, OptionError, get_explainer
from vitexplain.boxes import ANNOTATED, FOUND, draw_boxes, heatmap_to_boxes
from vitexplain.cli import app
from vitexplain.data import open_dataset
from vitexplain.render import evidence

GREY = 100


def plain(count: int = 1, height: int = 20, width: int = 30) -> np.ndarray:
    return np.full((count, height, width, 3), GREY, np.uint8)


def painted(pictures: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (pictures == np.array(colour, np.uint8)).all(-1)


def explanation(scores: torch.Tensor, **options: Any) -> Explanation:
    return Explanation(
        scores=scores,
        targets=torch.zeros(scores.shape[:-2], dtype=torch.int64),
        logits=torch.zeros(len(scores), 3),
        method="rollout",
        options={},
        grid=(scores.shape[-2], scores.shape[-1]),
        image_size=(20, 30),
        **options,
    )


@pytest.mark.parametrize("thickness", [1, 2, 3])
def test_the_line_lies_just_inside_of_the_box(thickness: int) -> None:
    drawn = draw_boxes(plain(), [torch.tensor([[5, 4, 21, 17]])], color=(9, 200, 30), thickness=thickness)[0]
    inside, within = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    inside[4:17, 5:21] = True
    within[4 + thickness : 17 - thickness, 5 + thickness : 21 - thickness] = True
    np.testing.assert_array_equal(painted(drawn, (9, 200, 30)), inside & ~within)
    rim = (drawn != GREY).any(-1) & ~painted(drawn, (9, 200, 30))
    beside = np.zeros((20, 30), bool)
    beside[3:18, 4:22] = True
    core = np.zeros((20, 30), bool)
    core[5 + thickness : 16 - thickness, 6 + thickness : 20 - thickness] = True
    np.testing.assert_array_equal(rim, (beside & ~inside) | (within & ~core))


def test_pictures_stay_as_they_are_and_each_gets_its_own_boxes() -> None:
    pictures = plain(3)
    boxes = [torch.zeros(0, 4), torch.tensor([[1.0, 1, 9, 9], [15, 5, 25, 15]]), np.array([[2, 2, 8, 8]])]
    drawn = draw_boxes(pictures, boxes)
    assert (pictures == GREY).all()
    assert (drawn[0] == GREY).all()
    assert painted(drawn[1], FOUND)[[1, 5], [1, 15]].all()
    assert not painted(drawn[2], FOUND)[5, 15]


def test_a_line_is_never_hidden_by_the_rim_of_another_box() -> None:
    alone, between = torch.tensor([[4, 4, 26, 16]]), torch.tensor([[4, 4, 26, 16], [5, 5, 14, 15], [3, 2, 28, 18]])
    line = painted(draw_boxes(plain(), [alone]), FOUND)
    assert painted(draw_boxes(plain(), [between]), FOUND)[line].all()


def test_a_box_that_reaches_beyond_the_picture_is_drawn_at_its_border() -> None:
    beyond = draw_boxes(plain(), [torch.tensor([[-5.0, 3, 99, 40]])])
    np.testing.assert_array_equal(beyond, draw_boxes(plain(), [torch.tensor([[0, 3, 30, 20]])]))
    assert painted(beyond[0], FOUND)[10, [0, 29]].all()


def test_a_box_smaller_than_its_line_is_filled() -> None:
    drawn = draw_boxes(plain(), [torch.tensor([[10, 10, 13, 13]])], thickness=2)
    assert painted(drawn[0], FOUND).sum() == 9


@pytest.mark.parametrize(("side", "thickness"), [(20, 1), (96, 1), (224, 2), (448, 4)])
def test_lines_grow_with_the_picture(side: int, thickness: int) -> None:
    boxes, pictures = [torch.tensor([[0, 0, side, side]])], plain(1, side, side + 30)
    np.testing.assert_array_equal(draw_boxes(pictures, boxes), draw_boxes(pictures, boxes, thickness=thickness))


def test_refusals() -> None:
    box = [torch.tensor([[1, 1, 5, 5]])]
    with pytest.raises(OptionError, match="thickness"):
        draw_boxes(plain(), box, thickness=0)
    for pictures in (plain()[0], plain() / 255, plain(2), plain()[..., :2]):
        with pytest.raises(InputError, match="expected uint8"):
            draw_boxes(pictures, box)
    with pytest.raises(InputError, match="x0 < x1"):
        draw_boxes(plain(), [torch.tensor([[5, 1, 5, 9]])])


def test_an_overlay_shows_annotated_boxes_and_those_around_the_heat() -> None:
    scores = torch.zeros(2, 2, 3)
    scores[0, 0, 0], scores[1, 1, 2] = 1.0, 1.0
    explained, pictures = explanation(scores), plain(2)
    usual = explained.overlay(pictures)
    truth = [torch.tensor([[2, 2, 9, 9]]), torch.zeros(0, 4)]
    annotated = explained.overlay(pictures, boxes=truth)
    np.testing.assert_array_equal(annotated, draw_boxes(usual, truth, color=ANNOTATED))
    found = heatmap_to_boxes(explained.heatmap((20, 30)), 0.5)
    assert [len(each) for each in found] == [1, 1]
    np.testing.assert_array_equal(explained.overlay(pictures, box_threshold=0.5), draw_boxes(usual, found))
    both = explained.overlay(pictures, boxes=truth, box_threshold=0.5)
    np.testing.assert_array_equal(both, draw_boxes(annotated, found))


def test_boxes_of_signed_maps_go_around_what_speaks_for_the_target() -> None:
    scores = torch.zeros(3, 2, 3)
    scores[0, 0, 0], scores[0, 1, 2] = 1.0, -0.9
    scores[1, 1, 2] = -1.0
    explained, usual = explanation(scores, signed=True), explanation(scores.clamp(min=0))
    pictures, plainly = plain(3), explanation(scores, signed=True).overlay(plain(3))
    expected = heatmap_to_boxes(usual.heatmap((20, 30)), 0.3)
    assert [len(each) for each in expected] == [1, 0, 0]
    np.testing.assert_array_equal(explained.overlay(pictures, box_threshold=0.3), draw_boxes(plainly, expected))


def test_each_of_several_targets_has_its_own_boxes() -> None:
    scores = torch.zeros(1, 2, 2, 3)
    scores[0, 0, 0, 0], scores[0, 1, 1, 2] = 1.0, 1.0
    overlays = explanation(scores).overlay(plain(), box_threshold=0.5)
    for k in range(2):
        np.testing.assert_array_equal(overlays[:, k], explanation(scores[:, k]).overlay(plain(), box_threshold=0.5))


def test_a_panel_passes_boxes_on() -> None:
    scores = torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0))
    usual = np.array(explanation(scores).panel(plain()))
    assert not painted(usual, ANNOTATED).any()
    drawn = np.array(explanation(scores).panel(plain(), boxes=[torch.tensor([[5, 5, 25, 15]])]))
    assert (np.abs(drawn.astype(int) - ANNOTATED).max(-1) < 30).any()  # enlarged, so hardly the colour itself


def test_the_command_draws_and_records_boxes(tmp_path: Path) -> None:
    scene = open_dataset("scenes", split="test", count=1)[0]
    assert isinstance(scene.image, Image.Image)
    scene.image.save(tmp_path / "scene.png")
    for name, more in (("usual", []), ("boxes", ["--boxes", "0.6"])):
        arguments = ["explain", str(tmp_path / "scene.png"), "--method", "gradcam", "--output", str(tmp_path / name)]
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 0, result.output
    usual, boxed = (json.loads((tmp_path / name / "scene.json").read_text())["maps"][0] for name in ("usual", "boxes"))
    assert "boxes" not in usual
    explained = get_explainer("gradcam", "scenes")(tmp_path / "scene.png")
    assert boxed["boxes"] == heatmap_to_boxes(explained.heatmap(), 0.6)[0].tolist()
    assert boxed["boxes"]
    with Image.open(tmp_path / "boxes" / boxed["overlay"]) as picture:
        np.testing.assert_array_equal(np.array(picture), explained.overlay(box_threshold=0.6)[0])
    arguments = ["explain", str(tmp_path / "scene.png"), "--method", "attnlrp", "--boxes", "0.4"]
    assert CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "signed")]).exit_code == 0
    signed = get_explainer("attnlrp", "scenes")(tmp_path / "scene.png")
    assert signed.signed
    (record,) = json.loads((tmp_path / "signed" / "scene.json").read_text())["maps"]
    assert record["boxes"] == heatmap_to_boxes(evidence(signed.heatmap(), signed=True), 0.4)[0].tolist()
    refused = CliRunner().invoke(
        app, ["explain", str(tmp_path / "scene.png"), "--boxes", "1", "--output", str(tmp_path)]
    )
    assert refused.exit_code == 2
    assert "threshold" in refused.output
