"""Capture against the eager attention of the same model, and against autograd."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import DIMENSIONS, SIZE, all_families, make_images, make_model, with_own_weights
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from vitexplain import Capture, CaptureError, InputError, Needs, UnsupportedModelError, adapt, get_explainer

EVERYTHING = Needs(
    attention_gradient=True,
    states=frozenset({"in", "attention_input", "mid", "mlp", "out"}),
    state_gradients=frozenset({"attention_input", "out"}),
)


def eager(model: nn.Module, images: Tensor, target: int) -> tuple[list[Tensor], list[Tensor]]:
    """Attention and its gradient by the model's own unfused code and plain autograd."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept.append(arguments[0])

    dropouts = [module for name, module in model.blocks.named_modules() if name.endswith("attn_drop")]
    handles = [dropout.register_forward_pre_hook(keep) for dropout in dropouts]
    switches = [module for module in model.blocks.modules() if hasattr(module, "fused_attn")]
    for module in switches:
        module.fused_attn = False
    score = model(images)[:, target].sum()
    for module in switches:
        module.fused_attn = True
    for handle in handles:
        handle.remove()
    gradients = list(torch.autograd.grad(score, kept))
    attention = [each.detach() for each in kept]
    if len(attention) == 2 * len(model.blocks):  # two attentions a block, side by side
        attention, gradients = (
            [torch.cat(pair, dim=1) for pair in zip(each[::2], each[1::2], strict=True)]
            for each in (attention, gradients)
        )
    pairing = [module for module in model.blocks.modules() if hasattr(module, "_compute_lambda")]
    if pairing:  # heads in pairs: A₁ - λ A₂
        weights = [module._compute_lambda().item() for module in pairing]
        pairs = [each.unflatten(1, (-1, 2)) for each in attention]
        attention = [each[:, :, 0] - weight * each[:, :, 1] for each, weight in zip(pairs, weights, strict=True)]
        gradients = [each.unflatten(1, (-1, 2))[:, :, 0] for each in gradients]
    return attention, gradients


@pytest.mark.timm_families
def test_attention_equals_eager_and_gradients_equal_autograd(model: nn.Module, images: Tensor) -> None:
    attention, gradients = eager(model, images, 3)
    with Capture(model, Needs(attention_gradient=True)) as capture:
        capture.backward(capture.forward(images)[:, 3].sum())
    for block, expected, expected_gradient in zip(capture.blocks, attention, gradients, strict=True):
        torch.testing.assert_close(block.attention(), expected, rtol=0, atol=1e-5)
        scale = expected_gradient.abs().max().item()
        torch.testing.assert_close(block.attention_gradient(), expected_gradient, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("options", [{"init_values": 0.5}, {"block_fn": ResPostBlock}], ids=["pre-norm", "post-norm"])
def test_differential_attention_in_blocks_of_the_usual_kind_is_one_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = with_own_weights(VisionTransformer(img_size=SIZE, **DIMENSIONS, attn_layer="diff", **options))
    model = model.double().eval()
    images = make_images("cls").double()  # norms behind differences magnify rounding
    attention, gradients = eager(model, images, 3)
    with Capture(model, Needs(attention_gradient=True)) as capture:
        capture.backward(capture.forward(images)[:, 3].sum())
    for block, expected, gradient in zip(capture.blocks, attention, gradients, strict=True):
        torch.testing.assert_close(block.attention(), expected)
        torch.testing.assert_close(block.attention_gradient(), gradient, rtol=1e-4, atol=1e-7)
    with pytest.raises(UnsupportedModelError, match="transformation='residual'"):  # each head is normed
        get_explainer("tokentm", model)(images, 3)


@pytest.mark.exact_states
def test_states_are_those_of_the_model(model: nn.Module, images: Tensor) -> None:
    expected: list[dict[str, Tensor]] = [{} for _ in model.blocks]

    def keep(index: int, kind: str, before: bool) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], *output: Tensor) -> None:
            expected[index][kind] = (arguments[0] if before else output[0]).detach()

        return hook

    handles = []
    for index, block in enumerate(model.blocks):
        handles += [
            block.register_forward_pre_hook(keep(index, "in", True)),
            block.register_forward_hook(keep(index, "out", False)),
            block.norm2.register_forward_pre_hook(keep(index, "mid", True)),
        ]
    model(images)
    for handle in handles:
        handle.remove()
    with Capture(model, EVERYTHING) as capture:
        capture.forward(images)
    for index, block in enumerate(capture.blocks):
        for kind in ("in", "mid", "out"):
            torch.testing.assert_close(block.state(kind), expected[index][kind])
        torch.testing.assert_close(block.state("mid") + block.state("mlp"), block.state("out"))
        torch.testing.assert_close(model.blocks[index].norm1(block.state("in")), block.state("attention_input"))


