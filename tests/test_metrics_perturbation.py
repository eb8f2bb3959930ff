"""Perturbation tests: known answers on paper, slow references, the published protocol's arrays."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from families import make_images, make_model
from patch_evidence import COUNT, GRID, SIZE, distinct_weights, evidence_batch, falling, white_images
from safetensors.torch import load_file
from test_contract import assert_same_state, disturb, state_of
from torch import Tensor

from vitexplain.errors import InputError, TargetError
from vitexplain.metrics.catalogue import create_metric, list_metrics, metric_info
from vitexplain.metrics.curves import CurveMetric
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.ordering import ORDERS, rank_pixels, salience
from vitexplain.metrics.predictor import CPU_BATCH, Predictor
from vitexplain.metrics.replacement import REPLACEMENTS, replacement_images
from vitexplain.metrics.tally import Tally
from vitexplain.models import adapt
from vitexplain.preprocessing import Preprocessing

PATCHES = {"order": "patches", "replacement": "zeros", "steps": COUNT}
POSITIVE, NEGATIVE = "positive_perturbation", "negative_perturbation"
CURVES = [name for name in list_metrics() if issubclass(metric_info(name).metric, CurveMetric)]
PIXELS = [*(name for name in CURVES if name != "token_dropping"), "saco"]


def random_scores(count: int, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return torch.rand(count, *grid, generator=torch.Generator().manual_seed(seed))


def transformer_batch(count: int = 3, batch_size: int = 7) -> MetricBatch:
    """A real transformer on 32×48 pixels and a grid of 4×6."""
    preprocessing = Preprocessing((32, 48), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    predictor = Predictor(adapt(make_model("cls")), preprocessing, batch_size)
    inputs = make_images("cls", count)
    targets = torch.arange(count) % 7
    return MetricBatch(
        random_scores(count, (4, 6)), targets=targets, inputs=inputs, predictor=predictor, labels=targets.flip(0)
    )


# ------------------------------------------------------------------------------------------ order of pixels


def slow_bilinear(scores: Tensor, size: tuple[int, int]) -> list[list[float]]:
    h, w = scores.shape

    def weights(pixel: int, pixels: int, patches: int) -> list[tuple[int, float]]:
        place = min(max((pixel + 0.5) * patches / pixels - 0.5, 0.0), patches - 1.0)
        low = min(int(place), patches - 1)
        return [(low, 1 - (place - low)), (min(low + 1, patches - 1), place - low)]

    rows = [weights(y, size[0], h) for y in range(size[0])]
    columns = [weights(x, size[1], w) for x in range(size[1])]
    return [[sum(a * b * float(scores[i, j]) for i, a in ys for j, b in xs) for xs in columns] for ys in rows]


@pytest.mark.parametrize("size", [(24, 32), (7, 10)])
@pytest.mark.parametrize("first", [True, False])
def test_bilinear_order_is_that_of_a_slow_reference(size: tuple[int, int], first: bool) -> None:
    scores = random_scores(2)
    ranking = rank_pixels(scores, size, "bilinear", most_relevant_first=first)
    for map_, ranks in zip(scores, ranking.ranks, strict=True):
        values = [value for row in slow_bilinear(map_, size) for value in row]
        order = sorted(range(len(values)), key=lambda pixel: -values[pixel] if first else values[pixel])
        found = ranks.flatten().argsort().tolist()
        # pixels beyond the outer patch centres are tied; rounding may part them in the reference
        assert max(abs(values[a] - values[b]) for a, b in zip(order, found, strict=True)) < 1e-6


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [0.0, 0.3, -1e30, 1e-40])
def test_ties_go_row_by_row_in_both_directions(order: str, value: float) -> None:
    for first in (True, False):
        ranking = rank_pixels(torch.full((1, *GRID), value), (36, 64), order, most_relevant_first=first)
        if order == "patches":
            expected = torch.arange(COUNT).reshape(GRID).repeat_interleave(12, 0).repeat_interleave(16, 1)
        else:
            expected = torch.arange(36 * 64).reshape(36, 64)
        assert torch.equal(ranking.ranks[0].long(), expected)


def test_a_plateau_stays_level_between_its_patches() -> None:
    scores = torch.tensor([[[0.3, 0.3, 0.3, 0.9], [0.3, 0.3, 0.3, 0.1], [0.3, 0.3, 0.3, 0.7]]])
    for patch in (14, 16):
        pixels = salience(scores, (3 * patch, 4 * patch), "bilinear")
        assert len(pixels[0, :, : 2 * patch].unique()) == 1


def test_small_differences_on_a_large_offset_are_ranked() -> None:
    scores = random_scores(1)
    shifted = 1e6 + 1e-6 * scores.double()  # alike in float32
    for order in ("nearest", "patches"):
        assert torch.equal(rank_pixels(shifted, SIZE, order).ranks, rank_pixels(scores, SIZE, order).ranks)


def test_patches_of_a_size_that_does_not_fit_are_told_apart_by_pixel_centres() -> None:
    scores = torch.arange(6.0).reshape(1, 2, 3)
    ranks = rank_pixels(scores, (5, 7), "patches").ranks[0]
    expected = [[5 - (3 * int((y + 0.5) * 2 / 5) + int((x + 0.5) * 3 / 7)) for x in range(7)] for y in range(5)]
    assert ranks.tolist() == expected


# ------------------------------------------------------------------------------------------ what replaces them


def test_replacements_are_what_they_are_called() -> None:
    batch = transformer_batch()
    inputs, predictor = batch.inputs, batch.predictor
    made = {name: replacement_images(name, inputs, predictor) for name in REPLACEMENTS}
    assert all(value.shape == inputs.shape for value in made.values())
    black = predictor.preprocessing.picture(made["black"])
    assert black.max() == 0
    assert not made["zeros"].any()
    torch.testing.assert_close(made["image_mean"][1, 2], torch.full((32, 48), float(inputs[1, 2].mean())))
    kernel = torch.exp(-((torch.arange(11.0) - 5) ** 2) / 50)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    torch.testing.assert_close(made["blur"][0, 1, 20, 30], (inputs[0, 1, 15:26, 25:36] * kernel).sum())
    assert made["noise"].min() < -0.99
    assert made["noise"].max() > 0.99
    assert made["noise"].abs().max() <= 1


def test_noise_belongs_to_the_image_and_the_seed() -> None:
    batch = transformer_batch()
    noise = replacement_images("noise", batch.inputs, batch.predictor, 1)
    alone = replacement_images("noise", batch.inputs[2:], batch.predictor, 1)
    assert torch.equal(noise[2:], alone)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, replacement_images("noise", batch.inputs, batch.predictor, 2))


# ------------------------------------------------------------------------------------------ known answers


def test_curves_of_a_perfect_map_are_known() -> None:
    weights = distinct_weights() - 0.25
    labels = torch.tensor([0])
    batch = evidence_batch(weights[None], weights, labels=labels)
    ordered = weights.flatten().sort(descending=True).values
    left = ordered.double().sum() - ordered.double().cumsum(0)[:-1]
    rows = create_metric(POSITIVE, **PATCHES).measure(batch)
    torch.testing.assert_close(rows["probability"][0], left.sigmoid(), rtol=0, atol=1e-6)
    assert rows["agreement"][0].tolist() == (left > 0).double().tolist()
    assert rows["accuracy"][0].tolist() == (left <= 0).double().tolist()
    assert 0 < rows["agreement"].mean() < 1
    clean = weights.double().sum().sigmoid()
    torch.testing.assert_close(rows["clean_probability"][0], clean, rtol=0, atol=1e-6)
    assert rows["clean_accuracy"].tolist() == [0]
    torch.testing.assert_close(rows["log_odds"][0], (left.sigmoid() / clean).log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("convention", ["trapezoid_measured", "trapezoid", "steps"])
def test_figures_are_their_definitions(convention: str) -> None:
    labels = torch.tensor([1, 0, 1])
    batch = evidence_batch(random_scores(3), distinct_weights() - 0.3, labels=labels)
    tally = Tally(create_metric(POSITIVE, replacement="zeros", area_convention=convention))
    rows = tally.update(batch)
    figures = tally.compute().figures
    assert list(figures) == [each.name for each in metric_info(POSITIVE).figures]
    for name, clean in (
        ("accuracy", float(np.mean(rows["clean_accuracy"]))),
        ("agreement", 1.0),
        ("probability", float(np.mean(rows["clean_probability"]))),
    ):
        nine = [float(value) for value in rows[name].mean(0)]
        assert len(nine) == 9
        points = [clean, *nine] if convention == "trapezoid_measured" else [clean, *nine, 0.0]
        area = sum(0.1 * (a + b) / 2 for a, b in pairwise(points))
        expected = sum(nine) / 9 if convention == "steps" else area
        assert figures[f"{name}_auc"] == pytest.approx(100 * expected)
    drops = [rows["clean_probability"][i] - rows["probability"][i, k] for i in range(3) for k in range(9)]
    assert figures["aopc"] == pytest.approx(sum(drops) / 27)
    ratios = [math.log(rows["probability"][i, k] / rows["clean_probability"][i]) for i in range(3) for k in range(9)]
    assert figures["log_odds"] == pytest.approx(sum(ratios) / 27)


def test_figures_without_labels_leave_accuracy_out() -> None:
    tally = Tally(create_metric(POSITIVE, **PATCHES))
    tally.update(evidence_batch(random_scores(2)))
    assert "accuracy_auc" not in tally.compute().figures
    assert tally.compute().unmeasured == 0


def test_aopc_keeps_the_sign_of_a_rise() -> None:
    weights = -distinct_weights()
    tally = Tally(create_metric(POSITIVE, **PATCHES))
    tally.update(evidence_batch(weights[None], weights))
    assert tally.compute().figures["aopc"] < 0
    assert tally.compute().figures["log_odds"] > 0


def test_tiny_probabilities_are_clipped_in_the_log_odds() -> None:
    weights = torch.full(GRID, -10.0)
    rows = create_metric(NEGATIVE, **PATCHES).measure(evidence_batch(random_scores(1), weights))
    left = torch.arange(11, 0, -1).double() * -10
    expected = left.sigmoid().clamp(min=1e-12).log() - math.log(1e-12)
    torch.testing.assert_close(rows["log_odds"][0], expected, rtol=0, atol=1e-6)
    assert (rows["log_odds"][0] == 0).sum() == 9


@pytest.mark.parametrize(("name", "sign"), [(POSITIVE, 1), (NEGATIVE, -1)])
def test_perfect_beats_random_beats_inverted(name: str, sign: int) -> None:
    weights = distinct_weights()
    found = {}
    for kind, scores in {"perfect": weights, "random": random_scores(1)[0], "inverted": -weights}.items():
        tally = Tally(create_metric(name, **PATCHES))
        tally.update(evidence_batch(scores[None], weights))
        found[kind] = tally.compute().figures
    for figure in ("probability_auc", "log_odds"):
        perfect, chance, inverted = (sign * found[kind][figure] for kind in ("perfect", "random", "inverted"))
        assert perfect < chance < inverted
    assert sign * found["perfect"]["aopc"] > sign * found["random"]["aopc"] > sign * found["inverted"]["aopc"]


@pytest.mark.parametrize("order", ORDERS)
def test_negative_is_positive_of_the_negated_map(order: str) -> None:
    batch = transformer_batch()
    other = transformer_batch()
    object.__setattr__(other, "scores", -batch.scores)
    one = create_metric(NEGATIVE, order=order).measure(batch)
    two = create_metric(POSITIVE, order=order).measure(other)
    torch.testing.assert_close(one["probability"], two["probability"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [POSITIVE, NEGATIVE])
def test_constant_and_tied_maps_go_row_by_row(name: str) -> None:
    weights = distinct_weights()
    tied = torch.zeros(GRID)
    tied[1] = 1.0
    flat = weights.flatten()
    first, rest = flat[4:8], torch.cat([flat[:4], flat[8:]])
    expected = [falling(flat), falling(torch.cat([first, rest] if name == POSITIVE else [rest, first]))]
    tally = Tally(create_metric(name, **PATCHES))
    rows = tally.update(evidence_batch(torch.stack([torch.ones(GRID), tied]), weights))
    for found, curve in zip(rows["probability"], expected, strict=True):
        np.testing.assert_allclose(found, curve[1:-1].numpy(), atol=1e-6)
    assert tally.compute().constant == 1
    assert tally.compute().tied == 1


def test_broken_maps_are_counted_and_change_no_figure() -> None:
    scores = random_scores(3)
    sound = Tally(create_metric(POSITIVE, **PATCHES))
    sound.update(evidence_batch(scores[:2]))
    scores[2, 0, 0] = torch.nan
    all_three = Tally(create_metric(POSITIVE, **PATCHES))
    all_three.update(evidence_batch(scores))
    assert all_three.compute().broken == all_three.compute().unmeasured == 1
    assert all_three.compute().figures == pytest.approx(sound.compute().figures)


def test_diffmask_follows_the_clean_prediction_from_no_pixel_to_all() -> None:
    weights = -distinct_weights()  # class 0 is predicted, class 1 explained
    rows = create_metric("diffmask_positive_perturbation", order="patches", replacement="zeros", steps=COUNT).measure(
        evidence_batch(weights[None], weights)
    )
    ordered = weights.flatten().sort(descending=True).values
    torch.testing.assert_close(rows["probability"][0], 1 - falling(ordered), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows["negative_log_likelihood"][0], -(1 - falling(ordered)).log(), rtol=0, atol=1e-5)


def test_diffmask_areas_are_the_published_ones_over_the_steps() -> None:
    metric = create_metric("diffmask_negative_perturbation")
    tally = Tally(metric)
    rows = tally.update(evidence_batch(random_scores(2)))
    assert metric.fractions == tuple(k / 28 for k in range(29))
    for name in metric.curves:
        mean = rows[name].mean(0)
        published = float(((mean[1:] + mean[:-1]) / 2).sum())
        assert tally.compute().figures[f"{name}_auc"] == pytest.approx(published / 28)


# ------------------------------------------------------------------------------------------ all metrics of this kind


@pytest.mark.parametrize("name", CURVES)
def test_curves_say_where_their_points_are(name: str) -> None:
    metric = create_metric(name)
    assert isinstance(metric, CurveMetric)
    rows = Tally(metric).update(transformer_batch(2))
    assert {rows[curve].shape for curve in metric.curves} == {(2, len(metric.fractions))}
    assert list(metric.fractions) == sorted(set(metric.fractions))


@pytest.mark.parametrize("name", [*CURVES, "saco"])
def test_a_batch_equals_its_images_one_by_one_and_tallies_merge(name: str) -> None:
    metric = create_metric(name, **({"replacement": "noise"} if name in PIXELS else {}))
    batch = transformer_batch(3)
    whole, parts = Tally(metric), [Tally(metric) for _ in range(3)]
    rows = whole.update(batch)
    for index, part in enumerate(parts):
        one = slice(index, index + 1)
        part.update(
            MetricBatch(
                batch.scores[one],
                targets=batch.targets[one],
                inputs=batch.inputs[one],
                labels=batch.labels[one],
                predictor=batch.predictor,
            )
        )
    merged = parts[0].merge(*parts[1:])
    for statistic, value in merged.rows.items():
        np.testing.assert_allclose(value, rows[statistic], atol=1e-5)
    assert merged.compute().figures == pytest.approx(whole.compute().figures, abs=1e-4)


@pytest.mark.parametrize("name", [*CURVES, "saco"])
def test_the_model_is_as_it_was_also_after_a_failure(name: str) -> None:
    batch = transformer_batch(2)
    model = batch.predictor.adapter.model
    disturb(model)
    before = state_of(model)
    Tally(create_metric(name)).update(batch)
    assert_same_state(before, state_of(model))
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise MemoryError("the fourth forward")

    handle = model.head.register_forward_pre_hook(fail)
    before = state_of(model)
    with pytest.raises(MemoryError):
        Tally(create_metric(name)).update(batch)
    assert_same_state(before, state_of(model))
    handle.remove()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_images_go_through_the_model_in_full_batches(batch_size: int) -> None:
    batch = transformer_batch(3, batch_size)
    seen: list[int] = []
    model = batch.predictor.adapter.model
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    create_metric("deletion", steps=4).measure(batch)
    size = min(batch_size, CPU_BATCH)
    assert seen == [size] * (15 // size) + ([15 % size] if 15 % size else [])


@pytest.mark.parametrize("name", [POSITIVE, "deletion", "insertion", "token_dropping"])
@pytest.mark.parametrize("target", [-1, 7])
def test_classes_the_model_does_not_have_are_refused(name: str, target: int) -> None:
    batch = transformer_batch(2)
    batch.targets[1] = target
    with pytest.raises(TargetError, match="expected 0 to 6"):
        create_metric(name).measure(batch)


def test_what_cannot_be_measured_is_refused() -> None:
    batch = transformer_batch(2)
    with pytest.raises(InputError, match="take fewer steps"):
        create_metric("deletion", order="patches", steps=25).measure(batch)
    unknown = MetricBatch(
        batch.scores, targets=batch.targets, inputs=batch.inputs, predictor=Predictor(batch.predictor.adapter)
    )
    with pytest.raises(InputError, match="a colour cannot be painted"):
        create_metric(POSITIVE).measure(unknown)
    wrong = MetricBatch(batch.scores, targets=batch.targets, inputs=white_images(2), predictor=batch.predictor)
    with pytest.raises(InputError, match="found images"):
        create_metric(POSITIVE).measure(wrong)


# ------------------------------------------------------------------------------------------ the published arrays


@pytest.fixture(scope="module")
def published(test_data: Path, goldens: Path) -> tuple[MetricBatch, dict[str, np.ndarray]]:
    """The protocol's own maps, 224×224, on ViT-Ti."""
    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(test_data / "vit_tiny_patch16_224_in1k" / "model.safetensors"))
    arrays = dict(np.load(goldens / "metrics_perturbation.npz"))
    inputs = np.load(goldens / "inputs.npz")
    images = torch.from_numpy(np.stack([inputs[f"vit_tiny/{name}"] for name in arrays["names"]]))
    targets = torch.from_numpy(arrays["target"])
    batch = MetricBatch(
        torch.from_numpy(arrays["vis224"])[:, 0],
        targets=targets,
        inputs=images,
        predictor=Predictor.of(model),
        labels=targets,
    )
    return batch, arrays


