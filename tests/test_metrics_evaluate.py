"""The one-call door: what it shares, what it refuses, and that its figures are those of the pieces."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from families import make_images, make_model
from PIL import Image
from torch import Tensor, nn

from vitexplain import InputError, OptionError, Subject, TargetError, UnknownNameError, get_explainer, load_model
from vitexplain.metrics import (
    Evaluation,
    Figure,
    Metric,
    MetricBatch,
    MetricInfo,
    Tally,
    batches,
    create_metric,
    estimates,
    evaluate,
    metric_batches,
)
from vitexplain.options import option


@dataclass(frozen=True)
class Toy(Metric):
    """The score of one patch, and what the batch has besides."""

    place: int = option(0, "which patch")

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        logits = batch.predictor.logits(batch.inputs)
        again = batch.explain(batch.inputs, batch.targets) - batch.scores
        found = {
            "score": batch.scores.flatten(1)[:, self.place],
            "logit": logits.gather(1, batch.targets[:, None])[:, 0],
            "again": again.abs().amax((1, 2)),
        }
        if batch.labels is not None:
            found["hit"] = (batch.targets == batch.labels).double()
        return found

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(means)


FIGURES = tuple(Figure(name, name, better) for name, better in (("score", True), ("logit", None), ("hit", True)))
Toy.info = MetricInfo("toy", "Toy", "none", frozenset({"targets", "inputs", "predictor", "explain"}), FIGURES, Toy)


@dataclass(frozen=True)
class Area(Metric):
    """The share of the object."""

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        return {"area": batch.masks.double().mean((1, 2)) + sum(map(len, batch.boxes)) * 0}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(means)


Area.info = MetricInfo("area", "Area", "none", frozenset({"masks", "boxes"}), (Figure("area", "area", None),), Area)


@pytest.fixture
def vit() -> nn.Module:
    return make_model("cls")


IMAGES = make_images("cls", 7)


def test_figures_are_those_of_the_pieces(vit: nn.Module) -> None:
    explainer, labels = get_explainer("generic_attention", vit), [1, 2, 3, 4, 5, 6, 0]
    found = evaluate(explainer, IMAGES, Toy(3), target=2, labels=labels, seed=4, resamples=100)
    explanation = explainer(IMAGES, 2)
    rows = found.rows["generic_attention", "toy(place=3)"]
    np.testing.assert_allclose(rows["score"], explanation.scores.flatten(1)[:, 3], rtol=1e-5)
    np.testing.assert_allclose(rows["logit"], vit(IMAGES)[:, 2].detach(), rtol=1e-5)
    assert rows["again"].max() < 1e-6
    assert rows["hit"].tolist() == [0, 1, 0, 0, 0, 0, 0]
    table = found.table()
    assert [each["figure"] for each in table] == ["score", "logit", "hit"]
    expected = estimates(Toy(3), rows, seed=4, resamples=100)["score"]
    assert (table[0]["value"], table[0]["low"], table[0]["high"], table[0]["n"]) == (
        expected.value,
        expected.low,
        expected.high,
        7,
    )
    assert {"images", "unmeasured", "broken", "constant", "tied"} <= table[0].keys()


def test_one_capture_and_one_forward_a_batch_serve_all(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Clean(Metric):
        info = MetricInfo("clean", "", "", frozenset(), (Figure("clean", "", None),), Toy)

        def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
            return {"clean": batch.predictor.probabilities(batch.inputs)[:, 0]}

        def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return dict(means)

    forwards, captures = [], []
    vit.register_forward_hook(lambda *_: forwards.append(1))
    original = batches.explain_with
    monkeypatch.setattr(
        batches,
        "explain_with",
        lambda methods, *rest, **more: captures.append(methods) or original(methods, *rest, **more),
    )
    found = evaluate(["rollout", "gradcam"], IMAGES, Clean(), model=vit, batch_size=3)
    assert [len(each) for each in captures] == [2, 2, 2]
    assert len(forwards) == 3
    np.testing.assert_allclose(
        found.rows["gradcam", "clean"]["clean"], vit(IMAGES).softmax(1)[:, 0].detach(), rtol=1e-5
    )


def test_batches_change_nothing(vit: nn.Module) -> None:
    names = ["infidelity", "faithfulness_correlation", "sensitivity_max"]
    whole, parts = (
        evaluate(["rollout", "tokentm"], IMAGES, names, model=vit, batch_size=size, resamples=20) for size in (7, 2)
    )
    for key, rows in whole.rows.items():
        for name, value in rows.items():
            np.testing.assert_allclose(parts.rows[key][name], value, rtol=2e-3, atol=1e-6, err_msg=f"{key} {name}")


@pytest.mark.parametrize("target", [None, 3, [0, 1, 2, 3, 4, 5, 6], np.arange(7), torch.arange(7)])
def test_targets(vit: nn.Module, target: Any) -> None:
    pieces = [
        batch.targets for _, batch in metric_batches([create_rollout()], Subject.of(vit), IMAGES, target, batch_size=3)
    ]
    expected = vit(IMAGES).argmax(1) if target is None else torch.as_tensor(target).expand(7)
    assert torch.cat(pieces).tolist() == expected.tolist()


def create_rollout() -> Any:
    return get_explainer("rollout", make_model("cls")).method


@pytest.mark.parametrize("target", [(0, 1), [[0, 1]] * 7, lambda logits: logits[:, 0], torch.zeros(7, 1).long()])
def test_targets_without_one_class_are_refused(vit: nn.Module, target: Any) -> None:
    with pytest.raises(TargetError, match="one map an image"):
        evaluate("rollout", IMAGES, Toy(), model=vit, target=target)


def test_annotations_come_with_their_images(vit: nn.Module) -> None:
    masks = torch.zeros(7, 32, 48, dtype=torch.int8)
    for index in range(7):
        masks[index, :index] = 1
    boxes = [np.array([[0, 0, 48, index]]) for index in range(7)]
    found = [
        batch
        for _, batch in metric_batches(
            [create_rollout()], Subject.of(vit), IMAGES, labels=range(7), masks=masks.numpy(), boxes=boxes, batch_size=3
        )
    ]
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert torch.cat([batch.labels for batch in found]).tolist() == [*range(7)]
    torch.testing.assert_close(torch.cat([batch.masks for batch in found]), masks)
    assert [each[0, 3].item() for batch in found for each in batch.boxes] == [*range(7)]
    areas = evaluate("rollout", IMAGES, Area(), model=vit, masks=[*masks], boxes=boxes).rows["rollout", "area"]["area"]
    assert areas.tolist() == pytest.approx([index / 32 for index in range(7)])


def test_labels_tell_configurations_apart(vit: nn.Module) -> None:
    pair = [get_explainer("rollout", vit), get_explainer("rollout", vit, head_fusion="max", discard_ratio=0.5)]
    found = evaluate(pair, IMAGES, [Toy(), Toy(5)])
    assert found.methods == ["rollout", "rollout(head_fusion=max, discard_ratio=0.5)"]
    assert [*found.metrics] == ["toy", "toy(place=5)"]
    assert evaluate({"a": pair[0], "b": pair[0]}, IMAGES, Toy()).methods == ["a", "b"]


def test_what_cannot_be_evaluated_is_refused(vit: nn.Module) -> None:
    calls: list[int] = []
    vit.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(InputError, match=r"pass model=…"):
        evaluate("rollout", IMAGES, Toy())
    with pytest.raises(InputError, match="several models"):
        evaluate([get_explainer("rollout", vit), get_explainer("gradcam", make_model("cls"))], IMAGES, Toy())
    with pytest.raises(InputError, match="each once"):
        evaluate(["rollout", "rollout"], IMAGES, Toy(), model=vit)
    with pytest.raises(InputError, match="at least one"):
        evaluate("rollout", IMAGES, [], model=vit)
    with pytest.raises(InputError, match="boxes and masks"):
        evaluate("rollout", IMAGES, Area(), model=vit)
    with pytest.raises(InputError, match="found 2 labels for 7 images"):
        evaluate("rollout", IMAGES, Toy(), model=vit, labels=[0, 1])
    for nothing in ([], IMAGES[:0]):
        with pytest.raises(InputError, match="found no images"):
            evaluate("rollout", nothing, Toy(), model=vit)
    with pytest.raises(InputError, match="found 3 as labels of 7 images"):
        evaluate("rollout", IMAGES, Toy(), model=vit, labels=3)
    for labels in ([0.5] * 7, [[1]] * 7, torch.eye(7)):
        with pytest.raises(InputError, match="the index of one class"):
            evaluate("rollout", IMAGES, Toy(), model=vit, labels=labels)
    for named in ({"labels": ["cat"] * 7}, {"masks": [None] * 7}, {"boxes": [None] * 7}):
        with pytest.raises(InputError, match=r"found .* expected numbers"):
            evaluate("rollout", IMAGES, Toy(), model=vit, **named)
    boxes, square = [[]] * 7, torch.eye(32, 48)
    for wrong in (255 * square.to(torch.uint8), 255 * square.long(), 0.9 * square):
        with pytest.raises(InputError, match=r"masks > 0"):
            evaluate("rollout", IMAGES, Area(), model=vit, masks=wrong.expand(7, 32, 48), boxes=boxes)
    with pytest.raises(InputError, match="masks of 2 sizes"):
        evaluate("rollout", IMAGES, Area(), model=vit, masks=[*[square] * 6, square[:9]], boxes=boxes)
    with pytest.raises(TargetError, match="2 entries for 7 images"):
        evaluate("rollout", IMAGES, Toy(), model=vit, target=[0, 1])
    for draws in ({"confidence": 95}, {"resamples": 0}):
        with pytest.raises(OptionError, match=r"found (confidence=95|resamples=0)"):
            evaluate("rollout", IMAGES, Toy(), model=vit, **draws)
    with pytest.raises(OptionError, match="batch_size=0"):
        evaluate("rollout", IMAGES, Toy(), model=vit, batch_size=0)
    with pytest.raises(UnknownNameError, match="infidelity"):
        evaluate("rollout", IMAGES, "infidelty", model=vit)
    assert not calls
    with pytest.raises(InputError, match="expected 0 to 6"):
        evaluate("rollout", IMAGES, Toy(), model=vit, labels=[0, 1, 2, 3, 4, 5, 7])


def test_constant_and_broken_maps_are_counted_and_not_warned_about(vit: nn.Module) -> None:
    with torch.no_grad():
        vit.head.weight.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(["generic_attention", "rollout"], IMAGES, "faithfulness_correlation", model=vit)
    constant = {row["method"]: (row["constant"], row["unmeasured"], row["n"]) for row in found.table()}
    assert constant == {"generic_attention": (7, 7, 0), "rollout": (0, 7, 0)}  # no class ever changes: no correlation


def test_methods_are_compared_on_the_same_images(vit: nn.Module) -> None:
    found = evaluate(["rollout", "generic_attention", "raw_attention"], IMAGES, Toy(), model=vit)
    comparison = found.compare(permutations=99, resamples=50)
    assert comparison.figure == "score"
    assert {(pair.first, pair.second) for pair in comparison.pairs} == {
        ("rollout", "generic_attention"),
        ("rollout", "raw_attention"),
        ("generic_attention", "raw_attention"),
    }
    difference = (
        found.estimates["rollout", "toy"]["score"].value - found.estimates["raw_attention", "toy"]["score"].value
    )
    assert comparison.pairs[1].difference.value == pytest.approx(difference)
    with pytest.raises(UnknownNameError, match="measured metric"):
        found.compare("deletion")
    with pytest.raises(InputError, match="hit needs what"):
        found.compare("toy", "hit")
    with pytest.raises(InputError, match="found the metrics first, second"):
        Evaluation({"first": Toy(), "second": Toy()}, {}).compare()


def test_the_table_is_markdown(vit: nn.Module) -> None:
    found = evaluate(
        ["rollout", "gradcam"], IMAGES, [Toy(), Area()], model=vit, masks=torch.ones(7, 32, 48), boxes=[[]] * 7
    )
    lines = found.to_markdown().splitlines()
    assert lines[0] == "| method | toy score ↑ | toy logit | area |"
    assert [line.count("|") for line in lines] == [5] * 4
    assert re.fullmatch(r"\| gradcam \| \S+ \[\S+, \S+\] \| \S+ \[\S+, \S+\] \| 1 \[1, 1\] \|", lines[3])
    assert repr(found).startswith("Evaluation of 2 methods on 7 images\n| method")
    assert isinstance(found, Evaluation)
    masked = evaluate(
        "rollout", IMAGES, "pixel_average_precision", model=vit, masks=torch.eye(32, 48).expand(7, 32, 48)
    )
    assert masked.to_markdown().startswith("| method | pixel_average_precision ↑ | pixel_average_precision chance |")


def test_figures_of_fewer_images_say_so(vit: nn.Module) -> None:
    boxes = [[[4.0, 4, 20, 20]], [], *[[[0.0, 0, 9, 9], [20, 4, 40, 30]]] * 5]  # of one image none is known
    found = evaluate(["rollout", "raw_attention"], IMAGES, ["energy_in_box", Toy()], model=vit, boxes=boxes)
    for line in found.to_markdown().splitlines()[2:]:
        energy, chance, *others = line.split(" | ")[1:]
        assert energy.endswith("] (n = 6)")
        assert chance.endswith("] (n = 6)")
        assert not any("n =" in other for other in others)


def test_pictures_and_models_by_name() -> None:
    pictures = [Image.fromarray(np.full((60, 80, 3), value, dtype=np.uint8)) for value in (40, 200)]
    found = evaluate("rollout", pictures, Toy(), model="scenes")
    loaded = load_model("scenes")
    expected = get_explainer("rollout", loaded)(pictures).scores.flatten(1)[:, 0]
    np.testing.assert_allclose(found.rows["rollout", "toy"]["score"], expected, rtol=1e-5)
    alone = evaluate("rollout", pictures[0], Toy(), model=loaded)
    assert alone.rows["rollout", "toy"]["score"][0] == pytest.approx(float(expected[0]), rel=1e-5)
    assert np.isnan(alone.table()[0]["low"])


def test_a_tally_of_the_batches_gives_the_same(vit: nn.Module) -> None:
    metric = create_metric("infidelity")
    subject, methods = Subject.of(vit), [get_explainer(name, vit).method for name in ("rollout", "tokentm")]
    tallies = {method: Tally(metric) for method in methods}
    for method, batch in metric_batches(methods, subject, IMAGES, batch_size=4):
        tallies[method].update(batch)
    found = evaluate(["rollout", "tokentm"], IMAGES, "infidelity", model=vit, batch_size=4)
    for method, tally in tallies.items():
        assert found.summaries[method.info.name, "infidelity"].figures == pytest.approx(dict(tally.compute().figures))
