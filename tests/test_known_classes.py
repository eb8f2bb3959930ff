"""Models derived from timm's classes, or changed on the instance: what the class says of its head is then measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import TIMM, make_model, mean_of_patches
from timm.models.cait import Cait
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import DiffParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from vitexplain import Capture, Needs, UnsupportedModelError, adapt, get_explainer
from vitexplain.models.discovery import DiscoveredAdapter

SIZE = (32, 48)
VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
SWIN: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "window_size": 4,
    "num_classes": 7,
}


class MeanHead(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 1:].mean(1))


class MaxHead(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 1:].amax(1))


class ClsLast(VisionTransformer):
    def _pos_embed(self, x: Tensor) -> Tensor:
        tokens = super()._pos_embed(x)
        return torch.cat([tokens[:, 1:], tokens[:, :1]], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, -1])


class Columns(VisionTransformer):
    def _pos_embed(self, x: Tensor) -> Tensor:
        tokens = super()._pos_embed(x)
        return torch.cat([tokens[:, :1], tokens[:, 1:].unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)], 1)


class Backwards(VisionTransformer):
    def forward_features(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        tokens = self._pos_embed(self.patch_embed(x))
        for block in reversed(self.blocks):
            tokens = block(tokens)
        return self.norm(tokens)


class SeveralBlocks(VisionTransformer):
    def forward_features(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        tokens = self._pos_embed(self.patch_embed(x))
        found = []
        for block in self.blocks:
            tokens = block(tokens)
            found.append(tokens)
        return self.norm(torch.stack(found).mean(0))


class Renamed(VisionTransformer):
    """Derived for its initialiser alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.note = "mine"


class Calls(VisionTransformer):
    """Its forward is the class's own."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class SwinCalls(SwinTransformer):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class SwinMax(SwinTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head.fc(x.flatten(1, 2).amax(1))


class CaitCalls(Cait):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class CaitMean(Cait):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x.mean(1))


class MixingNorm(nn.LayerNorm):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens + tokens[:, 1:].mean(1, keepdim=True))


class OwnNorm(nn.LayerNorm):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)


def vit(kind: type[VisionTransformer] = VisionTransformer, **options: Any) -> Any:
    return random(kind(img_size=SIZE, **VIT, **options))


def random(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.25
    return model.eval()


def images_of() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def dense_rollout(model: nn.Module, seed: Tensor) -> Tensor:
    """Rollout from a seed row (N,), as a product of matrices."""
    with torch.no_grad(), Capture(model, Needs(attention=True)) as capture:
        capture.forward(images_of())
    row = seed.expand(2, 1, -1)
    for block in reversed(capture.blocks):
        matrix = block.attention().mean(1) + torch.eye(len(seed))
        row = row @ (matrix / matrix.sum(-1, keepdim=True))
    return row[:, 0, 1:]


def calls(model: nn.Module, run: Callable[[nn.Module], object]) -> int:
    """How often a function runs the model."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(1))
    run(model)
    handle.remove()
    return len(seen)


def with_pool() -> Any:
    model = vit()
    model.pool = lambda tokens, pool_type=None: tokens[:, 1:].mean(1)
    return model


def with_head() -> Any:
    model = vit(block_fn=DiffParallelScalingBlock)  # a block that no other adapter knows
    model.forward_head = lambda tokens, pre_logits=False: model.head(tokens[:, 1:].mean(1))
    return model


@pytest.mark.parametrize("build", [lambda: vit(MeanHead), with_pool, with_head])
def test_a_head_that_somebody_changed_is_measured(build: Callable[[], nn.Module]) -> None:
    model = build()
    expected = dense_rollout(model, mean_of_patches(1)(25))
    found = get_explainer("rollout", model)(images_of()).scores.flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_measured_pooling_holds_for_other_sizes() -> None:
    adapter = adapt(vit(MeanHead, dynamic_img_size=True))
    torch.testing.assert_close(adapter.seed(7), mean_of_patches(1)(7), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [Renamed, Calls])
