"""Sensitivity-max, infidelity, faithfulness correlation: against captum, Quantus, known answers and slow loops."""

from __future__ import annotations

import zlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from families import make_images, make_model
from torch import Tensor, nn

from vitexplain import ModelAdapter, OptionError, Subject, TargetError, get_explainer
from vitexplain.metrics import MetricBatch, Predictor, Tally, create_metric, metric_batches
from vitexplain.metrics.completeness import _square, _subset
from vitexplain.metrics.draws import generators
from vitexplain.metrics.tally import measure

GRID, SIZE, CLASSES = (3, 4), (12, 16), 5


class LinearAdapter(ModelAdapter):
    """Logits that are linear in the means of patches, which `weights` (C, h, w) weigh."""

    num_channels, num_prefix_tokens, blocks = 3, 0, ()
    output_weight = value_weight = seed = None

    def __init__(self, weights: Tensor) -> None:
        self.model, self.weights, self.asked = nn.Identity(), weights, 0

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return GRID

    def logits(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return torch.einsum("bhw,chw->bc", patch_means(images), self.weights.to(images.dtype))


def patch_means(images: Tensor) -> Tensor:
    (h, w), (height, width) = GRID, SIZE
    return images.reshape(len(images), 3, h, height // h, w, width // w).mean((1, 3, 5))


@pytest.fixture
def batch() -> MetricBatch:
    """Maps that are the exact contributions of patches to a linear model."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(CLASSES, *GRID, generator=generator)
    inputs = torch.randn(4, 3, *SIZE, generator=generator)
    targets = torch.tensor([0, 3, 3, 4])
    scores = patch_means(inputs) * weights[targets]
    return MetricBatch(scores, targets, inputs, Predictor(LinearAdapter(weights), batch_size=16))


def vit_batch(method: str = "generic_attention", batch_size: int = 8, **options: Any) -> MetricBatch:
    subject = Subject.of(make_model("registers"))
    ((_, batch),) = metric_batches(
        [get_explainer(method, subject).method], subject, make_images("registers", 5), batch_size=batch_size, **options
    )
    return batch


def changed(batch: MetricBatch, **parts: Any) -> MetricBatch:
    return MetricBatch(**{**vars(batch), **parts})


# --------------------------------------------------------------------------------------------------------- draws


def test_draws_belong_to_the_image() -> None:
    images = make_images("cls", 3)
    together = [torch.rand(4, generator=each) for each in generators(images, 1)]
    alone = [torch.rand(4, generator=generators(image[None], 1)[0]) for image in images]
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], torch.rand(4, generator=generators(images, 2)[0]))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_subsets_and_squares_have_the_size_that_was_asked_for(share: float) -> None:
    draws = [torch.Generator().manual_seed(seed) for seed in range(200)]
    subsets = torch.stack([_subset(torch.Size((3, 8)), share, each) for each in draws])
    assert {*subsets.sum((1, 2)).tolist()} == {{0.0: 1, 0.25: 6, 1.0: 24}[share]}
    squares = torch.stack([_square(torch.Size((3, 8)), share, each) for each in draws])
    side = {0.0: 1, 0.25: 2, 1.0: 3}[share]
    assert {*squares.sum((1, 2)).tolist()} == {side**2}
    assert {*squares.any(2).sum(1).tolist()} == {*squares.any(1).sum(1).tolist()} == {side}
    assert subsets.any(0).all()
    assert squares.any(0).all()


# --------------------------------------------------------------------------------------------------- sensitivity


def test_sensitivity_is_that_of_captum() -> None:
    from captum.metrics import sensitivity_max

    batch = vit_batch()
    found = measure(create_metric("sensitivity_max", seed=3), batch)["sensitivity"]

    def explain(inputs: Any, target: Tensor) -> Any:
        if isinstance(inputs, tuple):
            return (explain(inputs[0], target),)
        return batch.explain(inputs, target.expand(len(inputs)))

    for index, value in enumerate(found):
        image, target = batch.inputs[index : index + 1], batch.targets[index : index + 1]
        torch.manual_seed(zlib.crc32(image.numpy().tobytes(), 3))
        expected = sensitivity_max(explain, image, target=target)
        assert value == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # of Quantus and what it imports
def test_sensitivity_is_that_of_quantus(quantus: ModuleType) -> None:
    batch = vit_batch("gradcam")
    metric = create_metric("sensitivity_max", radius=0.1, draws=4)
    own = generators(batch.inputs, 0)
    draws = iter(
        [torch.stack([torch.empty(3, 32, 48).uniform_(-0.1, 0.1, generator=g) for g in own]) for _ in range(4)]
    )
    theirs = quantus.MaxSensitivity(
        nr_samples=4,
        perturb_func=lambda arr, indices, **_: arr + next(draws).flatten(1).numpy(),
        disable_warnings=True,
    )

    def pixels(scores: Tensor) -> np.ndarray:  # Quantus wants maps of the images' size; the norms' ratio stays
        return scores.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].numpy()

    expected = theirs(
        model=make_model("registers"),
        x_batch=batch.inputs.numpy(),
        y_batch=batch.targets.numpy(),
        a_batch=pixels(batch.scores),
        explain_func=lambda inputs, targets, **_: pixels(batch.explain(*map(torch.as_tensor, (inputs, targets)))),
    )
    assert measure(metric, batch)["sensitivity"] == pytest.approx(np.array(expected), rel=1e-4)


def test_maps_that_double_have_sensitivity_one_and_fixed_maps_none(batch: MetricBatch) -> None:
    metric = create_metric("sensitivity_max", draws=3)
    doubled = changed(batch, explain=lambda x, targets: 2 * batch.scores.repeat_interleave(len(x) // 4, 0))
    fixed = changed(batch, explain=lambda x, targets: batch.scores.repeat_interleave(len(x) // 4, 0))
    assert measure(metric, doubled)["sensitivity"] == pytest.approx(1.0)
    assert (measure(metric, fixed)["sensitivity"] == 0).all()


def test_the_noise_is_within_the_radius_and_the_class_stays(batch: MetricBatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def explain(inputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((inputs, targets))
        return patch_means(inputs)

    measure(create_metric("sensitivity_max", radius=0.3, draws=20), changed(batch, explain=explain))
    inputs, targets = torch.cat([each for each, _ in seen]), torch.cat([each for _, each in seen])
    assert len(inputs) == 4 * 20
    noise = torch.stack([(each - batch.inputs).abs().amax((1, 2, 3)).min() for each in inputs])
    assert 0.29 < noise.min() <= noise.max() <= 0.3 + 1e-6
    assert torch.bincount(targets).tolist() == [20, 0, 0, 40, 20]


def test_a_map_of_zeros_has_no_sensitivity(batch: MetricBatch) -> None:
    scores = batch.scores.clone()
    scores[1] = 0
    zeros = changed(batch, scores=scores, explain=lambda x, targets: patch_means(x))
    found = measure(create_metric("sensitivity_max", draws=2), zeros)["sensitivity"]
    assert np.isnan(found).tolist() == [False, True, False, False]


# ---------------------------------------------------------------------------------------------------- infidelity


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"removal": "square", "output": "probability"}])
def test_infidelity_is_that_of_captum_on_pixels(options: dict[str, Any]) -> None:
    from captum.metrics import infidelity

    batch, metric = vit_batch(), create_metric("infidelity", draws=12, share=0.2, replacement="zeros", **options)
    found = measure(metric, batch)["infidelity"]
    draw = _square if metric.removal == "square" else _subset
    for index, (value, own) in enumerate(zip(found, generators(batch.inputs, 0), strict=True)):

        def perturb(inputs: Tensor, own: torch.Generator = own) -> tuple[Tensor, Tensor]:
            patches = torch.stack([draw(torch.Size((4, 6)), 0.2, own) for _ in inputs])
            pixels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(inputs)
            return pixels.float(), inputs * ~pixels

        scores = batch.scores[index].repeat_interleave(8, 0).repeat_interleave(8, 1) / (3 * 64)
        model = make_model("registers")
        expected = infidelity(
            model if metric.output == "logit" else nn.Sequential(model, nn.Softmax(1)),
            perturb,
            batch.inputs[index : index + 1],
            scores.expand(1, 3, -1, -1),
            target=batch.targets[index : index + 1],
            n_perturb_samples=12,
            normalize=metric.normalize,
        )
        assert value == pytest.approx(expected.item(), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("removal", ["subset", "square"])
def test_contributions_of_a_linear_model_are_without_infidelity(batch: MetricBatch, removal: str) -> None:
    options = {"removal": removal, "replacement": "zeros", "share": 0.3}
    exact, scaled = (create_metric("infidelity", normalize=flag, **options) for flag in (False, True))
    other = changed(batch, scores=batch.scores * -7)
    assert measure(exact, batch)["infidelity"] == pytest.approx(0, abs=1e-10)
    assert measure(scaled, other)["infidelity"] == pytest.approx(0, abs=1e-10)
    assert (measure(exact, other)["infidelity"] > 0.01).all()


def test_infidelity_of_a_map_of_zeros_is_the_mean_squared_drop(batch: MetricBatch) -> None:
    metric = create_metric("infidelity", share=1.0, replacement="zeros", draws=3)
    found = measure(metric, changed(batch, scores=torch.zeros(4, *GRID)))["infidelity"]
    drops = batch.predictor.logits(batch.inputs)[torch.arange(4), batch.targets]
    assert found == pytest.approx(drops.square().numpy(), rel=1e-5)


# -------------------------------------------------------------------------------------- faithfulness correlation


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # of Quantus and what it imports
def test_faithfulness_correlation_is_that_of_quantus(quantus: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, metric = vit_batch(), create_metric("faithfulness_correlation", draws=15, share=0.25, replacement="zeros")
    found = measure(metric, batch)["correlation"]
    own = generators(batch.inputs, 0)
    subsets = [_subset(torch.Size((4, 6)), 0.25, each) for _ in range(15) for each in own]
    indices = iter([each.flatten().nonzero()[:, 0].numpy() for each in subsets])
    monkeypatch.setattr(np.random, "choice", lambda *_, **__: next(indices))

    class Presence(nn.Module):
        """The model as a function of which patches (B, 1, h, w) of its images are there."""

        def forward(self, present: Tensor) -> Tensor:
            pixels = present.repeat_interleave(8, 2).repeat_interleave(8, 3)
            return make_model("registers")(batch.inputs * pixels)

    def remove(arr: np.ndarray, indices: np.ndarray, **_: Any) -> np.ndarray:
        arr = arr.copy()
        np.put_along_axis(arr, indices, 0, axis=1)
        return arr

    theirs = quantus.FaithfulnessCorrelation(
        nr_runs=15, subset_size=6, perturb_func=remove, normalise=False, return_aggregate=False, disable_warnings=True
    )
    expected = theirs(
        model=Presence().eval(),
        x_batch=np.ones((5, 1, 4, 6), dtype=np.float32),
        y_batch=batch.targets.numpy(),
        a_batch=batch.scores[:, None].numpy(),
        channel_first=True,
    )
    assert found == pytest.approx(np.array(expected), abs=1e-4)


def test_contributions_of_a_linear_model_correlate_perfectly(batch: MetricBatch) -> None:
    metric = create_metric("faithfulness_correlation", replacement="zeros")
    assert measure(metric, batch)["correlation"] == pytest.approx(1)
    assert measure(metric, changed(batch, scores=3 - 2 * batch.scores))["correlation"] == pytest.approx(-1)


def test_a_constant_map_correlates_with_nothing(batch: MetricBatch) -> None:
    metric = create_metric("faithfulness_correlation")
    assert np.isnan(measure(metric, changed(batch, scores=torch.full((4, *GRID), 0.1)))["correlation"]).all()


def test_maps_without_information_correlate_at_chance() -> None:
    batch, metric = vit_batch(), create_metric("faithfulness_correlation")
    tally = Tally(metric)
    for seed in range(12):
        scores = torch.randn(batch.scores.shape, generator=torch.Generator().manual_seed(seed))
        tally.update(changed(batch, scores=scores))
    figure = metric.info.figures[0]
    assert tally.compute().figures[figure.name] == pytest.approx(figure.chance, abs=0.15)


# ---------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("name", ["infidelity", "faithfulness_correlation"])
def test_the_forward_size_changes_nothing(batch: MetricBatch, name: str) -> None:
    adapter = batch.predictor.adapter
    found = [
        measure(create_metric(name), changed(batch, predictor=Predictor(adapter, batch_size=size)))
        for size in (1, 7, 64, 1000)
    ]
    for other in found[1:]:
        np.testing.assert_allclose([*other.values()][-1], [*found[0].values()][-1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["infidelity", "faithfulness_correlation"])
def test_a_class_that_the_model_lacks_is_refused(batch: MetricBatch, name: str) -> None:
    with pytest.raises(TargetError, match="expected 0 to 4"):
        measure(create_metric(name), changed(batch, targets=torch.tensor([0, 1, 2, 5])))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sensitivity_max", {"radius": -0.1}),
        ("sensitivity_max", {"draws": 0}),
        ("infidelity", {"share": 1.5}),
        ("infidelity", {"output": "softmax"}),
        ("faithfulness_correlation", {"draws": 1}),
    ],
)
def test_options_have_ranges(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        create_metric(name, **options)


def test_global_random_numbers_are_left_alone(batch: MetricBatch) -> None:
    before = torch.get_rng_state()
    explained = changed(batch, explain=lambda x, targets: patch_means(x))
    for name in ("sensitivity_max", "infidelity", "faithfulness_correlation"):
        measure(create_metric(name), explained)
    assert torch.equal(torch.get_rng_state(), before)
