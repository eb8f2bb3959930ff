"""Relevance methods against a slow walk down the layers, known cases, and the maps of the released code."""

from __future__ import annotations

import copy
import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from families import FEW_FAMILIES, SIZE, all_families, make_images, make_model, with_own_weights
from on_paper import FEATURES
from references import Trace
from relevance_references import AttnLRPReference, Baseline, Normalised, walk
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import Capture, Needs, UnsupportedModelError, create_method, explain_with, get_explainer
from vitexplain.patch_pixels import gather_by_patch
from vitexplain.relevance import RelevanceRules
from vitexplain.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")

TARGET = 4


def exact(family: str) -> tuple[nn.Module, Tensor, Tensor, int]:
    """A model and images in double precision, the head's seed row, and the number of prefix tokens."""
    kind = all_families()[family]
    count = kind.prefix + math.prod(kind.grid)
    assert kind.pooling is not None
    return make_model(family).double(), make_images(family).double(), kind.pooling(count).double(), kind.prefix


def assert_same_map(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    expected = expected.reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def rules_of(name: str, alpha: float = 1.0) -> Normalised:
    rules = Normalised() if name == "normalised" else Baseline()
    rules.alpha = alpha
    return rules


@pytest.mark.exact_states
@pytest.mark.parametrize("options", [{}, {"start_layer": 1}, {"alpha": 2.0}], ids=str)
def test_transformer_attribution_equals_dense_products(family: str, options: dict[str, Any]) -> None:
    model, images, seed, prefix = exact(family)
    found = get_explainer("transformer_attribution", model, **options)(images, TARGET).scores
    for image, map_ in zip(images, found, strict=True):
        trace = Trace(copy.deepcopy(model), image, TARGET, seed)
        relevance = walk(copy.deepcopy(model), image, TARGET, rules_of("normalised", options.get("alpha", 1.0)))
        identity = torch.eye(len(seed), dtype=torch.float64)
        product = identity
        for gradient, of_block in list(zip(trace.gradient, relevance.attention, strict=True))[
            options.get("start_layer", 0) :
        ]:
            product = (identity + (gradient * of_block).clamp(min=0).mean(0)) @ product
        assert_same_map(map_, (seed @ (product - identity))[prefix:])


@pytest.mark.exact_states
@pytest.mark.parametrize("rules", ["normalised", "baseline"])
def test_partial_and_full_lrp_equal_the_walk(family: str, rules: str) -> None:
    model, images, seed, prefix = exact(family)
    walks = [walk(copy.deepcopy(model), image, TARGET, rules_of(rules)) for image in images]
    full = get_explainer("full_lrp", model, rules=rules)(images, TARGET).scores
    pixels = torch.stack([each.pixels.sum(0) for each in walks])
    assert_same_map(full, gather_by_patch(pixels, (full.shape[1], full.shape[2]), mean=False), 1e-3)
    for layer in (-1, 0):
        partial = get_explainer("partial_lrp", model, rules=rules, layer=layer)(images, TARGET).scores
        rows = [seed @ each.attention[layer].clamp(min=0).mean(0) for each in walks]
        assert_same_map(partial, torch.stack(rows)[:, prefix:], 1e-3)


@pytest.mark.exact_states
@pytest.mark.parametrize(
    "options",
    [{}, {"attention": "constant"}, {"gamma": 0.3, "conv_gamma": 0.5}, {"epsilon": 0.1}, {"epsilon": 0.0}],
    ids=str,
)
def test_attnlrp_equals_the_walk(family: str, options: dict[str, Any]) -> None:
    model, images, _, _ = exact(family)
    given = {name: value for name, value in options.items() if name != "attention"}
    rules = AttnLRPReference(split=options.get("attention") != "constant", **given)
    found = get_explainer("attnlrp", model, **options)(images, TARGET).scores
    pixels = torch.stack([walk(copy.deepcopy(model), image, TARGET, rules).pixels.sum(0) for image in images])
    assert_same_map(found, gather_by_patch(pixels, (found.shape[1], found.shape[2]), mean=False))


@pytest.mark.parametrize("target", [0, 1])
def test_maps_known_on_paper(paper_model: nn.Module, target: int) -> None:
    """CLS gathers y_c = Σ_j A_j x_jc, one number a class; half of its relevance goes to A_j and half to x_jc."""
    image = torch.zeros(1, 3, 1, 3)
    image[0, :2, 0] = FEATURES.T
    scores = FEATURES[:, 0] / math.sqrt(2)
    unnormalised = torch.exp(scores)
    attention = unnormalised / (unnormalised.sum() + 1)  # 1 = exp(0): CLS itself
    part = attention * FEATURES[:, target]
    gathered = part.sum()
    assert gathered > 0
    positive = (FEATURES > 0).float()  # what is negative gives nothing to a positive weight
    expected = {
        "partial_lrp": (part / gathered / 2).clamp(min=0),
        "transformer_attribution": part * FEATURES[:, target] / gathered / 2,
        # half by the value's channel; a quarter by the key's, the other quarter to the query's bias
        "full_lrp": part / gathered * (positive[:, target] / 2 + positive[:, 0] / 4),
        "attnlrp": part / 2 + scores * attention * (FEATURES[:, target] - gathered) / 4,
    }
    for method, values in expected.items():
        found = get_explainer(method, paper_model)(image, target).scores[0, 0]
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-5, msg=lambda m, method=method: f"{method}: {m}")


