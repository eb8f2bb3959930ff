"""Balanced gradients: the same forward, another backward, and what the theory says of it."""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import NOT_DEFINED, make_images, make_model
from lighter import get_explainer, method_options
from test_contract import assert_same_state, disturb, state_of
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import (
    Capture,
    CaptureError,
    Needs,
    UnsupportedModelError,
    adapt,
    create_method,
    explain_with,
    list_methods,
    method_info,
)
from vitexplain.balanced import BALANCED
from vitexplain.short_last_block import ShortLastBlock
from vitexplain.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")

ENTERING = Needs(state_gradients=frozenset({"in"}))

CHOOSING = [name for name in list_methods() if "gradient" in {each.name for each in method_info(name).options}]
"""Methods that can follow a balanced gradient."""

OTHER_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "attention_gradcam": [{"layer": 0, "relu": True}],
    "beyond_intuition": [{"variant": "head", "points": 3, "start_layer": 1}],
    "gmar": [{"norm": "l2", "start_layer": 1}],
    "gradcam": [{"layer": 0, "relu": False}],
    "gradient_rollout": [{"discard_ratio": 0.5, "normalisation": "column"}],
    "gradient_shap": [{"baseline": "image_mean", "reduction": "mean_abs", "samples": 3}],
    "input_x_gradient": [{"reduction": "mean_abs"}],
    "integrated_gradients": [{"baseline": "blur", "batch_size": 2, "steps": 3}],
    "smoothgrad": [{"reduction": "sum", "samples": 3, "seed": 1}],
    "tokentm": [{"transformation": "residual", "start_layer": 1}],
}
"""Options with which a method reads something else of the capture."""

CANCELLING = (
    ("attcat", "relative_positions"),
    ("fullgrad_plus", "relative_positions"),
    ("hirescam", "several_attentions"),
)
"""Undefined by the plain gradient alone, which a norm turns at right angles to its tokens."""


def balanced(needs: Needs) -> Needs:
    return replace(needs, backward=BALANCED)


def explain(model: nn.Module, images: Tensor, method: str, target: Any = 4, **options: Any) -> Tensor:
    return get_explainer(method, model, **{"gradient": "plain", **options})(images, target).scores


def test_the_shelf_can_follow_balanced_gradients() -> None:
    assert {
        *("agcam", "attcat", "attention_gradcam", "beyond_intuition", "fullgrad_plus", "generic_attention", "gmar"),
        *("gradcam", "gradcam_plus_plus", "gradient_rollout", "gradient_shap", "hirescam", "input_x_gradient"),
        *("integrated_gradients", "layercam", "saliency", "smoothgrad", "tokentm", "transition_attention"),
    } <= set(CHOOSING)


@pytest.mark.parametrize("name", CHOOSING)
def test_the_option_has_no_place_among_the_positional_ones(name: str) -> None:
    kind = method_info(name).method
    places = [each.name for each in method_info(name).options if each.name != "gradient"]
    values = [getattr(create_method(name), each) for each in places]
    assert kind(*values) == create_method(name)
    with pytest.raises(TypeError, match="positional"):
        kind(*values, "balanced")


def test_the_forward_is_the_same_bit_for_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # fewer rows of a product are another routine's
    monkeypatch.setattr(ShortLastBlock, "of", classmethod(lambda *_: None))
    model, images = make_model(family), make_images(family)
    for needs in (ENTERING, Needs(attention_gradient=True)):
        logits = []
        for each in (needs, balanced(needs)):
            with Capture(model, each) as capture:
                logits.append(capture.forward(images).detach())
        if family == "siglip_pool":  # its pool is nn.MultiheadAttention, which then is computed from its parts
            torch.testing.assert_close(*logits)
        else:
            assert torch.equal(*logits)


def test_without_biases_input_times_gradient_is_the_logit(family: str) -> None:
    """At the tokens that enter the first block: every layer above is linear in its state."""
    model, images = make_model(family).double(), make_images(family).double()
    adapter = adapt(model)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name in ("bias", "q_bias", "k_bias", "v_bias", "in_proj_bias"):
                    parameter.zero_()
    with Capture(adapter, balanced(ENTERING)) as capture:
        logits = capture.forward(images)
        capture.backward(logits[:, 4].sum())
    block = capture.blocks[0]
    product = (block.state("in") * block.state_gradient("in")).sum((1, 2))
    torch.testing.assert_close(product, logits[:, 4].detach(), rtol=1e-6, atol=1e-9)


