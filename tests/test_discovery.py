"""What is found out about unknown models, against what those models say of themselves."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from discovered import DISCOVERED, SQUARE, Own
from families import make_images, make_model
from test_contract import LowRank
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import Capture, InputError, Needs, UnsupportedModelError, adapt, get_explainer
from vitexplain.models.discovery import DiscoveredAdapter
from vitexplain.models.features import FeatureAdapter
from vitexplain.models.image_text import ImageTextModel

HUGGING_FACE = sorted(name for name in DISCOVERED if name.startswith("hf_") and name != "hf_dinov3")
ATTENTION = Needs(attention_gradient=True)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_attention_equals_its_eager_attention(name: str) -> None:
    model, images = make_model(name), make_images(name)
    with Capture(model, ATTENTION) as capture:
        capture.backward(capture.forward(images)[:, 3].sum())
    model.set_attn_implementation("eager")
    output = model(pixel_values=images, output_attentions=True)
    eager = [each for each in output.attentions if each.shape[-2:] == (capture.num_tokens,) * 2]
    assert len(eager) == len(capture.blocks) == 3
    gradients = torch.autograd.grad(output.logits[:, 3].sum(), eager)
    for block, attention, gradient in zip(capture.blocks, eager, gradients, strict=True):
        torch.testing.assert_close(block.attention(), attention.detach(), rtol=0, atol=1e-5)
        scale = gradient.abs().max().item()
        torch.testing.assert_close(block.attention_gradient(), gradient, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["torchvision", "own", "own_batch_second", "own_attention_pool"])
def test_multihead_attention_equals_its_own_weights(name: str) -> None:
    model, images = make_model(name), make_images(name)
    weights: list[Tensor] = []

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def keep(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        weights.append(output[1].detach())

    handles = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            handles += [module.register_forward_pre_hook(ask, with_kwargs=True), module.register_forward_hook(keep)]
    expected = logits_of(model, images)
    for handle in handles:
        handle.remove()
    with Capture(model, ATTENTION) as capture:
        logits = capture.forward(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(weights) == 3
    for block, attention in zip(capture.blocks, weights, strict=True):
        torch.testing.assert_close(block.attention(), attention, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(DISCOVERED))
def test_attention_gradients_predict_what_a_change_of_attention_does(name: str) -> None:
    """By finite differences, for models without eager attention too: the whole path from attention to logit."""
    model, images = make_model(name).double(), make_images(name).double()[:1]
    with Capture(model, ATTENTION) as capture:
        capture.backward(capture.forward(images)[:, 2].sum())
    block = capture.blocks[1]
    change = torch.randn(block.attention().shape, generator=torch.Generator().manual_seed(0)).double()
    predicted = (block.attention_gradient() * change).sum().item()
    step, scores = 1e-5, []
    for sign in (1, -1):
        added = sign * step * change @ block.operands.v
        scores.append(_score_with_added_output(model, images, 1, added))
    assert (scores[0] - scores[1]) / (2 * step) == pytest.approx(predicted, rel=1e-5, abs=1e-9)


def _score_with_added_output(model: nn.Module, images: Tensor, index: int, added: Tensor) -> float:
    from vitexplain.tap import AttentionTap

    adapter, tap = adapt(model), AttentionTap()
    handles = tap.watch(adapter.blocks[index].attention, lambda _, output: output + added)
    with torch.no_grad(), adapter.prepared(), tap:
        score = adapter.logits(images)[0, 2].item()
    for handle in handles:
        handle.remove()
    return score


@pytest.mark.parametrize("name", sorted(DISCOVERED))
def test_pooling_is_measured(name: str) -> None:
    family, model = DISCOVERED[name], make_model(name)
    adapter = adapt(model)
    assert isinstance(adapter, DiscoveredAdapter)
    assert adapter.num_prefix_tokens == family.prefix
    count = family.prefix + math.prod(family.grid)
    if family.pooling is not None:
        torch.testing.assert_close(adapter.seed(count), family.pooling(count), rtol=1e-3, atol=1e-6)
    elif "dinov2" in name:  # reads CLS beside the mean over patches; registers are not read
        seed = adapter.seed(count)
        assert 0.2 < seed[0] < 0.8
        assert not seed[1 : family.prefix].any()
        torch.testing.assert_close(seed[family.prefix :], ((1 - seed[0]) / 16).expand(16), rtol=1e-3, atol=0)
    else:
        assert adapter.pool is not None


@pytest.mark.parametrize("name", ["siglip_pool", "own_attention_pool"])
def test_the_seed_row_of_an_attention_pool_is_its_attention(name: str) -> None:
    model, images = make_model(name), make_images(name)
    tokens: list[Tensor] = []
    pool = adapt(model).pool.attention
    handle = pool.register_forward_pre_hook(lambda _, args, named: tokens.append((args, named)), with_kwargs=True)
    logits_of(model, images)
    handle.remove()
    (args, named), heads = tokens[0], 3
    if isinstance(pool, nn.MultiheadAttention):
        query, key = (
            named.get("query", args[0] if args else None),
            named.get("key", args[1] if len(args) > 1 else None),
        )
        weights = pool(query, key, key, need_weights=True)[1].mean(1).detach()
    else:
        q, k = (each.unflatten(-1, (heads, 8)).transpose(1, 2) for each in (pool.query, pool.key(args[0])))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1).mean((1, 2)).detach()
    with Capture(model, ATTENTION) as capture:
        capture.forward(images)
    torch.testing.assert_close(capture.seed_row(), weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(DISCOVERED))
def test_heads_and_feed_forward_add_up_to_the_block(name: str) -> None:
    model, images = make_model(name), make_images(name)
    states = frozenset({"in", "attention_input", "mid", "mlp", "out"})
    with Capture(model, Needs(attention=True, states=states)) as capture:
        capture.forward(images)
    for block in capture.blocks:
        update = (block.attention() @ block.operands.v @ block.output_weight).sum(1)
        constant = (
            block.state("mid") - block.state("in") - update
        )  # what is left is the output bias, the same everywhere
        torch.testing.assert_close(constant, constant[:1, :1].expand_as(constant), rtol=0, atol=2e-4)
        values = block.state("attention_input")[:, None] @ block.value_weight
        offset = block.operands.v - values
        torch.testing.assert_close(offset, offset[:1, :, :1].expand_as(offset), rtol=0, atol=2e-4)
        torch.testing.assert_close(block.state("mid") + block.state("mlp"), block.state("out"))


def test_other_sizes_where_the_model_takes_them() -> None:
    model = make_model("hf_dinov2")
    scores = get_explainer("tokentm", model)(torch.randn(1, 3, 48, 24, generator=torch.Generator().manual_seed(0)), 1)
    assert scores.scores.shape == (1, 6, 3)


def test_a_size_that_cannot_be_guessed_can_be_given() -> None:
    model = make_model("own")
    model.image_size = None
    with pytest.raises(UnsupportedModelError, match=r"image_size=\(H, W\)"):
        get_explainer("rollout", model)
    explainer = get_explainer("rollout", DiscoveredAdapter(model, image_size=(32, 48)))
    assert explainer(make_images("own")).scores.shape == (2, 4, 6)
    with pytest.raises(InputError, match="at least one patch"):
        adapt(make_model("own")).grid((4, 48))


def test_hierarchical_models_are_refused_by_name() -> None:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    with pytest.raises(UnsupportedModelError, match="windows or stages"):
        get_explainer("rollout", transformers.SwinForImageClassification(config))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)), "no attention was seen"),
        (nn.Linear(3, 3), "could not be run on images"),
    ],
)
def test_models_without_attention_or_a_feature_map_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        adapt(model)


def test_models_without_scores_are_refused() -> None:
    import transformers

    options = {key: value for key, value in SQUARE.items() if key != "num_labels"}
    with pytest.raises(UnsupportedModelError, match="classification head"):
        adapt(transformers.ViTModel(transformers.ViTConfig(**options)))


def test_discovery_leaves_nothing_behind() -> None:
    model = make_model("own").train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tensors = [(each, each._version, each.detach().clone()) for each in model.parameters()]
    adapt(model)
    for now, (each, version, values) in zip(model.parameters(), tensors, strict=True):
        assert now is each
        assert now._version == version  # a graph that was recorded before can still be followed
        assert torch.equal(now, values)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.fixture
def clip() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {key: value for key, value in SQUARE.items() if key != "num_labels"}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" in name:
                parameter.normal_(std=0.3)
    return model


def test_image_text_models_explain_texts(clip: nn.Module) -> None:
    tokens = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 3, 2]])
    images = make_images("hf_clip")
    model = ImageTextModel.from_texts(clip, ["one", "two", "three"], lambda texts: {"input_ids": tokens})
    expected = clip(input_ids=tokens, pixel_values=images).logits_per_image
    explanation = get_explainer("tokentm", model)(images, [[0, 1, 2]] * 2)
    torch.testing.assert_close(explanation.logits, expected.detach(), rtol=1e-4, atol=1e-5)
    assert explanation.scores.shape == (2, 3, 4, 4)
    assert (explanation.scores[:, 0] - explanation.scores[:, 1]).abs().max() > 1e-3 * explanation.scores.max()
    torch.testing.assert_close(adapt(model).seed(17), F.one_hot(torch.tensor(0), 17).float())


@pytest.mark.parametrize("pooling", ["mean", "head"])
def test_legrad_follows_the_similarity_of_texts(clip: nn.Module, pooling: str) -> None:
    """Against autograd through eager attention: each block's tokens, their norm and projection, and the cosine."""
    images, texts = make_images("hf_clip"), torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    model = ImageTextModel(clip, texts)
    found = get_explainer("legrad", model, layers=2, pooling=pooling)(images, 1).scores
    tower: Any = clip.vision_model
    clip.set_attn_implementation("eager")
    attended: list[Tensor] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda *call: attended.append(call[2][1]))
        for layer in tower.encoder.layers
    ]
    states = tower(images, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    expected = torch.zeros(2, 17)
    for tokens, attention in zip(states[-2:], attended[-2:], strict=True):
        pooled = tokens.mean(1) if pooling == "mean" else tokens[:, 0]
        features = clip.visual_projection(tower.post_layernorm(pooled))
        score = F.cosine_similarity(features, texts[1:2]).sum() * clip.logit_scale.exp()
        (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
        expected += gradient.clamp(min=0).mean((1, 2))
    torch.testing.assert_close(found, expected[:, 1:].reshape(2, 4, 4), rtol=1e-3, atol=1e-6)


def test_legrad_pools_as_siglip_does() -> None:
    """There attention pools the tokens, and what it gives is compared with texts as it is."""
    import transformers

    torch.manual_seed(0)
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {key: value for key, value in SQUARE.items() if key != "num_labels"}
    siglip: Any = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text)).eval()
    texts, images = torch.randn(3, 24), make_images("hf_clip")
    model = ImageTextModel(siglip, texts)
    found = get_explainer("legrad", model, layers=1, pooling="head")(images, 1).scores
    tower = siglip.vision_model
    siglip.set_attn_implementation("eager")
    attended: list[Tensor] = []
    last = tower.encoder.layers[-1]
    handle = last.self_attn.register_forward_hook(lambda *call: attended.append(call[2][1]))
    pooled = tower(images).pooler_output
    handle.remove()
    score = F.cosine_similarity(pooled, texts[1:2]).sum() * siglip.logit_scale.exp()
    (gradient,) = torch.autograd.grad(score, attended)
    expected = gradient.clamp(min=0).mean((1, 2)).reshape(2, 4, 4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    patches = get_explainer("pm", model)(images, 1).scores
    assert patches.shape == (2, 4, 4)


def test_image_text_mistakes_are_named(clip: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="ImageTextModel"):
        get_explainer("tokentm", clip)
    with pytest.raises(UnsupportedModelError, match="neither get_image_features nor encode_image"):
        ImageTextModel(nn.Linear(2, 2), torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"expected .K, D."):
        ImageTextModel(clip, torch.zeros(3))
    with pytest.raises(InputError, match="no texts"):
        ImageTextModel.from_texts(clip, [], lambda texts: {})


def test_one_text_is_not_its_letters(clip: nn.Module) -> None:
    model = ImageTextModel.from_texts(
        clip, "a cat", lambda texts: {"input_ids": torch.tensor([[1, 5, 6, 2]] * len(texts))}
    )
    assert model(make_images("hf_clip")).shape == (2, 1)


def test_the_clip_layout_of_openai_and_open_clip() -> None:
    """`encode_image` and `logit_scale` beside the tower."""

    class Encoder(Own):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

        def encode_image(self, images: Tensor) -> Tensor:
            return Own.forward(self, images)

    class Projected(Encoder):
        """The projection is a matrix, as there."""

        def __init__(self, encoder: Encoder) -> None:
            super().__init__()
            self.load_state_dict(encoder.state_dict())
            self.proj = nn.Parameter(self.head.weight.detach().T.clone())
            self.head = nn.Identity()

        def encode_image(self, images: Tensor) -> Tensor:
            return super().encode_image(images) @ self.proj

    torch.manual_seed(0)
    texts, maps = torch.randn(4, 7), []
    encoder = Encoder().eval()
    with torch.no_grad():
        encoder.head.bias.zero_()
    for each in (encoder, Projected(encoder).eval()):
        model = ImageTextModel(each, texts)
        model.image_size = (32, 48)
        assert get_explainer("generic_attention", model)(make_images("own"), 2).scores.shape == (2, 4, 6)
        maps.append(get_explainer("legrad", model)(make_images("own"), 2).scores)
    assert maps[0].amax() > 0
    torch.testing.assert_close(*maps)


class Reordered(Own):
    """Tokens in an order that no map may be drawn from: CLS behind the patches, column by column, or drawn anew."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def forward(self, images: Tensor) -> Tensor:
        patches = self.stem(images)
        patches = (patches.transpose(2, 3) if self.order == "columns" else patches).flatten(2).transpose(1, 2)
        patches = patches[:, torch.randperm(patches.shape[1])] if self.order == "drawn" else patches
        extra = self.extra.expand(len(images), -1, -1)
        tokens = torch.cat([patches, extra] if self.order == "behind" else [extra, patches], dim=1) + self.places
        return self.head(self.norm(self.layers(tokens)).mean(1))


@pytest.mark.parametrize("order", ["behind", "columns"])
def test_tokens_in_another_order_are_refused(order: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="bottom left patch is token"):
        DiscoveredAdapter(Reordered(order).eval())
    assert DiscoveredAdapter(Reordered("usual").eval()).num_prefix_tokens == 3


@pytest.mark.parametrize("seed", range(3))
def test_an_order_that_is_drawn_in_each_forward_is_refused(seed: int) -> None:
    torch.manual_seed(seed)
    with pytest.raises(UnsupportedModelError, match="two forwards of one image"):
        DiscoveredAdapter(Reordered("drawn").eval())


def test_a_feature_map_of_tokens_column_by_column_is_refused_too() -> None:
    """Without extra tokens there are as many as the patch convolution shows, on its grid, transposed."""

    class Columns(Own):
        columns = True

        def forward(self, images: Tensor) -> Tensor:
            patches = self.stem(images)
            patches = (patches.transpose(2, 3) if self.columns else patches).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.layers(patches)).mean(1))

    torch.manual_seed(0)
    model = Columns().eval()
    for build in (adapt, FeatureAdapter):
        with pytest.raises(UnsupportedModelError, match="row by row"):
            build(model)
    model.columns = False
    assert FeatureAdapter(model).grid((32, 48)) == (4, 6)


class HeadsFirst(nn.Module):
    """Attention by hand on (H·B, N, N): a batch of one looks like (B·H, N, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, query: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        q, k, v = (torch.cat(part(query).split(8, 2), 0) for part in (self.q, self.k, self.v))
        mixed = torch.bmm((q @ k.transpose(1, 2) / 8**0.5).softmax(-1), v)
        return self.out(torch.cat(mixed.split(len(query), 0), 2)), None


def test_attention_that_would_mix_images_is_refused() -> None:
    torch.manual_seed(0)
    model = Own().eval()
    for block in model.layers:
        block.attention = HeadsFirst()
    with pytest.raises(UnsupportedModelError, match="mixes images"):
        DiscoveredAdapter(model)


@pytest.mark.parametrize("name", ["own", "hf_beit"])
def test_a_model_may_be_converted_after_it_was_watched(name: str) -> None:
    model, images = make_model(name), make_images(name)
    explainer = get_explainer("tokentm", model, transformation="literal")
    expected = explainer(images, 1).scores.double()
    model.double()
    torch.testing.assert_close(explainer(images.double(), 1).scores, expected, rtol=1e-3, atol=1e-5)


def set_layer_scales(model: nn.Module, name: str, in_place: bool) -> None:
    """Gives each parameter of that name (its end) other values, or another parameter its place."""
    generator = torch.Generator().manual_seed(0)
    for full, parameter in list(model.named_parameters()):
        if full.endswith(name):
            values = torch.rand(parameter.shape, generator=generator) * 0.5
            if in_place:
                parameter.data.copy_(values)
            else:
                owner, _, own = full.rpartition(".")
                setattr(model.get_submodule(owner), own, nn.Parameter(values))


def assert_same_projections(model: nn.Module, adapter: Any) -> None:
    """An adapter made before the model was changed knows as much as one made now."""
    now = adapt(model)
    for block in range(len(adapter.blocks)):
        torch.testing.assert_close(adapter.output_weight(block), now.output_weight(block), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(adapter.value_weight(block), now.value_weight(block), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("hf_dinov2", "layer_scale1.lambda1"),
        ("hf_dinov2_registers", "layer_scale1.lambda1"),
        ("hf_beit", "lambda_1"),
        ("own", "scale"),
        ("own_batch_second", "scale"),
    ],
)
@pytest.mark.parametrize("in_place", [True, False])
def test_layer_scale_may_be_trained_after_the_model_was_watched(name: str, parameter: str, in_place: bool) -> None:
    """Also from ones or zeros, which are the first values of other parameters as well."""
    for start in (None, 0.0):
        model, images = make_model(name), make_images(name)
        for full, each in model.named_parameters():
            if start is not None and full.endswith(parameter):
                nn.init.constant_(each, start)
        adapter = adapt(model)
        set_layer_scales(model, parameter, in_place)
        assert_same_projections(model, adapter)
        expected = get_explainer("tokentm", model)(images, 1).scores
        found = get_explainer("tokentm", adapter)(images, 1).scores
        # how the head of Dinov2 weighs CLS and patches is measured, and depends a little on what the blocks give
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


class Scaled(nn.Module):
    """Attention times a gate, a number that training may change, or a channel's constant."""

    def __init__(self, attention: nn.Module, kind: str) -> None:
        super().__init__()
        self.attention, self.kind, self.gate = attention, kind, nn.Parameter(torch.zeros(24))
        self.number = nn.Parameter(torch.zeros(()))
        self.register_buffer("constant", torch.linspace(0.5, 2, 24))

    def forward(self, *tokens: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        output = self.attention(*tokens, need_weights=need_weights)[0]
        scales = {"gate": 1 + self.gate.tanh(), "number": self.number, "constant": self.constant, "plain": 1}
        return output * scales[self.kind], None


def scaled(kind: str) -> Own:
    torch.manual_seed(0)
    model = Own()
    for block in model.layers:
        block.attention = Scaled(block.attention, kind)
        del block.scale
        block.scale = 1.0
    return model.eval()


@pytest.mark.parametrize("kind", ["plain", "number", "constant"])
def test_what_scales_attention_is_told_from_what_has_the_same_values(kind: str) -> None:
    model = scaled(kind)
    adapter = adapt(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)))
    assert_same_projections(model, adapter)
    scores = get_explainer("tokentm", adapter)(make_images("own"), 1).scores
    torch.testing.assert_close(scores, get_explainer("tokentm", model)(make_images("own"), 1).scores)


def test_a_measured_scale_holds_until_what_it_is_made_of_changes() -> None:
    model = scaled("gate")
    adapter = adapt(model)
    assert_same_projections(model, adapter)
    assert_same_projections(model.double(), adapter)
    model.layers[1].attention.gate.data.fill_(0.5)
    adapter.output_weight(0)
    with pytest.raises(UnsupportedModelError, match=r"of a _OwnBlock .* found other values in its 'attention.gate'"):
        adapter.output_weight(1)


def test_a_size_that_the_model_refuses_is_an_input_error() -> None:
    with pytest.raises(InputError, match="refused images of 64×64 pixels"):
        get_explainer("rollout", make_model("own"))(torch.randn(1, 3, 64, 64))


def test_a_head_that_reads_another_block_is_refused() -> None:
    class Penultimate(Own):
        def forward(self, images: Tensor) -> Tensor:
            tokens = self.stem(images).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.extra.expand(len(images), -1, -1), tokens], dim=1) + self.places
            before = self.layers[1](self.layers[0](tokens))
            self.layers[2](before)
            return self.head(before.mean(1))

    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="does not read the last block"):
        DiscoveredAdapter(Penultimate().eval())


