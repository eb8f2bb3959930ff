"""Does Vision DiffMask find the patches that a label rests on? Tasks with a known answer, and what the answer costs.

``python -m vitexplain.benchmarks.pair_task --task pair --seeds 3 --steps 400 --output benchmarks/results/pair_task.md``

The pair task is a gate to pass; the pointer task is known to be hard, and a diagnosis.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import ExplanationWarning, adapt
from vitexplain.data.glyph_grids import PATCH, Task, make_glyph_grids, num_classes
from vitexplain.diffmask.checkpoint import TrainedGates, load_checkpoint
from vitexplain.diffmask.constraint import divergence
from vitexplain.diffmask.masking import MaskedModel, amortised_log_kept, hard_mask
from vitexplain.diffmask.refinement import refined
from vitexplain.files import write_whole
from vitexplain.training.diffmask import DiffMaskSettings, train_diffmask

from .measuring import machine_facts

_TEST_SEED = 10**6


@dataclass(frozen=True)
class Scale:
    """How large the task and its model are.

    Attributes:
        side: patches along an edge.
        width: features of a token.
        depth: blocks.
        learning: steps in which the model learns the task, 64 images each.
    """

    side: int = 8
    width: int = 64
    depth: int = 6
    learning: int = 600


@dataclass(frozen=True)
class Found:
    """How close masks are to the two patches, over test images.

    Attributes:
        iou: mean intersection over union.
        exact: share of images where the mask is exactly right.
        agreement: share of predictions that stay the same.
        divergence: mean KL in nats.
        kept: share of patches kept.
    """

    iou: float
    exact: float
    agreement: float
    divergence: float
    kept: float


class GlyphBatches:
    """Batches of complete images, the same in every iteration.

    Args:
        task: which task.
        batches: how many.
        size: images in a batch.
        seed: decides the images.
        side: patches along an edge.
    """

    def __init__(self, task: Task, batches: int, size: int, seed: int, side: int) -> None:
        self.images = make_glyph_grids(task, batches * size, seed, side=side).images
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.split(self.images, self.size))


def learn_task(task: Task, scale: Scale, seed: int) -> tuple[nn.Module, float]:
    """A Vision Transformer that solves the task, and its accuracy on 1000 test images."""
    torch.manual_seed(seed)
    model: nn.Module = VisionTransformer(
        img_size=scale.side * PATCH,
        patch_size=PATCH,
        embed_dim=scale.width,
        depth=scale.depth,
        num_heads=4,
        num_classes=num_classes(task),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=scale.learning, pct_start=0.1)
    for step in range(scale.learning):
        batch = make_glyph_grids(task, 64, seed * 100_000 + step + 1, side=scale.side, complete=False)
        loss = F.cross_entropy(model(batch.images), batch.targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval()
    test = make_glyph_grids(task, 1000, _TEST_SEED, side=scale.side)
    with torch.no_grad():
        right = torch.cat([model(images).argmax(1) for images in torch.split(test.images, 250)]) == test.targets.argmax(
            1
        )
    return model, right.float().mean().item()


def measure(trained: TrainedGates, model: nn.Module, task: Task, side: int, *, images: int, refine: int = 0) -> Found:
    """Compares hard masks with the evidence on test images; `refine` steps of search for each image."""
    test = make_glyph_grids(task, images, _TEST_SEED + 1, side=side)
    masked = MaskedModel(adapt(model))
    masks, answers, wholes = [], [], []
    with torch.no_grad():
        for batch in torch.split(test.images, 128):
            found = masked.read(batch)
            log_kept = amortised_log_kept(trained.gates, found)
            if refine:
                log_kept = refined(
                    masked,
                    trained.gates,
                    found,
                    log_kept,
                    constraint=trained.constraint,
                    classes=found.logits.argmax(1),
                    margin=trained.margin,
                    steps=refine,
                )
            masks.append(hard_mask(log_kept))
            answers.append(masked.logits(found.images, masks[-1], trained.gates.replacement))
            wholes.append(found.logits)
    mask, answer, whole = torch.cat(masks).bool(), torch.cat(answers), torch.cat(wholes)
    overlap = (mask & test.evidence).sum(1) / (mask | test.evidence).sum(1)
    return Found(
        iou=overlap.mean().item(),
        exact=(mask == test.evidence).all(1).float().mean().item(),
        agreement=(answer.argmax(1) == whole.argmax(1)).float().mean().item(),
        divergence=divergence("distribution", whole, answer).mean().item(),
        kept=mask.float().mean().item(),
    )


def learn_masks(
    model: nn.Module, task: Task, side: int, settings: DiffMaskSettings, *, batch_size: int = 16
) -> tuple[TrainedGates, dict[str, Any]]:
    """Gates trained on fresh images of the task, and their card."""
    batches = GlyphBatches(task, settings.steps, batch_size, 10 + settings.seed, side)
    validation = GlyphBatches(task, 4, 64, 5, side)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)  # whether the constraint is met stands in the table
        output = Path(folder) / "gates.safetensors"
        card = train_diffmask(model, batches, output, settings, validation=validation)
        return load_checkpoint(output, adapt(model), torch.device("cpu"), torch.float32), card


def table(
    task: Task, seeds: int, steps: int, images: int, refined_images: int, scale: Scale, *, released: bool = False
) -> str:
    """The figures as Markdown, two rows a seed: the gates' masks, and those after the search of each image's own."""
    model, accuracy = learn_task(task, scale, seed=0)
    lines = [
        f"{task} task, {scale.side}×{scale.side} patches of which 2 are needed ({2 / scale.side**2:.1%}); model of "
        f"{scale.depth} blocks and width {scale.width}, accuracy {accuracy:.1%}. {images} test images, "
        f"{refined_images} of them where masks are refined; hard masks.",
        "",
        "| seed | mask | IoU | exact | agreement | KL | kept | best step | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed in range(seeds):
        make = DiffMaskSettings.released if released else DiffMaskSettings
        settings = make(steps=steps, seed=seed, evaluate_every=100 if steps >= 100 else steps)
        trained, card = learn_masks(model, task, scale.side, settings)
        for name, refine, count in (("gates", 0, images), ("gates, refined", 100, refined_images)):
            started = time.monotonic()
            found = measure(trained, model, task, scale.side, images=count, refine=refine)
            seconds = card["wall_seconds"] if not refine else time.monotonic() - started
            lines.append(
                f"| {seed} | {name} | {found.iou:.3f} | {found.exact:.3f} | {found.agreement:.3f} | "
                f"{found.divergence:.4f} | {found.kept:.2%} | {card['result']['step']} | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
    kind = "the published code's settings" if released else "the default settings"
    lines += ["", f"Gates trained with {kind}, {steps} steps of 16 images. Seconds: training; search on its images."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Measures, prints, and writes the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["pair", "pointer"], default="pair")
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the gates")
    parser.add_argument("--images", type=int, default=512, help="test images")
    parser.add_argument("--refined-images", type=int, default=128, help="of them, how many masks are refined")
    parser.add_argument("--learning", type=int, default=Scale.learning, help="steps in which the model learns the task")
    parser.add_argument("--released", action="store_true", help="train as the published code does")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    scale = Scale(learning=options.learning)
    counts = options.images, min(options.images, options.refined_images)
    text = table(options.task, options.seeds, options.steps, *counts, scale, released=options.released)
    text += f"\n{machine_facts('vitexplain.benchmarks.pair_task', arguments, f'{torch.get_num_threads()} threads')}\n"
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
