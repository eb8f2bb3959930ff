"""Exported models are explained as the modules that they were made from."""

from __future__ import annotations

import io
import warnings
from typing import Any, cast

import pytest
import torch
from families import make_images, make_model
from torch import Tensor, nn

from vitexplain import UnsupportedModelError, adapt, create_method, get_explainer, list_methods
from vitexplain.errors import InputError
from vitexplain.models.adapter import ModelAdapter
from vitexplain.models.batch_axis import free_batch
from vitexplain.models.black_box import BlackBoxAdapter
from vitexplain.models.discovery import DiscoveredAdapter
from vitexplain.models.exported import adapt_exported
from vitexplain.models.exported_input import flattened
from vitexplain.models.features import FeatureAdapter
from vitexplain.models.operators import operator_name, translate

INSIDE = [
    *("raw_attention", "rollout", "generic_attention", "tokentm", "gradcam", "contributions", "legrad"),
    *("transformer_attribution", "attnlrp", "attcat", "transition_attention", "tis", "vit_cx"),
]
OUTSIDE: dict[str, dict[str, Any]] = {
    "saliency": {},
    "input_x_gradient": {},
    "integrated_gradients": {"steps": 4},
    "smoothgrad": {"samples": 3},
    "gradient_shap": {"samples": 3},
    "occlusion": {},
    "feature_ablation": {},
    "kernel_shap": {"samples": 12},
    "rise": {"masks": 12},
    "random_scores": {},
    "centre_prior": {},
}


def export(model: nn.Module, images: Tensor, *, dynamic: bool = False, **options: Any) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter warns of is its own
        return torch.export.export(model, (images,), dynamic_shapes=shapes, **options)


def decomposed(model: nn.Module, images: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (images,)).run_decompositions()
    return cast("nn.Module", program.module())


def assert_same_maps(name: str, found: Any, original: Any, images: Tensor, **options: Any) -> None:
    expected = get_explainer(name, original, **options)(images, 2).scores
    scores = get_explainer(name, found, **options)(images, 2).scores
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return make_model("cls")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return make_images("cls", batch=3)


@pytest.fixture(scope="module", params=["one image", "any number"])
def exported(request: pytest.FixtureRequest, vit: nn.Module, images: Tensor) -> ModelAdapter:
    one = request.param == "one image"
    return adapt(export(vit, images[: 1 if one else 2], dynamic=not one).module())


@pytest.fixture(scope="module")
def closed(vit: nn.Module, images: Tensor) -> nn.Module:
    """Two images at a time, and nothing to be seen inside."""
    return decomposed(vit, images[:2])


@pytest.mark.parametrize("name", [*INSIDE, "saliency", "smoothgrad", "occlusion"])
def test_maps_are_those_of_the_module(name: str, exported: ModelAdapter, vit: nn.Module, images: Tensor) -> None:
    assert_same_maps(name, exported, vit, images, **OUTSIDE.get(name, {}))


@pytest.mark.parametrize("name", OUTSIDE)
def test_without_blocks_logits_suffice(name: str, closed: nn.Module, vit: nn.Module, images: Tensor) -> None:
    assert isinstance(adapt(closed), BlackBoxAdapter)
    assert_same_maps(name, closed, vit, images, **OUTSIDE[name])  # three images, by two


def test_methods_that_look_inside_are_refused_without_blocks(closed: nn.Module) -> None:
    adapter = adapt(closed)
    for name in list_methods(trainable=False):
        if name in OUTSIDE:
            adapter.check_needs(create_method(name).needs)
        else:
            with pytest.raises(UnsupportedModelError, match=r"taken apart \(.*native_layer_norm.*saliency"):
                adapter.check_needs(create_method(name).needs)
    with pytest.raises(UnsupportedModelError, match=r"Pass the torch\.nn\.Module"):
        get_explainer("auto", closed)
    with pytest.raises(UnsupportedModelError, match="only the logits"):
        get_explainer("saliency", closed, gradient="balanced")


def test_logits_of_a_fixed_number_of_images_are_those_of_any(closed: nn.Module, vit: nn.Module) -> None:
    adapter, images = adapt(closed), make_images("cls", batch=5)
    for count in (1, 2, 3, 5):
        torch.testing.assert_close(adapter.logits(images[:count]), vit(images[:count]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("attention_pool", 1),
        ("eva_rope", 4),
        ("hf_vit", 1),
        ("hf_beit", 1),
        ("torchvision", 1),
        ("own_batch_second", 3),
    ],
)
def test_families_are_seen_into(kind: str, prefix: int) -> None:
    model, images = make_model(kind), make_images(kind, batch=3)
    adapter = adapt(export(model, images[:2]))
    assert isinstance(adapter, DiscoveredAdapter)
    assert adapter.num_prefix_tokens == prefix
    for name in ("rollout", "contributions", "gradcam", *(["tis"] if kind == "hf_vit" else [])):
        assert_same_maps(name, adapter, model, images)