@pytest.mark.exact_states
def test_heads_add_up_to_the_residual_update(model: nn.Module, images: Tensor) -> None:
    """Σ_h A_h v_h W_O^h, with the value bias and without the output bias, is what attention adds to the stream."""
    with Capture(model, EVERYTHING) as capture:
        capture.forward(images)
    for index, block in enumerate(capture.blocks):
        update = (block.attention() @ block.operands.v @ block.output_weight).sum(1)
        own = model.blocks[index]
        bias = own.ls1(torch.zeros_like(update) + own.attn.proj.bias)
        torch.testing.assert_close(block.state("mid") - block.state("in") - bias, update, rtol=1e-3, atol=1e-5)
        values = block.state("attention_input")[:, None] @ block.value_weight
        if own.attn.qkv.bias is not None:
            values = values + own.attn.qkv.bias.chunk(3)[2].view(1, values.shape[1], 1, -1)
        torch.testing.assert_close(block.operands.v, values, rtol=1e-3, atol=1e-5)


@pytest.mark.exact_states
def test_state_gradients_equal_autograd(model: nn.Module, images: Tensor) -> None:
    kept: list[Tensor] = []
    handle = model.blocks[1].norm1.register_forward_hook(lambda *call: kept.append(call[2]))
    expected = torch.autograd.grad(model(images)[:, 2].sum(), kept)[0]
    handle.remove()
    with Capture(model, Needs(state_gradients=frozenset({"attention_input"}), from_block=1)) as capture:
        capture.backward(capture.forward(images)[:, 2].sum())
    torch.testing.assert_close(capture.blocks[1].state_gradient("attention_input"), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.timm_families
def test_seed_row_follows_the_head(family: str, model: nn.Module, images: Tensor) -> None:
    """The seed equals the pooling written down by hand, and the gradient of the final tokens agrees."""
    count = all_families()[family].prefix + math.prod(all_families()[family].grid)
    if all_families()[family].pooling is None:
        expected = pool_attention(model, images)
    else:
        expected = all_families()[family].pooling(count)
        torch.testing.assert_close(adapt(model).seed(count), expected)
    with Capture(model, Needs(state_gradients=frozenset({"out"}), from_block=2)) as capture:
        capture.backward(capture.forward(images).sum())
    with Capture(model, Needs(attention=True)) as attended:
        attended.forward(images)
    torch.testing.assert_close(attended.seed_row(), expected.expand(2, -1))
    reached = capture.blocks[-1].state_gradient("out").abs().sum((0, 2)) > 0
    assert reached.tolist() == (expected > 0).reshape(-1, count).any(0).tolist()


def pool_attention(model: nn.Module, images: Tensor) -> Tensor:
    """(B, N): softmax of the latent's queries on the final patch tokens, by hand."""
    pool = model.attn_pool
    tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    heads = (pool.num_heads, pool.head_dim)
    queries = pool.q(pool.latent).unflatten(-1, heads).transpose(1, 2)
    keys = pool.kv(tokens)[..., : pool.latent.shape[-1]].unflatten(-1, heads).transpose(1, 2)
    weights = (queries @ keys.transpose(-2, -1) * pool.scale).softmax(-1).mean((1, 2))
    return F.pad(weights, (model.num_prefix_tokens, 0)).detach()


@pytest.mark.timm_families
def test_the_graph_starts_at_the_first_needed_block(model: nn.Module, images: Tensor) -> None:
    """Blocks below it run without a graph, and weights never take part in one."""
    graphs: list[bool] = []
    handles = [
        block.register_forward_hook(lambda *call: graphs.append(call[2].requires_grad)) for block in model.blocks
    ]
    with Capture(model, Needs(attention_gradient=True, from_block=1)) as capture:
        logits = capture.forward(images)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        capture.backward(logits[:, 0].sum())
    for handle in handles:
        handle.remove()
    assert graphs == [False, True, True]
    with pytest.raises(CaptureError, match="block 0 holds no record of attention"):
        capture.blocks[0].attention()


def test_without_gradients_there_is_no_graph(model: nn.Module, images: Tensor) -> None:
    with Capture(model, Needs(attention=True)) as capture:
        logits = capture.forward(images)
        assert not logits.requires_grad
        with pytest.raises(CaptureError, match="carries no gradient"):
            capture.backward(logits.sum())


@pytest.mark.parametrize(
    ("read", "need"),
    [
        (lambda block: block.attention(), "attention=True"),
        (lambda block: block.attention_gradient(), "attention"),
        (lambda block: block.state("mid"), "states={'mid'}"),
        (lambda block: block.state_gradient("mid"), "state_gradients={'mid'}"),
    ],
)
def test_what_was_not_asked_for_is_named(read: Any, need: str) -> None:
    with Capture(make_model("cls"), Needs()) as capture:
        capture.forward(make_images("cls"))
    with pytest.raises(CaptureError) as caught:
        read(capture.blocks[0])
    assert need in str(caught.value)


def test_attention_that_is_not_seen_is_an_error_not_an_empty_map() -> None:
    model = make_model("cls")

    class Handwritten(nn.Module):
        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).exp()
            return self.proj((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))

    model.blocks[1].attn = Handwritten(model.blocks[1].attn)
    with (
        pytest.raises(
            CaptureError, match=r"block 1's attention .Handwritten. called neither scaled_dot_product_attention"
        ),
        Capture(model, Needs(attention=True)) as capture,
    ):
        capture.forward(make_images("cls"))


