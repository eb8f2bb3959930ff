"""The last block for the tokens that the head reads: the same numbers, whatever the model does with the others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from discovered import Own
from families import make_images, make_model
from timm.models.vision_transformer import Attention, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vitexplain import Capture, Needs, adapt, borrowing, get_explainer
from vitexplain.metrics.predictor import Predictor
from vitexplain.metrics.token_dropping import TokenDropper
from vitexplain.models.adapter import ModelAdapter
from vitexplain.short_last_block import ShortLastBlock

GRAPH = Needs(attention_gradient=True, state_gradients=frozenset({"in"}), image_gradient=True)
TOKENS, WIDTH = 25, 24
INSIDE = ("", ".norm1", ".attn", ".attn.qkv", ".attn.proj", ".norm2", ".mlp", ".mlp.fc1", ".ls2")


@contextmanager
def whole() -> Iterator[None]:
    """Nothing is shortened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShortLastBlock, "of", classmethod(lambda *_: None))
        yield


def with_graph(model: nn.Module | ModelAdapter, images: Tensor) -> list[Tensor]:
    """Logits and the gradient at the images, then what was recorded."""
    with Capture(model, GRAPH) as capture:
        logits = capture.forward(images)
        capture.backward(logits[:, 1].sum())
        recorded = [(each.attention(), each.output_gradient, each.state_gradient("in")) for each in capture.blocks]
        return [logits.detach(), capture.image_gradient, *[tensor for each in recorded for tensor in each]]


def without_graph(model: nn.Module | ModelAdapter, images: Tensor) -> list[Tensor]:
    with Capture(model, Needs(attention=True)) as capture:
        return [capture.forward(images), *[each.attention() for each in capture.blocks]]


def asked(model: nn.Module | ModelAdapter, images: Tensor) -> list[Tensor]:
    return [Predictor.of(model).logits(images).double()]


WAYS: list[Callable[[nn.Module | ModelAdapter, Tensor], list[Tensor]]] = [with_graph, without_graph, asked]


