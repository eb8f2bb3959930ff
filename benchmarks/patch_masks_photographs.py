"""PM on photographs: ViT-Ti fine-tuned on a few masks, and its maps against those of other methods.

``python -m vitexplain.benchmarks.patch_masks_photographs vit-tiny-pm.safetensors
--output benchmarks/results/patch_masks_photographs.md``

``VITEXPLAIN_TEST_DATA`` names the folder of weights and images. Trained is on the masks of every other horse, flamingo
and COCO photograph, and on one photograph of each ImageNet class without any; measured on the others, and on every
other ImageNet photograph with boxes. Weights that are there already are measured and not trained again.

Training follows the answers that the model gave before it (`distillation`): some COCO photographs show objects that
are not what the photograph is of, and 1,000 labelled ones are too few to learn 1,000 classes from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vitexplain import load_model
from vitexplain.data import Example, load_examples, open_dataset
from vitexplain.files import write_whole
from vitexplain.metrics import Evaluation, evaluate
from vitexplain.models.loading import LoadedModel
from vitexplain.training.patch_masks import PatchMaskSettings, train_patch_masks

from .measuring import machine_facts, markdown_table
from .patch_masks import accuracy_change, in_percent, with_trained

METHODS = ("pm", "raw_attention", "rollout", "gradcam", "generic_attention", "tokentm")
PERTURBED = ("pm", "raw_attention", "generic_attention")
"""Methods whose faithfulness is measured, which takes many passes."""

BEFORE, AFTER = "as published", "trained on masks"
SETTINGS = PatchMaskSettings(
    distillation=True,
    steps=130,
    batch_size=6,
    annotated_batch_size=12,
    learning_rate=2e-4,
    head_rate=1e-4,
    layer_decay=0.8,
    trained_blocks=4,
    smallest_crop=0.5,
    save_every=50,
)


@dataclass(frozen=True)
class TestSet:
    """Photographs to measure on.

    Attributes:
        title: what they show.
        examples: the photographs.
        metrics: what is measured.
        classified: whether a photograph has one class; not where it shows several objects.
    """

    title: str
    examples: Sequence[Example]
    metrics: tuple[str, ...]
    classified: bool = True


MASKS = ("pixel_average_precision", "energy_in_mask", "pointing_game")
PERTURBATION = ("positive_perturbation", "negative_perturbation")
BOXES = ("max_box_accuracy_v2", "max_box_accuracy", "energy_in_box", "pointing_game")


def open_vit(data: Path, weights: Path | None = None) -> LoadedModel:
    """ViT-Ti, as published or with other weights; photographs are squashed to its input, so that all of them shows."""
    return load_model(
        "timm:vit_tiny_patch16_224",
        checkpoint=weights or data / "vit_tiny_patch16_224_in1k" / "model.safetensors",
        preprocessing={"crop_mode": "squash", "crop_fraction": 1.0},
    )


def coco_objects(data: Path, model: LoadedModel) -> tuple[list[Example], list[Example]]:
    """Objects of ImageNet classes in COCO photographs: of every other photograph from the first, and of the others.

    A category has several ImageNet classes; the label becomes the one that the model finds most probable. Other
    objects of ImageNet classes are left out of an object's mask: they are neither it nor background.
    """
    found = open_dataset(f"annotated:{data / 'coco100_masks'}", masks="instances", keep_unknown=False)
    by_photograph: dict[str, list[Example]] = {}
    for example in found:
        by_photograph.setdefault(example.name.partition("#")[0], []).append(example)
    halves: tuple[list[Example], list[Example]] = ([], [])
    for place, objects in enumerate(by_photograph.values()):
        with torch.inference_mode():
            logits = model.model(model.preprocessing([objects[0].image]))[0]
        shown = np.stack([each.mask == 1 for each in objects if each.mask is not None])
        for each in objects:
            assert each.mask is not None  # COCO has masks
            label = max(each.labels, key=lambda label: float(logits[label]))
            mask = np.where(shown.any(0) & (each.mask != 1), -1, each.mask).astype(np.int8)
            halves[place % 2].append(replace(each, labels=(label,), mask=mask))
    return halves


def annotated_sets(data: Path, model: LoadedModel) -> tuple[list[Example], list[TestSet]]:
    """The photographs with masks to train on, and the sets to test on."""
    horses = open_dataset(f"folder:{data / 'weizmann_horse_masks'}", label="339", ignored=-1)
    flamingos = open_dataset(f"annotated:{data / 'caltech_flamingo_masks'}", ignored=-1)
    boxes = open_dataset(f"annotated:{data / 'imagenet_val650_boxes'}", boxes_key="boxes_227_xyxy")
    coco, other_coco = coco_objects(data, model)
    return [*horses[::2], *flamingos[::2], *coco], [
        TestSet("ImageNet photographs with boxes", boxes[::2], BOXES),
        TestSet("horses", horses[1::2], MASKS),
        TestSet("flamingos", flamingos[1::2], MASKS),
        TestSet("COCO objects", other_coco, MASKS, classified=False),
    ]


def train(data: Path, output: Path, annotated: Sequence[Example], settings: PatchMaskSettings) -> None:
    """Trains ViT-Ti on photographs with masks, and on one photograph a class without."""
    model = open_vit(data)
    photographs = open_dataset(f"annotated:{data / 'imagenet_train1000_classes'}")
    train_patch_masks(
        model.model, photographs, annotated, model.preprocessing, output, settings, resume=True, progress=True
    )


def measured(
    model: LoadedModel, examples: Sequence[Example], metrics: Sequence[str], methods: Sequence[str] = METHODS
) -> Evaluation:
    """Methods on one model, explaining the label of each photograph."""
    (batch,) = load_examples(examples, model.preprocessing, batch_size=len(examples))
    return evaluate(
        list(methods),
        batch.inputs,
        list(metrics),
        model=model,
        target=[labels[0] for labels in batch.labels],
        masks=batch.masks,
        boxes=batch.boxes,
    )


def is_right(model: LoadedModel, examples: Sequence[Example]) -> torch.Tensor:
    """Whether the model predicts each example's label: (n,) bool."""
    found = []
    for batch in load_examples(examples, model.preprocessing):
        with torch.inference_mode():
            answers = model.model(batch.inputs).argmax(1).tolist()
        found += [answer in labels for answer, labels in zip(answers, batch.labels, strict=True)]
    return torch.tensor(found)