def linear_model() -> nn.Module:
    """No norms, no activations, and uniform attention that no gradient moves."""
    torch.manual_seed(5)
    model = VisionTransformer(
        img_size=(16, 24), patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7,
        norm_layer=nn.Identity, act_layer=nn.Identity,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        for block in model.blocks:
            block.attn.qkv.weight[:48], block.attn.qkv.bias[:48] = 0.0, 0.0
    return model.eval().double()


@pytest.mark.parametrize("name", CHOOSING)
def test_in_a_linear_model_it_is_the_plain_gradient(name: str) -> None:
    model = linear_model()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # uniform attention makes the smallest weights equal: which of them are left out is up to rounding
    options: dict[str, Any] = {"discard_ratio": 0.0} if name == "gradient_rollout" else {}
    plain = explain(model, images, name, **options)
    assert plain.any()
    found = explain(model, images, name, **options, gradient="balanced")
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)


class ConstantScale(nn.Module):
    """LayerNorm by hand, its denominator detached; what looks for a model's norms finds this one and no other."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        deviation = (x.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / deviation * self.weight + self.bias


class ConstantGate(nn.Module):
    """GELU by hand, its gate detached."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.5 * (1 + torch.erf(x / math.sqrt(2)))).detach()


class Constant(nn.Module):
    """What a module puts out, detached."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).detach()


def with_constants(model: nn.Module) -> Any:
    """A copy whose derivative is the balanced gradient: denominators, gates, queries and keys are detached."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in ("q_norm", "k_norm"):
                setattr(parent, name, Constant(child))
            elif isinstance(child, nn.LayerNorm):
                setattr(parent, name, ConstantScale(child))
            elif isinstance(child, nn.GELU):
                setattr(parent, name, ConstantGate())
    return model


class ConstantAttention(nn.Module):
    """Takes the place of attention dropout: hands on a leaf."""

    def forward(self, weights: Tensor) -> Tensor:
        self.leaf = weights.detach().requires_grad_()
        return self.leaf


def by_hand(model: nn.Module, images: Tensor, target: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Attention, its gradient, and the gradient at the blocks' inputs, of a model that is rewritten with constants."""
    model = with_constants(model)
    inputs: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn, block.attn.attn_drop = False, ConstantAttention()
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    score = model(images)[:, target].sum()
    leaves = [block.attn.attn_drop.leaf for block in model.blocks]
    gradients = torch.autograd.grad(score, [*leaves, *inputs])
    return [leaf.detach() for leaf in leaves], list(gradients[: len(leaves)]), list(gradients[len(leaves) :])


@pytest.mark.exact_states
def test_gradients_are_those_of_a_model_rewritten_with_constants(family: str) -> None:
    model, images = make_model(family).double(), make_images(family).double()
    needs = Needs(attention_gradient=True, state_gradients=frozenset({"in"}), backward=BALANCED)
    with Capture(model, needs) as capture:
        capture.backward(capture.forward(images)[:, 4].sum())
    attention, of_attention, of_inputs = by_hand(model, images, 4)
    with Capture(model, Needs(attention_gradient=True)) as capture_plain:
        capture_plain.backward(capture_plain.forward(images)[:, 4].sum())
    for block, plain, weights, gradient, entering in zip(
        capture.blocks, capture_plain.blocks, attention, of_attention, of_inputs, strict=True
    ):
        torch.testing.assert_close(block.attention(), weights)
        torch.testing.assert_close(block.attention_gradient(), gradient)
        torch.testing.assert_close(block.state_gradient("in"), entering)
        assert (plain.attention_gradient() - gradient).abs().max() > 1e-3 * gradient.abs().max()


@pytest.mark.exact_states
@pytest.mark.parametrize("name", CHOOSING)
def test_maps_are_the_plain_ones_of_a_model_rewritten_with_constants(name: str, family: str) -> None:
    model, images = make_model(family).double(), make_images(family).double()
    rewritten = with_constants(model)
    for options in ({}, *OTHER_VARIANTS.get(name, [])):
        expected = explain(rewritten, images, name, **options)
        scale = expected.abs().max().item()
        found = explain(model, images, name, gradient="balanced", **options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * scale)
        try:
            plain = explain(model, images, name, **options)
        except UnsupportedModelError:
            continue
        assert (plain - found).abs().max() > 1e-3 * scale


def test_attention_written_by_hand_is_held_constant_too() -> None:
    model, images = make_model("hf_vit"), make_images("hf_vit")
    fused = {name: explain(model, images, name, gradient="balanced") for name in CHOOSING if name != "agcam"}
    model.set_attn_implementation("eager")
    for name, expected in fused.items():
        torch.testing.assert_close(explain(model, images, name, gradient="balanced"), expected, rtol=1e-4, atol=1e-6)


Apply = Callable[[Tensor], Tensor]


def hand_written_rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    "apply",
    [
        F.gelu,
        lambda x: F.gelu(x, approximate="tanh"),
        F.silu,
        lambda x: F.silu(x.clone(), inplace=True),
        F.mish,
        F.hardswish,
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: F.silu(x[..., :4]) * x[..., 4:],
        lambda x: F.layer_norm(x, (8,)),
        lambda x: F.layer_norm(x, (8,), torch.arange(8.0).double()),
        lambda x: F.rms_norm(x, (8,)),
        lambda x: F.rms_norm(x, (8,), torch.arange(8.0).double(), 1e-3),
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: F.relu(x).square(),
        lambda x: torch.softmax(x @ x.mT, -1) @ x,
        lambda x: F.scaled_dot_product_attention(x, 2 * x, 3 * x),
        hand_written_rms_norm,
    ],
)
def test_every_rule_gives_input_times_gradient_the_value(apply: Apply) -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 0.0
    weights = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = x.clone().requires_grad_()
    with BALANCED.watching(2, "BND"):
        result = apply(state)
    assert torch.equal(result, apply(x))
    score = (result * weights[: result.shape[-1]]).sum()
    (gradient,) = torch.autograd.grad(score, state)
    assert (x * gradient).sum().item() == pytest.approx(score.item(), rel=1e-6)


