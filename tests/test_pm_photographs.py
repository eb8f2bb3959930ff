"""What the benchmark of PM on photographs trains and tests on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vitexplain.benchmarks import patch_masks_photographs
from vitexplain.data import open_dataset

pytestmark = pytest.mark.parity


def test_nothing_that_is_trained_on_is_measured(test_data: Path) -> None:
    model = patch_masks_photographs.open_vit(test_data)
    annotated, tests = patch_masks_photographs.annotated_sets(test_data, model)
    trained = {example.name.partition("#")[0] for example in annotated}
    measured = {example.name.partition("#")[0] for test in tests for example in test.examples}
    assert not trained & measured
    assert [len(test.examples) for test in tests[:3]] == [325, 82, 33]
    names = open_dataset(f"annotated:{test_data / 'imagenet_val650_boxes'}", boxes_key="boxes_227_xyxy").names
    assert {example.name for example in tests[0].examples} == set(names[::2]), "even positions alone"
    assert all(len(example.labels) >= 1 and example.mask is not None for example in annotated)


def test_coco_objects_have_the_likeliest_label_and_leave_the_others_out(test_data: Path) -> None:
    model = patch_masks_photographs.open_vit(test_data)
    given = {
        example.name: example
        for example in open_dataset(f"annotated:{test_data / 'coco100_masks'}", masks="instances", keep_unknown=False)
    }
    found = [each for half in patch_masks_photographs.coco_objects(test_data, model) for each in half]
    assert {each.name for each in found} == set(given)
    several = 0
    for each in found[:12]:
        original = given[each.name]
        with torch.inference_mode():
            logits = model.model(model.preprocessing([each.image]))[0]
        assert each.labels == (max(original.labels, key=lambda label: float(logits[label])),)
        others = [other for other in given.values() if other.image == each.image and other.name != each.name]
        assert each.mask is not None
        assert original.mask is not None
        np.testing.assert_array_equal(each.mask == 1, original.mask == 1)
        covered = np.zeros(original.mask.shape, bool)
        for other in others:
            assert other.mask is not None
            covered |= other.mask == 1
        assert (each.mask[covered & (original.mask != 1)] == -1).all()
        np.testing.assert_array_equal((each.mask == 0), (original.mask == 0) & ~covered)
        several += bool(others)
    assert several