def without_biases(depth: int = 3) -> Any:
    """A model in which nothing but pixels carries evidence."""
    torch.manual_seed(3)
    model = VisionTransformer(
        img_size=(16, 24), patch_size=8, embed_dim=24, depth=depth, num_heads=3, num_classes=7,
        class_token=False, global_pool="avg", pos_embed="none",
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model.eval().double()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_attnlrp_conserves_the_logit_where_attention_is_constant(gamma: float) -> None:
    model, images = without_biases(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    options = {"attention": "constant", "gamma": gamma}
    explanation = get_explainer("attnlrp", model, epsilon=0.0, **options)(images, 5)
    torch.testing.assert_close(explanation.scores.sum((1, 2)), explanation.logits[:, 5], rtol=1e-9, atol=1e-12)
    stabilised = get_explainer("attnlrp", model, epsilon=1e-6, **options)(images, 5)
    torch.testing.assert_close(stabilised.scores.sum((1, 2)), explanation.logits[:, 5], rtol=1e-3, atol=1e-4)
    assert (stabilised.scores != explanation.scores).any()


def test_a_dead_unit_in_half_precision_is_no_division_by_zero() -> None:
    model, images = make_model("cls"), make_images("cls")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3], model.blocks[1].mlp.fc1.bias[3] = 0, 0
    expected = get_explainer("attnlrp", model)(images, 1).scores
    found = get_explainer("attnlrp", copy.deepcopy(model).half())(images.half(), 1).scores
    assert found.isfinite().all()
    assert_same_map(found, expected, 0.05)


def test_half_of_what_attention_carries_goes_to_its_weights() -> None:
    """One block without queries, keys and feed-forward: a softmax of zeros takes what reaches the weights."""
    model, images = without_biases(depth=1), torch.randn(1, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:48] = 0.0
        model.blocks[0].mlp.fc2.weight.zero_()
    with Capture(model, Needs(states=frozenset({"in", "mid"}))) as capture:
        capture.forward(images)
    entering, pooled = (capture.blocks[0].state(kind).mean(1) for kind in ("in", "mid"))
    scale = model.fc_norm.weight / (pooled.var(-1, unbiased=False) + model.fc_norm.eps).sqrt()
    past_attention = ((entering - entering.mean()) * scale) @ model.head.weight[5]
    constant = get_explainer("attnlrp", model, epsilon=0.0, attention="constant")(images, 5)
    split = get_explainer("attnlrp", model, epsilon=0.0)(images, 5)
    total = constant.scores.sum()
    torch.testing.assert_close(total, constant.logits[0, 5])
    torch.testing.assert_close(split.scores.sum(), (past_attention[0] + total) / 2)


def test_relevance_is_shared_only_where_there_is_a_rule() -> None:
    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    model = make_model("cls")
    for block in model.blocks:
        block.mlp.act = Bent()
    for method in ("transformer_attribution", "partial_lrp", "full_lrp"):
        with pytest.raises(UnsupportedModelError, match=r"'tanh'.*no rule.*generic_attention"):
            get_explainer(method, model)(make_images("cls"), 1)


@pytest.mark.parametrize("name", ["transformer_attribution", "partial_lrp", "full_lrp"])
@pytest.mark.timm_families
def test_a_model_in_single_precision_gets_the_map_of_double_precision(name: str, family: str) -> None:
    model, images = make_model(family), make_images(family)
    if family == "differential" and name != "full_lrp":
        with pytest.raises(UnsupportedModelError, match="generic_attention"):
            get_explainer(name, model)(images, 1)
        return
    explanation = get_explainer(name, model)(images, 1)
    torch.testing.assert_close(explanation.logits, model(images).detach())
    single = explanation.scores
    half = get_explainer(name, copy.deepcopy(model).bfloat16())(images.bfloat16(), 1).scores
    rounded = get_explainer(name, copy.deepcopy(model).bfloat16().double())(images.bfloat16().double(), 1).scores
    double = get_explainer(name, model.double())(images.double(), 1).scores
    assert single.dtype == half.dtype == torch.float32
    assert_same_map(single.double(), double, 1e-4)
    if name != "transformer_attribution":  # whose gradient is that of the model in its own precision
        assert_same_map(half.double(), rounded, 1e-4)


def test_no_copy_of_the_weights_in_double_precision_is_held() -> None:
    model, images = make_model("cls"), make_images("cls")
    shapes = {parameter.shape for parameter in model.blocks[0].parameters() if parameter.ndim == 2}
    with Capture(model, Needs(attention_gradient=True, backward=RelevanceRules())) as capture:
        capture.backward(capture.forward(images)[:, 1].sum(), retain_graph=True)
        held = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.dtype == torch.float64]
        assert held
        assert not [each for each in held if each.shape in shapes]


