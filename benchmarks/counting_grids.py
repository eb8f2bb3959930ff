"""The counting task of the Vision DiffMask paper, with figures: which of its two faithful answers is given, how well?

``python -m vitexplain.benchmarks.counting_grids --steps 1000 --output benchmarks/results/counting_grids.md``

A 3×3 grid of coloured cells, labelled with the number of red ones. Keeping all red cells is faithful, and so is keeping
all others. The paper shows five images; here precision and recall are measured against both answers. Images without
red cells, or with nothing else, have no two answers and are left out.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import ExplanationWarning, adapt
from vitexplain.data.counting_grids import make_counting_grids
from vitexplain.diffmask.checkpoint import TrainedGates, load_checkpoint
from vitexplain.diffmask.constraint import divergence
from vitexplain.diffmask.masking import MaskedModel, amortised_log_kept, hard_mask
from vitexplain.files import write_whole
from vitexplain.training.diffmask import DiffMaskSettings, train_diffmask

_SIDE, _CELL = 3, 16
_TEST_SEED = 10**6


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
    test = make_counting_grids(1000, _TEST_SEED)
    with torch.no_grad():
        accuracy = (model(test.images).argmax(1) == test.labels).float().mean().item()
    return model, accuracy


def agreement_with(mask: Tensor, answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and intersection over union (B,) of masks (B, P) with an answer; precision NaN if empty."""
    both = (mask & answer).sum(1).float()
    return both / mask.sum(1), both / answer.sum(1), both / (mask | answer).sum(1)


def measure(trained: TrainedGates, model: nn.Module, images: int) -> list[str]:
    """Rows of the table: each answer, and the better one of each image."""
    test = make_counting_grids(images, _TEST_SEED + 1, extremes=False)
    masked = MaskedModel(adapt(model))
    with torch.no_grad():
        found = masked.read(test.images)
        mask = hard_mask(amortised_log_kept(trained.gates, found))
        answer = masked.logits(found.images, mask, trained.gates.replacement)
    change = divergence("distribution", found.logits, answer).mean().item()
    same = (answer.argmax(1) == found.logits.argmax(1)).float().mean().item()
    answers = {"red cells": test.red, "other cells": ~test.red}
    rows, unions = [], []
    for name, cells in answers.items():
        precision, recall, union = agreement_with(mask.bool(), cells)
        unions.append(union)
        exact = (union == 1).float().mean()
        rows.append(f"| {name} | {precision.nanmean():.3f} | {recall.mean():.3f} | {union.mean():.3f} | {exact:.3f} |")
    best = torch.stack(unions).amax(0)
    rows.append(f"| the better one | | | {best.mean():.3f} | {(best == 1).float().mean():.3f} |")
    rows += ["", f"Agreement {same:.3f}, KL {change:.4f}, kept {mask.mean():.1%} of the cells."]
    return rows


def table(steps: int, learning: int, images: int, seed: int) -> str:
    """The figures as Markdown."""
    model, accuracy = learn_counting(learning, seed)
    batches = [make_counting_grids(32, 10 + step).images for step in range(steps)]
    validation = [make_counting_grids(64, _TEST_SEED + 2 + step, extremes=False).images for step in range(4)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)  # whether the constraint is met stands below the table
        output = Path(folder) / "gates.safetensors"
        # any cell lost on the way to an answer changes the count: with the default multiplier, gates keep all of them
        settings = DiffMaskSettings(steps=steps, seed=seed, masked_at_start=0.3, multiplier_start=2.0)
        card = train_diffmask(model, batches, output, settings, validation=validation)
        trained = load_checkpoint(output, adapt(model), torch.device("cpu"), torch.float32)
    lines = [
        f"Counting task, 3×3 cells; model of 4 blocks and width 64, accuracy {accuracy:.1%}; gates trained for {steps} "
        f"steps of 32 images in {card['wall_seconds']:.0f} s. {images} test images with 1 to 8 red cells, hard masks.",
        "",
        "| answer | precision | recall | IoU | exact |",
        "|---|---|---|---|---|",
        *measure(trained, model, images),
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Measures, prints, and writes the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the gates")
    parser.add_argument("--learning", type=int, default=600, help="steps in which the model learns to count")
    parser.add_argument("--images", type=int, default=512, help="test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    text = table(options.steps, options.learning, options.images, options.seed)
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
