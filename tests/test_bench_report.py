"""Reports of benchmarks: every mean with its interval and number of images, ranks only where something tells apart."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitexplain.bench import figures, open_results, run_bench
from vitexplain.bench.command import conclude
from vitexplain.bench.configuration import BenchConfiguration
from vitexplain.bench.curve_bands import Curve, mean_curve
from vitexplain.bench.figures import FigureRow, compute_figures, figure_rows
from vitexplain.bench.formatting import decimals_for, markdown_cell, show_estimate, show_seconds
from vitexplain.bench.plots import CostPanel, CurvePanel, Pictures, Point
from vitexplain.bench.report import _Report, write_report
from vitexplain.bench.results import write_figures
from vitexplain.bench.sections import make_sections
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.tally import Rows

SETTINGS: dict[str, Any] = {
    "methods": ["rollout", "tokentm", {"name": "tokentm", "label": "a|b<i>"}],
    "metrics": [{"name": "deletion", "steps": 4, "label": "deletion"}, "energy_in_mask"],
    "data": {"format": "scenes", "limit": 4},
    "models": [{"name": "scenes", "label": "one"}, {"name": "scenes", "label": "two"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "RESAMPLES", 50)
        patch.setattr(figures, "PERMUTATIONS", 99)
        place = tmp_path_factory.mktemp("report")
        run_bench(BenchConfiguration.from_mapping(SETTINGS), place)
    return place


class Outline(HTMLParser):
    """Whether every element is closed, and what pages would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Outline()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert "<script" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "a|b&lt;i&gt;" in text
    assert "a|b<i>" not in text
    assert text.count("<svg") == 2 + 2 + 2  # curves, ranks and costs of two models
    assert "currentColor" in text
    assert "#10151b" not in text
    assert text.count("aria-label=") == 6


def test_tables_never_show_a_mean_alone(folder: Path) -> None:
    lines = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| ")]
    tables = [line for line in lines if re.match(r"\| (rollout|tokentm|a\\\|b<i>) \|", line)]
    assert len(tables) == 2 * 2 * 3
    for line in tables:
        cells = [cell.strip(" *") for cell in re.split(r"(?<!\\)\|", line)[2:-1]]
        assert re.fullmatch(r"\d\.\d+ \[\d\.\d+, \d\.\d+\]", cells[0])
        assert re.fullmatch(r"\d(–\d)?", cells[1])
        assert "4" in cells
    text = (folder / "report.md").read_text()
    for picture in re.findall(r"\]\((plots/[^)]+)\)", text):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 200
    assert len(re.findall(r"\]\((plots/[^)]+)\)", text)) == 6
    assert "{{" not in text
    assert "None" not in text


def figure_row(method: str, **changes: Any) -> FigureRow:
    row = FigureRow(
        "m", "energy_in_mask", method, "energy", "share", 0, True, None, 0.5, 0.4, 0.6, 9, 1, 2, False, 9, 0, 0, 0, 0.0
    )
    return replace(row, **changes)


def test_sections_put_the_best_first_and_mark_it_only_where_it_is_apart() -> None:
    configuration = BenchConfiguration.from_mapping(
        {"models": {"label": "m"}, "metrics": ["energy_in_mask"], "methods": ["rollout"]}
    )
    rows = [
        figure_row("a", value=0.5, rank=2, last_rank=3),
        figure_row("b", value=math.nan, low=math.nan, high=math.nan, n=0, rank=None, last_rank=None),
        figure_row("c", value=0.9, rank=1, last_rank=1, best=True),
        figure_row("d", value=0.6, rank=2, last_rank=3),
    ]
    (section,) = make_sections(rows, configuration)
    assert [line.method for line in section.lines] == ["c", "d", "a", "b"]
    assert [(line.cells[0].rank, line.cells[0].best) for line in section.lines] == [
        ("1", True),
        ("2–3", False),
        ("2–3", False),
        ("", False),
    ]
    assert section.lines[3].cells[0].text == "–"
    falling = [replace(row, higher_is_better=False) for row in rows]
    (section,) = make_sections(falling, configuration)
    assert [line.method for line in section.lines] == ["a", "d", "c", "b"]