@pytest.mark.parity
@pytest.mark.parametrize(("name", "key", "index"), [(POSITIVE, "pos", 0), (NEGATIVE, "neg", 1)])
def test_published_perturbation(
    published: tuple[MetricBatch, dict[str, np.ndarray]], name: str, key: str, index: int
) -> None:
    batch, arrays = published
    metric = create_metric(name)
    rows = metric.measure(batch)
    assert np.array_equal(rows["accuracy"].numpy().T, arrays[f"{key}/perturbations_hits"])
    assert np.array_equal(rows["clean_accuracy"].numpy(), arrays[f"{key}/model_hits"])
    # where equal pixels stand on both sides of the cut, the published choice among them is arbitrary
    ordered = batch.scores.flatten(1).sort(dim=1, descending=key == "pos").values
    cuts = [int(50176 * fraction) for fraction in metric.fractions]
    split = torch.stack([ordered[:, cut - 1] == ordered[:, cut] for cut in cuts]).numpy()
    error = np.abs(rows["probability"].numpy().T - arrays["own/target_prob_pos_neg"][index])
    assert not split.all()
    assert error[~split].max() < 1e-5
    assert error.max() < 1e-3
    # the published difference is that of the largest probability: the same where the prediction is
    same = (rows["agreement"].numpy().T == 1) & ~split
    change = (rows["probability"] - rows["clean_probability"][:, None]).numpy().T
    assert same.sum() >= 1
    assert np.abs(change - arrays[f"{key}/perturbations_prob_diff"])[same].max() < 1e-5


@pytest.mark.parity
def test_patch_maps_give_the_published_hits(published: tuple[MetricBatch, dict[str, np.ndarray]]) -> None:
    batch, arrays = published
    small = MetricBatch(
        torch.from_numpy(arrays["map14"]),
        targets=batch.targets,
        inputs=batch.inputs,
        predictor=batch.predictor,
        labels=batch.labels,
    )
    for name, key in ((POSITIVE, "pos"), (NEGATIVE, "neg")):
        assert np.array_equal(
            create_metric(name).measure(small)["accuracy"].numpy().T, arrays[f"{key}/perturbations_hits"]
        )
