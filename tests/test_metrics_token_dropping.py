"""Token dropping: tokens really gone, in every family that allows it, and a refusal in every one that does not."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from families import all_families, make_images, make_model
from test_tiers import SWIN, images_of, randomised
from timm.models.cait import Cait
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import resnet18

from vitexplain.errors import InputError, UnsupportedModelError
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.predictor import Predictor
from vitexplain.metrics.tally import Tally
from vitexplain.metrics.token_dropping import TokenDropper

BY_PLACE = (
    "beit",
    "beit_shared_bias",
    "eva_rope",
    "eva_rope_mixed",
    "hf_beit",
    "hf_dinov3",
    "relative_positions",
    "siglip2",
)
"""Families whose blocks treat tokens by their places."""

WRITTEN_OUT = ("cls", "registers", "mean_pooled", "mean_pooled_with_cls", "distilled", "attention_pool", "post_norm")
"""Families whose forward the reference can write out."""


def batch_of(family: str, count: int = 3, batch_size: int = 2) -> MetricBatch:
    predictor = Predictor.of(make_model(family), batch_size)
    scores = torch.rand(count, *all_families()[family].grid, generator=torch.Generator().manual_seed(0))
    return MetricBatch(scores, targets=torch.arange(count), inputs=make_images(family, count), predictor=predictor)


def written_out(model: nn.Module, image: Tensor, kept: list[int], prefix: int) -> Tensor:
    """Logits (C,) of one image: a timm model's own steps, with some tokens picked by hand."""
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(image[None]))
        tokens = tokens[:, [*range(prefix), *(prefix + patch for patch in kept)]]
        return model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))[0]