def test_a_batch_that_follows_the_images_does_so_in_multi_head_attention() -> None:
    model, images = make_model("torchvision"), make_images("torchvision", batch=3)
    program = export(model, images[:2], dynamic=True)
    for name in ("tokentm", "gradcam", "tis"):
        assert_same_maps(name, adapt(program), model, images)


class PlacedQueries(nn.Module):
    """Two blocks whose queries and keys have positions that values lack; dropout happens in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1, inplace=True), nn.Linear(32, 16))
            for _ in range(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        states = self.patches(images).flatten(2).transpose(1, 2)
        states = torch.cat([self.token.expand(len(states), -1, -1), states], 1)
        for attention, mlp, first, second in zip(
            self.attentions, self.mlps, self.norms[::2], self.norms[1::2], strict=True
        ):
            values = first(states)
            placed = values + self.places
            states = states + attention(placed, placed, values, need_weights=False)[0]
            states = states + mlp(second(states))
        logits: Tensor = self.head(states[:, 0])
        return logits


def test_keys_that_are_queries_are_told_from_keys_that_are_values() -> None:
    model, images = PlacedQueries().eval(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = DiscoveredAdapter(model, image_size=(32, 32))
    for name in ("rollout", "generic_attention"):
        assert_same_maps(name, adapt(export(model, images)), seen, images)


def test_convnets_have_their_last_feature_map() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 12, 3, 2, 1), nn.GELU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)).eval()
    images = make_images("cls", batch=3)
    adapter = adapt(export(model, images[:2]))
    assert isinstance(adapter, FeatureAdapter)
    assert_same_maps("gradcam", adapter, model, images)


def test_the_program_its_module_and_a_compiled_one_are_the_same(vit: nn.Module, images: Tensor) -> None:
    program = export(vit, images[:2])
    assert_same_maps("rollout", adapt(program), program.module(), images)
    assert_same_maps("rollout", torch.compile(program.module(), backend="eager"), vit, images)


def test_saved_programs_are_seen_into(vit: nn.Module, images: Tensor) -> None:
    file = io.BytesIO()
    torch.export.save(export(vit, images[:1]), file)
    file.seek(0)
    assert_same_maps("contributions", torch.export.load(file).module(), vit, images)


@pytest.mark.parametrize("name", ["contributions", "occlusion", "attnlrp"])
def test_the_exported_module_is_borrowed(name: str, vit: nn.Module, images: Tensor) -> None:
    module = export(vit, images[:2]).module()
    parameters = dict(module.named_parameters())
    next(iter(parameters.values())).requires_grad_(False)
    trainable = {key: each.requires_grad for key, each in parameters.items()}
    hooks = [(*each._forward_hooks, *each._forward_pre_hooks) for each in module.modules()]
    code, training, before = module.code, module.training, module(images[:2])
    get_explainer(name, module)(images, 2)
    with pytest.raises(InputError):
        get_explainer(name, module)(images.repeat(1, 1, 2, 2), 2)
    assert module.code == code
    assert module.training is training
    assert {key: each.requires_grad for key, each in module.named_parameters()} == trainable
    assert all(each.grad is None for each in parameters.values())
    assert [(*each._forward_hooks, *each._forward_pre_hooks) for each in module.modules()] == hooks
    torch.testing.assert_close(module(images[:2]), before, rtol=0, atol=0)


def test_weights_are_those_of_the_exported_module(vit: nn.Module, images: Tensor) -> None:
    module = export(vit, images[:2]).module()
    explainer, changed = get_explainer("generic_attention", module), make_model("cls")
    for model in (module, changed):
        with torch.no_grad():
            for key, each in model.named_parameters():
                if key.endswith("qkv.weight"):
                    each.mul_(1.5)
    expected = get_explainer("generic_attention", changed)(images, 2).scores
    torch.testing.assert_close(explainer(images, 2).scores, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["whole", "closed"])
def test_images_of_another_size_are_refused(kind: str, vit: nn.Module, images: Tensor, closed: nn.Module) -> None:
    module = export(vit, images[:1]).module() if kind == "whole" else closed
    adapter = adapt(module)
    twice = images.repeat(1, 1, 2, 2)  # as many numbers as four images
    with pytest.raises(InputError, match="expected"):
        get_explainer("rollout" if kind == "whole" else "saliency", adapter)(twice, 2)


class Small(nn.Module):
    """Patches, a mean over them, classes; with one thing that an export cannot hide.

    Args:
        twist: ``"batch"`` lets images interact, ``"random"`` adds noise, ``"tokens"`` returns no logits, ``"pixels"``
            has no patch convolution, ``"dropout"`` drops.
    """

    def __init__(self, twist: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 5)
        self.pixels, self.drop, self.twist = nn.Linear(3, 6), nn.Dropout(0.5), twist

    def forward(self, images: Tensor) -> Tensor:
        if self.twist == "pixels":
            states: Tensor = self.pixels(images.flatten(2).transpose(1, 2)).sin()
        else:
            states = self.patches(images).flatten(2).transpose(1, 2).sin()
        if self.twist == "random":
            states = states + torch.randn_like(states)
        if self.twist == "tokens":
            return states
        if self.twist == "batch":
            states = states - states.mean(0)
        logits: Tensor = self.head(self.drop(states).mean(1))
        return logits


class Merged(nn.Module):
    """Images side by side with heads, behind the tokens, and apart again."""

    def forward(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        tokens = images.flatten(2).permute(2, 0, 1).reshape(height * width, batch * 3, 1).transpose(0, 1)
        weights = (tokens * 3).softmax(1)
        return (weights * tokens.square()).reshape(batch, 3, height * width).sum(2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_images_beside_heads_are_freed(count: int) -> None:
    images = make_images("cls", batch=5)
    flat, taken = flattened(export(Merged(), images[:count]).module())
    translate(flat)
    with pytest.raises(RuntimeError):
        flat(images)
    free_batch(flat, taken.noise(None, 0))
    torch.testing.assert_close(flat(images), Merged()(images))


def test_images_that_interact_stay_together() -> None:
    images = make_images("cls", batch=4)
    model = Small("batch")
    adapter = adapt(export(model, images[:2]))
    assert isinstance(adapter, BlackBoxAdapter)
    assert adapter.grid((32, 48)) == (4, 6)
    expected = torch.cat([model.eval()(images[:2]), model(images[2:])])
    torch.testing.assert_close(adapter.logits(images), expected)
    with pytest.raises(UnsupportedModelError, match="computes something else on other numbers of images than 2"):
        get_explainer("gradcam", adapter)


def test_dropout_of_a_training_export_is_left_out() -> None:
    images, model = make_images("cls"), Small("dropout").train()
    module = export(model, images).module()
    torch.testing.assert_close(adapt(module).logits(images), model.eval()(images))


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        ("random", r"found 'randn_like'.*call model\.eval\(\)"),
        ("tokens", r"returns \(1, 24, 6\); expected logits"),
        ("pixels", r"no patch convolution.*grid=\(h, w\)"),
    ],
)
def test_what_cannot_be_explained_is_refused(twist: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        get_explainer("saliency", export(Small(twist), make_images("cls", batch=1)).module())


def test_a_grid_can_be_given() -> None:
    images = make_images("cls")
    module = export(Small("pixels").eval(), images).module()
    adapter = adapt_exported(module, grid=(2, 3))
    assert get_explainer("saliency", adapter)(images, 1).scores.shape == (2, 2, 3)


def test_graphs_of_more_than_images_are_refused(vit: nn.Module, images: Tensor) -> None:
    class Two(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return (one + other).mean((2, 3))

    module = torch.export.export(Two(), (images, images)).module()
    with pytest.raises(UnsupportedModelError, match="expected images alone"):
        adapt(module)


def test_operators_become_functions(vit: nn.Module, images: Tensor) -> None:
    flat, _ = flattened(export(vit, images[:2]).module())
    expected = flat(images[:2])
    translate(flat)
    assert {operator_name(node) for node in flat.graph.nodes} == {None}
    kinds = {type(each) for each in flat.modules()}
    assert {nn.Linear, nn.Conv2d, nn.LayerNorm} <= kinds
    torch.testing.assert_close(flat(images[:2]), expected, rtol=0, atol=0)


def test_errors_are_raised_and_not_printed(vit: nn.Module, images: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapt(export(vit, images[:1]))
    with pytest.raises((InputError, RuntimeError)):
        adapter.logits(images.double())
    assert capsys.readouterr().err == ""
