"""Energy and pointing game on known maps; what every metric of localisation promises."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from vitexplain.errors import InputError
from vitexplain.metrics.catalogue import create_metric, metric_info
from vitexplain.metrics.localisation import energy_in_mask
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.tally import Summary, Tally
from vitexplain.render import upsample

SIZE = (24, 32)
ALL = (
    "auprc",
    "energy_in_box",
    "energy_in_mask",
    "max_box_accuracy",
    "max_box_accuracy_v2",
    "pixel_average_precision",
    "pointing_game",
    "segmentation",
)


def random_batch(seed: int, count: int = 4) -> MetricBatch:
    """Maps of 3 × 5 patches, masks of two rectangles with a rim left out, their boxes, images without object too."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, *SIZE, dtype=torch.int8)
    boxes = []
    for image in range(count):
        corners = torch.stack(
            [torch.randint(0, side - 8, (image % 3,), generator=generator) for side in (SIZE[1], SIZE[0])], 1
        )
        boxes.append(torch.cat([corners, corners + 7], 1).float())
        for x0, y0, x1, y1 in boxes[-1].int().tolist():
            masks[image, y0:y1, x0:x1] = 1
    masks[:, -1] = -1
    scores = torch.randn(count, 3, 5, generator=generator)
    return MetricBatch(scores, masks=masks, boxes=boxes, inputs=torch.zeros(count, 3, *SIZE))


def parts(batch: MetricBatch, *rows: slice) -> list[MetricBatch]:
    assert batch.masks is not None
    assert batch.boxes is not None
    assert batch.inputs is not None
    return [
        MetricBatch(batch.scores[row], masks=batch.masks[row], boxes=batch.boxes[row], inputs=batch.inputs[row])
        for row in rows
    ]


def summary(name: str, *batches: MetricBatch, **options: object) -> Summary:
    tally = Tally(create_metric(name, **options))
    for batch in batches:
        tally.update(batch)
    return tally.compute()


def one_object(scores: Tensor, rows: slice, columns: slice) -> MetricBatch:
    masks = torch.zeros(1, *SIZE, dtype=torch.int8)
    masks[:, rows, columns] = 1
    return MetricBatch(scores[None], masks=masks)


def peak(row: int, column: int, grid: tuple[int, int] = (3, 4)) -> Tensor:
    scores = torch.zeros(grid)
    scores[row, column] = 1
    return scores


@pytest.mark.parametrize("name", ALL)
def test_parts_merge_to_the_whole(name: str) -> None:
    batch = random_batch(3, count=9)
    whole = Tally(create_metric(name))
    whole.update(batch)
    tallies = []
    for part in parts(batch, slice(0, 1), slice(1, 6), slice(6, 9)):
        tallies.append(Tally(create_metric(name)))
        tallies[-1].update(part)
    merged = tallies[0].merge(*tallies[1:]).compute()
    assert merged.figures == pytest.approx(whole.compute().figures, abs=1e-12, nan_ok=False)
    assert (merged.images, merged.unmeasured) == (9, whole.compute().unmeasured)


@pytest.mark.parametrize("name", ALL)
def test_figures_are_those_announced_and_lie_between_0_and_1(name: str) -> None:
    figures = summary(name, random_batch(4, count=9)).figures
    assert list(figures) == [figure.name for figure in metric_info(name).figures]
    assert all(0 <= value <= 1 for value in figures.values())


@pytest.mark.parametrize("name", ALL)
def test_resamples_of_means_give_a_figure_each(name: str) -> None:
    metric = create_metric(name)
    rows = Tally(metric).update(random_batch(5, count=9))
    statistics = {key: torch.from_numpy(rows[key]) for key in metric.measure(random_batch(5, count=9))}
    means = {key: value.nanmean(0) for key, value in statistics.items()}
    stacked = {key: torch.stack([value, value * 0.5 + value.mean() * 0.25]) for key, value in means.items()}
    single, several = metric.summarise(means), metric.summarise(stacked)
    for key, value in several.items():
        assert value.shape == (2,)
        assert float(value[0]) == pytest.approx(float(single[key]))


@pytest.mark.parametrize("name", ALL)
def test_the_batch_is_left_as_it_was(name: str) -> None:
    batch, untouched = random_batch(6), random_batch(6)
    create_metric(name).measure(batch)
    for field in ("scores", "masks", "inputs"):
        assert torch.equal(getattr(batch, field), getattr(untouched, field))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_scores_precision_does_not_matter(name: str, dtype: torch.dtype) -> None:
    rough = random_batch(7)
    scores = rough.scores.bfloat16()
    batches = [
        MetricBatch(scores.to(kind), masks=rough.masks, boxes=rough.boxes, inputs=rough.inputs)
        for kind in (torch.float32, dtype)
    ]
    first, second = (create_metric(name).measure(batch) for batch in batches)
    for key, value in first.items():
        assert torch.equal(value.nan_to_num(-1), second[key].nan_to_num(-1))


