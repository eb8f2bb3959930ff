"""Segmentation and AUPRC: the published code's counts, loops over thresholds, known answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vitexplain.errors import InputError
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.segmentation import average_precision
from vitexplain.metrics.tally import Summary, Tally
from vitexplain.render import normalise, upsample

SIZE = (12, 18)


def random_batch(seed: int, count: int = 5) -> MetricBatch:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, 3, 4, generator=generator)
    masks = torch.randint(-1, 2, (count, *SIZE), generator=generator, dtype=torch.int8)
    masks[:, 4] = -1
    return MetricBatch(scores, masks=masks)


def summary(name: str, *batches: MetricBatch) -> Summary:
    tally = Tally(create_metric(name))
    for batch in batches:
        tally.update(batch)
    return tally.compute()


def average_precision_by_thresholds(values: np.ndarray, positive: np.ndarray) -> float:
    area, recall = 0.0, 0.0
    for threshold in sorted(set(values.tolist()), reverse=True):
        taken = positive[values >= threshold]
        area += taken.mean() * (taken.sum() / positive.sum() - recall)
        recall = taken.sum() / positive.sum()
    return area


@pytest.mark.parity
def test_counts_and_precision_are_those_of_the_published_code(goldens: Path) -> None:
    arrays = np.load(goldens / "metrics_seg_saco.npz")
    images = sorted({int(key.split("/")[1]) for key in arrays.files if key.startswith("seg/") and "total" not in key})
    assert len(images) == 6
    tally = Tally(create_metric("segmentation"))
    for image in images:
        theirs = {key.split("/")[2]: arrays[key] for key in arrays.files if key.startswith(f"seg/{image}/")}
        map_, labels = (torch.from_numpy(theirs[name])[None] for name in ("map14", "labels"))
        ours = tally.update(MetricBatch(map_, masks=labels))
        counts = {"counted": "labeled", "correct": "correct", "intersection": "inter", "union": "union"}
        for name, key in counts.items():
            assert np.array_equal(ours[name][0], theirs[key]), (image, name)
        assert ours["average_precision"][0] == pytest.approx(theirs["ap"].item(), abs=1e-8)
        if ours["counted"][0] == labels.numel():  # theirs cuts what is left into as many rows as before
            assert ours["f1_rows"][0] == pytest.approx(theirs["f1_rowwise"].mean(), abs=1e-8)
    figures = tally.compute().figures
    for name, key in (("pixel_accuracy", "pixAcc"), ("mean_iou", "mIoU"), ("mean_average_precision", "mAP")):
        assert figures[name] == pytest.approx(arrays[f"seg/total/{key}"].item(), abs=1e-8), name
    iou = arrays["seg/total/IoU"]
    assert [figures["iou_background"], figures["iou_object"]] == pytest.approx(iou.tolist(), abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_loops_over_pixels(seed: int) -> None:
    batch = random_batch(seed)
    heat = normalise(upsample(batch.scores, SIZE)).double().numpy()
    assert batch.masks is not None
    right = counted = 0
    both, either = [0, 0], [0, 0]
    precision, rows = [], []
    for picture, mask in zip(heat, batch.masks.numpy(), strict=True):
        mean, listed, row_scores = picture.mean(), [], []
        for values, labels in zip(picture, mask, strict=True):
            true_positive = wrong = 0
            for value, label in zip(values, labels, strict=True):
                if label < 0:
                    continue
                found = int(value > mean)
                counted += 1
                right += found == label
                true_positive += found and label
                wrong += found != label
                for kind in (0, 1):
                    both[kind] += found == label == kind
                    either[kind] += kind in (found, label)
                listed += [(np.float32(1) - np.float32(value), label == 0), (np.float32(value), label == 1)]
            if max(labels) >= 0:
                row_scores.append(2 * true_positive / (2 * true_positive + wrong) if true_positive else 0)
        values, positive = (np.array(column) for column in zip(*listed, strict=True))
        precision.append(average_precision_by_thresholds(values, positive))
        rows.append(np.mean(row_scores))
    expected = {
        "pixel_accuracy": right / counted,
        "mean_iou": (both[0] / either[0] + both[1] / either[1]) / 2,
        "mean_average_precision": np.mean(precision),
        "iou_background": both[0] / either[0],
        "iou_object": both[1] / either[1],
        "f1_rows": np.mean(rows),
    }
    assert summary("segmentation", batch).figures == pytest.approx(expected, abs=1e-12)


def test_a_perfect_map_gets_1_and_an_inverted_one_0() -> None:
    masks = torch.zeros(2, *SIZE, dtype=torch.int8)
    masks[0, 3:9, 2:8] = 1
    masks[1, :4] = 1
    perfect = summary("segmentation", MetricBatch(masks.float(), masks=masks)).figures
    names = ("pixel_accuracy", "mean_iou", "mean_average_precision", "iou_background", "iou_object")
    assert [perfect[name] for name in names] == [1] * 5
    inverted = summary("segmentation", MetricBatch(1 - masks.float(), masks=masks)).figures
    assert [inverted[name] for name in names] == [0, 0, 0.5, 0, 0]  # the second threshold takes all


def test_iou_is_of_the_whole_set_and_not_a_mean_over_images() -> None:
    masks = torch.zeros(2, *SIZE, dtype=torch.int8)
    masks[0, 0, 0] = 1
    masks[1, :, :9] = 1
    maps = masks.float()
    maps[0] = maps[0].flip(0)  # the small object is missed
    figures = summary("segmentation", MetricBatch(maps, masks=masks)).figures
    assert figures["iou_object"] == pytest.approx(108 / 110)


def test_a_flat_map_is_all_background_and_one_with_nan_is_left_out() -> None:
    masks = torch.zeros(1, *SIZE, dtype=torch.int8)
    masks[0, :3] = 1
    flat = summary("segmentation", MetricBatch(torch.full((1, 3, 4), 2.5), masks=masks))
    assert flat.figures["pixel_accuracy"] == 0.75
    assert flat.figures["mean_iou"] == 0.375
    assert flat.figures["mean_average_precision"] == pytest.approx(0.75 * 0.75 + 0.25 * 0.5)
    assert flat.constant == 1
    broken = MetricBatch(torch.full((1, 3, 4), torch.nan), masks=masks)
    assert np.isnan(summary("segmentation", broken).figures["pixel_accuracy"])
    both = summary("segmentation", MetricBatch(masks.float(), masks=masks), broken)
    assert both.figures["pixel_accuracy"] == 1
    assert (both.broken, both.unmeasured) == (1, 1)


@pytest.mark.parametrize("name", ["segmentation", "auprc"])
def test_a_mask_that_leaves_out_everything_is_not_measured(name: str) -> None:
    batch = random_batch(0)
    assert batch.masks is not None
    empty = MetricBatch(batch.scores, masks=torch.full_like(batch.masks, -1))
    together = summary(name, batch, empty)
    assert together.figures == summary(name, batch).figures
    assert together.unmeasured == len(empty)


def test_average_precision_takes_equal_values_as_one_threshold() -> None:
    values, positive = torch.tensor([3.0, 2, 2, 2, 1]), torch.tensor([True, False, True, False, True])
    expected = 1 / 3 * 1 + 1 / 3 * 2 / 4 + 1 / 3 * 3 / 5
    for order in (torch.arange(5), torch.arange(4, -1, -1), torch.tensor([2, 1, 4, 0, 3])):
        assert float(average_precision(values[order], positive[order])) == pytest.approx(expected)


def test_average_precision_without_positives_is_undefined() -> None:
    assert average_precision(torch.rand(4), torch.zeros(4, dtype=torch.bool)).isnan()
    assert average_precision(torch.rand(0), torch.zeros(0, dtype=torch.bool)).isnan()


@pytest.mark.parametrize("seed", range(3))
def test_auprc_is_that_of_loops_over_thresholds(seed: int) -> None:
    batch = random_batch(seed)
    assert batch.masks is not None
    areas, shares = [], []
    for picture, mask in zip(upsample(batch.scores, SIZE).numpy(), batch.masks.numpy(), strict=True):
        areas.append(average_precision_by_thresholds(picture[mask >= 0], mask[mask >= 0] == 1))
        shares.append((mask == 1).sum() / (mask >= 0).sum())
    expected = {"auprc": np.mean(areas), "chance": np.mean(shares)}
    assert summary("auprc", batch).figures == pytest.approx(expected, abs=1e-12)


def test_auprc_of_known_maps() -> None:
    masks = torch.zeros(1, *SIZE, dtype=torch.int8)
    masks[0, 3:9, 2:8] = 1
    share = float(masks.float().mean())

    def area(scores: Tensor) -> float:
        return summary("auprc", MetricBatch(scores, masks=masks)).figures["auprc"]

    assert area(masks.float()) == 1
    assert area(torch.full((1, 3, 4), -2.7)) == pytest.approx(share)
    assert area(1 - masks.float()) == pytest.approx(share)
    assert area(5 * masks.float() - 3) == 1


def test_auprc_without_an_object_is_undefined() -> None:
    masks = torch.zeros(2, *SIZE, dtype=torch.int8)
    masks[1, 3:9, 2:8] = 1
    found = summary("auprc", MetricBatch(masks.float(), masks=masks))
    assert found.unmeasured == 1
    assert found.figures == pytest.approx({"auprc": 1, "chance": 1 / 6})


MASKED = ("segmentation", "auprc", "pixel_average_precision", "energy_in_mask", "pointing_game")


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_other_values_or_sizes_are_refused(name: str) -> None:
    scores, metric = torch.rand(1, 3, 4), create_metric(name)
    for dtype in (torch.int64, torch.uint8):
        with pytest.raises(InputError, match="255"):
            metric.measure(MetricBatch(scores, masks=torch.full((1, *SIZE), 255, dtype=dtype)))
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        highest = torch.full((1, *SIZE), torch.iinfo(dtype).max, dtype=dtype)  # not to be taken for -1
        with pytest.raises(InputError, match="values from"):
            metric.measure(MetricBatch(scores, masks=highest))
    with pytest.raises(InputError, match="nearest"):
        metric.measure(MetricBatch(scores, masks=torch.ones(1, *SIZE), inputs=torch.zeros(1, 3, 12, 12)))
