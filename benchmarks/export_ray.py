"""What a second worker of the Ray engine brings: two on two cores beside one on one core, one thread each.

``python -m vitexplain.benchmarks.export_ray --data FOLDER --checkpoint FILE --output benchmarks/results``

In each round both export the same shards. The rate counts from the first finished shard to the last, so that starting
Ray and loading the model in the workers are left out. The scores of both are compared with those of the local engine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vitexplain import create_method, load_model
from vitexplain.export.entries import Entry
from vitexplain.export.pipeline import Pipeline, ShardTask
from vitexplain.export.ray_engine import run_on_ray
from vitexplain.export.settings import ExportSettings
from vitexplain.export.shard import ShardResult
from vitexplain.files import write_whole

from .export_images import repeat_images, shown
from .measuring import machine_facts

LIMIT = 1.5
"""How many times the rate of one worker two are to have."""

_SHARD = 16
_MODULE = "vitexplain.benchmarks.export_ray"


def run(pipeline: Pipeline, tasks: Sequence[ShardTask], workers: int) -> tuple[float, dict[int, ShardResult]]:
    """Images a second of so many workers on as many cores, and the results by shard."""
    import ray

    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        done: list[tuple[float, int]] = []
        results = {each.index: each for each in run_on_ray(pipeline, tasks, lambda n: done.append((time.time(), n)))}
    finally:
        ray.shutdown()
    return sum(images for _, images in done[1:]) / (done[-1][0] - done[0][0]), results


def difference(first: dict[int, ShardResult], second: dict[int, ShardResult]) -> float:
    """The largest difference between scores."""
    return max(
        float(np.nanmax(np.abs(first[shard].scores[method] - second[shard].scores[method])))
        for shard in first
        for method in first[shard].scores
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes export_ray.md where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with photographs")
    parser.add_argument("--model", default="timm:vit_tiny_patch16_224", help="model to explain")
    parser.add_argument("--checkpoint", type=Path, help="weights of the model")
    parser.add_argument("--shards", type=int, default=24, help="how many shards of 16 photographs")
    parser.add_argument("--rounds", type=int, default=3, help="how often each number of workers is timed")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    torch.set_num_threads(1)
    model = load_model(options.model, checkpoint=options.checkpoint)
    pipeline = Pipeline(
        model,
        {name: create_method(name) for name in ("rollout", "tokentm")},
        ExportSettings(engine="ray", batch_size=_SHARD, shard_size=_SHARD),
    )
    ratios, load = list[float](), [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as scratch:
        entries = [
            Entry(str(each), str(each)) for each in repeat_images(options.data, Path(scratch), 16 * options.shards)
        ]
        starts = range(0, len(entries), 16)
        tasks = [ShardTask.whole(index, start, entries[start : start + 16]) for index, start in enumerate(starts)]
        local = {each.index: each for each in pipeline.run(tasks)}
        largest = 0.0
        for number in range(options.rounds):
            rates = {}
            for workers in (1, 2) if number % 2 else (2, 1):
                rates[workers], results = run(pipeline, tasks, workers)
                largest = max(largest, difference(local, results))
            ratios.append(rates[2] / rates[1])
            load.append(os.getloadavg()[0])
            print(f"round {number}: {rates}", flush=True)
    busy = f"one thread a worker, load average {min(load):.1f} to {max(load):.1f} during the run"
    met = "met" if float(np.median(ratios)) >= LIMIT else "not met"
    text = "\n".join(
        [
            "# Two workers beside one\n",
            f"{options.shards} shards of {_SHARD} photographs, rollout and tokentm. Rate of two workers divided by "
            f"that of one, {options.rounds} rounds: median {np.median(ratios):.2f} [{min(ratios):.2f}, "
            f"{max(ratios):.2f}]; at least {LIMIT:g} asked: **{met}**.\n",
            f"Largest difference between scores and those of the local engine: {largest:.1e}.\n",
            machine_facts(_MODULE, shown(given), busy),
            "",
        ]
    )
    print(text)
    if options.output:
        write_whole(options.output / "export_ray.md", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