def test_a_figure_that_a_method_lacks_is_an_empty_cell_in_its_own_column() -> None:
    configuration = BenchConfiguration.from_mapping(
        {"models": {"label": "m"}, "metrics": ["energy_in_mask"], "methods": ["rollout"]}
    )
    rows = [
        figure_row("a", n=7),
        *(figure_row(method, figure="chance", position=1, value=0.1, rank=None, last_rank=None) for method in "ba"),
    ]
    (section,) = make_sections(rows, configuration)
    assert [(column.name, column.ranked) for column in section.figures] == [("energy", True), ("chance", False)]
    assert [line.method for line in section.lines] == ["a", "b"]
    (energy, chance), (missing, other) = (line.cells for line in section.lines)
    assert (energy.text[:4], chance.text, missing.text, other.text) == ("0.50", chance.text, "", chance.text)
    assert (missing.rank, missing.best, missing.n) == ("", False, 0)
    assert [(line.n, [cell.n for cell in line.cells]) for line in section.lines] == [(9, [7, 9]), (9, [0, 9])]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_reports_keep_columns_where_methods_lack_figures_ranks_or_images(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    results = open_results(place)
    rows = []
    for row in results.figures():
        if (row.metric, row.method, row.figure) == ("energy_in_mask", "rollout", "energy"):
            continue
        if (row.metric, row.method) == ("deletion", "a|b<i>"):  # the last one, and nothing to rank
            row = replace(row, value=math.nan, low=math.nan, high=math.nan, n=0, rank=None, last_rank=None)
        if (row.metric, row.method, row.figure) == ("energy_in_mask", "tokentm", "energy"):
            row = replace(row, n=3)
        rows.append(row)
    write_figures(place, rows)
    write_report(results, BenchConfiguration.from_mapping(SETTINGS))
    lines = (place / "report.md").read_text().splitlines()
    heads = [place for place, line in enumerate(lines) if " unmeasured " in line]
    tables = [[cells_of(each) for each in lines[head : head + 5]] for head in heads]
    assert len(tables) == 4
    for table in tables:
        assert {len(line) for line in table} == {len(table[0])}
    deletion, energy = tables[0], tables[2]
    assert deletion[0][:4] == ["method", "auc", "#", "n"]
    assert {line[0]: line[2] for line in deletion[2:]}["a\\|b<i>"] == ""
    assert energy[0][:5] == ["method", "energy", "#", "chance", "n"]
    of_method = {line[0]: line for line in energy[2:]}
    assert of_method["rollout"][1:3] == ["", ""]
    assert of_method["rollout"][3].startswith("0.")
    assert of_method["tokentm"][1].strip("*").endswith("] (n = 3)")
    assert [line[4] for line in energy[2:]] == ["4"] * 3
    page = (place / "report.html").read_text()
    assert re.search(r'<th scope="row">rollout</th><td></td><td>0\.\d+ ', page)
    assert page.count("(n = 3)") == 2
    shown = conclude(results).splitlines()
    assert [line.split("n=")[1] for line in shown if line.startswith("  tokentm")] == ["4", "4", "3", "3"]
    assert [line.split()[1:] for line in shown if line.startswith("  rollout")][2:] == [["n=0"]] * 2


def test_every_measure_of_faithfulness_is_shown_against_cost_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    faithful = ["deletion", "infidelity", "insertion", "saco", "token_dropping", "faithfulness_correlation"]
    chosen = ["class_sensitivity", *faithful, "positive_perturbation", "sensitivity_max", "energy_in_mask"]
    rows = [row for row in open_results(place).figures() if row.metric == "deletion"]
    write_figures(place, [replace(row, metric=metric) for metric in chosen for row in rows])
    shown: list[list[str]] = []
    monkeypatch.setattr(Pictures, "costs", lambda _, name, panels: shown.append([each.title for each in panels]) or "")
    monkeypatch.setattr(_Report, "_curves", lambda *_: None)
    write_report(open_results(place), BenchConfiguration.from_mapping({**SETTINGS, "metrics": chosen}))
    assert shown == [[*faithful, "positive_perturbation"]] * 2


def energies(values: list[float]) -> Rows:
    count = len(values)
    diagnosis = {"broken": np.isnan(values).astype(float), "constant": np.zeros(count), "tied": np.full(count, 0.25)}
    return {"energy": np.array(values), "chance": np.where(np.isnan(values), np.nan, 0.1), **diagnosis}


def test_figures_of_clear_and_unclear_differences() -> None:
    generator = np.random.default_rng(0)
    low = generator.uniform(0.1, 0.2, 40)
    metric = create_metric("energy_in_mask")
    rows = {
        "low": energies(low.tolist()),
        "high": energies((low + 0.5).tolist()),
        "like low": energies(np.roll(low, 1).tolist()),
        "nowhere": energies([math.nan] * 40),
    }
    found = figure_rows("m", "E", metric, compute_figures(metric, rows, 0), ["high", "nowhere", "low", "like low"])
    assert [row.method for row in found[:4]] == ["high", "nowhere", "low", "like low"]
    high, nowhere, first, second = found[:4]
    assert (high.rank, high.last_rank, high.best) == (1, 1, True)
    assert (first.rank, first.last_rank, first.best) == (second.rank, second.last_rank, second.best) == (2, 3, False)
    assert (nowhere.rank, nowhere.best, nowhere.n, nowhere.broken, nowhere.unmeasured) == (None, False, 0, 40, 40)
    assert first.value == pytest.approx(low.mean())
    assert first.low < first.value < first.high
    assert (first.n, first.images, first.tied, first.title) == (40, 40, 0.25, metric.info.figures[0].title)
    assert {(row.figure, row.rank, row.position) for row in found[4:]} == {("chance", None, 1)}
    alone = figure_rows("m", "E", metric, compute_figures(metric, {"low": rows["low"]}, 0), ["low"])
    assert [row.rank for row in alone] == [None, None]


def test_bands_are_those_of_the_mean() -> None:
    generator = np.random.default_rng(0)
    curves = generator.normal(size=(200, 1)) + np.array([[0.0, 1, 2]])
    curves[:50, 2] = np.nan
    band = mean_curve(curves, 0)
    np.testing.assert_allclose(band.mean, np.nanmean(curves, 0))
    spread = np.nanstd(curves, 0) / np.sqrt([200, 200, 150])
    np.testing.assert_allclose(band.high - band.low, 2 * 1.96 * spread, rtol=0.1)
    np.testing.assert_allclose(mean_curve(curves, 0).low, band.low)


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.5, 0.4, 0.6, "0.50 [0.40, 0.60]"),
        (15.123, 11.5, 20.1, "15.1 [11.5, 20.1]"),
        (1234.5, 1000.0, 1500.0, "1234 [1000, 1500]"),
        (1e-9, 0.0, 2e-9, "1.00e-09 [0.00e+00, 2.00e-09]"),
        (1.0, 1.0, 1.0, "1.000 [1.000, 1.000]"),
        (0.5, math.nan, math.nan, "0.500 [?, ?]"),
        (math.nan, math.nan, math.nan, "–"),
    ],
)
def test_as_many_decimals_as_are_known(value: float, low: float, high: float, shown: str) -> None:
    assert show_estimate({"value": value, "low": low, "high": high}) == shown


