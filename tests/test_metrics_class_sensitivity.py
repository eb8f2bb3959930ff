"""Class sensitivity: known pairs of maps, loops, and methods held to their claim of looking at the class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from families import make_images, make_model
from lighter import get_explainer
from torch import Tensor

from vitexplain import list_methods, method_info
from vitexplain.errors import InputError, TargetError
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.predictor import Predictor
from vitexplain.metrics.tally import Tally


@dataclass
class FixedLogits:
    """Stands for a predictor."""

    rows: Tensor

    def logits(self, inputs: Tensor) -> Tensor:
        return self.rows


def pair_of(first: Tensor, second: Tensor) -> MetricBatch:
    """A batch whose maps are `first` and, of the other class, `second`."""
    count = len(first)
    logits = torch.tensor([[0.0, 3, 2]]).repeat(count, 1)
    return MetricBatch(
        first,
        targets=torch.ones(count, dtype=torch.int64),
        inputs=torch.zeros(count, 3, 8, 8),
        predictor=FixedLogits(logits),
        explain=lambda inputs, targets: second if bool((targets == 2).all()) else torch.full_like(second, torch.nan),
    )


def figures(batch: MetricBatch, **options: object) -> dict[str, float]:
    tally = Tally(create_metric("class_sensitivity", **options))
    tally.update(batch)
    return dict(tally.compute().figures)


def ranks_by_counting(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


def random_maps(seed: int, low: int = -4, high: int = 5) -> Tensor:
    return torch.randint(low, high, (6, 3, 5), generator=torch.Generator().manual_seed(seed)).float()


def test_the_same_map_for_both_classes_gives_1() -> None:
    maps = random_maps(0)
    assert figures(pair_of(maps, maps.clone())) == pytest.approx({"spearman": 1, "pearson": 1, "top_overlap": 1})
    assert figures(pair_of(maps, 1e-9 * maps + 3e-9), top_share=0.4) == pytest.approx(
        {"spearman": 1, "pearson": 1, "top_overlap": 1}, abs=1e-6
    )


def test_the_opposite_map_gives_minus_1_and_no_overlap() -> None:
    maps = torch.arange(15.0).reshape(1, 3, 5)
    assert figures(pair_of(maps, -maps)) == pytest.approx({"spearman": -1, "pearson": -1, "top_overlap": 0})


def test_rank_correlation_sees_order_alone() -> None:
    maps = torch.arange(15.0).reshape(1, 3, 5)
    found = figures(pair_of(maps, maps.exp()))
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] < 0.8


@pytest.mark.parametrize("seed", range(4))
def test_correlations_are_those_of_loops(seed: int) -> None:
    first, second = random_maps(seed), random_maps(seed + 100)
    found = create_metric("class_sensitivity").measure(pair_of(first, second))
    for image in range(len(first)):
        rows = [maps[image].flatten().tolist() for maps in (first, second)]
        ranked = [ranks_by_counting(row) for row in rows]
        assert float(found["spearman"][image]) == pytest.approx(np.corrcoef(ranked)[0, 1], abs=1e-12)
        assert float(found["pearson"][image]) == pytest.approx(np.corrcoef(rows)[0, 1], abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.34, 1.0])
def test_overlap_is_the_share_of_common_patches(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(6, 3, 5, generator=generator) for _ in range(2))
    count = max(1, round(15 * share))
    expected = [
        len(set(one.flatten().topk(count).indices.tolist()) & set(other.flatten().topk(count).indices.tolist())) / count
        for one, other in zip(first, second, strict=True)
    ]
    found = create_metric("class_sensitivity", top_share=share).measure(pair_of(first, second))["top_overlap"]
    assert found.tolist() == pytest.approx(expected)


def test_equal_patches_share_the_places_that_are_left() -> None:
    first = torch.tensor([[[5.0, 1, 1, 1, 0]]])
    second = torch.tensor([[[5.0, 0, 0, 0, 1]]])
    # Two places: the first map gives one to the 5 and a third to each 1
    assert figures(pair_of(first, second), top_share=0.4)["top_overlap"] == pytest.approx(1 / 2)
    assert figures(pair_of(first, first.clone()), top_share=0.4)["top_overlap"] == pytest.approx(1)
    second[0, 0, 1] = 2
    assert figures(pair_of(first, second), top_share=0.4)["top_overlap"] == pytest.approx((1 + 1 / 3) / 2)


def test_unrelated_maps_with_few_patches_share_what_chance_gives() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (
        torch.rand(400, 8, 8, generator=generator) * (torch.rand(400, 8, 8, generator=generator) < 0.03)
        for _ in range(2)
    )
    found = create_metric("class_sensitivity", top_share=0.25).measure(pair_of(first, second))["top_overlap"]
    assert float(found.mean()) == pytest.approx(0.25, abs=0.02)


def test_flat_maps_have_an_overlap_but_no_correlation() -> None:
    maps = torch.full((1, 3, 5), 0.1)
    found = create_metric("class_sensitivity").measure(pair_of(maps, maps.clone()))
    assert found["spearman"].isnan()
    assert found["pearson"].isnan()
    assert float(found["top_overlap"]) == pytest.approx(1)


def test_a_map_of_the_other_class_with_nan_is_not_measured() -> None:
    first, second = random_maps(2), random_maps(3)
    second[1, 0, 0] = torch.nan
    tally = Tally(create_metric("class_sensitivity"))
    rows = tally.update(pair_of(first, second))
    assert tally.compute().unmeasured == 1
    for name in ("spearman", "pearson", "top_overlap"):
        assert np.isnan(rows[name]).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize(("target", "other"), [(1, 2), (2, 1), (0, 1)])
def test_the_other_class_is_the_likeliest_besides_the_explained_one(target: int, other: int) -> None:
    asked = []

    def explain(inputs: Tensor, targets: Tensor) -> Tensor:
        asked.extend(targets.tolist())
        return random_maps(0)[:1]

    batch = MetricBatch(
        random_maps(0)[:1],
        targets=torch.tensor([target]),
        inputs=torch.zeros(1, 3, 8, 8),
        predictor=FixedLogits(torch.tensor([[0.0, 3, 2]])),
        explain=explain,
    )
    figures(batch)
    assert asked == [other]


def test_classes_that_are_not_there_and_maps_of_another_grid_are_refused() -> None:
    batch = pair_of(random_maps(0), random_maps(1)[:, :2])
    with pytest.raises(InputError, match="same shape"):
        figures(batch)
    batch.predictor.rows = torch.zeros(6, 1)
    with pytest.raises(InputError, match="two classes"):
        figures(batch)
    batch.predictor.rows = torch.zeros(6, 2)
    for target in (-1, 2):
        with pytest.raises(TargetError, match="expected 0 to 1"):
            figures(replace(batch, targets=torch.full((6,), target)))


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
@pytest.mark.parametrize("name", list_methods(trainable=False))
def test_methods_keep_their_claim_of_looking_at_the_class(name: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    explainer = get_explainer(name, model)
    explanation = explainer(images)
    assert explanation.targets is not None
    explain: Callable[[Tensor, Tensor], Tensor] = lambda inputs, targets: explainer(inputs, targets).scores  # noqa: E731
    batch = MetricBatch(
        explanation.scores,
        targets=explanation.targets,
        inputs=images,
        predictor=Predictor.of(model),
        explain=explain,
    )
    found = create_metric("class_sensitivity").measure(batch)
    if method_info(name).class_specific:
        assert float(found["spearman"].nanmean()) < 0.999
    else:
        assert found["spearman"].tolist() == pytest.approx([1] * len(images), abs=1e-6)
        assert found["top_overlap"].tolist() == pytest.approx([1] * len(images), abs=1e-6)
