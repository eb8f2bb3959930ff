"""The report of the randomisation check: its figures as a table and as a picture, and what they mean."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from vitexplain import list_methods
from vitexplain.metrics import Estimate
from vitexplain.metrics.statistics import Sample, estimate_figures

from .measuring import markdown_table

OTHER_IMAGE = "another image"
"""The column that weights have no part in: each map of the trained model against that of the next image."""

TITLES = {
    OTHER_IMAGE: OTHER_IMAGE,
    "head": "head",
    "block 9": "… to block 9",
    "block 6": "… to block 6",
    "block 3": "… to block 3",
    "block 0": "… to block 0",
    "stem": "all weights",
}
"""The columns, by the last stage that is random."""


_HIGH = 0.1


@dataclass(frozen=True)
class Record:
    """What was measured of one method.

    Attributes:
        key: digest of all that determines the figures.
        label: the method with its options.
        correlations: by column, one number an image; None where a map is constant.
        seconds: of computing, all stages.
    """

    key: str
    label: str
    correlations: Mapping[str, Sequence[float | None]]
    seconds: float

    @property
    def images(self) -> int:
        """How many photographs were explained."""
        return len(next(iter(self.correlations.values())))

    def estimates(self) -> dict[str, Estimate]:
        """Mean of each column with its 95 % interval over images."""
        rows = {name: np.array(values, dtype=np.float64) for name, values in self.correlations.items()}
        sample = Sample.of(rows, lambda means: means)
        return estimate_figures(sample, confidence=0.95, resamples=2000, seed=0)


def report(records: Sequence[Record], facts: str) -> str:
    """The table and what it means, as Markdown."""
    rows = []
    for record in records:
        found = record.estimates()
        rows.append([record.label, str(record.images), *(_figure(found.get(name)) for name in TITLES)])
    high = [f"`{each.label}`" for each in records if each.estimates()["stem"].low > _HIGH]
    left_out = ", ".join(f"`{name}`" for name in list_methods(trainable=True))
    return "\n".join(
        [
            "# The randomisation check\n",
            "Rank correlation (Spearman, 196 patches, scores with their sign) between the map of the trained ViT-Ti "
            "and that of the same model with random weights, from the head down to the block that is named, for the "
            "class that the trained model predicts: mean over photographs, with 95 % bootstrap intervals over them. "
            "After Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018. A random weight is drawn from the "
            "normal distribution with mean and deviation of its trained tensor; one draw of weights, so intervals are "
            "about photographs alone.\n",
            markdown_table(["method", "images", *TITLES.values()], rows),
            "\n![Rank correlation by method and by what is random](randomisation.png)\n",
            "How to read it:\n",
            "- **All weights**: the same architecture that never learned anything. A high figure there says that the "
            "map is made by something else than what was learned: edges and textures of the image, which survive "
            "random filters, or a prior for places, which position embeddings and borders bring in. A figure near 0 "
            "passes the check; it does not say that a map is right.",
            "- **Another image**: the map of one photograph against that of the next, trained model. What is high here "
            "is high for the place in the picture, not for what is shown; photographs with their object in the middle "
            "have some of it.",
            "- `random_scores` and `centre_prior` do not look at the model: 1 at every stage, the worst there can be. "
            "`another image` tells them apart.",
            f"- Above {_HIGH} with all weights random, by the whole interval: {', '.join(high) or 'none'}.",
            "- The steps in between show how far down a method looks. What reads the first blocks' attention alone "
            "cannot change before these are random: high figures in the middle are no fault by themselves. Nor does "
            "the head count for methods that do not look at the class.",
            "- Signed maps that turn round give negative figures. Constant maps have no rank correlation and are left "
            "out.",
            "- Methods of many passes have fewer images, steps in between, samples, or all of these, as written; so "
            "few images make a rough interval. `rise` and `kernel_shap` ask about the same sets of patches each time, "
            "and `smoothgrad` adds the same noise, so that chance is part of their agreement, also with another image. "
            "`pm` is untrained here: the model's own classifier, put to single patches.",
            f"- Not here: {left_out}. They learn for one model, and what is shipped was learnt for the scenes.\n",
            f"{sum(record.seconds for record in records):.0f} s of computing.\n",
            facts,
            "",
        ]
    )


def _figure(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate.value):
        return "–"
    low, high = estimate.low, estimate.high
    return _rounded(estimate.value) + ("" if math.isnan(low) else f" [{_rounded(low)}, {_rounded(high)}]")


def _rounded(value: float) -> str:
    return f"{round(value, 2) + 0:.2f}"  # no minus before a zero


def table_file(records: Sequence[Record]) -> str:
    """The figures as CSV, unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "random", "mean", "low", "high", "images"])
    for record in records:
        for name, each in record.estimates().items():
            writer.writerow([record.label, name, each.value, each.low, each.high, each.n])
    return text.getvalue()


def draw(records: Sequence[Record], file: BinaryIO) -> None:
    """Draws a cell a figure, and the last column once more with its intervals, as PNG."""
    from matplotlib.figure import Figure

    found = [record.estimates() for record in records]
    values = np.array([[row[name].value if name in row else math.nan for name in TITLES] for row in found])
    figure = Figure(figsize=(11, 1.6 + 0.27 * len(records)), layout="constrained")
    cells, ends = figure.subplots(1, 2, width_ratios=[2.4, 1], sharey=True)
    cells.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for (down, across), value in np.ndenumerate(values):
        ink = "white" if abs(value) > 0.6 else "#111111"
        cells.text(across, down, "–" if math.isnan(value) else _rounded(value), ha="center", va="center", color=ink)
    cells.set_yticks(range(len(records)), [record.label for record in records])
    cells.set_xticks(range(len(TITLES)), list(TITLES.values()), rotation=25, ha="left", rotation_mode="anchor")
    cells.xaxis.tick_top()
    cells.tick_params(length=0)
    cells.set_xlabel("rank correlation with the trained model's map; last weights made random above")
    cells.axvline(0.5, color="white", linewidth=4)
    for place, (name, marker, colour) in enumerate((("stem", "o", "#2e7bc4"), (OTHER_IMAGE, "D", "#c8600a"))):
        known = [(down, row[name]) for down, row in enumerate(found) if not math.isnan(row[name].value)]
        middle = np.array([each.value for _, each in known])
        bars = np.array([[each.value - each.low, each.high - each.value] for _, each in known]).T
        downs = np.array([down for down, _ in known]) + 0.16 * (2 * place - 1)
        ends.errorbar(
            middle,
            downs,
            xerr=np.nan_to_num(bars).clip(min=0),
            fmt=marker,
            color=colour,
            markersize=4,
            label=TITLES[name],
        )
    ends.axvline(0, color="#7a828c", linewidth=1)
    lows = [row[name].low for row in found for name in ("stem", OTHER_IMAGE)]
    ends.set(xlim=(np.nanmin([*lows, -0.2]) - 0.05, 1.05), xlabel="the same with 95 % intervals")
    ends.grid(axis="x", alpha=0.4)
    ends.legend(loc="lower center", bbox_to_anchor=(0.5, 1.005), frameon=False)
    figure.savefig(file, format="png", dpi=110)