def plain(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits and the gradient at the images, by autograd alone."""
    images = images.clone().requires_grad_(True)
    logits = model(images)
    return [logits.detach(), *torch.autograd.grad(logits[:, 1].sum(), images)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    wide = found[0].dtype == torch.float64
    for one, other in zip(found, expected, strict=False):
        tolerance = 1e-6 if not wide or torch.equal(one, one.float().double()) else 1e-11
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def right(model: nn.Module, adapter: ModelAdapter, images: Tensor, first: Any) -> None:
    """All ways give the model's own numbers, one of them first, all again behind it."""
    expected = plain(model, images)
    for way in (first, *WAYS, first):
        close(way(adapter, images)[: 2 if way is with_graph else 1], expected)


def vit(kind: type[VisionTransformer] = VisionTransformer) -> VisionTransformer:
    model: Any = make_model("cls").double()
    model.__class__ = kind
    return model


class Flops(TorchDispatchMode):
    """Counts those of linear maps and products, without a hook on any module."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, rule = func(*args, **(kwargs or {})), flop_registry.get(func._overloadpacket)
        self.total += 0 if rule is None else rule(*args, **(kwargs or {}), out_val=out)
        return out


def flops(run: Callable[..., Any], *args: Any, **named: Any) -> int:
    with Flops() as count:
        run(*args, **named)
    return count.total


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def images() -> Tensor:
    return make_images("cls", batch=3).double()


@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_are_those_of_the_whole_block(family: str, batch: int) -> None:
    model, images = make_model(family).double(), make_images(family, batch).double()
    adapter = adapt(model)
    with whole():
        expected = [way(adapter, images) for way in WAYS]
    for way, numbers in [*zip(WAYS, expected, strict=True)] * 2:
        found = way(adapter, images)
        assert len(found) == len(numbers)
        close(found, numbers)


@pytest.mark.parametrize(
    ("kind", "left_out"), [("cls", 23), ("distilled", 24), ("registers", 27), ("mean_pooled", 0), ("attention_pool", 0)]
)
def test_two_tokens_go_through_the_last_linear_maps(kind: str, left_out: int, way: Any) -> None:
    model, images = make_model(kind), make_images(kind, batch=3)
    with whole():
        expected = flops(way, model, images)
    way(model, images)
    saved = 3 * left_out * 2 * (1 + 4 + 4) * WIDTH**2  # projection, feed-forward
    found = expected - flops(way, model, images)
    assert found == saved or (way is with_graph and found > saved)


@pytest.mark.parametrize("name", ["saliency", "rollout", "occlusion", "integrated_gradients"])
def test_methods_save_it(name: str) -> None:
    explainer, images = get_explainer(name, make_model("cls")), make_images("cls")
    with whole():
        expected, before = explainer(images, target=1), flops(explainer, images, target=1)
    torch.testing.assert_close(explainer(images, target=1).scores, expected.scores, rtol=1e-4, atol=1e-5)
    assert flops(explainer, images, target=1) < 0.95 * before


@pytest.mark.parametrize("name", ["rollout", "gradcam", "generic_attention", "saliency", "occlusion"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_second_call_gives_the_same_bits(name: str, batch: int) -> None:
    explainer, images = get_explainer(name, make_model("cls")), make_images("cls", batch)
    first, second = explainer(images, target=1), explainer(images, target=1)
    torch.testing.assert_close(second.scores, first.scores, rtol=0, atol=0)
    torch.testing.assert_close(second.logits, first.logits, rtol=0, atol=0)


class Around(nn.Module):
    """A feed-forward branch of which something else is made, by its input and its output."""

    def __init__(self, inner: nn.Module, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.rule = inner, rule

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rule(tokens, self.inner(tokens))


def mean_added(_: Tensor, out: Tensor) -> Tensor:
    return out + out.mean(1, keepdim=True)


def patches_in_their_grid(_: Tensor, out: Tensor) -> Tensor:
    patches = F.avg_pool2d(out[:, 1:].mT.unflatten(2, (4, 6)), 3, 1, 1)
    return torch.cat([out[:, :1], patches.flatten(2).mT], 1)


def finite_or_error(tokens: Tensor, out: Tensor) -> Tensor:
    assert tokens.isfinite().all()
    return out


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "each token by itself": lambda _, out: out * 2,
    "mean": mean_added,
    "convolution": lambda _, out: F.conv1d(out.mT, out.new_ones(WIDTH, 1, 5), padding=2, groups=WIDTH).mT,
    "gate": lambda tokens, out: out * tokens.mean(1, keepdim=True).sigmoid(),
    "patches convolved, CLS apart": patches_in_their_grid,
    "scale by place": lambda _, out: out * torch.linspace(1, 2, TOKENS, dtype=out.dtype)[:, None],
    "error unless finite": finite_or_error,
    "mean of positive": lambda _, out: out + torch.where(out > 0, out, 0).mean(1, keepdim=True),
    "lowest": lambda _, out: out + out.sort(1).values[:, :2].mean(1, keepdim=True),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_feed_forward_may_mix_tokens(
    rule: str, known: bool, way: Any, images: Tensor, request: pytest.FixtureRequest
) -> None:
    if known:
        request.getfixturevalue("any_code")
    model = vit()
    model.blocks[-1].mlp = Around(model.blocks[-1].mlp, RULES[rule])
    right(model, adapt(model), images, way)


class Secret(VisionTransformer):
    """Says that it reads CLS, and reads patches too."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().forward(*args, **kwargs)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x, pre_logits) + x[:, 5:].mean(1)[:, :7]


@pytest.mark.parametrize("where", ["feed-forward", "norm"])
def test_modules_of_libraries_may_mix_tokens(where: str, way: Any, images: Tensor) -> None:
    model: Any = vit()
    mixing = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0, batch_first=True).double().eval()
    if where == "norm":
        model.norm = nn.Sequential(mixing, model.norm)
    else:
        model.blocks[-1].mlp = nn.Sequential(model.blocks[-1].mlp, mixing)
    right(model, adapt(model), images, way)


def by_hand(attention: Any) -> Callable[[Tensor], Tensor]:
    """A forward as it is often put on an attention module, to see its softmax."""

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * attention.scale).softmax(-1)
        return attention.proj((weights @ v).transpose(1, 2).flatten(2))

    return forward


