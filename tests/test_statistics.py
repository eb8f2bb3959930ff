"""Intervals, paired tests and ranks: against scipy, slow references, simulation and known answers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats
from torch import Tensor

from vitexplain import InputError, OptionError, UnknownNameError
from vitexplain.metrics import Figure, Metric, MetricBatch, MetricInfo, compare_rows, estimates, holm, statistics
from vitexplain.metrics.statistics import Sample, bootstrap_interval, estimate_figures
from vitexplain.metrics.tally import Rows, own_statistics, summarise


@dataclass(frozen=True)
class Toy(Metric):
    """Figures of every kind: a mean, a ratio of means, a maximum of means."""

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        raise NotImplementedError

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        figures = {"mean": means["x"]}
        if "part" in means:
            figures["ratio"] = means["part"] / means["x"]
        if "curve" in means:
            figures["best"] = means["curve"].amax(-1)
        return figures


FIGURES = (Figure("mean", "mean", True), Figure("ratio", "ratio", False), Figure("best", "best", None))
Toy.info = MetricInfo("toy", "Toy", "none", frozenset(), FIGURES, Toy)


def rows_of(**statistics: np.ndarray) -> Rows:
    columns = {name: np.asarray(value, dtype=np.float64) for name, value in statistics.items()}
    images = len(columns["x"])
    return {"broken": np.zeros(images), "constant": np.zeros(images), "tied": np.zeros(images), **columns}


def pooled_rows(seed: int, images: int = 30) -> Rows:
    generator = np.random.default_rng(seed)
    x = generator.exponential(size=images) + 0.1
    return rows_of(x=x, part=x * generator.uniform(size=images), curve=generator.normal(size=(images, 5)))


# ------------------------------------------------------------------------------------------------------ intervals


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    sample = np.random.default_rng(1).exponential(size=60)
    resamples = 200000  # runs of so many differ by up to 0.004 of the width, of a tenth as many by more than 0.02
    found = estimates(Toy(), rows_of(x=sample), resamples=resamples, confidence=0.9)["mean"]
    expected = scipy.stats.bootstrap(
        (sample,), np.mean, n_resamples=resamples, batch=10000, confidence_level=0.9, method="BCa"
    )
    interval = expected.confidence_interval
    assert found.value == pytest.approx(sample.mean())
    assert found.n == 60
    width = interval.high - interval.low
    assert found.low == pytest.approx(interval.low, abs=0.02 * width)
    assert found.high == pytest.approx(interval.high, abs=0.02 * width)


def test_correction_and_acceleration_are_those_of_scipy_on_the_same_replicates() -> None:
    sample = np.random.default_rng(2).exponential(size=25) ** 2
    expected = scipy.stats.bootstrap((sample,), np.mean, n_resamples=999, method="BCa")
    without = (sample.sum() - sample) / 24
    low, high = bootstrap_interval(sample.mean(), expected.bootstrap_distribution, without, 0.95)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), rel=1e-9)


def test_replicates_are_figures_of_the_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, seen = pooled_rows(3), {}

    def keep(value: float, replicates: np.ndarray, without: np.ndarray, confidence: float) -> tuple[float, float]:
        seen[value] = (replicates, without)
        return 0.0, 0.0

    monkeypatch.setattr(statistics, "bootstrap_interval", keep)
    found = estimates(Toy(), rows, resamples=20, seed=5)
    generator = np.random.default_rng(5)
    draws = [generator.integers(30, size=30) for _ in range(20)]
    for name in ("mean", "ratio", "best"):
        replicates, without = seen[found[name].value]
        for chosen, replicate in zip(draws, replicates, strict=True):
            drawn = {key: value[chosen] for key, value in rows.items()}
            assert replicate == pytest.approx(summarise(Toy(), drawn).figures[name])
        for left_out, figure in enumerate(without):
            rest = {key: np.delete(value, left_out, axis=0) for key, value in rows.items()}
            assert figure == pytest.approx(summarise(Toy(), rest).figures[name])


def test_memory_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, others = pooled_rows(4), pooled_rows(5)
    at_once = estimates(Toy(), rows, resamples=50), compare_rows(Toy(), {"a": rows, "b": others}, permutations=50)
    monkeypatch.setattr(statistics, "_CHUNK", 70)
    assert [*statistics.chunks(7, 30)] == [2, 2, 2, 1]
    in_parts = estimates(Toy(), rows, resamples=50), compare_rows(Toy(), {"a": rows, "b": others}, permutations=50)
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    found, expected = str(in_parts), str(at_once)
    assert re.sub(number, "…", found) == re.sub(number, "…", expected)
    values = [[float(each) for each in re.findall(number, text)] for text in (found, expected)]
    assert len(values[0]) > 10
    assert values[0] == pytest.approx(values[1], rel=1e-12)  # sums of other lengths are rounded otherwise


@pytest.mark.parametrize("figure", ["mean", "ratio"])
def test_intervals_hold_the_truth_as_often_as_they_say(figure: str) -> None:
    generator, hits, runs = np.random.default_rng(7), 0, 400
    truth = {"mean": 1.0, "ratio": 0.5}[figure]
    for _ in range(runs):
        x = generator.exponential(size=40)
        rows = rows_of(x=x, part=x * generator.uniform(size=40))
        found = estimates(Toy(), rows, resamples=400, confidence=0.9)[figure]
        hits += found.low <= truth <= found.high
    assert 0.84 <= hits / runs <= 0.95


def test_what_allowed_no_measurement_counts_nowhere() -> None:
    rows = pooled_rows(8)
    rows["x"][3], rows["part"][3], rows["curve"][3] = np.nan, np.nan, np.nan
    rows["curve"][5, 2] = np.nan
    found = estimates(Toy(), rows, resamples=200)
    assert found["mean"].n == 29
    assert found["best"].value == pytest.approx(np.nanmean(rows["curve"], 0).max())
    assert all(each.low < each.value < each.high for each in found.values())


def test_each_figure_rests_on_the_images_that_have_all_it_is_computed_from() -> None:
    rows = pooled_rows(8, images=6)
    rows["part"][1:] = np.nan
    rows["curve"][:2] = np.nan
    found = estimates(Toy(), rows, resamples=50)
    assert {name: each.n for name, each in found.items()} == {"mean": 6, "ratio": 1, "best": 4}
    assert math.isfinite(found["ratio"].value)
    assert math.isnan(found["ratio"].low)
    assert found["best"].low < found["best"].high
    rows["x"][:] = np.nan
    found = estimates(Toy(), rows, resamples=50)
    assert {name: each.n for name, each in found.items()} == {"mean": 0, "ratio": 0, "best": 4}


def test_a_figure_that_hides_what_it_is_computed_from_rests_on_what_is_known_entirely() -> None:
    rows = rows_of(x=[1, 2, 3, 4], part=[1, 2, 3, np.nan])
    sample = Sample.of(own_statistics(rows), lambda means: {"hides": means["x"].nan_to_num() + 1})
    (found,) = estimate_figures(sample, confidence=0.9, resamples=20, seed=0).values()
    assert found.n == 3


def test_a_difference_rests_on_what_both_have_of_its_figure() -> None:
    one, other = pooled_rows(21, images=8), pooled_rows(22, images=8)
    one["part"][:3], other["part"][7], other["curve"][:] = np.nan, np.nan, np.nan
    counts = {
        figure: compare_rows(Toy(), {"a": one, "b": other}, figure, permutations=9, resamples=20).pairs[0].difference.n
        for figure in ("mean", "ratio", "best")
    }
    assert counts == {"mean": 8, "ratio": 4, "best": 0}


def test_no_image_measured_has_no_figure() -> None:
    (found,) = estimates(Toy(), rows_of(x=np.full(4, np.nan))).values()
    assert found.n == 0
    assert all(map(math.isnan, (found.value, found.low, found.high)))


def test_one_image_has_no_interval() -> None:
    (found,) = estimates(Toy(), rows_of(x=[0.3, np.nan])).values()
    assert (found.value, found.n) == (0.3, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_equal_images_leave_no_doubt() -> None:
    (found,) = estimates(Toy(), rows_of(x=np.full(9, 0.7)), resamples=50).values()
    assert (found.low, found.high) == pytest.approx((0.7, 0.7))


def test_what_makes_no_interval_is_refused() -> None:
    with pytest.raises(InputError, match="at least one image"):
        estimates(Toy(), rows_of(x=np.zeros(0)))
    with pytest.raises(OptionError, match="confidence=95"):
        estimates(Toy(), rows_of(x=[1, 2]), confidence=95)
    with pytest.raises(OptionError, match="resamples=0"):
        estimates(Toy(), rows_of(x=[1, 2]), resamples=0)


# ---------------------------------------------------------------------------------------------------- comparisons


def test_the_p_value_of_a_mean_is_that_of_scipy() -> None:
    generator = np.random.default_rng(11)
    a = generator.normal(size=25)
    b = a + generator.normal(0.5, 0.8, size=25)
    (pair,) = compare_rows(Toy(), {"a": rows_of(x=a), "b": rows_of(x=b)}).pairs
    expected = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), permutation_type="samples", n_resamples=9999
    )
    assert 0.005 < expected.pvalue < 0.5
    assert pair.p_value == pytest.approx(expected.pvalue, abs=0.02)
    assert pair.difference.value == pytest.approx((a - b).mean())


def test_the_p_value_of_a_pooled_figure_is_that_of_all_swaps() -> None:
    one, other = pooled_rows(12, images=9), pooled_rows(13, images=9)
    for figure in ("ratio", "best"):
        (pair,) = compare_rows(Toy(), {"one": one, "other": other}, figure).pairs
        differences = []
        for swaps in itertools.product([False, True], repeat=9):
            swapped = np.array(swaps)
            sides = [
                {name: np.where(swapped.reshape(-1, *[1] * (a[name].ndim - 1)), b[name], a[name]) for name in a}
                for a, b in ((one, other), (other, one))
            ]
            figures = [summarise(Toy(), side).figures[figure] for side in sides]
            differences.append(abs(figures[0] - figures[1]))
        expected = np.mean(np.array(differences) >= differences[0] - 1e-12)
        assert pair.p_value == pytest.approx(expected, abs=0.02)


def test_equal_methods_are_called_different_as_rarely_as_they_should() -> None:
    generator, found, runs = np.random.default_rng(14), 0, 400
    for _ in range(runs):
        a, b = (rows_of(x=x, part=x * y) for x, y in generator.uniform(0.1, 1, size=(2, 2, 20)))
        (pair,) = compare_rows(Toy(), {"a": a, "b": b}, "ratio", permutations=199, resamples=10).pairs
        found += pair.p_value < 0.1
    assert 0.06 <= found / runs <= 0.14


def test_a_method_does_not_differ_from_itself() -> None:
    comparison = compare_rows(Toy(), {"a": pooled_rows(15), "b": pooled_rows(15)}, permutations=99)
    (pair,) = comparison.pairs
    assert (pair.p_value, pair.corrected) == (1, 1)
    assert (pair.difference.value, pair.difference.low, pair.difference.high) == (0, 0, 0)
    assert comparison.ranks == {"a": (1, 2), "b": (1, 2)}


def test_only_images_that_both_measured_are_compared() -> None:
    a, b = np.arange(6.0), np.arange(6.0) + 1
    a[0], b[5] = np.nan, np.nan
    (pair,) = compare_rows(Toy(), {"a": rows_of(x=a), "b": rows_of(x=b)}, permutations=99).pairs
    assert pair.difference.value == -1
    assert pair.difference.n == 4
    (pair,) = compare_rows(Toy(), {"a": rows_of(x=[1, np.nan]), "b": rows_of(x=[np.nan, 1])}, permutations=9).pairs
    assert math.isnan(pair.p_value)
    assert math.isnan(pair.corrected)
    assert pair.difference.n == 0


def test_pairing_finds_what_images_would_hide() -> None:
    generator = np.random.default_rng(16)
    hard = generator.normal(size=50)
    a, b = (rows_of(x=hard + shift + generator.normal(0, 0.05, size=50)) for shift in (0.0, 0.1))
    alone = [estimates(Toy(), rows)["mean"] for rows in (a, b)]
    (pair,) = compare_rows(Toy(), {"a": a, "b": b}).pairs
    assert alone[1].low < alone[0].high
    assert pair.difference.high < 0
    assert pair.p_value < 0.001


@pytest.mark.parametrize(
    ("figure", "expected"), [("mean", [(1, 1), (2, 3), (2, 3)]), ("ratio", [(3, 3), (1, 2), (1, 2)])]
)
def test_methods_share_ranks_that_cannot_be_told_apart(figure: str, expected: list[tuple[int, int]]) -> None:
    generator = np.random.default_rng(18)
    x = {name: generator.normal(5 + (name == "best"), 0.3, size=40) for name in ("best", "second", "third")}
    part = {name: generator.normal(5 + 3 * (name == "best"), 0.3, size=40) for name in x}
    rows = {name: rows_of(x=x[name], part=part[name]) for name in x}
    comparison = compare_rows(Toy(), rows, figure, permutations=999)
    assert [*comparison.ranks.values()] == expected
    assert len(comparison.pairs) == 3


def test_a_figure_that_only_describes_gives_no_ranks() -> None:
    assert compare_rows(Toy(), {"a": pooled_rows(1), "b": pooled_rows(2)}, "best", permutations=9).ranks == {}


def test_the_table_of_pairs() -> None:
    rows = {"a": rows_of(x=[1, 1, 1]), "b": rows_of(x=[1, math.nan, 1])}
    lines = compare_rows(Toy(), rows, permutations=9).to_markdown().splitlines()
    assert lines[0] == "| mean | difference | n | p | p, all pairs |"
    assert lines[2:] == ["| a − b | 0 [0, 0] | 2 | 1 | 1 |"]
    assert str(estimates(Toy(), rows_of(x=[0.25]))["mean"]) == "0.25"


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    corrected = holm([0.01, math.nan, 0.04])
    assert corrected[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(corrected[1])
    assert holm([]) == []


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="at least two methods"):
        compare_rows(Toy(), {"a": pooled_rows(1)})
    with pytest.raises(InputError, match="'b': 5"):
        compare_rows(Toy(), {"a": pooled_rows(1), "b": pooled_rows(2, images=5)})
    with pytest.raises(UnknownNameError, match="ratio"):
        compare_rows(Toy(), {"a": pooled_rows(1), "b": pooled_rows(2)}, "ration")
    with pytest.raises(OptionError, match="resamples=0"):
        compare_rows(Toy(), {"a": pooled_rows(1), "b": pooled_rows(2)}, permutations=0)


def test_figures_are_those_of_the_summary() -> None:
    rows = pooled_rows(20)
    found = {name: each.value for name, each in estimates(Toy(), rows, resamples=10).items()}
    assert found == pytest.approx(dict(summarise(Toy(), rows).figures))