def test_a_column_has_the_decimals_of_its_narrowest_interval() -> None:
    rows = [asdict(figure_row("a")), asdict(figure_row("b", low=0.499, high=0.501))]
    assert decimals_for(rows) == 4
    assert [show_seconds(each) for each in (2.5, 0.0312, 4.2e-5)] == ["2.5 s", "31.2 ms", "42 µs"]


def test_pictures_take_any_number_of_methods_and_leave_settings_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    methods = [f"method number {index}" for index in range(14)]
    pictures, x = Pictures(tmp_path, methods), np.linspace(0, 1, 50)
    styles = [tuple(style.values()) for style in pictures.styles.values()]
    assert len(set(styles)) == len(methods)
    panel = CurvePanel("p", x, "x", "y", {each: Curve(x, x - 0.1, x + 0.1) for each in methods})
    assert pictures.curves("curves", [panel] * 3).startswith("<svg")
    points = {each: Point(index + 1.0, 0.5, 0.6, 0.7) for index, each in enumerate(methods)}  # beside its interval
    assert pictures.costs("costs", [CostPanel("p", "y", points)]).startswith("<svg")
    ranks = {each: [(1, 14), None, (index + 1, index + 1)] for index, each in enumerate(methods)}
    svg = pictures.ranks("ranks", ["a", "b", "a very long name of a metric"], ranks)
    assert "currentColor" in svg
    assert dict(matplotlib.rcParams) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.{suffix}" for name in ("costs", "curves", "ranks") for suffix in ("png", "svg")
    ]
    again = Pictures(tmp_path / "again", methods)
    again.ranks("ranks", ["a", "b", "a very long name of a metric"], ranks)
    assert (tmp_path / "again" / "ranks.svg").read_bytes() == (tmp_path / "ranks.svg").read_bytes()
    with Image.open(tmp_path / "ranks.png") as image:
        pixels = np.asarray(image.convert("L"))
    margins = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((margin == 255).all() for margin in margins), "text is cut off"


def test_labels_are_shown_as_they_are(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from vitexplain.bench import plots

    labels = [r"$\alfa$", "_hidden", "a $ b", "plain_name"]
    pictures, x = Pictures(tmp_path, labels), np.linspace(0, 1, 5)
    pictures.curves("curves", [CurvePanel(r"$\x$", x, r"$\y$", "$", {each: Curve(x, x, x) for each in labels})])
    pictures.costs("costs", [CostPanel(r"$\x$", r"$\y$", {each: Point(1, 1, 1, 1) for each in labels})])
    pictures.ranks("ranks", [r"$\alfa$", "_b"], {each: [(1, 1), None] for each in labels})
    axis = Figure().add_subplot()
    for label in labels:
        axis.plot([0, 1], label=plots._text(label))
    assert len(axis.get_legend_handles_labels()[1]) == len(labels)


def test_a_cell_of_a_table_is_one_line() -> None:
    assert markdown_cell("two\nlines | bar") == "two lines \\| bar"
