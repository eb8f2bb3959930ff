"""What every method must do on every family, whatever it computes: parametrised over the registry."""

from __future__ import annotations

import copy
import functools
import gc
import sys
from typing import Any

import pytest
import torch
from families import NOT_DEFINED, all_families, make_images, make_model
from lighter import LIGHTER, get_explainer, method_options, passes_claimed
from torch import Tensor, nn

from vitexplain import (
    Capture,
    Explainer,
    UnsupportedModelError,
    adapt,
    create_method,
    explain_with,
    list_methods,
    method_info,
)
from vitexplain.short_last_block import ShortLastBlock
from vitexplain.subject import Subject

# tiny random models have targets that no patch supports; that is said, and not what is tested here
pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")


def explain(method: str, model: nn.Module, images: Tensor, target: Any = None, **options: Any) -> Tensor:
    return get_explainer(method, model, **options)(images, target).scores


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [each.block for each in adapt(model).blocks]


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return getattr(output, "logits", output).detach()


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a borrower could leave changed."""
    return {
        "modes": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for m in model.modules()
        ],
        "forward": ["forward" in vars(module) for module in model.modules()],
        "fused": [getattr(module, "fused_attn", None) for module in model.modules()],
        "configured": [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in model.modules()],
        "dtype": [parameter.dtype for parameter in model.parameters()],
        "values": [parameter.detach().clone() for parameter in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def disturb(model: nn.Module) -> None:
    """An uneven state: some modules training, some weights frozen, some gradients there, one block unfused."""
    model.train()
    blocks_of(model)[1].eval()
    for module in blocks_of(model)[0].modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 2:
            parameter.grad = torch.full_like(parameter, 0.5)


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key in ("grad", "values"):
            for old, new in zip(value, after[key], strict=True):
                assert (old is None) == (new is None)
                if old is not None:
                    torch.testing.assert_close(old, new, rtol=0, atol=0)
        else:
            assert value == after[key], key


@pytest.mark.each_family
def test_shape_and_finiteness(method: str, family: str, model: nn.Module, images: Tensor) -> None:
    explanation = get_explainer(method, model)(images)
    assert explanation.scores.shape == (2, *all_families()[family].grid)
    assert explanation.scores.isfinite().all()
    assert explanation.scores.flatten(1).std(dim=1).min() > 0
    assert explanation.grid == all_families()[family].grid
    assert explanation.image_size == all_families()[family].size
    torch.testing.assert_close(explanation.targets, logits_of(model, images).argmax(1))


@pytest.mark.few_families
def test_logits_are_those_of_the_model(method: str, model: nn.Module, images: Tensor) -> None:
    torch.testing.assert_close(get_explainer(method, model)(images).logits, logits_of(model, images))


def test_batch_equals_loop(method: str, family: str, model: nn.Module) -> None:
    images, target = make_images(family, batch=3), [0, 5, 2]
    explainer = get_explainer(method, model)
    together = explainer(images, target).scores
    # relevance is divided by sums that cancel, and shows how products of another number of images are rounded
    atol = 1e-6 if explainer.method.needs.backward is None else 2e-4 * float(together.abs().max())
    for index in range(3):
        alone = explainer(images[index : index + 1], [target[index]]).scores
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=atol)
    by_two = explainer(images, target, batch_size=2)
    torch.testing.assert_close(by_two.scores, together, rtol=1e-4, atol=atol)
    assert by_two.targets.tolist() == target


def test_several_targets_equal_several_runs(method: str, model: nn.Module, images: Tensor) -> None:
    targets = torch.tensor([[1, 4, 6], [0, 4, 2]])
    explainer = get_explainer(method, model)
    together = explainer(images, targets).scores
    assert together.shape[:2] == (2, 3)
    for k in range(3):
        torch.testing.assert_close(together[:, k], explainer(images, targets[:, k]).scores, rtol=1e-5, atol=1e-7)


@pytest.mark.few_families
def test_fused_equals_eager(method: str, family: str, model: nn.Module, images: Tensor) -> None:
    fused = explain(method, model, images, 3)
    switches = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for module in switches:
        module.fused_attn = False
    configurable = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    if configurable:
        configurable[0].set_attn_implementation("eager")
    elif not family.startswith("own") and family != "torchvision":  # those have one way to compute attention
        assert len(switches) >= len(blocks_of(model))
    torch.testing.assert_close(explain(method, model, images, 3), fused, rtol=1e-4, atol=1e-6)


def test_claim_class_specific(method: str, model: nn.Module, images: Tensor) -> None:
    explainer = get_explainer(method, model)
    ours, theirs = (explainer(images, target).scores for target in (1, 4))
    if method_info(method).class_specific:
        assert (ours - theirs).abs().max() > 1e-3 * ours.abs().max()
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.few_families
def test_claim_signed(method: str, family: str) -> None:
    lowest = min(
        explain(method, make_model(family), make_images(family, seed=seed), target).min().item()
        for seed in range(3)
        for target in (1, 4)
    )
    if family == "differential" and method == "raw_attention":
        assert lowest < 0  # A₁ - λ A₂ itself
        return
    assert (lowest < 0) == method_info(method).signed
    assert create_method(method).signed == method_info(method).signed


@pytest.mark.few_families
def test_claim_passes(method: str, model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = {"F": 0, "B": 0}
    gradient = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(inputs, Tensor) and inputs.ndim == 2):  # from the score to the logits is no way at all
            passes["B"] += len(outputs) if isinstance(outputs, tuple) else len(images)
        return gradient(outputs, inputs, *args, **kwargs)

    def forward(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        passes["F"] += len(next(iter([*arguments, *named.values()])))

    monkeypatch.setattr(torch.autograd, "grad", counted)
    explainer = get_explainer(method, model)
    explainer(images)  # finding out how a model works may take passes of its own
    passes.update(F=0, B=0)
    handle = model.register_forward_pre_hook(forward, with_kwargs=True)
    explainer(images)
    handle.remove()
    assert {name: count for name, count in passes.items() if count} == passes_claimed(method, model, images)


def test_model_is_given_back_as_it_was(method: str, model: nn.Module, images: Tensor) -> None:
    expected = explain(method, model, images, 2)
    disturb(model)
    before = state_of(model)
    # training mode, dropout and frozen weights of the borrowed model do not change the answer either
    torch.testing.assert_close(explain(method, model, images, 2), expected, rtol=1e-4, atol=1e-6)
    assert_same_state(before, state_of(model))


@pytest.mark.few_families
def test_model_is_given_back_after_an_exception(method: str, model: nn.Module, images: Tensor) -> None:
    disturb(model)
    explainer = get_explainer(method, model)
    before = state_of(model)

    def fail(*_: Any) -> None:
        raise KeyError("deep inside the model")

    handle = blocks_of(model)[-1].register_forward_hook(fail)
    during = state_of(model)
    try:
        explainer(images)
    except KeyError:
        # the traceback is alive here: nothing may depend on its frames being collected
        assert sys.exc_info()[2] is not None
        assert_same_state(during, state_of(model))
    else:
        pytest.fail("the model's own exception was lost")
    handle.remove()
    assert_same_state(before, state_of(model))
    with pytest.raises(LookupError, match="in the target"):
        explainer(images, _raise)
    assert_same_state(before, state_of(model))
    assert explainer(images, 2).scores.isfinite().all()


def _raise(logits: Tensor) -> Tensor:
    raise LookupError("in the target")


def test_repeated_calls_leave_nothing_behind(method: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    explainer = get_explainer(method, model)

    def live_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    explainer(images)
    before = live_tensors()
    for _ in range(200):
        explainer(images)
    assert live_tensors() <= before


@pytest.mark.few_families
def test_bfloat16_is_near_float32(method: str, family: str, model: nn.Module, images: Tensor) -> None:
    # weights and images are rounded on both sides: relevance that is divided by what crosses zero follows any change
    images = images.bfloat16().float()
    exact = explain(method, copy.deepcopy(model).bfloat16().float(), images, 1)
    rough = explain(method, model.bfloat16(), images, 1)
    assert rough.dtype == exact.dtype
    # random weights amplify rounding; real ones do not (see test_parity.py)
    assert (rough - exact).norm() < 0.3 * exact.norm()


@pytest.mark.few_families
def test_float64_stays_float64(method: str, model: nn.Module, images: Tensor) -> None:
    exact = explain(method, model.double(), images, 1)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(explain(method, model.float(), images, 1).double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.few_families
def test_works_inside_inference_mode_and_no_grad(method: str, model: nn.Module, images: Tensor) -> None:
    expected = explain(method, model, images, 1)
    with torch.no_grad():
        torch.testing.assert_close(explain(method, model, images, 1), expected)
    with torch.inference_mode():
        inside = images * 1.0
        torch.testing.assert_close(explain(method, model, inside, 1), expected)


@pytest.mark.few_families
def test_constant_image_does_not_crash(method: str, family: str, model: nn.Module, images: Tensor) -> None:
    assert explain(method, model, torch.zeros_like(images)).isfinite().all()


def test_other_sizes_on_a_dynamic_model(method: str) -> None:
    model = make_model("dynamic")
    for height, width in ((32, 48), (8, 24), (72, 24)):
        scores = explain(method, model, torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1)))
        assert scores.shape == (1, height // 8, width // 8)


@pytest.mark.few_families
def test_attribute_is_captum_shaped(method: str, model: nn.Module, images: Tensor) -> None:
    explainer = get_explainer(method, model)
    attribution = explainer.attribute(images, target=2)
    assert attribution.shape == images.shape
    expected = torch.nn.functional.interpolate(
        explainer(images, 2).scores[:, None].float(), images.shape[-2:], mode="bilinear"
    )
    torch.testing.assert_close(attribution, expected.expand_as(images))


@functools.cache
def _together(family: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Scores by methods that share one capture."""
    model = make_model(family)
    methods = [create_method(name, **method_options(name, model)) for name in names]
    explanations = explain_with(methods, Subject.of(model), make_images(family), 1)
    return {name: each.scores for name, each in zip(names, explanations, strict=True)}


