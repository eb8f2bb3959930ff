"""Models beyond plain transformers: windows, class attention, feature maps alone, and attention written by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from discovered import Own
from families import DIMENSIONS, SIZE
from test_contract import assert_same_state, disturb, explain, logits_of, state_of
from timm.models.cait import Cait
from timm.models.hiera import Hiera
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer, window_partition
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.xcit import Xcit
from torch import Tensor, nn

from vitexplain import Capture, Needs, UnsupportedModelError, adapt, get_explainer
from vitexplain.attention import RowTile
from vitexplain.layout import TokenLayout, Windows, hand_down
from vitexplain.models.features import FeatureAdapter
from vitexplain.record import BlockRecord

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")

SWIN = {
    "img_size": SIZE,
    "patch_size": 4,  # 8×12 patches, then 4×6; windows of 3×3 need padding, and every second block shifts
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 3),
    "window_size": 3,
    "num_classes": 7,
}
BUILD: dict[str, Callable[[], nn.Module]] = {
    "swin": functools.partial(SwinTransformer, **SWIN),
    "swin_unpadded": functools.partial(SwinTransformer, **{**SWIN, "window_size": 2}),
    "swin_v2": functools.partial(SwinTransformerV2, **SWIN),
    "cait": functools.partial(Cait, img_size=SIZE, init_values=0.5, **DIMENSIONS),
}
SWINS = [name for name in BUILD if name.startswith("swin")]
ATTENTION_METHODS = ("raw_attention", "rollout", "generic_attention")
WORKING = (*ATTENTION_METHODS, "gradcam")


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model.eval()


@pytest.fixture(params=sorted(BUILD))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiered(name: str) -> nn.Module:
    return randomised(BUILD[name]())


def images_of(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def eager(model: nn.Module, images: Tensor, target: int) -> list[tuple[Tensor, Tensor]]:
    """Attention and its gradient of each block, by the model's own unfused code and plain autograd."""
    kept: list[Tensor] = []
    drops = [module for name, module in model.named_modules() if name.endswith("attn_drop")]
    handles = [drop.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0])) for drop in drops]
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    gradients = torch.autograd.grad(model(images)[:, target].sum(), kept)
    for handle in handles:
        handle.remove()
    return [(attention.detach(), gradient) for attention, gradient in zip(kept, gradients, strict=True)]


