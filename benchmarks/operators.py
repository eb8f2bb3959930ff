"""Which operators an explanation's time goes to, beside those of the plain passes.

``python -m vitexplain.benchmarks.operators --output benchmarks/results``

torch's profiler gives each operator's own time in one call, after one that does not count. Under the profiler every
call is dearer, so the shares are for finding what dominates, and the ratios of `speed` for saying what it costs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from vitexplain.files import write_whole

from .measuring import (
    FORWARD,
    FORWARD_BACKWARD,
    Run,
    known_methods,
    machine_facts,
    markdown_table,
    random_images,
    random_vit,
)
from .speed import BASE, TARGETS, computation

_MODULE = "vitexplain.benchmarks.operators"
_SHOWN = 6


def profiled(run: Run) -> tuple[float, dict[str, float]]:
    """CPU seconds of one call under the profiler, and each operator's share of the time of all, the largest first."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        before = time.process_time()
        run()
        whole = time.process_time() - before
    own = {each.key: each.self_cpu_time_total for each in profiler.key_averages() if each.key.startswith("aten::")}
    total = sum(own.values())
    shares = {name.removeprefix("aten::"): part / total for name, part in own.items()}
    return whole, dict(sorted(shares.items(), key=lambda each: -each[1]))


def row(name: str, whole: float, shares: dict[str, float]) -> list[str]:
    """A line of the table, with the largest operators."""
    shown = [f"{operator} {share:.0%}" for operator, share in list(shares.items())[:_SHOWN]]
    return [name, f"{1000 * whole:.0f}", ", ".join(shown)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes operators.md where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BASE, help="a timm Vision Transformer with a CLS token")
    parser.add_argument("--methods", nargs="+", default=list(TARGETS), help="methods, or computations of `speed`")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    known_methods([name for name in options.methods if name not in TARGETS])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, images = random_vit(options.model, options.size), random_images(options.batch, options.size)
        names = [FORWARD, FORWARD_BACKWARD, *options.methods]
        rows = [row(name, *profiled(computation(name, model, images))) for name in names]
    finally:
        torch.set_num_threads(before)
    text = "\n".join(
        [
            "# Where the time goes\n",
            f"{options.model}, batch {options.batch} at {options.size} pixels, random weights, float32. CPU time of "
            "one call under torch's profiler, and the operators with the largest shares of the time of all.\n",
            markdown_table(["computation", "CPU ms", "largest operators"], rows),
            "",
            machine_facts(_MODULE, given, "1 thread"),
            "",
        ]
    )
    print(text)
    if options.output:
        write_whole(options.output / "operators.md", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
