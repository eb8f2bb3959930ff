"""One method against each of the others, image by image: the differences of a finished `vitexplain bench`, as a table.

``python -m vitexplain.benchmarks.paired_differences benchmarks/results/contributions contributions``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitexplain.bench.entries import MetricEntry
from vitexplain.bench.figures import FigureRow
from vitexplain.bench.results import BenchResults
from vitexplain.errors import UnknownNameError
from vitexplain.files import write_whole
from vitexplain.metrics.metric import Metric
from vitexplain.metrics.ranking import PairedDifference, compare_rows

from .measuring import markdown_table

FIGURES = ("probability_auc", "energy", "auc", "saco")
"""Those that are compared; of a metric that has none of them, its most important one."""

NAME = "differences.md"


def tables(results: BenchResults, method: str) -> str:
    """A table a model and figure, as Markdown: each row the method minus another, and who that speaks for.

    Raises:
        UnknownNameError: no method has this label.
    """
    parts = [
        f"# {method} against the others",
        "Paired differences over the same images with 95 % bootstrap intervals, and p-values of paired permutation "
        "tests of each pair alone. The last column names the better one where the interval excludes zero.",
    ]
    rows = results.figures()
    known = dict.fromkeys(row.method for row in rows)
    if method not in known:
        raise UnknownNameError.listing("method", method, known)
    metrics = _metrics(results)
    for own in rows:
        metric = metrics[own.metric]
        if own.method == method and own.figure in _compared(metric):
            chosen = [row for row in rows if (row.model, row.metric, row.figure) == (own.model, own.metric, own.figure)]
            parts += [f"## {own.metric}, {own.figure}, {own.model}", _table(results, metric, chosen, method)]
    return "\n\n".join(parts) + "\n"


def _metrics(results: BenchResults) -> dict[str, Metric]:
    """By label, as they were configured: a figure may depend on options."""
    entries = (MetricEntry(**each) for each in results.run["configuration"]["metrics"])
    return {entry.label: entry.create() for entry in entries}


def _compared(metric: Metric) -> list[str]:
    names = [figure.name for figure in metric.info.figures]
    return [name for name in names if name in FIGURES] or names[:1]


def _table(results: BenchResults, metric: Metric, rows: list[FigureRow], method: str) -> str:
    first = rows[0]
    measured = {row.method: results.statistics(first.model, row.method, first.metric) for row in rows}
    own = measured.pop(method)
    lines = []
    for other, theirs in measured.items():
        (pair,) = compare_rows(metric, {method: own, other: theirs}, first.figure).pairs
        better = _verdict(pair, method, other, first.higher_is_better)
        lines.append([other, str(pair.difference), f"{pair.p_value:.2g}", better])
    return markdown_table([f"{method} minus", "difference", "p", "better"], lines)


def _verdict(pair: PairedDifference, method: str, other: str, higher: bool | None) -> str:
    low, high = pair.difference.low, pair.difference.high
    if higher is None or low <= 0 <= high:
        return "neither"
    return f"**{method}**" if (low > 0) == higher else other


def main(arguments: list[str]) -> None:
    """Reads, prints, and writes beside the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `vitexplain bench` wrote")
    parser.add_argument("method", help="label of the one method")
    options = parser.parse_args(arguments)
    text = tables(BenchResults.open(options.folder), options.method)
    print(text)
    write_whole(options.folder / NAME, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
