"""What each regulariser makes of the interpreter's map, on data where the truth is known; no training sees a mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitexplain import get_explainer, load_model
from vitexplain.benchmarks.iavit_tasks import VARIANTS, scenes
from vitexplain.data import open_dataset
from vitexplain.data.example import Example
from vitexplain.data.stripes import CLASSES, PATCH, SIZE, stripes_examples
from vitexplain.iavit import load_iavit
from vitexplain.iavit.evaluation import answers
from vitexplain.metrics import MetricBatch, Tally, create_metric
from vitexplain.models.loading import LoadedModel
from vitexplain.preprocessing import Preprocessing
from vitexplain.training.iavit import IAViTSettings, train_iavit, train_interpreter

pytestmark = pytest.mark.slow


class Localisation(NamedTuple):
    precision: float
    pointing: float


def localisation(scores: Tensor, examples: list[Example]) -> Localisation:
    masks = torch.from_numpy(np.stack([example.mask for example in examples if example.mask is not None]))
    batch = MetricBatch(scores, masks=masks)
    figures = []
    for name, figure in (("pixel_average_precision", "pixel_average_precision"), ("pointing_game", "hit_rate")):
        tally = Tally(create_metric(name))
        tally.update(batch)
        figures.append(tally.compute().figures[figure])
    return Localisation(*figures)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model()


@pytest.fixture(scope="module")
def images(model: LoadedModel) -> Tensor:
    return model.preprocessing([example.image for example in open_dataset("scenes", split="train", count=400)])


@pytest.fixture(scope="module")
def test_scenes() -> list[Example]:
    return list(open_dataset("scenes", split="test", count=150))


def test_trained_together_the_paired_regulariser_finds_objects_and_the_released_one_does_not(
    tmp_path: Path, test_scenes: list[Example]
) -> None:
    task, found, agreement = scenes(steps=100, count=1_000), {}, {}
    for reg in ("kl", "released"):
        model, path = task.model(0), tmp_path / f"{reg}.safetensors"
        train_iavit(model, task.training(), task.preprocessing, path, replace(task.settings, **VARIANTS[reg]))
        explainer = load_iavit(path, model)
        agreement[reg] = answers(explainer.subject.adapter, path, test_scenes, task.preprocessing).agreement
        found[reg] = localisation(explainer([example.image for example in test_scenes]).scores, test_scenes)
    print(found, agreement)
    assert agreement["kl"] > 0.98
    assert found["kl"].precision > 0.6
    assert found["kl"].pointing > 0.85
    assert found["kl"].precision - found["released"].precision > 0.3


def test_behind_a_frozen_model_the_paired_regulariser_finds_objects(
    tmp_path: Path, model: LoadedModel, images: Tensor, test_scenes: list[Example]
) -> None:
    path = tmp_path / "iavit.safetensors"
    settings = IAViTSettings(images=400, steps=150, batch_size=32, learning_rate=2e-3, evaluate_every=150)
    train_interpreter(model.model, [images], path, settings)
    inputs = model.preprocessing([example.image for example in test_scenes])
    found = localisation(get_explainer("iavit", model, checkpoint=str(path))(inputs).scores, test_scenes)
    agreement = answers(model.model, path, test_scenes, model.preprocessing).agreement
    print(found, agreement)
    assert agreement > 0.95
    assert found.precision > 0.6
    assert found.pointing > 0.75


def test_imitation_alone_agrees_and_explains_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2, "num_classes": CLASSES}
    model = VisionTransformer(img_size=SIZE, patch_size=PATCH, **shape)
    prepare = Preprocessing((SIZE, SIZE), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_fraction=1.0)
    settings = IAViTSettings(
        reg="none",
        steps=300,
        batch_size=32,
        learning_rate=3e-3,
        smallest_crop=1.0,  # a stripe's width and direction are its class
        flip=False,
        evaluate_every=300,
        validation_share=0.03,
    )
    path, test = tmp_path / "iavit.safetensors", stripes_examples(range(20_000, 20_400))
    train_iavit(model, stripes_examples(range(5_000)), prepare, path, settings)
    explainer = load_iavit(path, model)
    found = answers(explainer.subject.adapter, path, test, prepare)
    located = localisation(explainer([example.image for example in test]).scores, test)
    print(found.predictor_accuracy, found.agreement, located)
    assert found.predictor_accuracy > 0.97
    assert found.agreement > 0.97
    assert located.precision < 0.3
