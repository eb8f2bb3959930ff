"""The embedded model's sibling, trained on masks of 1 % of the scenes: its answers, its maps, and how it is reached."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vitexplain import load_model
from vitexplain.benchmarks.patch_masks import (
    FIRST,
    LOCALISATION,
    ONE,
    SECOND,
    accuracy_change,
    is_right,
    measured,
    of_position_alone,
    requirement_of_control,
    requirements,
    training_scenes,
    with_trained,
)
from vitexplain.cli import app
from vitexplain.data import Example, open_dataset
from vitexplain.metrics.statistics import Estimate
from vitexplain.models.loading import LoadedModel, list_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain() -> LoadedModel:
    return load_model("scenes")


@pytest.fixture(scope="module")
def sibling() -> LoadedModel:
    return load_model("scenes-pm")


@pytest.fixture(scope="module")
def scenes() -> Sequence[Example]:
    return list(open_dataset("scenes", split="test", count=120))


def test_the_sibling_has_no_weight_that_the_plain_model_does_not_have(plain: LoadedModel, sibling: LoadedModel) -> None:
    shapes = [{name: each.shape for name, each in model.model.state_dict().items()} for model in (plain, sibling)]
    assert shapes[0] == shapes[1]
    assert sibling.labels == plain.labels
    assert sibling.preprocessing == plain.preprocessing
    assert sibling.identity()["sha256"] != plain.identity()["sha256"]
    assert {"scenes", "scenes-pm"} == {name for name, _ in list_models("scenes*")}


def test_the_sibling_answers_as_the_plain_model_does(
    plain: LoadedModel, sibling: LoadedModel, scenes: Sequence[Example]
) -> None:
    change = accuracy_change(is_right(plain, scenes), is_right(sibling, scenes))
    assert change["after"].value > 0.94
    assert change["change"].high >= 0


def test_its_maps_are_far_ahead_of_other_methods_on_either_model(
    plain: LoadedModel, sibling: LoadedModel, scenes: Sequence[Example]
) -> None:
    methods, some = ["pm", "tokentm", "gradcam"], scenes[:60]
    before, after = (measured(model, some, methods, LOCALISATION[:2]).summaries for model in (plain, sibling))
    for metric in LOCALISATION[:2]:
        others = [before[method, metric].figures[metric] for method in methods]
        others += [after[method, metric].figures[metric] for method in methods[1:]]
        assert after["pm", metric].figures[metric] > max(others) + 0.1


def test_each_of_two_objects_has_its_own_map(sibling: LoadedModel) -> None:
    examples = list(open_dataset("scenes", split="test", count=60, objects=2))
    for place in (0, 1):
        found = measured(sibling, examples[place::2], ["pm"], LOCALISATION[:1]).summaries["pm", LOCALISATION[0]]
        assert found.figures[LOCALISATION[0]] > 0.6


def test_the_command_explains_with_the_sibling(tmp_path: Path, scenes: Sequence[Example]) -> None:
    assert isinstance(scenes[0].image, Image.Image)
    scenes[0].image.save(tmp_path / "scene.png")
    arguments = [str(tmp_path / "scene.png"), "--model", "scenes-pm", "--method", "pm", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "scene.json").read_text())
    assert record["model"]["name"] == "scenes-pm"
    assert record["predicted"][0]["class"] == scenes[0].labels[0]


# -- the benchmark that trained it -------------------------------------------------------------------------------


def test_training_scenes_have_masks_for_their_share_and_none_twice() -> None:
    labelled, annotated = training_scenes(500, 0.02)
    assert len(labelled) == 490
    assert len(annotated) == 8 + 2 * 2
    pairs = annotated[8:]
    assert [each.name.partition("#")[0] for each in pairs] == ["train/000000"] * 2 + ["train/000001"] * 2
    for first, second in (pairs[:2], pairs[2:]):
        assert first.mask is not None
        assert second.mask is not None
        assert ((first.mask == 1) == (second.mask == -1)).all()
        assert ((first.mask == -1) == (second.mask == 1)).all()
    _, shuffled = training_scenes(500, 0.02, control=True)
    assert [each.labels for each in shuffled] == [each.labels for each in annotated]
    given = [*annotated[2:], *annotated[:2]]
    for own, other in zip(annotated, given, strict=True):  # not even the other object's of the same picture
        assert not np.array_equal(np.asarray(own.image), np.asarray(other.image))
    assert all((a.mask == b.mask).all() for a, b in zip(shuffled, given, strict=True))


def test_the_change_of_accuracy_is_paired() -> None:
    right = torch.arange(100) < 80
    same = accuracy_change(right, right)["change"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    worse = accuracy_change(right, torch.arange(100) < 60)
    assert worse["before"].value == pytest.approx(0.8)
    assert worse["change"].value == pytest.approx(-0.2)
    assert worse["change"].low < -0.2 < worse["change"].high < 0


def test_requirements_are_judged(plain: LoadedModel, sibling: LoadedModel, scenes: Sequence[Example]) -> None:
    methods = ["pm", "tokentm"]
    before, after = (measured(model, scenes[:8], methods, LOCALISATION) for model in (plain, sibling))
    places = (ONE, FIRST, SECOND)
    kept, lost = Estimate(-0.01, -0.03, 0.01, 8), Estimate(-0.1, -0.2, -0.05, 8)
    good = requirements(dict.fromkeys(places, with_trained(before, after)), kept)
    assert len(good) == 5
    assert not any("not met" in line for line in good)
    assert all("not met" in line for line in requirements(dict.fromkeys(places, with_trained(before, before)), lost))


def test_a_control_is_judged_by_the_mean_mask(scenes: Sequence[Example]) -> None:
    blank = replace(scenes[0], mask=np.ones_like(scenes[0].mask))
    flat = of_position_alone([blank], scenes[:8])
    share = np.mean([np.mean(np.asarray(each.mask)[np.asarray(each.mask) >= 0] == 1) for each in scenes[:8]])
    assert flat.value == pytest.approx(share, abs=1e-3)  # a flat map ranks nothing: the share of the object is left
    own = of_position_alone(scenes[:1], scenes[:1])
    assert own.value > 0.9
    assert "**met**" in requirement_of_control(Estimate(0.35, 0.30, 0.40, 8), Estimate(0.31, 0.25, 0.36, 8))
    assert "**not met**" in requirement_of_control(Estimate(0.37, 0.32, 0.43, 8), Estimate(0.31, 0.25, 0.36, 8))
