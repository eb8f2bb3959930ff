"""Does relevance go to the object that is explained? Scenes with two objects, the map of each class.

``python -m vitexplain.benchmarks.two_object_scenes --scenes 500 --output benchmarks/results/two_object_scenes.md``
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vitexplain import create_method, explain_with, list_methods, load_model, method_info
from vitexplain.data.scenes import SPLITS, make_scene
from vitexplain.files import write_whole
from vitexplain.metrics.localisation import energy_in_mask


def measure(num_scenes: int, batch_size: int = 50) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Shares of positive relevance on the first two-object scenes of the test split, none left out.

    Returns:
        For each method (scenes, 2 targets, 2 objects): the share of target k's relevance on object j; the objects'
        share of the image (scenes, 2); and whether the model's two most probable classes are the two objects.
    """
    model = load_model()
    methods = [create_method(name) for name in list_methods(trainable=False)]
    shares: dict[str, list[Tensor]] = {method.info.name: [] for method in methods}
    areas, recognised = [], []
    seeds = SPLITS["test"][:num_scenes]
    for start in tqdm(range(0, num_scenes, batch_size), unit="batch", disable=None):
        scenes = [make_scene(seed, num_objects=2) for seed in seeds[start : start + batch_size]]
        masks = torch.from_numpy(np.stack([scene.masks for scene in scenes]))
        targets = torch.tensor([scene.classes for scene in scenes])
        explanations = explain_with(methods, model.subject, model.preprocessing([s.image for s in scenes]), targets)
        areas.append(masks.float().mean((2, 3)))
        recognised.append((explanations[0].logits.topk(2).indices.sort().values == targets.sort().values).all(1))
        both = masks[:, None].expand(-1, 2, -1, -1, -1)
        for explanation in explanations:
            scores = explanation.scores[:, :, None].expand(-1, -1, 2, -1, -1)
            shares[explanation.method].append(energy_in_mask(scores, both))
    return {name: torch.cat(each) for name, each in shares.items()}, torch.cat(areas), torch.cat(recognised)


def interval(values: Tensor) -> str:
    """Mean in percent with its 95 % interval, by a bootstrap over scenes."""
    present = values[values.isfinite()].double()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(present), (2000, len(present)), generator=generator)
    low, high = present[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{100 * present.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def table(num_scenes: int) -> str:
    """The figures as Markdown."""
    shares, areas, recognised = measure(num_scenes)
    lines = [
        f"Share of positive relevance, percent, mean over both targets of {num_scenes} two-object scenes, with 95 % "
        "bootstrap intervals over scenes.",
        f"No scene is left out; the model's two most probable classes are the two objects in "
        f"{100 * recognised.float().mean():.1f} % of them (last column: on those alone).",
        f"An object covers {interval(areas.mean(1))} % of the image: what a map without any preference would give.",
        "",
        "| method | class-specific | on the explained object | on the other object | explained, both recognised |",
        "|---|---|---|---|---|",
    ]
    for name, share in sorted(shares.items(), key=lambda item: -item[1].diagonal(dim1=1, dim2=2).nanmean()):
        own = share.diagonal(dim1=1, dim2=2).nanmean(1)
        other = share.flip(2).diagonal(dim1=1, dim2=2).nanmean(1)
        kind = "yes" if method_info(name).class_specific else "no"
        lines.append(f"| {name} | {kind} | {interval(own)} | {interval(other)} | {interval(own[recognised])} |")
    lines += ["", f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Measures, prints, and writes the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500, help="how many scenes of the test split")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    text = table(options.scenes)
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
