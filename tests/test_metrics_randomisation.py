"""The randomisation check: what is made random, on whose model, and what comes out."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import scipy.stats
import torch
from families import make_images, make_model
from test_contract import assert_same_state, disturb, state_of
from timm.models.cait import Cait
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from vitexplain import Explainer, Method, OptionError, TargetError, UnsupportedModelError, adapt, create_method
from vitexplain.metrics import RandomisationCheck, randomisation_check, randomisation_checks
from vitexplain.metrics.randomisation import _copied, _randomise, _stages

SMALL = {"img_size": (32, 48), "num_classes": 7}
BLOCKS = ["head", "block 2", "block 1", "block 0", "stem"]


def others(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "swin":
        return SwinTransformer(
            patch_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=3, **SMALL
        ).eval()
    if name == "cait":
        return Cait(patch_size=8, embed_dim=24, depth=2, num_heads=3, init_values=0.5, **SMALL).eval()
    return PyramidVisionTransformerV2(
        depths=(1, 1), embed_dims=(8, 16), num_heads=(1, 2), sr_ratios=(2, 1), mlp_ratios=(2, 2), num_classes=7
    ).eval()


def stages_of(model: nn.Module, images: Tensor) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = _stages(adapt(model), images)
    return {stage: [names[id(parameter)] for parameter in parameters] for stage, parameters in found}


# --------------------------------------------------------------------------------------------------------- stages


def test_every_weight_is_in_one_stage(family: str) -> None:
    model = make_model(family)
    stages = stages_of(model, make_images(family)[:1])
    found = [name for names in stages.values() for name in names]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    assert [stage for stage in BLOCKS if stage in stages] == list(stages)
    assert {"block 2", "block 1", "block 0", "stem"} <= stages.keys()


def test_stages_of_a_vision_transformer() -> None:
    stages = stages_of(make_model("registers"), make_images("registers"))
    assert [*stages] == BLOCKS
    assert stages["head"] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert all(name.startswith("blocks.1.") for name in stages["block 1"])
    assert {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight"} <= {*stages["stem"]}


def test_stages_of_an_attention_pool_and_of_what_blocks_share() -> None:
    pooled = stages_of(make_model("attention_pool"), make_images("attention_pool"))
    assert "attn_pool.latent" in pooled["head"]
    shared = stages_of(make_model("beit_shared_bias"), make_images("beit_shared_bias"))
    assert "rel_pos_bias.relative_position_bias_table" in shared["stem"]
    tied = make_model("cls")
    tied.blocks[2].mlp = tied.blocks[0].mlp
    stages = stages_of(tied, make_images("cls"))
    assert "blocks.0.mlp.fc1.weight" in stages["block 2"]
    assert not any("mlp" in name for name in stages["block 0"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swin", ["head", "block 3", "block 2", "block 1", "block 0", "stem"]),
        ("cait", ["head", "block 3", "block 2", "block 1", "block 0", "stem"]),
        ("pvt", ["head", "block 0", "stem"]),
    ],
)
def test_stages_of_models_beyond_plain_transformers(name: str, expected: list[str]) -> None:
    model = others(name)
    stages = stages_of(model, torch.randn(1, 3, 32, 48))
    assert [*stages] == expected
    assert sorted(each for names in stages.values() for each in names) == sorted(
        each for each, _ in model.named_parameters()
    )
    if name == "swin":  # tokens are merged between the two blocks of each stage
        assert "layers.1.downsample.reduction.weight" in stages["block 1"]
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    correlations = randomisation_check("gradcam", model, images).correlations
    assert [*correlations] == expected


def test_random_weights_keep_mean_and_deviation() -> None:
    weight, scale, flat = (nn.Parameter(each) for each in (torch.randn(400, 50) * 3 + 2, torch.randn(9), torch.ones(9)))
    before = [each.detach().clone() for each in (weight, scale, flat)]
    _randomise([weight, scale, flat], torch.Generator().manual_seed(0))
    assert weight.mean().item() == pytest.approx(before[0].mean().item(), abs=0.1)
    assert weight.std().item() == pytest.approx(before[0].std().item(), rel=0.02)
    assert abs(np.corrcoef(weight.detach().flatten(), before[0].flatten())[0, 1]) < 0.03
    assert not torch.equal(scale, before[1])
    assert torch.equal(flat, before[2])


# ------------------------------------------------------------------------------------------------------ the check


def by_hand(method: Method, kind: str, order: str, seed: int) -> dict[str, list[float]]:
    """The check with models that are made anew for each stage."""
    images, found = make_images(kind, 4), {}
    trained = Explainer(method, make_model(kind))(images)
    generator, lost = torch.Generator().manual_seed(seed), {}
    names = stages_of(make_model(kind), images[:1])
    for stage, members in names.items():
        weights = {each: value.detach() for each, value in make_model(kind).named_parameters()}
        drawn = {
            each: weights[each].mean()
            + weights[each].std(correction=0) * torch.randn(weights[each].shape, generator=generator)
            for each in members
        }
        lost = {**(lost if order == "cascading" else {}), **drawn}
        model = make_model(kind)
        model.load_state_dict({**model.state_dict(), **lost})
        scores = Explainer(method, model)(images, trained.targets).scores
        found[stage] = [
            scipy.stats.spearmanr(a, b).statistic
            for a, b in zip(trained.scores.flatten(1).numpy(), scores.flatten(1).numpy(), strict=True)
        ]
    return found


@pytest.mark.parametrize("order", ["cascading", "independent"])
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("tokentm", "registers", {}),
        ("tokentm", "torchvision", {"transformation": "literal"}),  # reads the weights that the adapter found
        ("rollout", "differential", {}),  # reads a number that the adapter computes from weights
        ("rollout", "own", {}),
    ],
)
def test_against_models_made_anew(name: str, kind: str, options: dict[str, str], order: str) -> None:
    method = create_method(name, **options)
    found = randomisation_check(method, make_model(kind), make_images(kind, 4), order=order, seed=3).correlations
    for stage, expected in by_hand(method, kind, order, 3).items():
        np.testing.assert_allclose(found[stage], expected, atol=0.01, err_msg=stage)


def test_a_method_that_does_not_look_at_the_head_does_not_change_with_it() -> None:
    model, images = make_model("cls"), make_images("cls", 3)
    alone = randomisation_check("raw_attention", model, images, order="independent").correlations
    assert alone["head"] == pytest.approx(1)
    assert all(abs(alone[stage]).min() < 0.99 for stage in BLOCKS[1:])
    assert randomisation_check("generic_attention", model, images).correlations["head"].max() < 0.99


def test_the_users_model_stays_as_it_is(family: str) -> None:
    model = make_model(family)
    disturb(model)
    before = state_of(model)
    method = "gradcam" if family in ("attention_pool", "own_attention_pool", "hf_siglip") else "raw_attention"
    randomisation_check(method, model, make_images(family))
    assert_same_state(before, state_of(model))


def test_the_copy_is_of_the_same_kind_and_shares_nothing() -> None:
    for family in ("differential", "own", "hf_vit"):
        model = make_model(family)
        adapter = adapt(model)
        copied = _copied(adapter, tuple(make_images(family).shape[-2:]))
        assert type(copied) is type(adapter)
        assert not {*map(id, model.parameters())} & {*map(id, copied.model.parameters())}
        mine = {*copied.model.modules()}
        assert all(each.block in mine and each.attention in mine for each in copied.blocks)


def test_the_class_explained_is_that_of_the_trained_model() -> None:
    model, images = make_model("cls"), make_images("cls", 4)
    predicted = model(images).argmax(1)
    expected = randomisation_check("generic_attention", model, images, predicted).correlations
    for targets in (None, predicted.tolist(), predicted.numpy()):
        found = randomisation_check("generic_attention", model, images, targets).correlations
        np.testing.assert_array_equal([*found.values()], [*expected.values()])
    other = randomisation_check("generic_attention", model, images, (predicted + 1) % 7).correlations
    assert not np.array_equal(other["head"], expected["head"])


def test_batches_and_seeds() -> None:
    model, images = make_model("cls"), make_images("cls", 5)
    first, again, other = (
        randomisation_check(create_method("rollout"), model, images, batch_size=size, seed=seed).correlations["stem"]
        for size, seed in ((None, 0), (2, 0), (None, 1))
    )
    np.testing.assert_allclose(first, again, atol=1e-6)
    assert not np.allclose(first, other)


def test_several_methods_at_some_stages_are_checked_together() -> None:
    model, images = make_model("cls"), make_images("cls", 3)
    names = ["rollout", "generic_attention"]
    found = randomisation_checks(names, model, images, stages=["block 1", "stem"], seed=4)
    for name, check in zip(names, found, strict=True):
        alone = randomisation_check(name, model, images, seed=4)
        assert check.method.info.name == name
        assert [*check.correlations] == ["block 1", "stem"]
        for stage, values in check.correlations.items():
            np.testing.assert_allclose(values, alone.correlations[stage], atol=1e-6)
        torch.testing.assert_close(check.scores, Explainer(create_method(name), model)(images).scores)
    with pytest.raises(OptionError, match="found the stages block 9, expected some of head, block 2"):
        randomisation_checks(names, model, images, stages=["head", "block 9"])


def test_constant_maps_have_no_correlation() -> None:
    model = make_model("cls")
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    check = randomisation_check("generic_attention", model, make_images("cls"))
    assert all(np.isnan(each).all() for each in check.correlations.values())
    estimate = check.estimates()["head"]
    assert estimate.n == 0
    assert math.isnan(estimate.value)


def test_the_summary_has_the_mean_of_each_stage_and_its_interval() -> None:
    check = randomisation_check("rollout", make_model("cls"), make_images("cls", 6))
    for stage, estimate in check.estimates(resamples=200).items():
        assert estimate.value == pytest.approx(check.correlations[stage].mean())
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.n == 6
    table = check.to_markdown().splitlines()
    assert len(table) == 2 + 5
    assert table[2].startswith("| head | 1 [1, 1]")


def test_each_stage_rests_on_its_own_images() -> None:
    correlations = {"head": np.array([0.5, *[np.nan] * 3]), "block 1": np.array([0.1, 0.2, 0.3, 0.4])}
    check = RandomisationCheck(create_method("rollout"), "cascading", correlations, torch.zeros(4, 2, 2))
    _, _, head, block = check.to_markdown().splitlines()
    assert head == "| head | 0.5 | 1 |"
    assert block.startswith("| block 1 | 0.25 [")
    assert block.endswith("] | 4 |")


def test_what_cannot_be_checked_is_refused() -> None:
    model, images = make_model("cls"), make_images("cls")
    with pytest.raises(OptionError, match="'cascading' or 'independent'"):
        randomisation_check("rollout", model, images, order="bottom up")
    for targets in ((0, 1), [[0, 1], [1, 2]], lambda logits: logits[:, 0]):
        with pytest.raises(TargetError, match="one map an image"):
            randomisation_check("rollout", model, images, targets)
    model.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match=r"cannot be copied .*lock.*copy\.deepcopy takes"):
        randomisation_check("rollout", model, images)
