"""SaCo: the published coefficient, known answers, and what must not change it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from patch_evidence import COUNT, GRID, distinct_weights, evidence_batch
from torch import Tensor

from vitexplain.errors import InputError
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.saco import saco_coefficient
from vitexplain.metrics.tally import Tally

PATCHES = {"order": "patches", "replacement": "zeros", "groups": COUNT}


def coefficients(scores: Tensor, weights: Tensor | None = None, **options: object) -> Tensor:
    return create_metric("saco", **{**PATCHES, **options}).measure(evidence_batch(scores, weights))["saco"]


@pytest.mark.parity
def test_published_coefficients(goldens: Path) -> None:
    arrays = np.load(goldens / "metrics_seg_saco.npz")
    cases = [name[:-2] for name in arrays.files if name.startswith("saco/") and name.endswith("/F")]
    assert len(cases) == 8
    for case in cases:
        salience, fall = (torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("s", "dpred"))
        assert float(saco_coefficient(salience, fall)) == pytest.approx(float(arrays[f"{case}/F"]), abs=1e-12), case


def test_the_coefficient_is_that_of_a_loop_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    salience = torch.rand(5, 7, generator=generator).sort(1, descending=True).values
    fall = torch.randint(-2, 3, (5, 7), generator=generator).double()  # with ties
    for s, d, found in zip(salience.tolist(), fall.tolist(), saco_coefficient(salience, fall), strict=True):
        pairs = [(s[i] - s[j], d[i] >= d[j]) for i in range(7) for j in range(i + 1, 7)]
        total = sum(weight if right else -weight for weight, right in pairs)
        assert float(found) == pytest.approx(total / sum(weight for weight, _ in pairs), abs=1e-6)


def test_a_perfect_map_has_1_and_an_inverted_one_minus_1() -> None:
    weights = distinct_weights()
    found = coefficients(torch.stack([weights, -weights]), weights)
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0], dtype=torch.float64))


def test_random_maps_have_0_in_the_mean() -> None:
    found = coefficients(torch.rand(300, *GRID, generator=torch.Generator().manual_seed(0)))
    assert abs(float(found.mean())) < 4 * float(found.std()) / 300**0.5
    assert found.std() > 0.1


def test_a_constant_map_has_none_and_is_counted() -> None:
    weights = distinct_weights()
    tally = Tally(create_metric("saco", **PATCHES))
    tally.update(evidence_batch(torch.stack([weights, torch.ones(GRID), torch.full(GRID, torch.nan)]), weights))
    summary = tally.compute()
    assert (summary.unmeasured, summary.constant, summary.broken) == (2, 1, 1)
    assert summary.figures["saco"] == pytest.approx(1)


def test_groups_of_a_tied_map_weigh_nothing_against_each_other() -> None:
    weights = distinct_weights()
    flat = weights.flatten()
    two = torch.zeros(COUNT)
    two[flat.argsort(descending=True)[:6]] = 1.0  # the stronger half, in any order
    assert float(coefficients(two.reshape(1, *GRID), weights)) == pytest.approx(1)


@pytest.mark.parametrize("order", ["bilinear", "nearest", "patches"])
@pytest.mark.parametrize("groups", [5, 10])
def test_scaling_and_shifting_the_map_change_nothing(order: str, groups: int) -> None:
    scores = torch.rand(4, *GRID, generator=torch.Generator().manual_seed(1)).double()
    found = coefficients(scores, order=order, groups=groups)
    moved = coefficients(512 * scores - 100, order=order, groups=groups)
    torch.testing.assert_close(found, moved, rtol=0, atol=1e-5)


def test_one_group_at_a_time_is_replaced_by_the_mean_of_the_image() -> None:
    """Again, with loops: groups cut from the sorted pixels, their sums, one image a group."""
    scores = torch.rand(2, *GRID, generator=torch.Generator().manual_seed(2))
    batch = evidence_batch(scores, distinct_weights() - 0.3, inputs=torch.randn(2, 3, 24, 32))
    found = create_metric("saco", order="nearest", groups=8).measure(batch)["saco"]
    model = batch.predictor.adapter.model
    for image, map_, value in zip(batch.inputs, scores, found, strict=True):
        pixels = map_.repeat_interleave(8, 0).repeat_interleave(8, 1).flatten().tolist()
        order = sorted(range(len(pixels)), key=lambda pixel: -pixels[pixel])
        clean = model(image[None])[0].softmax(0).detach()
        sums, falls = [], []
        for start in range(0, len(order), len(order) // 8):
            chosen = order[start : start + len(order) // 8]
            changed = image.clone().flatten(1)
            changed[:, chosen] = image.flatten(1).mean(1, keepdim=True)
            answer = model(changed.reshape(1, 3, 24, 32))[0].softmax(0).detach()
            sums.append(sum(pixels[pixel] for pixel in chosen))
            falls.append(float(clean[clean.argmax()] - answer[clean.argmax()]))
        pairs = [(i, j) for i in range(8) for j in range(i + 1, 8)]
        total = sum((1 if falls[i] >= falls[j] else -1) * (sums[i] - sums[j]) for i, j in pairs)
        assert float(value) == pytest.approx(total / sum(abs(sums[i] - sums[j]) for i, j in pairs), abs=1e-5)


def test_the_explained_class_may_be_followed_instead() -> None:
    weights = distinct_weights()
    batch = evidence_batch(torch.stack([weights, -weights]), weights)
    predicted = batch.predictor.logits(batch.inputs).argmax(1)
    published, explained = (create_metric("saco", **PATCHES, of=each) for each in ("predicted", "explained"))
    same, other = replace(batch, targets=predicted), replace(batch, targets=1 - predicted)
    torch.testing.assert_close(explained.measure(same)["saco"], published.measure(batch)["saco"])
    # of two classes, what speaks for the one speaks against the other
    torch.testing.assert_close(explained.measure(other)["saco"], -published.measure(batch)["saco"])
    torch.testing.assert_close(published.measure(other)["saco"], published.measure(batch)["saco"])
    with pytest.raises(InputError, match="requires targets"):
        explained.measure(replace(batch, targets=None))


def test_more_groups_than_patches_are_refused() -> None:
    with pytest.raises(InputError, match="found 12 patches or pixels"):
        coefficients(torch.rand(1, *GRID), groups=13)