def test_takes_part_in_a_shared_capture(method: str, family: str, model: nn.Module, images: Tensor) -> None:
    """A method reads the same from a capture that was made for more than it asked for."""
    quick = tuple(each for each in list_methods() if (each, family) not in NOT_DEFINED and each not in LIGHTER)
    shared = _together(family, (method, quick[0]) if method in LIGHTER else quick)[method]
    adapter = adapt(model)
    layouts = adapter.layouts(adapter.grid((images.shape[-2], images.shape[-1])))
    # alone, the last block may be computed for fewer tokens, which is another product to round
    rounded = bool(layouts) and ShortLastBlock.of(adapter, layouts[-1].count) is not None
    alone = explain(method, model, images, 1)
    # where terms cancel, a small score is rounded as the large ones are
    atol = 1e-5 * float(alone.abs().max())
    torch.testing.assert_close(shared, alone, rtol=1e-4 if rounded else 1e-5, atol=max(atol, 1e-6))


@pytest.mark.few_families
def test_wrapped_models_are_unwrapped(method: str, images: Tensor, model: nn.Module) -> None:
    expected = explain(method, model, images, 1)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(explain(method, compiled, images, 1), expected)
    torch.testing.assert_close(explain(method, nn.DataParallel(model), images, 1), expected)


