"""Heads fused while the model runs: the same as fused afterwards, the model's own output unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_images, make_model
from torch import Tensor, nn

from vitexplain import Capture, CaptureError, Needs, create_method, explain_with, get_explainer
from vitexplain.attention import AttentionOperands
from vitexplain.fusion import FUSE, FusedAttention, Fusion, attend, discard_lowest, fuses_well
from vitexplain.subject import Subject


def operands(heads: int = 3, tokens: int = 7, width: int = 4, **options: Any) -> AttentionOperands:
    q, k, v = torch.randn(3, 2, heads, tokens, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return AttentionOperands(q, k, v, 0.3, **options)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_one_matrix_and_the_output(fusion: Fusion) -> None:
    given = operands()
    fused, output = attend(given, fusion)
    torch.testing.assert_close(output, given.probabilities() @ given.v)
    torch.testing.assert_close(fused.probabilities()[:, 0], FUSE[fusion](given.probabilities(), 1))
    some = torch.tensor([5, 0])
    torch.testing.assert_close(fused.part(slice(1, 2)).probabilities(some), fused.matrix[1:, :, some])
    assert fused.stochastic == (fusion == "mean")


@pytest.mark.parametrize("rows", [1, 3, 6, 100])
@pytest.mark.parametrize("fusion", FUSE)
def test_tiles_of_any_size_give_the_same(fusion: Fusion, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands()
    expected, output = attend(given, fusion)
    _, heads, _, keys = given.shape
    monkeypatch.setattr("vitexplain.fusion.TILE_BYTES", rows * heads * keys * given.q.element_size())
    found, other = attend(given, fusion)
    torch.testing.assert_close(found.matrix, expected.matrix)
    torch.testing.assert_close(other, output)


def test_what_was_not_kept_is_named() -> None:
    fused, output = attend(operands(), "mean")
    for read in (lambda: fused.v, lambda: fused.gradient(output), lambda: fused.output(output)):
        with pytest.raises(CaptureError, match=r"was not kept.*Needs.attention=True. without `fusion`"):
            read()


@pytest.mark.parametrize(
    ("given", "well"),
    [
        (operands(), True),
        (operands(tokens=24), True),
        (operands(tokens=25), False),  # the matrix would take more than q and k
        (operands(bias=torch.zeros(7, 7)), False),
        (operands(heads=8, tokens=400, width=64), True),  # in tiles
    ],
)
def test_where_it_pays(given: AttentionOperands, well: bool) -> None:
    assert fuses_well(given) == well


def test_half_precision_is_left_to_the_kernel() -> None:
    given = operands()
    half = AttentionOperands(given.q.bfloat16(), given.k.bfloat16(), given.v.bfloat16(), 0.3)
    assert not fuses_well(half)


def test_only_where_nothing_else_is_asked_for() -> None:
    model, images = make_model("cls"), make_images("cls")

    def kinds(needs: Needs) -> set[type]:
        with Capture(model, needs) as capture:
            torch.testing.assert_close(capture.forward(images).detach(), model(images).detach())
        assert type(capture.blocks[-1].operands) is AttentionOperands  # of it the head reads one row
        return {type(block.operands) for block in capture.blocks[:-1]}

    assert kinds(Needs(attention=True, fusion="mean")) == {FusedAttention}
    assert kinds(Needs(attention=True)) == {AttentionOperands}
    assert kinds(Needs(attention=True, attention_gradient=True, fusion="mean")) == {AttentionOperands}
    # a graph would end at an output that was computed outside of it
    beside = Needs(attention=True, fusion="mean", state_gradients=frozenset({"in"}))
    assert kinds(beside) == {AttentionOperands}


@pytest.mark.timm_families
@pytest.mark.parametrize(
    "options", [{}, {"head_fusion": "max"}, {"head_fusion": "min", "discard_ratio": 0.5}, {"normalisation": "column"}]
)
def test_rollout_is_the_same_from_heads_fused_before_or_after(
    model: nn.Module, images: Tensor, options: dict[str, Any]
) -> None:

    alone = get_explainer("rollout", model, **options)(images)
    methods = [create_method("rollout", **options), create_method("raw_attention", layer=0)]
    beside = explain_with(methods, Subject.of(model), images)[0]  # raw_attention keeps the heads apart
    torch.testing.assert_close(alone.scores, beside.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(alone.logits, beside.logits)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.51, 0.9, 0.99])
def test_what_is_discarded_is_no_larger_than_what_is_kept(ratio: float) -> None:
    """Of few different values, so that the threshold falls among equal ones."""
    fused = torch.randint(1, 9, (3, 10, 10), generator=torch.Generator().manual_seed(0)).float()
    for before, after in zip(fused, discard_lowest(fused, ratio), strict=True):
        kept = after != 0
        assert (~kept).sum() == int(100 * ratio)
        assert torch.equal(after[kept], before[kept])
        if ratio > 0:
            assert before[~kept].max() <= before[kept].min()
