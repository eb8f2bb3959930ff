"""The toy data of PM's tests, and what a training step of it sees: crops of pictures and masks, batches, settings."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_pm_training import PREPROCESSING, TINY, vit

from vitexplain import InputError, OptionError
from vitexplain.data.example import Example
from vitexplain.data.stripes import CLASSES, PATCH, SIZE, make_stripes, stripes_examples
from vitexplain.training.patch_mask_batches import Crop, PatchMaskBatches, object_mask
from vitexplain.training.patch_masks import PatchMaskSettings, train_patch_masks


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return stripes_examples(range(30))


# -- stripes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one", "two", "decoy"])
def test_stripes_are_a_function_of_the_seed_with_exact_masks(kind: Any) -> None:
    for seed in range(40):
        made, again = make_stripes(seed, kind), make_stripes(seed, kind)
        assert np.array_equal(made.image, again.image)
        assert made.image.shape == (SIZE, SIZE, 3)
        assert len(made.masks) == (2 if kind == "two" else 1)
        assert not (made.masks.sum(0) > 1).any()
        assert all(0.03 < mask.mean() < 0.3 for mask in made.masks)
        assert len(set(made.classes)) == len(made.classes)
        if kind == "decoy":
            assert made.evidence.sum() == PATCH**2
            assert not (made.evidence & made.masks[0]).any()
    counts = np.bincount([make_stripes(seed, kind).classes[0] for seed in range(200)], minlength=CLASSES)
    assert counts.min() > 25


def test_wrong_stripes_are_refused() -> None:
    with pytest.raises(InputError, match="kind"):
        make_stripes(0, "three")
    with pytest.raises(InputError, match="seed -1"):
        make_stripes(-1)


# -- crops and batches -------------------------------------------------------------------------------------------


def painted(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(mask[..., None] == 1, 250, 5).astype(np.uint8).repeat(3, 2))


@pytest.mark.parametrize("size", [(24, 24), (16, 40)])
def test_a_crop_shows_the_same_part_of_picture_and_mask(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    settings = PatchMaskSettings(smallest_crop=0.2)
    mirrored = set()
    for seed in range(50):
        mask = np.zeros((31, 47), np.int8)
        top, left = rng.integers(0, 20, 2)
        mask[top : top + 9, left : left + 14] = 1
        crop = Crop.draw((31, 47), size, settings, np.random.default_rng(seed))
        mirrored.add(crop.mirrored)
        x0, y0, x1, y1 = crop.box
        assert 0 <= x0 < x1 <= 47
        assert 0 <= y0 < y1 <= 31
        assert (x1 - x0) * (y1 - y0) > 0.17 * 31 * 47  # sides are rounded
        seen = np.asarray(crop.picture(painted(mask), "nearest"))[..., 0] > 100
        assert seen.shape == size
        assert np.array_equal(seen, crop.mask(mask) == 1)
        smooth = np.asarray(crop.picture(painted(mask), "bicubic"))[..., 0] > 127
        assert (smooth != seen).mean() < 0.12  # edges alone
    assert mirrored == {False, True}


def test_a_crop_is_mirrored_and_keeps_what_is_left_out() -> None:
    mask = np.array([[1, 0, 0, -1]] * 4, np.int8)
    crop = Crop((0, 0, 4, 4), (4, 4), True)
    assert crop.mask(mask).tolist() == [[-1, 0, 0, 1]] * 4
    assert Crop((1, 0, 3, 4), (4, 4), False).mask(mask).tolist() == [[0, 0, 0, 0]] * 4


def test_a_sliver_is_cropped_in_the_middle() -> None:
    crop = Crop.draw((4, 4000), (32, 32), PatchMaskSettings(), np.random.default_rng(0))
    x0, y0, x1, y1 = crop.box
    assert (y0, y1, x1 - x0) == (0, 4, 4)
    assert x0 == 1998


def test_batches_are_a_function_of_their_number(examples: list[Example]) -> None:
    batches = PatchMaskBatches(examples, examples[:5], PREPROCESSING, TINY, CLASSES)
    again = pickle.loads(pickle.dumps(batches))
    for step in (3, 0):
        assert all(torch.equal(one, two) for one, two in zip(batches[step], again[step], strict=True))
    assert not torch.equal(batches[0].images, batches[1].images)
    assert batches[0].images.shape == (7, 3, SIZE, SIZE)
    assert batches[0].masks.shape == (3, SIZE, SIZE)
    other = PatchMaskBatches(examples, examples[:5], PREPROCESSING, replace(TINY, seed=1), CLASSES)
    assert not torch.equal(batches[0].images, other[0].images)


def test_every_labelled_example_comes_once_before_any_comes_again() -> None:
    unique = [
        Example(str(index), Image.new("RGB", (SIZE, SIZE), (index, 0, 0)), (0,), np.ones((SIZE, SIZE), np.int8))
        for index in range(12)
    ]
    batches = PatchMaskBatches(unique, unique[:2], PREPROCESSING, TINY, CLASSES)
    shown = [[int(each) for each in PREPROCESSING.picture(batches[step].images)[:, 0, 0, 0]] for step in range(6)]
    epochs = [[each for batch in shown[first : first + 3] for each in batch[:4]] for first in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert {each for batch in shown for each in batch[4:]} == {0, 1}


def test_without_crops_pictures_and_masks_are_as_the_model_sees_them(examples: list[Example]) -> None:
    settings = replace(TINY, smallest_crop=1.0, flip=False, annotated_batch_size=8)
    batch = PatchMaskBatches(examples, examples[:1], PREPROCESSING, settings, CLASSES)[0]
    assert torch.equal(batch.images[-1], PREPROCESSING(examples[0].image))
    assert examples[0].mask is not None
    assert np.array_equal(batch.masks[0].numpy(), examples[0].mask)
    flipped = PatchMaskBatches(examples, examples[:1], PREPROCESSING, replace(settings, flip=True), CLASSES)[0]
    turned = [torch.equal(image.flip(-1), batch.images[-1]) for image in flipped.images[4:]]
    assert turned == [torch.equal(mask.flip(-1), batch.masks[0]) for mask in flipped.masks]
    assert set(turned) == {False, True}


def test_boxes_stand_in_for_a_mask() -> None:
    boxes = np.array([[1.0, 0.0, 3.0, 2.0], [0.0, 3.0, 1.0, 4.0]])
    mask = object_mask(Example("a", Image.new("RGB", (4, 5)), (0,), boxes=boxes), (5, 4))
    assert mask.tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "neither mask nor boxes"),
        ({"mask": np.ones((3, 3), np.int8)}, "expected the same"),
        (
            {"size": (SIZE, SIZE + 1), "mask": None, "boxes": np.array([[0.0, 0, 9, 9]])},
            "is of a picture of .* expected",
        ),
        ({"labels": ()}, "expected a class from 0 to 3"),
        ({"labels": (4,)}, "expected a class from 0 to 3"),
    ],
)
def test_wrong_examples_are_named(examples: list[Example], change: dict[str, Any], message: str) -> None:
    wrong = [replace(examples[0], **change)]
    batches = PatchMaskBatches(examples, wrong, PREPROCESSING, TINY, CLASSES)
    with pytest.raises(InputError, match=message):
        batches[0]


@pytest.mark.parametrize("lists", [([], None), (None, [])])
def test_training_needs_examples_of_both_kinds(tmp_path: Path, examples: list[Example], lists: Any) -> None:
    labelled, annotated = (examples if each is None else each for each in lists)
    with pytest.raises(InputError, match="expected at least one"):
        train_patch_masks(vit(), labelled, annotated, PREPROCESSING, tmp_path / "a.safetensors", TINY)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"loss": "dice"}, {"layer_decay": 0.0}, {"smallest_crop": 1.5}, {"mask_weight": -1.0}],
)
def test_wrong_settings(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(change))):
        PatchMaskSettings(**change)


def test_the_rate_rises_and_falls() -> None:
    settings = PatchMaskSettings(steps=100, warmup_share=0.1)
    shares = [settings.share_of_rate(step) for step in range(100)]
    assert shares[0] == 0.1
    assert max(shares) == shares[9] == shares[10] == 1.0
    assert shares[55] == pytest.approx(0.5)
    assert 0 < shares[99] < 0.01
