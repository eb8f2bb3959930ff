"""How good are the gates that ship for the embedded model? Hard masks on scenes that no training has seen.

``python -m vitexplain.benchmarks.diffmask_scenes --output benchmarks/results/diffmask_scenes.md``

They were trained by one command; the card beside the file has the recipe, the course and the versions::

    vitexplain train diffmask --data scenes --steps 400 --batch-size 16 --set multiplier_start=30
        --set evaluate_every=50 --set validation_batches=8 --output scenes_diffmask.safetensors

Agreement and divergence are those of the model's answers to images where only the kept patches are left. What a
patch that is kept shows of the object is told by its masks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitexplain import get_explainer, load_model
from vitexplain.data.scenes import SPLITS, Scene, make_scene
from vitexplain.diffmask.evaluation import MaskReport
from vitexplain.files import write_whole
from vitexplain.models.loading import LoadedModel

from .measuring import machine_facts, markdown_table

_BATCH = 50
_QUANTILES = (0.5, 0.9, 0.95, 0.99)

HEADER = ("kept", "agreement", "divergence", *(f"{100 * each:g} %" for each in _QUANTILES), "all masked")
"""Columns of `row`."""


def batches(count: int, num_objects: int) -> Iterator[list[Scene]]:
    """The first scenes of the test split, some at a time."""
    seeds = SPLITS["test"][:count]
    for start in range(0, count, _BATCH):
        yield [make_scene(seed, num_objects=num_objects) for seed in seeds[start : start + _BATCH]]


def measure(model: LoadedModel, count: int, num_objects: int) -> tuple[MaskReport, Tensor]:
    """Reports on the masks (B,) of all scenes, and of each object's patches the share that is kept (B, K).

    Args:
        model: the embedded model.
        count: number of scenes.
        num_objects: objects in each.
    """
    explainer = get_explainer("diffmask", model)
    method: Any = explainer.method
    reports, covered = [], []
    for scenes in batches(count, num_objects):
        images = model.preprocessing([scene.image for scene in scenes])
        explanation = explainer(images)
        reports.append(method.report(model.model, explanation))
        masks = torch.from_numpy(np.stack([scene.masks for scene in scenes]))
        shown = F.adaptive_avg_pool2d(masks.float(), explanation.grid) >= 0.5
        kept = explanation.scores[:, None] > 0.5
        covered.append((shown & kept).sum((2, 3)) / shown.sum((2, 3)).clamp(min=1))
    return joined(reports), torch.cat(covered)


def joined(reports: Sequence[MaskReport]) -> MaskReport:
    """One report on the masks of several batches."""
    return MaskReport(*(torch.cat([getattr(each, field.name) for each in reports]) for field in fields(MaskReport)))


def row(report: MaskReport) -> list[str]:
    """Cells of the table: means over images, and quantiles of the divergence."""
    quantiles = report.divergence.float().quantile(torch.tensor(_QUANTILES)).tolist()
    return [
        f"{report.kept.mean():.1%}",
        f"{report.unchanged.float().mean():.1%}",
        f"{report.divergence.mean():.3f}",
        *(f"{each:.3f}" for each in quantiles),
        f"{report.divergence_all_masked.mean():.2f}",
    ]


def table(count: int) -> str:
    """The figures as Markdown."""
    model, lines, started = load_model(), [], time.monotonic()
    for num_objects in (1, 2):
        report, covered = measure(model, count, num_objects)
        on_objects = [f"{each:.1%}" for each in covered.mean(0)] + ["–"] * (2 - num_objects)
        lines.append([str(num_objects), *row(report), *on_objects])
    header = ["objects", *HEADER, "first object", "second object"]
    return (
        f"# Vision DiffMask on the embedded model\n\n{count} test scenes a line, hard masks, shipped gates. Agreement: "
        "the predicted class stays. Divergence in nats, of all class probabilities: its mean, and quantiles over "
        "images. All masked: mean divergence where every patch is replaced. First and second object: of "
        "the patches that it covers by half or more, the share that is kept.\n\n"
        f"{markdown_table(header, lines)}\n\n{time.monotonic() - started:.0f} s.\n"
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints, and writes the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500, help="test scenes a line")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    text = table(options.scenes)
    threads = f"{torch.get_num_threads()} threads"
    text += f"\n{machine_facts('vitexplain.benchmarks.diffmask_scenes', arguments, threads)}\n"
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
