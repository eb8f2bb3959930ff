"""PM on the procedural scenes: trains the embedded model on 1 % of masks, and measures maps before and after.

``python -m vitexplain.benchmarks.patch_masks scenes-pm.safetensors --output benchmarks/results/patch_masks.md``

Weights that are there already are measured and not trained again. Where maps are good at finding the object, that is
what training taught them; whether they show what the model decides by is told by insertion and deletion beside it.
With ``--control FILE``, the same training once more with the masks of other scenes, which can teach nothing but where
objects usually are.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitexplain import (
    Explainer,
    ExplanationWarning,
    UnsupportedModelError,
    get_explainer,
    list_methods,
    load_model,
)
from vitexplain.data import Example, Examples, open_dataset
from vitexplain.files import write_whole
from vitexplain.metrics import Evaluation, MetricBatch, create_metric, estimates, evaluate
from vitexplain.metrics.statistics import Estimate, Sample, estimate_figures
from vitexplain.metrics.tally import measure
from vitexplain.models.embedded import scenes_card
from vitexplain.models.loading import LoadedModel
from vitexplain.training.patch_masks import PatchMaskSettings, train_patch_masks
from vitexplain.training.patch_masks_command import SCENES_SETTINGS

from .measuring import machine_facts

COMPARED = ("pm", "raw_attention", "rollout", "gradcam", "generic_attention", "tokentm")
"""Methods whose faithfulness is measured, which takes many passes."""

LOCALISATION = ("pixel_average_precision", "max_box_accuracy_v2", "pointing_game")
FAITHFULNESS = ("insertion", "deletion")
TRAINED = "pm, trained on masks"
PATCH = 8  # pixels of the embedded model's patches
ONE, FIRST, SECOND = "the only object", "the first of two objects", "the second of two objects"

SCENES, STEPS, LEARNING_RATE = 30_000, 700, 1e-3
"""Of the training of the model that ships with the package: as many scenes as taught the plain one, and a rate at which
masks of other scenes make it forget where objects are."""

FEWER: Mapping[str, Mapping[str, Any]] = {
    "gradient_shap": {"samples": 8},
    "integrated_gradients": {"steps": 8},
    "kernel_shap": {"samples": 128},
    "occlusion": {"stride": 2},
    "rise": {"masks": 128},
    "smoothgrad": {"samples": 8},
    "tis": {"masks": 128},
    "vit_cx": {"distance": 0.2},
}
"""What methods of many passes are told, to take fewer than by default."""


def training_scenes(count: int, share: float, *, control: bool = False) -> tuple[Examples, list[Example]]:
    """Scenes of the training split without and with masks; a fifth of either have two objects.

    Args:
        count: how many pictures there are, those with masks among them.
        share: of them, how many have masks.
        control: whether each mask is that of an object of another picture instead.

    Returns:
        An example of each picture without masks, and one of each object with a mask: in its mask the other object of
        the same picture is left out.
    """
    pairs = count // 5
    one = open_dataset("scenes", split="train", count=count - pairs)
    two = open_dataset("scenes", split="train", count=pairs, objects=2)
    alone, together = round(share * len(one)), round(share * pairs)
    annotated = list(one[:alone])
    for place in range(0, 2 * together, 2):
        first, second = two[place], two[place + 1]
        annotated += [_without(first, second), _without(second, first)]
    if control:
        # Two on, not one: the next example may be the other object of the same picture, whose mask does show an object.
        masks = [each.mask for each in annotated]
        annotated = [replace(each, mask=mask) for each, mask in zip(annotated, masks[2:] + masks[:2], strict=True)]
    return Examples([*one.entries[alone:], *two.entries[2 * together :: 2]]), annotated


def _without(example: Example, other: Example) -> Example:
    return replace(example, mask=np.where(_known(other.mask) == 1, -1, _known(example.mask)).astype(np.int8))


def train(output: Path, labelled: Sequence[Example], annotated: Sequence[Example], settings: PatchMaskSettings) -> None:
    """Trains the embedded model and writes its weights."""
    model = load_model()
    card = {name: scenes_card()[name] for name in ("architecture", "classes", "mean", "std", "input_size")}
    train_patch_masks(
        model.model, labelled, annotated, model.preprocessing, output, settings, resume=True, card=card, progress=True
    )


def accuracy_change(before: Tensor, after: Tensor) -> dict[str, Estimate]:
    """Accuracies of two models on the same images and their difference, with 95 % intervals over images.

    Args:
        before: (n,) bool, whether the first model is right.
        after: (n,) bool, the second.

    Returns:
        ``before``, ``after`` and ``change``, shares in [-1, 1].
    """
    right = {"before": before.double(), "after": after.double(), "change": after.double() - before.double()}
    sample = Sample.of({name: value.numpy() for name, value in right.items()}, dict)
    return estimate_figures(sample, confidence=0.95, resamples=2000, seed=0)


def is_right(model: LoadedModel, examples: Sequence[Example], batch_size: int = 100) -> Tensor:
    """Whether the model predicts one of each example's labels: (n,) bool."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            predicted = model.model(model.preprocessing([example.image for example in part])).argmax(1).tolist()
            found += [answer in example.labels for answer, example in zip(predicted, part, strict=True)]
    return torch.tensor(found)


