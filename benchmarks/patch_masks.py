"""PM on the procedural scenes: trains the embedded model on 1 % of masks, and measures maps before and after.

``python -m vitexplain.benchmarks.patch_masks scenes-pm.safetensors --output benchmarks/results/patch_masks.md``

Weights that are there already are measured and not trained again. Where maps are good at finding the object, that is
what training taught them; whether they show what the model decides by is told by insertion and deletion beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitexplain import load_model
from vitexplain.data import Example, open_dataset
from vitexplain.files import write_whole
from vitexplain.metrics import evaluate
from vitexplain.models.embedded import scenes_card
from vitexplain.models.loading import LoadedModel
from vitexplain.training.patch_mask_evaluation import evaluate_patch_masks
from vitexplain.training.patch_masks import PatchMaskSettings, train_patch_masks
from vitexplain.training.patch_masks_command import SCENES_SETTINGS

from .measuring import machine_facts, markdown_table

METHODS = ("pm", "raw_attention", "rollout", "gradcam", "generic_attention", "tokentm")
METRICS = ("pixel_average_precision", "pointing_game", "insertion", "deletion")


def train(output: Path, scenes: int, share: float, settings: PatchMaskSettings) -> None:
    """Trains the embedded model on scenes of the training split, the first of which have masks.

    Args:
        output: weights to write.
        scenes: how many scenes are painted, masked ones among them.
        share: how many of them have masks.
        settings: the recipe.
    """
    model = load_model()
    examples = list(open_dataset("scenes", split="train", count=scenes))
    masked = round(share * scenes)
    card = {name: scenes_card()[name] for name in ("architecture", "classes", "mean", "std", "input_size")}
    train_patch_masks(
        model.model,
        examples[masked:],
        examples[:masked],
        model.preprocessing,
        output,
        settings,
        resume=True,
        card=card,
        progress=True,
    )


def localisation(model: LoadedModel, score: str, count: int) -> list[str]:
    """Accuracy and PxAP in percent on one-object test scenes, and PxAP of each object's map on two-object scenes."""
    one = open_dataset("scenes", split="test", count=count)
    both = open_dataset("scenes", split="test", count=count, objects=2)
    alone = evaluate_patch_masks(model.subject.adapter, one, model.preprocessing, score=score)
    pairs = evaluate_patch_masks(model.subject.adapter, both, model.preprocessing, score=score)
    figures = (alone.accuracy, alone.pixel_average_precision, alone.chance, pairs.pixel_average_precision, pairs.chance)
    return [f"{100 * figure:.1f}" for figure in figures]


def comparison(model: LoadedModel, examples: Sequence[Example]) -> str:
    """All methods on one model, explaining the label of each image: figures with intervals, as Markdown."""
    found = evaluate(
        list(METHODS),
        model.preprocessing([example.image for example in examples]),
        list(METRICS),
        model=model,
        target=[example.labels[0] for example in examples],
        masks=torch.from_numpy(np.stack([_mask(example) for example in examples])),
    )
    return found.to_markdown()


def _mask(example: Example) -> Any:
    assert example.mask is not None  # scenes have masks
    return example.mask


def report(weights: Path, count: int, faithfulness: int, arguments: Sequence[str]) -> str:
    """Trains nothing; measures the embedded model and the one in a file, and writes it up as Markdown."""
    record = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    models = {"as shipped": load_model(), "trained on masks": load_model(checkpoint=weights)}
    header = ["model", "accuracy", "PxAP", "chance", "PxAP, each of two objects", "chance"]
    rows = [[name, *localisation(model, record["score"], count)] for name, model in models.items()]
    examples = list(open_dataset("scenes", split="test", count=faithfulness))
    parts = [
        "# PM on the procedural scenes",
        f"Percent, on {count} test scenes with one object, and {count} with two; {record['annotated']} training scenes "
        f"with masks, {record['labelled']} with labels alone; {record['wall_seconds']:.0f} s of training.",
        markdown_table(header, rows),
    ]
    for name, model in models.items():
        parts += [
            f"All methods on the model {name}, for the label of {faithfulness} test scenes with one object:",
            comparison(model, examples),
        ]
    threads = f"{torch.get_num_threads()} threads"
    parts.append(machine_facts("vitexplain.benchmarks.patch_masks", arguments, threads))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> None:
    """Trains where there are no weights yet, measures, prints, and writes the tables where asked."""
    settings = PatchMaskSettings(**SCENES_SETTINGS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="file of the trained weights, ending in .safetensors")
    parser.add_argument("--scenes", type=int, default=10_000, help="training scenes")
    parser.add_argument("--share", type=float, default=0.01, help="of them, how many have masks")
    parser.add_argument("--steps", type=int, default=settings.steps, help="training steps")
    parser.add_argument("--seed", type=int, default=settings.seed, help="of the training")
    parser.add_argument("--test-scenes", type=int, default=1_000, help="scenes behind accuracy and PxAP")
    parser.add_argument("--faithfulness-scenes", type=int, default=200, help="scenes behind the table of methods")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    if not options.weights.is_file():
        train(options.weights, options.scenes, options.share, replace(settings, steps=options.steps, seed=options.seed))
    text = report(options.weights, options.test_scenes, options.faithfulness_scenes, arguments)
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
