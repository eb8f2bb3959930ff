"""What an explanation costs beside the plain passes, as ratios within one run.

``python -m vitexplain.benchmarks.speed --output benchmarks/results``

All candidates run in turn, round after round, so that a busy machine slows them alike. Each ratio is taken within a
round; the median over the rounds is given with the quartiles. CPU time of the process is the figure that
counts: unlike wall time it hardly sees what else the machine does.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitexplain.files import write_whole
from vitexplain.metrics.batches import InformedPredictor
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.predictor import Predictor

from .measuring import (
    FORWARD,
    FORWARD_BACKWARD,
    Run,
    candidate,
    known_methods,
    machine_facts,
    markdown_table,
    random_images,
    random_vit,
    verdict,
)

LEGRAD, CURVES = "legrad, 12 blocks", "perturbation curves"

TARGETS: dict[str, tuple[str, float | None]] = {
    "rollout": (FORWARD, 1.15),
    "gradcam": (FORWARD, 1.2),
    LEGRAD: (FORWARD, None),
    "generic_attention": (FORWARD_BACKWARD, 1.2),
    "tokentm": (FORWARD_BACKWARD, 1.2),
    "contributions": (FORWARD_BACKWARD, 1.2),
    "attcat": (FORWARD_BACKWARD, None),
    "gradient_rollout": (FORWARD_BACKWARD, None),
    "transformer_attribution": (FORWARD_BACKWARD, None),
    CURVES: (FORWARD, None),
}
"""Computation → what it is compared with, and how many times that it may take on any model; None where not asked."""

BASE = "vit_base_patch16_224"
BASE_LIMITS = {
    "rollout": 1.1,
    "gradcam": 1.15,
    LEGRAD: 1.25,
    "generic_attention": 1.15,
    "tokentm": 1.15,
    "attcat": 1.15,
    "gradient_rollout": 1.15,
    "transformer_attribution": 4.0,
    CURVES: 19.0,
}
"""How many times it may take on a large model, where little of the time goes to calls."""

_MODULE = "vitexplain.benchmarks.speed"


@dataclass(frozen=True)
class Times:
    """Seconds of one candidate, one entry a round.

    Attributes:
        cpu: CPU time of the process, all threads together.
        wall: time on the clock.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def interleaved(runs: Mapping[str, Run], rounds: int, progress: str = "", *, warm: bool = True) -> dict[str, Times]:
    """Times every run once a round, the rounds beginning in other places, and every other one going backwards.

    What ran before a run leaves the machine's caches and memory as it does: so no run always follows the same one, and
    of three or more none follows itself.

    Args:
        runs: by name.
        rounds: how many count.
        progress: what the bar is called; no bar without.
        warm: whether a round goes before that does not count.
    """
    times: dict[str, Times] = {name: Times() for name in runs}
    names = list(runs)
    for index in tqdm(
        range(-1 if warm else 0, rounds), desc=progress, unit="round", disable=None if progress else True
    ):
        # backwards from the other half, or a round would begin with what the last one ended with
        first, step = (index // 2 + len(names) // 2, -1) if index % 2 else (index // 2, 1)
        for name in (names[(first + step * place) % len(names)] for place in range(len(names))):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if index >= 0:
                times[name].cpu.append(cpu)
                times[name].wall.append(wall)
    return times


def quartiles(own: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios within the rounds: (lower quartile, median, upper quartile)."""
    low, median, high = np.quantile(np.array(own) / np.array(reference), [0.25, 0.5, 0.75]).tolist()
    return low, median, high


def computation(name: str, model: nn.Module, images: Tensor) -> Run:
    """A candidate, LeGrad on twelve blocks as the classifier reads them, or nine-step curves in both directions."""
    if name == LEGRAD:
        return candidate("legrad", model, images, layers=12, pooling="head")
    return perturbation_curves(model, images) if name == CURVES else candidate(name, model, images)


def perturbation_curves(model: nn.Module, images: Tensor) -> Run:
    """Positive and negative perturbation on made-up maps; what the model says of the unchanged images is known."""
    predictor = Predictor.of(model)
    maps = torch.rand(len(images), *predictor.adapter.grid(_sides(images)), generator=torch.Generator().manual_seed(1))
    metrics = [create_metric(f"{direction}_perturbation") for direction in ("positive", "negative")]

    def run() -> object:
        clean = predictor.logits(images)
        informed = InformedPredictor(predictor.adapter, predictor.preprocessing, inputs=images, clean=clean)
        batch = MetricBatch(maps, targets=clean.argmax(1), inputs=images, predictor=informed)
        return [metric.measure(batch) for metric in metrics]

    return run


def _sides(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return height, width


def measure(
    model_name: str, methods: Sequence[str], *, size: int, batch: int, rounds: int, threads: int
) -> dict[str, Times]:
    """Times the plain passes and the methods on one model with a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, images = random_vit(model_name, size), random_images(batch, size)
        runs = {name: computation(name, model, images) for name in [FORWARD, FORWARD_BACKWARD, *methods]}
        return interleaved(runs, rounds, f"{model_name}, {threads} threads")
    finally:
        torch.set_num_threads(before)


def rows(model_name: str, threads: int, times: Mapping[str, Times]) -> list[list[str]]:
    """The lines of the table for one model and number of threads."""
    lines = []
    for name, own in times.items():
        reference, limit = TARGETS.get(name, (FORWARD, None))
        limit = BASE_LIMITS.get(name) if model_name == BASE else limit
        cpu = quartiles(own.cpu, times[reference].cpu)
        wall = quartiles(own.wall, times[reference].wall)
        lines.append(
            [
                name,
                model_name,
                str(threads),
                f"{1000 * np.median(own.cpu):.0f}",
                f"{1000 * np.median(own.wall):.0f}",
                reference,
                f"{cpu[1]:.3f} [{cpu[0]:.3f}, {cpu[2]:.3f}]",
                f"{wall[1]:.3f} [{wall[0]:.3f}, {wall[2]:.3f}]",
                "" if limit is None else f"{limit:g}",
            ]
        )
    return lines


def verdicts(results: Mapping[tuple[str, int], Mapping[str, Times]], threads: int) -> list[str]:
    """One sentence a target, on the median ratio of CPU time with this number of threads."""
    sentences = []
    places = {model: times for (model, count), times in results.items() if count == threads}
    limits = [(places, {name: limit for name, (_, limit) in TARGETS.items() if limit is not None})]
    limits.append(({model: times for model, times in places.items() if model == BASE}, BASE_LIMITS))
    for measured, asked in limits:
        for name, limit in asked.items():
            reference, _ = TARGETS[name]
            found: dict[str, float | None] = {
                model: quartiles(times[name].cpu, times[reference].cpu)[1]
                for model, times in measured.items()
                if name in times
            }
            if found:
                sentences.append(verdict(f"`{name}` takes at most {limit:g}× {reference}", found, limit))
    return sentences


def report(results: Mapping[tuple[str, int], Mapping[str, Times]], size: int, batch: int, facts: str) -> str:
    """The figures and the verdicts as Markdown."""
    first = min(threads for _, threads in results)
    rounds = min(len(own.cpu) for times in results.values() for own in times.values())
    header = ["computation", "model", "threads", "CPU ms", "wall ms", "compared with", "× CPU time", "× wall time"]
    lines = [line for (model, threads), times in results.items() for line in rows(model, threads, times)]
    return "\n".join(
        [
            "# Time of an explanation\n",
            f"Batch {batch} at {size} pixels, random weights, float32, time of the whole call for the whole batch. "
            f"Ratios are taken within each of {rounds} interleaved rounds: median [quartiles]. `{FORWARD}` has no "
            f"graph; `{FORWARD_BACKWARD}` has frozen weights and the gradient at the first block's input.\n",
            f"Targets, on the median ratio of CPU time with {first} thread{'s' if first > 1 else ''}:\n",
            *(f"- {sentence}" for sentence in verdicts(results, first)),
            "",
            markdown_table([*header, "at most"], lines),
            "",
            facts,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes speed.md where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    parser.add_argument("--models", nargs="+", default=models, help="timm Vision Transformers with a CLS token")
    parser.add_argument("--methods", nargs="+", default=list(TARGETS), help="explanation methods")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--rounds", type=int, default=15, help="how often each candidate is timed")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads; 1 and torch's choice by default")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.rounds < 1 or min(options.threads or [1]) < 1:
        parser.error("found --rounds or --threads below 1, expected whole numbers >= 1")
    known_methods([name for name in options.methods if name not in TARGETS])
    methods, counts = options.methods, options.threads or [1, torch.get_num_threads()]
    results = {}
    load = [os.getloadavg()[0]]
    for model in options.models:
        for threads in sorted(set(counts)):
            results[model, threads] = measure(
                model, methods, size=options.size, batch=options.batch, rounds=options.rounds, threads=threads
            )
            load.append(os.getloadavg()[0])
    busy = f"load average {min(load):.1f} to {max(load):.1f} during the run, which itself adds up to {max(counts)}"
    text = report(results, options.size, options.batch, machine_facts(_MODULE, given, busy))
    print(text)
    if options.output:
        write_whole(options.output / "speed.md", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
