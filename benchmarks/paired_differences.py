"""One method against each of the others, image by image: the differences of a finished `vitexplain bench`, as a table.

``python -m vitexplain.benchmarks.paired_differences benchmarks/results/contributions contributions``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitexplain.bench.figures import FigureRow
from vitexplain.bench.results import BenchResults
from vitexplain.files import write_whole
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.ranking import PairedDifference, compare_rows

from .measuring import markdown_table

FIGURES = ("probability_auc", "energy", "auc", "saco")
"""Those that are compared where a metric has several."""

NAME = "differences.md"


def tables(results: BenchResults, method: str) -> str:
    """A table a model and figure, as Markdown: each row the method minus another, and who that speaks for."""
    parts = [
        f"# {method} against the others",
        "Paired differences over the same images with 95 % bootstrap intervals, and p-values of paired permutation "
        "tests of each pair alone. The last column names the better one where the interval excludes zero.",
    ]
    rows = results.figures()
    for model, metric, figure in dict.fromkeys((row.model, row.metric, row.figure) for row in rows):
        if figure in FIGURES:
            chosen = [row for row in rows if (row.model, row.metric, row.figure) == (model, metric, figure)]
            parts += [f"## {metric}, {figure}, {model}", _table(results, chosen, method)]
    return "\n\n".join(parts) + "\n"


def _table(results: BenchResults, rows: list[FigureRow], method: str) -> str:
    first = rows[0]
    metric = create_metric(first.metric)
    higher = next(each.higher_is_better for each in metric.info.figures if each.name == first.figure)
    measured = {row.method: results.statistics(first.model, row.method, first.metric) for row in rows}
    own = measured.pop(method)
    lines = []
    for other, theirs in measured.items():
        (pair,) = compare_rows(metric, {method: own, other: theirs}, first.figure).pairs
        lines.append([other, str(pair.difference), f"{pair.p_value:.2g}", _verdict(pair, method, other, higher)])
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