def test_means_of_layer_norm_are_not_constant() -> None:
    """A shift of all channels changes nothing, so it has no gradient."""
    x = torch.randn(3, 8, dtype=torch.float64).requires_grad_()
    with BALANCED.watching(3, "BND"):
        result = F.layer_norm(x, (8,))
    (gradient,) = torch.autograd.grad((result * torch.randn(8, dtype=torch.float64)).sum(), x)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CHOOSING)
def test_what_has_no_rule_is_refused(name: str) -> None:
    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    model = make_model("cls")
    model.blocks[2].mlp.act = Bent()
    disturb(model)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"'tanh'.*gradient='plain'"):
        explain(model, make_images("cls"), name, gradient="balanced")
    assert_same_state(before, state_of(model))
    assert explain(model, make_images("cls"), name).isfinite().all()


@pytest.mark.parametrize("name", CHOOSING)
def test_the_model_is_given_back_as_it_was(name: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = explain(model, images, name, gradient="balanced")
    disturb(model)
    before = state_of(model)
    torch.testing.assert_close(explain(model, images, name, gradient="balanced"), expected, rtol=1e-4, atol=1e-6)
    assert_same_state(before, state_of(model))


def scores_together(model: nn.Module, images: Tensor, target: Any, asked: list[tuple[str, str]]) -> list[Tensor]:
    """Scores by methods and gradients that share a capture."""
    methods = [create_method(name, **{**method_options(name, model), "gradient": gradient}) for name, gradient in asked]
    return [each.scores for each in explain_with(methods, Subject.of(model), images, target)]


TARGETS: dict[str, Any] = {"classes": [[1, 4], [0, 2]], "contrast": (1, 4), "function": lambda y: y[:, 1] * y[:, 2]}


@functools.cache
def _beside_plain_ones(kind: str) -> dict[tuple[str, str], Tensor]:
    asked = [(name, gradient) for name in CHOOSING for gradient in ("plain", "balanced")]
    scores = scores_together(make_model("registers").double(), make_images("registers").double(), TARGETS[kind], asked)
    return dict(zip(asked, scores, strict=True))


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("kind", TARGETS)
def test_beside_plain_gradients_maps_are_the_same(name: str, kind: str) -> None:
    # in double precision: what cancels in a sum over channels is mostly rounding in single
    model, images = make_model("registers").double(), make_images("registers").double()
    for gradient in ("plain", "balanced"):
        alone = explain(model, images, name, TARGETS[kind], gradient=gradient)
        torch.testing.assert_close(_beside_plain_ones(kind)[name, gradient], alone, rtol=1e-4, atol=1e-9)


READING = [name for name in CHOOSING if method_info(name).passes == "1F + 1B" and create_method(name).needs.gradient]
"""Methods that read the capture's own gradient, and no other."""


@pytest.mark.parametrize("target", [4, TARGETS["classes"]], ids=["one", "two"])
@pytest.mark.parametrize(("gradients", "captures"), [(["plain"], 1), (["balanced"], 1), (["plain", "balanced"], 2)])
def test_methods_with_the_same_rules_share_passes(
    gradients: list[str], captures: int, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, ran = make_model("cls"), make_images("cls"), []
    gradient = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **named: ran.append("B") or gradient(*args, **named))
    scores_together(model, images, target, [("saliency", "plain")])  # finding out how a model works takes passes too
    model.register_forward_pre_hook(lambda *_: ran.append("F"))
    ran.clear()
    scores_together(model, images, target, [(name, each) for name in READING for each in gradients])
    assert len(READING) > 10
    assert (ran.count("F"), ran.count("B")) == (captures, captures * (1 if target == 4 else 2))


def test_rules_of_all_kinds_go_together_in_any_order() -> None:
    model, images, forwards = make_model("registers"), make_images("registers"), 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    methods = [
        create_method("fullgrad_plus", gradient="balanced", start_layer=2),
        create_method("full_lrp"),
        create_method("rollout"),
        create_method("tokentm", gradient="balanced"),
        create_method("gradcam", layer=1),
        create_method("partial_lrp", rules="normalised"),
        create_method("saliency", gradient="balanced"),
        create_method("attnlrp"),
    ]
    alone = [explain_with([each], Subject.of(model), images, TARGETS["classes"])[0] for each in methods]
    handle = model.register_forward_pre_hook(count)
    together = explain_with(methods, Subject.of(model), images, TARGETS["classes"])
    handle.remove()
    kinds = {each.needs.backward for each in methods}
    assert forwards == len(kinds) < len(methods)
    for method, ours, theirs in zip(methods, together, alone, strict=True):
        assert ours.method == method.info.name
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6)
        assert torch.equal(ours.logits, together[0].logits)


