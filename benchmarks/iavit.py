"""IA-ViT on scenes and CIFAR-10: does training a model together with its interpreter make better explanations?

``python -m vitexplain.benchmarks.iavit --cifar10 DIR --runs FOLDER --output benchmarks/results/iavit.md``

A run is a data set, a variant of the training and a seed. Each finished run is a JSON file in the folder and is not
computed again; one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from vitexplain.data.example import Example
from vitexplain.explainer import Explainer
from vitexplain.files import save_json, write_whole
from vitexplain.iavit.evaluation import answers
from vitexplain.metrics import create_metric, evaluate
from vitexplain.preprocessing import Preprocessing
from vitexplain.registry import create_method

from .iavit_tasks import FROZEN, VARIANTS, Task, cifar10, frozen_scenes, scenes, stripes, trained
from .measuring import machine_facts, markdown_table

NOTES = (
    "Percent, mean ± standard deviation over seeds; in brackets the 95 % interval over test images, mean over seeds. "
    "`plain` is the model alone; the other variants train it with its "
    "interpreter, or in the frozen task the interpreter alone: without a regulariser (`none`), with the published "
    "code's loss (`released`), with a true MMD (`mmd`) and image by image (`kl`). All maps of a variant are of the "
    "same trained model. Deletion and insertion put zeros of the normalised input in the place of pixels, in 14 steps, "
    "and read the probability of the true label."
)

STEPS = 14
"""Of deletion and insertion, which cost more than the training."""

MAPS = ("iavit", "raw_attention", "rollout")


def run(task: Task, variant: str, seed: int, folder: Path, name: str, faithfulness: int) -> dict[str, Any]:
    """Trains one variant with one seed, and measures it on test examples.

    Args:
        task: the data set.
        variant: one of `VARIANTS`.
        seed: of first weights and batches.
        folder: where its checkpoint goes.
        name: of the run.
        faithfulness: images behind deletion and insertion.
    """
    settings = replace(task.settings, seed=seed, **VARIANTS[variant])
    weights = folder / f"{name}.safetensors"
    started = time.monotonic()
    explainer = trained(task, settings, weights)
    seconds = time.monotonic() - started
    test = task.test()
    found = answers(explainer.subject.adapter, weights, test, task.preprocessing)
    figures = {
        "accuracy": found.predictor_accuracy,
        "interpreter accuracy": found.interpreter_accuracy,
        "agreement": found.agreement,
    }
    maps = {} if variant == "plain" else {"iavit": explainer}
    if variant == "plain" or not task.frozen:  # a model that is not trained has the same attention in all variants
        maps |= {each: Explainer(create_method(each), explainer.subject) for each in MAPS[1:]}
    chosen = [test[place] for place in range(faithfulness)]
    return {
        "variant": variant,
        "seed": seed,
        "steps": settings.steps,
        "train_seconds": round(seconds, 1),
        "figures": figures,
        "maps": measured(maps, chosen, task.preprocessing),
    }


def measured(
    maps: Mapping[str, Explainer], examples: Sequence[Example], preprocessing: Preprocessing
) -> dict[str, dict[str, list[float]]]:
    """Deletion and insertion, and localisation where there are masks, of each method's maps: value and interval."""
    metrics = [
        create_metric("deletion", steps=STEPS),
        create_metric("insertion", steps=STEPS, replacement="zeros"),
    ]
    masks = None
    if all(example.mask is not None for example in examples):
        metrics += [create_metric("pixel_average_precision"), create_metric("pointing_game")]
        views = [preprocessing.view_mask(example.mask) for example in examples if example.mask is not None]
        masks = torch.from_numpy(np.stack(views))
    found = evaluate(
        dict(maps),
        preprocessing([example.image for example in examples]),
        metrics,
        target=[example.labels[0] for example in examples],
        masks=masks,
        resamples=1000,
    )
    labels = dict(zip(found.metrics, ("deletion", "insertion", "PxAP", "pointing"), strict=False))
    return {
        method: {
            label: [estimate.value, estimate.low, estimate.high]
            for metric, label in labels.items()
            for estimate in [next(iter(found.estimates[method, metric].values()))]
        }
        for method in found.methods
    }


def wanted(tasks: Sequence[str], variants: Sequence[str], seeds: int) -> Iterator[tuple[str, str, int]]:
    """All runs, seed by seed, so that what is there early is complete for few seeds."""
    for seed, task, variant in product(range(seeds), tasks, variants):
        if (task, variant) != (FROZEN, "plain") or seed == 0:  # nothing is trained there
            yield task, variant, seed


