"""What reading, writing and drawing cost an export, beside the explanations alone.

``python -m vitexplain.benchmarks.export_throughput --data FOLDER --checkpoint FILE --output benchmarks/results``

In each round, the same number of images goes through an export of scores and through one with overlays. Before and
after each, the same methods explain tensors that are in memory already, with the same batch size and threads; the mean
of the two is what the export is compared with, so that a machine that is busy for a while slows both. Loading the
model is left out, and so are the imports that the first export of a process makes; everything else that an export
does, from listing its inputs to its last shard, is in.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vitexplain import create_method, explain_with, export_heatmaps, load_model
from vitexplain.files import write_whole
from vitexplain.method import Method
from vitexplain.models.loading import LoadedModel

from .export_images import repeat_images, shown
from .measuring import machine_facts, markdown_table

TARGETS = {"none": 0.90, "overlay": 0.75}
"""View → the least rate, as a share of that of the explanations alone."""

_MODULE = "vitexplain.benchmarks.export_throughput"


@dataclass(frozen=True)
class Cost:
    """Milliseconds an image.

    Attributes:
        wall: on the clock.
        cpu: CPU time of the process, all threads together.
    """

    wall: float
    cpu: float


def timed(run: Callable[[], object], images: int) -> Cost:
    """What a run costs an image."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Cost(1000 * wall / images, 1000 * cpu / images)


def measure(
    model: LoadedModel,
    methods: Sequence[Method],
    files: Sequence[Path],
    *,
    view: str,
    batch: int,
    workers: int,
    folder: Path,
) -> tuple[Cost, Cost]:
    """The cost of an export, and that of the explanations alone around it."""
    batches = [
        torch.stack([model.preprocessing(file) for file in files[start : start + batch]])
        for start in range(0, min(4 * batch, len(files)), batch)
    ]
    repeats = max(1, len(files) // (8 * batch))

    def in_memory() -> None:
        for number in range(repeats):
            explain_with(methods, model.subject, batches[number % len(batches)])

    in_memory()
    before = timed(in_memory, repeats * batch)
    export = timed(
        lambda: export_heatmaps(
            list(files), folder, model=model, methods=methods, view=view, batch_size=batch, workers=workers
        ),
        len(files),
    )
    after = timed(in_memory, repeats * batch)
    return export, Cost((before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2)


def report(costs: dict[str, list[tuple[Cost, Cost]]], images: int, batch: int, facts: str) -> str:
    """Costs, rates and verdicts as Markdown."""
    rows, sentences = [], []
    for view, rounds in costs.items():
        wall = [alone.wall / export.wall for export, alone in rounds]
        cpu = [alone.cpu / export.cpu for export, alone in rounds]
        exported, alone = (float(np.median([pair[side].wall for pair in rounds])) for side in (0, 1))
        rows.append(
            [
                "scores" if view == "none" else f"scores and {view}s",
                f"{alone:.1f}",
                f"{exported:.1f}",
                f"{np.median(wall):.3f} [{min(wall):.3f}, {max(wall):.3f}]",
                f"{np.median(cpu):.3f} [{min(cpu):.3f}, {max(cpu):.3f}]",
                f"{TARGETS[view]:g}",
            ]
        )
        met = "met" if float(np.median(wall)) >= TARGETS[view] else "not met"
        sentences.append(f"- {rows[-1][0]}: at least {TARGETS[view]:.0%} of the rate: **{met}**, {np.median(wall):.1%}")
    header = ["export of", "alone, ms an image", "export, ms an image", "rate, of wall time", "of CPU time", "at least"]
    return "\n".join(
        [
            "# Rate of an export\n",
            f"{images} photographs a round, {max(map(len, costs.values()))} rounds, rollout and tokentm with one "
            f"shared capture, batches of {batch}. The rate is that of the export divided by that of the explanations "
            "alone, on tensors in memory, measured before and after each export: median [lowest, highest] over the "
            "rounds.\n",
            *sentences,
            "",
            markdown_table(header, rows),
            "",
            facts,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes export_throughput.md where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with photographs")
    parser.add_argument("--model", default="timm:vit_tiny_patch16_224", help="model to explain")
    parser.add_argument("--checkpoint", type=Path, help="weights of the model")
    parser.add_argument("--images", type=int, default=1000, help="photographs a round")
    parser.add_argument("--rounds", type=int, default=5, help="how often each export is made")
    parser.add_argument("--batch", type=int, default=32, help="images at a time")
    parser.add_argument("--workers", type=int, default=2, help="threads that read and draw")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    model = load_model(options.model, checkpoint=options.checkpoint)
    methods = [create_method("rollout"), create_method("tokentm")]
    costs: dict[str, list[tuple[Cost, Cost]]] = {view: [] for view in TARGETS}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as scratch:
        files = repeat_images(options.data, Path(scratch, "images"), options.images)
        export_heatmaps(list(files[: options.batch]), Path(scratch, "first"), model=model, methods=methods)
        for number in range(options.rounds):
            for view, measured in costs.items():
                folder = Path(scratch, f"{view}-{number}")
                measured.append(
                    measure(
                        model,
                        methods,
                        files,
                        view=view,
                        batch=options.batch,
                        workers=options.workers,
                        folder=folder,
                    )
                )
                load.append(os.getloadavg()[0])
                export, alone = measured[-1]
                print(f"round {number}, {view}: {export} beside {alone}", flush=True)
    busy = f"{options.threads} threads of torch, load average {min(load):.1f} to {max(load):.1f} during the run"
    text = report(costs, options.images, options.batch, machine_facts(_MODULE, shown(given), busy))
    print(text)
    if options.output:
        write_whole(options.output / "export_throughput.md", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
