"""Torch's default device and precision are the user's: maps do not depend on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import make_images, make_model
from lighter import get_explainer
from timm.models.vision_transformer import VisionTransformer

from vitexplain import adapt

METHODS = ("rollout", "gradcam", "contributions", "attnlrp", "legrad", "occlusion", "rise", "smoothgrad", "vit_cx")


@pytest.fixture
def in_double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["cls", "own"])
@pytest.mark.parametrize("name", METHODS)
def test_maps_do_not_depend_on_the_default_device(name: str, kind: str) -> None:
    """On the meta device a tensor has no numbers, so that whatever were made there would show."""
    model, images = make_model(kind), make_images(kind)
    expected = get_explainer(name, model)(images, 1).scores
    with torch.device("meta"):
        found = get_explainer(name, model)(images, 1).scores
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", METHODS)
def test_maps_do_not_depend_on_the_default_precision(name: str, request: pytest.FixtureRequest) -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = get_explainer(name, model)(images, 1).scores
    request.getfixturevalue("in_double_precision")
    found = get_explainer(name, model)(images, 1).scores
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Derived(VisionTransformer):
    """What somebody's class reads is measured, and compared with what timm's reads."""

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return super().forward_head(x, pre_logits)


def test_measured_heads_do_not_depend_on_the_default_device() -> None:
    model = Derived(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7).eval()
    with torch.device("meta"):
        seed = adapt(model).seed(17)
    assert seed.tolist() == [1.0] + [0.0] * 16