@pytest.mark.parametrize("patched_first", [False, True])
def test_attention_may_be_replaced_on_the_module(patched_first: bool, way: Any, images: Tensor) -> None:
    model: Any = vit()
    adapter = None if patched_first else adapt(model)
    for block in model.blocks:
        block.attn.forward = by_hand(block.attn)
    right(model, adapter or adapt(model), images, way)


def test_head_may_read_patches_secretly(way: Any, images: Tensor) -> None:
    model: Any = vit(Secret)
    right(model, adapt(model), images, way)


def test_what_does_not_hold_is_found_out_once(way: Any, images: Tensor) -> None:
    model: Any = vit()
    adapter = adapt(model)  # which would notice, later
    model.__class__ = Secret
    way(adapter, images)
    model.calls = 0
    way(adapter, images)
    assert model.calls == 1


def mixing_forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return mean_added(x, type(self).forward(self, x))


def head_forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return type(self).forward_head(self, x) + x.mean(1)[:, :7]


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "mlp": lambda model, last: setattr(last, "mlp", Around(last.mlp, mean_added)),
    "norm": lambda model, last: setattr(last, "norm2", Around(last.norm2, mean_added)),
    "pooling": lambda model, last: setattr(model, "global_pool", "avg"),
    "attribute": lambda model, last: setattr(last.mlp, "rule", mean_added),
    "class": lambda model, last: setattr(model, "__class__", Secret),
    "block.forward": lambda model, last: setattr(last, "forward", MethodType(mixing_forward, last)),
    "mlp.forward": lambda model, last: setattr(last.mlp, "forward", MethodType(mixing_forward, last.mlp)),
    "forward_head": lambda model, last: setattr(model, "forward_head", MethodType(head_forward, model)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_two_calls_are_noticed(change: str, way: Any, images: Tensor) -> None:
    model: Any = vit()
    model.blocks[-1].mlp = Around(model.blocks[-1].mlp, lambda _, out: out)
    adapter = adapt(model)
    way(adapter, images)
    CHANGES[change](model, model.blocks[-1])
    right(model, adapter, images, way)


def test_a_model_whose_logits_are_nan_is_left_alone(way: Any, images: Tensor) -> None:
    model: Any = vit()
    bias, model.head.bias = model.head.bias, nn.Parameter(torch.full((7,), torch.nan, dtype=torch.float64))
    assert way(model, images)[0].isnan().all()
    model.head.bias = bias
    right(model, adapt(model), images, way)
    with whole():
        expected = flops(way, model, images)
    assert flops(way, model, images) < expected  # nothing wrong is remembered


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("where", ["", *(f"blocks.2{each}" for each in INSIDE), "norm", "head"])
def test_hooks_of_the_user_see_all_tokens(where: str, known: bool, images: Tensor) -> None:
    model, seen = vit(), []
    adapter, module = adapt(model), model.get_submodule(where)
    for way in WAYS if known else []:
        way(adapter, images)
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    module.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    model(images)
    expected, seen[:] = list(seen), []
    for way in WAYS * 2:
        way(adapter, images)
        close(seen, expected)
        seen.clear()


def test_hooks_on_all_modules_see_all_tokens(images: Tensor) -> None:
    model, seen = vit(), []
    handle = nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call[2].detach()))
    try:
        for way in WAYS * 2:
            way(model, images)
    finally:
        handle.remove()
    assert not any(each.isnan().any() or each.shape[1] == 2 for each in seen)


@pytest.mark.parametrize("where", ["blocks.2", "blocks.2.mlp", "blocks.2.mlp.fc1", "norm"])
def test_backward_hooks_see_all_tokens(where: str, images: Tensor) -> None:
    model, seen = vit(), []
    adapter = adapt(model)
    with_graph(adapter, images)
    model.get_submodule(where).register_full_backward_hook(lambda *call: seen.append(call[2][0]))
    plain(model, images)
    with_graph(adapter, images)
    close(seen[1:], seen[:1])


@pytest.mark.parametrize("dropped", [0, 11, 22, 23, 24])
def test_tokens_may_be_dropped(dropped: int, images: Tensor) -> None:
    dropper, kept = TokenDropper.of(Predictor.of(vit()), images), torch.arange(24).expand(3, -1)[:, dropped:]
    with whole():
        expected = dropper.logits(images, kept)
    for _ in range(2):
        torch.testing.assert_close(dropper.logits(images, kept), expected)


