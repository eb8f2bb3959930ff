"""Checkpoints that ship with the package: found by the weights they belong to, and as good as their cards say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitexplain import NotTrainedError, get_explainer, load_model
from vitexplain.data.scenes import SPLITS, make_scene
from vitexplain.models import shipped
from vitexplain.models.loading import LoadedModel
from vitexplain.models.shipped import ASSETS, model_entry, shipped_checkpoint


@pytest.fixture(scope="module")
def scenes() -> LoadedModel:
    return load_model("scenes")


@pytest.fixture(scope="module")
def images(scenes: LoadedModel) -> Tensor:
    """100 scenes that no training has seen."""
    return scenes.preprocessing([make_scene(seed).image for seed in SPLITS["test"][:100]])


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "ASSETS", tmp_path)
    return tmp_path


def put(folder: Path, name: str, model: nn.Module) -> Path:
    (folder / f"{name}.json").write_text(json.dumps({"model": model_entry(model)}))
    return folder / f"{name}.safetensors"


def small(seed: int, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(width, 2)


def test_a_checkpoint_is_found_by_the_weights_it_belongs_to(assets: Path) -> None:
    model = small(0)
    expected = put(assets, "own_learner", model)
    put(assets, "other_learner", small(1))
    put(assets, "wide_learner", small(0, 4))
    put(assets, "own_learner_class", model)
    assert shipped_checkpoint("learner", model) == expected
    assert shipped_checkpoint("learner", small(2)) is None
    assert shipped_checkpoint("another", model) is None
    for precision in (torch.float64, torch.bfloat16):
        assert shipped_checkpoint("learner", copy.deepcopy(model).to(precision)) == expected


def test_weights_are_hashed_only_where_their_number_fits(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[nn.Module] = []
    monkeypatch.setattr(shipped, "same_weights", lambda model, _: hashed.append(model))
    put(assets, "own_learner", small(0))
    assert shipped_checkpoint("learner", small(0, 4)) is None
    assert not hashed
    assert shipped_checkpoint("learner", small(0)) is None
    assert len(hashed) == 1


def test_without_assets_nothing_ships(assets: Path) -> None:
    assert shipped_checkpoint("learner", small(0)) is None


def test_gates_ship_for_the_embedded_model(scenes: LoadedModel, images: Tensor) -> None:
    path = ASSETS / "scenes_diffmask.safetensors"
    assert shipped_checkpoint("diffmask", scenes.model) == path
    found = get_explainer("diffmask", scenes)(images[:4]).scores
    expected = get_explainer("diffmask", scenes, checkpoint=str(path))(images[:4]).scores
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_shipped_gates_keep_the_answer_and_drop_most_patches(scenes: LoadedModel, images: Tensor) -> None:
    explainer = get_explainer("diffmask", scenes)
    method: Any = explainer.method
    report = method.report(scenes.model, explainer(images))
    assert report.unchanged.float().mean() >= 0.95
    assert report.kept.mean() <= 0.35
    assert report.divergence.mean() < 0.1
    assert report.divergence_all_masked.mean() > 1  # nothing but those patches holds the answer


@pytest.mark.parametrize("name", ["diffmask", "diffmask_class"])
def test_other_weights_of_the_same_shape_have_no_gates(name: str, scenes: LoadedModel, images: Tensor) -> None:
    changed = copy.deepcopy(scenes.model)
    with torch.no_grad():
        changed.get_parameter("head.bias")[0] += 1e-3
    with pytest.raises(NotTrainedError, match="none ships for these weights"):
        get_explainer(name, changed)(images[:1])


def test_shipped_gates_in_half_precision(scenes: LoadedModel, images: Tensor) -> None:
    half = copy.deepcopy(scenes.model).to(torch.bfloat16)
    found = get_explainer("diffmask", half)(images[:8].to(torch.bfloat16)).scores
    expected = get_explainer("diffmask", scenes)(images[:8]).scores
    assert ((found > 0.5) == (expected > 0.5)).float().mean() > 0.9
