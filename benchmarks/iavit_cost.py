"""What a map of IA-ViT costs beside the model's plain forward pass, as ratios within one run.

``python -m vitexplain.benchmarks.iavit_cost --output benchmarks/results/iavit_cost.md``

The interpreter has random weights, which cost what trained ones do. Timing is that of `vitexplain.benchmarks.speed`:
in turn, round after round, CPU time, the median of the ratios.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from vitexplain import adapt, get_explainer
from vitexplain.files import write_whole
from vitexplain.iavit import InterpreterShape, save_checkpoint
from vitexplain.iavit.interpreter import fresh_interpreter

from .measuring import FORWARD, candidate, machine_facts, markdown_table, random_images, random_vit, verdict
from .speed import interleaved, quartiles

LIMIT = 1.1
"""How many plain forward passes a map may take."""


def ratios(architecture: str, batch: int, rounds: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of a map's CPU time over that of the plain forward pass.

    Args:
        architecture: timm's name, at 224 pixels.
        batch: images at a time.
        rounds: how often both are timed.
    """
    model, images = random_vit(architecture, 224), random_images(batch, 224)
    adapter = adapt(model)
    width = int(model.get_parameter("cls_token").shape[-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "interpreter.safetensors"
        save_checkpoint(path, fresh_interpreter(InterpreterShape(width, 1000), 0), adapter, with_model=False)
        explainer = get_explainer("iavit", adapter, checkpoint=str(path))
        runs = {FORWARD: candidate(FORWARD, model, images), "iavit": lambda: explainer(images, 0)}
        times = interleaved(runs, rounds)
    return quartiles(times["iavit"].cpu, times[FORWARD].cpu)


def main(arguments: list[str]) -> None:
    """Measures, prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit_tiny_patch16_224,vit_small_patch16_224", help="with commas between")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {name: ratios(name, options.batch, options.rounds) for name in options.models.split(",")}
    rows = [[name, *(f"{value:.3f}" for value in quartile)] for name, quartile in found.items()]
    claim = f"A map of `iavit` takes at most {LIMIT} forward passes, batch {options.batch}"
    parts = [
        "# What a map of IA-ViT costs",
        markdown_table(["model", "lower quartile", "median", "upper quartile"], rows),
        verdict(claim, {name: median for name, (_, median, _) in found.items()}, LIMIT),
        machine_facts("vitexplain.benchmarks.iavit_cost", arguments, "1 thread"),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
