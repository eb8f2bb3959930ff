"""Scores of single blocks: what is computed again gives what a second forward gives, for less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import make_images, make_model
from references import Trace, legrad
from test_balanced import with_constants
from test_relevance import exact
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitexplain import Capture, Needs, explain_with, get_explainer
from vitexplain.balanced import BALANCED
from vitexplain.block_scores import RECORDED, score_blocks
from vitexplain.modified_backward import BackwardRules
from vitexplain.registry import create_method
from vitexplain.subject import Subject


class Mixing(nn.Module):
    """Tokens see each other behind attention."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + 0.1 * tokens.mean(1, keepdim=True)


class MixingLater(nn.Module):
    """The same from the sixth token on, so that the first ones do not show it."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens if tokens.shape[1] < 6 else tokens + 0.1 * tokens[:, 5:].mean(1, keepdim=True)


def altered(kind: str) -> Any:
    """A model whose second block, and that alone, ends in something else."""
    torch.manual_seed(0)
    model: Any = make_model("cls").double()
    ends = {
        "norm": nn.LayerNorm(model.embed_dim),  # its gradient depends on what the last linear map gives
        "activation": nn.GELU(),
        "linear": nn.Linear(model.embed_dim, model.embed_dim),
        "mixing": Mixing(),
        "mixing_later": MixingLater(),
    }
    if kind == "hook":
        model.blocks[1].mlp.fc2.register_forward_hook(lambda _, __, output: output.sigmoid())
    elif kind != "plain":
        model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, ends[kind].double())
    return model.eval()


def mean_square(tokens: Tensor) -> Tensor:
    """The same gradient for all tokens."""
    return tokens.mean(1).square().sum(1)


def unlike(tokens: Tensor) -> Tensor:
    """Another gradient for each token."""
    return tokens.sin().sum((1, 2))


@pytest.mark.parametrize("backward", [None, BALANCED], ids=["plain", "balanced"])
@pytest.mark.parametrize("score", [mean_square, unlike])
@pytest.mark.parametrize("kind", ["plain", "norm", "activation", "linear", "hook", "mixing", "mixing_later"])
def test_blocks_computed_again_give_what_a_second_forward_gives(
    kind: str, score: Any, backward: BackwardRules | None
) -> None:
    model, images, forwards = altered(kind), make_images("cls").double(), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    if kind == "hook" and backward is not None:
        backward = None  # a sigmoid alone is a gate, and a gate has no balanced gradient of its own

    def gradients(needs: Needs) -> list[Tensor]:
        with torch.no_grad(), Capture(model, needs) as capture:
            capture.forward(images)
            return [block.attention_gradient() for block in score_blocks(capture, 3, score, None, backward)]

    expected = gradients(Needs())
    assert len(forwards) == 2
    found = gradients(RECORDED)
    assert len(forwards) == 3
    for own, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12 * float(other.abs().max()))


@pytest.mark.parametrize(("score", "shared"), [(mean_square, True), (unlike, False)])
def test_no_block_is_computed_again_where_its_graph_is_held(score: Any, shared: bool) -> None:
    """Back through the MLP, 8 parts of D² weights, and the output projection; its last map of two tokens if shared."""
    model, images = make_model("cls"), make_images("cls")
    model.blocks = model.blocks[:1]
    with torch.no_grad(), Capture(model, Needs(apart=1)) as capture:
        capture.forward(images)
        with FlopCounterMode(display=False) as back:
            score_blocks(capture, 1, score)
    tokens = len(images) * capture.layouts[-1].count
    parts = 4 * (2 * len(images) if shared else tokens) + 5 * tokens
    assert back.get_total_flops() == 2 * model.embed_dim**2 * parts


@pytest.mark.parametrize("also", [Needs(), Needs(attention=True), Needs(attention_gradient=True), RECORDED])
def test_beside_other_needs_the_gradients_are_the_same(also: Needs) -> None:
    model, images = make_model("cls").double(), make_images("cls").double()
    found = []
    for needs in (Needs(apart=2), Needs(apart=2) | also, also | Needs(apart=2)):
        with torch.no_grad(), Capture(model, needs) as capture:
            capture.forward(images)
            blocks = score_blocks(capture, 2, unlike)
            found.append(torch.stack([block.attention_gradient() for block in blocks]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12 * float(found[0].abs().max()))


def test_every_target_has_its_own_gradient_and_the_graph_is_gone_afterwards() -> None:
    model, images = make_model("cls"), make_images("cls")
    with torch.no_grad(), Capture(model, Needs(apart=2)) as capture:
        capture.forward(images)
        for column in (0, 1):
            blocks = score_blocks(capture, 2, lambda tokens, column=column: tokens[:, 0, column])  # type: ignore[misc]
            found = torch.stack([block.attention_gradient() for block in blocks])
            with Capture(model, Needs(apart=2)) as alone:
                alone.forward(images)
                again = score_blocks(alone, 2, lambda tokens, column=column: tokens[:, 0, column])  # type: ignore[misc]
                torch.testing.assert_close(found, torch.stack([block.attention_gradient() for block in again]))
    assert all(block.leaving is None or not block.leaving.requires_grad for block in capture.blocks)


def test_a_block_may_change_what_leaves_the_one_below() -> None:
    model, images = make_model("cls").double(), make_images("cls").double()
    found = []
    for changing in (False, True):
        if changing:
            model.blocks[-1].register_forward_pre_hook(lambda _, arguments: (arguments[0].mul_(1.0),))
        with torch.no_grad(), Capture(model, Needs(apart=2)) as capture:
            capture.forward(images)
            found.append(torch.stack([block.attention_gradient() for block in score_blocks(capture, 2, unlike)]))
    torch.testing.assert_close(found[1], found[0])


def test_hooks_are_taken_off_where_a_block_cannot_be_computed_again() -> None:
    class Stubborn(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            if tokens.shape[1] < 7:
                raise RuntimeError("expected all tokens")
            return tokens

    model, images = make_model("cls").double(), make_images("cls").double()
    expected = get_explainer("legrad", model)(images, 1).scores
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Stubborn())
    torch.testing.assert_close(get_explainer("legrad", model)(images, 1).scores, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("pooling", ["mean", "head"])
def test_an_attention_pool_reads_the_tokens_of_each_block(pooling: str) -> None:
    """Against autograd through each block alone, its tokens pooled by the model's own pool."""
    model, images = make_model("attention_pool").double(), make_images("attention_pool").double()
    found = get_explainer("legrad", model, layers=3, pooling=pooling)(images, 4).scores.flatten(1)
    entering: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, given: entering.append(given[0])) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    expected = torch.zeros_like(found)
    for block, given in list(zip(model.blocks, entering, strict=True))[-3:]:
        block.attn.fused_attn, attended = False, []
        handle = block.attn.attn_drop.register_forward_pre_hook(lambda _, given, kept=attended: kept.append(given[0]))
        tokens = block(given)
        handle.remove()
        if pooling == "head":
            logits = model.forward_head(model.norm(tokens))
        else:
            logits = model.head(model.fc_norm(model.attn_pool(model.norm(tokens.mean(1, keepdim=True)))))
        (gradient,) = torch.autograd.grad(logits[:, 4].sum(), attended)
        expected += gradient.clamp(min=0).mean((1, 2))[:, 1:]
    torch.testing.assert_close(found, expected)


