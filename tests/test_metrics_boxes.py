"""Boxes from heatmaps and masks from boxes; MaxBoxAcc, V2 and PxAP against loops over single pixels."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from vitexplain.boxes import box_iou, boxes_above, boxes_to_masks, heatmap_to_boxes
from vitexplain.errors import InputError, OptionError
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.tally import Tally
from vitexplain.render import normalise, upsample

SIZE = (13, 17)
Box = tuple[int, int, int, int]


def rectangle(box: Box, size: tuple[int, int] = SIZE) -> Tensor:
    picture = torch.zeros(size)
    picture[box[1] : box[3], box[0] : box[2]] = 1
    return picture


def batch_of(maps: Tensor, boxes: list[list[Box]], size: tuple[int, int] = SIZE) -> MetricBatch:
    rows = [torch.tensor(each, dtype=torch.float64).reshape(-1, 4) for each in boxes]
    return MetricBatch(maps, inputs=torch.zeros(len(maps), 3, *size), boxes=rows)


def figures(name: str, batch: MetricBatch, **options: object) -> dict[str, float]:
    tally = Tally(create_metric(name, **options))
    tally.update(batch)
    return dict(tally.compute().figures)


def neighbours(place: tuple[int, int], diagonal: bool) -> Iterator[tuple[int, int]]:
    for down in (-1, 0, 1):
        for across in (-1, 0, 1):
            if (down or across) and (diagonal or not (down and across)):
                yield place[0] + down, place[1] + across


def regions(pixels: set[tuple[int, int]], diagonal: bool) -> list[set[tuple[int, int]]]:
    """Connected sets of pixels, one by one."""
    left, found = set(pixels), []
    while left:
        edge, region = [left.pop()], set()
        while edge:
            place = edge.pop()
            region.add(place)
            for each in neighbours(place, diagonal):
                if each in left:
                    left.remove(each)
                    edge.append(each)
        found.append(region)
    return found


def boxes_by_flooding(hot: np.ndarray) -> set[Box]:
    """A box around each region and around each hole, the hole's frame included; written without contours."""
    height, width = hot.shape
    inside = {(int(y), int(x)) for y, x in zip(*np.nonzero(hot), strict=True)}
    outside = {(y, x) for y in range(-1, height + 1) for x in range(-1, width + 1)} - inside
    holes = [region for region in regions(outside, diagonal=False) if (-1, -1) not in region]
    found = set()
    for group, frame in ((regions(inside, diagonal=True), 0), (holes, 1)):
        for region in group:
            rows, columns = [y for y, _ in region], [x for _, x in region]
            x0, y0, x1, y1 = min(columns) - frame, min(rows) - frame, max(columns) + frame, max(rows) + frame
            found.add((x0, y0, min(x1 + 1, width - 1), min(y1 + 1, height - 1)))
    return found


def iou_by_pixels(first: Box, second: Box) -> float:
    def pixels(box: Box) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[2] + 1) for y in range(box[1], box[3] + 1)}

    return len(pixels(first) & pixels(second)) / len(pixels(first) | pixels(second))


def rough_maps(count: int, seed: int) -> Tensor:
    return torch.rand(count, 4, 5, generator=torch.Generator().manual_seed(seed))


def random_boxes(count: int, seed: int) -> list[list[Box]]:
    numbers = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        corners = [sorted(numbers.choice(side, 2, replace=False).tolist()) for side in (17, 13, 17, 13)]
        pairs = [(corners[0], corners[1]), (corners[2], corners[3])][: int(numbers.integers(1, 3))]
        found.append([(x[0], y[0], x[1], y[1]) for x, y in pairs])
    return found


def test_the_box_around_a_rectangle_ends_behind_its_last_pixel() -> None:
    assert heatmap_to_boxes(rectangle((3, 2, 9, 7))[None])[0].tolist() == [[3, 2, 9, 7]]


def test_the_box_at_the_lower_right_border_ends_on_the_last_pixel() -> None:
    assert heatmap_to_boxes(rectangle((3, 2, 17, 13))[None])[0].tolist() == [[3, 2, 16, 12]]


def test_only_heat_strictly_above_the_threshold_is_hot() -> None:
    picture = rectangle((3, 2, 9, 7))
    picture[10, 12] = 0.5  # level 127, as is the cut
    assert len(heatmap_to_boxes(picture[None], 0.5)[0]) == 1
    assert len(heatmap_to_boxes(picture[None], 0.49)[0]) == 2