def accuracies(models: Mapping[str, LoadedModel], tests: Sequence[TestSet]) -> str:
    """Top-1 accuracy before and after, as Markdown."""
    rows = []
    for test in filter(lambda test: test.classified, tests):
        change = accuracy_change(*(is_right(model, test.examples) for model in models.values()))
        rows.append([test.title, str(len(test.examples)), *map(in_percent, change.values())])
    return markdown_table(["photographs", "number", BEFORE, AFTER, "change"], rows)


def report(data: Path, weights: Path, tests: Sequence[TestSet], faithfulness: int, arguments: Sequence[str]) -> str:
    """Trains nothing; measures ViT-Ti before and after training, and writes it up as Markdown."""
    record = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    models = {BEFORE: open_vit(data), AFTER: open_vit(data, weights)}
    parts = [
        "# PM on photographs",
        f"ViT-Ti, {record['training']['steps']} steps on {record['annotated']} objects with masks and "
        f"{record['labelled']} photographs without; {record['wall_seconds']:.0f} s of training. None of the images "
        "below was trained on. Their label is explained; value [95 % interval], shares. Methods are measured on the "
        "model as published, and pm on the trained one, too.",
        "## Top-1 accuracy, percent",
        accuracies(models, tests),
    ]
    for test in tests:
        found = with_trained(
            measured(models[BEFORE], test.examples, test.metrics),
            measured(models[AFTER], test.examples, test.metrics, ["pm"]),
        )
        parts += [f"## Localisation: {test.title}, {len(test.examples)}", found.to_markdown()]
    parts += [
        f"## Faithfulness on the model trained on masks: the first {faithfulness} of the {tests[0].title}",
        measured(models[AFTER], tests[0].examples[:faithfulness], PERTURBATION, PERTURBED).to_markdown(),
    ]
    module = "vitexplain.benchmarks.patch_masks_photographs"
    parts.append(machine_facts(module, arguments, f"{torch.get_num_threads()} threads"))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> None:
    """Trains where there are no weights yet, measures, prints, and writes the tables where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="file of the trained weights, ending in .safetensors")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="training steps")
    parser.add_argument("--seed", type=int, default=SETTINGS.seed, help="of the training")
    parser.add_argument("--faithfulness-images", type=int, default=16, help="photographs behind perturbation")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    if "VITEXPLAIN_TEST_DATA" not in os.environ:
        parser.error("set VITEXPLAIN_TEST_DATA to the folder of weights and images")
    data = Path(os.environ["VITEXPLAIN_TEST_DATA"])
    annotated, tests = annotated_sets(data, open_vit(data))
    if not options.weights.is_file():
        train(data, options.weights, annotated, replace(SETTINGS, steps=options.steps, seed=options.seed))
    text = report(data, options.weights, tests, options.faithfulness_images, arguments)
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
