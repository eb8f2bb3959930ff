"""Balanced gradients: the same forward, another backward, and what the theory says of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import make_images, make_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import Capture, CaptureError, Needs, UnsupportedModelError, adapt, get_explainer
from vitexplain.balanced import BALANCED

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")

ENTERING = Needs(state_gradients=frozenset({"in"}))


def balanced(needs: Needs) -> Needs:
    return replace(needs, backward=BALANCED)


def explain(model: nn.Module, images: Tensor, method: str, **options: Any) -> Tensor:
    return get_explainer(method, model, **options)(images, 4).scores


def test_the_forward_is_the_same_bit_for_bit(family: str) -> None:
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


@pytest.mark.parametrize("name", ["generic_attention", "tokentm", "gradcam"])
def test_in_a_linear_model_it_is_the_plain_gradient(name: str) -> None:
    model, images = linear_model(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(
        explain(model, images, name, gradient="balanced"), explain(model, images, name), rtol=1e-9, atol=1e-12
    )


class ConstantScale(nn.Module):
    """LayerNorm by hand, its denominator detached."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        deviation = (x.var(-1, unbiased=False, keepdim=True) + self.norm.eps).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / deviation * self.norm.weight + self.norm.bias


class ConstantGate(nn.Module):
    """GELU by hand, its gate detached."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.5 * (1 + torch.erf(x / math.sqrt(2)))).detach()


class ConstantAttention(nn.Module):
    """Takes the place of attention dropout: hands on a leaf."""

    def forward(self, weights: Tensor) -> Tensor:
        self.leaf = weights.detach().requires_grad_()
        return self.leaf


def by_hand(model: Any, images: Tensor, target: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Attention, its gradient, and the gradient at the blocks' inputs, of a model that is rewritten with constants."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm) and not isinstance(parent, ConstantScale):
                setattr(parent, name, ConstantScale(child))
            elif isinstance(child, nn.GELU):
                setattr(parent, name, ConstantGate())
            elif name == "attn_drop":
                setattr(parent, name, ConstantAttention())
    inputs: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
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


def test_attention_written_by_hand_is_held_constant_too() -> None:
    model, images = make_model("hf_vit"), make_images("hf_vit")
    fused = {name: explain(model, images, name, gradient="balanced") for name in ("generic_attention", "gradcam")}
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


def test_what_has_no_rule_is_refused() -> None:
    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    model = make_model("cls")
    model.blocks[2].mlp.act = Bent()
    with pytest.raises(UnsupportedModelError, match=r"'tanh'.*gradient='plain'"):
        explain(model, make_images("cls"), "generic_attention", gradient="balanced")
    assert explain(model, make_images("cls"), "generic_attention").isfinite().all()


@pytest.mark.parametrize("name", ["generic_attention", "tokentm", "gradcam"])
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
    assert not met._tracked
    assert not capture._others
    assert met.blocks[0].attention_gradient().isfinite().all()
