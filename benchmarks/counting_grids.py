"""The counting task of the Vision DiffMask paper, with figures: which methods give one of its two faithful answers?

``python -m vitexplain.benchmarks.counting_grids --seeds 3 --output benchmarks/results/counting_grids.md``

A 3×3 grid of coloured cells, labelled with the number of red ones. Keeping all red cells is faithful, and so is keeping
all others. The paper shows five images; here precision and recall are measured against both answers. Images without
red cells, or with nothing else, have no two answers and are left out.

Vision DiffMask says by itself which cells it keeps. A method without a threshold is told how many: as many of its top
cells are taken as the answer has, so that precision is recall; among equal scores, the first in reading order.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import Explainer, ExplanationWarning, UnsupportedModelError, adapt, create_method, list_methods
from vitexplain.data.counting_grids import CountingGrids, make_counting_grids
from vitexplain.diffmask.checkpoint import TrainedGates, load_checkpoint
from vitexplain.diffmask.constraint import divergence
from vitexplain.diffmask.masking import MaskedModel, amortised_log_kept, hard_mask
from vitexplain.files import write_whole
from vitexplain.training.diffmask import DiffMaskSettings, train_diffmask

from .measuring import machine_facts

CHOICES = (2.0, 5.0, 20.0)
"""λ at the start, tried in turn: any cell lost on the way to an answer changes the count, so a high one keeps all."""

_SIDE, _CELL = 3, 16

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "gradient_shap": {"samples": 20},
    "integrated_gradients": {"steps": 20},
    "kernel_shap": {"samples": 64},
    "occlusion": {"window": 1},
    "rise": {"masks": 128, "cells": _SIDE},
    "smoothgrad": {"samples": 20},
    "tis": {"masks": 64},
}
"""What methods are told on a grid of 9 cells, of which there are no more than 512 subsets."""

_TEST_SEED, _VALIDATION_SEED = 10**6 + 1, 2 * 10**6
_FIGURES = ("precision", "recall", "IoU", "exact")

Figures = Mapping[str, Tensor]
"""By column of the table, means over images; one entry a seed after `torch.stack`."""


def learn_counting(steps: int, seed: int) -> tuple[nn.Module, float]:
    """A small Vision Transformer that counts red cells, and its accuracy on 1000 test images."""
    torch.manual_seed(seed)
    model: nn.Module = VisionTransformer(
        img_size=_SIDE * _CELL, patch_size=_CELL, embed_dim=64, depth=4, num_heads=4, num_classes=_SIDE**2 + 1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = make_counting_grids(64, seed * 100_000 + step + 1)
        loss = F.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval()
    test = make_counting_grids(1000, _TEST_SEED - 1)
    with torch.no_grad():
        accuracy = (model(test.images).argmax(1) == test.labels).float().mean().item()
    return model, accuracy


def learn_masks(model: nn.Module, settings: DiffMaskSettings) -> tuple[TrainedGates, float]:
    """Gates trained with the best of `CHOICES`, which is returned with them.

    The best is that which meets the constraint on validation images, then keeps the fewest cells: no labels are used.
    """
    batches = [make_counting_grids(32, 10 + step).images for step in range(settings.steps)]
    validation = [make_counting_grids(64, _VALIDATION_SEED + step, extremes=False).images for step in range(4)]
    found = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)  # whether the constraint is met stands beside the table
        for start in CHOICES:
            output = Path(folder) / f"{start}.safetensors"
            tried = replace(settings, multiplier_start=start)
            card = train_diffmask(model, batches, output, tried, validation=validation)
            trained = load_checkpoint(output, adapt(model), torch.device("cpu"), torch.float32)
            found.append((not card["met"], card["result"]["kept"], start, trained))
    *_, start, trained = min(found, key=lambda each: each[:3])
    return trained, start


def agreement_with(mask: Tensor, answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and intersection over union (B,) of masks (B, P) with an answer; precision NaN if empty."""
    both = (mask & answer).sum(1).float()
    return both / mask.sum(1), both / answer.sum(1), both / (mask | answer).sum(1)


def top_cells(scores: Tensor, answer: Tensor) -> Tensor:
    """Mask (B, P) of the cells with the largest scores (B, P), as many in each image as its answer (B, P) has."""
    place = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return place < answer.sum(1, keepdim=True)


