"""Readers on real annotated photographs; needs the reference data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitexplain.data import covering_less_than, first, load_examples, open_dataset
from vitexplain.images import load_image
from vitexplain.preprocessing import Preprocessing

pytestmark = pytest.mark.parity

SEEN = Preprocessing((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def records(root: Path) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((root / "annotations.json").read_text())
    return content


def test_imagenet_boxes(test_data: Path) -> None:
    root = test_data / "imagenet_val650_boxes"
    examples = open_dataset(f"annotated:{root}", boxes_key="boxes_227_xyxy")
    assert len(examples) == 650
    for example, record in zip(examples, records(root), strict=True):
        assert example.labels == (record["label"],)
        assert example.boxes is not None
        assert len(example.boxes) == len(record["boxes_orig_xyxy"])
        assert example.boxes.min() >= 0
        assert example.boxes.max() <= 227
        scale = 227 / np.array([record["orig_w"], record["orig_h"]] * 2)
        np.testing.assert_allclose(example.boxes, record["boxes_orig_xyxy"] * scale, atol=0.006)
    small = covering_less_than(first(examples, 100), 0.5)
    assert 30 < len(small) < 70
    squashed = SEEN.replace(crop_mode="squash", crop_fraction=1.0)
    (batch,) = load_examples(first(examples, 4), squashed)
    assert batch.boxes is not None
    for index, boxes in enumerate(batch.boxes):
        np.testing.assert_allclose(boxes, examples[index].boxes * 224 / 227)
    assert not batch.unreadable


def test_flamingo_masks(test_data: Path) -> None:
    root = test_data / "caltech_flamingo_masks"
    examples = open_dataset(f"annotated:{root}", ignored=-1)
    assert len(examples) == 67
    for example, record in zip(examples, records(root), strict=True):
        assert example.labels == (130,)
        assert example.mask is not None
        assert set(np.unique(example.mask)) == {0, 1}
        assert example.mask.mean() == pytest.approx(record["fg_frac"], abs=6e-5)
    batches = list(load_examples(examples, SEEN))
    assert sum(map(len, batches)) == 67
    assert not any(batch.unreadable for batch in batches)


def test_horse_masks(test_data: Path) -> None:
    examples = open_dataset(f"folder:{test_data / 'weizmann_horse_masks'}", label="339", ignored=-1)
    assert len(examples) == 164
    shares = [example.mask.mean() for example in examples if example.mask is not None]
    assert len(shares) == 164
    assert 0.02 < min(shares) < max(shares) < 0.8
    (batch,) = load_examples(first(examples, 12), SEEN)
    assert batch.labels == ((339,),) * 12
    assert not batch.unreadable


def test_coco_masks(test_data: Path) -> None:
    root = test_data / "coco100_masks"
    examples = open_dataset(f"annotated:{root}", masks="instances", keep_unknown=False)
    wanted = {
        f"{record['file']}#{segment['category']}": tuple(segment["imagenet"])
        for record in records(root)
        for segment in record["segments"]
        if segment["imagenet"] and not segment["iscrowd"]
    }
    assert {name: tuple(sorted(labels)) for name, labels in wanted.items()} == {
        example.name: example.labels for example in examples
    }
    assert len(examples) == 202
    assert len({example.image for example in examples}) == 89
    by_name = {example.name: example for example in examples}
    for record in records(root):
        for category in {segment["category"] for segment in record["segments"]}:
            example = by_name.get(f"{record['file']}#{category}")
            if example is None:
                continue
            mine = [each for each in record["segments"] if each["category"] == category]
            assert example.mask is not None
            assert (example.mask == 1).sum() == sum(each["area"] for each in mine if not each["iscrowd"])
            assert (example.mask == -1).sum() == sum(each["area"] for each in mine if each["iscrowd"])
    everything = open_dataset(f"annotated:{root}", masks="instances")
    assert len(everything) > len(examples)
    batches = list(load_examples(first(examples, 30), SEEN))
    assert not any(batch.unreadable for batch in batches)


def test_pet_masks(test_data: Path) -> None:
    root = test_data / "oxford_pets26"
    examples = open_dataset(f"annotated:{root}", masks="labels", mask_key="label_png")
    assert len(examples) == 26
    assert [example.labels for example in examples].count((257,)) == 7
    for example in examples:
        assert example.mask is not None
        assert {1, -1} <= set(np.unique(example.mask)) <= {0, 1, -1}
        assert isinstance(example.image, Path)
        assert load_image(example.image).size == example.mask.shape[::-1]


def test_imagenet_training_pictures(test_data: Path) -> None:
    root = test_data / "imagenet_train1000_classes"
    examples = open_dataset(f"annotated:{root}")
    assert [example.labels for example in examples] == [(index,) for index in range(1000)]
