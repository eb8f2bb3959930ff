"""Every accepted form of target, and every wrong one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import make_images, make_model
from torch import Tensor

from vitexplain import TargetError, get_explainer
from vitexplain.targets import resolve_target, select_target

LOGITS = torch.tensor([[0.0, 3.0, 1.0, -2.0], [5.0, 0.5, 1.5, 2.5]])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, [1, 0]),
        (2, [2, 2]),
        ([3, 1], [3, 1]),
        (torch.tensor([3, 1]), [3, 1]),
        (np.array([3, 1], dtype=np.int32), [3, 1]),
        (torch.tensor(2, dtype=torch.uint8), [2, 2]),
        ([[0, 1, 2], [3, 2, 1]], [[0, 1, 2], [3, 2, 1]]),
        (torch.tensor([[0], [3]]), [[0], [3]]),
    ],
)
def test_classes(target: Any, expected: list[Any]) -> None:
    resolved = resolve_target(target, LOGITS)
    assert resolved.explained_classes().tolist() == expected
    for index in range(resolved.count):
        column = resolved.classes[:, index].tolist()
        assert resolved.score(LOGITS, index).tolist() == [LOGITS[row, each].item() for row, each in enumerate(column)]


def test_a_pair_is_a_contrast() -> None:
    resolved = resolve_target((1, 0), LOGITS)
    assert resolved.score(LOGITS, 0).tolist() == [3.0, -4.5]
    resolved = resolve_target(([0, 1], torch.tensor([3, 2])), LOGITS)
    assert resolved.score(LOGITS, 0).tolist() == [2.0, -1.0]
    assert resolved.explained_classes().tolist() == [0, 1]


def test_a_function_of_the_logits() -> None:
    resolved = resolve_target(lambda logits: logits.logsumexp(1), LOGITS)
    assert resolved.explained_classes() is None
    torch.testing.assert_close(resolved.score(LOGITS, 0), LOGITS.logsumexp(1))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (4, "found class 4, expected 0 to 3"),
        (-1, "found class -1, expected 0 to 3"),
        ([1, 2, 3], "for 2 images"),
        (torch.zeros(2, 1, 1, dtype=torch.long), "for 2 images"),
        ([], "for 2 images|float32"),
        (1.0, "whole class indices"),
        (True, "whole class indices"),
        ("zebra", "type str"),
        ((0, 1, 2), "tuple of 3"),
        ((0, [[1, 2], [1, 2]]), "contrast"),
        ([[1], [2, 3]], "expected None"),
        ({"class": 1}, "type dict"),
    ],
)
def test_wrong_targets_are_named(target: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve_target(target, LOGITS)


@pytest.mark.parametrize("function", [lambda logits: logits, lambda logits: 1.0, lambda logits: logits.sum()])
def test_functions_must_give_one_score_an_image(function: Any) -> None:
    for method in ("generic_attention", "rollout"):
        with pytest.raises(TargetError, match="one score an image"):
            get_explainer(method, make_model("cls"))(make_images("cls"), function)


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(TargetError, match="NaN"):
        resolve_target(0, torch.full((1, 3), float("nan")))


@pytest.mark.parametrize("target", [None, 3, [0, 1, 2], torch.arange(3), (1, [0, 2, 2]), [[0, 1], [1, 2], [2, 3]]])
def test_a_target_can_be_cut_like_its_batch(target: Any) -> None:
    logits = torch.randn(3, 4)
    whole, part = resolve_target(target, logits), resolve_target(select_target(target, slice(1, 3)), logits[1:])
    for index in range(whole.count):
        torch.testing.assert_close(whole.score(logits, index)[1:], part.score(logits[1:], index))


def test_maps_of_equal_scores_are_equal() -> None:
    """A class, a contrast and a function that ask for the same score give the same map."""
    model, images = make_model("cls"), make_images("cls")
    explainer = get_explainer("generic_attention", model)

    def logit(logits: Tensor) -> Tensor:
        return logits[:, 3]

    torch.testing.assert_close(explainer(images, 3).scores, explainer(images, logit).scores)
    contrast = explainer(images, (3, 1)).scores
    torch.testing.assert_close(contrast, explainer(images, lambda logits: logits[:, 3] - logits[:, 1]).scores)
    assert (contrast - explainer(images, 3).scores).abs().max() > 1e-3 * contrast.abs().max()


def test_a_contrast_of_several_pairs_gives_several_maps() -> None:
    explainer, images = get_explainer("generic_attention", make_model("cls")), make_images("cls")
    several = explainer(images, (torch.tensor([[1, 2]] * 2), torch.tensor([[3, 4]] * 2)))
    assert several.scores.shape == (2, 2, 4, 6)
    for k, pair in enumerate(((1, 3), (2, 4))):
        torch.testing.assert_close(several.scores[:, k], explainer(images, pair).scores)


def test_targets_of_other_kinds_and_from_inference_mode() -> None:
    explainer, images = get_explainer("generic_attention", make_model("cls")), make_images("cls", batch=4)
    expected = explainer(images, [0, 1, 2, 3]).scores
    torch.testing.assert_close(explainer(images, range(4), batch_size=2).scores, expected, rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        target = torch.arange(4)
    torch.testing.assert_close(explainer(images, target).scores, expected)
