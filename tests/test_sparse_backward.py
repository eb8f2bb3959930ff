"""The backward that leaves out tokens without a gradient: the same derivative, through fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import make_images, make_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitexplain import sparse_backward
from vitexplain.capture import Capture
from vitexplain.needs import Needs
from vitexplain.recording import Recording
from vitexplain.sparse_backward import SparseBackward

NEEDS = Needs(attention_gradient=True, state_gradients=frozenset({"in", "mid"}))


class Block(nn.Module):
    """Attention is a linear map; what lies behind it is given."""

    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = nn.Linear(6, 6)
        self.behind = behind

    def forward(self, tokens: Tensor) -> Tensor:
        return self.behind(self.attention(tokens))


def watched(block: Block, tokens: Tensor) -> Tensor:
    mode = SparseBackward()
    handles = mode.watch(block.attention, block)
    with mode:
        found: Tensor = block(tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of a gradient were not zero, call by call, of gradients that came by."""
    seen: list[int] = []
    transposed = sparse_backward._transposed

    def count(gradient: Tensor, weight: Tensor) -> Tensor:
        seen.append(int(gradient.abs().amax(-1).count_nonzero()))
        return transposed(gradient, weight)

    monkeypatch.setattr(sparse_backward, "_transposed", count)
    return seen


@pytest.mark.parametrize("kind", ["cls", "distilled"])
def test_gradients_are_those_of_autograd(kind: str, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make_model(kind).double(), make_images(kind, batch=3).double()

    def gradients() -> list[Tensor]:
        with Capture(model, NEEDS) as capture:
            capture.backward(capture.forward(images)[:, 1].sum())
            return [
                each
                for block in capture.blocks
                for each in (block.attention_gradient(), block.state_gradient("in"), block.state_gradient("mid"))
            ]

    found = gradients()
    prefix = 1 if kind == "cls" else 2
    assert rows[:2] == [3 * prefix, 3 * prefix]  # both maps of the last feed-forward branch
    monkeypatch.setattr(Recording, "_shorten_backward", lambda *_: [])
    rows.clear()
    torch.testing.assert_close(found, gradients(), rtol=1e-12, atol=1e-15)
    assert not rows


def test_a_head_that_reads_all_tokens_goes_back_through_all(rows: list[int]) -> None:
    with Capture(make_model("mean_pooled"), NEEDS) as capture:
        capture.backward(capture.forward(make_images("mean_pooled"))[:, 1].sum())
    assert not rows


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_small_gradients_are_not_lost(rows: list[int], named: bool, scale: float) -> None:
    weight, bias = torch.randn(4, 6), torch.randn(4)
    call = (lambda x: F.linear(input=x, weight=weight, bias=bias)) if named else (lambda x: F.linear(x, weight))
    block, tokens = Block(call).requires_grad_(False), torch.randn(2, 5, 6, requires_grad=True)
    arriving = torch.zeros(2, 5, 4)
    arriving[0, 1], arriving[1, 3, 2] = scale, -scale
    (found,) = torch.autograd.grad(watched(block, tokens), tokens, arriving)
    (expected,) = torch.autograd.grad(block(tokens), tokens, arriving)
    assert rows == [2]
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_dense_gradients_take_the_usual_way() -> None:
    weight = torch.randn(4, 6)
    block, tokens = Block(lambda x: F.linear(x, weight)).requires_grad_(False), torch.randn(2, 5, 6, requires_grad=True)
    arriving = torch.randn(2, 5, 4)
    (found,) = torch.autograd.grad(watched(block, tokens), tokens, arriving)
    torch.testing.assert_close(found, torch.autograd.grad(block(tokens), tokens, arriving)[0])


@pytest.mark.parametrize("images", [1, 3])
def test_what_all_tokens_share_goes_back_once(images: int) -> None:
    weight = torch.randn(288, 96, dtype=torch.float64)
    gradient = torch.randn(images, 1, 288, dtype=torch.float64).expand(images, 50, 288)
    with FlopCounterMode(display=False) as count:
        found = sparse_backward._transposed(gradient, weight)
    assert count.get_total_flops() == 2 * images * 2 * weight.numel()
    torch.testing.assert_close(found, gradient @ weight)
    unlike = gradient.clone()
    unlike[-1, 20, 7] += 1
    torch.testing.assert_close(sparse_backward._transposed(unlike, weight), unlike @ weight)


@pytest.mark.parametrize("row", [0, 9])
def test_one_row_goes_back_with_another(row: int) -> None:
    """Alone it would be another routine's, which rounds by the number of threads."""
    gradient, weight = torch.zeros(2, 5, 288, dtype=torch.float64), torch.randn(288, 96, dtype=torch.float64)
    gradient.view(10, 288)[row] = torch.randn(288)
    with FlopCounterMode(display=False) as count:
        found = sparse_backward._transposed(gradient, weight)
    assert count.get_total_flops() >= 2 * 2 * weight.numel()
    torch.testing.assert_close(found, gradient @ weight)


def of_tokens(tokens: Tensor) -> Tensor:
    return F.linear(tokens, tokens[0, :4].tanh())


def test_weights_on_the_graph_keep_their_gradient(rows: list[int]) -> None:
    block, tokens = Block(of_tokens).requires_grad_(False), torch.randn(2, 5, 6, requires_grad=True)
    found: tuple[Any, ...] = torch.autograd.grad(watched(block, tokens).square().sum(), tokens)
    torch.testing.assert_close(found, torch.autograd.grad(block(tokens).square().sum(), tokens))
    assert not rows


def test_autocast_gives_gradients_in_the_precision_of_the_state(rows: list[int]) -> None:
    weight = torch.randn(4, 6)
    block, tokens = Block(lambda x: F.linear(x, weight)).requires_grad_(False), torch.randn(2, 5, 6, requires_grad=True)
    arriving = torch.zeros(2, 5, 4, dtype=torch.bfloat16)
    arriving[0, 1] = torch.randn(4)

    def behind(x: Tensor) -> Tensor:
        return F.linear(x.float(), weight)

    block.behind = behind
    gradients = []
    for call in (watched, lambda block, tokens: block(tokens)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call(block, tokens)
        assert found.dtype == torch.bfloat16
        gradients += torch.autograd.grad(found, tokens, arriving)
    assert rows == [1]
    assert gradients[0].dtype == torch.float32
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=0.02)
