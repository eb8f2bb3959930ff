"""Products of linear maps that a second forward takes from the first: the same values, and the same derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FEW_FAMILIES, make_images, make_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitexplain import create_method, explain_with
from vitexplain.capture import Capture
from vitexplain.linear_products import KnownProducts, LinearProducts
from vitexplain.needs import Needs
from vitexplain.relevance import RelevanceRules
from vitexplain.subject import Subject

PLAIN = Needs(attention_gradient=True, states=frozenset({"out"}))
RELEVANT = Needs(attention_gradient=True, backward=RelevanceRules())


class Count(TorchFunctionMode):
    """Counts the linear maps that are computed; the innermost mode hides those that it answers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.linear += func is F.linear
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [*FEW_FAMILIES, "relative_positions", "several_attentions"])
def test_the_second_forward_is_that_of_the_model(kind: str) -> None:
    model, images = make_model(kind), make_images(kind)
    with Capture(model, PLAIN) as alone:
        alone.backward(alone.forward(images)[:, 1].sum())
    with Capture(model, RELEVANT) as capture:
        capture.backward(capture.forward(images)[:, 1].sum())
        met = capture.meeting(PLAIN)
    torch.testing.assert_close(met.logits, alone.logits, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(met.blocks, alone.blocks, strict=True):
        assert (ours.state("out") - theirs.state("out")).norm() < 1e-5 * theirs.state("out").norm()
        expected = theirs.attention_gradient()
        assert (ours.attention_gradient() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("targets", [1, 2])
def test_no_linear_map_of_the_model_is_computed_twice(targets: int) -> None:
    """But for the one below the graph, which holds nothing of it."""
    model, images = make_model("cls"), make_images("cls")
    with Capture(model, RELEVANT) as capture:
        logits = capture.forward(images)
        with Count() as count:
            for target in range(targets):
                capture.backward(logits[:, target].sum(), retain_graph=True)
                met = capture.meeting(PLAIN)
        assert count.linear == 1
        with Capture(model, PLAIN) as alone, Count() as count:
            alone.backward(alone.forward(images)[:, targets - 1].sum())
        assert count.linear == 4 * len(capture.blocks) + 1
    for ours, theirs in zip(met.blocks, alone.blocks, strict=True):
        torch.testing.assert_close(ours.attention_gradient(), theirs.attention_gradient(), rtol=1e-3, atol=1e-6)


def test_half_precision_computes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make_model("cls").bfloat16(), make_images("cls")
    with Capture(model, PLAIN) as alone:
        alone.backward(alone.forward(images)[:, 1].sum())
    with Capture(model, RELEVANT) as capture:
        capture.backward(capture.forward(images)[:, 1].sum())
        met = capture.meeting(PLAIN)
    assert torch.equal(met.logits, alone.logits)


def test_nothing_is_held_after_the_capture() -> None:
    model, images = make_model("cls"), make_images("cls")
    with Capture(model, RELEVANT) as capture:
        capture.backward(capture.forward(images)[:, 1].sum())
        products = capture._products
        assert products is not None
        assert products._held
    assert not products._held


class Twice(nn.Module):
    """One weight in two calls, with a bias in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.requires_grad_(False)

    def forward(self, state: Tensor) -> Tensor:
        return F.linear(F.linear(state, self.weight, self.bias).tanh(), weight=self.weight)


def test_a_product_is_taken_once() -> None:
    weight, state, products = nn.Parameter(torch.randn(2, 4), requires_grad=False), torch.randn(3, 4), LinearProducts()
    products.keep(state, weight, torch.full((3, 2), 7.0))
    with KnownProducts(products):
        first, second = F.linear(state, weight), F.linear(state, weight)
    assert (first == 7).all()
    torch.testing.assert_close(second, state @ weight.T)


def test_a_weight_of_several_calls_is_not_known() -> None:
    model, state, products = Twice(), torch.randn(3, 4, requires_grad=True), LinearProducts()
    (expected,) = torch.autograd.grad(model(state).square().sum(), state)
    for _ in range(3):
        products.keep(state, model.weight, torch.full((3, 4), 7.0))
    with KnownProducts(products):
        (gradient,) = torch.autograd.grad(model(state).square().sum(), state)
    torch.testing.assert_close(gradient, expected)


def test_weights_that_blocks_share_give_the_maps_of_each_method_alone() -> None:
    model, images = make_model("torchvision").double(), make_images("torchvision").double()
    first, *rest = model.encoder.layers
    for block in rest:
        block.self_attention.out_proj.weight = first.self_attention.out_proj.weight
    methods = [create_method("transformer_attribution", start_layer=start) for start in (1, 0)]
    together = explain_with(methods, Subject.of(model), images, 1)
    for method, found in zip(methods, together, strict=True):
        (alone,) = explain_with([method], Subject.of(model), images, 1)
        torch.testing.assert_close(found.scores, alone.scores)
        relevant = create_method("generic_attention", start_layer=method.start_layer)
        (mixed, _) = explain_with([method, relevant], Subject.of(model), images, 1)
        torch.testing.assert_close(mixed.scores, alone.scores)


@pytest.mark.parametrize("other", ["shape", "precision", "weight", "graph", "autocast"])
def test_what_is_not_the_same_call_is_computed(other: str) -> None:
    weight, state, products = nn.Parameter(torch.randn(2, 4), requires_grad=False), torch.randn(3, 4), LinearProducts()
    products.keep(state, weight, torch.full((3, 2), 7.0))
    if other == "shape":
        state = torch.randn(5, 4)
    elif other == "precision":
        products.clear()
        products.keep(state, weight, torch.full((3, 2), 7.0, dtype=torch.float64))
    elif other == "weight":
        weight = nn.Parameter(weight.clone())
    elif other == "graph":
        weight.requires_grad_()
    with KnownProducts(products), torch.autocast("cpu", torch.bfloat16, enabled=other == "autocast"):
        found = F.linear(state, weight)
    torch.testing.assert_close(found.float(), state @ weight.T, rtol=0.02, atol=0.05)
