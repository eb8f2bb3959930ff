"""What training on a few masks makes of PM, on data where the truth is known; and what it does not make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import get_explainer
from vitexplain.data.example import Example
from vitexplain.data.stripes import CLASSES, PATCH, SIZE, make_stripes, stripes_examples
from vitexplain.metrics import MetricBatch, Predictor, Tally, create_metric
from vitexplain.preprocessing import Preprocessing
from vitexplain.training.patch_mask_evaluation import evaluate_patch_masks
from vitexplain.training.patch_masks import PatchMaskSettings, train_patch_masks

pytestmark = pytest.mark.slow

PREPROCESSING = Preprocessing((SIZE, SIZE), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_fraction=1.0)
RECIPE = PatchMaskSettings(
    steps=400,
    batch_size=32,
    mask_weight=2.0,
    learning_rate=3e-3,
    head_rate=3e-3,
    layer_decay=1.0,
    smallest_crop=1.0,  # a stripe's width and direction are its class
    flip=False,
)
TEST = range(20_000, 20_400)


@pytest.fixture(scope="module")
def labelled() -> list[Example]:
    return stripes_examples(range(10_000))


def trained(
    folder: Path, labelled: Sequence[Example], annotated: Sequence[Example], settings: PatchMaskSettings = RECIPE
) -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2, num_classes=CLASSES
    )
    output = folder / "pm.safetensors"
    train_patch_masks(model, labelled, annotated, PREPROCESSING, output, settings)
    model.load_state_dict(load_file(output))
    return model.eval()


def precision(model: nn.Module, examples: Sequence[Example]) -> float:
    return evaluate_patch_masks(model, examples, PREPROCESSING).pixel_average_precision


def one_of_two(seeds: range) -> list[Example]:
    """Both objects of images with two, each with the other one left out of its mask."""
    pairs = stripes_examples(seeds, "two")
    others = [pairs[place ^ 1] for place in range(len(pairs))]
    return [replace(each, mask=each.mask - other.mask) for each, other in zip(pairs, others, strict=True)]


def test_one_percent_of_masks_teaches_where_each_class_is(tmp_path: Path, labelled: list[Example]) -> None:
    model = trained(tmp_path, labelled, [*labelled[:60], *one_of_two(range(20))])
    figures = evaluate_patch_masks(model, stripes_examples(TEST), PREPROCESSING)
    assert figures.accuracy > 0.98
    assert figures.pixel_average_precision > 0.9
    pairs = stripes_examples(TEST[:200], "two")
    for objects in (pairs[::2], pairs[1::2]):
        assert precision(model, objects) > 0.8


def test_masks_of_other_images_teach_the_usual_place_alone(tmp_path: Path, labelled: list[Example]) -> None:
    masks = [example.mask for example in labelled[:100]]
    shuffled = [replace(each, mask=mask) for each, mask in zip(labelled[:100], masks[1:] + masks[:1], strict=True)]
    assert precision(trained(tmp_path, labelled, shuffled), stripes_examples(TEST)) < 0.35


def test_labels_alone_teach_patches_nothing(tmp_path: Path, labelled: list[Example]) -> None:
    model = trained(tmp_path, labelled, labelled[:100], replace(RECIPE, mask_weight=0.0))
    figures = evaluate_patch_masks(model, stripes_examples(TEST), PREPROCESSING)
    assert figures.accuracy > 0.98
    assert figures.pixel_average_precision < 0.2


def test_the_map_is_where_the_object_is_and_not_what_decided(tmp_path: Path) -> None:
    """A documented limit of the method: a marker alone decides the class, and the map, learnt from masks, ignores it.

    That is for measures of faithfulness to tell, and they do.
    """
    examples = stripes_examples(range(10_000), "decoy")
    model, test = trained(tmp_path, examples, examples[:100]), stripes_examples(TEST, "decoy")
    figures = evaluate_patch_masks(model, test, PREPROCESSING)
    assert figures.accuracy > 0.98
    assert figures.pixel_average_precision > 0.8
    inputs = PREPROCESSING([example.image for example in test])
    classes = torch.tensor([example.labels[0] for example in test])
    evidence = torch.from_numpy(np.stack([make_stripes(seed, "decoy").evidence for seed in TEST]))
    decisive = evidence.reshape(-1, SIZE // PATCH, PATCH, SIZE // PATCH, PATCH).all(4).all(2)
    scores = get_explainer("pm", model)(inputs, classes).scores
    hit = decisive.flatten(1).gather(1, scores.flatten(1).argmax(1, keepdim=True)).float().mean()
    assert hit < 0.05

    def deletion(scores: Tensor) -> float:
        tally = Tally(create_metric("deletion"))
        tally.update(MetricBatch(scores, classes, inputs, Predictor.of(model)))
        return tally.compute().figures["auc"]

    assert deletion(scores) - deletion(decisive.float()) > 0.3
