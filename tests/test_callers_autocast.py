"""A caller's autocast is about the model, whenever a method asks it; and never about the attribution."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import make_images, make_model
from lighter import get_explainer
from torch import Tensor, nn

import vitexplain
from vitexplain import UnsupportedModelError
from vitexplain.borrowing import autocast_is_on, callers_autocast, without_autocast
from vitexplain.metrics.predictor import Predictor
from vitexplain.metrics.token_dropping import TokenDropper
from vitexplain.models.embedded import load_scenes_model

ASK_AGAIN = (
    "beyond_intuition",
    "feature_ablation",
    "gradient_shap",
    "integrated_gradients",
    "kernel_shap",
    "occlusion",
    "rise",
    "smoothgrad",
    "tis",
    "transformer_attribution",
    "transition_attention",
    "vit_cx",
)


def half_with_a_wide_head() -> Any:
    """A model that runs in autocast alone."""
    model: Any = make_model("cls").bfloat16()
    model.head = model.head.float()
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ASK_AGAIN),
        ("integrated_gradients", {"gradient": "balanced"}),
        ("transition_attention", {"gradient": "balanced"}),
    ],
)
def test_a_model_that_needs_autocast_is_asked_again_in_it(name: str, options: dict[str, Any]) -> None:
    model, images = half_with_a_wide_head(), make_images("cls").bfloat16().float()
    expected = get_explainer(name, copy.deepcopy(model).float(), **options)(images, 1).scores
    with torch.autocast("cpu", torch.bfloat16):
        found = get_explainer(name, model, **options)(images, 1).scores
    assert found.dtype == expected.dtype
    assert (found - expected).norm() < 0.3 * expected.norm()


def test_gates_that_are_refined_ask_in_it() -> None:
    model = load_scenes_model().bfloat16()
    model.head = model.head.float()
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        explainer = vitexplain.get_explainer("diffmask", model, refine=True)
        assert explainer(images).scores.isfinite().all()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*ASK_AGAIN, "pm", "legrad", "rollout"])
def test_every_forward_is_in_the_callers_autocast(name: str, precision: torch.dtype) -> None:
    model, images = make_model("cls"), make_images("cls")
    explainer = get_explainer(name, model)
    answers: list[tuple[torch.dtype, bool]] = []

    def keep(_: nn.Module, __: Any, logits: Tensor) -> None:
        answers.append((logits.dtype, torch.is_autocast_cache_enabled()))

    model.register_forward_hook(keep)
    with torch.autocast("cpu", precision, cache_enabled=False):
        explainer(images, 1)
        assert isinstance(callers_autocast(), nullcontext)  # nothing is left behind
    wide = {(torch.float64, False)} if name == "transformer_attribution" else set()
    assert set(answers) == {(precision, False), *wide}


def test_tokens_are_dropped_in_autocast() -> None:
    predictor, images = Predictor.of(make_model("cls")), make_images("cls")
    with torch.autocast("cpu", torch.bfloat16):
        dropper = TokenDropper.of(predictor, images)
        assert dropper.logits(images, torch.tensor([[1, 2, 3]] * 2)).isfinite().all()


def test_positions_in_the_blocks_are_found_in_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsupportedModelError, match="depend on the order"):
        TokenDropper.of(Predictor.of(make_model("eva_rope")), make_images("eva_rope"))


def test_the_callers_autocast_is_put_back() -> None:
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(KeyError), without_autocast("cpu"):  # noqa: PT012 - what holds inside is asked inside
            assert not autocast_is_on("cpu")
            with callers_autocast():
                assert autocast_is_on("cpu")
                assert torch.get_autocast_dtype("cpu") == torch.float16
            assert not autocast_is_on("cpu")
            raise KeyError
        assert autocast_is_on("cpu")
    with without_autocast("cpu"), callers_autocast():
        assert not autocast_is_on("cpu")


@pytest.mark.parametrize("on", [False, True])
def test_autocast_is_known_by_releases_that_ask_for_each_device_by_name(
    on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = torch.is_autocast_enabled
    with torch.autocast("cpu", torch.bfloat16, enabled=on), monkeypatch.context() as older:
        older.setattr(torch, "is_autocast_enabled", lambda: asked("cuda"))
        older.setattr(torch, "is_autocast_cpu_enabled", lambda: asked("cpu"))
        assert (autocast_is_on("cpu"), autocast_is_on("cuda")) == (on, False)