def test_attention_outside_the_blocks_is_not_recorded() -> None:
    class WithExtra(VisionTransformer):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return super().forward_head(F.scaled_dot_product_attention(x, x, x), pre_logits)

    model = WithExtra(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3)
    with Capture(model, Needs(attention=True)) as capture:
        capture.forward(torch.randn(1, 3, 16, 16))
    assert [block.attention().shape for block in capture.blocks] == [(1, 2, 5, 5)] * 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 3, 16, 16), "expected 32×48"),
        (torch.zeros(2, 1, 32, 48), "expected a float tensor"),
        (torch.zeros(0, 3, 32, 48), "expected a float tensor"),
        (torch.zeros(2, 3, 32, 48, dtype=torch.uint8), "torch.uint8"),
        (torch.full((1, 3, 32, 48), float("nan")), "NaN"),
        (torch.zeros(5), "expected a float tensor"),
    ],
)
def test_images_that_do_not_fit_are_named(wrong: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message), Capture(make_model("cls"), Needs()) as capture:
        capture.forward(wrong)


def test_image_sizes_that_no_patch_divides_are_refused() -> None:
    with pytest.raises(InputError, match="multiples of the patch size"):
        adapt(make_model("dynamic")).grid((41, 24))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(nn.Linear(2, 2), "a Linear could not be run on images"), ("vit", "found a str")],
)
def test_models_that_are_not_supported_are_named(wrong: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        adapt(wrong)


def test_blocks_that_are_not_supported_are_named() -> None:
    class OwnBlock(nn.Identity):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()

    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, block_fn=OwnBlock)
    with pytest.raises(UnsupportedModelError, match="OwnBlock; expected one of timm's: Block"):
        adapt(model)


def test_a_block_that_was_compiled_alone_is_refused_with_two_that_work() -> None:
    from vitexplain import get_explainer

    model = make_model("cls")
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    expected = get_explainer("rollout", model)(images).scores
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"block 1 was replaced by what torch\.compile made of it"):
        adapt(model)
    model.blocks[1] = model.blocks[1]._orig_mod
    model.blocks[1].compile(backend="eager")
    torch.testing.assert_close(get_explainer("rollout", model)(images).scores, expected)