def test_the_threshold_is_a_share_of_the_highest_level() -> None:
    dim = rectangle((3, 2, 9, 7)) * 0.4
    assert heatmap_to_boxes(dim[None], 0.5)[0].tolist() == [[3, 2, 9, 7]]


def test_a_map_without_heat_has_no_box() -> None:
    assert [len(boxes) for boxes in heatmap_to_boxes(torch.zeros(2, *SIZE))] == [0, 0]


def test_the_largest_contour_is_that_which_encloses_most() -> None:
    picture = rectangle((0, 0, 4, 4)) + rectangle((6, 3, 15, 11))
    assert heatmap_to_boxes(picture[None], largest=True)[0].tolist() == [[6, 3, 15, 11]]


@pytest.mark.parametrize("seed", range(20))
def test_boxes_are_those_of_regions_and_holes(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    hot = (numbers.random(SIZE) < numbers.uniform(0.2, 0.9)).astype(np.uint8)
    assert {tuple(box) for box in boxes_above(hot, 0).tolist()} == boxes_by_flooding(hot)


@pytest.mark.parametrize("shape", [(4, 4), (1, 2, 4, 4), (0, 4, 4)])
def test_heatmaps_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \(B, H, W\)"):
        heatmap_to_boxes(torch.zeros(shape))


@pytest.mark.parametrize("heat", [1.01, -0.01, torch.nan])
def test_heat_that_is_not_between_0_and_1_is_refused(heat: float) -> None:
    with pytest.raises(InputError, match="normalise"):
        heatmap_to_boxes(torch.full((1, 4, 4), heat))


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_thresholds_are_below_1(threshold: float) -> None:
    with pytest.raises(OptionError, match="threshold"):
        heatmap_to_boxes(torch.zeros(1, 4, 4), threshold)


def test_equal_boxes_overlap_fully() -> None:
    assert box_iou(np.array([[3, 2, 9, 7]]), np.array([[3, 2, 9, 7]])) == 1


def test_overlap_is_that_of_counted_pixels() -> None:
    boxes = [tuple(box) for each in random_boxes(10, 0) for box in each]
    expected = [[iou_by_pixels(first, second) for second in boxes] for first in boxes]
    np.testing.assert_allclose(box_iou(np.array(boxes), np.array(boxes)), expected, rtol=1e-15)


def test_masks_of_boxes_hold_the_pixels_whose_centre_is_inside() -> None:
    boxes = [torch.tensor([[3.0, 2, 9, 7], [8, 6, 40, 8.4]]), torch.zeros(0, 4), torch.tensor([[0.6, 0.5, 2.5, 1.51]])]
    masks = boxes_to_masks(boxes, SIZE)
    assert masks.dtype == torch.bool
    assert torch.equal(masks[0], (rectangle((3, 2, 9, 7)) + rectangle((8, 6, 17, 8))) > 0)
    assert not masks[1].any()
    assert torch.equal(masks[2], rectangle((1, 0, 2, 2)) > 0)


@pytest.mark.parametrize(
    "box", [[[3.0, 2, 3, 7]], [[9.0, 2, 3, 7]], [[3.0, 2, torch.inf, 7]], [[torch.nan, 2, 3, 7]], [3.0, 2, 9, 7]]
)
def test_boxes_that_are_none_are_refused(box: list[object]) -> None:
    with pytest.raises(InputError, match="boxes"):
        boxes_to_masks([torch.tensor(box)], SIZE)
    with pytest.raises(InputError, match="boxes"):
        create_metric("max_box_accuracy").measure(
            MetricBatch(torch.rand(1, 2, 3), inputs=torch.zeros(1, 3, *SIZE), boxes=[torch.tensor(box)])
        )


@pytest.mark.parametrize("name", ["max_box_accuracy", "max_box_accuracy_v2"])
def test_a_perfect_map_gets_everything(name: str) -> None:
    boxes: list[list[Box]] = [[(3, 2, 9, 7)], [(1, 4, 15, 12)], [(5, 0, 12, 9)]]
    found = figures(name, batch_of(torch.stack([rectangle(each[0]) for each in boxes]), boxes))
    assert found[name] == 1


@pytest.mark.parametrize("name", ["max_box_accuracy", "max_box_accuracy_v2"])
@pytest.mark.parametrize("height", [0.0, 3.7])
def test_a_flat_map_gets_nothing(name: str, height: float) -> None:
    boxes: list[list[Box]] = [[(0, 0, 9, 7)], [(0, 0, 17, 13)]]
    assert figures(name, batch_of(torch.full((2, 4, 5), height), boxes))[name] == 0


def test_an_inverted_map_misses() -> None:
    boxes: list[list[Box]] = [[(5, 4, 9, 8)]]
    inverted = 1 - rectangle(boxes[0][0])
    assert figures("max_box_accuracy", batch_of(inverted[None], boxes))["max_box_accuracy"] == 0


def test_an_overlap_of_exactly_the_limit_counts() -> None:
    batch = batch_of(rectangle((2, 2, 5, 5))[None], [[(2, 2, 5, 9)]])  # 4 × 4 of 4 × 8 pixels, both ends counted
    assert figures("max_box_accuracy", batch)["max_box_accuracy"] == 1
    assert figures("max_box_accuracy_v2", batch)["max_box_accuracy_v2"] == pytest.approx(2 / 3)


def test_an_object_in_pieces_counts_by_any_contour_in_v2_and_by_the_largest_in_v1() -> None:
    picture = (rectangle((0, 0, 4, 4)) + rectangle((6, 3, 15, 11)))[None]
    batch = batch_of(picture, [[(0, 0, 4, 4)]])
    assert figures("max_box_accuracy", batch)["max_box_accuracy"] == 0
    assert figures("max_box_accuracy_v2", batch)["max_box_accuracy_v2"] == 1


def test_each_overlap_has_its_own_best_threshold() -> None:
    # The second map needs a low threshold to reach 0.7, the first a high one; 0.3 is reached by both at any.
    first = rectangle((2, 2, 8, 8)) * 0.6 + rectangle((2, 2, 6, 6)) * 0.4
    found = figures("max_box_accuracy_v2", batch_of(torch.stack([first, first]), [[(2, 2, 8, 8)], [(2, 2, 6, 6)]]))
    assert found["box_accuracy_70"] == 0.5
    assert found["box_accuracy_30"] == 1
    assert found["max_box_accuracy_v2"] == pytest.approx((found["box_accuracy_50"] + 1.5) / 3)


def test_the_best_threshold_is_told() -> None:
    map_ = rectangle((2, 2, 14, 10)) * 0.6 + rectangle((4, 4, 8, 8)) * 0.4
    found = figures("max_box_accuracy", batch_of(map_[None], [[(4, 4, 8, 8)]]))
    assert found == {"max_box_accuracy": 1, "threshold": pytest.approx(153 / 255)}


@pytest.mark.parametrize(("thresholds", "images"), [(1, 8), (7, 8), (100, 8), (1000, 2)])
@pytest.mark.parametrize("largest", [True, False])
def test_accuracy_is_that_of_loops_over_every_threshold(thresholds: int, images: int, largest: bool) -> None:
    maps, boxes = rough_maps(images, thresholds), random_boxes(images, thresholds)
    heat = normalise(upsample(maps, SIZE, "bicubic")).numpy()
    accuracy: dict[float, list[float]] = {0.3: [], 0.5: [], 0.7: []}
    for step in range(thresholds):
        best = []
        for picture, truth in zip(heat, boxes, strict=True):
            levels = np.array([[int(np.float32(value) * np.float32(255)) for value in row] for row in picture])
            hot = levels > int(step * (1 / thresholds) * levels.max())
            drawn = [largest_contour(hot)] if largest else boxes_by_flooding(hot)
            best.append(max(iou_by_pixels(one, other) for one in drawn for other in truth))
        for overlap, values in accuracy.items():
            values.append(float(np.mean([each >= overlap for each in best])))
    highest = {overlap: max(values) for overlap, values in accuracy.items()}
    if largest:
        found = figures("max_box_accuracy", batch_of(maps, boxes), thresholds=thresholds)
        assert found["max_box_accuracy"] == pytest.approx(highest[0.5], abs=1e-12)
    else:
        found = figures("max_box_accuracy_v2", batch_of(maps, boxes), thresholds=thresholds)
        assert found == pytest.approx(
            {
                "max_box_accuracy_v2": np.mean(list(highest.values())),
                **{f"box_accuracy_{round(100 * overlap)}": value for overlap, value in highest.items()},
            },
            abs=1e-12,
        )


def largest_contour(hot: np.ndarray) -> Box:
    contours, _ = cv2.findContours(hot.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    x, y, width, height = cv2.boundingRect(sorted(contours, key=cv2.contourArea, reverse=True)[0])
    return x, y, min(x + width, SIZE[1] - 1), min(y + height, SIZE[0] - 1)


@pytest.mark.parametrize("seed", range(5))
def test_all_contours_do_no_worse_than_the_largest(seed: int) -> None:
    batch = batch_of(rough_maps(8, seed), random_boxes(8, seed))
    first, second = figures("max_box_accuracy", batch), figures("max_box_accuracy_v2", batch)
    assert first["max_box_accuracy"] <= second["box_accuracy_50"] <= second["box_accuracy_30"] <= 1
    assert second["box_accuracy_70"] <= second["box_accuracy_50"]


def test_annotated_boxes_are_cut_to_whole_pixels() -> None:
    map_ = rectangle((3, 2, 9, 7))[None]
    whole, part = (batch_of(map_, [[box]]) for box in [(3, 2, 9, 7), (3.9, 2.2, 9.9, 7.5)])
    metric = create_metric("max_box_accuracy_v2")
    for name, value in metric.measure(whole).items():
        assert torch.equal(value, metric.measure(part)[name])


def test_images_without_boxes_do_not_count() -> None:
    map_ = rectangle((3, 2, 9, 7))
    tally = Tally(create_metric("max_box_accuracy"))
    tally.update(batch_of(torch.stack([map_, map_]), [[(3, 2, 9, 7)], []]))
    assert tally.compute().figures["max_box_accuracy"] == 1
    assert tally.compute().unmeasured == 1
    alone = Tally(create_metric("max_box_accuracy"))
    alone.update(batch_of(map_[None], [[]]))
    assert all(np.isnan(value) for value in alone.compute().figures.values())


def pixel_batch(maps: Tensor, masks: Tensor) -> MetricBatch:
    return MetricBatch(maps, masks=masks.to(torch.int8))


def test_pixel_precision_of_a_perfect_map_is_1() -> None:
    masks = torch.stack([rectangle((3, 2, 9, 7)), rectangle((0, 0, 17, 6))])
    assert figures("pixel_average_precision", pixel_batch(masks.float(), masks))["pixel_average_precision"] == 1


def test_pixel_precision_of_a_flat_map_is_the_objects_share_of_all_pixels() -> None:
    masks = torch.stack([rectangle((3, 2, 9, 7)), rectangle((0, 0, 17, 6))])
    found = figures("pixel_average_precision", pixel_batch(torch.zeros(2, 4, 5), masks))
    assert found == pytest.approx({name: float(masks.mean()) for name in ("pixel_average_precision", "chance")})


def test_pixel_precision_of_random_and_inverted_maps() -> None:
    masks = torch.stack([rectangle((3, 2, 9, 7)), rectangle((0, 0, 17, 6))]).repeat(40, 1, 1)
    random = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0))
    share = float(masks.mean())
    found = figures("pixel_average_precision", pixel_batch(random, masks))["pixel_average_precision"]
    assert found == pytest.approx(share, abs=0.03)
    inverted = figures("pixel_average_precision", pixel_batch(1 - masks, masks))["pixel_average_precision"]
    assert inverted == pytest.approx(share)  # all of the object lies at the lowest threshold, with everything else


