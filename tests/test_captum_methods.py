"""Attribution of pixels, most of it by captum: known answers, captum on the plain model, and what is left behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from families import SIZE, make_images, make_model
from lighter import passes_claimed
from test_balanced import with_constants
from test_contract import assert_same_state, disturb, state_of
from test_tiers import BUILD, pyramid, randomised
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import InputError, OptionError, TargetError, get_explainer, method_info
from vitexplain.patch_pixels import gather_by_patch, patch_of_pixel
from vitexplain.surrogate import LeastSquares

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")

SIGNED = ("input_x_gradient", "integrated_gradients", "gradient_shap", "feature_ablation", "kernel_shap")
SAMPLED = ("integrated_gradients", "smoothgrad", "gradient_shap")
ABLATIONS = ("occlusion", "feature_ablation", "kernel_shap")
FEW: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 7},
    "smoothgrad": {"samples": 7},
    "gradient_shap": {"samples": 7},
    "kernel_shap": {"samples": 30},
}


def linear() -> nn.Module:
    """A model whose logits are linear in the pixels, so that every sensible attribution is weight times pixel."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 4),
        nn.Identity(),
        nn.Conv2d(6, 8, 2, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 7),
    ).eval()


def cut(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sums over patches (B, h, w) of (B, C, H, W), patch by patch."""
    height, width = pixels.shape[2] // grid[0], pixels.shape[3] // grid[1]
    sums = [
        pixels[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width].sum((1, 2, 3))
        for i, j in itertools.product(*map(range, grid))
    ]
    return torch.stack(sums, 1).view(-1, *grid)


@pytest.mark.parametrize("name", SIGNED)
def test_linear_models_have_one_answer(name: str) -> None:
    model, images = linear().double(), torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)).double()
    options = {"gradient_shap": {"noise": 0.0}, "kernel_shap": {"samples": 200}}.get(name, {})
    weights = torch.stack([torch.autograd.functional.jacobian(lambda x: model(x[None])[0, 4], each) for each in images])
    expected = cut(weights * images, (4, 6))
    found = get_explainer(name, model, **options)(images, 4)
    assert found.signed
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-5)  # captum's ablations work in float32


def test_occlusion_of_a_linear_model_is_the_mean_over_windows() -> None:
    model, images = linear(), torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    single = get_explainer("occlusion", model, window=1)(images, 4).scores
    torch.testing.assert_close(single, get_explainer("feature_ablation", model)(images, 4).scores, rtol=1e-4, atol=1e-6)
    for window, stride in ((2, 1), (3, 2), (4, 1), (5, 1)):
        scores = get_explainer("occlusion", model, window=window, stride=stride)(images, 4).scores[0]
        total, count = torch.zeros(4, 6), torch.zeros(4, 6)
        tall, wide = min(window, 4), min(window, 6)
        starts = [
            range(0, side - length + stride, stride) if length < side else [0]
            for side, length in ((4, tall), (6, wide))
        ]
        for i, j in itertools.product(*starts):
            inside = (slice(i, i + tall), slice(j, j + wide))
            total[inside] += single[0][inside].sum()
            count[inside] += 1
        torch.testing.assert_close(scores, total / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean_abs"])
@pytest.mark.parametrize("name", ["saliency", "input_x_gradient"])
def test_gradients_are_autograds(name: str, reduction: str) -> None:
    model, images = make_model("registers").double(), make_images("registers").double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images)[[0, 1], [2, 5]].sum(), images)
    pixels = (gradient if name == "saliency" else gradient * images).detach()
    expected = cut(pixels, (4, 6)) if reduction == "sum" else cut(pixels.abs(), (4, 6)) / (3 * 8 * 8)
    explanation = get_explainer(name, model, reduction=reduction)(images.detach(), [2, 5])
    torch.testing.assert_close(explanation.scores, expected)
    assert explanation.signed is (reduction == "sum")


@pytest.mark.parametrize("name", ["saliency", "input_x_gradient"])
def test_gradients_are_taken_of_any_target(name: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    ours, theirs = (get_explainer(name, model, reduction="sum")(images, each).scores for each in (1, 4))
    contrast = get_explainer(name, model, reduction="sum")(images, (1, 4)).scores
    torch.testing.assert_close(contrast, ours - theirs, rtol=1e-3, atol=1e-5)
    function = get_explainer(name, model, reduction="sum")(images, lambda logits: 2 * logits[:, 1]).scores
    torch.testing.assert_close(function, 2 * ours, rtol=1e-3, atol=1e-5)
    balanced = get_explainer(name, model, reduction="sum", gradient="balanced")(images, 1).scores
    assert (balanced - ours).abs().max() > 0.05 * ours.abs().max()


def test_integrated_gradients_are_complete() -> None:
    model, images = make_model("cls").double(), make_images("cls").double()
    for baseline, start in (("zeros", torch.zeros_like(images)), ("image_mean", images.mean((2, 3), keepdim=True))):
        scores = get_explainer("integrated_gradients", model, steps=200, baseline=baseline)(images, 3).scores
        difference = (model(images) - model(start.expand_as(images)))[:, 3].detach()
        torch.testing.assert_close(scores.sum((1, 2)), difference, rtol=1e-2, atol=1e-3)


def plain(name: str, model: nn.Module, image: Tensor, target: int) -> Tensor:
    """What captum gives for one image on the model itself, by its own way of taking models and targets."""
    if name == "saliency":
        return captum.attr.Saliency(model).attribute(image, target=target)
    if name == "input_x_gradient":
        return captum.attr.InputXGradient(model).attribute(image, target=target)
    if name == "integrated_gradients":
        return captum.attr.IntegratedGradients(model).attribute(image, target=target, n_steps=7)
    if name == "occlusion":
        shape = {"sliding_window_shapes": (3, 24, 24), "strides": (3, 8, 8)}
        return captum.attr.Occlusion(model).attribute(image, target=target, baselines=0, **shape)
    mask = torch.arange(24).view(4, 6).repeat_interleave(8, 0).repeat_interleave(8, 1)[None, None]
    if name == "feature_ablation":
        return captum.attr.FeatureAblation(model).attribute(image, target=target, feature_mask=mask)
    generator = torch.Generator().manual_seed(5)
    shares = torch.rand(7, generator=generator).numpy() if name == "gradient_shap" else None

    def normal(mean: float, deviation: Tensor) -> Tensor:
        return mean + deviation * torch.stack([torch.randn(each.shape, generator=generator) for each in deviation])

    with pytest.MonkeyPatch.context() as patch:  # captum's computation, our draws
        patch.setattr(torch, "normal", normal)
        patch.setattr(np.random, "uniform", lambda low, high, count: shares)
        if name == "smoothgrad":
            tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(model))
            spread = 0.15 * float(image.detach().max() - image.detach().min())
            return tunnel.attribute(image, target=target, nt_samples=7, stdevs=spread, abs=False)
        if name == "gradient_shap":
            shap = captum.attr.GradientShap(model)
            return shap.attribute(image, torch.zeros_like(image), 7, 0.09, target=target)
    raise AssertionError(name)


def captums_scores(name: str, model: nn.Module, images: Tensor, targets: list[int]) -> Tensor:
    """Scores (B, h, w) of captum's attributions of the images one by one."""
    with torch.random.fork_rng(devices=[]):
        state = np.random.get_state()
        pixels = torch.cat(
            [
                plain(name, model, image[None].requires_grad_(), target)
                for image, target in zip(images, targets, strict=True)
            ]
        ).detach()
        np.random.set_state(state)
    if name in ABLATIONS:
        return cut(pixels, (4, 6)) / (3 * 8 * 8)
    unsigned = name in ("saliency", "smoothgrad")
    return cut(pixels.abs(), (4, 6)) / (3 * 8 * 8) if unsigned else cut(pixels, (4, 6))


def as_captum(name: str) -> dict[str, Any]:
    """Options with which a method draws what `plain` draws."""
    seeded = "seed" in {each.name for each in method_info(name).options}
    return {**FEW.get(name, {}), **({"seed": 5} if seeded else {})}


@pytest.mark.peers
@pytest.mark.parametrize("name", ["saliency", "input_x_gradient", *SAMPLED, "occlusion", "feature_ablation"])
def test_scores_are_captums(name: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    scores = get_explainer(name, model, **as_captum(name))(images, [3, 1]).scores
    expected = captums_scores(name, model, images, [3, 1])
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", SAMPLED)
def test_balanced_scores_are_captums_on_a_model_rewritten_with_constants(name: str) -> None:
    """At each changed copy denominators, gates and attention are that copy's own."""
    model, images = make_model("cls").double(), make_images("cls").double()
    disturb(model)
    before = state_of(model)
    options = as_captum(name)
    scores = get_explainer(name, model, gradient="balanced", **options)(images, [3, 1]).scores
    assert_same_state(before, state_of(model))
    expected = captums_scores(name, with_constants(model.eval()), images, [3, 1])
    scale = expected.abs().max().item()
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-8 * scale)
    assert (get_explainer(name, model, **options)(images, [3, 1]).scores - scores).abs().max() > 0.05 * scale


def test_integrated_balanced_gradients_are_not_complete() -> None:
    model, images = make_model("cls").double(), make_images("cls").double()
    scores = get_explainer("integrated_gradients", model, steps=200, gradient="balanced")(images, 3).scores
    difference = (model(images) - model(torch.zeros_like(images)))[:, 3].detach()
    assert ((scores.sum((1, 2)) - difference).abs() > 0.1 * difference.abs()).all()


def shapley(value: Callable[[frozenset[int]], float], count: int) -> list[float]:
    """Shapley values by their definition, over all orders' worth of sets."""
    scores = []
    for j in range(count):
        others = [each for each in range(count) if each != j]
        score = 0.0
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for subset in map(frozenset, itertools.combinations(others, size)):
                score += weight * (value(subset | {j}) - value(subset))
        scores.append(score)
    return scores


def test_kernel_shap_approaches_shapley_values() -> None:
    torch.manual_seed(2)
    model = VisionTransformer((16, 24), 8, embed_dim=24, depth=1, num_heads=3, num_classes=3).eval()
    nn.init.normal_(model.head.weight)
    image = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))

    def value(patches: frozenset[int]) -> float:
        shown = torch.zeros(2, 3)
        for each in patches:
            shown[divmod(each, 3)] = 1
        pixels = shown.repeat_interleave(8, 0).repeat_interleave(8, 1)
        with torch.no_grad():
            return float(model(image * pixels)[0, 1])

    expected = torch.tensor(shapley(value, 6)).view(1, 2, 3)
    scores = get_explainer("kernel_shap", model, samples=2000)(image, 1).scores
    torch.testing.assert_close(scores.sum(), expected.sum(), rtol=1e-3, atol=1e-4)
    assert (scores - expected).abs().max() < 0.05 * expected.abs().max()


