"""Attention's backward written out, with what a method reads of it: the same gradients and the same map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import make_images, make_model
from torch import Tensor

from vitexplain import CaptureError, Needs, create_method, explain_with, get_explainer, method_info, recording
from vitexplain.attention import AttentionOperands
from vitexplain.capture import Capture
from vitexplain.fused_gradient import FusedGradient, GradientFusion
from vitexplain.models.timm_family import TimmAdapter
from vitexplain.subject import Subject

FUSED = Needs(attention_gradient=True, fused_gradient="positive")


def leaves(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, 3, 7, 4) as a model has them, three parts of one tensor of other axes."""
    stacked = torch.randn(batch, 7, 3, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = stacked.permute(2, 0, 3, 1, 4)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def expected_matrix(operands: AttentionOperands, arrived: Tensor, fusion: GradientFusion) -> Tensor:
    weighted = operands.probabilities() * operands.gradient(arrived)
    return (weighted.clamp(min=0) if fusion == "positive" else weighted).mean(1, keepdim=True)


@pytest.mark.parametrize("batch", [1, 2])  # of one image, attention is kept
@pytest.mark.parametrize("rows", [1, 3, 7])  # of a tile
@pytest.mark.parametrize("fusion", ["positive", "signed"])
def test_the_backward_is_that_of_attention_and_fills_the_matrix(
    batch: int, rows: int, fusion: GradientFusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitexplain.fusion.TILE_BYTES", rows * 3 * 7 * 8)
    q, k, v = leaves(batch)
    operands = AttentionOperands(q.detach(), k.detach(), v.detach(), 0.3)
    fused = FusedGradient.of(operands, fusion)
    assert not fused.matrix.any()
    output, expected = fused.attend(q, k, v, 0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(output, expected)
    for seed in (1, 2):  # as for two targets
        arrived = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = torch.autograd.grad(output, (q, k, v), arrived, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k, v), arrived, retain_graph=True))
        torch.testing.assert_close(fused.matrix, expected_matrix(operands, arrived, fusion))
    alone = FusedGradient.of(operands, fusion)
    alone.receive(operands, arrived)
    torch.testing.assert_close(alone.matrix, fused.matrix)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_may_change_the_output_in_place(batch: int) -> None:
    q, k, v = leaves(batch)
    fused = FusedGradient.of(AttentionOperands(q.detach(), k.detach(), v.detach(), 0.3), "positive")
    output, expected = fused.attend(q, k, v, 0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3)
    found = torch.autograd.grad(output.mul_(2).sum(), (q, k, v))
    torch.testing.assert_close(found, torch.autograd.grad(2 * expected.sum(), (q, k, v)))


@pytest.mark.parametrize("kind", ["cls", "distilled", "mean_pooled", "registers"])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["generic_attention", "gradient_rollout"])
def test_maps_are_those_of_the_tiles(
    name: str, kind: str, start: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = make_model(kind).double(), make_images(kind, batch=batch).double()
    targets = torch.tensor([[0, 3], [5, 1], [2, 2]])[:batch]

    def maps() -> Tensor:
        return get_explainer(name, model, start_layer=start)(images, targets).scores

    filled: list[int] = []
    for step in ("attend", "receive"):
        original = getattr(FusedGradient, step)

        def count(*args: Any, of: Any = original, **kwargs: Any) -> Any:
            filled.append(1)
            return of(*args, **kwargs)

        monkeypatch.setattr(FusedGradient, step, count)
    found = maps()
    assert filled
    monkeypatch.setattr(recording, "fuses_well", lambda _: False)
    filled.clear()
    torch.testing.assert_close(found, maps(), rtol=1e-10, atol=1e-14)
    assert not filled


def test_what_else_is_read_is_kept_whole() -> None:
    """A method that reads attention itself, beside one that does not."""
    model, images = make_model("cls"), make_images("cls")
    assert (FUSED | Needs(states=frozenset({"in"}))).fused_gradient == "positive"
    assert (FUSED | Needs(attention=True)).fused_gradient is None
    assert (FUSED | replace(FUSED, fused_gradient="signed")).fused_gradient is None
    names = ["generic_attention", "gradient_rollout", "gradcam"]
    together = explain_with([create_method(name) for name in names], Subject.of(model), images, 1)
    for name, found in zip(names, together, strict=True):
        torch.testing.assert_close(found.scores, get_explainer(name, model)(images, 1).scores, rtol=1e-4, atol=1e-6)


def test_beside_a_method_that_reads_no_attention_it_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, fused = make_model("cls"), make_images("cls"), []
    received = FusedGradient.take
    monkeypatch.setattr(FusedGradient, "take", lambda self, *rest: fused.append(1) or received(self, *rest))
    names = ["generic_attention", "gradcam"]
    together = explain_with([create_method(name) for name in names], Subject.of(model), images, 1)
    assert fused
    for name, found in zip(names, together, strict=True):
        torch.testing.assert_close(found.scores, get_explainer(name, model)(images, 1).scores, rtol=1e-4, atol=1e-6)


def test_parts_refuse_what_the_whole_refuses() -> None:
    q, k, v = leaves(3)
    fused = FusedGradient.of(AttentionOperands(q.detach(), k.detach(), v.detach(), 0.3), "signed")
    part = fused.part(slice(1, 3))
    assert part.matrix.data_ptr() == fused.matrix[1].data_ptr()
    assert part.shape == (2, 1, 7, 7)
    with pytest.raises(CaptureError, match="was not kept"):
        part.probabilities()


def test_an_unknown_fusion_is_refused() -> None:
    model, images = make_model("cls"), make_images("cls")
    with (
        pytest.raises(CaptureError, match=r"found Needs.fused_gradient='mean'., expected 'signed' or 'positive'"),
        Capture(model, replace(FUSED, fused_gradient="mean")) as capture,  # type: ignore[arg-type]
    ):
        capture.forward(images)


@pytest.mark.parametrize("name", ["generic_attention", "gradient_rollout"])
def test_a_method_made_of_one_may_read_attention(name: str) -> None:
    kind = method_info(name).method

    class Reading(kind):  # type: ignore[misc, valid-type]
        def attribute(self, capture: Capture) -> Tensor:
            return capture.blocks[-1].attention().mean((1, 2))

    assert create_method(name).needs.fused_gradient is not None
    assert Reading().needs.fused_gradient is None


def test_a_score_that_no_attention_reaches_moves_nothing() -> None:
    model, images = make_model("cls"), make_images("cls")
    with Capture(model, FUSED) as capture:
        logits = capture.forward(images)
        capture.backward(logits[:, 1].sum(), retain_graph=True)
        matrices = [block.operands for block in capture.blocks[:-1]]
        assert all(isinstance(each, FusedGradient) and each.matrix.any() for each in matrices)
        capture.backward(torch.zeros((), requires_grad=True))
        assert not any(isinstance(each, FusedGradient) and each.matrix.any() for each in matrices)


def test_balanced_gradients_are_not_fused() -> None:
    method = create_method("generic_attention", gradient="balanced")
    model, images = make_model("cls"), make_images("cls")
    with Capture(model, method.needs) as capture:
        capture.backward(capture.forward(images)[:, 1].sum())
        assert {type(block.operands) for block in capture.blocks} == {AttentionOperands}


@pytest.mark.parametrize("kind", ["cls", "mean_pooled_with_cls", "eva", "eva_rope"])
def test_only_what_lies_around_attention_is_watched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of timm that are known are watched from their keys' norm on: with the same result as from end to end."""
    model, images = make_model(kind), make_images(kind)
    found = get_explainer("generic_attention", model)(images, 1).scores
    assert all(each.between is not None for each in TimmAdapter(model).blocks)
    monkeypatch.setattr("vitexplain.models.timm_family._around_attention", lambda _: None)
    torch.testing.assert_close(found, get_explainer("generic_attention", model)(images, 1).scores, rtol=0, atol=0)
