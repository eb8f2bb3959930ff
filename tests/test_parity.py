"""Maps of the original authors' code on real weights and photographs; needs the reference data."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_maps import TOLERANCE, check, compare
from lighter import LIGHTER
from torch import Tensor, nn

from vitexplain import create_method, explain_with, get_explainer, list_methods
from vitexplain.subject import Subject

pytestmark = pytest.mark.parity

METHODS = [each for each in list_methods(trainable=False) if each not in LIGHTER and each != "attention_flow"]
"""What explains a photograph in a few passes."""

SIMILAR_FOR_ALL_CLASSES = ("gmar", "full_lrp", "partial_lrp")
"""Methods that ask for a class and hardly use it: gradients that weigh whole heads, relevance without a gradient."""


def test_logits(real_models: dict[str, nn.Module], real_inputs: Any) -> None:
    keys = [key for key in real_inputs.files if key.startswith("logits/")]
    assert len(keys) == 16
    for key in keys:
        _, name, image = key.split("/")
        images = torch.from_numpy(real_inputs[f"{name}/{image}"])[None]
        logits = get_explainer("tokentm", real_models[name])(images).logits
        torch.testing.assert_close(logits[0], torch.from_numpy(real_inputs[key]).reshape(-1), rtol=0, atol=1e-4)


def test_raw_attention(goldens: Path, real_models: dict[str, nn.Module], real_inputs: Any) -> None:
    def choose(label: str, variant: str, image: str) -> Any:
        return "raw_attention", {}, None

    check(compare(goldens / "raw_attention.npz", real_models, real_inputs, choose), 16)


def test_rollout(goldens: Path, real_models: dict[str, nn.Module], real_inputs: Any) -> None:
    def choose(label: str, variant: str, image: str) -> Any:
        return "rollout", {"start_layer": {"start0": 0, "start1": 1}[variant]}, None

    check(compare(goldens / "rollout.npz", real_models, real_inputs, choose), 32)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", ["0", "0.9"])
def test_vit_explain_rollout(
    goldens: Path, real_models: dict[str, nn.Module], real_inputs: Any, fusion: str, discard: str
) -> None:
    def choose(label: str, variant: str, image: str) -> Any:
        options = {"head_fusion": fusion, "discard_ratio": float(discard), "normalisation": "column"}
        return ("rollout", options, None) if variant == f"{fusion}_d{discard}" else None

    # with discard, weights that float32 cannot order lie on both sides of the threshold: one of 38809 may change sides
    tolerance = TOLERANCE if discard == "0" else 1e-3
    errors = compare(goldens / "vit_explain_rollout.npz", real_models, real_inputs, choose, divide=True)
    check(errors, 16, tolerance)


def test_generic_attention(goldens: Path, real_models: dict[str, nn.Module], real_inputs: Any) -> None:
    def choose(label: str, variant: str, image: str) -> Any:
        return "generic_attention", {}, int(label)

    check(compare(goldens / "gae_iccv21.npz", real_models, real_inputs, choose), 22)


def test_gradcam(goldens: Path, real_models: dict[str, nn.Module], real_inputs: Any) -> None:
    def choose(label: str, variant: str, image: str) -> Any:
        return ("gradcam", {"relu": False}, int(label)) if variant == "GradCAM_raw" else None

    check(compare(goldens / "gradcam_norm1.npz", real_models, real_inputs, choose), 22)


@pytest.mark.parametrize("variant", ["value", "literal", "residual", "literal_f64", "residual_f64"])
def test_tokentm(goldens: Path, real_models: dict[str, nn.Module], real_inputs: Any, variant: str) -> None:
    def choose(label: str, found: str, image: str) -> Any:
        return ("tokentm", {"transformation": variant.split("_")[0]}, int(label)) if found == variant else None

    check(compare(goldens / "tokentm.npz", real_models, real_inputs, choose), 22)


@pytest.mark.parametrize("image", ["catdog", "el2"])
def test_class_specific_maps_move_with_the_target(
    real_models: dict[str, nn.Module], real_inputs: Any, image: str
) -> None:
    """Two classes in one photograph: the maps of two class-specific targets differ clearly, rollout's do not."""
    classes = json.loads(str(real_inputs["classes_json"]))[image]["classes"]
    for name, model in real_models.items():
        images = torch.from_numpy(real_inputs[f"{name}/{image}"])[None]
        targets = torch.tensor([classes[name]])
        methods = [create_method(each) for each in METHODS if each not in SIMILAR_FOR_ALL_CLASSES]
        for explanation in explain_with(methods, Subject.of(model), images, targets):
            ours, theirs = (each.flatten() for each in explanation.scores[0])
            similar = rank_correlation(ours, theirs)
            if create_method(explanation.method).info.class_specific:
                assert similar < 0.9, f"{explanation.method} on {name}: {similar:.3f}"
            else:
                assert similar == pytest.approx(1.0)


def test_bfloat16_keeps_the_order_of_patches(real_models: dict[str, nn.Module], real_inputs: Any) -> None:
    """The same rounded weights and pixels, computed with in either precision."""
    rough_model = copy.deepcopy(real_models["vit_tiny"]).bfloat16()
    exact_model = copy.deepcopy(rough_model).float()
    images = torch.from_numpy(real_inputs["vit_tiny/catdog"])[None].bfloat16()
    for method in METHODS:
        if method == "feature_ablation":  # differences of logits, which are a multiple of 1/16 in this precision
            continue
        exact = get_explainer(method, exact_model)(images.float(), 243).scores.flatten()
        rough = get_explainer(method, rough_model)(images, 243).scores.flatten()
        assert rank_correlation(exact, rough) > 0.95, method


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two vectors, ties in order of appearance."""
    ranks = torch.stack([each.argsort(stable=True).argsort().double() for each in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