@pytest.mark.parametrize("thresholds", [1, 10, 1000])
def test_pixel_precision_is_that_of_loops_over_every_threshold(thresholds: int) -> None:
    maps = rough_maps(4, thresholds)
    masks = torch.randint(-1, 2, (4, *SIZE), generator=torch.Generator().manual_seed(1))
    heat = normalise(upsample(maps, SIZE, "bicubic")).double().numpy().ravel()
    truth = masks.numpy().ravel()
    heat, truth = heat[truth >= 0], truth[truth >= 0]
    area, recall = 0.0, 0.0
    for threshold in [1.0, *(step * (1 / thresholds) for step in reversed(range(thresholds)))]:
        taken = [bool(right) for value, right in zip(heat, truth, strict=True) if value >= threshold]
        if taken:
            area += sum(taken) / len(taken) * (sum(taken) / truth.sum() - recall)
            recall = sum(taken) / truth.sum()
    found = figures("pixel_average_precision", pixel_batch(maps, masks), thresholds=thresholds)
    assert found["pixel_average_precision"] == pytest.approx(area, abs=1e-12)
    assert found["chance"] == pytest.approx(truth.mean())


def test_pixel_precision_without_any_object_is_undefined() -> None:
    found = figures("pixel_average_precision", pixel_batch(torch.rand(1, 4, 5), torch.zeros(1, *SIZE)))
    assert np.isnan(found["pixel_average_precision"])


def test_a_mask_that_leaves_out_everything_is_not_measured() -> None:
    tally = Tally(create_metric("pixel_average_precision"))
    tally.update(pixel_batch(torch.rand(2, 4, 5), torch.stack([torch.full(SIZE, -1), rectangle((3, 2, 9, 7))])))
    assert tally.compute().unmeasured == 1
    assert tally.compute().figures["chance"] == pytest.approx(30 / 221)