def test_several_targets_are_one_forward_under_the_rules() -> None:
    model, images, count = make_model("cls"), make_images("cls"), 0

    def forward(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.register_forward_pre_hook(forward)
    targets = torch.tensor([[1, 4, 6], [0, 4, 2]])
    together = get_explainer("transformer_attribution", model)(images, targets).scores
    handle.remove()
    assert count == 2
    for index in range(3):
        alone = get_explainer("transformer_attribution", model)(images, targets[:, index]).scores
        torch.testing.assert_close(together[:, index], alone)


@pytest.mark.parametrize("kind", [*FEW_FAMILIES, "relative_positions", "several_attentions"])
def test_a_few_images_at_a_time_give_the_same_maps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make_model(kind), make_images(kind, batch=4)
    explainer = get_explainer("transformer_attribution", model)
    targets = torch.stack([torch.arange(len(images)) % 3, 2 - torch.arange(len(images)) % 2], 1)
    at_once = explainer(images, targets).scores
    counts: list[int] = []

    def count(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        counts.append(len([*inputs, *named.values()][0]))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    monkeypatch.setattr("vitexplain.relevance._AT_A_TIME", 3)
    in_parts = explainer(images, targets).scores
    handle.remove()
    assert counts == [3, 3, 1, 1]
    assert_same_map(in_parts, at_once, 1e-6)


@pytest.mark.parametrize("together", [False, True])
def test_every_form_of_target_is_cut_with_its_images(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make_model("cls"), make_images("cls", batch=5)
    methods = [create_method(name) for name in ("generic_attention", "transformer_attribution")[not together :]]
    forms: list[Any] = [None, 2, [0, 1, 2, 0, 1], ([0, 1, 2, 0, 1], 2), lambda logits: logits[[0, 1, 2, 3, 4], 1]]
    for form in forms:
        whole = explain_with(methods, Subject.of(model), images, form)
        with monkeypatch.context() as patched:
            patched.setattr("vitexplain.relevance._AT_A_TIME", 2)
            cut = explain_with(methods, Subject.of(model), images, form)
        for one, other in zip(whole, cut, strict=True):
            assert_same_map(other.scores, one.scores, 1e-6)
            assert (other.targets is None) == (one.targets is None) == callable(form)
            assert one.targets is None or torch.equal(other.targets, one.targets)
            torch.testing.assert_close(other.logits, one.logits)


def test_windows_of_a_few_images_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 3))
    explainer, images = get_explainer("transformer_attribution", model.eval()), torch.randn(3, 3, 32, 32)
    at_once = explainer(images, [1, 2, 3]).scores
    monkeypatch.setattr("vitexplain.relevance._AT_A_TIME", 2)
    assert_same_map(explainer(images, [1, 2, 3]).scores, at_once, 1e-6)


def test_methods_of_different_rules_share_one_capture() -> None:
    model, images = make_model("registers"), make_images("registers")
    methods = [
        create_method(name, **options)
        for name, options in (
            ("rollout", {}),
            ("generic_attention", {}),
            ("generic_attention", {"gradient": "balanced"}),
            ("attnlrp", {}),
            ("transformer_attribution", {}),
            ("partial_lrp", {}),
        )
    ]
    together = explain_with(methods, Subject.of(model), images, (2, 5))
    for method, explanation in zip(methods, together, strict=True):
        (alone,) = explain_with([method], Subject.of(model), images, (2, 5))
        torch.testing.assert_close(explanation.scores, alone.scores, rtol=1e-5, atol=1e-7)


def test_relevance_that_is_shared_by_totals_goes_back_for_and_against_apart() -> None:
    """Together the two are zero, and a share of zero is what rounding leaves."""
    model, images = make_model("cls"), make_images("cls")
    found = []
    for classes, signs in (((2,), (1,)), ((5,), (1,)), ((2, 5), (1, -1)), ((2, 5), (3, -0.5))):
        with Capture(model, Needs(attention_gradient=True, backward=RelevanceRules())) as capture:
            logits = capture.forward(images)
            capture.backward((logits[:, classes] * torch.tensor(signs)).sum())
        found.append(torch.stack([block.output_gradient for block in capture.blocks]))
    torch.testing.assert_close(found[2], found[0] - found[1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found[3], 3 * found[0] - 0.5 * found[1], rtol=1e-5, atol=1e-8)


def test_relevance_of_a_contrast_starts_from_both_classes() -> None:
    """Rules that are linear in the relevance of the output: the map of a against b is that of a minus that of b."""
    model, images = make_model("cls").double(), make_images("cls").double()
    explainer = get_explainer("attnlrp", model)
    contrast = explainer(images, (2, 5)).scores
    torch.testing.assert_close(contrast, explainer(images, 2).scores - explainer(images, 5).scores)


@pytest.mark.parametrize("rules", [RelevanceRules(), RelevanceRules(normalised=False)], ids=str)
def test_relevance_of_attention_is_the_product_of_attention_and_what_is_recorded(rules: RelevanceRules) -> None:
    model, images, _, _ = exact("mean_pooled")
    with Capture(model, Needs(attention_gradient=True, backward=rules)) as capture:
        capture.backward(capture.forward(images)[:, TARGET].sum())
    reference = walk(
        copy.deepcopy(model), images[1], TARGET, rules_of("normalised" if rules.normalised else "baseline")
    )
    for block, expected in zip(capture.blocks, reference.attention, strict=True):
        assert_same_map((block.attention() * block.attention_gradient())[1], expected)


@pytest.fixture(scope="module")
def released(test_data: Path, goldens: Path) -> tuple[dict[str, nn.Module], Any, Any]:
    """Models with the released code's norm, its inputs, and its maps in double precision."""
    models = {}
    for name in ("vit_tiny", "deit_tiny"):
        models[name] = timm.create_model(f"{name}_patch16_224").eval()
        models[name].load_state_dict(load_file(test_data / f"{name}_patch16_224_in1k" / "model.safetensors"))
        models[name].norm.eps = 1e-5
    return models, np.load(goldens / "inputs.npz"), np.load(goldens / "chefer_cvpr21_f64.npz")


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer_attribution_start0": ("transformer_attribution", {}),
    "transformer_attribution_start1": ("transformer_attribution", {"start_layer": 1}),
    "partial_lrp_ours": ("partial_lrp", {"rules": "normalised"}),
    "partial_lrp_orig": ("partial_lrp", {}),
    "full_lrp_ours_patchsum": ("full_lrp", {"rules": "normalised"}),
    "full_lrp_orig_patchsum": ("full_lrp", {}),
}


def error(found: Tensor, expected: Any) -> float:
    expected = torch.from_numpy(expected.astype(np.float64)).reshape(found.shape)
    return float((found.double() - expected).abs().max() / expected.abs().max())


class InPlace(nn.Module):
    """A block with norms behind its branches, whose residual sum overwrites what attention read; or does not."""

    def __init__(self, overwrites: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.overwrites = nn.Linear(16, 48), nn.Linear(16, 16), overwrites
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, states: Tensor) -> Tensor:
        q, k, v = self.qkv(states).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        states = states.add_(mixed) if self.overwrites else states + mixed
        states = self.norms[0](states)
        normed: Tensor = self.norms[1](states + self.mlp(states))
        return normed


class InPlaceModel(nn.Module):
    """Two such blocks behind patches and a class token."""

    def __init__(self, overwrites: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList(InPlace(overwrites) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        states = self.patches(images).flatten(2).transpose(1, 2)
        states = torch.cat([self.token.expand(len(states), -1, -1), states], 1)
        for block in self.blocks:
            states = block(states)
        logits: Tensor = self.head(states[:, 0])
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_that_a_model_overwrites_are_held_as_they_were(dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)
    models = [InPlaceModel(overwrites).to(dtype).eval() for overwrites in (True, False)]
    maps = [get_explainer("transformer_attribution", model)(images, 1).scores for model in models]
    torch.testing.assert_close(*maps, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("transformer_attribution", {}), ("full_lrp", {}), ("attnlrp", {}), ("tokentm", {"transformation": "literal"})],
)
def test_heads_that_share_keys_and_values_are_as_heads_with_equal_ones(name: str, options: dict[str, Any]) -> None:
    size: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 6}
    rope = {"attn_type": "rope", "qkv_fused": False, "use_rot_pos_emb": True}
    torch.manual_seed(0)
    shared, apart = (with_own_weights(Eva(**size, **rope, num_kv_heads=heads)).double() for heads in (3, 6))
    weights = shared.state_dict()
    for key in [key for key in weights if "k_proj" in key or "v_proj" in key]:
        weights[key] = weights[key].unflatten(0, (3, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    apart.load_state_dict(weights)
    images = make_images("eva").double()
    found, expected = (get_explainer(name, model, **options)(images, TARGET).scores for model in (shared, apart))
    assert_same_map(found, expected)


def test_the_kernel_may_share_keys_and_values() -> None:
    q, k, v, arriving = torch.randn(4, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves = [q, k[:, :2].clone(), v[:, :2].clone()]
    repeated = [q, *(each.repeat_interleave(2, dim=1) for each in leaves[1:])]
    found, expected = [], []
    for states, relevance, shared in ((leaves, found, True), (repeated, expected, False)):
        states = [each.requires_grad_() for each in states]
        with RelevanceRules().watching(2, "BND"):
            output = F.scaled_dot_product_attention(*states, enable_gqa=shared)
        relevance += torch.autograd.grad(output, states, arriving)
    expected[1:] = [each.unflatten(1, (2, 2)).sum(2) for each in expected[1:]]
    torch.testing.assert_close(found, expected)


@pytest.mark.parity
def test_maps_of_the_released_code_in_double_precision(released: tuple[dict[str, nn.Module], Any, Any]) -> None:
    models, inputs, maps = released
    keys = [key.rpartition("/")[0] for key in maps.files if key.endswith("/partial_lrp_orig")][::5]
    assert {key.split("/")[0] for key in keys} == set(models)
    methods = [create_method(name, **options) for name, options in VARIANTS.values()]
    for key in keys:
        name, image, label = key.split("/")
        model = copy.deepcopy(models[name]).double()
        images = torch.from_numpy(inputs[f"{name}/{image}"])[None].double()
        for variant, found in zip(VARIANTS, explain_with(methods, Subject.of(model), images, int(label)), strict=True):
            assert error(found.scores[0], maps[f"{key}/{variant}"]) < 1e-6, (key, variant)


@pytest.mark.parity
def test_maps_of_a_model_in_single_precision_are_those_of_double_precision(
    released: tuple[dict[str, nn.Module], Any, Any],
) -> None:
    models, inputs, maps = released
    checked = 0
    for key in maps.files:
        name, image, label, variant = key.split("/")
        if variant != "transformer_attribution_start1":
            continue
        images = torch.from_numpy(inputs[f"{name}/{image}"])[None]
        found = get_explainer("transformer_attribution", models[name], start_layer=1)(images, int(label)).scores
        assert error(found[0], maps[key]) < 1e-4, key
        checked += 1
    assert checked == 22