def measured(
    model: LoadedModel,
    examples: Sequence[Example],
    methods: Sequence[str] | Mapping[str, Explainer],
    metrics: Sequence[str],
) -> Evaluation:
    """Methods on one model, explaining the label of each scene."""
    return evaluate(
        methods,
        model.preprocessing([example.image for example in examples]),
        list(metrics),
        model=model,
        target=[example.labels[0] for example in examples],
        masks=[_known(example.mask) for example in examples],
        boxes=[_known(example.boxes) for example in examples],
    )


def _known(annotation: np.ndarray | None) -> np.ndarray:
    assert annotation is not None  # scenes have masks and boxes
    return annotation


def rivals(model: LoadedModel) -> dict[str, Explainer]:
    """All methods of the registry that need no training and work on a model, with their options in their labels."""
    blank = model.preprocessing([Image.new("RGB", model.preprocessing.size)])
    found = {}
    for name in list_methods(trainable=False):
        options = FEWER.get(name, {})
        with suppress(UnsupportedModelError), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExplanationWarning)  # a blank picture has flat maps
            explainer = get_explainer(name, model, **options)
            explainer(blank)
            found[", ".join([name, *(f"{option}={value}" for option, value in options.items())])] = explainer
    return found


def of_position_alone(annotated: Sequence[Example], examples: Sequence[Example]) -> Estimate:
    """PxAP of the mean of some masks as one map for every example: what knowing where objects usually are can reach."""
    mean = torch.from_numpy(np.mean([_known(each.mask) == 1 for each in annotated], axis=0)).float()
    place = F.avg_pool2d(mean[None], PATCH)
    masks = torch.from_numpy(np.stack([_known(each.mask) for each in examples])).to(torch.int8)
    metric = create_metric(LOCALISATION[0])
    rows = measure(metric, MetricBatch(place.expand(len(masks), -1, -1).contiguous(), masks=masks))
    return estimates(metric, rows)[LOCALISATION[0]]


def with_trained(others: Evaluation, trained: Evaluation) -> Evaluation:
    """One evaluation of all methods on the model as it was, and of `pm` on the trained one, as `TRAINED`."""
    own = {(TRAINED, metric): trained.rows["pm", metric] for metric in trained.metrics}
    return Evaluation(others.metrics, {**own, **others.rows}, others.settings)


def requirements(found: Mapping[str, Evaluation], change: Estimate) -> list[str]:
    """What training on masks should do, and whether it does, a sentence each.

    Args:
        found: what `with_trained` gave, for the objects `ONE`, `FIRST` and `SECOND`.
        change: of the accuracy.
    """
    kept = "met" if change.high >= 0 else "not met"
    lines = [f"- Accuracy not below that of the model as shipped: **{kept}**, change {in_percent(change)}."]
    for metric, title, where in (
        (LOCALISATION[0], "PxAP", ONE),
        (LOCALISATION[1], "MaxBoxAccV2", ONE),
        (LOCALISATION[0], "PxAP", FIRST),
        (LOCALISATION[0], "PxAP", SECOND),
    ):
        figures = {method: found[where].summaries[method, metric].figures[metric] for method in found[where].methods}
        own = figures.pop(TRAINED)
        best = max(figures, key=lambda method: figures[method])
        verdict = "met" if own >= figures[best] + 0.1 else "not met"
        lines.append(
            f"- {title} on {where} 10 points above every method on the model as shipped: **{verdict}**, "
            f"{100 * own:.1f} against {100 * figures[best]:.1f} of {best}."
        )
    return lines