@pytest.mark.parametrize("pool", [lambda tokens: tokens.amax(1), lambda tokens: tokens.max(1).values])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_heads_that_pick_tokens_by_their_values_are_refused(pool: Any, precision: torch.dtype) -> None:
    class Picking(Own):
        def forward(self, images: Tensor) -> Tensor:
            tokens = self.stem(images).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.extra.expand(len(images), -1, -1), tokens], dim=1) + self.places
            return self.head(pool(self.norm(self.layers(tokens))))

    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="picks tokens by their values"):
        DiscoveredAdapter(Picking().eval().to(precision))


class Trunk(Own):
    """The trunk without extra tokens, and what heads do with its tokens."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.kind, self.query, self.key = head, nn.Parameter(torch.ones(1, 1, 24)), nn.Linear(24, 1)
        self.pools = nn.ModuleList(nn.MultiheadAttention(24, 3, batch_first=True) for _ in range(2))
        self.places = nn.Parameter(torch.randn(1, 24, 24))

    def tokens(self, images: Tensor) -> list[Tensor]:
        """What enters, and what leaves each block (B, N, D)."""
        states = [self.stem(images).flatten(2).transpose(1, 2) + self.places]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states

    def forward(self, images: Tensor) -> Tensor:
        *earlier, tokens = map(self.norm, self.tokens(images))
        return self.head(getattr(self, self.kind)(tokens, earlier))

    def one(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        return self.pools[0](query, tokens, tokens, need_weights=False)[0][:, 0]

    def class_attention(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        """As in CaiT: the query is a key as well."""
        query = self.query.expand(len(tokens), -1, -1)
        keys = torch.cat([query, tokens], 1)
        return (query + self.pools[0](query, keys, keys, need_weights=False)[0])[:, 0]

    def mean_and_tokens(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        """As in CLIP's ResNets: the query, and a key, is the mean of the tokens."""
        query = tokens.mean(1, keepdim=True)
        keys = torch.cat([query, tokens], 1)
        return self.pools[0](query, keys, keys, need_weights=False)[0][:, 0]

    def query_last(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        keys = torch.cat([tokens, query], 1)
        return self.pools[0](query, keys, keys, need_weights=False)[0][:, 0]

    def two(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        for pool in self.pools:
            query = query + pool(query, tokens, tokens, need_weights=False)[0]
        return query[:, 0]

    def pool_and_mean(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        return self.one(tokens, earlier) + tokens.mean(1)

    def sequence_pool(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        """As in CCT, in the classifier's own forward."""
        return (self.key(tokens).softmax(1).transpose(1, 2) @ tokens)[:, 0]

    def several_blocks(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        """As DINOv2's linear classifiers."""
        return torch.stack([each[:, 0] for each in (*earlier[1:], tokens)]).mean(0)

    def maximum(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        return tokens.amax(1)

    def mean(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        return tokens.mean(1)


def trunk(head: str) -> Trunk:
    torch.manual_seed(0)
    model = Trunk(head).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "places" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def rows_of(model: Trunk, images: Tensor) -> Tensor:
    """The weight (B, N) of each token in the head's attention, written down by hand."""
    tokens = model.norm(model.tokens(images)[-1])
    if model.kind == "sequence_pool":
        return model.key(tokens)[..., 0].softmax(1).detach()
    query = model.query.expand(len(tokens), -1, -1)
    keys = torch.cat([query, tokens], 1) if model.kind == "class_attention" else tokens
    row = model.pools[0](query, keys, keys)[1][:, 0, -24:].detach()
    return row / row.sum(-1, keepdim=True)


@pytest.mark.parametrize("head", ["one", "class_attention", "sequence_pool"])
@pytest.mark.parametrize("start_layer", [0, 1])
def test_rollout_starts_at_the_attention_that_reads_the_tokens(head: str, start_layer: int) -> None:
    model, images = trunk(head), make_images("own").double()
    row = rows_of(model, images)[:, None]
    with Capture(model, ATTENTION) as capture:
        capture.backward(capture.forward(images)[:, 1].sum())
    for block in reversed(capture.blocks[start_layer:]):
        row = row @ (0.5 * block.attention().double().mean(1) + 0.5 * torch.eye(24).double())
    found = get_explainer("rollout", model, start_layer=start_layer)(images).scores.double()
    torch.testing.assert_close(found.flatten(1), row[:, 0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(capture.seed_row().double(), rows_of(model, images), rtol=1e-5, atol=1e-8)
    for name in ("contributions", "auto"):
        assert get_explainer(name, model)(images, 1).scores.isfinite().all()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("two", "through 2 attentions, none of which says alone"),
        ("mean_and_tokens", "1 queries to 25 keys; expected queries whose last 24 keys are the final tokens"),
        ("query_last", "1 queries to 25 keys; expected queries whose last 24 keys are the final tokens"),
        ("pool_and_mean", "beside its attention pool too"),
        ("several_blocks", "reads other blocks as well"),
    ],
)
def test_heads_whose_attention_does_not_tell_what_they_read_have_no_seed_row(head: str, message: str) -> None:
    model, images = trunk(head), make_images("own").double()
    for name in ("rollout", "contributions"):
        with pytest.raises(UnsupportedModelError, match=message):
            get_explainer(name, model)(images, 1)
    assert isinstance(adapt(model), DiscoveredAdapter)
    for name in ("gradcam", "attnlrp", "input_x_gradient"):
        assert get_explainer(name, model)(images, 1).scores.isfinite().all()


def test_max_pooling_of_few_wide_tokens_is_told_from_a_mean() -> None:
    """Behind a norm no element of any token's gradient is zero: each of the tokens is the largest in some channel."""
    with pytest.raises(UnsupportedModelError, match="picks tokens by their values"):
        DiscoveredAdapter(_few_wide("maximum"))
    torch.testing.assert_close(DiscoveredAdapter(_few_wide("mean")).seed(6), torch.full((6,), 1 / 6))


def _few_wide(head: str) -> Trunk:
    model = trunk(head).float()
    model.stem, model.places = nn.Conv2d(3, 24, 16, 16), nn.Parameter(torch.randn(1, 6, 24))
    return model


class ChannelAttention(nn.Module):
    """Attention over channels, of which a head has as many as there are tokens (24)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed, self.qkv, self.out = transposed, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, query: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        parts = self.qkv(query).chunk(3, -1)
        q, k, v = ((each.transpose(1, 2) if self.transposed else each)[:, None] for each in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.out(mixed.transpose(1, 2) if self.transposed else mixed), None


def test_attention_over_channels_is_not_taken_for_one_over_as_many_tokens() -> None:
    def build(transposed: bool) -> Trunk:
        model = trunk("mean").float()
        for block in model.layers:
            block.attention = ChannelAttention(transposed)
        return model.eval()

    assert DiscoveredAdapter(build(False)).num_prefix_tokens == 0
    with pytest.raises(UnsupportedModelError, match="attention runs over channels, or over tokens in another order"):
        DiscoveredAdapter(build(True))


class NormByHand(nn.Module):
    """A normalisation in single operations, each of which rounds."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        return self.weight * centred / (centred**2).mean(-1, keepdim=True).sqrt() + self.bias


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_mean_over_many_tokens_is_measured_in_half_precision(
    precision: torch.dtype, by_hand: bool, size: float
) -> None:
    """Where each token is normalised, single elements of the gradient come out as zero: too small, or a difference."""
    import transformers

    vision = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 384}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.SiglipConfig(vision_config=vision, text_config=text, num_labels=2)
    model = transformers.SiglipForImageClassification(config).eval()
    model.classifier.weight.data *= size
    if by_hand:
        norm = model.vision_model.post_layernorm
        model.vision_model.post_layernorm = NormByHand(norm.weight, norm.bias)
    adapter = adapt(model.to(precision))
    assert isinstance(adapter, DiscoveredAdapter)
    torch.testing.assert_close(adapter.seed(196), torch.full((196,), 1 / 196), rtol=0.01, atol=0)


class InlineBlock(nn.Module):
    """A block that computes attention in its own forward; where and how it normalises is the `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.before, self.after = kind, nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.feed_forward = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))
        if kind == "apart":
            self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.normal: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        if self.kind == "module":
            normal = self.before(tokens)
        else:
            normal = F.layer_norm(tokens, (24,), self.before.weight, self.before.bias)
        self.normal.append(normal)
        q, k, v = (
            [self.q(normal), self.k(normal), self.v(normal)] if self.kind == "apart" else self.qkv(normal).chunk(3, -1)
        )
        q, k, v = (each.unflatten(-1, (3, 8)).transpose(1, 2) for each in (q, k, v))
        tokens = tokens + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return tokens + self.feed_forward(self.after(tokens))


def inline(kind: str) -> Own:
    torch.manual_seed(0)
    model = Own()
    model.layers = nn.Sequential(*[InlineBlock(kind) for _ in range(3)])
    return model.eval()


@pytest.mark.parametrize("kind", ["module", "functional"])
def test_the_attention_input_is_found_where_the_block_itself_computes_attention(kind: str) -> None:
    model, images = inline(kind), make_images("own")
    get_explainer("gradcam", model)  # which looks at the model, and so calls it
    for block in model.layers:
        block.normal.clear()
    score = model(images)[:, 2].sum()
    expected = [block.normal[0] for block in model.layers]
    gradients = torch.autograd.grad(score, expected)
    with Capture(model, Needs(state_gradients=frozenset({"attention_input"}))) as capture:
        capture.backward(capture.forward(images)[:, 2].sum())
    for block, state, gradient in zip(capture.blocks, expected, gradients, strict=True):
        torch.testing.assert_close(block.state("attention_input"), state.detach())
        torch.testing.assert_close(block.state_gradient("attention_input"), gradient, rtol=1e-4, atol=1e-7)


def test_an_attention_input_that_no_module_shows_is_refused() -> None:
    model, images = inline("apart"), make_images("own")
    with pytest.raises(UnsupportedModelError, match=r"block 2 \(InlineBlock\), so gradcam cannot read it; use generic"):
        get_explainer("gradcam", model)
    assert get_explainer("generic_attention", model)(images, 1).scores.shape == (2, 4, 6)


def test_a_norm_that_all_blocks_share_is_not_taken_for_one_of_a_block() -> None:
    model, images = inline("module"), make_images("own")
    for block in model.layers:
        block.before = model.layers[0].before
    with Capture(model, Needs(states=frozenset({"attention_input"}))) as capture:
        capture.forward(images)
    for block, record in zip(model.layers, capture.blocks, strict=True):
        torch.testing.assert_close(record.state("attention_input"), block.normal[-1])


class SingleHead(nn.Module):
    """Attention on tensors of three axes: one head (B, N, D), or all heads beside the images (B·H, N, dh)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv, self.out = kind, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, query: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        q, k, v = self.qkv(query).chunk(3, -1)
        if self.kind == "single":
            return self.out(F.scaled_dot_product_attention(q, k, v)), None
        q, k, v = (self.stacked(each) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        if self.kind == "heads first":
            mixed = mixed.unflatten(0, (3, len(query))).transpose(0, 1)
        else:
            mixed = mixed.unflatten(0, (len(query), 3))
        return self.out(mixed.transpose(1, 2).flatten(2)), None

    def stacked(self, state: Tensor) -> Tensor:
        heads = state.unflatten(-1, (3, 8)).transpose(1, 2)
        return (heads.transpose(0, 1) if self.kind == "heads first" else heads).flatten(0, 1)


def with_attention(kind: str) -> Own:
    torch.manual_seed(0)
    model = Own()
    for block in model.layers:
        block.attention = SingleHead(kind)
    return model.eval()


@pytest.mark.parametrize(("kind", "heads"), [("single", 1), ("stacked", 3)])
def test_fused_attention_on_three_axes_is_read(kind: str, heads: int) -> None:
    model, images = with_attention(kind), make_images("own")
    states = frozenset({"in", "attention_input", "mid"})
    with Capture(model, Needs(attention_gradient=True, states=states)) as capture:
        logits = capture.forward(images)
        capture.backward(logits[:, 1].sum())
    torch.testing.assert_close(logits.detach(), model(images).detach())
    for own, block in zip(model.layers, capture.blocks, strict=True):
        q, k, _ = (
            each.unflatten(-1, (heads, -1)).transpose(1, 2)
            for each in own.attention.qkv(block.state("attention_input")).chunk(3, -1)
        )
        expected = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(block.attention(), expected.detach())
        assert block.attention_gradient().shape == (2, heads, 27, 27)
        update = (block.attention() @ block.operands.v @ block.output_weight).sum(1) + own.attention.out.bias
        torch.testing.assert_close(block.state("mid") - block.state("in"), own.scale * update, rtol=1e-3, atol=1e-5)


def test_fused_attention_that_would_mix_images_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mixes images"):
        DiscoveredAdapter(with_attention("heads first"))


def test_attention_on_other_axes_is_named() -> None:
    class FiveAxes(SingleHead):
        def forward(self, query: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
            q, k, v = (each[:, None, None] for each in self.qkv(query).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0, 0]), None

    model = Own().eval()
    for block in model.layers:
        block.attention = FiveAxes("single")
    with pytest.raises(UnsupportedModelError, match=r"on values of 5 axes .*; expected .B, H, N, dh."):
        DiscoveredAdapter(model)


def low_rank(model: nn.Module, names: tuple[str, ...]) -> list[tuple[nn.Module, str, LowRank]]:
    """Puts LoRA layers in the place of linear ones; gives where."""
    placed = []
    for parent in list(model.modules()):
        for name in names:
            if isinstance(getattr(parent, name, None), nn.Linear):
                placed.append((parent, name, LowRank(getattr(parent, name))))
                setattr(parent, name, placed[-1][2])
    return placed


@pytest.mark.parametrize(
    ("build", "names", "layers"),
    [
        (lambda: make_model("hf_vit"), ("q_proj", "v_proj", "o_proj"), 9),
        (lambda: inline("module"), ("qkv", "out"), 6),
    ],
)
@pytest.mark.parametrize("transformation", ["value", "literal"])
@pytest.mark.parametrize("trained_later", [False, True])
def test_low_rank_adapters_count_in_models_found_out(
    build: Any, names: tuple[str, ...], layers: int, transformation: str, trained_later: bool
) -> None:
    """LoRA layers are explained like the same layers merged, also where they did nothing yet when they were found."""
    merged, adapted, images = build(), build(), make_images("hf_vit")
    if hasattr(adapted, "normal"):
        adapted.normal.clear()
    placed = low_rank(adapted, names)
    assert len(placed) == layers
    ups = [layer.up.detach().clone() for _, _, layer in placed]
    if trained_later:
        for _, _, layer in placed:
            nn.init.zeros_(layer.up)
    explainer = get_explainer("tokentm", adapted.eval(), transformation=transformation)
    same = dict(zip((id(module) for module in adapted.modules()), adapted.named_modules(), strict=True))
    with torch.no_grad():
        for (parent, name, layer), up in zip(placed, ups, strict=True):
            layer.up.copy_(up)
            merged.get_submodule(f"{same[id(parent)][0]}.{name}").weight += up @ layer.down
    expected = get_explainer("tokentm", merged, transformation=transformation)(images, 1).scores
    torch.testing.assert_close(explainer(images, 1).scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stem", [torch.bfloat16, torch.float64])
def test_images_come_in_the_precision_of_the_first_layer(stem: torch.dtype) -> None:
    class Mixed(Own):
        def forward(self, images: Tensor) -> Tensor:
            assert images.dtype == self.stem.weight.dtype
            tokens = self.stem(images).to(self.extra).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.extra.expand(len(images), -1, -1), tokens], dim=1) + self.places
            return self.head(self.norm(self.layers(tokens)).mean(1))

    torch.manual_seed(0)
    model, images = Mixed().eval(), make_images("own").bfloat16()
    expected = get_explainer("tokentm", model)(images.float(), 1).scores
    model.stem.to(stem)
    assert next(model.parameters()).dtype == torch.float32
    for method in ("tokentm", "gradcam"):
        assert get_explainer(method, model)(images, 1).scores.isfinite().all()
    tolerance = 0.05 if stem == torch.bfloat16 else 1e-4
    found = get_explainer("tokentm", model)(images, 1).scores
    assert (found - expected).norm() < tolerance * expected.norm()


def test_texts_are_encoded_by_a_borrowed_model() -> None:
    class Encoder(Own):
        image_size = (32, 48)

        def __init__(self) -> None:
            super().__init__()
            self.logit_scale, self.dropout = nn.Parameter(torch.tensor(2.0)), nn.Dropout(0.5)

        def encode_image(self, images: Tensor) -> Tensor:
            return Own.forward(self, images)

        def encode_text(self, tokens: Tensor) -> Tensor:
            return self.dropout(F.one_hot(tokens, 7).float() @ self.head.weight @ self.head.weight.T + 1)

    torch.manual_seed(0)
    encoder, tokens = Encoder().train(), torch.tensor([0, 3, 5])
    encoder.head.eval()
    modes = [module.training for module in encoder.modules()]
    with torch.inference_mode():
        model = ImageTextModel.from_texts(encoder, ["a", "b", "c"], lambda _: tokens)
    assert [module.training for module in encoder.modules()] == modes
    expected = F.normalize(encoder.eval().encode_text(tokens), dim=-1).detach()
    torch.testing.assert_close(model.text_embeddings, expected)
    model.image_size = (32, 48)
    images = make_images("own").requires_grad_(True)
    model(images)[:, 1].sum().backward()  # the embeddings take part in a graph
    assert images.grad is not None
    assert get_explainer("generic_attention", model)(make_images("own"), 1).scores.shape == (2, 4, 6)


def test_scripted_models_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.trace(make_model("cls"), make_images("cls"))
    with pytest.raises(UnsupportedModelError, match="Pass the module itself"):
        get_explainer("rollout", graph)


def test_tokens_mixed_with_their_neighbours_before_values_are_made_of_them() -> None:
    class ConvolvedAttention(nn.Module):
        """Attention over patches that a convolution has looked at, as in CvT."""

        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            patches = self.local(x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
            x = torch.cat([x[:, :1], patches], 1)
            q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7).eval()
    for block in model.blocks:
        block.attn = ConvolvedAttention(24, 3)
    explanation = get_explainer("rollout", DiscoveredAdapter(model, image_size=(32, 32)))(torch.randn(1, 3, 32, 32))
    assert explanation.grid == (4, 4)
