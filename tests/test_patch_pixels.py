"""Images that are no whole number of patches: what is left out or padded, and what maps and metrics make of it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import TIMM, make_model
from patch_evidence import PatchEvidence, distinct_weights
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import InputError, Subject, adapt, compare, create_method, get_explainer
from vitexplain.bench import chunk_run, run_bench
from vitexplain.bench.configuration import BenchConfiguration
from vitexplain.comparison.layers import layer
from vitexplain.comparison.views import draw_view, highest_patches
from vitexplain.explain_files import explain_to_folder
from vitexplain.metrics import create_metric
from vitexplain.metrics.batches import metric_batches
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.ordering import rank_pixels
from vitexplain.metrics.predictor import Predictor
from vitexplain.models.adapter import ModelAdapter
from vitexplain.models.black_box import BlackBoxAdapter
from vitexplain.models.discovery import DiscoveredAdapter
from vitexplain.models.loading import LoadedModel
from vitexplain.patch_pixels import (
    at_pixels,
    enlarged,
    framed,
    gather_by_patch,
    grid_extent,
    patch_of_pixel,
    scaled_extent,
)
from vitexplain.preprocessing import Preprocessing
from vitexplain.render import upsample
from vitexplain.training.patch_mask_losses import patch_cover

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def dinov2() -> nn.Module:
    """Patches of 14 pixels; takes any size, and leaves out what is no whole patch."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        num_labels=5,
    )
    return Dinov2ForImageClassification(config)


def padding_vit() -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=8, dynamic_img_size=True, dynamic_img_pad=True, **SMALL)


def fixed_vit() -> nn.Module:
    """Takes one size alone, which is no whole number of patches, as of SigLIP with patches of 14 in 384 pixels."""
    return VisionTransformer(img_size=(31, 45), patch_size=8, **SMALL)


CASES: dict[str, tuple[Any, tuple[int, int], tuple[int, int], int]] = {
    "leaves out": (dinov2, (60, 79), (4, 5), 14),
    "leaves out, fixed size": (fixed_vit, (31, 45), (3, 5), 8),
    "pads": (padding_vit, (34, 45), (5, 6), 8),
}
"""Model, image size, grid, and pixels of a patch."""

PLACES = (((60, 79), (4, 5), 14), ((34, 45), (5, 6), 8), ((32, 48), (4, 6), 8))
"""Image size, grid, and pixels of a patch: left out, padded, neither."""


def model_of(case: str) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = CASES[case][0]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return model


