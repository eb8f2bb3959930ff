"""How the time of an explanation grows with tokens, batch, targets and methods: log-log plots and fitted exponents.

``python -m vitexplain.benchmarks.scaling --output benchmarks/results``

Along each axis everything else stays as it is, and all points run in turn, round after round, as in `speed`. The
exponent is the slope of a line through the medians, both axes logarithmic: 1 is proportional, 2 is quadratic. The last
slope is that between the two largest values, where fixed costs count least.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from vitexplain import ExplanationWarning, compare, get_explainer
from vitexplain.files import write_whole

from .compare_cost import METHODS
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
)
from .speed import interleaved, quartiles

_MODULE = "vitexplain.benchmarks.scaling"
SIZE = 224
"""Image side in pixels along the axes other than tokens."""
TOGETHER = "methods from one capture"


@dataclass(frozen=True)
class Curve:
    """CPU time of one computation along one axis.

    Attributes:
        axis: one of `AXES`.
        computation: what was timed.
        values: along the axis, rising.
        seconds: lower quartile, median and upper quartile at each.
    """

    axis: str
    computation: str
    values: tuple[int, ...]
    seconds: tuple[tuple[float, float, float], ...]

    @property
    def medians(self) -> list[float]:
        """Median seconds at each value."""
        return [median for _, median, _ in self.seconds]

    def exponent(self, last: int = 0) -> float:
        """Slope of a line through the logarithms of the last points; of all by default. NaN of a single one."""
        values, medians = self.values[-last:], self.medians[-last:]
        return float(np.polyfit(np.log(values), np.log(medians), 1)[0]) if len(values) > 1 else float("nan")


Runs = dict[tuple[str, int], Run]
"""(computation, value on the axis) → ready to run."""


def token_runs(model_name: str, methods: Sequence[str], values: Sequence[int]) -> Runs:
    """One image with ever more patches; values are image sides in pixels, keys are numbers of patches."""
    runs: Runs = {}
    for size in values:
        model: Any = random_vit(model_name, size)
        images = random_images(1, size)
        patches = int(model.patch_embed.num_patches)
        runs |= {(name, patches): candidate(name, model, images) for name in (FORWARD, FORWARD_BACKWARD, *methods)}
    return runs


def batch_runs(model_name: str, methods: Sequence[str], values: Sequence[int]) -> Runs:
    """Ever more images in one call."""
    model = random_vit(model_name, SIZE)
    names = (FORWARD, FORWARD_BACKWARD, *methods)
    return {(name, batch): candidate(name, model, random_images(batch, SIZE)) for batch in values for name in names}


def target_runs(model_name: str, methods: Sequence[str], values: Sequence[int]) -> Runs:
    """One image, ever more classes of it in one call."""
    model, image = random_vit(model_name, SIZE), random_images(1, SIZE)

    def explain(name: str, count: int) -> Run:
        explainer = get_explainer(name, model)
        return lambda: explainer(image, torch.arange(count)[None])

    return {(name, count): explain(name, count) for count in values for name in methods}


def method_runs(model_name: str, methods: Sequence[str], values: Sequence[int]) -> Runs:
    """One image, ever more methods in one comparison, in the order of `compare_cost.METHODS`."""
    model, image = random_vit(model_name, SIZE), random_images(1, SIZE)

    def together(count: int) -> Run:
        return lambda: compare(model, image, list(METHODS[:count]), targets=0)

    return {(TOGETHER, count): together(count) for count in values}


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        label: of the axis in the plot.
        prepare: makes the runs from the model's name, methods and values.
        values: that are measured, rising.
    """

    label: str
    prepare: Callable[[str, Sequence[str], Sequence[int]], Runs]
    values: tuple[int, ...]


AXES = {
    "tokens": Axis("patches of one image", token_runs, (224, 320, 448, 640, 1024)),
    "batch": Axis("images in one call", batch_runs, (1, 2, 4, 8, 16, 32)),
    "targets": Axis("classes of one image in one call", target_runs, (1, 2, 4, 8, 16)),
    "methods": Axis("methods in one comparison", method_runs, tuple(range(1, len(METHODS) + 1))),
}