def test_a_class_derived_without_changing_what_is_read_is_explained_like_its_base(
    kind: type[VisionTransformer],
) -> None:
    for name in ("rollout", "contributions", "gradcam"):
        found, expected = (get_explainer(name, vit(each))(images_of(), 1).scores for each in (kind, VisionTransformer))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TIMM)
def test_what_is_measured_is_what_the_class_says(name: str) -> None:
    """In all families, by a forward that only calls the class's own."""
    model, derived = make_model(name), make_model(name)
    derived.forward = lambda *args, **named: type(derived).forward(derived, *args, **named)  # type: ignore[assignment]
    said, found = adapt(model), adapt(derived)
    assert type(found) is type(said)
    count = said.num_prefix_tokens + math.prod(TIMM[name].grid)
    if said.pool is None:
        assert torch.equal(found.seed(count), said.seed(count))
    else:
        assert found.pool is not None
        assert found.pool.attention is derived.attn_pool


def test_a_norm_of_ones_own_is_no_hindrance() -> None:
    model = vit()
    model.norm = OwnNorm(24)
    assert torch.equal(adapt(model).seed(25), torch.eye(25)[0])


def test_a_norm_that_mixes_tokens_is_measured() -> None:
    model = vit()
    model.norm = MixingNorm(24)
    seed = adapt(model).seed(25)
    torch.testing.assert_close(seed[1:], seed[1:].mean().expand(24), rtol=1e-4, atol=1e-6)
    assert 0.3 < seed[0] < 0.7


@pytest.mark.parametrize("kind", [ClsLast, Columns])
def test_tokens_in_another_order_than_the_class_has_are_refused(kind: type[VisionTransformer]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"bottom left patch is token \d+ of 25; expected 19"):
        get_explainer("rollout", vit(kind))


def test_blocks_in_another_order_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="runs its blocks as 2, 1, 0; expected 0 to 2"):
        adapt(vit(Backwards))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vit(MaxHead), "picks tokens by their values"),
        (lambda: vit(SeveralBlocks), "reads other blocks as well"),
        (lambda: random(SwinMax(img_size=SIZE, **SWIN)), "picks tokens by their values"),
        (lambda: random(CaitMean(img_size=SIZE, **VIT)), "reads other blocks as well"),
    ],
)
def test_heads_without_a_seed_row_are_refused_where_one_is_asked_for(
    build: Callable[[], nn.Module], message: str
) -> None:
    model = build()
    with pytest.raises(UnsupportedModelError, match=message):
        get_explainer("rollout", model)(images_of())
    assert get_explainer("gradcam", model)(images_of(), 1).scores.isfinite().all()


@pytest.mark.parametrize("name", ["rollout", "generic_attention"])
@pytest.mark.parametrize(
    ("derived", "base", "options"), [(SwinCalls, SwinTransformer, SWIN), (CaitCalls, Cait, {**VIT, "init_values": 0.5})]
)
def test_derived_windows_and_class_attention_are_explained_like_their_base(
    derived: type[nn.Module], base: type[nn.Module], options: dict[str, Any], name: str
) -> None:
    maps = [
        get_explainer(name, random(kind(img_size=SIZE, **options)))(images_of(), 1).scores for kind in (derived, base)
    ]
    assert torch.equal(*maps)


def test_an_attention_pool_that_is_not_read_is_left_out() -> None:
    model = make_model("attention_pool")
    model.forward_head = lambda tokens, pre_logits=False: model.head(tokens[:, 1:].mean(1))  # type: ignore[assignment]
    adapter = adapt(model)
    assert adapter.pool is None
    torch.testing.assert_close(adapter.seed(25), mean_of_patches(1)(25), rtol=1e-4, atol=1e-6)


def test_an_attention_pool_behind_a_forward_of_ones_own_is_the_seed_row() -> None:
    def seed_row(model: nn.Module) -> Tensor:
        with torch.no_grad(), Capture(model, Needs(attention=True)) as capture:
            capture.forward(images_of())
        return capture.seed_row()

    plain, changed = make_model("attention_pool"), make_model("attention_pool")
    changed.forward = lambda images: type(changed).forward(changed, images)  # type: ignore[assignment]
    assert torch.equal(seed_row(changed), seed_row(plain))


