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

from vitexplain.capture import Capture
from vitexplain.linear_products import KnownProducts, LinearProducts
from vitexplain.record import Needs
from vitexplain.relevance import RelevanceRules

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
        torch.testing.assert_close(ours.state("out"), theirs.state("out"), rtol=1e-4, atol=1e-5)
        expected = theirs.attention_gradient()
        assert (ours.attention_gradient() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("targets", [1, 2])
def test_no_linear_map_of_the_model_is_computed_twice(targets: int) -> None:
    model, images = make_model("cls"), make_images("cls")
    with Capture(model, RELEVANT) as capture:
        logits = capture.forward(images)
        with Count() as count:
            for target in range(targets):
                capture.backward(logits[:, target].sum(), retain_graph=True)
                met = capture.meeting(PLAIN)
        assert count.linear == 0
        with Capture(model, PLAIN) as alone, Count() as count:
            alone.backward(alone.forward(images)[:, targets - 1].sum())
        assert count.linear > 0
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


def test_calls_of_one_weight_are_taken_in_order_and_once() -> None:
    model, state, products = Twice(), torch.randn(3, 4, requires_grad=True), LinearProducts()
    first = state @ model.weight.T
    second = (first + model.bias).tanh() @ model.weight.T
    (expected,) = torch.autograd.grad(second.square().sum(), state)
    for product in (first, second):
        products.keep(state, model.weight, product.detach())
    for _ in range(2):  # the second time nothing is known, and all is computed
        with KnownProducts(products):
            found = model(state)
        torch.testing.assert_close(found, second)
        (gradient,) = torch.autograd.grad(found.square().sum(), state)
        torch.testing.assert_close(gradient, expected)


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
