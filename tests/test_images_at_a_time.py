"""Large batches are captured a few images at a time on the CPU, and nobody can tell from what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitexplain import InputError, TargetError, batch_parts, create_method, explain_with, get_explainer, list_methods
from vitexplain.batch_parts import CPU_PIXELS, even_part
from vitexplain.benchmarks.measuring import random_images, random_vit
from vitexplain.metrics.predictor import Predictor
from vitexplain.models.adapter import ModelAdapter
from vitexplain.models.black_box import BlackBoxAdapter
from vitexplain.shared_capture import _images_at_a_time
from vitexplain.subject import Subject

SIZE = 32

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")  # of constant maps


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return random_vit("vit_tiny_patch16_224", SIZE, depth=2, num_classes=5)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward had, where no more than two images' pixels pay at a time."""
    monkeypatch.setattr(batch_parts, "CPU_PIXELS", 2 * SIZE**2 + 1)
    sizes: list[int] = []
    inner = ModelAdapter.logits

    def logits(self: ModelAdapter, images: Tensor) -> Tensor:
        sizes.append(len(images))
        return inner(self, images)

    monkeypatch.setattr(ModelAdapter, "logits", logits)
    return sizes


@pytest.mark.parametrize(
    ("batch", "size", "expected"), [(8, 224, 8), (32, 224, 16), (8, 384, 4), (32, 768, 1), (1, 2000, 1)]
)
def test_how_many(model: nn.Module, batch: int, size: int, expected: int) -> None:
    images = torch.empty(batch, 3, 1, 1).expand(-1, -1, size, size)
    assert _images_at_a_time(None, Subject.of(model).adapter, images, False) == expected
    assert _images_at_a_time(None, Subject.of(model).adapter, images, True) == batch
    assert expected * size**2 <= CPU_PIXELS or expected == 1


@pytest.mark.parametrize(
    ("count", "most", "part"), [(10, 8, 5), (10, 5, 5), (9, 4, 3), (3, 20, 3), (7, 1, 1), (1, 1, 1)]
)
def test_parts_are_even(count: int, most: int, part: int) -> None:
    assert even_part(count, most) == part


def test_changed_copies_go_in_even_parts(model: nn.Module, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_parts, "CPU_PIXELS", 3 * SIZE**2)
    for name in ("integrated_gradients", "smoothgrad", "gradient_shap"):
        explainer = get_explainer(name, model, **{"steps" if name == "integrated_gradients" else "samples": 4})
        seen.clear()
        explainer(random_images(1, SIZE), 0)
        assert seen.count(2) == 2, name
        assert max(seen) == 2, name


def test_elsewhere_all_go_at_once() -> None:
    with torch.device("meta"):
        elsewhere = random_vit("vit_tiny_patch16_224", 224)
    images = torch.empty(64, 3, 1, 1).expand(-1, -1, 224, 224)
    assert _images_at_a_time(None, Subject.of(elsewhere).adapter, images, False) == 64


@pytest.mark.parametrize("name", ["rollout", "generic_attention", "gradcam", "random_scores", "integrated_gradients"])
def test_maps_are_those_of_the_whole_batch(name: str, model: nn.Module, seen: list[int]) -> None:
    assert name in list_methods()
    images, targets = random_images(5, SIZE), torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]])
    options: dict[str, Any] = {"steps": 4} if name == "integrated_gradients" else {}
    explainer = get_explainer(name, model, **options)
    parts = explainer(images, targets)
    assert max(seen) < 5
    whole = explainer(images, targets, batch_size=5)
    assert max(seen) == 5
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(parts.inputs, images)
    assert torch.equal(parts.targets, whole.targets)


def test_images_are_not_copied(model: nn.Module, seen: list[int]) -> None:
    images = random_images(5, SIZE)
    found = get_explainer("rollout", model)(images)
    assert sorted(seen)[-3:] == [1, 2, 2]
    assert found.inputs.data_ptr() == images.data_ptr()


def test_images_made_in_inference_mode_come_back_usable(model: nn.Module, seen: list[int]) -> None:
    with torch.inference_mode():
        images = random_images(5, SIZE)
    assert images.is_inference()
    found = get_explainer("gradcam", model)(images)
    assert max(seen) == 2
    assert found.inputs.requires_grad_().requires_grad


SIDES: list[Any] = [[0, 1, 2, 0, 1], (0, 1, 2, 0, 1), range(5), torch.arange(5), np.arange(5)]


@pytest.mark.parametrize("side", SIDES, ids=lambda each: type(each).__name__)
def test_sides_of_a_contrast_are_cut_with_their_images(side: Any, model: nn.Module, seen: list[int]) -> None:
    images = random_images(5, SIZE)
    explainer = get_explainer("gradcam", model)
    found = explainer(images, (side, 2))
    alone = [explainer(image, (int(own), 2)).scores for image, own in zip(images, side, strict=True)]
    torch.testing.assert_close(found.scores, torch.cat(alone), rtol=1e-4, atol=1e-7)
    with pytest.raises(TargetError, match="4 entries for 5 images"):
        explainer(images, (2, side[:4]))


def test_a_model_of_one_number_of_images_gets_that_number(model: nn.Module, seen: list[int]) -> None:
    adapter = BlackBoxAdapter(model, (3, SIZE, SIZE), (2, 2), batch=4)
    hook = model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    try:
        found = get_explainer("saliency", adapter)(random_images(4, SIZE))
    finally:
        hook.remove()
    assert seen == [4]
    assert len(found.scores) == 4


@pytest.mark.parametrize(("batch_size", "size"), [(64, 4), (3, 4), (9, 4)])
def test_a_predictor_asks_such_a_model_for_that_number(
    batch_size: int, size: int, model: nn.Module, seen: list[int]
) -> None:
    adapter = BlackBoxAdapter(model, (3, SIZE, SIZE), (2, 2), batch=4)
    assert Predictor(adapter, batch_size=batch_size).at_a_time(torch.empty(3, SIZE, SIZE)) == size
    found = Predictor(adapter, batch_size=batch_size).logits(images := random_images(6, SIZE))
    torch.testing.assert_close(found, Predictor.of(model).logits(images), rtol=1e-4, atol=1e-5)


def test_a_predictor_takes_few_large_images(model: nn.Module, seen: list[int]) -> None:
    Predictor.of(model).logits(random_images(2, SIZE))  # tries the model first
    seen.clear()
    Predictor.of(model).logits(random_images(5, SIZE))
    assert seen == [2, 2, 1]
    with pytest.raises(InputError, match="expected"):
        Predictor.of(model).logits(torch.empty(0, 3, SIZE, SIZE))


def test_a_function_of_the_logits_is_shown_all_of_them(model: nn.Module, seen: list[int]) -> None:
    images, shapes = random_images(5, SIZE), []

    def score(logits: Tensor) -> Tensor:
        shapes.append(tuple(logits.shape))
        return logits[:, 0]

    found = get_explainer("gradcam", model)(images, score)
    assert set(shapes) == {(5, 5)}
    torch.testing.assert_close(found.scores, get_explainer("gradcam", model)(images, 0).scores, rtol=1e-4, atol=1e-7)


def test_methods_together(model: nn.Module, seen: list[int]) -> None:
    methods = [create_method(name) for name in ("gradcam", "transformer_attribution", "rollout")]
    images = random_images(5, SIZE)
    together = explain_with(methods, Subject.of(model), images)
    for method, found in zip(methods, together, strict=True):
        alone = explain_with([method], Subject.of(model), images, batch_size=1)[0]
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-3, atol=1e-6)
        assert torch.equal(found.targets, alone.targets)
