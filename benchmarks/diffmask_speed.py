"""What a Vision DiffMask explanation costs beside the plain forward pass, gates of the paper's size.

``python -m vitexplain.benchmarks.diffmask_speed --output benchmarks/results/diffmask_speed.md``

Measured like the other methods in `vitexplain.benchmarks.speed`. Weights of models and gates are random, which costs
what trained ones cost.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vitexplain import Explainer, adapt, create_method
from vitexplain.diffmask.calibration import fresh_gates
from vitexplain.diffmask.checkpoint import save_checkpoint
from vitexplain.diffmask.gates import GateShape
from vitexplain.diffmask.masking import MaskedModel
from vitexplain.files import write_whole

from .measuring import FORWARD, candidate, machine_facts, markdown_table, random_images, random_vit, verdict
from .speed import Times, interleaved, quartiles

LIMIT = 1.25
"""How many times the plain forward pass an explanation may take."""

_METHOD = "diffmask"


def save_random_gates(model: nn.Module, path: Path, size: int) -> None:
    """Writes gates as training starts them."""
    masked = MaskedModel(adapt(model))
    states = masked.read(random_images(1, size)).states
    width = states[0].shape[2]
    gates = fresh_gates(GateShape(width=width, depths=len(states), hidden=width // 4), states[0], seed=0)
    save_checkpoint(path, gates, masked.adapter, num_classes=1000)


def measure(model_name: str, *, size: int, batch: int, rounds: int) -> dict[str, Times]:
    """Times the plain forward pass and the explanation in turn."""
    model, images = random_vit(model_name, size), random_images(batch, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gates.safetensors"
        save_random_gates(model, path, size)
        explainer = Explainer(create_method(_METHOD, checkpoint=str(path)), model)
        runs = {FORWARD: candidate(FORWARD, model, images), _METHOD: lambda: explainer(images)}
        return interleaved(runs, rounds, model_name)


def report(models: Sequence[str], size: int, batch: int, rounds: int) -> str:
    """The figures as Markdown."""
    lines, found = [], {}
    for name in models:
        times = measure(name, size=size, batch=batch, rounds=rounds)
        plain, own = times[FORWARD], times[_METHOD]
        low, median, high = quartiles(own.cpu, plain.cpu)
        found[name] = median
        milliseconds = [f"{1000 * sorted(each.cpu)[rounds // 2]:.0f}" for each in (plain, own)]
        lines.append([name, *milliseconds, f"{median:.3f} [{low:.3f}, {high:.3f}]"])
    claim = verdict(f"`{_METHOD}` takes at most {LIMIT:g}× {FORWARD}", dict(found), LIMIT)
    return (
        f"# Time of a Vision DiffMask explanation\n\nBatch {batch} at {size} pixels, random weights, float32, CPU time "
        f"of the whole call for the whole batch. Ratios are taken within each of {rounds} interleaved rounds: median "
        f"[quartiles].\n\n- {claim}\n\n"
        f"{markdown_table(['model', 'forward ms', 'explanation ms', '× forward'], lines)}\n"
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints, and writes the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    parser.add_argument("--models", nargs="+", default=models, help="timm Vision Transformers")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a busy machine shares out further ones unevenly
    text = report(options.models, options.size, options.batch, options.rounds)
    busy = f"1 thread, load average {os.getloadavg()[0]:.1f}"
    text += f"\n{machine_facts('vitexplain.benchmarks.diffmask_speed', arguments, busy)}\n"
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