def test_least_squares_solves_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, values = torch.randn(40, 5, generator=generator), torch.randn(40, generator=generator)
    weights = torch.rand(40, generator=generator) + 0.1
    surrogate = LeastSquares()
    surrogate.fit([(inputs[:25], values[:25], weights[:25]), (inputs[25:], values[25:], weights[25:])])
    design = torch.cat([inputs, torch.ones(40, 1)], 1).double()
    normal = design.T @ (weights.double()[:, None] * design)
    expected = torch.linalg.solve(normal, design.T @ (weights * values).double())[:5]
    torch.testing.assert_close(surrogate.representation(), expected)


@pytest.mark.parametrize("name", [*SAMPLED, *ABLATIONS])
def test_nothing_is_left_behind_when_captum_is_interrupted(name: str) -> None:
    model, images, calls = make_model("cls"), make_images("cls"), 0
    explainer = get_explainer(name, model, **FEW.get(name, {}))
    disturb(model)
    before, state = state_of(model), torch.get_rng_state()

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first is the capture's own
            raise KeyError("deep inside the model")

    handle = model.blocks[-1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="deep inside"):
        explainer(images, 1)
    handle.remove()
    assert calls == 2
    assert_same_state(before, state_of(model))
    first = explainer(images, 1).scores
    torch.manual_seed(99)
    np.random.seed(99)
    torch.testing.assert_close(explainer(images, 1).scores, first, rtol=0, atol=0)
    torch.set_rng_state(state)
    np.random.seed(1)
    changed = np.random.get_state()[1].tolist()
    explainer(images, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == changed
    assert not images.requires_grad
    assert images.grad is None


@pytest.mark.parametrize("name", [*SAMPLED, *ABLATIONS])
def test_batch_size_changes_nothing(name: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    scores = get_explainer(name, model, **FEW.get(name, {}))(images, 1).scores
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    apart = get_explainer(name, model, batch_size=3, **FEW.get(name, {}))(images, 1).scores
    handle.remove()
    assert max(seen) == 3
    torch.testing.assert_close(apart, scores, rtol=1e-3, atol=1e-5)
    alone = [get_explainer(name, model, **FEW.get(name, {}))(image[None], 1).scores for image in images]
    torch.testing.assert_close(torch.cat(alone), scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {"reduction": "sum"}) for name in SAMPLED),
        *((name, {"reduction": "sum", "gradient": "balanced"}) for name in SAMPLED),
        *((name, {}) for name in ABLATIONS),
    ],
)
def test_scores_of_a_contrast_are_the_difference_of_those_of_its_classes(name: str, more: dict[str, Any]) -> None:
    explainer, images = get_explainer(name, make_model("cls"), **FEW.get(name, {}), **more), make_images("cls")
    ours, theirs = (explainer(images, each).scores for each in ([3, 1], [2, 4]))
    found = explainer(images, ([3, 1], [2, 4])).scores
    torch.testing.assert_close(found, ours - theirs, rtol=1e-3, atol=1e-5)
    doubled = explainer(images, lambda logits: 2 * logits[:, 3]).scores
    torch.testing.assert_close(doubled[0], 2 * ours[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ABLATIONS)
def test_probabilities_of_a_contrast_are_subtracted(name: str) -> None:
    explainer = get_explainer(name, make_model("cls"), output="probability", **FEW.get(name, {}))
    images = make_images("cls")
    ours, theirs = (explainer(images, each).scores for each in (3, 1))
    torch.testing.assert_close(explainer(images, (3, 1)).scores, ours - theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLED)
def test_functions_without_a_gradient_are_refused(name: str) -> None:
    explainer = get_explainer(name, make_model("cls"), **FEW[name])
    with pytest.raises(TargetError, match=r"carries no gradient.*occlusion or rise"):
        explainer(make_images("cls"), lambda logits: logits.detach()[:, 0])
    found = get_explainer("feature_ablation", make_model("cls"))(make_images("cls"), lambda z: z.detach()[:, 0])
    assert found.scores.std() > 0


@pytest.mark.parametrize("name", [*SAMPLED, *ABLATIONS])
def test_any_model_of_images_is_explained(name: str) -> None:
    swin, images = randomised(BUILD["swin"]()), torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    assert get_explainer(name, swin, **FEW.get(name, {}))(images, 1).scores.shape == (2, 8, 12)
    model, images = randomised(pyramid()), torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    options = {"window": 1} if name == "occlusion" else FEW.get(name, {})
    explanation = get_explainer(name, model, **options)(images, 1)
    assert explanation.scores.shape == (1, 2, 3)
    assert explanation.scores.std() > 0
    assert explanation.approximate is None
    if name in SAMPLED:
        balanced = get_explainer(name, model, gradient="balanced", **options)(images, 1)
        assert balanced.scores.isfinite().all()
        assert (balanced.scores - explanation.scores).abs().max() > 1e-3 * explanation.scores.abs().max()


@pytest.mark.parametrize("name", [*SAMPLED, *ABLATIONS])
def test_passes_with_the_defaults(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make_model("dynamic"), make_images("dynamic")
    passes, gradient = {"F": 0, "B": 0}, torch.autograd.grad

    def counted(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        passes["B"] += len(outputs)
        return gradient(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    handle = model.register_forward_pre_hook(lambda _, arguments: passes.update(F=passes["F"] + len(arguments[0])))
    get_explainer(name, model)(images, 1)
    handle.remove()
    claimed = passes_claimed(name, model, images, lighter=False)
    assert passes == {"B": 0, **claimed}


@pytest.mark.parametrize(("size", "grid"), [((32, 48), (4, 6)), ((13, 7), (4, 3)), ((5, 5), (5, 1))])
def test_pixels_of_patches(size: tuple[int, int], grid: tuple[int, int]) -> None:
    patches = patch_of_pixel(size, grid)
    assert patches.unique().tolist() == list(range(math.prod(grid)))
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mean in (False, True):
        expected = torch.zeros(2, 3, math.prod(grid), dtype=torch.float64)
        for patch in range(math.prod(grid)):
            inside = pixels[:, :, patches == patch]
            expected[:, :, patch] = inside.mean(-1) if mean else inside.sum(-1)
        torch.testing.assert_close(gather_by_patch(pixels, grid, mean=mean), expected.view(2, 3, *grid))


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(OptionError, match="found stride=3 with window=2"):
        get_explainer("occlusion", make_model("cls"), window=2, stride=3)
    with pytest.raises(OptionError, match=r"found window=6 on a grid of 4×6 patches.*window=1"):
        get_explainer("occlusion", make_model("cls"), window=6)(make_images("cls"), 1)
    with pytest.raises(OptionError, match="baseline='black', expected 'zeros' or 'image_mean'"):
        get_explainer("occlusion", make_model("cls"), baseline="black")
    with pytest.raises(InputError, match="a grid of one patch"):
        get_explainer("kernel_shap", make_model("dynamic"))(torch.randn(1, 3, 8, 8), 1)


def test_probability_may_be_explained_instead_of_the_logit() -> None:
    model, images = make_model("cls"), make_images("cls")
    scores = get_explainer("feature_ablation", model, output="probability", baseline="image_mean")(images, 1).scores
    hidden = images.clone()
    hidden[:, :, 8:16, 16:24] = images.mean((2, 3), keepdim=True)
    expected = (model(images).softmax(1) - model(hidden).softmax(1))[:, 1].detach()
    torch.testing.assert_close(scores[:, 1, 2], expected, rtol=1e-4, atol=1e-6)