def requirement_of_control(control: Estimate, position: Estimate) -> str:
    """Whether masks of other scenes taught no more than where objects usually are, in a sentence.

    Args:
        control: PxAP of the model trained on them.
        position: what `of_position_alone` gave.
    """
    return (
        "- PxAP of `pm` trained on the masks of other scenes no higher than that of the mean training mask: "
        f"**{'met' if control.low <= position.value else 'not met'}**, {in_percent(control)} against "
        f"{in_percent(position)}."
    )


def in_percent(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def report(
    weights: Path,
    control: Path | None,
    annotated: Sequence[Example],
    test_scenes: int,
    compared: int,
    faithfulness: int,
    arguments: Sequence[str],
) -> str:
    """Trains nothing; measures the embedded model and those in files, and writes it up as Markdown.

    Args:
        weights: of the model trained on masks.
        control: of the one trained on masks of other scenes, if there is one.
        annotated: the examples with masks that it was trained on.
        test_scenes: scenes behind accuracy.
        compared: scenes with one object behind the localisation of all methods, and half as many with two.
        faithfulness: of them, scenes behind insertion and deletion.
        arguments: of the command, for the record.
    """
    record = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    shipped, trained = load_model(), load_model(checkpoint=weights)
    scenes = list(open_dataset("scenes", split="test", count=test_scenes))
    two = list(open_dataset("scenes", split="test", count=compared // 2, objects=2))
    shown = {ONE: scenes[:compared], FIRST: two[::2], SECOND: two[1::2]}
    asked = {ONE: LOCALISATION, FIRST: LOCALISATION[:1], SECOND: LOCALISATION[:1]}
    methods = rivals(shipped)
    found = {
        where: with_trained(
            measured(shipped, shown[where], methods, asked[where]),
            measured(trained, shown[where], ["pm"], asked[where]),
        )
        for where in shown
    }
    change = accuracy_change(is_right(shipped, scenes), is_right(trained, scenes))
    judged = requirements(found, change["change"])
    if control is not None:
        usual = measured(load_model(checkpoint=control), shown[ONE], ["pm"], LOCALISATION[:1])
        of_others = usual.estimates["pm", LOCALISATION[0]][LOCALISATION[0]]
        judged.append(requirement_of_control(of_others, of_position_alone(annotated, shown[ONE])))
    parts = [
        "# PM on the procedural scenes",
        f"Value [95 % interval]. Trained on {record['annotated']} objects with masks and {record['labelled']} scenes "
        f"without, for {record['wall_seconds']:.0f} s.",
        f"Accuracy on {test_scenes} test scenes, percent: {in_percent(change['before'])} as shipped, "
        f"{in_percent(change['after'])} trained on masks.",
        "\n".join(judged),
    ]
    for where, evaluation in found.items():
        parts += [f"## Localisation of {where}, {len(shown[where])} scenes; shares", evaluation.to_markdown()]
    parts += [
        f"## Faithfulness on the model trained on masks, {faithfulness} scenes with one object; shares",
        measured(trained, scenes[:faithfulness], COMPARED, FAITHFULNESS).to_markdown(),
        machine_facts("vitexplain.benchmarks.patch_masks", arguments, f"{torch.get_num_threads()} threads"),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> None:
    """Trains where there are no weights yet, measures, prints, and writes the tables where asked."""
    settings = PatchMaskSettings(**{**SCENES_SETTINGS, "steps": STEPS, "learning_rate": LEARNING_RATE})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="file of the trained weights, ending in .safetensors")
    parser.add_argument("--control", type=Path, help="file of weights trained on the masks of other scenes")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes")
    parser.add_argument("--share", type=float, default=0.01, help="of them, how many have masks")
    parser.add_argument("--steps", type=int, default=settings.steps, help="training steps")
    parser.add_argument("--seed", type=int, default=settings.seed, help="of the training")
    parser.add_argument("--test-scenes", type=int, default=1_000, help="scenes behind accuracy")
    parser.add_argument("--compared-scenes", type=int, default=100, help="scenes behind localisation")
    parser.add_argument("--faithfulness-scenes", type=int, default=40, help="scenes behind insertion and deletion")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    recipe = replace(settings, steps=options.steps, seed=options.seed)
    labelled, annotated = training_scenes(options.scenes, options.share)
    if not options.weights.is_file():
        train(options.weights, labelled, annotated, recipe)
    if options.control is not None and not options.control.is_file():
        train(options.control, *training_scenes(options.scenes, options.share, control=True), recipe)
    counts = (options.test_scenes, options.compared_scenes, options.faithfulness_scenes)
    text = report(options.weights, options.control, annotated, *counts, arguments)
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
