"""What several methods cost together beside the dearest of them alone, as ratios within one run.

``python -m vitexplain.benchmarks.compare_cost --output benchmarks/results``

All candidates run in turn, round after round, as in `speed`; each ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from vitexplain import ExplanationWarning, compare
from vitexplain.files import write_whole

from .measuring import (
    FORWARD,
    Run,
    candidate,
    known_methods,
    machine_facts,
    markdown_table,
    random_images,
    random_vit,
    verdict,
)
from .speed import Times, interleaved, quartiles

METHODS = ("raw_attention", "rollout", "gradcam", "attention_gradcam", "generic_attention", "tokentm")
"""Six methods that read attention and gradients."""

TOGETHER = "all together"
LIMIT = 1.6
"""How many times the dearest method all together may take."""

_MODULE = "vitexplain.benchmarks.compare_cost"


def measure(model_name: str, methods: Sequence[str], *, size: int, batch: int, rounds: int) -> dict[str, Times]:
    """Times each method alone and all of them in one comparison, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, images = random_vit(model_name, size), random_images(batch, size)

        def together() -> object:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExplanationWarning)  # a constant map: the weights are random
                return compare(model, images, list(methods), targets=0)

        runs: dict[str, Run] = {name: candidate(name, model, images) for name in (FORWARD, *methods)}
        return interleaved({**runs, TOGETHER: together}, rounds, model_name)
    finally:
        torch.set_num_threads(before)


def dearest(times: Mapping[str, Times], methods: Sequence[str]) -> str:
    """The method with the largest median of CPU time."""
    return max(methods, key=lambda name: float(np.median(times[name].cpu)))


def report(model_name: str, times: Mapping[str, Times], methods: Sequence[str], facts: str) -> str:
    """The figures and the verdict as Markdown."""
    single = dearest(times, methods)
    lines = []
    for name, own in times.items():
        low, ratio, high = quartiles(own.cpu, times[single].cpu)
        lines.append([name, f"{1000 * np.median(own.cpu):.0f}", f"{ratio:.3f} [{low:.3f}, {high:.3f}]"])
    found: dict[str, float | None] = {model_name: quartiles(times[TOGETHER].cpu, times[single].cpu)[1]}
    claim = f"{len(methods)} methods together take at most {LIMIT:g}× the dearest alone (`{single}`)"
    return "\n".join(
        [
            "# Several methods, one capture\n",
            "Time of the whole call for the whole batch, random weights, float32, one thread. Ratios are taken within "
            f"each of {len(times[single].cpu)} interleaved rounds: median [quartiles].\n",
            f"- {verdict(claim, found, LIMIT)}",
            "",
            markdown_table(["computation", "CPU ms", f"× `{single}`"], lines),
            "",
            facts,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes compare_cost.md where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm Vision Transformer with a CLS token")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="explanation methods")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--rounds", type=int, default=11, help="how often each candidate is timed")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.rounds < 1:
        parser.error("found --rounds below 1, expected a whole number >= 1")
    methods = known_methods(options.methods)
    load = os.getloadavg()[0]
    times = measure(options.model, methods, size=options.size, batch=options.batch, rounds=options.rounds)
    busy = f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after the run, which itself adds 1"
    text = report(options.model, times, methods, machine_facts(_MODULE, given, busy))
    print(text)
    if options.output:
        write_whole(options.output / "compare_cost.md", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
