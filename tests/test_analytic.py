"""Maps known on paper, and every method against its slow reference."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from families import all_families, make_images, make_model
from on_paper import FEATURES
from references import REFERENCES, Trace
from torch import Tensor, nn
from trained import get_explainer

from vitexplain import create_method, list_methods, method_info

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "raw_attention": [{}, {"layer": 0}],
    "rollout": [
        {},
        {"start_layer": 1, "residual": 0.2},
        {"head_fusion": "max"},
        {"head_fusion": "min", "residual": 0.7},
        *(
            {"head_fusion": fusion, "discard_ratio": 0.6, "normalisation": normalisation}
            for fusion, normalisation in itertools.product(("mean", "max", "min"), ("row", "column"))
        ),
    ],
    "generic_attention": [{}, {"start_layer": 2}],
    "gradcam": [{}, {"layer": 0, "relu": False}, {"relu": False}],
    "pm": [{}, {"score": "background"}, {"score": "joint"}, {"score": "logit"}],
    "tokentm": [
        {},
        {"transformation": "literal"},
        {"transformation": "residual"},
        {"necc_scale": "tokens"},
        {"necc_scale": 2.5, "start_layer": 1},
        {"length": False},
        {"direction": False, "feed_forward": False},
        {"initialisation": False},
    ],
}


def test_every_option_is_tried() -> None:
    for name, tried in OPTIONS.items():
        known = {each.name for each in method_info(name).options} - {"gradient"}  # see test_balanced.py
        untried = known - {key for options in tried for key in options}
        assert not untried, f"options of {name} that no reference test varies: {untried}"


@pytest.mark.exact_states
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_method_equals_its_reference(name: str, family: str) -> None:
    # float64 on both sides: what is left is the algorithm
    model, images = make_model(family).double(), make_images(family).double()
    count = all_families()[family].prefix + math.prod(all_families()[family].grid)
    for options in OPTIONS[name]:
        scores = get_explainer(name, model, **options)(images, 4).scores
        for image, map_ in zip(images, scores, strict=True):
            trace = Trace(copy.deepcopy(model), image, 4, all_families()[family].pooling(count))
            expected = REFERENCES[name](trace, **options)[all_families()[family].prefix :].view_as(map_)
            scale = expected.abs().max().item()
            torch.testing.assert_close(map_, expected, rtol=1e-6, atol=1e-7 * scale, msg=lambda m: f"{options}: {m}")  # noqa: B023


@pytest.mark.parametrize("target", [0, 1])
def test_maps_known_on_paper(paper_model: nn.Module, target: int) -> None:
    image = torch.zeros(1, 3, 1, 3)
    image[0, :2, 0] = FEATURES.T
    unnormalised = torch.exp(FEATURES[:, 0] / math.sqrt(2))
    attention = unnormalised / (unnormalised.sum() + 1)  # 1 = exp(0): CLS itself
    gathered = (attention[:, None] * FEATURES).sum(0)
    positive = FEATURES[:, target].clamp(min=0)

    # y by features: each patch's value reaches CLS directly, and its key moves attention
    gradient = torch.zeros(3, 2)
    gradient[:, target] += attention
    gradient[:, 0] += attention * (FEATURES[:, target] - gathered[target]) / math.sqrt(2)

    # every patch keeps its direction (cosine 1) and its length; CLS has none (cosine 0)
    direction = math.e / (3 * math.e + 1)
    expected: dict[str, Tensor] = {
        "raw_attention": attention,
        "rollout": attention / 2,
        "generic_attention": attention * positive,
        "gradcam": (FEATURES @ gradient.mean(0)).clamp(min=0),
        "pm": (FEATURES + gathered)[:, target].sigmoid(),  # every token attends alike, and the head is the identity
        "tokentm": attention * positive * direction * FEATURES.norm(dim=1),
    }
    assert set(expected) == set(OPTIONS)
    for method, scores in expected.items():
        explanation = get_explainer(method, paper_model)(image, target)
        torch.testing.assert_close(explanation.logits[0], gathered, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            explanation.scores[0, 0], scores, rtol=1e-5, atol=1e-6, msg=lambda m, method=method: f"{method}: {m}"
        )


@pytest.mark.exact_states
def test_tokentm_without_its_weights_is_generic_attention(family: str) -> None:
    model, images = make_model(family), make_images(family)
    plain = {"length": False, "direction": False, "initialisation": False, "feed_forward": False}
    torch.testing.assert_close(
        get_explainer("tokentm", model, **plain)(images, 2).scores,
        get_explainer("generic_attention", model)(images, 2).scores,
    )


@pytest.mark.exact_states
def test_rollout_is_a_distribution(family: str) -> None:
    """Rows of every factor sum to 1, so the seed row's mass is kept: patches and prefix tokens share 1."""
    explanation = get_explainer("rollout", make_model(family))(make_images(family))
    mass = explanation.scores.flatten(1).sum(1)
    torch.testing.assert_close(mass + explanation.diagnostics["prefix_share"], torch.ones(2))


NOT_OF_PATCHES = {
    "centre_prior": "it says where a patch is",
    "random_scores": "its draws go by place",
    **dict.fromkeys(("gradient_shap", "smoothgrad", "kernel_shap", "rise"), "its draws go by place"),
    "contributions": "its neighbourhoods stay behind",
    "occlusion": "its windows cover neighbours",
    "vit_cx": "its masks are smoothed",
}
"""Methods whose scores stay behind when patches move, and why."""


def test_permuting_patches_permutes_the_map(method: str) -> None:
    """Patches moved together with their position embeddings take their scores along."""
    if method in NOT_OF_PATCHES:
        return
    model, images = make_model("cls"), make_images("cls")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, order]
    cut = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(2, 3, 24, 8, 8)[:, :, order]
    shuffled = cut.reshape(2, 3, 4, 6, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 48)
    scores = get_explainer(method, model)(images, 3).scores.flatten(1)
    torch.testing.assert_close(
        get_explainer(method, moved)(shuffled, 3).scores.flatten(1), scores[:, order], rtol=1e-4, atol=1e-6
    )


def test_a_target_that_no_patch_moves_gives_zeros_and_a_warning() -> None:
    from vitexplain import ExplanationWarning

    model = make_model("cls")
    with torch.no_grad():
        model.head.weight[2] = 0.0
    for method in list_methods(class_specific=True, trainable=False):
        if not create_method(method).needs.gradient:  # those say what a patch is, not what moves the target
            continue
        with pytest.warns(ExplanationWarning, match=f"{method} gave a constant map for images .0, 1."):
            explanation = get_explainer(method, model)(make_images("cls"), 2)
        assert not explanation.scores.any()
        assert explanation.diagnostics["constant"].all()
        assert not explanation.diagnostics["prefix_share"].any()