def test_energy_is_the_share_of_positive_scores_on_the_object() -> None:
    scores = torch.tensor([[4.0, -9, 2], [1, 0, 3]])
    mask = torch.zeros(4, 6)
    mask[:, 3:] = 1  # half of the second column of patches, all of the third
    assert float(energy_in_mask(scores, mask)) == pytest.approx(5 / 10)
    mask[:2, 4:] = -1  # the 2 does not count any more
    assert float(energy_in_mask(scores, mask)) == pytest.approx(3 / 8)


def test_energy_without_positive_scores_is_undefined() -> None:
    assert energy_in_mask(-torch.ones(2, 3), torch.ones(4, 6, dtype=torch.bool)).isnan()


@pytest.mark.parametrize(("scores", "masks"), [((2, 3), (4, 7)), ((1, 2, 3), (2, 4, 6))])
def test_energy_refuses_shapes_that_do_not_fit(scores: tuple[int, ...], masks: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples"):
        energy_in_mask(torch.rand(scores), torch.ones(masks))


@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
def test_energy_is_that_of_loops_over_pixels(upsampling: str) -> None:
    batch = random_batch(8, count=6)
    assert batch.masks is not None
    expected = []
    for picture, mask in zip(upsample(batch.scores, SIZE, upsampling).double(), batch.masks, strict=True):
        on_object = everywhere = 0.0
        for values, labels in zip(picture.tolist(), mask.tolist(), strict=True):
            for value, label in zip(values, labels, strict=True):
                on_object += max(value, 0) * (label == 1)
                everywhere += max(value, 0) * (label >= 0)
        expected.append(on_object / everywhere if bool((mask == 1).any()) else math.nan)
    found = create_metric("energy_in_mask", upsampling=upsampling).measure(batch)["energy"]
    assert found.tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_energy_with_whole_patches_is_that_of_the_patch_grid() -> None:
    batch = one_object(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), slice(3, 11), slice(5, 30))
    assert batch.masks is not None
    found = create_metric("energy_in_mask", upsampling="nearest").measure(batch)["energy"]
    assert float(found) == pytest.approx(float(energy_in_mask(batch.scores, batch.masks)), abs=1e-6)


def test_a_flat_map_has_the_energy_of_the_objects_share() -> None:
    figures = summary("energy_in_mask", one_object(torch.ones(3, 4), slice(3, 11), slice(5, 30))).figures
    assert figures["energy"] == pytest.approx(200 / 768, abs=1e-6)
    assert figures["chance"] == pytest.approx(200 / 768)


def test_each_image_has_its_own_boxes_and_overlaps_count_once() -> None:
    scores = torch.stack([peak(0, 0), peak(2, 3), torch.ones(3, 4)])
    boxes = [torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[0.0, 0, 8, 8]] * 2)]
    batch = MetricBatch(scores, boxes=boxes, inputs=torch.zeros(3, 3, *SIZE))
    found = create_metric("energy_in_box", upsampling="nearest").measure(batch)
    assert found["energy"].tolist() == pytest.approx([1, 0, 64 / 768])
    assert found["chance"].tolist() == pytest.approx([64 / 768] * 3)


@pytest.mark.parametrize("name", ["energy_in_mask", "energy_in_box", "pointing_game"])
def test_large_objects_and_images_without_object_are_left_out(name: str) -> None:
    boxes = [torch.tensor([[0.0, 0, 16, 24]]), torch.tensor([[0.0, 0, 16, 23]]), torch.zeros(0, 4)]
    masks = torch.zeros(3, *SIZE, dtype=torch.int8)
    masks[0, :, :16], masks[1, :23, :16] = 1, 1
    batch = MetricBatch(torch.ones(3, 3, 4), masks=masks, boxes=boxes, inputs=torch.zeros(3, 3, *SIZE))
    for limit, known in ((0.5, [False, True, False]), (0.51, [True, True, False]), (0.2, [False] * 3)):
        for value in create_metric(name, largest_object=limit).measure(batch).values():
            assert value.isfinite().tolist() == known


def test_the_peak_on_the_object_is_a_hit() -> None:
    inside, outside = (one_object(peak(1, column), slice(8, 16), slice(8, 16)) for column in (1, 2))
    assert summary("pointing_game", inside).figures["hit_rate"] == 1
    assert summary("pointing_game", outside).figures["hit_rate"] == 0
    assert summary("pointing_game", outside).figures["chance"] == pytest.approx(64 / 768)