def table(runs: Sequence[Mapping[str, Any]], task: str) -> str:
    """Mean ± standard deviation over seeds, in percent: a row a variant and map."""
    own = [each for each in runs if each["task"] == task]
    columns = list(next(iter(own[0]["maps"].values())))
    arrows = {"deletion": " ↓"}
    header = ["training, map", "seeds", "accuracy", "interpreter's", "agreement"]
    rows = []
    for variant in VARIANTS:
        chosen = [each for each in own if each["variant"] == variant]
        for method in MAPS:
            if not chosen or method not in chosen[0]["maps"]:
                continue
            values = [
                [each["figures"][name] for each in chosen] for name in ("accuracy", "interpreter accuracy", "agreement")
            ]
            first = [_spread(values[0]), *("–" if variant == "plain" else _spread(each) for each in values[1:])]
            found = [_with_interval([each["maps"][method][name] for each in chosen]) for name in columns]
            rows.append([f"{variant}, {method}", str(len(chosen)), *first, *found])
    return markdown_table([*header, *(f"{name}{arrows.get(name, ' ↑')}" for name in columns)], rows)


def _spread(values: Sequence[float]) -> str:
    """Percent, mean ± standard deviation."""
    scaled = [100 * value for value in values]
    return f"{mean(scaled):.1f}" + (f" ± {stdev(scaled):.1f}" if len(scaled) > 1 else "")


def _with_interval(estimates: Sequence[Sequence[float]]) -> str:
    """Percent: mean ± standard deviation of values, and the mean interval."""
    low, high = (100 * mean(each[place] for each in estimates) for place in (1, 2))
    return f"{_spread([each[0] for each in estimates])} [{low:.1f}, {high:.1f}]"


def main(arguments: list[str]) -> None:
    """Computes the runs that are missing, prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of finished runs and checkpoints")
    parser.add_argument("--tasks", default=f"{FROZEN},stripes,scenes,cifar10", help="with commas between them")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="with commas between them")
    parser.add_argument("--cifar10", metavar="DIR", default="", help="folder of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0 on")
    parser.add_argument("--scenes", type=int, default=3_000, help="training scenes")
    parser.add_argument("--scenes-steps", type=int, default=100, help="training steps on scenes")
    parser.add_argument("--stripes-steps", type=int, default=600, help="training steps on stripes")
    parser.add_argument("--cifar10-steps", type=int, default=400, help="training steps on CIFAR-10")
    parser.add_argument("--images", type=int, default=60, help="test images behind the figures of maps")
    parser.add_argument("--at-most", type=int, help="runs to compute before stopping")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    tasks: dict[str, Callable[[], Task]] = {
        FROZEN: lambda: frozen_scenes(options.scenes_steps, options.scenes),
        "scenes": lambda: scenes(options.scenes_steps, options.scenes),
        "stripes": lambda: stripes(options.stripes_steps),
        "cifar10": lambda: cifar10(options.cifar10, options.cifar10_steps),
    }
    tasks = {name: tasks[name] for name in options.tasks.split(",")}
    options.runs.mkdir(parents=True, exist_ok=True)
    computed = 0
    runs = []
    for name, variant, seed in wanted(list(tasks), options.variants.split(","), options.seeds):
        file = options.runs / f"{name}-{variant}-{seed}.run.json"
        task = tasks[name]()
        sizes = {"steps": task.settings.steps, "scenes": options.scenes, "images": options.images}
        if not file.is_file():
            if computed == options.at_most:
                continue
            found = run(task, variant, seed, options.runs, f"{name}-{variant}-{seed}", options.images)
            save_json({"task": name, "sizes": sizes, **found}, file)
            computed += 1
            print(file.name, found["figures"], found["maps"], flush=True)
        runs.append(json.loads(file.read_text(encoding="utf-8")))
        if runs[-1]["sizes"] != sizes:
            raise SystemExit(f"{file} is of {runs[-1]['sizes']}, now asked for {sizes}: choose another folder of runs")
    parts = ["# IA-ViT: model and interpreter trained together", NOTES]
    for name in tasks:
        if any(each["task"] == name for each in runs):
            parts += [f"## {name}", table(runs, name)]
    parts.append(machine_facts("vitexplain.benchmarks.iavit", _shown(arguments), f"{torch.get_num_threads()} threads"))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


def _shown(arguments: Sequence[str]) -> list[str]:
    """The arguments without the machine's own paths."""
    hidden = {"--runs": "FOLDER", "--cifar10": "DIR", "--output": "FILE"}
    return [hidden.get(before, each) for before, each in zip(["", *arguments], arguments, strict=False)]


if __name__ == "__main__":
    main(sys.argv[1:])