@pytest.mark.exact_states
@pytest.mark.parametrize("options", [{}, {"layers": 9, "pooling": "head"}, {"normalised": True}], ids=str)
def test_a_balanced_map_is_the_plain_one_of_a_model_rewritten_with_constants(
    family: str, options: dict[str, Any]
) -> None:
    model, images, seed, prefix = exact(family)
    found = get_explainer("legrad", model, gradient="balanced", **options)(images, 4).scores
    plain = get_explainer("legrad", model, **options)(images, 4).scores
    rewritten = with_constants(model)
    for block in rewritten.blocks:  # the way to queries and keys, which no score of this block takes
        block.attn.q_norm, block.attn.k_norm = block.attn.q_norm.module, block.attn.k_norm.module
        block.attn.fused_attn = False
    for image, map_ in zip(images, found.flatten(1), strict=True):
        trace = Trace(copy.deepcopy(model), image, 4, seed)
        trace.model = rewritten
        expected = legrad(trace, **options)[prefix:]
        torch.testing.assert_close(map_, expected, rtol=1e-6, atol=1e-8 * expected.abs().max().item())
    assert (plain - found).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("options", [{}, {"layers": 3, "pooling": "head"}, {"normalised": True}], ids=str)
def test_a_balanced_map_beside_a_plain_one_is_that_of_each_alone(options: dict[str, Any]) -> None:
    model, images = make_model("cls"), make_images("cls")
    methods = [create_method("legrad", gradient=each, **options) for each in ("plain", "balanced")]
    together = explain_with(methods, Subject.of(model), images, 4)
    for method, found in zip(methods, together, strict=True):
        (alone,) = explain_with([method], Subject.of(model), images, 4)
        torch.testing.assert_close(found.scores, alone.scores)
    assert (together[0].scores - together[1].scores).abs().max() > 1e-3 * together[0].scores.abs().max()