def test_equal_peaks_count_by_the_share_that_hits() -> None:
    patches = peak(1, 1) + peak(1, 3) + peak(2, 0)
    batch = one_object(patches, slice(8, 12), slice(8, 16))  # half of one of three
    assert summary("pointing_game", batch, upsampling="nearest").figures["hit_rate"] == pytest.approx(1 / 6)
    pixels = torch.zeros(SIZE)
    pixels[9, 9] = pixels[3, 3] = pixels[8, 12] = 1
    batch = one_object(pixels, slice(8, 12), slice(8, 16))
    assert summary("pointing_game", batch).figures["hit_rate"] == pytest.approx(2 / 3)


def test_a_flat_map_hits_by_chance() -> None:
    figures = summary("pointing_game", one_object(torch.full((3, 4), 0.3), slice(8, 16), slice(8, 16))).figures
    assert figures["hit_rate"] == pytest.approx(figures["chance"]) == pytest.approx(64 / 768)


def test_a_peak_in_the_corner_is_level_in_spite_of_rounding() -> None:
    # Beyond the centre of the corner's patch nothing is interpolated: 4 × 4 pixels, 4 of them on the object
    for height in torch.rand(50, generator=torch.Generator().manual_seed(0)):
        batch = one_object(height * peak(2, 3), slice(22, 24), slice(24, 30))
        assert summary("pointing_game", batch).figures["hit_rate"] == pytest.approx(4 / 16)


@pytest.mark.parametrize(("tolerance", "hit"), [(0, 0), (4, 0), (5, 1), (15, 1)])
def test_tolerance_is_a_distance_in_pixels(tolerance: int, hit: int) -> None:
    pixels = torch.zeros(SIZE)
    pixels[10, 10] = 1
    batch = one_object(pixels, slice(14, 15), slice(13, 14))  # 4 down and 3 across: 5 away
    figures = summary("pointing_game", batch, tolerance=tolerance).figures
    assert figures["hit_rate"] == hit
    near = [math.hypot(y - 14, x - 13) <= tolerance for y in range(SIZE[0]) for x in range(SIZE[1])]
    assert figures["chance"] == pytest.approx(np.mean(near))


def test_pixels_left_out_cannot_be_the_peak() -> None:
    pixels = torch.zeros(SIZE)
    pixels[10, 10], pixels[20, 20] = 2, 1
    batch = one_object(pixels, slice(19, 22), slice(19, 22))
    assert batch.masks is not None
    assert summary("pointing_game", batch).figures["hit_rate"] == 0
    batch.masks[0, 10, 10] = -1
    assert summary("pointing_game", batch).figures["hit_rate"] == 1


def test_boxes_do_as_well_as_their_masks() -> None:
    batch = random_batch(9, count=8)
    assert batch.masks is not None
    masks = batch.masks.clamp(min=0)
    by_mask = MetricBatch(batch.scores, masks=masks)
    by_box = MetricBatch(batch.scores, boxes=batch.boxes, inputs=batch.inputs)
    pairs = [("pointing_game", "pointing_game"), ("energy_in_mask", "energy_in_box")]
    for first, second in pairs:
        expected, found = create_metric(first).measure(by_mask), create_metric(second).measure(by_box)
        for key, value in expected.items():
            assert torch.equal(value.nan_to_num(-1), found[key].nan_to_num(-1))


def test_pointing_needs_to_know_the_object() -> None:
    with pytest.raises(InputError, match="masks or boxes"):
        create_metric("pointing_game").measure(MetricBatch(torch.rand(1, 3, 4)))
    with pytest.raises(InputError, match="inputs"):
        create_metric("pointing_game").measure(MetricBatch(torch.rand(1, 3, 4), boxes=[torch.zeros(0, 4)]))


@pytest.mark.peers
@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_quantus(quantus: ModuleType, seed: int) -> None:
    generator = np.random.default_rng(seed)
    maps = generator.random((6, *SIZE), dtype=np.float32)
    masks = np.zeros((6, *SIZE), np.int8)
    for mask in masks:
        top, left = generator.integers(0, 12, 2)
        mask[top : top + 11, left : left + 17] = 1
    batch = MetricBatch(torch.from_numpy(maps), masks=torch.from_numpy(masks))
    theirs = {}
    for name, metric in (("hit_rate", quantus.PointingGame), ("energy", quantus.RelevanceMassAccuracy)):
        measure = metric(abs=False, normalise=False, disable_warnings=True, display_progressbar=False)
        theirs[name] = measure(
            model=torch.nn.Identity(),
            x_batch=np.zeros((6, 3, *SIZE), np.float32),
            y_batch=np.zeros(6, int),
            a_batch=maps[:, None],
            s_batch=masks[:, None].astype(bool),
        )
    hits = create_metric("pointing_game").measure(batch)["hit_rate"]
    assert hits.tolist() == [float(hit) for hit in theirs["hit_rate"]]
    energy = create_metric("energy_in_mask").measure(batch)["energy"]
    assert energy.tolist() == pytest.approx([float(each) for each in theirs["energy"]], abs=1e-5)
