"""What every metric of the catalogue promises, by name."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import make_images, make_model
from test_contract import assert_same_state, state_of
from torch import nn

from vitexplain import InputError, Subject, adapt, get_explainer
from vitexplain.metrics import Metric, MetricBatch, Tally, create_metric, list_metrics, metric_batches, metric_info
from vitexplain.metrics.tally import Rows, measure, own_statistics
from vitexplain.preprocessing import Preprocessing

FAMILY, IMAGES, (HEIGHT, WIDTH) = "registers", 6, (32, 48)
SLICED = ("scores", "targets", "inputs", "labels", "masks", "boxes")
ALTERNATIVES = {"pointing_game": ("masks",)}
"""What a metric also needs where it takes one of several parts."""

metrics = pytest.mark.parametrize("name", list_metrics())


@cache
def model() -> nn.Module:
    return make_model(FAMILY)


def annotations() -> dict[str, Any]:
    """One object an image, somewhere inside, with its box; labels that are sometimes those predicted."""
    masks = torch.zeros(IMAGES, HEIGHT, WIDTH, dtype=torch.int8)
    boxes = []
    for index in range(IMAGES):
        top, left = 2 + 3 * index, 40 - 6 * index
        masks[index, top : top + 9, left : left + 7] = 1
        masks[index, :, 0] = -1
        boxes.append(torch.tensor([[left, top, left + 7, top + 9]], dtype=torch.float64))
    predicted = model()(make_images(FAMILY, IMAGES)).argmax(1)
    labels = torch.where(torch.arange(IMAGES) % 2 == 0, predicted, (predicted + 1) % 7)
    return {"labels": labels, "masks": masks, "boxes": boxes}


def full_batch() -> MetricBatch:
    """All that a batch can have, of a class-specific method on a tiny Vision Transformer."""
    subject = Subject(adapt(model()), Preprocessing((HEIGHT, WIDTH), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    method = get_explainer("generic_attention", subject).method
    images = make_images(FAMILY, IMAGES)
    ((_, batch),) = metric_batches([method], subject, images, forward_size=5, **annotations())
    return batch


def single(batch: MetricBatch, index: int) -> MetricBatch:
    parts = {name: getattr(batch, name)[index : index + 1] for name in SLICED}
    return replace(batch, **parts)


@cache
def at_once(name: str) -> Rows:
    return measure(create_metric(name), full_batch())


def assert_same_rows(found: Rows, expected: Rows) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=1e-5, err_msg=name)


def figures_of(metric: Metric, rows: Rows) -> dict[str, float]:
    return dict(Tally(metric, rows).compute().figures)


@metrics
def test_every_figure_is_a_finite_number(name: str) -> None:
    found = figures_of(create_metric(name), at_once(name))
    assert found.keys() == {figure.name for figure in metric_info(name).figures}
    assert all(map(math.isfinite, found.values())), found


@metrics
def test_statistics_are_one_row_an_image(name: str) -> None:
    statistics = own_statistics(at_once(name))
    assert statistics
    for value in statistics.values():
        assert value.ndim in (1, 2)
        assert len(value) == IMAGES
        assert value.dtype == np.float64


@metrics
def test_a_batch_equals_a_loop_and_streaming_equals_at_once(name: str) -> None:
    batch, tally, expected = full_batch(), Tally(create_metric(name)), at_once(name)
    rows = [tally.update(single(batch, index)) for index in range(IMAGES)]
    for index, row in enumerate(rows):
        assert_same_rows(row, {key: value[index : index + 1] for key, value in expected.items()})
    assert_same_rows(tally.rows, expected)
    assert dict(tally.compute().figures) == pytest.approx(
        figures_of(tally.metric, expected), rel=2e-3, abs=1e-5, nan_ok=True
    )


@metrics
def test_parts_of_a_data_set_merge(name: str) -> None:
    metric = create_metric(name)
    expected = at_once(name)
    first, second = (
        Tally(metric, {key: value[part] for key, value in expected.items()}) for part in (slice(0, 2), slice(2, None))
    )
    assert first.merge(second).compute() == Tally(metric, expected).compute()


@metrics
def test_figures_of_resamples_are_those_of_each(name: str) -> None:
    metric, draws = create_metric(name), np.random.default_rng(0).integers(IMAGES, size=(3, IMAGES))
    statistics = {key: torch.from_numpy(value) for key, value in own_statistics(at_once(name)).items()}
    means = {key: torch.stack([value[draw].nanmean(0) for draw in draws]) for key, value in statistics.items()}
    together = metric.summarise(means)
    for index in range(len(draws)):
        for figure, value in metric.summarise({key: value[index] for key, value in means.items()}).items():
            torch.testing.assert_close(together[figure][index], value)


@metrics
def test_what_it_requires_it_asks_for(name: str) -> None:
    batch = full_batch()
    for part in metric_info(name).requires:
        with pytest.raises(InputError, match=part):
            measure(create_metric(name), replace(batch, **{part: None}))
    only = {part: getattr(batch, part) for part in (*metric_info(name).requires, *ALTERNATIVES.get(name, ()))}
    found = measure(create_metric(name), MetricBatch(batch.scores, **only))
    assert {*own_statistics(found)} <= {*own_statistics(at_once(name))}
    for key, value in own_statistics(found).items():
        np.testing.assert_allclose(value, at_once(name)[key], rtol=2e-3, atol=1e-5)


@metrics
def test_a_broken_map_spoils_no_other(name: str) -> None:
    batch = full_batch()
    scores = batch.scores.clone()
    scores[2, 0, 0], scores[4, 1, 1] = torch.nan, torch.inf
    found, sound = measure(create_metric(name), replace(batch, scores=scores)), [0, 1, 3, 5]
    assert found["broken"].tolist() == [0, 0, 1, 0, 1, 0]
    for key, value in own_statistics(found).items():
        assert np.isnan(value[[2, 4]]).all()
        np.testing.assert_allclose(value[sound], at_once(name)[key][sound], rtol=2e-3, atol=1e-5)


@metrics
def test_flat_maps_are_measured_or_left_out_without_a_fuss(name: str) -> None:
    batch = full_batch()
    found = measure(create_metric(name), replace(batch, scores=torch.full_like(batch.scores, 0.25)))
    assert found["constant"].all()
    for key, value in own_statistics(found).items():
        assert not np.isinf(value).any(), key


@metrics
def test_the_same_numbers_come_out_every_time(name: str) -> None:
    before = torch.get_rng_state()
    again = measure(create_metric(name), full_batch())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    for key, value in at_once(name).items():
        np.testing.assert_array_equal(again[key], value)


@metrics
def test_the_model_and_the_batch_stay_as_they_are(name: str) -> None:
    batch = full_batch()
    before, scores, inputs = state_of(model()), batch.scores.clone(), batch.inputs.clone()
    masks = batch.masks.clone()
    measure(create_metric(name), batch)
    assert_same_state(before, state_of(model()))
    assert torch.equal(batch.scores, scores)
    assert torch.equal(batch.inputs, inputs)
    assert torch.equal(batch.masks, masks)


@metrics
def test_what_a_metric_says_of_itself_is_complete(name: str) -> None:
    info = metric_info(name)
    assert info.name == name
    assert info.title
    assert any(str(year) in info.paper for year in range(1990, 2040))
    assert len({figure.name for figure in info.figures}) == len(info.figures) > 0
    assert all(figure.title for figure in info.figures)
    assert info.metric.__doc__
    assert all(option.help for option in info.options)
