"""What a faithfulness metric costs beside the plain forward pass, and beside Quantus, as ratios within one run.

``VITEXPLAIN_TEST_DATA=… python -m vitexplain.benchmarks.metric_cost --output benchmarks/results``

All candidates run in turn, as in `speed`. The plain forward is that of the same images in one batch, without a graph;
a curve of n points over B images is n·B images to the model, so n forwards are the least it can cost. Quantus runs its
pixel flipping on the same images, maps and steps.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from vitexplain.files import write_whole
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.metric import Metric, MetricBatch
from vitexplain.metrics.predictor import Predictor
from vitexplain.render import upsample

from .measuring import FORWARD, Run, forward, load_vit, machine_facts, markdown_table, random_images, verdict
from .speed import Times, interleaved, quartiles

LIMITS = {
    "positive_perturbation": 12.0,
    "negative_perturbation": 12.0,
    "insertion": 37.0,
    "deletion": 37.0,
    "diffmask_positive_perturbation": 37.0,
    "diffmask_negative_perturbation": 37.0,
}
"""Metric → how many forwards' time it may take."""

OTHERS = ("saco", "token_dropping")

QUANTUS_STEPS = 24
"""Steps from no pixel to all: Quantus takes only steps that divide the pixels of one channel."""
QUANTUS, SAME_WORK = "Quantus PixelFlipping", "deletion, the same steps"

_MODULE = "vitexplain.benchmarks.metric_cost"
_MODEL = "vit_tiny_patch16_224"


def candidates(model: nn.Module, images: Tensor, batch_size: int) -> dict[str, Run]:
    """The plain forward, the metrics, and Quantus, ready to run on the same images and made-up maps."""
    predictor = Predictor.of(model, batch_size)
    grid = predictor.adapter.grid((images.shape[-2], images.shape[-1]))
    scores = torch.rand(len(images), *grid, generator=torch.Generator().manual_seed(1))
    targets = predictor.logits(images).argmax(1)
    batch = MetricBatch(scores, targets=targets, inputs=images, predictor=predictor, labels=targets)

    def measured(metric: Metric) -> Run:
        return lambda: metric.measure(batch)

    runs: dict[str, Run] = {FORWARD: lambda: forward(model, images)}
    runs |= {name: measured(create_metric(name)) for name in (*LIMITS, *OTHERS)}
    runs[SAME_WORK] = measured(create_metric("deletion", steps=QUANTUS_STEPS, order="nearest"))
    runs[QUANTUS] = pixel_flipping(model, batch)
    return runs


def pixel_flipping(model: nn.Module, batch: MetricBatch) -> Run:
    """Quantus' pixel flipping with the mean colour, all pixels in `QUANTUS_STEPS` steps."""
    quantus = importlib.import_module("quantus")  # typed in parts
    inputs, targets = cast("Tensor", batch.inputs), cast("Tensor", batch.targets)
    flipping = quantus.PixelFlipping(
        features_in_step=inputs[0].numel() // QUANTUS_STEPS,
        perturb_baseline=0.0,
        normalise=False,
        disable_warnings=True,
    )
    arrays = {
        "x_batch": inputs.numpy(),
        "y_batch": targets.numpy(),
        "a_batch": upsample(batch.scores, (inputs.shape[-2], inputs.shape[-1]), "nearest")[:, None].numpy(),
    }
    return lambda: flipping(model=model, device="cpu", softmax=True, channel_first=True, **arrays)


def report(times: Mapping[str, Times], batch: int, weights: str, facts: str) -> str:
    """The figures and the verdicts as Markdown."""
    plain = times[FORWARD]
    lines = []
    for name, own in times.items():
        cpu, wall = quartiles(own.cpu, plain.cpu), quartiles(own.wall, plain.wall)
        limit = LIMITS.get(name)
        lines.append(
            [
                name,
                f"{1000 * np.median(own.wall):.0f}",
                f"{cpu[1]:.2f} [{cpu[0]:.2f}, {cpu[2]:.2f}]",
                f"{wall[1]:.2f} [{wall[0]:.2f}, {wall[2]:.2f}]",
                "" if limit is None else f"{limit:g}",
            ]
        )
    sentences = [
        verdict(
            f"`{name}` takes at most {limit:g} forwards' time",
            {_MODEL: quartiles(times[name].cpu, plain.cpu)[1]},
            limit,
        )
        for name, limit in LIMITS.items()
        if name in times
    ]
    if QUANTUS in times:
        low, median, high = quartiles(times[QUANTUS].cpu, times[SAME_WORK].cpu)
        sentences.append(
            f"{QUANTUS} takes {median:.2f} [{low:.2f}, {high:.2f}] times as long as `deletion` with the same "
            f"{QUANTUS_STEPS} steps."
        )
    return "\n".join(
        [
            "# Time of a metric\n",
            f"{_MODEL}, {weights} weights, float32, batch {batch}, time of the whole call for the whole batch. Ratios "
            f"are taken to the plain forward of the same batch within each of {len(plain.cpu)} interleaved rounds: "
            "median [quartiles]. Targets are met by the median ratio of CPU time.\n",
            *(f"- {sentence}" for sentence in sentences),
            "",
            markdown_table(["computation", "wall ms", "× CPU time", "× wall time", "at most"], lines),
            "",
            facts,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes metric_cost.md where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images measured at a time")
    parser.add_argument("--forward-batch", type=int, default=64, help="images in one forward of a metric")
    parser.add_argument("--rounds", type=int, default=5, help="how often each candidate is timed")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    parser.add_argument("--only", nargs="+", help="metrics to time; all by default")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if min(options.batch, options.forward_batch, options.rounds, options.threads) < 1:
        parser.error("found a number below 1, expected whole numbers >= 1")
    data = os.environ.get("VITEXPLAIN_TEST_DATA")
    before, load = torch.get_num_threads(), os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    try:
        model, weights = load_vit(_MODEL, 224, None if data is None else Path(data))
        runs = candidates(model, random_images(options.batch, 224), options.forward_batch)
        if unknown := sorted(set(options.only or ()) - set(runs)):
            parser.error(f"unknown computations {unknown}; there are {', '.join(runs)}")
        chosen = {name: run for name, run in runs.items() if name == FORWARD or name in (options.only or runs)}
        times = interleaved(chosen, options.rounds, "metrics")
    finally:
        torch.set_num_threads(before)
    busy = f"{options.threads} thread(s), load average {load:.1f} to {os.getloadavg()[0]:.1f}"
    text = report(times, options.batch, weights, machine_facts(_MODULE, given, busy))
    print(text)
    if options.output:
        write_whole(options.output / "metric_cost.md", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
