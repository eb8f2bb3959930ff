"""Models are borrowed: what is switched off for a call is off inside, and on again behind it."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import pytest
import torch
from families import make_images, make_model
from lighter import get_explainer
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.utils.checkpoint import checkpoint

from vitexplain import UnsupportedModelError
from vitexplain.borrowing import attributes_set, borrowed
from vitexplain.metrics.predictor import Predictor


def test_everything_is_put_back_after_an_error() -> None:
    model: Any = make_model("cls")
    model.train()
    model.blocks[0].eval()
    model.blocks[1].grad_checkpointing = True
    model.blocks[2].requires_grad_(False)
    before = [(module.training, getattr(module, "grad_checkpointing", None)) for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), borrowed(model):  # noqa: PT012 - what holds inside is asked inside
        assert not any(module.training or getattr(module, "grad_checkpointing", False) for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
    assert before == [(module.training, getattr(module, "grad_checkpointing", None)) for module in model.modules()]
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["legrad", "generic_attention", "gradcam", "transformer_attribution", "rollout"])
@pytest.mark.parametrize("whole", [False, True])
def test_modules_that_were_compiled_in_place_are_explained_as_they_are(name: str, whole: bool) -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = get_explainer(name, model)(images, 1).scores
    compiled: list[nn.Module] = [model] if whole else list(model.blocks)  # type: ignore[arg-type]
    for module in compiled:
        module.compile(backend="eager")
    with torch.no_grad():
        model(images)  # compiled now
    calls = [module._compiled_call_impl for module in compiled]
    torch.testing.assert_close(get_explainer(name, model)(images, 1).scores, expected)
    assert [module._compiled_call_impl for module in compiled] == calls


class FirstBlockApart(nn.Sequential):
    """Blocks of which the first runs in another way."""

    how: str = ""

    def forward(self, tokens: Tensor) -> Tensor:
        first, *others = self
        if self.how == "frozen":
            with torch.no_grad():
                tokens = first(tokens)
        elif self.how == "detached":
            tokens = first(tokens).detach()
        else:
            tokens = checkpoint(first, tokens, use_reentrant=self.how == "reentrant")
        for each in others:
            tokens = each(tokens)
        return tokens


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("frozen", "runs where gradients are switched off"),
        ("reentrant", "runs where gradients are switched off"),
        ("detached", "is not joined to"),
        ("checkpointed", "a second time in the backward pass"),
    ],
)
@pytest.mark.parametrize("name", ["generic_attention", "tokentm", "attcat", "gmar", "transformer_attribution"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_parts_without_a_gradient_are_refused_and_not_taken_for_nothing(name: str, how: str, reason: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = {each: get_explainer(each, model)(images, 1).scores for each in ("rollout", "gradcam")}
    model.blocks = FirstBlockApart(*model.blocks)  # type: ignore[arg-type]
    model.blocks.how = how
    with pytest.raises(UnsupportedModelError, match=reason):
        get_explainer(name, model)(images, 1)
    for each, scores in expected.items():  # which ask for no gradient there
        torch.testing.assert_close(get_explainer(each, model)(images, 1).scores, scores)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["tokentm", "transition_attention", "attcat"])
def test_a_refusal_in_the_middle_of_placing_hooks_leaves_none(name: str) -> None:
    parallel, other, images = make_model("parallel"), make_model("cls"), make_images("cls")
    expected = get_explainer("rollout", other)(images).scores
    with contextlib.suppress(UnsupportedModelError):
        get_explainer(name, parallel)(make_images("parallel"), 1)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in parallel.modules())
    with torch.no_grad():
        parallel(make_images("parallel"))
    torch.testing.assert_close(get_explainer("rollout", other)(images).scores, expected)


@pytest.mark.parametrize("switch", ["use_checkpoint", "with_cp"])
def test_checkpointing_by_a_switch_is_switched_off_meanwhile(switch: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = get_explainer("generic_attention", model)(images, 1).scores
    blocks = FirstBlockApart(*model.blocks)  # type: ignore[arg-type]
    setattr(blocks, switch, True)

    def forward(tokens: Tensor) -> Tensor:
        for each in blocks:
            tokens = checkpoint(each, tokens, use_reentrant=False) if getattr(blocks, switch) else each(tokens)
        return tokens

    blocks.forward = forward  # type: ignore[method-assign]
    model.blocks = blocks
    torch.testing.assert_close(get_explainer("generic_attention", model)(images, 1).scores, expected)
    assert getattr(blocks, switch) is True


def test_hooks_that_a_library_leaves_on_a_model_are_taken_off() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=7
    )
    model, images = transformers.SwinForImageClassification(config).eval(), torch.randn(1, 3, 32, 32)

    def marks() -> list[tuple[set[str], int]]:
        return [(set(vars(each)), len(each._forward_hooks)) for each in model.modules()]

    before = marks()
    get_explainer("gradcam", model)(images, 1)
    with pytest.raises(UnsupportedModelError):
        get_explainer("rollout", model)(images)
    assert marks() == before
    model(images, output_hidden_states=True)  # these are the user's
    before = marks()
    get_explainer("gradcam", model)(images, 1)
    assert marks() == before


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        model = make_model("cls")
    list(model.parameters())[1].requires_grad = False  # type: ignore[assignment]
    assert all(parameter.is_inference() for parameter in model.parameters())
    return model


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["rollout", "occlusion", "tis", "eigencam", "kernel_shap", "pm"])
def test_a_model_made_in_inference_mode_is_explained_without_gradients(name: str, inside: bool) -> None:
    model, images = made_in_inference_mode(), make_images("cls")
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode(inside):
        found = get_explainer(name, model)(images, 1).scores
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.equal(found, get_explainer(name, copy.deepcopy(model))(images, 1).scores)


def test_metrics_ask_a_model_made_in_inference_mode() -> None:
    model, images = made_in_inference_mode(), make_images("cls")
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    logits = Predictor.of(model).logits(images)
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.equal(logits, Predictor.of(copy.deepcopy(model)).logits(images))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "name", ["generic_attention", "gradcam", "integrated_gradients", "legrad", "saliency", "transformer_attribution"]
)
def test_no_gradient_goes_through_a_model_made_in_inference_mode(name: str, frozen: bool) -> None:
    model, images = made_in_inference_mode(), make_images("cls")
    if frozen:
        for parameter in model.parameters():
            parameter.requires_grad = False
    model.train()
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UnsupportedModelError, match=r"made inside torch\.inference_mode.*copy\.deepcopy\(model\)"):
        get_explainer(name, model)(images, 1)
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert all(module.training for module in model.modules())
    expected = get_explainer(name, make_model("cls"))(images, 1).scores
    assert torch.equal(get_explainer(name, copy.deepcopy(model))(images, 1).scores, expected)


def test_no_gradient_goes_through_a_buffer_made_in_inference_mode() -> None:
    model: Any = make_model("cls")
    with torch.inference_mode():
        model.norm.register_buffer("scale", torch.ones(1))
    model.norm.register_forward_hook(lambda module, _, output: output * module.scale)
    with pytest.raises(UnsupportedModelError, match="buffers made inside"):
        get_explainer("gradcam", model)(make_images("cls"), 1)
    explained = get_explainer("gradcam", copy.deepcopy(model))(make_images("cls"), 1)
    assert explained.scores.isfinite().all()


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
def test_a_model_found_out_by_gradients_is_refused_if_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = make_model("torchvision")
    with pytest.raises(UnsupportedModelError, match=r"made inside torch\.inference_mode"):
        get_explainer("rollout", model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert get_explainer("rollout", copy.deepcopy(model))(make_images("torchvision")).scores.isfinite().all()


class _Linked:
    """Writing its attribute writes that of what it holds, as a configuration does with those of its parts."""

    def __init__(self, own: str, *parts: _Linked) -> None:
        self._own, self._parts = own, parts

    @property
    def kind(self) -> str:
        return self._own

    @kind.setter
    def kind(self, value: str) -> None:
        self._own = value
        for part in self._parts:
            part.kind = value


@pytest.mark.parametrize("own", [("eager", "fused"), ("fused", "eager"), ("eager", "eager"), ("fused", "fused")])
def test_attributes_that_write_each_other_are_put_back(own: tuple[str, str]) -> None:
    part = _Linked(own[1])
    whole = _Linked(own[0], part)
    with attributes_set([whole, part], "kind", "fused"):
        assert (whole.kind, part.kind) == ("fused", "fused")
    assert (whole.kind, part.kind) == own


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["rollout", "occlusion", "eigencam", "pm"])
def test_a_quantised_model_is_explained_without_gradients(name: str) -> None:
    images, quantised = make_images("cls"), quantize_dynamic(make_model("cls"), {nn.Linear})
    expected = get_explainer(name, make_model("cls"))(images, 1).scores.flatten()
    found = get_explainer(name, quantised)(images, 1).scores.flatten()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("part", ["mlp", "whole"])
@pytest.mark.parametrize(
    "name", ["generic_attention", "attnlrp", "legrad", "full_lrp", "smoothgrad", "integrated_gradients"]
)
def test_no_gradient_goes_through_quantised_layers(name: str, part: str) -> None:
    """Around a quantised feed-forward branch it goes through the residual alone, and looks like one."""
    model: Any = make_model("cls")
    for block in model.blocks:
        block.mlp = quantize_dynamic(block.mlp, {nn.Linear})
    if part == "whole":
        model = quantize_dynamic(model, {nn.Linear})
    with pytest.raises(UnsupportedModelError, match=r"quantised layers \(Linear\).*such as rollout or occlusion"):
        get_explainer(name, model)(make_images("cls"), 1)
    for works in ("rollout", "occlusion"):
        assert get_explainer(works, model)(make_images("cls"), 1).scores.isfinite().all()


@pytest.mark.parametrize("name", ["rollout", "gradcam", "occlusion"])
def test_a_model_without_weights_is_refused(name: str) -> None:
    explainer = get_explainer(name, make_model("cls").to("meta"))
    with pytest.raises(UnsupportedModelError, match=r"on the meta device.*load them"):
        explainer(make_images("cls"), 1)


def normalised_in_place(_: nn.Module, arguments: tuple[Tensor]) -> None:
    arguments[0].sub_(0.5).div_(0.25)


def normalised(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return ((arguments[0] - 0.5) / 0.25,)


@pytest.mark.parametrize("kind", ["cls", "own", "swin"])
@pytest.mark.parametrize("name", ["gradcam", "contributions", "input_x_gradient", "transition_attention", "occlusion"])
def test_a_model_may_normalise_its_images_in_place(name: str, kind: str) -> None:
    """Each forward is of the images as they were given, and these stay so."""
    if kind == "swin":
        make: Any = partial(SwinTransformer, 64, 4, embed_dim=12, depths=(2, 1), num_heads=(2, 4), num_classes=7)
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    else:
        make, images = partial(make_model, kind), make_images(kind)
    scores = []
    for hook in (normalised, normalised_in_place):
        torch.manual_seed(0)
        model = make().eval()
        model.register_forward_pre_hook(hook)
        given = images.clone()
        try:
            explanation = get_explainer(name, model)(given, 1)
        except UnsupportedModelError:
            assert (name, kind) in {("transition_attention", "swin"), ("contributions", "swin")}
            return
        assert torch.equal(given, images)
        assert torch.equal(explanation.inputs, images)  # type: ignore[arg-type]
        scores.append(explanation.scores)
    torch.testing.assert_close(*scores)
