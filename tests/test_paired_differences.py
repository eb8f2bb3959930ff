"""The driver of paired differences: known statistics in, a known table out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitexplain import InputError, UnknownNameError
from vitexplain.bench.entries import MetricEntry
from vitexplain.bench.figures import compute_figures, figure_rows
from vitexplain.bench.results import RUN, Measured, write_figures, write_rows
from vitexplain.benchmarks import paired_differences
from vitexplain.metrics.tally import Rows

COUNT = 12
WHERE = np.arange(COUNT)

METRICS: dict[str, dict[str, Any]] = {
    "box": {"name": "energy_in_box", "options": {}},
    "black pixels": {"name": "positive_perturbation", "options": {"area_convention": "steps"}},
    "peak": {"name": "pointing_game", "options": {}},
}
"""Labels that are no names of metrics, an option that changes a figure, and figures by other names than the usual."""

CURVE = np.linspace(0.9, 0.1, 9)

STATISTICS: dict[str, dict[str, dict[str, np.ndarray]]] = {
    "box": {
        "ours": {"energy": 0.5 + 0.01 * WHERE},
        "theirs": {"energy": 0.25 + 0.01 * WHERE},
        "coin": {"energy": 0.5 + 0.01 * WHERE + 0.1 * (-1.0) ** WHERE},
    },
    "black pixels": {
        "ours": {"probability": np.tile(CURVE, (COUNT, 1))},
        "theirs": {"probability": np.tile(CURVE + 0.05, (COUNT, 1))},
        "coin": {"probability": np.tile(CURVE - 0.02, (COUNT, 1))},
    },
    "peak": {
        "ours": {"hit_rate": np.zeros(COUNT)},
        "theirs": {"hit_rate": np.ones(COUNT)},
        "coin": {"hit_rate": np.zeros(COUNT)},
    },
}
"""By metric and method: differences are the same on every image, but for `coin` in the box."""


ALIKE: dict[str, dict[str, Any]] = {
    "box": {"chance": np.full(COUNT, 0.3)},
    "black pixels": {
        **dict.fromkeys(("agreement", "log_odds"), np.tile(CURVE, (COUNT, 1))),
        "clean_probability": np.full(COUNT, 0.95),
    },
    "peak": {"chance": np.full(COUNT, 0.1)},
}
"""What all methods share."""


def rows_of(label: str, method: str) -> Rows:
    diagnosis = dict.fromkeys(("broken", "constant", "tied"), np.zeros(COUNT))
    return {**STATISTICS[label][method], **ALIKE[label], **diagnosis}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results as a finished benchmark leaves them."""
    entries = [MetricEntry(label=label, **each) for label, each in METRICS.items()]
    listed = [{"name": each.name, "options": dict(each.options), "label": each.label} for each in entries]
    (tmp_path / RUN).write_text(json.dumps({"configuration": {"metrics": listed}}))
    numbers = np.zeros(COUNT, np.int64)
    images: dict[str, Any] = {"image": np.array([f"{index}.png" for index in WHERE], object)}
    images |= {name: numbers for name in ("target", "prediction", "label")}
    images |= {name: np.full(COUNT, 0.5) for name in ("target_probability", "probability")}
    measured, figures = [], []
    for entry in entries:
        rows = {method: rows_of(entry.label, method) for method in ("theirs", "ours", "coin")}
        measured += [Measured("tiny", method, entry.label, images, each) for method, each in rows.items()]
        columns = compute_figures(entry.create(), rows, 0)
        figures += figure_rows("tiny", entry.label, entry.create(), columns, list(rows))
    write_rows(tmp_path, iter(measured))
    write_figures(tmp_path, figures)
    return tmp_path


def sections(text: str) -> dict[str, list[list[str]]]:
    """Rows of each table by its heading."""
    found: dict[str, list[list[str]]] = {}
    for part in text.split("\n## ")[1:]:
        heading, *lines = part.splitlines()
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        found[heading] = table[2:]
    return found


def test_differences_intervals_and_verdicts_are_those_of_the_statistics(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paired_differences.main([str(folder), "ours"])
    written = (folder / paired_differences.NAME).read_text()
    assert capsys.readouterr().out == written + "\n"
    assert written.startswith("# ours against the others\n")
    found = sections(written)
    assert list(found) == ["box, energy, tiny", "black pixels, probability_auc, tiny", "peak, hit_rate, tiny"]
    (theirs, *certain), (coin, *level) = found["box, energy, tiny"]
    assert (theirs, certain[0], certain[2]) == ("theirs", "0.25 [0.25, 0.25]", "**ours**")
    assert float(certain[1]) < 0.01  # all twelve images say so: two swaps of 2 ** 12 are as large
    assert (coin, level[2]) == ("coin", "neither")
    assert abs(float(level[0].split()[0])) < 1e-9
    assert float(level[1]) > 0.9
    # with area_convention="steps" the figure is 100 times the mean of the curve, and lower is better
    assert [row[:2] + row[3:] for row in found["black pixels, probability_auc, tiny"]] == [
        ["theirs", "-5 [-5, -5]", "**ours**"],
        ["coin", "2 [2, 2]", "coin"],
    ]
    assert [row[:2] + row[3:] for row in found["peak, hit_rate, tiny"]] == [
        ["theirs", "-1 [-1, -1]", "theirs"],
        ["coin", "0 [0, 0]", "neither"],
    ]


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"our.*ours"):
        paired_differences.main([str(folder), "our"])
    assert not (folder / paired_differences.NAME).exists()
    with pytest.raises(InputError, match="found no finished results"):
        paired_differences.main([str(tmp_path / "elsewhere"), "ours"])
