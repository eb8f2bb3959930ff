"""RISE, ViT-CX and TIS: against loops, on answers known beforehand, and where they do not apply."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import SIZE, make_images, make_model
from lighter import passes_claimed
from test_contract import assert_same_state, disturb, state_of
from test_tiers import BUILD, pyramid, randomised
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import Capture, ExplanationWarning, Needs, UnsupportedModelError, get_explainer
from vitexplain.feature_masks import central_channels, merged_channels
from vitexplain.random_masks import RandomMasks

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")

METHODS = ("rise", "vit_cx", "tis")
FEW: dict[str, dict[str, Any]] = {"rise": {"masks": 20, "cells": 3}, "vit_cx": {}, "tis": {"masks": 10}}


def probability(model: nn.Module, images: Tensor, target: int) -> Tensor:
    with torch.no_grad():
        return model(images).softmax(1)[:, target]


# RISE


@pytest.mark.parametrize(("size", "cells"), [((32, 48), 3), ((30, 19), 4), ((8, 8), 20), ((5, 16), 1)])
def test_random_masks_are_enlarged_and_cropped(size: tuple[int, int], cells: int) -> None:
    masks = RandomMasks.draw(6, size, cells, 0.5, seed=3)
    numbers = torch.tensor([5, 0, 3])
    found = masks(numbers)
    assert found.shape == (3, *size)
    (tall, wide), (_, rows, columns) = masks.cell, masks.bits.shape
    for mask, number in zip(found, numbers.tolist(), strict=True):
        whole = F.interpolate(masks.bits[number][None, None], (rows * tall, columns * wide), mode="bilinear")[0, 0]
        down, right = masks.shifts[number].tolist()
        assert 0 <= down < tall
        assert 0 <= right < wide
        torch.testing.assert_close(mask, whole[down : down + size[0], right : right + size[1]], rtol=1e-4, atol=1e-5)


def test_random_masks_show_as_much_as_asked() -> None:
    masks = RandomMasks.draw(2000, (32, 48), 4, 0.3, seed=0)(torch.arange(2000))
    assert masks.mean().item() == pytest.approx(0.3, abs=0.01)
    assert (masks.mean(0) - 0.3).abs().max() < 0.04  # everywhere alike: that is what the shift is for
    assert masks.min() >= 0
    assert masks.max() <= 1 + 1e-6
    again = RandomMasks.draw(2000, (32, 48), 4, 0.3, seed=0)
    torch.testing.assert_close(again(torch.tensor([7])), masks[7:8])
    assert not torch.equal(RandomMasks.draw(2000, (32, 48), 4, 0.3, seed=1).bits, again.bits)


def test_rise_equals_a_loop_over_masks() -> None:
    model, images = make_model("registers"), make_images("registers")
    scores = get_explainer("rise", model, masks=20, cells=3, probability=0.4, seed=2)(images, [3, 1]).scores
    masks = RandomMasks.draw(20, SIZE, 3, 0.4, seed=2)
    for image, target, found in zip(images, (3, 1), scores, strict=True):
        expected = torch.zeros(4, 6)
        for number in range(20):
            mask = masks(torch.tensor([number]))
            answer = probability(model, image * mask[:, None], target)
            for i, j in itertools.product(range(4), range(6)):
                expected[i, j] += float(answer * mask[0, i * 8 : i * 8 + 8, j * 8 : j * 8 + 8].mean()) / (20 * 0.4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Lamp(nn.Module):
    """Class 1 is likely as far as one patch is bright; a feature map lets it be adapted."""

    image_size = SIZE

    def __init__(self, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch, self.map, self.last = patch, nn.Conv2d(3, 7, 8, 8), nn.Identity()
        with torch.no_grad():
            self.map.weight.fill_(1 / 192)
            self.map.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        brightness = self.last(self.map(images))[:, 0, self.patch[0], self.patch[1]]
        return torch.stack([torch.zeros_like(brightness), 8 * brightness - 4], 1)


def test_rise_finds_the_one_patch_that_counts() -> None:
    model, images = Lamp((1, 4)).eval(), torch.ones(1, 3, *SIZE)
    scores = get_explainer("rise", model, masks=600, cells=4)(images, 1).scores[0]
    assert divmod(int(scores.argmax()), 6) == (1, 4)
    others = torch.cat([scores[3], scores[:, 0]])
    assert scores.max() > 1.3 * others.max()
    assert others.std() < 0.1 * others.mean()


# ViT-CX


def clusters_by_hand(maps: np.ndarray, distance: float) -> list[list[int]]:
    """Complete linkage: the two clusters whose farthest members are nearest are merged, as long as they are near."""
    unit = maps / np.linalg.norm(maps, axis=1, keepdims=True)
    apart = 1 - unit @ unit.T
    clusters = [[each] for each in range(len(maps))]
    while len(clusters) > 1:
        pairs = list(itertools.combinations(range(len(clusters)), 2))
        far = [max(apart[i, j] for i in clusters[a] for j in clusters[b]) for a, b in pairs]
        best = int(np.argmin(far))
        if far[best] > distance:
            break
        a, b = pairs[best]
        clusters[a] += clusters.pop(b)
    return clusters


@pytest.mark.parametrize("distance", [0.0, 0.1, 0.4, 2.0])
def test_alike_channels_share_a_mask(distance: float) -> None:
    tokens = torch.randn(24, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens[:, 3:6] = tokens[:, :3] + 0.05 * tokens[:, 6:9]
    tokens[:, 9] = 1.5  # says nothing
    maps = tokens[:, [each for each in range(30) if each != 9]].T.numpy()
    maps = (maps - maps.min(1, keepdims=True)) / np.ptp(maps, axis=1, keepdims=True)
    sums = np.stack([maps[each].sum(0) for each in clusters_by_hand(maps, distance)])
    expected = (sums - sums.min(1, keepdims=True)) / np.ptp(sums, axis=1, keepdims=True)
    found = merged_channels(tokens, distance).numpy()
    assert len(found) == len(expected)
    assert len(found) == {0.0: 29, 2.0: 1}.get(distance, len(found))
    order, other = (np.lexsort(each.round(9).T) for each in (found, expected))
    np.testing.assert_allclose(found[order], expected[other], atol=1e-9)


def test_tokens_that_are_all_alike_make_no_mask() -> None:
    assert merged_channels(torch.ones(24, 5), 0.1).shape == (0, 24)
    assert merged_channels(torch.stack([torch.arange(4.0), torch.ones(4)], 1), 0.1).tolist() == [
        pytest.approx([0, 1 / 3, 2 / 3, 1])
    ]


@pytest.mark.parametrize("layer", [-1, 0])
def test_vit_cx_equals_a_loop_over_masks(layer: int) -> None:
    model, images = make_model("cls"), make_images("cls")
    explainer = get_explainer("vit_cx", model, layer=layer, distance=0.3, noise=0.2, seed=4)
    scores = explainer(images, [3, 1]).scores
    with Capture(model, Needs(states=frozenset({"attention_input"}))) as capture:
        capture.forward(images)
    noise = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(4)) * 0.2
    for row, (image, target) in enumerate(zip(images, (3, 1), strict=True)):
        masks = merged_channels(capture.blocks[layer].state("attention_input")[row, 1:], 0.3).view(-1, 4, 6)
        assert 1 < len(masks) < 24
        total, covered = torch.zeros(4, 6), torch.zeros(4, 6)
        for mask in masks:
            large = F.interpolate(mask[None, None], SIZE, mode="bilinear")
            masked = probability(model, image * large + noise * (1 - large), target)
            whole = probability(model, image + noise * (1 - large), target)
            total += (masked - whole + probability(model, image[None], target)) * mask
            covered += mask
        expected = (total / covered / len(masks)).clamp(min=0)
        torch.testing.assert_close(scores[row], expected, rtol=1e-4, atol=1e-6)


# TIS


def lloyd(channels: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        nearest = [int(((centroids - each) ** 2).sum(1).argmin()) for each in channels]
        for k in range(len(centroids)):
            members = [each for each, one in zip(channels, nearest, strict=True) if one == k]
            if members:
                centroids[k] = torch.stack(members).mean(0)
    return centroids


def test_centroids_are_those_of_k_means() -> None:
    tokens = torch.randn(12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = np.sort(np.random.default_rng(7).permutation(40)[:6])
    expected = lloyd(tokens.T, tokens.T[torch.from_numpy(start)].clone(), 5)
    torch.testing.assert_close(central_channels(tokens, 6, 5, seed=7), expected)
    everything = central_channels(tokens, 1024, 5, seed=7)
    torch.testing.assert_close(everything, tokens.T)  # as many centroids as channels are the channels


def test_tis_equals_a_loop_over_sets() -> None:
    model, images = make_model("registers"), make_images("registers")
    scores = get_explainer("tis", model, masks=10, kept=0.3, seed=5)(images, [3, 1]).scores
    with Capture(model, Needs(states=frozenset({"out"}))) as capture:
        capture.forward(images)
    for row, (image, target) in enumerate(zip(images, (3, 1), strict=True)):
        tokens = torch.cat([block.state("out")[row, 5:] for block in capture.blocks], 1)
        total, count = torch.zeros(24), torch.zeros(24)
        for centroid in central_channels(tokens, 10, 10, seed=5):
            kept = centroid.argsort(descending=True)[:7].sort().values  # 30 % of 24
            with torch.no_grad():
                entering = model._pos_embed(model.patch_embed(image[None]))
                passed = model.blocks(torch.cat([entering[:, :5], entering[:, 5 + kept]], 1))
                answer = model.forward_head(model.norm(passed)).softmax(1)[0, target]
            total[kept] += answer
            count[kept] += 1
        torch.testing.assert_close(scores[row].flatten(), total / count.clamp(min=1), rtol=1e-4, atol=1e-6)


def test_a_patch_in_no_set_scores_zero() -> None:
    scores = get_explainer("tis", make_model("cls"), masks=1, kept=0.25)(make_images("cls"), 1).scores
    assert (scores > 0).flatten(1).sum(1).tolist() == [6, 6]
    for each in scores:
        assert len(each[each > 0].unique()) == 1


@pytest.mark.parametrize("kind", ["beit", "eva_rope", "relative_positions"])
def test_tis_refuses_models_whose_tokens_are_no_set(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"tokens cannot be dropped.*generic_attention, rise, vit_cx"):
        get_explainer("tis", make_model(kind), masks=4)(make_images(kind), 1)


def test_tis_refuses_grids_of_tokens() -> None:
    images = torch.randn(1, 3, *SIZE)
    with pytest.raises(UnsupportedModelError, match=r"stay on their grid.*generic_attention, rise, vit_cx"):
        get_explainer("tis", randomised(BUILD["swin"]()))(images, 1)
    with pytest.raises(UnsupportedModelError, match=r"methods that work on it: .*rise.*vit_cx"):
        get_explainer("tis", randomised(pyramid()))


# all three


@pytest.mark.parametrize("name", ["rise", "vit_cx"])
def test_any_model_of_images_is_explained(name: str) -> None:
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    found = get_explainer(name, randomised(BUILD["swin"]()), **FEW[name])(images, 1).scores
    assert found.shape == ((2, 8, 12) if name == "rise" else (2, 4, 6))  # features are those of the last block's grid
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    explanation = get_explainer(name, randomised(pyramid()), **FEW[name])(images, 1)
    assert explanation.scores.shape == (1, 2, 3)
    assert explanation.scores.std() > 0


@pytest.mark.parametrize("name", METHODS)
def test_forwards_are_in_batches_and_batches_change_nothing(name: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    scores = get_explainer(name, model, **FEW[name])(images, 1).scores
    explainer, seen = get_explainer(name, model, batch_size=3, **FEW[name]), []
    explainer(images, 1)  # TIS tries once whether tokens can be left out
    handle = model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    apart = explainer(images, 1).scores
    handle.remove()
    assert max(seen) == 3
    assert sum(each < 3 for each in seen) <= 3  # the capture, and what is left over of each image
    torch.testing.assert_close(apart, scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_behind_when_interrupted(name: str) -> None:
    model, images, calls = make_model("cls"), make_images("cls"), 0
    explainer = get_explainer(name, model, **FEW[name])
    first = explainer(images, 1).scores
    disturb(model)
    before, state, numpy_state = state_of(model), torch.get_rng_state(), np.random.get_state()[1].tolist()

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyError("deep inside the model")

    handle = model.blocks[-1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="deep inside"):
        explainer(images, 1)
    handle.remove()
    assert_same_state(before, state_of(model))
    torch.testing.assert_close(explainer(images, 1).scores, first, rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state


@pytest.mark.parametrize("name", METHODS)
def test_of_contrasts_and_functions_probabilities_and_values_are_explained(name: str) -> None:
    explainer, images = get_explainer(name, make_model("cls"), **FEW[name]), make_images("cls")
    first, second = (explainer(images, lambda z, c=each: z.softmax(1)[:, c]).scores for each in (3, 1))
    lowest = 0 if name == "vit_cx" else -math.inf  # which cuts off the maps of classes
    torch.testing.assert_close(explainer(images, 3).scores, first.clamp(min=lowest), rtol=1e-4, atol=1e-6)
    contrast = explainer(images, (3, 1)).scores
    seen = (first > 0) & (second > 0) if name == "tis" else torch.ones_like(first).bool()
    torch.testing.assert_close(contrast[seen], (first - second)[seen], rtol=1e-4, atol=1e-6)
    assert contrast.min() < 0 or explainer(images, (1, 3)).scores.min() < 0


def test_a_patch_in_no_set_is_not_above_those_that_speak_against_a_contrast() -> None:
    explainer, images = get_explainer("tis", make_model("cls"), masks=2, kept=0.25), make_images("cls")
    known = explainer(images, 1).scores > 0
    assert 0 < known.flatten(1).sum(1).max() < 24
    scores = explainer(images, lambda logits: -logits.softmax(1)[:, 1]).scores
    for image, inside in zip(scores, known, strict=True):
        assert (image[~inside] == image[inside].min()).all()
        assert image[inside].max() < 0


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_sees_nothing_gives_a_flat_map(name: str) -> None:
    model = make_model("cls")
    with torch.no_grad():
        model.head.weight.zero_()
    scores = get_explainer(name, model, **FEW[name])(make_images("cls"), 2).scores
    likely = float(model.head.bias.detach().softmax(0)[2])
    if name == "tis":
        assert scores[scores > 0].sub(likely).abs().max() < 1e-6
    elif name == "rise":
        masks = RandomMasks.draw(20, SIZE, 3, 0.5, seed=0)(torch.arange(20))
        expected = likely * F.avg_pool2d(masks[:, None], 8)[:, 0].mean(0) / 0.5
        torch.testing.assert_close(scores, expected.expand_as(scores), rtol=1e-4, atol=1e-6)
    else:
        assert (scores.flatten(1).amax(1) - scores.flatten(1).amin(1)).max() < 1e-6 * likely + 1e-6


def images_sent(name: str, model: nn.Module, images: Tensor) -> dict[str, int]:
    explainer, sent = get_explainer(name, model), 0

    def count(_: nn.Module, arguments: tuple[Tensor]) -> None:
        nonlocal sent
        sent += len(arguments[0])

    if name == "tis":  # which tries once whether tokens can be left out
        get_explainer(name, explainer.subject.adapter, masks=1)(images, 1)
    handle = model.register_forward_pre_hook(count)
    explainer(images, 1)
    handle.remove()
    return {"F": sent}


@pytest.mark.parametrize("name", METHODS)
def test_passes_with_the_defaults(name: str) -> None:
    torch.manual_seed(0)
    # 11 blocks of 96 channels: enough for 1024 centroids
    model = VisionTransformer((8, 24), 8, embed_dim=96, depth=11 if name == "tis" else 1, num_heads=2, num_classes=3)
    images = torch.randn(1, 3, 8, 24)
    assert images_sent(name, model.eval(), images) == passes_claimed(name, model, images, lighter=False)


def test_images_without_any_feature_are_said_to_be_flat() -> None:
    """On an image of equal patches, without positions, ViT-CX has no mask to ask about."""
    model = make_model("cls")
    with torch.no_grad():
        model.pos_embed.zero_()
    with pytest.warns(ExplanationWarning, match="vit_cx gave a constant map"):
        scores = get_explainer("vit_cx", model)(torch.ones(1, 3, *SIZE), 1).scores
    assert math.isclose(float(scores.abs().max()), 0.0)