def assembled(block: Any, windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """The global matrix (B, H, N, N) of one Swin block's attention (B·W, H, n, n), entry by entry."""
    count = math.prod(grid)
    tokens = torch.arange(count, dtype=torch.float64).reshape(1, *grid, 1)
    tokens = tokens.roll([-each for each in block.shift_size], dims=(1, 2))
    below, right = (-side % size for side, size in zip(grid, block.window_size, strict=True))
    tokens = F.pad(tokens, (0, 0, 0, right, 0, below), value=-1)
    places = window_partition(tokens, block.window_size).flatten(1).long().tolist()
    per_image = windows.unflatten(0, (-1, len(places)))
    dense = torch.zeros(*per_image.shape[:1], per_image.shape[2], count, count, dtype=windows.dtype)
    for window, inside in enumerate(places):
        for a, i in enumerate(inside):
            for b, j in enumerate(inside):
                if i >= 0 and j >= 0:
                    dense[:, :, i, j] = per_image[:, window, :, a, b]
    return dense


def merging(above: tuple[int, int], below: tuple[int, int]) -> Tensor:
    """(N above, N below): each merged token's relevance to its parts, in equal shares."""
    shares = torch.zeros(math.prod(above), *below, dtype=torch.float64)
    for i in range(below[0]):
        for j in range(below[1]):
            shares[(i // 2) * above[1] + j // 2, i, j] = 1
    return shares.flatten(1) / shares.flatten(1).sum(1, keepdim=True)


def swin_matrices(name: str) -> tuple[nn.Module, Tensor, list[Tensor], list[Tensor], list[tuple[int, int]]]:
    """The model in float64, its images, and dense attention, dense gradient and grid of every block."""
    model, images = randomised(BUILD[name]()).double(), images_of().double()
    first = (images.shape[2] // 4, images.shape[3] // 4)
    blocks = [(block, stage) for stage, layer in enumerate(model.layers) for block in layer.blocks]
    grids = [first if stage == 0 else (-(-first[0] // 2), -(-first[1] // 2)) for _, stage in blocks]
    pairs = eager(model, images, 3)
    dense = [
        [assembled(block, each, grid) for each in pair]
        for (block, _), pair, grid in zip(blocks, pairs, grids, strict=True)
    ]
    return model, images, [each[0] for each in dense], [each[1] for each in dense], grids


@pytest.mark.parametrize("name", SWINS)
def test_windows_are_blocks_of_the_global_attention(name: str) -> None:
    model, images, attention, gradient, grids = swin_matrices(name)
    with Capture(model, Needs(attention_gradient=True)) as capture:
        capture.backward(capture.forward(images)[:, 3].sum())
    assert any(any(block.shift_size) for layer in model.layers for block in layer.blocks)
    for record, a, g, grid in zip(capture.blocks, attention, gradient, grids, strict=True):
        row = torch.rand(2, math.prod(grid), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for weigh, expected in (
            (lambda tile: tile.attention, a),
            (lambda tile: (tile.attention * tile.gradient).clamp(min=0), (a * g).clamp(min=0)),
            (lambda tile: tile.attention.mean(1), a.mean(1)),
        ):
            dense = torch.einsum("bi,b...ij->b...j", row, expected)
            scale = dense.abs().max().item()
            torch.testing.assert_close(record.propagate(row, weigh), dense, rtol=0, atol=1e-10 * max(scale, 1))


@pytest.mark.parametrize("name", SWINS)
def test_maps_of_swin_equal_dense_products(name: str) -> None:
    model, images, attention, gradient, grids = swin_matrices(name)
    count = math.prod(grids[-1])
    row = torch.full((2, count), 1 / count, dtype=torch.float64)
    seed, moved, stay = row, torch.zeros_like(row), row
    for index in range(len(grids) - 1, -1, -1):
        if index + 1 < len(grids) and grids[index] != grids[index + 1]:
            down = merging(grids[index + 1], grids[index])
            seed, moved, stay = seed @ down, moved @ down, stay @ down
        identity = torch.eye(math.prod(grids[index]), dtype=torch.float64)
        fused = 0.5 * attention[index].mean(1) + 0.5 * identity
        stay = torch.einsum("bi,bij->bj", stay, fused)  # rows sum to 1 together with what goes to padding
        update = (attention[index] * gradient[index]).clamp(min=0).mean(1)
        moved = moved + torch.einsum("bi,bij->bj", seed + moved, update)
    shape = (2, *grids[0])
    torch.testing.assert_close(explain("generic_attention", model, images, 3).reshape(2, -1), moved)
    torch.testing.assert_close(explain("rollout", model, images).reshape(2, -1), stay)
    raw = torch.einsum("bi,bij->bj", row, attention[-1].mean(1))
    last = get_explainer("raw_attention", model)(images)
    torch.testing.assert_close(last.scores.reshape(2, -1), raw)
    assert last.grid == grids[-1]
    assert explain("generic_attention", model, images, 3).shape == shape


def test_attention_of_cait_is_what_values_are_mixed_with() -> None:
    model, images = randomised(BUILD["cait"]()).double(), images_of().double()
    pairs = eager(model, images, 3)
    with Capture(model, Needs(attention_gradient=True)) as capture:
        capture.backward(capture.forward(images)[:, 3].sum())
    assert [record.layout.count for record in capture.blocks] == [24, 24, 24, 25, 25]
    for record, (attention, gradient) in zip(capture.blocks, pairs, strict=True):
        rows = slice(0, attention.shape[2])  # one row in class attention
        torch.testing.assert_close(record.attention()[:, :, rows], attention, rtol=0, atol=1e-10)
        torch.testing.assert_close(record.attention_gradient()[:, :, rows], gradient, rtol=1e-9, atol=1e-12)
    assert (capture.blocks[0].attention() < 0).any()  # talking heads
    top = capture.blocks[-1]
    torch.testing.assert_close(top.attention()[0, 0, 1:], torch.eye(25, dtype=torch.float64)[1:])
    assert not top.attention_gradient()[:, :, 1:].any()
    some = torch.tensor([3, 0])
    tile = RowTile(top.operands, top.output_gradient, some)
    torch.testing.assert_close(tile.attention, top.attention()[:, :, some])
    torch.testing.assert_close(tile.gradient, top.attention_gradient()[:, :, some])


def test_generic_attention_of_cait_equals_dense_products() -> None:
    model, images = randomised(BUILD["cait"]()).double(), images_of().double()
    row = torch.zeros(2, 25, dtype=torch.float64)
    row[:, 0] = 1
    moved = torch.zeros_like(row)
    for attention, gradient in reversed(eager(model, images, 3)):
        update = (attention * gradient).clamp(min=0).mean(1)
        if update.shape[1] == 1:
            moved = moved + (row + moved)[:, :1] * update[:, 0]
        else:
            patches = (moved if moved.shape[1] == 24 else moved[:, 1:], torch.zeros(2, 24, dtype=torch.float64))
            moved = patches[0] + torch.einsum("bi,bij->bj", patches[0] + patches[1], update)
    torch.testing.assert_close(explain("generic_attention", model, images, 3).flatten(1), moved)


@pytest.mark.parametrize("chosen", WORKING)
def test_logits_batches_targets_and_precision(chosen: str, name: str, tiered: nn.Module) -> None:
    images, targets = images_of(3), torch.tensor([[1, 4], [0, 2], [6, 3]])
    explanation = get_explainer(chosen, tiered)(images, targets)
    torch.testing.assert_close(explanation.logits, logits_of(tiered, images))
    assert explanation.scores.isfinite().all()
    assert explanation.scores.shape == (3, 2, *explanation.grid)
    for index in range(3):
        alone = explain(chosen, tiered, images[index : index + 1], targets[index : index + 1])
        torch.testing.assert_close(explanation.scores[index : index + 1], alone, rtol=1e-4, atol=1e-6)
    for k in range(2):
        one = explain(chosen, tiered, images, targets[:, k])
        torch.testing.assert_close(explanation.scores[:, k], one, rtol=1e-4, atol=1e-6)
    exact = get_explainer(chosen, tiered.double())(images, targets).scores
    torch.testing.assert_close(explanation.scores.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chosen", WORKING)
def test_the_model_is_given_back_as_it_was(chosen: str, name: str, tiered: nn.Module) -> None:
    images = images_of()
    expected = explain(chosen, tiered, images, 2)
    disturb(tiered)
    before = state_of(tiered)
    torch.testing.assert_close(explain(chosen, tiered, images, 2), expected, rtol=1e-4, atol=1e-6)
    assert_same_state(before, state_of(tiered))

    def fail(logits: Tensor) -> Tensor:
        raise LookupError("in the target")

    with pytest.raises(LookupError):
        explain(chosen, tiered, images, fail)
    assert_same_state(before, state_of(tiered))


def test_only_what_follows_several_blocks_is_flagged(name: str, tiered: nn.Module) -> None:
    images = images_of()
    for method in ("rollout", "generic_attention"):
        explanation = get_explainer(method, tiered)(images)
        assert explanation.approximate == adapt(tiered).approximate
        assert explanation.approximate in repr(explanation)
        assert explanation[0].approximate is not None
    for method in ("raw_attention", "gradcam"):
        explanation = get_explainer(method, tiered)(images)
        assert explanation.approximate is None
        assert "approximate" not in repr(explanation)


def test_several_methods_share_a_capture(name: str, tiered: nn.Module) -> None:
    from vitexplain import Subject, create_method, explain_with

    images = images_of()
    together = explain_with([create_method(each) for each in WORKING], Subject.of(tiered), images, 1)
    for method, explanation in zip(WORKING, together, strict=True):
        torch.testing.assert_close(explanation.scores, explain(method, tiered, images, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SWINS)
def test_token_transformations_of_swin_by_states_alone(name: str, tiered: nn.Module) -> None:
    images = images_of()
    explanation = get_explainer("tokentm", tiered, transformation="residual")(images, 1)
    assert explanation.grid == (images.shape[2] // 4, images.shape[3] // 4)
    assert explanation.scores.min() >= 0
    with pytest.raises(UnsupportedModelError, match=r"transformation='residual', generic_attention"):
        explain("tokentm", tiered, images)
    with pytest.raises(UnsupportedModelError, match="rollout without discard_ratio"):
        explain("rollout", tiered, images, discard_ratio=0.5)


def test_methods_read_any_one_block(name: str, tiered: nn.Module) -> None:
    images = images_of()
    with Capture(tiered, Needs(attention=True)) as capture:
        capture.forward(images)
    for layer, layout in enumerate(capture.layouts):
        if name != "cait" or layer >= 3:
            explanation = get_explainer("raw_attention", tiered, layer=layer)(images)
            assert explanation.grid == layout.grid
        assert explain("gradcam", tiered, images, 1, layer=layer).shape[-2:] == layout.grid
    assert explain("rollout", tiered, images, start_layer=2).shape[-2:] == capture.layouts[2].grid


@pytest.mark.parametrize("layer", range(5))
def test_gradcam_of_cait_equals_one_by_hand_with_and_without_a_class_token(layer: int) -> None:
    model, images = randomised(BUILD["cait"]()).double(), images_of().double()
    kept: list[Tensor] = []
    block = [*model.blocks, *model.blocks_token_only][layer]
    handle = block.norm1.register_forward_hook(lambda *call: kept.append(call[2]))
    (gradient,) = torch.autograd.grad(model(images)[:, 3].sum(), kept)
    handle.remove()
    patches = slice(0 if layer < 3 else 1, None)  # the class token comes in above the first three blocks
    expected = (kept[0] * gradient[:, patches].mean(1, keepdim=True)).sum(2)[:, patches].detach()
    scores = explain("gradcam", model, images, 3, layer=layer, relu=False)
    torch.testing.assert_close(scores.flatten(1), expected, rtol=1e-9, atol=1e-12)


def test_what_cait_does_not_define_is_refused() -> None:
    model, images = randomised(BUILD["cait"]()), images_of()
    for options in ({}, {"transformation": "residual"}, {"start_layer": 3}):
        with pytest.raises(UnsupportedModelError, match=r"change their number.*use generic_attention, .* or gradcam"):
            get_explainer("tokentm", model, **options)
    with pytest.raises(UnsupportedModelError, match="head reads none of the tokens of block 0"):
        explain("raw_attention", model, images, layer=0)


def test_heads_without_a_known_pooling_are_refused() -> None:
    model = SwinTransformer(**{**SWIN, "global_pool": "max"}).eval()
    with pytest.raises(UnsupportedModelError, match=r"pools tokens by 'max'.*gradcam"):
        explain("rollout", model, images_of())
    assert explain("gradcam", model, images_of()).shape == (2, 4, 6)


def test_dynamic_sizes() -> None:
    model = randomised(SwinTransformer(**SWIN, dynamic_img_size=True))
    assert explain("generic_attention", model, torch.randn(1, 3, 36, 20), 1).shape == (1, 9, 5)


def test_relevance_of_merged_tokens_is_shared_and_kept() -> None:
    fine, middle, coarse = TokenLayout(0, (5, 8)), TokenLayout(0, (3, 4)), TokenLayout(0, (2, 2))
    row = torch.rand(2, 4, dtype=torch.float64)
    down = hand_down(row, [fine, fine, middle, coarse, coarse])
    expected = row @ merging((2, 2), (3, 4)) @ merging((3, 4), (5, 8))
    torch.testing.assert_close(down, expected)
    torch.testing.assert_close(down.sum(1), row.sum(1))
    assert hand_down(row, [coarse]) is row
    from vitexplain import CaptureError

    with pytest.raises(CaptureError, match="relevance of 7 tokens, expected 40, 12"):
        hand_down(torch.rand(1, 7), [fine, middle])


@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (2, 0)])
def test_windows_cut_and_put_together(shift: tuple[int, int]) -> None:
    windows = Windows((5, 7), (3, 4), shift)
    row = torch.rand(2, 35)
    cut = windows.split(row)
    assert cut.shape == (2 * 4, 12)
    torch.testing.assert_close(windows.merge(cut), row)
    torch.testing.assert_close(windows.merge(torch.stack([cut, 2 * cut], 1)), torch.stack([row, 2 * row], 1))


# feature maps alone


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Conv2d(6, 8, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)
    )


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

    return TorchvisionSwin([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=7)


def hugging_face_swin() -> nn.Module:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=7
    )
    return transformers.SwinForImageClassification(config)


def pyramid() -> nn.Module:
    stages = {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)}
    return PyramidVisionTransformerV2(num_classes=7, mlp_ratios=(2, 2, 2, 2), **stages)


def hiera() -> nn.Module:
    return Hiera(img_size=(64, 96), embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), num_classes=7)


def xcit() -> nn.Module:
    return Xcit(img_size=64, patch_size=16, embed_dim=16, depth=3, num_heads=2, cls_attn_layers=1, num_classes=7)


def in_place() -> nn.Module:
    """As DenseNet: the last map is changed in place behind the module."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Sequential(nn.Conv2d(3, 10, 4, 4), nn.ReLU()), nn.Conv2d(10, 8, 2, 2)
            self.middle, self.head = nn.BatchNorm2d(10), nn.Linear(8, 7)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(F.relu_(self.second(self.middle(self.first(images)))).mean((2, 3)))

    return InPlace()


FEATURES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int], tuple[int, int], str]] = {
    "convolutions": (convolutions, "2", (32, 48), (4, 6), "no attention was seen"),
    "in_place": (in_place, "middle", (32, 48), (8, 12), "no attention was seen"),
    "torchvision_swin": (torchvision_swin, "permute", (32, 48), (4, 6), "windows or stages"),
    "hugging_face_swin": (hugging_face_swin, "swin.encoder.layers.1", (32, 32), (4, 4), "windows or stages"),
    "pvt_v2": (pyramid, "stages", (64, 96), (2, 3), "onto fewer tokens"),
    "hiera": (hiera, "blocks.3", (64, 96), (2, 3), "windows or stages"),
    "xcit": (xcit, "blocks.2", (64, 64), (4, 4), "XCABlock"),
}


def feature_model(kind: str) -> tuple[FeatureAdapter, Tensor, str, tuple[int, int]]:
    build, place, size, grid, _ = FEATURES[kind]
    model = randomised(build())
    adapter = FeatureAdapter(model, size, reason="of a test")
    return adapter, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)), place, grid


@pytest.mark.parametrize("kind", sorted(FEATURES))
def test_gradcam_on_the_last_feature_map_equals_one_by_hand(kind: str) -> None:
    adapter, images, place, grid = feature_model(kind)
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = adapter.model.get_submodule(place).register_forward_hook(keep)
    logits = adapter.logits(images)
    (gradient,) = torch.autograd.grad(logits[:, 3].sum(), kept)
    handle.remove()
    features = kept[0].detach()
    if features.ndim == 4 and features.shape[1:3] != grid:
        features, gradient = features.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    features, gradient = features.reshape(2, *grid, -1), gradient.reshape(2, *grid, -1)
    expected = (features * gradient.mean((1, 2), keepdim=True)).sum(3)
    explanation = get_explainer("gradcam", adapter, relu=False)(images, 3)
    torch.testing.assert_close(explanation.scores, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(explanation.logits, logits.detach())
    assert explanation.grid == grid
    assert explanation.approximate is None
    alone = explain("gradcam", adapter, images[1:], 3, relu=False)
    torch.testing.assert_close(explanation.scores[1:], alone, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", sorted(FEATURES))
def test_what_a_feature_map_does_not_give_is_refused_with_what_it_does(kind: str) -> None:
    build, _, size, _, reason = FEATURES[kind]
    model = randomised(build())
    model.image_size = size
    adapter = adapt(model)
    assert isinstance(adapter, FeatureAdapter)
    for method in (*ATTENTION_METHODS, "tokentm"):
        with pytest.raises(UnsupportedModelError, match=f"methods that work on it: .*gradcam.*{reason}"):
            get_explainer(method, adapter)
    with pytest.raises(UnsupportedModelError, match=r"methods that work on it: .*gradcam"):
        adapter.seed(6)


def test_a_feature_map_is_found_inside_inference_mode() -> None:
    model, images = randomised(convolutions()), torch.randn(1, 3, 32, 48)
    expected = explain("gradcam", model, images, 1)
    with torch.inference_mode():
        torch.testing.assert_close(explain("gradcam", model, images * 1.0, 1), expected)


def test_a_borrowed_pyramid_is_given_back() -> None:
    model = randomised(pyramid()).train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    before = state_of(model)
    explain("gradcam", model, torch.randn(2, 3, 64, 96), 1)
    assert_same_state(before, state_of(model))


def test_another_image_size_on_a_feature_map() -> None:
    model = randomised(convolutions())
    assert explain("gradcam", model, torch.randn(1, 3, 40, 24), 1).shape == (1, 5, 3)
    from vitexplain import InputError

    with pytest.raises(InputError, match="a size that the model takes, such as 224×224"):
        explain("gradcam", model, torch.randn(1, 3, 2, 2), 1)


def test_models_without_a_feature_map_are_refused() -> None:
    class TwoPaths(nn.Module):
        """A map that not all of the score goes through."""

        def __init__(self) -> None:
            super().__init__()
            self.map, self.head, self.other = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 7), nn.Linear(3, 7)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.map(images).mean((2, 3))) + self.other(images.mean((2, 3)))

    for model in (TwoPaths(), nn.Linear(3, 3)):
        with pytest.raises(UnsupportedModelError):
            adapt(model)


# attention written by hand


class _Attention(nn.Module):
    """Self-attention whose kind says how it is computed; the weights are the same."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv, self.proj = kind, nn.Linear(24, 72), nn.Linear(24, 24)
        self.drop, self.softmax = nn.Dropout(0.3), nn.Softmax(dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        if self.kind == "sdpa":
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        scores = q @ k.transpose(-2, -1) * 8**-0.5
        return self.proj(getattr(self, self.kind)(scores, v).transpose(1, 2).flatten(2))

    def operator(self, scores: Tensor, v: Tensor) -> Tensor:
        return self.drop(scores.softmax(-1)) @ v

    def function(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)

    def module(self, scores: Tensor, v: Tensor) -> Tensor:
        return self.softmax(scores).matmul(v)

    def batched(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.softmax(scores, -1).flatten(0, 1), v.flatten(0, 1)).unflatten(0, (len(v), 3))

    def einsum(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v)

    def named(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(self.drop(torch.softmax(scores, dim=-1)), v)

    def einsum_tokens_first(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhqk,bkhd->bhqd", scores.softmax(-1), v.transpose(1, 2))


class _Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before, self.after, self.attention = nn.LayerNorm(24), nn.LayerNorm(24), _Attention(kind)
        self.feed_forward = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.before(tokens))
        return tokens + self.feed_forward(self.after(tokens))


class Handwritten(Own):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[_Block(kind) for _ in range(3)])


@pytest.fixture(
    scope="module", params=["operator", "function", "module", "batched", "einsum", "named", "einsum_tokens_first"]
)
def twins(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    by_hand, fused = randomised(Handwritten(request.param)), randomised(Handwritten("sdpa"))
    by_hand.load_state_dict(fused.state_dict())
    return by_hand, fused


@pytest.mark.parametrize("chosen", [*WORKING, "tokentm"])
def test_attention_written_by_hand_equals_the_fused_kernel(chosen: str, twins: tuple[nn.Module, nn.Module]) -> None:
    by_hand, fused = twins
    images, targets = images_of(), [[1, 5], [2, 0]]
    explanation = get_explainer(chosen, by_hand)(images, targets)
    expected = get_explainer(chosen, fused)(images, targets)
    torch.testing.assert_close(explanation.scores, expected.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(explanation.logits, logits_of(by_hand, images))
    assert explanation.approximate is None


def test_a_softmax_that_mixes_no_values_is_no_attention() -> None:
    """Gates inside the attention module, and the softmax of a classifier."""

    class Gated(_Attention):
        def forward(self, tokens: Tensor) -> Tensor:
            gate = self.qkv(tokens).softmax(-1)[..., :24]
            return super().forward(tokens * gate)

    class Probabilities(Handwritten):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).softmax(-1)

    torch.manual_seed(0)
    model = Probabilities("sdpa").eval()
    for block in model.layers:
        block.attention = Gated("operator")
    records = read(model)
    assert [record.attention().shape for record in records] == [(2, 3, 27, 27)] * 3
    for record in records:
        torch.testing.assert_close(record.attention().sum(-1), torch.ones(2, 3, 27))


def read(model: nn.Module) -> list[BlockRecord]:
    with Capture(model, Needs(attention=True)) as capture:
        capture.forward(images_of())
    return capture.blocks


def test_a_module_of_positions_is_no_reason_to_refuse_a_feature_map() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(1, 16, 24))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.places.expand(len(tokens), -1, -1) * 1.0

    class MixedTokens(nn.Module):
        image_size = 32

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.places = nn.Conv2d(3, 24, 8, 8), Places()
            self.mixing = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 7)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.stem(images).flatten(2).transpose(1, 2)
            tokens = tokens + self.places(tokens)
            for mix in self.mixing:
                tokens = tokens + mix(tokens.transpose(1, 2)).relu().transpose(1, 2)
            return self.head(self.norm(tokens).mean(1))

    torch.manual_seed(0)
    explanation = get_explainer("gradcam", MixedTokens().eval())(torch.randn(1, 3, 32, 32), 1)
    assert explanation.grid == (4, 4)
