"""The attention tap on every form in which attention can be called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import make_images, make_model
from torch import Tensor, nn

from vitexplain import Capture, CaptureError, Needs, get_explainer
from vitexplain.attention import AttentionOperands
from vitexplain.tap import AttentionTap


class Calls(nn.Module):
    """Calls one function of q, k, v."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


def seen_by_tap(module: nn.Module, *inputs: Tensor) -> tuple[list[AttentionOperands], Any]:
    seen: list[AttentionOperands] = []

    def keep(operands: AttentionOperands, output: Tensor) -> Tensor:
        seen.append(operands)
        return output

    tap = AttentionTap()
    handles = tap.watch(module, keep)
    with tap:
        result = module(*inputs)
    for handle in handles:
        handle.remove()
    return seen, result


@pytest.mark.parametrize(
    ("function", "key_heads"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 4),
        (lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.3), 4),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True), 4),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(6, 6, dtype=torch.bool).triu().T), 4),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.randn(1, 4, 6, 6)), 4),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 2),
    ],
)
def test_probabilities_times_values_are_the_output(function: Any, key_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 5), torch.randn(2, key_heads, 6, 5), torch.randn(2, key_heads, 6, 5)
    seen, output = seen_by_tap(Calls(function), q, k, v)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].probabilities() @ seen[0].v, output)


def test_calls_outside_watched_modules_pass_untouched() -> None:
    q = torch.randn(1, 1, 3, 2)
    watched = Calls(lambda q, k, v: q)
    with AttentionTap() as tap:
        tap.watch(watched, lambda *_: pytest.fail("nothing was called inside"))
        F.scaled_dot_product_attention(q, q, q)
        watched(q, q, q)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"batch_first": False},
        {"batch_first": True, "bias": False},
        {"batch_first": True, "kdim": 6, "vdim": 10},
    ],
)
@pytest.mark.parametrize("masked", [None, "attention", "padding", "both", "by_head"])
@pytest.mark.parametrize("weights", [None, True, False])
def test_multi_head_attention_gives_what_it_gives_untapped(
    options: dict[str, Any], masked: str | None, weights: bool | None
) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).eval()
    query, key, value = torch.randn(3, 5, 8), torch.randn(3, 5, module.kdim), torch.randn(3, 5, module.vdim)
    arguments: dict[str, Any] = {"need_weights": weights is not None, "average_attn_weights": bool(weights)}
    if masked in ("attention", "both"):
        arguments["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if masked == "by_head":
        arguments["attn_mask"] = torch.randn(3 * 2, 5, 5)
    if masked in ("padding", "both"):
        arguments["key_padding_mask"] = torch.tensor([[False] * 4 + [True]] * 3)
    inputs = [query, key, value] if options["batch_first"] else [each.transpose(0, 1) for each in (query, key, value)]
    expected, expected_weights = module(*inputs, **arguments)

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *inputs: Tensor) -> Any:
            return self.inner(*inputs, **arguments)

    seen, (output, found) = seen_by_tap(Inside(), *inputs)
    torch.testing.assert_close(output, expected)
    assert (found is None) == (expected_weights is None)
    if found is not None:
        torch.testing.assert_close(found, expected_weights)
    assert seen[0].q.shape == (3, 2, 5, 4)


def test_unbatched_and_unusual_multi_head_attention() -> None:
    module = nn.MultiheadAttention(8, 2).eval()
    tokens = torch.randn(5, 8)
    expected = module(tokens, tokens, tokens)
    _, found = seen_by_tap(module, tokens, tokens, tokens)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(CaptureError, match="no part of the image"):
            seen_by_tap(nn.MultiheadAttention(8, 2, **options).eval(), tokens, tokens, tokens)


def test_a_capture_that_is_kept_does_not_keep_the_graph() -> None:
    model, images = make_model("cls"), make_images("cls")
    with Capture(model, Needs(attention_gradient=True)) as capture:
        capture.backward(capture.forward(images)[:, 1].sum())
    assert capture._recording is None
    assert capture.blocks[0].attention_gradient().shape == (2, 3, 25, 25)


def test_the_graph_is_kept_between_targets_and_let_go_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    backward = Capture.backward

    def noted(self: Capture, score: Tensor, *, retain_graph: bool = False) -> None:
        kept.append(retain_graph)
        backward(self, score, retain_graph=retain_graph)

    monkeypatch.setattr(Capture, "backward", noted)
    get_explainer("tokentm", make_model("cls"))(make_images("cls"), [[0, 1, 2]] * 2)
    assert kept == [True, True, False]
