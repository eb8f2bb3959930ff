"""Insertion and deletion: known answers, the published code's curves, and Quantus on the same arrays."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from families import make_images, make_model
from patch_evidence import COUNT, GRID, PATCH, distinct_weights, evidence_batch, falling
from safetensors.torch import load_file
from torch import Tensor

from vitexplain.metrics.catalogue import create_metric, metric_info
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.ordering import salience
from vitexplain.metrics.predictor import Predictor
from vitexplain.metrics.tally import Tally
from vitexplain.models import adapt
from vitexplain.preprocessing import Preprocessing

PATCHES = {"order": "patches", "replacement": "zeros", "steps": COUNT}


def area(name: str, scores: Tensor, weights: Tensor) -> float:
    tally = Tally(create_metric(name, **PATCHES))
    tally.update(evidence_batch(scores[None], weights))
    return tally.compute().figures["auc"]


def test_curves_of_a_perfect_map_are_known() -> None:
    weights = distinct_weights()
    ordered = weights.flatten().sort(descending=True).values
    batch = evidence_batch(weights[None], weights)
    deletion = create_metric("deletion", **PATCHES).measure(batch)["probability"][0]
    insertion = create_metric("insertion", **PATCHES).measure(batch)["probability"][0]
    torch.testing.assert_close(deletion, falling(ordered), rtol=0, atol=1e-6)
    torch.testing.assert_close(insertion, falling(ordered.flip(0)).flip(0), rtol=0, atol=1e-6)
    curve = falling(ordered).numpy()
    expected = (curve.sum() - (curve[0] + curve[-1]) / 2) / COUNT
    assert area("deletion", weights, weights) == pytest.approx(expected)


def test_no_order_beats_the_perfect_one_and_none_is_worse_than_the_inverted_one() -> None:
    weights = distinct_weights()
    others = torch.rand(20, *GRID, generator=torch.Generator().manual_seed(0))
    for name, sign in (("deletion", 1), ("insertion", -1)):
        assert metric_info(name).figures[0].higher_is_better is (sign < 0)
        best, worst = sign * area(name, weights, weights), sign * area(name, -weights, weights)
        middle = [sign * area(name, scores, weights) for scores in others]
        assert best < min(middle) < max(middle) < worst
        for scores in (torch.ones(GRID), (weights > weights.median()).float()):
            assert best < sign * area(name, scores, weights) < worst


def test_a_constant_map_goes_row_by_row() -> None:
    weights = distinct_weights()
    batch = evidence_batch(torch.full((1, *GRID), 0.3), weights)
    found = create_metric("deletion", **PATCHES).measure(batch)["probability"][0]
    torch.testing.assert_close(found, falling(weights), rtol=0, atol=1e-6)


def test_a_broken_map_is_counted_and_not_measured() -> None:
    scores = torch.stack([distinct_weights(), torch.full(GRID, torch.nan)])
    tally = Tally(create_metric("insertion", **PATCHES))
    tally.update(evidence_batch(scores))
    summary = tally.compute()
    assert (summary.images, summary.broken, summary.unmeasured) == (2, 1, 1)
    assert summary.figures["auc"] == pytest.approx(area("insertion", distinct_weights(), distinct_weights()))


@pytest.mark.parametrize("order", ["bilinear", "nearest", "patches"])
@pytest.mark.parametrize("replacement", ["zeros", "blur", "black"])
def test_deletion_ends_where_insertion_begins(order: str, replacement: str) -> None:
    batch = evidence_batch(torch.rand(2, *GRID, generator=torch.Generator().manual_seed(0)))
    deletion, insertion = (
        create_metric(name, order=order, replacement=replacement, steps=4).measure(batch)["probability"]
        for name in ("deletion", "insertion")
    )
    clean = batch.predictor.probabilities(batch.inputs)[:, 1].double()
    torch.testing.assert_close(deletion[:, 0], clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(insertion[:, -1], clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(deletion[:, -1], insertion[:, 0], rtol=0, atol=1e-6)


def test_a_step_at_224_pixels_is_1792_of_them() -> None:
    metric = create_metric("deletion")
    batch = MetricBatch(torch.rand(1, 14, 14), inputs=torch.zeros(1, 3, 224, 224))
    assert metric.ranking(batch).bounds(metric.steps) == list(range(0, 50177, 1792))
    assert metric.replacement == "zeros"
    assert create_metric("insertion").replacement == "blur"


# ------------------------------------------------------------------------------------------ Quantus


def transformer() -> tuple[Any, Tensor, Tensor, Tensor]:
    """A model, images of 32×48 pixels, targets, and maps whose scores all differ, on a grid of 4×6."""
    model, images = make_model("cls"), make_images("cls", 3)
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    return model, images, torch.tensor([2, 5, 0]), (order.float() / 23).reshape(3, 4, 6)


def with_quantus(quantus: ModuleType, metric: str, options: dict[str, Any], arrays: dict[str, Any]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Quantus warns of is not ours
        measure = getattr(quantus, metric)(normalise=False, disable_warnings=True, perturb_baseline=0.0, **options)
        return np.asarray(measure(**arrays, device="cpu", softmax=True, channel_first=True))


@pytest.mark.peers
def test_deletion_is_the_pixel_flipping_of_quantus(quantus: ModuleType) -> None:
    model, images, targets, scores = transformer()
    arrays = {
        "model": model,
        "x_batch": images.numpy(),
        "y_batch": targets.numpy(),
        "a_batch": salience(scores, (32, 48), "nearest")[:, None].numpy(),
    }
    # a patch a step, in three channels: no step ends between equal pixels
    theirs = with_quantus(quantus, "PixelFlipping", {"features_in_step": 3 * PATCH * PATCH}, arrays)
    batch = MetricBatch(scores, targets=targets, inputs=images, predictor=Predictor.of(model))
    ours = create_metric("deletion", order="nearest", steps=24).measure(batch)["probability"].numpy()
    assert theirs.shape == (3, 24)
    np.testing.assert_allclose(ours[:, 1:], theirs, atol=1e-5)
    assert np.ptp(theirs, axis=1).min() > 0.01


@pytest.mark.peers
@pytest.mark.parametrize(("order", "name"), [("morf", "positive_perturbation"), ("lerf", "negative_perturbation")])
def test_perturbation_by_patches_is_the_region_perturbation_of_quantus(
    quantus: ModuleType, order: str, name: str
) -> None:
    model, images, targets, scores = transformer()
    arrays = {
        "model": model,
        "x_batch": images.numpy(),
        "y_batch": targets.numpy(),
        "a_batch": salience(scores, (32, 48), "nearest")[:, None].numpy(),
    }
    options = {"patch_size": PATCH, "regions_evaluation": 23, "order": order}
    theirs = with_quantus(quantus, "RegionPerturbation", options, arrays)
    predictor = Predictor(adapt(model), Preprocessing((32, 48), (0.5,) * 3, (0.5,) * 3))
    batch = MetricBatch(scores, targets=targets, inputs=images, predictor=predictor)
    rows = create_metric(name, order="patches", replacement="zeros", steps=24).measure(batch)
    drops = (rows["clean_probability"][:, None] - rows["probability"]).numpy()
    np.testing.assert_allclose(drops, theirs, atol=1e-5)
    assert np.ptp(theirs, axis=1).min() > 0.01


# ------------------------------------------------------------------------------------------ the published curves


@pytest.mark.parity
@pytest.mark.parametrize(("name", "key"), [("deletion", "del"), ("insertion", "ins")])
def test_published_curves(test_data: Path, goldens: Path, name: str, key: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(test_data / "vit_tiny_patch16_224_in1k" / "model.safetensors"))
    arrays = np.load(goldens / "metrics_perturbation.npz")
    image = torch.from_numpy(np.load(goldens / "inputs.npz")["vit_tiny/catdog"])[None]
    assert arrays["names"][0] == "catdog"
    scores = torch.from_numpy(arrays["vis224"])[0]
    batch = MetricBatch(scores, targets=torch.tensor([243]), inputs=image, predictor=Predictor.of(model))
    found = create_metric(name, replacement="zeros").measure(batch)["probability"][0].numpy()
    error = np.abs(found - arrays[f"causal/{key}_catdog_step1792_zeros_normspace"])
    # where equal pixels stand on both sides of the cut, the published choice among them is arbitrary
    ordered = scores.flatten().sort(descending=True).values
    split = np.array([False, *(bool(ordered[cut - 1] == ordered[cut]) for cut in range(1792, 50176, 1792)), False])
    assert split.sum() < 10
    assert error[~split].max() < 1e-5
    assert error.max() < 1e-2