class LowRank(nn.Module):
    """What LoRA puts in a linear layer's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        generator = torch.Generator().manual_seed(base.in_features)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator) * 0.3)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # without the addition, as peft has it

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class PeftLike(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model, self.peft_config = model, {"default": None}

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, images: Tensor) -> Tensor:
        return self.base_model(images)


def test_low_rank_adapters_count(method: str) -> None:
    """A model with LoRA layers is explained like the same model with the layers merged."""
    # in double precision: the two round differently, which gradients at pixels of random weights show
    merged, adapted, images = make_model("cls").double(), make_model("cls").double(), make_images("cls").double()
    for ours, theirs in zip(merged.blocks, adapted.blocks, strict=True):
        for name in ("qkv", "proj"):
            layer = LowRank(getattr(theirs.attn, name)).double()
            setattr(theirs.attn, name, layer)
            with torch.no_grad():
                getattr(ours.attn, name).weight += layer.up @ layer.down
    wrapped = PeftLike(adapted)
    if method in ("transformer_attribution", "partial_lrp", "full_lrp"):
        # relevance is shared by each linear map in turn: to these, layers with LoRA are two maps and a sum
        assert explain(method, wrapped, images, 1).isfinite().all()
        return
    for options in ({}, {"transformation": "literal"}) if method == "tokentm" else ({},):
        expected = explain(method, merged, images, 1, **options)
        torch.testing.assert_close(explain(method, wrapped, images, 1, **options), expected, rtol=1e-4, atol=1e-6)


def test_explainer_repr_repeats_the_configuration(method: str) -> None:
    explainer = get_explainer(method, make_model("cls"))
    assert isinstance(explainer, Explainer)
    for name, value in explainer.method.options.items():
        assert f"{name}={value!r}" in repr(explainer)


@pytest.mark.parametrize(("name", "kind"), sorted(NOT_DEFINED))
def test_what_a_family_does_not_allow_is_refused_with_the_alternatives(name: str, kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="generic_attention"):
        explain(name, make_model(kind), make_images(kind))


def test_capture_is_for_one_forward() -> None:
    from vitexplain import CaptureError, Needs

    with Capture(make_model("cls"), Needs(attention=True)) as capture:
        capture.forward(make_images("cls"))
        with pytest.raises(CaptureError, match="once"):
            capture.forward(make_images("cls"))