def test_the_capture_of_one_kind_is_gone_before_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[weakref.ref[Capture]] = []
    forward = Capture.forward

    def watched(capture: Capture, images: Tensor) -> Tensor:
        assert all(each() is None for each in captures)
        captures.append(weakref.ref(capture))
        return forward(capture, images)

    monkeypatch.setattr(Capture, "forward", watched)
    asked = [(name, gradient) for gradient in ("plain", "balanced") for name in ("tokentm", "gradcam", "saliency")]
    scores_together(make_model("cls"), make_images("cls"), TARGETS["classes"], asked)
    assert len(captures) == 2


@pytest.mark.parametrize("name", CHOOSING)
def test_balanced_gradients_cost_the_same_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, ran = make_model("cls"), make_images("cls"), []
    gradient = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **named: ran.append("B") or gradient(*args, **named))
    explain(model, images, name)  # finding out how a model works takes passes of its own
    model.register_forward_pre_hook(lambda *_: ran.append("F"))
    costs = []
    for each in ("plain", "balanced"):
        ran.clear()
        explain(model, images, name, gradient=each)
        costs.append(sorted(ran))
    assert costs[0] == costs[1]
    assert set(costs[0]) == {"B", "F"}


def test_every_family_has_balanced_maps(family: str) -> None:
    """Also where the plain gradient is at right angles to what it would be multiplied with."""
    asked = [name for name in CHOOSING if (name, family) not in NOT_DEFINED or (name, family) in CANCELLING]
    maps = scores_together(make_model(family), make_images(family), 4, [(name, "balanced") for name in asked])
    for name, scores in zip(asked, maps, strict=True):
        assert scores.isfinite().all(), name
        assert scores.flatten(1).std(1).min() > 0, name


@pytest.mark.parametrize("name", CHOOSING)
def test_batches_targets_and_precision(name: str) -> None:
    model, images = make_model("registers"), make_images("registers", batch=3)
    explainer = get_explainer(name, model, gradient="balanced")
    targets = torch.tensor([[1, 4], [0, 2], [5, 5]])
    together = explainer(images, targets).scores
    for index in range(3):
        alone = explainer(images[index : index + 1], targets[index : index + 1]).scores
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-6)
    rough = get_explainer(name, copy.deepcopy(model).bfloat16(), gradient="balanced")(images, targets).scores
    assert (rough - together).norm() < 0.3 * together.norm()


def test_the_gradient_at_the_images_is_that_of_autograd() -> None:
    model, images = make_model("registers"), make_images("registers")
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)
    with Capture(model, Needs(image_gradient=True)) as capture:
        logits = capture.forward(images)
        with pytest.raises(CaptureError, match="image_gradient=True"):
            _ = capture.image_gradient
        capture.backward(logits[:, 2].sum())
    torch.testing.assert_close(capture.image_gradient, expected, rtol=1e-4, atol=1e-6)
    assert not capture.images.requires_grad


def test_a_capture_meets_other_rules_by_a_second_forward_of_the_same_score() -> None:
    model, images = make_model("cls"), make_images("cls")
    plain, other = Needs(attention_gradient=True), Needs(attention_gradient=True, backward=BALANCED)
    with Capture(model, plain) as capture:
        logits = capture.forward(images)
        assert capture.meeting(plain) is capture
        with pytest.raises(CaptureError, match=r"Capture\.backward first"):
            capture.meeting(other)
        for target in (1, 5):
            capture.backward(logits[:, target].sum(), retain_graph=True)
            met = capture.meeting(other)
            assert met is capture.meeting(other)
            with Capture(model, other) as alone:
                alone.backward(alone.forward(images)[:, target].sum())
            for ours, theirs in zip(met.blocks, alone.blocks, strict=True):
                torch.testing.assert_close(ours.attention_gradient(), theirs.attention_gradient())
    assert met._recording is None
    assert not capture._others
    assert met.blocks[0].attention_gradient().isfinite().all()