def test_models_of_timm_are_believed_without_running_them() -> None:
    others = [SwinTransformer(img_size=SIZE, **SWIN), SwinTransformerV2(img_size=SIZE, **SWIN)]
    models = [*map(make_model, TIMM), *others, Cait(img_size=SIZE, **VIT), vit(Renamed)]
    assert [calls(model, adapt) for model in models] == [0] * len(models)
    assert calls(vit(Calls), adapt) > 0


@pytest.mark.parametrize("build", [vit, lambda: random(Cait(img_size=SIZE, **VIT))])
def test_a_block_that_is_there_twice_is_refused(build: Callable[[], Any]) -> None:
    model = build()
    model.blocks = nn.Sequential(model.blocks[0], model.blocks[1], model.blocks[0])
    with pytest.raises(UnsupportedModelError, match="blocks 0 and 2 are one and the same module"):
        adapt(model)


def test_a_changed_model_is_measured_inside_inference_mode_and_given_back() -> None:
    model = vit(MeanHead).train()
    with torch.inference_mode():
        adapter = adapt(model)
    torch.testing.assert_close(adapter.seed(25), mean_of_patches(1)(25), rtol=1e-4, atol=1e-6)
    assert model.training
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_measuring_agrees_with_the_class_in_half_precision(precision: torch.dtype) -> None:
    model = vit(Calls, global_pool="avg").to(precision)
    assert torch.equal(adapt(model).seed(25), mean_of_patches(1)(25))
    assert not isinstance(adapt(model), DiscoveredAdapter)


class TestForwardsOfSomebody:
    """A forward that prepares images, or runs the backbone in its own way, leaves what is read to timm."""

    def check(self, own: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        images = torch.rand(1, 3, *SIZE)
        plain = VisionTransformer(img_size=SIZE, **VIT).eval()
        plain.load_state_dict(own.state_dict())
        found, expected = get_explainer("rollout", own)(images), get_explainer("rollout", plain)(prepare(images))
        torch.testing.assert_close(found.scores, expected.scores)

    def test_that_take_colours_alone(self) -> None:
        class Colours(VisionTransformer):
            def forward(self, x: Tensor, *_: Any) -> Tensor:
                if x.min() < 0:
                    raise ValueError("expected colours")
                return super().forward(x.sqrt())

        class Logarithm(VisionTransformer):
            def forward(self, x: Tensor, *_: Any) -> Tensor:
                return super().forward(torch.log(x + 1e-3))

        self.check(Colours(img_size=SIZE, **VIT).eval(), torch.sqrt)
        self.check(Logarithm(img_size=SIZE, **VIT).eval(), lambda images: torch.log(images + 1e-3))

    def test_that_run_the_backbone_without_gradients(self) -> None:
        class Probe(VisionTransformer):
            def forward(self, x: Tensor, *_: Any) -> Tensor:
                with torch.no_grad():
                    features = self.forward_features(x)
                return self.forward_head(features)

        model = Probe(img_size=SIZE, **VIT).eval()
        self.check(model, lambda images: images)
        with pytest.raises(UnsupportedModelError, match="runs where gradients are switched off"):
            get_explainer("generic_attention", model)(torch.rand(1, 3, *SIZE), 1)

    def test_before_they_have_weights(self) -> None:
        class Doubled(VisionTransformer):
            def forward(self, x: Tensor, *_: Any) -> Tensor:
                return super().forward(2 * x)

        with torch.device("meta"):
            assert adapt(Doubled(img_size=SIZE, **VIT)).num_prefix_tokens == 1
        model = Doubled(img_size=SIZE, **VIT).eval()
        nn.init.zeros_(model.head.weight)
        self.check(model, lambda images: 2 * images)

    def test_that_draw_lots_leave_the_callers_alone(self) -> None:
        class Noisy(VisionTransformer):
            def forward(self, x: Tensor, *_: Any) -> Tensor:
                return super().forward(x + 0 * torch.rand_like(x))

        model, before = Noisy(img_size=SIZE, **VIT).eval(), torch.random.get_rng_state()
        adapt(model)
        assert torch.equal(torch.random.get_rng_state(), before)