def image_of(case: str) -> Tensor:
    return torch.randn(1, 3, *CASES[case][1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def whole_patches(case: str) -> Tensor:
    """The same image, cut or padded with zeros to whole patches by hand."""
    image, (_, (height, width), (h, w), patch) = image_of(case), CASES[case]
    return F.pad(image, (0, w * patch - width, 0, h * patch - height))


def squares(size: tuple[int, int], grid: tuple[int, int], patch: int) -> list[tuple[slice, slice]]:
    """Where each patch lies, row by row."""
    return [
        (slice(row * patch, min((row + 1) * patch, size[0])), slice(column * patch, min((column + 1) * patch, size[1])))
        for row in range(grid[0])
        for column in range(grid[1])
    ]


def score(model: nn.Module, image: Tensor) -> Tensor:
    output = model(image)
    return getattr(output, "logits", output)[0, 2]


def extent_of(grid: tuple[int, int], patch: int) -> tuple[int, int]:
    return grid[0] * patch, grid[1] * patch


class TestGeometry:
    @pytest.mark.parametrize("case", CASES)
    def test_adapters_say_what_their_grid_takes_up(self, case: str) -> None:
        _, size, grid, patch = CASES[case]
        adapter = adapt(model_of(case))
        assert adapter.grid(size) == grid
        assert adapter.extent(size) == extent_of(grid, patch)

    @pytest.mark.parametrize("kind", TIMM)
    def test_whole_patches_need_no_extent(self, kind: str) -> None:
        assert adapt(make_model(kind)).extent(TIMM[kind].size) is None

    def test_merged_patches_are_padded_at_each_merging(self) -> None:
        assert grid_extent((40, 44), (4, 4), [(10, 11), (5, 6), (3, 3), (2, 2)]) == (64, 64)
        assert grid_extent((64, 32), (4, 4), [(16, 8), (8, 4), (4, 2)]) is None

    def test_what_cannot_be_cut_from_the_image_spreads_over_it(self) -> None:
        assert grid_extent((224, 224), (1, 1), [(14, 14)]) is None  # cut from a smaller feature map
        assert grid_extent((40, 24), None, [(7, 5)]) is None

    @pytest.mark.parametrize(("size", "grid", "patch"), PLACES)
    def test_patches_of_pixels_and_back(self, size: tuple[int, int], grid: tuple[int, int], patch: int) -> None:
        extent = extent_of(grid, patch)
        places = patch_of_pixel(size, grid, extent)
        rows, columns = (torch.arange(side) // patch for side in size)
        assert torch.equal(places, rows.clamp(max=grid[0] - 1)[:, None] * grid[1] + columns.clamp(max=grid[1] - 1))
        values = torch.arange(2 * math.prod(grid), dtype=torch.int32).reshape(2, *grid)
        assert torch.equal(at_pixels(values, size, extent), values.flatten(1)[:, places])
        pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for mean in (False, True):
            own = [pixels[..., y, x].flatten(2) for y, x in squares(size, grid, patch)]
            expected = torch.stack([each.mean(2) if mean else each.sum(2) for each in own], 2).view(2, 3, *grid)
            torch.testing.assert_close(gather_by_patch(pixels, grid, extent, mean=mean), expected)

    @pytest.mark.parametrize(("size", "grid", "patch"), PLACES)
    def test_maps_are_interpolated_between_the_true_centres(
        self, size: tuple[int, int], grid: tuple[int, int], patch: int
    ) -> None:
        maps = torch.randn(3, *grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rows, columns = ((np.arange(count) + 0.5) * patch for count in grid)  # centres of patches, then of pixels
        y, x = (np.arange(side) + 0.5 for side in size)
        along = np.stack([[np.interp(x, columns, row) for row in each] for each in maps.numpy()])
        expected = np.stack([np.stack([np.interp(y, rows, line) for line in each.T], 1) for each in along])
        found = enlarged(maps, size, "bilinear", extent_of(grid, patch))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
        for mode in ("bilinear", "bicubic"):  # as if the outermost patches went on for ever
            wide = F.pad(maps[:, None], (0, 9, 0, 9), mode="replicate")
            large = F.interpolate(wide, scale_factor=float(patch), mode=mode, align_corners=False)
            found = enlarged(maps, size, mode, extent_of(grid, patch))
            torch.testing.assert_close(found, large[:, 0, : size[0], : size[1]])

    def test_drawn_in_another_size(self) -> None:
        assert scaled_extent((56, 70), (60, 79), (120, 158)) == (112, 140)
        assert scaled_extent(None, (60, 79), (120, 158)) is None
        maps = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
        for size in ((91, 133), (7, 9), (3, 2), (480, 640)):
            extent = scaled_extent((56, 70), (60, 79), size)
            assert extent is not None
            assert upsample(maps, size, "bicubic", extent).shape == (1, *size)
            nearest = upsample(maps, size, "nearest", extent)
            assert torch.equal(nearest, at_pixels(maps, size, extent))

    def test_frames(self) -> None:
        pixels = torch.arange(12.0).view(1, 3, 4)
        assert framed(pixels, (2, 6), -1).tolist() == [[[0, 1, 2, 3, -1, -1], [4, 5, 6, 7, -1, -1]]]
        assert framed(pixels, None, -1) is pixels


class TestMethods:
    @pytest.mark.parametrize("case", CASES)
    def test_ablation_takes_away_the_pixels_of_one_patch(self, case: str) -> None:
        model, image, (_, size, grid, patch) = model_of(case), image_of(case), CASES[case]
        lost = []
        with torch.no_grad():
            for y, x in squares(size, grid, patch):
                changed = image.clone()
                changed[..., y, x] = 0
                lost.append(score(model, image) - score(model, changed))
        expected = torch.stack(lost).view(1, *grid)
        for name, options in (("feature_ablation", {}), ("occlusion", {"window": 1})):
            found = get_explainer(name, model, **options)(image, 2).scores
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # captum counts in single precision

    @pytest.mark.parametrize("case", CASES)
    def test_windows_of_occlusion_end_with_the_grid(self, case: str) -> None:
        model, image, (_, _, (h, w), patch) = model_of(case), image_of(case), CASES[case]
        sums, counts = torch.zeros(2, h, w, dtype=torch.float64)
        with torch.no_grad():
            for row in range(h - 1):
                for column in range(w - 1):
                    changed = image.clone()
                    changed[..., row * patch : (row + 2) * patch, column * patch : (column + 2) * patch] = 0
                    sums[row : row + 2, column : column + 2] += score(model, image) - score(model, changed)
                    counts[row : row + 2, column : column + 2] += 1
        found = get_explainer("occlusion", model, window=2)(image, 2).scores[0]
        torch.testing.assert_close(found, sums / counts, rtol=1e-6, atol=1e-6)
        lengthways = get_explainer("occlusion", model, window=h)(image, 2).scores[0]
        torch.testing.assert_close(lengthways, lengthways[:1].expand(h, -1), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("case", CASES)
    def test_gradients_are_summed_over_true_patches(self, case: str) -> None:
        model, image, (_, size, grid, patch) = model_of(case), image_of(case), CASES[case]
        leaf = image.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(model, leaf), leaf)
        for name, pixels, mean in (
            ("input_x_gradient", (image * gradient).sum(1), False),
            ("saliency", gradient.abs().mean(1), True),
        ):
            own = [pixels[0, y, x] for y, x in squares(size, grid, patch)]
            expected = torch.stack([each.mean() if mean else each.sum() for each in own]).view(1, *grid)
            torch.testing.assert_close(get_explainer(name, model)(image, 2).scores, expected)

    @pytest.mark.parametrize(
        ("name", "options", "case"),
        [
            ("full_lrp", {}, "leaves out"),
            *(
                (name, options, case)
                for name, options in (
                    ("attnlrp", {}),
                    ("integrated_gradients", {}),
                    ("vit_cx", {"noise": 0.0}),
                    ("kernel_shap", {"samples": 60}),
                )
                for case in ("leaves out", "pads")
            ),
        ],
    )
    def test_maps_are_those_of_the_image_cut_or_padded_by_hand(
        self, name: str, options: dict[str, Any], case: str
    ) -> None:
        explainer = get_explainer(name, model_of(case), **options)
        found, expected = (explainer(each, 2) for each in (image_of(case), whole_patches(case)))
        assert expected.extent is None
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize(("size", "extent"), [((29, 37), (24, 32)), ((22, 27), (24, 32))])
    def test_kernel_shap_of_a_sum_over_patches(self, size: tuple[int, int], extent: tuple[int, int]) -> None:
        adapter, contributions, image = summing(size)
        found = get_explainer("kernel_shap", adapter, samples=300)(image, 1)
        assert found.extent == extent
        torch.testing.assert_close(found.scores[0], contributions, rtol=1e-3, atol=1e-5)


class Summing(PatchEvidence):
    """Evidence of patches, of which the last ones may be padded."""

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return super().forward(F.pad(images, (0, max(0, 32 - width), 0, max(0, 24 - height))))


class SummingAdapter(BlackBoxAdapter):
    patch_size = (8, 8)


def summing(size: tuple[int, int]) -> tuple[BlackBoxAdapter, Tensor, Tensor]:
    """A model whose logit 1 is a sum over 3×4 patches of 8 pixels; what each adds to it; and the image."""
    weights = distinct_weights()
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    framed_image = F.pad(image, (0, 32 - size[1], 0, 24 - size[0]))
    contributions = weights * F.avg_pool2d(framed_image.mean(1), 8)[0]
    return SummingAdapter(Summing(weights).eval(), (3, *size), (3, 4)), contributions.detach(), image


class TestHeatmaps:
    @pytest.mark.parametrize("case", CASES)
    def test_one_patch_lights_its_own_pixels(self, case: str) -> None:
        _, size, grid, patch = CASES[case]
        explanation = get_explainer("saliency", model_of(case))(image_of(case), 2)
        assert explanation.extent == extent_of(grid, patch)
        h, w = grid
        for chosen in (0, (h - 2) * w + w - 2, h * w - 1):
            one = replace(explanation, scores=F.one_hot(torch.tensor(chosen), h * w).view(1, h, w).double())
            expected = torch.zeros(size)
            y, x = squares(size, grid, patch)[chosen]
            # beyond the last patch pixels look like the nearest one
            y = slice(y.start, None) if chosen // w == h - 1 else y
            x = slice(x.start, None) if chosen % w == w - 1 else x
            expected[y, x] = 1
            assert torch.equal(one.heatmap(mode="nearest")[0], expected)
            large = one.heatmap((2 * size[0], 3 * size[1]), mode="nearest")[0]
            assert torch.equal(large, expected.repeat_interleave(2, 0).repeat_interleave(3, 1))
            lit = highest_patches(one.scores[0], size, 1 / (h * w), one.extent_in(size))
            assert np.array_equal(lit, expected.numpy() > 0)
            black = np.zeros((*size, 3), np.uint8)
            drawn = draw_view("box", black, one.scores[0], smooth=False, thickness=1, extent=one.extent_in(size))
            assert drawn[y.start, x.start].any()

    def test_the_shape_captum_takes(self) -> None:
        model, image = model_of("leaves out"), image_of("leaves out")
        explanation = get_explainer("saliency", model)(image, 2)
        found = get_explainer("saliency", model).attribute(image, 2)
        expected = upsample(explanation.scores, explanation.image_size, extent=explanation.extent)
        torch.testing.assert_close(found, expected[:, None].repeat(1, 3, 1, 1))

    def test_merged_patches(self) -> None:
        torch.manual_seed(0)
        model = SwinTransformer(
            patch_size=4,
            embed_dim=12,
            depths=(1, 1, 1),
            num_heads=(2, 2, 2),
            window_size=4,
            num_classes=5,
            dynamic_img_size=True,
        ).eval()
        images = torch.randn(1, 3, 40, 44, generator=torch.Generator().manual_seed(0))
        explanation = get_explainer("gradcam", model)(images, 1)
        assert (explanation.grid, explanation.extent) == ((3, 3), (48, 48))
        assert get_explainer("rollout", model)(images, 1).extent is None

    def test_saved_with_the_map(self, tmp_path: Path) -> None:
        for case in ("leaves out", "pads"):
            explanation = get_explainer("saliency", model_of(case))(image_of(case), 2)
            with np.load(explanation.save(tmp_path / "map.npz")) as stored:
                assert tuple(stored["extent"]) == explanation.extent
                assert tuple(stored["image_size"]) == explanation.image_size
        whole = get_explainer("saliency", model_of("pads"))(whole_patches("pads"), 2)
        with np.load(whole.save(tmp_path / "whole.npz")) as stored:
            assert "extent" not in stored

    def test_layers_of_a_report(self) -> None:
        scores, size = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)), (60, 79)
        assert layer(scores, size, signed=False).patches != layer(scores, size, signed=False, extent=(56, 70)).patches


def measured(size: tuple[int, int]) -> tuple[Tensor, MetricBatch]:
    """What patches contribute to class 1 of `summing`, and a batch of it."""
    adapter, contributions, image = summing(size)
    batch = MetricBatch(
        contributions[None],
        targets=torch.tensor([1]),
        inputs=image,
        predictor=Predictor(adapter),
        extent=adapter.extent(size),
    )
    return contributions, batch


class TestMetrics:
    @pytest.mark.parametrize(("size", "grid", "patch"), PLACES)
    def test_pixels_are_ranked_with_their_patch(self, size: tuple[int, int], grid: tuple[int, int], patch: int) -> None:
        scores = torch.rand(2, *grid, generator=torch.Generator().manual_seed(0))
        found = rank_pixels(scores, size, "patches", extent=extent_of(grid, patch)).ranks
        order = scores.flatten(1).argsort(1, descending=True).argsort(1)
        for place, (y, x) in enumerate(squares(size, grid, patch)):
            assert torch.equal(found[:, y, x].flatten(1).unique(dim=1)[:, 0], order[:, place].int())
            assert found[:, y, x].flatten(1).unique(dim=1).shape == (2, 1)

    @pytest.mark.parametrize("size", [(29, 37), (22, 27)])
    def test_sums_of_patches_foretell_their_removal(self, size: tuple[int, int]) -> None:
        _, batch = measured(size)
        options = {"replacement": "zeros", "draws": 20, "share": 0.3}
        found = create_metric("faithfulness_correlation", **options).measure(batch)["correlation"]
        torch.testing.assert_close(found, torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-6)
        found = create_metric("infidelity", normalize=False, **options).measure(batch)["infidelity"]
        torch.testing.assert_close(found, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("size", [(29, 37), (22, 27)])
    def test_curves_of_patches_fall_as_on_paper(self, size: tuple[int, int]) -> None:
        contributions, batch = measured(size)
        metric = create_metric("deletion", order="patches", steps=12)
        left = contributions.flatten().double().sort().values.cumsum(0).flip(0)
        expected = torch.cat([left, torch.zeros(1, dtype=torch.float64)]).sigmoid()
        torch.testing.assert_close(metric.measure(batch)["probability"][0], expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("size", "grid", "patch"), PLACES)
    def test_relevance_of_a_patch_lies_on_its_pixels(
        self, size: tuple[int, int], grid: tuple[int, int], patch: int
    ) -> None:
        chosen = (grid[0] - 2) * grid[1] + grid[1] - 2
        scores = F.one_hot(torch.tensor(chosen), math.prod(grid)).view(1, *grid).float()
        mask = torch.zeros(1, *size, dtype=torch.int8)
        y, x = squares(size, grid, patch)[chosen]
        mask[0, y, x] = 1
        batch = MetricBatch(scores, masks=mask, extent=extent_of(grid, patch))
        for name, statistic in (("energy_in_mask", "energy"), ("pointing_game", "hit_rate")):
            assert create_metric(name, upsampling="nearest").measure(batch)[statistic].tolist() == [1]

    def test_evaluations_know_the_extent(self) -> None:
        subject = Subject(adapt(model_of("pads")))
        ((_, batch),) = metric_batches([create_method("saliency")], subject, image_of("pads"), 2)
        assert batch.extent == (40, 48)

    def test_masks_of_patches(self) -> None:
        masks = (torch.rand(2, 34, 45, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.int8)
        cover, counts = patch_cover(masks, (5, 6), (40, 48))
        for place, (y, x) in enumerate(squares((34, 45), (5, 6), 8)):
            torch.testing.assert_close(cover[:, place], masks[:, y, x].float().mean((1, 2)))
            assert counts[:, place].tolist() == [float(masks[0, y, x].numel() >= 32)] * 2


def subject_of(case: str) -> Subject:
    preprocessing = Preprocessing(CASES[case][1], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop_fraction=1.0)
    return Subject(adapt(model_of(case).float()), preprocessing)


@pytest.mark.parametrize("case", ["leaves out, fixed size", "pads"])
def test_comparisons_and_reports(case: str, tmp_path: Path) -> None:
    _, (height, width), (h, w), patch = CASES[case]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    found = compare(subject_of(case), [picture], ["saliency", "rollout"])
    page = found.save(tmp_path / "report.html").read_text()
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    taken = pytest.approx([h * patch / height, w * patch / width])
    assert [each["taken"] for each in (*data["maps"], *data["attention"])] == [taken] * (len(data["maps"]) + 1)
    assert found.picture(view="patches").width == found.picture().width


@pytest.mark.parametrize("case", ["leaves out, fixed size", "pads"])
def test_exports_draw_what_explanations_do(case: str, tmp_path: Path) -> None:
    exported = pytest.importorskip("exported")
    subject, (_, _, grid, patch) = subject_of(case), CASES[case]
    model = LoadedModel("cut", subject.adapter.model, subject, "made up", 5)
    file = exported.picture(tmp_path / "picture.png")
    result = exported.export([str(file)], tmp_path / "out", model=model, methods=("rollout",), dtype="float32")
    assert result.manifest["methods"]["rollout"]["extent"] == list(extent_of(grid, patch))
    expected = get_explainer("rollout", subject)(str(file)).heatmap()[0]
    np.testing.assert_allclose(result.heatmap(0, "rollout"), expected, atol=1e-6)
    whole = exported.export([str(file)], tmp_path / "whole", methods=("rollout",))
    assert "extent" not in whole.manifest["methods"]["rollout"]


@pytest.mark.parametrize("case", ["leaves out, fixed size", "pads"])
def test_records_of_files_say_what_patches_take_up(case: str, tmp_path: Path) -> None:
    subject, (_, (height, width), grid, patch) = subject_of(case), CASES[case]
    model = LoadedModel("cut", subject.adapter.model, subject, "made up", 5)
    Image.new("RGB", (width, height), (200, 20, 90)).save(tmp_path / "one.png")
    explain_to_folder([tmp_path / "one.png"], model, [create_method("rollout")], [1], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "one.json").read_text())
    assert (record["patch_grid"], record["patch_extent"]) == (list(grid), list(extent_of(grid, patch)))


def test_benchmarks_measure_stored_maps_where_patches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, seen = [], []

    def extent(_: Any, size: tuple[int, int], grid: tuple[int, int] | None = None) -> tuple[int, int]:
        asked.append((size, grid))
        return size[0] - 5, size[1] - 3

    def spy(metric: Any, batch: MetricBatch) -> Any:
        seen.append(batch.extent)
        return measure(metric, batch)

    measure = chunk_run.measure
    monkeypatch.setattr(ModelAdapter, "extent", extent)
    monkeypatch.setattr(chunk_run, "measure", spy)
    settings = {"methods": ["rollout"], "metrics": ["energy_in_mask"], "data": {"format": "scenes", "limit": 1}}
    run_bench(BenchConfiguration.from_mapping(settings), tmp_path)
    assert seen == [(91, 93)]
    assert ((96, 96), (12, 12)) in asked


class Resizing(nn.Module):
    """Brings images to 32×32 before the model sees them."""

    def __init__(self, image_size: tuple[int, int] = (32, 32)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.image_size = VisionTransformer(img_size=32, patch_size=8, **SMALL).eval(), image_size

    def forward(self, images: Tensor) -> Tensor:
        return self.model(F.interpolate(images, (32, 32), mode="bilinear"))


class TestModelsThatResizeInside:
    def test_as_many_patches_of_another_shape_are_noticed(self) -> None:
        adapter = adapt(Resizing())
        assert isinstance(adapter, DiscoveredAdapter)
        message = r"found images of 16×64 pixels, of which the model makes 32×32.*expected 32×32: resize the images"
        with pytest.raises(InputError, match=message):
            get_explainer("rollout", adapter)(torch.randn(1, 3, 16, 64))

    @pytest.mark.parametrize("size", [(16, 64), (36, 36)])
    def test_the_grid_spreads_evenly_over_what_was_probed(self, size: tuple[int, int]) -> None:
        adapter = DiscoveredAdapter(Resizing(), image_size=size)
        assert (adapter.grid(size), adapter.extent(size), adapter.patch_size) == ((4, 4), None, None)
        with pytest.raises(InputError, match=f"expected {size[0]}×{size[1]}; for another size"):
            adapter.grid((64, 64))

    def test_other_sizes_are_looked_at_once(self) -> None:
        model = model_of("leaves out")
        adapter = adapt(model)
        stem = next(each for each in model.modules() if isinstance(each, nn.Conv2d))
        get_explainer("rollout", adapter)(image_of("leaves out"), 1)
        assert not stem._forward_pre_hooks