def measure(axis: str, model_name: str, methods: Sequence[str], values: Sequence[int], rounds: int) -> list[Curve]:
    """Times all points of one axis in the same rounds."""
    runs = AXES[axis].prepare(model_name, methods, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)  # constant maps: the weights are random
        times = interleaved({f"{name} {value}": run for (name, value), run in runs.items()}, rounds, axis)
    curves = []
    for name in dict.fromkeys(name for name, _ in runs):
        places = sorted(value for other, value in runs if other == name)
        seconds = [quartiles(times[f"{name} {value}"].cpu, [1.0] * rounds) for value in places]
        curves.append(Curve(axis, name, tuple(places), tuple(seconds)))
    return curves


def report(curves: Sequence[Curve], model_name: str, facts: str) -> str:
    """The figures as Markdown, a table an axis."""
    parts = ["# How time grows\n", f"{model_name}, random weights, float32, median CPU time in ms. {_READING}\n"]
    for axis in dict.fromkeys(each.axis for each in curves):
        own = [each for each in curves if each.axis == axis]
        header = ["computation", *map(str, own[0].values), "exponent", "last slope"]
        rows = [
            [
                each.computation,
                *(f"{1000 * median:.0f}" for median in each.medians),
                f"{each.exponent():.2f}",
                f"{each.exponent(2):.2f}",
            ]
            for each in own
        ]
        parts += [f"## {AXES[axis].label.capitalize()}\n", markdown_table(header, rows), ""]
    return "\n".join([*parts, "![Time along each axis](scaling.svg)\n", facts, ""])


_READING = (
    "The exponent is the slope of a line through the medians on logarithmic axes, the last slope that between the two "
    "largest values."
)


def draw(curves: Sequence[Curve], file: BinaryIO) -> None:
    """Draws one panel an axis as SVG, both axes logarithmic, quartiles as bars."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(each.axis for each in curves))
    figure = Figure(figsize=(5.5 * len(axes), 4.5), layout="constrained")
    for place, axis in enumerate(axes):
        panel = figure.add_subplot(1, len(axes), place + 1)
        for each, marker in zip((each for each in curves if each.axis == axis), "osD^vPX*" * 9, strict=False):
            low, median, high = (1000 * np.array(column) for column in zip(*each.seconds, strict=True))
            label = f"{each.computation}: {each.exponent():.2f}"
            panel.errorbar(each.values, median, (median - low, high - median), label=label, marker=marker, capsize=2)
        panel.set(xlabel=AXES[axis].label, ylabel="CPU time in ms", xscale="log", yscale="log")
        panel.grid(which="major", alpha=0.4)
        panel.legend(title="exponent", fontsize=8)
    figure.savefig(file, format="svg", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes scaling.md and scaling.svg where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = ["rollout", "gradcam", "legrad", "generic_attention", "tokentm"]
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm Vision Transformer with a CLS token")
    parser.add_argument("--methods", nargs="+", default=methods, help="explanation methods")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="what grows")
    parser.add_argument("--largest", type=int, help="leaves larger values out, on every axis (image sides for tokens)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each point is timed")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.rounds < 1:
        parser.error("found --rounds below 1, expected a whole number >= 1")
    known_methods(options.methods)
    before, load = torch.get_num_threads(), os.getloadavg()[0]
    torch.set_num_threads(1)
    try:
        curves: list[Curve] = []
        for axis, values in _chosen(options.axes, options.largest).items():
            curves += measure(axis, options.model, options.methods, values, options.rounds)
    finally:
        torch.set_num_threads(before)
    busy = f"1 thread, load average {load:.1f} to {os.getloadavg()[0]:.1f}"
    text = report(curves, options.model, machine_facts(_MODULE, given, busy))
    print(text)
    if options.output:
        write_whole(options.output / "scaling.md", lambda file: file.write(text.encode()))
        write_whole(options.output / "scaling.svg", lambda file: draw(curves, file))


def _chosen(axes: Sequence[str], largest: int | None) -> Mapping[str, list[int]]:
    """Values of each axis; those that have none left are left out."""
    kept = {axis: [each for each in AXES[axis].values if largest is None or each <= largest] for axis in axes}
    return {axis: values for axis, values in kept.items() if values}


if __name__ == "__main__":
    main()