def figures(masks: Mapping[str, Tensor], answers: Mapping[str, Tensor]) -> Figures:
    """Means over images for each answer, and for the better one of each image.

    Args:
        masks: mask (B, P) by the answer that it is compared with.
        answers: the cells (B, P) of each answer.
    """
    columns, unions = {}, []
    for name, answer in answers.items():
        precision, recall, union = agreement_with(masks[name], answer)
        unions.append(union)
        for figure, values in zip(_FIGURES, (precision, recall, union, (union == 1).float()), strict=True):
            columns[f"{name}: {figure}"] = values.nanmean()
    best = torch.stack(unions).amax(0)
    return {**columns, "better: IoU": best.mean(), "better: exact": (best == 1).float().mean()}


def measure(trained: TrainedGates, model: nn.Module, test: CountingGrids) -> tuple[dict[str, Figures], str]:
    """Figures of every method, and a sentence on what the masks of Vision DiffMask change in the model's answer."""
    answers = {"red": test.red, "others": ~test.red}
    masked = MaskedModel(adapt(model))
    with torch.no_grad():
        found = masked.read(test.images)
        mask = hard_mask(amortised_log_kept(trained.gates, found))
        answer = masked.logits(found.images, mask, trained.gates.replacement)
    rows = {"diffmask": figures(dict.fromkeys(answers, mask.bool()), answers)}
    for name in list_methods(trainable=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExplanationWarning)  # a constant map is an answer too, and a wrong one
            try:
                scores = Explainer(create_method(name, **OPTIONS.get(name, {})), model)(test.images).scores.flatten(1)
            except UnsupportedModelError:  # its products cancel on this model
                continue
        rows[name] = figures({each: top_cells(scores, cells) for each, cells in answers.items()}, answers)
    change = divergence("distribution", found.logits, answer).mean().item()
    same = (answer.argmax(1) == found.logits.argmax(1)).float().mean().item()
    return rows, f"agreement {same:.3f}, KL {change:.4f}, kept {mask.mean():.1%} of the cells"


def table(seeds: int, steps: int, learning: int, images: int) -> str:
    """The figures as Markdown: means over seeds; for the better answer, the lowest and the highest seed too."""
    results, notes = [], []
    settings = DiffMaskSettings(steps=steps, masked_at_start=0.3, evaluate_every=max(1, steps // 6))
    test = make_counting_grids(images, _TEST_SEED, extremes=False)
    for seed in range(seeds):
        model, accuracy = learn_counting(learning, seed)
        trained, start = learn_masks(model, replace(settings, seed=seed))
        rows, note = measure(trained, model, test)
        results.append(rows)
        notes.append(f"- seed {seed}: model's accuracy {accuracy:.1%}; λ from {start:g}; diffmask: {note}.")
        print(notes[-1], flush=True)
    columns = list(results[0]["diffmask"])
    lines = [
        f"# Counting task\n\n{_SIDE}×{_SIDE} cells, {images} test images with 1 to {_SIDE**2 - 1} red cells, the "
        f"predicted class explained; {seeds} models of 4 blocks and width 64, each with gates of its own, trained for "
        f"{steps} steps of 32 images. Means over seeds; in brackets, the lowest and the highest.\n",
        f"| method | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    everywhere = [name for name in results[0] if all(name in rows for rows in results)]
    for name in sorted(everywhere, key=lambda name: -_over_seeds(results, name, "better: IoU").mean().item()):
        cells = [_cell(_over_seeds(results, name, column), column) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    left_out = sorted(set(list_methods(trainable=False)) - set(everywhere))
    if left_out:
        notes.append(f"- Without a map of at least one of the models, and so left out: {', '.join(left_out)}.")
    return "\n".join([*lines, "", *notes, ""])


def _over_seeds(results: list[dict[str, Figures]], name: str, column: str) -> Tensor:
    return torch.stack([rows[name][column] for rows in results])


def _cell(values: Tensor, column: str) -> str:
    spread = f" [{values.min():.3f}, {values.max():.3f}]" if column.startswith("better") else ""
    return f"{values.nanmean():.3f}{spread}"


def main(arguments: list[str]) -> None:
    """Measures, prints, and writes the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many models, each with gates")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the gates")
    parser.add_argument("--learning", type=int, default=600, help="steps in which a model learns to count")
    parser.add_argument("--images", type=int, default=512, help="test images")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    text = table(options.seeds, options.steps, options.learning, options.images)
    threads = f"{torch.get_num_threads()} threads"
    text += f"\n{machine_facts('vitexplain.benchmarks.counting_grids', arguments, threads)}\n"
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
