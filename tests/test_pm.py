"""PM: class scores of single patches, the search for the head that gives them, and the losses that train them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import DIMENSIONS, SIZE, make_images, make_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import Capture, Needs, TargetError, UnsupportedModelError, adapt, create_method, get_explainer
from vitexplain.models.token_head import TokenHead, token_head
from vitexplain.patch_probability import log_partition, patch_scores
from vitexplain.training.patch_mask_losses import MASK_LOSSES, mask_loss, patch_cover

LAST_STATE = Needs(states=frozenset({"out"}), from_block=-1)


def head_of(model: nn.Module, images: Tensor) -> tuple[TokenHead, Capture]:
    with Capture(model, LAST_STATE) as capture:
        capture.forward(images)
        return token_head(capture), capture


# -- the method --------------------------------------------------------------------------------------------------


def test_patch_logits_of_a_mean_pooled_model_average_to_the_image_logit() -> None:
    model, images = make_model("mean_pooled").double(), make_images("mean_pooled").double()
    explanation = get_explainer("pm", model, score="logit")(images, torch.arange(7).expand(2, 7))
    torch.testing.assert_close(explanation.scores.mean((2, 3)), explanation.logits, rtol=0, atol=1e-12)
    assert head_of(model, images)[0].decomposes


@pytest.mark.parametrize("kind", ["mean_pooled_with_cls", "cls", "own"])
def test_other_heads_say_that_they_do_not_decompose(kind: str) -> None:
    model, images = make_model(kind), make_images(kind)
    explanation = get_explainer("pm", model, score="logit")(images, torch.arange(7).expand(2, 7))
    assert (explanation.scores.mean((2, 3)) - explanation.logits).abs().max() > 1e-2
    assert not head_of(model, images)[0].decomposes


def test_probabilities_and_what_they_sum_to() -> None:
    images, every = make_images("cls"), torch.arange(7).expand(2, 7)
    found = {
        score: get_explainer("pm", make_model("cls"), score=score)(images, every).scores
        for score in ("probability", "background", "joint", "logit")
    }
    torch.testing.assert_close(found["probability"], found["logit"].sigmoid())
    nothing = 1 / (1 + found["logit"].exp().sum(1))
    torch.testing.assert_close(found["background"].sum(1) + nothing, torch.ones(2, 4, 6))
    torch.testing.assert_close(found["joint"].sum((1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(
        log_partition(found["logit"].flatten(2).transpose(1, 2)), -nothing.flatten(1).log(), rtol=1e-5, atol=1e-6
    )


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[200.0, -200.0], [0.0, 190.0]]])
    for score in ("probability", "background", "joint"):
        scores = patch_scores(logits, score)
        assert scores.isfinite().all()
        assert ((scores >= 0) & (scores <= 1)).all()


def test_only_logits_are_signed() -> None:
    assert create_method("pm", score="logit").signed
    assert not any(create_method("pm", score=score).signed for score in ("probability", "background", "joint"))


@pytest.mark.parametrize("target", [(0, 1), lambda logits: logits[:, 0]])
def test_a_target_that_is_no_class_is_refused(target: Any) -> None:
    with pytest.raises(TargetError, match="one class"):
        get_explainer("pm", make_model("cls"))(make_images("cls"), target)


def test_the_last_grid_of_a_pyramid_is_explained() -> None:
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=SIZE, patch_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=2, num_classes=7
    ).eval()
    nn.init.normal_(model.head.fc.weight)
    images = make_images("cls")
    explanation = get_explainer("pm", model, score="logit")(images, 3)
    features = model.forward_features(images)  # (B, h, w, D), normalised
    torch.testing.assert_close(explanation.scores, model.head.fc(features)[..., 3].detach(), rtol=1e-4, atol=1e-5)


# -- finding the head --------------------------------------------------------------------------------------------


def test_the_head_of_every_kind_of_model_is_the_one_it_has() -> None:
    for family, norms in {
        "cls": (lambda m: m.norm, None),
        "mean_pooled_with_cls": (None, lambda m: m.fc_norm),
        "hf_beit": (None, lambda m: m.beit.pooler.layernorm),
        "torchvision": (lambda m: m.encoder.ln, None),
        "hf_clip": (None, None),
    }.items():
        model, images = make_model(family), make_images(family)
        head, capture = head_of(model, images)
        expected = {id(each(model)) for each in norms if each is not None}
        assert {id(each) for each in head.below} == expected, family
        torch.testing.assert_close(
            head.image_logits(capture.blocks[-1].state("out")), capture.logits, rtol=1e-4, atol=1e-5
        )


def test_two_readings_side_by_side_both_get_the_patch() -> None:
    model, images = make_model("hf_dinov2"), make_images("hf_dinov2")
    head, capture = head_of(model, images)
    token = capture.blocks[-1].state("out")[:, 5]
    read = model.dinov2.layernorm(token)
    expected = model.classifier(torch.cat([read, read], 1)).detach()
    torch.testing.assert_close(head.token_logits(token[:, None])[:, 0].detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_before_the_blocks_is_not_taken_for_its_fresh_twin() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=SIZE, pre_norm=True, **DIMENSIONS).eval()
    nn.init.normal_(model.head.weight)
    assert [id(each) for each in head_of(model, make_images("cls"))[0].below] == [id(model.norm)]


def test_a_head_that_was_replaced_is_found_again() -> None:
    model, images = make_model("cls"), make_images("cls")
    explainer = get_explainer("pm", model, score="logit")
    before = explainer(images, 1).scores
    with torch.no_grad():
        model.head.weight *= 2
        model.head.bias *= 2
    torch.testing.assert_close(explainer(images, 1).scores, 2 * before)
    model.head = nn.Linear(24, 7)
    tokens = model.norm(model.forward_intermediates(images, indices=[2], norm=False)[1][0].flatten(2).transpose(1, 2))
    expected = model.head(tokens)[..., 1].detach().view(2, 4, 6)
    torch.testing.assert_close(explainer(images, 1).scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "head", [nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 7)), nn.Sequential(nn.ReLU(), nn.Linear(24, 7))]
)
def test_a_head_with_hidden_layers_is_refused(head: nn.Module) -> None:
    model = make_model("cls")
    model.head = head
    with pytest.raises(UnsupportedModelError, match="no final norm and linear head"):
        get_explainer("pm", model)(make_images("cls"))


def test_a_classifier_of_zeros_is_refused() -> None:
    model = make_model("cls")
    nn.init.zeros_(model.head.weight)
    with pytest.raises(UnsupportedModelError, match="weights of zero"):
        get_explainer("pm", model)(make_images("cls"), 1)


def test_half_precision_weights_are_widened_for_the_patches() -> None:
    model, images = make_model("cls").bfloat16(), make_images("cls")
    explained = get_explainer("pm", model, score="logit")(images, 3).scores
    with Capture(model, LAST_STATE) as capture:
        capture.forward(images)
    wide = copy.deepcopy(model).float()
    expected = wide.head(wide.norm(capture.blocks[-1].state("out")[:, 1:]))[..., 3].detach()
    torch.testing.assert_close(explained, expected.view(2, 4, 6))
    assert next(model.head.parameters()).dtype == torch.bfloat16


def test_the_head_is_differentiable_in_tokens_and_weights() -> None:
    model, images = make_model("distilled"), make_images("distilled")
    head, capture = head_of(model, images)
    tokens = capture.blocks[-1].state("out").requires_grad_(True)
    head.token_logits(tokens).sum().backward()
    assert tokens.grad is not None
    assert all(parameter.grad is not None for each in (*head.heads, *head.below) for parameter in each.parameters())
    assert len(head.heads) == 2


# -- losses ------------------------------------------------------------------------------------------------------


def slow_loss(loss: str, logits: Tensor, label: int, cover: Tensor, counts: Tensor) -> Tensor:
    """One image's loss, patch by patch and class by class, in plain probabilities."""
    patches, classes = logits.shape
    kept = [i for i in range(patches) if counts[i]]
    share = [cover[i] for i in range(patches)]

    def entropy(p: Tensor, t: Tensor | float) -> Tensor:
        return -t * torch.log(p) - (1 - t) * torch.log(1 - p)

    if loss == "joint":
        total = sum(logits[i, c].exp() for i in range(patches) for c in range(classes))
        found = sum(share[i] * logits[i, label].exp() / total for i in kept)
        return -torch.log(found) if any(share[i] > 0 for i in kept) else logits.sum() * 0
    if loss == "background":
        terms = []
        for i in kept:
            total = 1 + logits[i].exp().sum()
            terms.append(-share[i] * torch.log(logits[i, label].exp() / total) - (1 - share[i]) * torch.log(1 / total))
        return sum(terms) / len(terms)
    p = 1 / (1 + (-logits).exp())
    own = {i: entropy(p[i, label], share[i]) for i in kept}
    others = [entropy(p[i, c], 0.0) for i in kept for c in range(classes) if c != label]
    if loss == "own_class":
        return sum(own.values()) / len(own)
    if loss == "plain":
        return (sum(own.values()) + sum(others)) / (len(kept) * classes)
    shown, ground = sum(share[i] for i in kept), sum(1 - share[i] for i in kept)
    on = sum(share[i] * own[i] for i in kept) / shown if shown > 0 else 0
    off = sum((1 - share[i]) * own[i] for i in kept) / ground if ground > 0 else 0
    return (on + off) / 2 + sum(others) / len(others)


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_losses_and_their_gradients_equal_slow_ones(loss: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(4, 6, 3, generator=generator, dtype=torch.float64) * 2).requires_grad_(True)
    cover = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    counts = (torch.rand(4, 6, generator=generator) < 0.7).double()
    cover[1], cover[2], counts[0] = 0.0, 1.0, 1.0  # no object in sight; nothing but object; all patches count
    classes = torch.tensor([0, 2, 1, 2])
    fast = mask_loss(loss, logits, classes, cover, counts)
    slow = torch.stack([slow_loss(loss, *each) for each in zip(logits, classes.tolist(), cover, counts, strict=True)])
    torch.testing.assert_close(fast, slow)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((fast * weights).sum(), logits)[0], torch.autograd.grad((slow * weights).sum(), logits)[0]
    )


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_an_image_whose_patches_are_all_left_out_says_nothing(loss: Any) -> None:
    logits = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    value = mask_loss(loss, logits, torch.tensor([1]), torch.rand(1, 5), torch.zeros(1, 5)).sum()
    assert value == 0
    assert not torch.autograd.grad(value, logits)[0].any()


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_losses_hold_where_probabilities_round_to_0_and_1(loss: Any) -> None:
    logits = torch.tensor([[[300.0, -300.0], [-300.0, 300.0]]], requires_grad=True)
    value = mask_loss(loss, logits, torch.tensor([1]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)).sum()
    assert value.isfinite()
    assert value > 100
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_the_balanced_loss_of_an_undecided_model_is_known() -> None:
    """At logit 0 every entropy is log 2, whatever the size of the object: ½ (1 + 1) log 2 + log 2."""
    for shown in (1, 8, 15):
        cover = (torch.arange(16) < shown).float()[None]
        loss = mask_loss("balanced", torch.zeros(1, 16, 3), torch.tensor([0]), cover, torch.ones(1, 16))
        torch.testing.assert_close(loss, torch.tensor([2 * math.log(2)]))


def test_patch_cover_is_the_share_of_what_is_known() -> None:
    mask = torch.zeros(1, 4, 8, dtype=torch.int8)
    mask[0, :2, :4] = 1  # half of the first patch
    mask[0, :, 4:] = torch.tensor([[-1, -1, -1, 0]] * 4)  # three quarters of the second are left out
    cover, counts = patch_cover(mask, (1, 2))
    assert cover.tolist() == [[0.5, 0.0]]
    assert counts.tolist() == [[1.0, 0.0]]
    mask[0, :, 4:6] = 1
    cover, counts = patch_cover(mask, (1, 2))
    assert counts.tolist() == [[1.0, 1.0]]
    torch.testing.assert_close(cover, torch.tensor([[0.5, 2 / 3]]))


def test_an_adapter_may_be_explained_directly() -> None:
    adapter, images = adapt(make_model("cls")), make_images("cls")
    torch.testing.assert_close(
        get_explainer("pm", adapter)(images, 2).scores, get_explainer("pm", make_model("cls"))(images, 2).scores
    )