@pytest.fixture
def any_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of these tests are taken for those of a known library."""
    monkeypatch.setattr(borrowing, "_LIBRARIES", ("",))


class OwnFirst(Own):
    """Reads the first token alone."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.cat([self.extra.expand(len(images), -1, -1), self.stem(images).flatten(2).mT], 1) + self.places
        if self.batch_first:
            return self.head(self.norm(self.layers(tokens))[:, 0])
        return self.head(self.norm(self.layers(tokens.transpose(0, 1)))[0])


@pytest.mark.usefixtures("any_code")
@pytest.mark.parametrize("batch", [1, 3, 27])
@pytest.mark.parametrize("batch_first", [True, False])
def test_batches_as_large_as_the_number_of_tokens(batch_first: bool, batch: int, way: Any) -> None:
    torch.manual_seed(0)
    model, images = OwnFirst(batch_first).double().eval(), make_images("own", batch).double()
    assert ShortLastBlock.of(adapt(model), 27) is not None
    right(model, adapt(model), images, way)


class Asking(Attention):
    """Attention by a call of its own, and what is made of the output."""

    ask: Callable[..., Tensor] = staticmethod(F.scaled_dot_product_attention)
    weigh: Callable[[Tensor], Any] = staticmethod(lambda _: 1.0)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = self.ask(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(heads) * self.weigh(heads)


BIAS = torch.linspace(-3, 3, TOKENS**2, dtype=torch.float64).view(TOKENS, TOKENS).sin()
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bias": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS),
    "bias of heads": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS.expand(len(q), 3, -1, -1)),
    "bias of keys": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=BIAS[:1]),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS > 0),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True, scale=0.3),
}


@pytest.mark.usefixtures("any_code")
@pytest.mark.parametrize("call", CALLS)
def test_attention_may_be_masked(call: str, way: Any, images: Tensor) -> None:
    model: Any = vit()
    model.blocks[-1].attn.__class__, model.blocks[-1].attn.ask = Asking, CALLS[call]
    right(model, adapt(model), images, way)


@pytest.mark.usefixtures("any_code")
@pytest.mark.parametrize("batch", [3, TOKENS])
def test_attention_may_be_gated_by_cls(batch: int, way: Any) -> None:
    model: Any = vit()
    own = model.blocks[-1].attn
    own.__class__, own.weigh = Asking, lambda heads: own.proj(heads[:, :1]).sigmoid()
    right(model, adapt(model), make_images("cls", batch).double(), way)


def test_attention_and_feed_forward_side_by_side(way: Any, images: Tensor) -> None:
    torch.manual_seed(0)
    model = VisionTransformer((32, 48), 8, embed_dim=24, depth=3, num_heads=3, block_fn=ParallelScalingBlock).double()
    assert ShortLastBlock.of(adapt(model), TOKENS) is not None
    right(model.eval(), adapt(model), images, way)


def test_autocast_gives_the_same_precision() -> None:
    model, images = make_model("cls"), make_images("cls", 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with whole():
            expected = [way(model, images)[:2] for way in WAYS]
        for way, numbers in [*zip(WAYS, expected, strict=True)] * 2:
            torch.testing.assert_close(way(model, images)[:2], numbers, rtol=0.05, atol=0.02)


class Failing(nn.Module):
    fails = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ValueError("on purpose")
        return x


@pytest.mark.usefixtures("any_code")
@pytest.mark.parametrize("where", ["blocks.2.attn.proj_drop", "blocks.2.norm2", "blocks.2.mlp.act", "norm", "fc_norm"])
def test_errors_leave_nothing_behind(where: str, way: Any, images: Tensor) -> None:
    model, failing = vit(), Failing()
    model.set_submodule(where, failing)
    for failing.fails in (True, False, True):
        with pytest.raises(ValueError, match="on purpose") if failing.fails else nullcontext():
            way(model, images)
        assert not _get_current_function_mode_stack()
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    failing.fails = False
    right(model, adapt(model), images, way)


def test_models_can_be_let_go_of(way: Any, images: Tensor) -> None:
    model = vit()
    way(model, images)
    left = [weakref.ref(each) for each in model.modules()]
    del model
    gc.collect()
    assert not any(each() for each in left)
