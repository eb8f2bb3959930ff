"""Every accepted form of target, and every wrong one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from families import make_images, make_model
from lighter import get_explainer as quick_explainer
from PIL import Image
from torch import Tensor

from vitexplain import (
    Capture,
    CaptureError,
    InputError,
    Needs,
    Subject,
    TargetError,
    UnknownNameError,
    create_method,
    get_explainer,
    list_methods,
)
from vitexplain.data.scenes import make_scene
from vitexplain.targets import ExplainedScore, ResolvedTarget, named_classes, resolve_target, select_target

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
        (np.array([3, 1], dtype=np.uint16), [3, 1]),
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
        ([[0, 1, 0, 0], [1, 0, 0, 0]], r"0 and 1 alone.*argmax"),  # one-hot, and no class 0 three times
        (torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]), "0 and 1 alone"),
    ],
)
def test_wrong_targets_are_named(target: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve_target(target, LOGITS)


class TestNames:
    @pytest.mark.parametrize(
        ("named", "meant"),
        [
            ("mug", 4),
            (["mug", "key"], [4, 2]),
            (["4", 2], [4, 2]),
            ([["mug", "key"], ["star", 0]], [[4, 2], [6, 0]]),
            (("mug", "key"), (4, 2)),
            ((["mug", "key"], ["star", "star"]), ([4, 2], [6, 6])),
        ],
    )
    def test_of_classes_stand_for_indices(self, named: Any, meant: Any) -> None:
        subject = Subject.of(make_model("cls"))
        labels = [f"class {index}" for index in range(7)]
        labels[4], labels[2], labels[6] = "mug, cup", "key", "star"
        explainer = get_explainer("generic_attention", replace(subject, labels=labels))
        images = make_images("cls", 2)
        torch.testing.assert_close(explainer(images, named).scores, explainer(images, meant).scores)

    def test_that_are_unknown_are_listed(self) -> None:
        explainer = get_explainer("tokentm", "scenes")
        with pytest.raises(UnknownNameError, match=r"no class called 'mugg' \(did you mean 'mug'"):
            explainer(Image.fromarray(make_scene(0).image), target="mugg")

    def test_without_labels_say_how_to_give_an_index(self) -> None:
        explainer = get_explainer("generic_attention", make_model("cls"))
        with pytest.raises(TargetError, match=r"found the class 'mug'.*not known: give the index.*labels="):
            explainer(make_images("cls", 2), target=("mug", 1))


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


PROBABILITIES = ("rise", "tis", "vit_cx")
ONE_CLASS = ("pm",)


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
@pytest.mark.parametrize("name", sorted({*list_methods(class_specific=True, trainable=False)} - {*ONE_CLASS}))
def test_every_method_explains_every_kind_of_target(name: str) -> None:
    """Equal scores have equal maps, however they are asked for; also a function that tells its images apart."""
    explainer, images = quick_explainer(name, make_model("cls")), make_images("cls")
    classes, others = torch.tensor([3, 1]), torch.tensor([2, 4])

    def read(logits: Tensor) -> Tensor:
        return logits.softmax(1) if name in PROBABILITIES else logits

    def chosen(logits: Tensor) -> Tensor:
        return read(logits)[torch.arange(2), classes]

    lowest = 0 if name == "vit_cx" else -torch.inf  # which cuts off the maps of classes
    found = explainer(images, classes).scores
    torch.testing.assert_close(explainer(images, chosen).scores.clamp(min=lowest), found, rtol=1e-4, atol=1e-6)
    contrast = explainer(images, (classes, others)).scores
    function = explainer(images, lambda z: chosen(z) - read(z)[torch.arange(2), others]).scores
    torch.testing.assert_close(contrast, function, rtol=1e-4, atol=1e-6)
    assert (contrast - found).abs().max() > 1e-3 * contrast.abs().max()


@pytest.mark.parametrize("name", ONE_CLASS)
def test_methods_of_one_class_say_so(name: str) -> None:
    for target in ((1, 2), lambda logits: logits[:, 0]):
        with pytest.raises(TargetError, match="one class; found a contrast or a function"):
            get_explainer(name, make_model("cls"))(make_images("cls"), target)


def test_methods_that_ask_the_model_again_must_be_told_what() -> None:
    with Capture(make_model("cls"), Needs()) as capture:
        capture.forward(make_images("cls"))
        assert capture.classes is None
        with pytest.raises(CaptureError, match="occlusion asks the model again about the explained score"):
            create_method("occlusion").attribute(capture)
        capture.explained = ExplainedScore(resolve_target([3, 1], capture.logits), 0)
        assert capture.classes.tolist() == [3, 1]


def test_a_function_sees_the_batch_that_it_was_made_for() -> None:
    seen: list[Tensor] = []

    def function(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits[:, 0] + 10 * torch.arange(3)

    explained = ExplainedScore(ResolvedTarget(None, None, function, True), 0)
    unchanged, versions = torch.arange(6.0).view(3, 2), torch.tensor([[70.0, 0.0], [80.0, 0.0]])
    assert explained.of_versions(versions, torch.tensor([2, 0]), unchanged).tolist() == [90.0, 80.0]
    assert [each[:, 0].tolist() for each in seen] == [[0, 2, 70], [80, 2, 4]]
    assert explained.of_versions(unchanged + 1, torch.arange(3), unchanged).tolist() == [1.0, 13.0, 25.0]
    assert len(seen) == 3


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


def test_two_classes_of_two_are_no_one_hot_labels() -> None:
    assert resolve_target([[0, 1], [1, 0]], LOGITS[:, :2]).explained_classes().tolist() == [[0, 1], [1, 0]]
    assert resolve_target([[0, 1, 2, 3], [1, 0, 3, 2]], LOGITS).count == 4


def test_a_column_of_a_table_is_cut_with_its_batch() -> None:
    explainer, images = get_explainer("generic_attention", make_model("cls")), make_images("cls", batch=4)
    column = pandas.Series([3, 1, 0, 2], index=list("abcd"))
    expected = explainer(images, [3, 1, 0, 2], batch_size=2).scores
    torch.testing.assert_close(explainer(images, column, batch_size=2).scores, expected)


class TestLabels:
    @pytest.mark.parametrize(
        "given",
        [
            np.array(list("abcdefg")),
            pandas.Series(list("abcdefg")),
            dict(enumerate("abcdefg")),
            {str(index): name for index, name in reversed([*enumerate("abcdefg")])},
        ],
    )
    def test_may_be_an_array_or_by_index(self, given: Any) -> None:
        explainer = get_explainer("rollout", replace(Subject.of(make_model("cls")), labels=given))
        assert explainer(make_images("cls", 2), ["c", "a"]).target_names() == [["c"], ["a"]]

    @pytest.mark.parametrize("labels", [["cat", "dog"], list("abcdefgh")])
    def test_of_another_number_than_the_outputs_are_refused(self, labels: list[str]) -> None:
        explainer = get_explainer("rollout", replace(Subject.of(make_model("cls")), labels=labels))
        with pytest.raises(InputError, match=f"found {len(labels)} labels, expected 7"):
            explainer(make_images("cls", 2))

    def test_by_something_else_than_indices_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"found labels by 'cat', 'dog', …; expected names by class index"):
            replace(Subject.of(make_model("cls")), labels={"cat": 0, "dog": 1})


def test_arrays_of_names_and_what_is_no_number() -> None:
    labels = ["anchor", "arrow", "key"]
    assert named_classes(np.array(["arrow", "anchor"]), labels) == [1, 0]
    assert named_classes(np.array([["arrow"], ["key"]], object), labels) == [[1], [2]]
    kept = np.array([2, 1])
    assert named_classes(kept, labels) is kept
    for wrong in ("--1", "+-1", "9" * 5000):
        with pytest.raises(UnknownNameError):
            named_classes(wrong, labels)
