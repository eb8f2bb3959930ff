"""Overlays over whole photographs: heat lies where the model saw, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_images, make_model
from PIL import Image

from vitexplain import InputError, adapt, create_method, explain_with, get_explainer, load_model
from vitexplain.explain_files import explain_to_folder
from vitexplain.explanation import Explanation
from vitexplain.preprocessing import CROP_MODES, Preprocessing
from vitexplain.subject import Subject

SIZE = (32, 48)
PREPROCESSING = Preprocessing(size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_fraction=0.8)


def photograph(height: int, width: int) -> Image.Image:
    """Smooth, and different everywhere."""
    rows, columns = np.linspace(20, 220, height)[:, None], np.linspace(20, 220, width)[None]
    channels = rows + 0 * columns, columns + 0 * rows, (rows + columns) / 2
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def explained(
    *photographs: Image.Image, target: object = 1, preprocessing: Preprocessing = PREPROCESSING
) -> Explanation:
    subject = Subject(adapt(make_model("cls")), preprocessing)
    return get_explainer("generic_attention", subject)(list(photographs), target)


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("sides", [(64, 96), (150, 90), (41, 300), (9, 5), (32, 48)])
@pytest.mark.parametrize("fraction", [0.6, 0.875, 1.0])
def test_the_window_is_what_the_model_saw(crop_mode: str, sides: tuple[int, int], fraction: float) -> None:
    preprocessing = Preprocessing(SIZE, (0, 0, 0), (1, 1, 1), crop_mode=crop_mode, crop_fraction=fraction)
    picture = photograph(*sides)
    placement = preprocessing.placement(sides)
    top, left, bottom, right = placement.window
    cut = picture.crop((left, top, right, bottom)).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    seen = np.asarray(preprocessing.view(picture)).astype(int)
    # the window is rounded to whole pixels of the picture, and resizing to whole ones of the model's
    step = 200 / (min(*sides, *placement.resized) - 1)
    inside = (seen > 0).all(-1) & (np.asarray(cut) > 0).all(-1)
    assert inside.mean() > 0.02
    assert np.quantile(np.abs(np.asarray(cut) - seen)[inside], 0.9) <= 1.1 * step + 2


def test_heat_lies_on_the_crop_and_the_rest_is_dimmed() -> None:
    wide, tall = photograph(80, 240), photograph(300, 100)
    explanation = explained(wide, tall)
    found = explanation.overlay_on([wide, tall], box_threshold=0.5)
    for position, (picture, drawn) in enumerate(zip((wide, tall), found, strict=True)):
        pixels = np.asarray(picture)
        assert drawn.shape == pixels.shape
        assert drawn.dtype == np.uint8
        top, left, bottom, right = PREPROCESSING.placement(pixels.shape[:2]).window
        assert 0 < top < bottom < len(pixels)
        crop = pixels[None, top:bottom, left:right]
        np.testing.assert_array_equal(
            drawn[top:bottom, left:right], explanation[position].overlay(crop, box_threshold=0.5)[0]
        )
        beside = np.ones(pixels.shape[:2], bool)
        beside[top:bottom, left:right] = False
        np.testing.assert_array_equal(drawn[beside], pixels[beside] // 2)


def test_a_picture_that_the_model_saw_whole_has_the_usual_overlay() -> None:
    picture = photograph(*SIZE)
    explanation = explained(picture, preprocessing=PREPROCESSING.replace(crop_fraction=1.0))
    np.testing.assert_array_equal(explanation.overlay_on(picture)[0], explanation.overlay()[0])


def test_of_padded_pictures_all_is_shown_and_the_padding_is_not() -> None:
    picture = photograph(60, 30)
    explanation = explained(picture, preprocessing=PREPROCESSING.replace(crop_mode="border", crop_fraction=1.0))
    drawn = explanation.overlay_on([picture], alpha=0)[0]
    np.testing.assert_array_equal(drawn, picture)
    assert (explanation.overlay_on([picture], alpha=1, mode="blend")[0] != np.asarray(picture)).any(-1).all()


def test_each_target_has_an_overlay_and_annotated_boxes_are_in_pixels_of_the_photograph() -> None:
    picture = photograph(80, 240)
    explanation = explained(picture, target=[[1, 2, 3]])
    plain = explanation.overlay_on(picture)[0]
    assert plain.shape == (3, 80, 240, 3)
    np.testing.assert_array_equal(plain[1], explained(picture, target=2).overlay_on(picture)[0])
    boxed = explanation.overlay_on([picture], boxes=[torch.tensor([[2.0, 4, 60, 70]])])[0]
    changed = (boxed != plain).any(-1)
    assert changed[:, 4:70, 2].all(), "also where the model did not look"
    assert not changed[:, 12:60, 12:50].any()
    assert not changed[..., 65:].any()


def test_what_cannot_be_placed_is_refused(tmp_path: Path) -> None:
    picture = photograph(80, 240)
    explanation = explained(picture)
    with pytest.raises(InputError, match="found 2 images, expected 1"):
        explanation.overlay_on([picture, picture])
    with pytest.raises(InputError, match="found 0 boxes, expected 1"):
        explanation.overlay_on([picture], boxes=[])
    with pytest.raises(InputError, match="gone"):
        explanation.overlay_on(tmp_path / "gone.png")
    other = Image.fromarray(255 - np.asarray(picture))
    with pytest.raises(InputError, match=r"image 1 is not the one that was explained, .* differs from it by"):
        explained(picture, other).overlay_on([picture, picture])
    with pytest.raises(InputError, match="image 0 is not the one"):
        explanation.overlay_on(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    unknown = get_explainer("generic_attention", make_model("cls"))(make_images("cls"))
    with pytest.raises(InputError, match="heat has no place on them"):
        unknown.overlay_on([picture] * len(unknown))


def test_explain_draws_over_whole_photographs(tmp_path: Path) -> None:
    model = load_model("scenes")
    file, output = tmp_path / "wide.png", tmp_path / "out"
    photograph(100, 300).save(file)
    methods = [create_method("gradcam"), create_method("tokentm")]
    assert explain_to_folder([file], model, methods, [3, 5], output, whole=True, box_threshold=0.5) == (1, [])
    maps = json.loads((output / "wide.json").read_text(encoding="utf-8"))["maps"]
    explanations = explain_with(methods, model, str(file), torch.tensor([[3, 5]]))
    drawn = [each for one in explanations for each in one.overlay_on(file, box_threshold=0.5)[0]]
    for entry, expected in zip(maps, drawn, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(output / entry["overlay"])), expected)


def test_a_photograph_that_is_gone_meanwhile_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "first.png", tmp_path / "second.png"]
    for each in files:
        photograph(60, 60).save(each)

    def read_again(source: Path) -> Image.Image:
        if source == files[0]:
            raise InputError("first.png is gone")
        return Image.open(source)

    monkeypatch.setattr("vitexplain.explain_files.load_image", read_again)
    done, failures = explain_to_folder(
        files, load_model("scenes"), [create_method("gradcam")], [], tmp_path / "out", whole=True
    )
    assert (done, [str(each) for each in failures]) == (1, ["first.png is gone"])
    assert (tmp_path / "out/second.json").exists()