def test_a_head_without_known_pooling_leaves_gradcam() -> None:
    from vitexplain import get_explainer

    model = VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=8,
        depth=2,
        num_heads=2,
        num_classes=3,
        global_pool="max",
        class_token=False,
    )
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with pytest.raises(UnsupportedModelError, match=r"pools tokens by 'max'.*gradcam"):
        get_explainer("rollout", model)(images)
    assert get_explainer("gradcam", model, relu=False)(images).scores.shape == (1, 2, 2)


def test_an_adapter_may_be_passed_as_the_model(model: nn.Module, images: Tensor) -> None:
    from vitexplain import get_explainer

    by_model = get_explainer("rollout", model)(images).scores
    torch.testing.assert_close(get_explainer("rollout", adapt(model))(images).scores, by_model)


def test_the_union_of_needs_asks_for_all() -> None:
    union = Needs(attention=True, from_block=2) | Needs(states=frozenset({"in"}), from_block=1)
    assert union == Needs(attention=True, states=frozenset({"in"}), from_block=1)
    assert not union.gradient


def test_the_union_of_needs_keeps_a_fusion_that_all_share() -> None:
    mean, states = Needs(attention=True, fusion="mean"), Needs(states=frozenset({"in"}))
    assert (mean | mean).fusion == (mean | states).fusion == (states | mean).fusion == "mean"
    assert (mean | Needs(attention=True)).fusion is None
    assert (mean | Needs(attention=True, fusion="max")).fusion is None
    assert (mean | Needs(attention_gradient=True)).fusion is None


@pytest.mark.parametrize("name", ["cls", "mean_pooled", "hf_vit"])  # without a module for the branch, too
def test_changes_are_those_of_the_states_which_are_let_go(name: str) -> None:
    model, images = make_model(name), make_images(name)
    pairs: frozenset[Any] = frozenset({("in", "mid"), ("mid", "mlp"), ("mid", "out")})
    with Capture(model, EVERYTHING) as whole:
        whole.forward(images)
    with Capture(model, Needs(states=frozenset({"in"}), changes=pairs)) as capture:
        capture.forward(images)
    for block, expected in zip(capture.blocks, whole.blocks, strict=True):
        for before, after in pairs:
            change, states = block.change(before, after), (expected.state(before), expected.state(after))
            torch.testing.assert_close(change.before, states[0].norm(dim=2))
            torch.testing.assert_close(change.after, states[1].norm(dim=2))
            torch.testing.assert_close(change.product, torch.einsum("bnd,bnd->bn", *states), rtol=1e-4, atol=1e-4)
        assert set(block._states) == {"in"}
        with pytest.raises(CaptureError, match="no record of token state 'mlp'"):
            block.state("mlp")
    with pytest.raises(CaptureError, match=r"no record of the change from .*changes=\{\('in', 'mid'\)\}"):
        whole.blocks[0].change("in", "mid")


@pytest.mark.parametrize("place", ["blocks.1", "head"])
@pytest.mark.parametrize("name", ["generic_attention", "legrad", "transformer_attribution", "saliency"])
def test_a_forward_that_raises_leaves_no_graph(name: str, place: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    explainer = get_explainer(name, model)
    calls: list[Tensor] = []

    def fail(_: Any, __: Any, output: Tensor) -> None:
        calls.append(output.detach())
        raise KeyError

    handle = model.get_submodule(place).register_forward_hook(fail)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(KeyError):
            explainer(images, 1)
        assert calls
        alive = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.grad_fn is not None]
        assert len(alive) == 0
    finally:
        gc.enable()
        handle.remove()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_attention_is_as_wide_under_autocast(precision: torch.dtype) -> None:
    model, images = make_model("cls"), make_images("cls")
    with torch.autocast("cpu", precision), torch.no_grad(), Capture(model, Needs(attention=True)) as capture:
        capture.forward(images)
        attention = capture.blocks[0].attention()
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]), rtol=1e-4, atol=1e-4)