@pytest.mark.parametrize("kind", WRITTEN_OUT)
def test_curves_are_those_of_a_forward_written_out(kind: str) -> None:
    batch = batch_of(kind)
    model, prefix = batch.predictor.adapter.model, all_families()[kind].prefix
    rows = create_metric("token_dropping", steps=5).measure(batch)
    for index, image in enumerate(batch.inputs):
        scores = batch.scores[index].flatten().tolist()
        clean = written_out(model, image, list(range(len(scores))), prefix)
        for name, sign in (("mif", -1), ("lif", 1)):
            order = sorted(range(len(scores)), key=lambda patch, sign=sign, scores=scores: sign * scores[patch])
            for step in range(1, 5):
                kept = sorted(order[len(scores) * step // 5 :])
                logits = written_out(model, image, kept, prefix)
                found = float(rows[name][index, step - 1])
                assert found == pytest.approx(float(logits.softmax(0)[batch.targets[index]]), abs=1e-5)
                same = float(logits.argmax() == clean.argmax())
                assert float(rows[f"{name}_agreement"][index, step - 1]) == same


@pytest.mark.parametrize("kind", sorted(set(all_families()) - set(BY_PLACE)))
def test_dropping_nothing_changes_nothing_and_dropping_something_does(kind: str) -> None:
    batch = batch_of(kind)
    plain = batch.predictor.logits(batch.inputs)
    dropper = TokenDropper.of(batch.predictor, batch.inputs)
    h, w = all_families()[kind].grid
    everything = torch.ones(3, h * w, dtype=torch.bool)
    torch.testing.assert_close(dropper.logits(batch.inputs, everything), plain, rtol=0, atol=1e-6)
    most = everything.clone()
    most[:, 5] = False
    assert (dropper.logits(batch.inputs, most) - plain).abs().max() > 1e-7
    rows = create_metric("token_dropping").measure(batch)
    assert all(value.shape == (3, 9) and value.isfinite().all() for value in rows.values())


@pytest.mark.parametrize("kind", BY_PLACE)
def test_models_that_treat_tokens_by_their_places_are_refused(kind: str) -> None:
    batch = batch_of(kind)
    model = batch.predictor.adapter.model
    with pytest.raises(UnsupportedModelError, match=r"tokens cannot be dropped from a .*Use positive_perturbation"):
        create_metric("token_dropping").measure(batch)
    assert not any(module._forward_pre_hooks for module in model.modules())


class PlacesLater(VisionTransformer):
    """Adds its positions after the first block, by the count of tokens that are there: nothing fails on fewer."""

    def __init__(self) -> None:
        super().__init__((32, 48), 8, embed_dim=24, depth=3, num_heads=3, num_classes=7)
        self.blocks[0].register_forward_hook(lambda _, __, tokens: tokens + self.pos_embed[:, : tokens.shape[1]])


class BlockTwice(VisionTransformer):
    """Runs its first block a second time."""

    def __init__(self) -> None:
        super().__init__((32, 48), 8, embed_dim=24, depth=3, num_heads=3, num_classes=7)

    def forward_features(self, images: Tensor, **_: object) -> Tensor:
        tokens = self._pos_embed(self.patch_embed(images))
        return self.norm(self.blocks(self.blocks[0](tokens)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (PlacesLater, "order in which tokens enter"),
        (BlockTwice, "ran 2 times"),
        (functools.partial(SwinTransformer, **SWIN), "stay on their grid"),
        (functools.partial(resnet18, num_classes=7), "blocks are not known"),
    ],
)
def test_what_would_be_misplaced_without_an_error_is_refused(build: Callable[[], nn.Module], reason: str) -> None:
    predictor = Predictor.of(randomised(build()))
    grid = predictor.adapter.grid((32, 48))
    batch = MetricBatch(torch.rand(2, *grid), targets=torch.zeros(2).long(), inputs=images_of(), predictor=predictor)
    with pytest.raises(UnsupportedModelError, match=reason):
        create_metric("token_dropping").measure(batch)


def test_class_tokens_that_join_later_are_no_hindrance() -> None:
    model = randomised(Cait(img_size=(32, 48), patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7))
    predictor, images = Predictor.of(model), images_of()
    dropper = TokenDropper.of(predictor, images)
    assert dropper.layout.prefix == 0
    kept = torch.tensor([[0, 3, 7], [1, 2, 20]])
    with torch.no_grad():
        tokens = model.pos_drop(model.patch_embed(images) + model.pos_embed)
        tokens = torch.stack([each[chosen] for each, chosen in zip(tokens, kept, strict=True)])
        tokens, cls = model.blocks(tokens), model.cls_token.expand(2, -1, -1)
        for block in model.blocks_token_only:
            cls = block(tokens, cls)
        expected = model.forward_head(model.norm(torch.cat([cls, tokens], 1)))
    torch.testing.assert_close(dropper.logits(images, kept), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 10])
def test_inverting_the_map_inverts_the_gain_and_a_constant_one_has_none(steps: int) -> None:
    batch, metric = batch_of("cls"), create_metric("token_dropping", steps=steps)
    figures = []
    for scores in (batch.scores, -batch.scores, torch.ones_like(batch.scores)):
        tally = Tally(metric)
        tally.update(MetricBatch(scores, targets=batch.targets, inputs=batch.inputs, predictor=batch.predictor))
        figures.append(tally.compute().figures)
    one, inverted, constant = figures
    assert abs(one["srg"]) > 1e-3
    assert inverted["srg"] == pytest.approx(-one["srg"], abs=1e-6)
    assert inverted["mif"] == pytest.approx(one["lif"], abs=1e-6)
    assert constant["srg"] == pytest.approx(0, abs=1e-6)


def test_figures_are_means_over_the_steps() -> None:
    tally = Tally(create_metric("token_dropping"))
    rows = tally.update(batch_of("registers"))
    figures = tally.compute().figures
    for suffix in ("", "_agreement"):
        mif, lif = (float(np.mean(rows[f"{name}{suffix}"])) for name in ("mif", "lif"))
        assert figures[f"mif{suffix}"] == pytest.approx(mif)
        assert figures[f"lif{suffix}"] == pytest.approx(lif)
        assert figures[f"srg{suffix}"] == pytest.approx(lif - mif)


def test_evidence_in_few_patches_gives_nearly_the_whole_gain() -> None:
    """A map of the patches that the model was made to look at, against their inverse."""
    model = VisionTransformer((32, 48), 8, embed_dim=24, depth=1, num_heads=3, num_classes=2, global_pool="avg").eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()  # the block adds nothing: tokens go to the mean as they are
        model.pos_embed.zero_()
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.patch_embed.proj.weight[0].fill_(1.0)  # brightness
        model.norm, model.fc_norm = nn.Identity(), nn.Identity()
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[1, 0] = 1.0
    bright = torch.zeros(1, 4, 6)
    bright[0, 1, 1:3] = 1.0
    images = (20 * bright - 10).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].repeat(1, 3, 1, 1)
    kept_bright = [(2, 24 - 24 * k // 10) for k in range(1, 10)]  # least influential first
    logit = [3 * 64 * 10 * (min(two, left) - max(left - two, 0)) / left for two, left in kept_bright]
    batch = MetricBatch(bright, targets=torch.tensor([1]), inputs=images, predictor=Predictor.of(model))
    rows = create_metric("token_dropping").measure(batch)
    expected = torch.tensor(logit, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(rows["lif"][0], expected, rtol=0, atol=1e-4)
    assert rows["mif"][0].max() < 1e-3
    assert rows["lif"][0, -1] > 0.4


def test_maps_of_another_grid_are_refused() -> None:
    batch = batch_of("cls")
    with pytest.raises(InputError, match="found maps of 6×4 patches, expected the model's grid of 4×6"):
        create_metric("token_dropping").measure(
            MetricBatch(
                batch.scores.transpose(1, 2), targets=batch.targets, inputs=batch.inputs, predictor=batch.predictor
            )
        )
