"""The report of the table of peers: its rows, what they say, and an overview of each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from vitexplain.files import write_whole

from .measuring import FORWARD, FORWARD_BACKWARD, markdown_table
from .peer_cells import BY_TIME, Cell, MemoryCell, Spread, TimeCell, read_cells, write_cells
from .processes import OUT_OF_MEMORY

LARGE = 768
"""Image side in pixels from which on attention makes up most of the memory."""
NAIVE_AT_LEAST = 2
"""How many times the memory that naive recipes are to take there."""

_Cell = TypeVar("_Cell", bound=Cell)
_Cells = Sequence[TimeCell] | Sequence[MemoryCell]


def add_cells(kind: type[_Cell], new: Sequence[_Cell], folder: Path, order: Sequence[str]) -> None:
    """Writes cells to a folder, instead of older ones of the same places, and the report anew.

    Args:
        kind: of the cells.
        new: the cells.
        folder: where files lie.
        order: of the pairs.
    """
    cells = {each.key: each for each in [*read_cells(kind, folder), *new]}
    rows = sorted(cells.values(), key=lambda each: (each.model, each.size, each.batch, order.index(each.pair)))
    write_cells(kind, rows, folder)
    whole = report(read_cells(TimeCell, folder), read_cells(MemoryCell, folder))
    write_whole(folder / "peers.md", lambda file: file.write(whole.encode()))


def report(times: Sequence[TimeCell], memory: Sequence[MemoryCell]) -> str:
    """The figures and what they say as Markdown."""
    parts = ["# Beside other packages\n"]
    if times and memory:
        parts += [_SUMMARY, _summary(times, memory), ""]
    if times:
        parts += [_TIME, *_sentences(times, "faster", "slower"), *_plain_failures(times), ""]
        parts += [*_overviews(times, "Time"), _time_table(times), ""]
    if memory:
        parts += [_MEMORY, *_sentences(memory, "smaller", "larger"), *_naive_sentence(memory), ""]
        parts += [*_overviews(memory, "Memory"), _memory_table(memory), ""]
    return "\n".join([*parts, *_facts([*times, *memory]), ""])


_SUMMARY = """How many times as much the other takes, over all models, image sizes and batches measured: smallest to
largest (median, of so many places); and in how many places it alone ran out of memory.
"""

_TIME = f"""## Time

CPU time of the whole call for the whole batch, float32. Each row is one pair: a method of another package, in the form
that its documentation shows, and the method here that computes the same. Ratios are taken within interleaved rounds,
every other one of which goes backwards: median [quartiles]. `{FORWARD}` has no graph; `{FORWARD_BACKWARD}` has frozen
weights and the gradient at the first block's input. *Alike* is the mean rank correlation of the two maps and their
largest difference as a share of a map's range. A pair has as many rounds as fit its time, after a call that does not
count; where no more than one call fits, that one is the round, and has no spread. *Naive* recipes are written out in
`benchmarks/naive_recipes.py`: one image at a time, attention and its gradient kept whole, N×N products.
"""

_MEMORY = """## Memory

Rise of resident memory on top of model and input in MiB, each figure from a process of its own; random
weights, float32.
"""


def _sentences(cells: _Cells, better: str, worse: str) -> list[str]:
    """In how many cells the method here is better, by its median, and in which it is not."""
    gains = [(each, each.gain) for each in cells if each.gain is not None]
    ahead = [gain for _, gain in gains if gain > 1]
    lines = [f"- The method here is {better} in {len(ahead)} of {len(gains)} rows that have figures of both."]
    if ahead:
        lines.append(
            f"- There the other takes {min(ahead):.2f} to {max(ahead):.1f} times as much; median {np.median(ahead):.2f}"
        )
    for each, gain in gains:
        if gain <= 1:
            lines.append(f"- {worse.capitalize()}: {each.ours} against {each.peer} ({each.where}): {gain:.2f}.")
    if lost := sum(_lost(each) for each in cells):
        lines.append(
            f"- The other ran out of memory, and the method here did not: {lost} row{'s' if lost > 1 else ''}."
        )
    sides = [each for cell in cells for each in ((cell.ours, cell.ours_failure), (cell.peer, cell.peer_failure))]
    failed = sorted({f"{name} ({failure})" for name, failure in sides if failure})
    return [*lines, *_left_out(cells), *(f"- Failed: {each}." for each in failed)]


def _lost(cell: Cell) -> bool:
    """Whether the other had no room where the method here had."""
    return cell.peer_failure == OUT_OF_MEMORY and not cell.ours_failure


def _summary(times: Sequence[TimeCell], memory: Sequence[MemoryCell]) -> str:
    """A row a pair, over all places."""
    rows = []
    pairs = dict.fromkeys((each.ours, each.peer) for each in [*times, *memory])
    for pair in pairs:
        kinds: list[list[TimeCell] | list[MemoryCell]] = [
            [each for each in times if (each.ours, each.peer) == pair],
            [each for each in memory if (each.ours, each.peer) == pair],
        ]
        found = [text for cells in kinds for text in (_range(cells), str(sum(map(_lost, cells)) or ""))]
        if any(found):
            rows.append([*pair, *found])
    return markdown_table(["here", "other", "time", "out of memory", "memory", "out of memory"], rows)


def _range(cells: _Cells) -> str:
    """The gains of one pair."""
    gains = sorted(each.gain for each in cells if each.gain is not None)
    if not gains:
        return ""
    low, median, high = (
        f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in (gains[0], np.median(gains), gains[-1])
    )
    return f"{low} to {high} ({median}, {len(gains)})"


def _overviews(cells: _Cells, what: str) -> list[str]:
    """For each model, a table of how many times as much the other takes: pairs down, places along."""
    parts: list[str] = []
    for model in sorted({each.model for each in cells}, reverse=True):  # the small one first
        said = {each.key: text for each in cells if each.model == model and (text := _in_short(each))}
        rows = [each for each in cells if each.key in said]
        if not rows:
            continue
        places = sorted({(each.size, each.batch) for each in rows})
        by_pair: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
        for each in rows:
            by_pair.setdefault((each.ours, each.peer), {})[each.size, each.batch] = said[each.key]
        table = [[*names, *(found.get(place, "") for place in places)] for names, found in by_pair.items()]
        header = ["here", "other", *(f"{size} px, {batch}" for size, batch in places)]
        parts += [
            f"{what} of the other over {what.lower()} here, {model.partition('_patch')[0]}, by pixels and batch; bold "
            "where the other is ahead or level; *room* where it ran out of memory, and the method here did not:\n",
            markdown_table(header, table),
            "",
        ]
    return parts


def _in_short(cell: TimeCell | MemoryCell) -> str:
    """A cell in the overview."""
    if cell.gain is None:
        return "*room*" if _lost(cell) else ""
    figure = f"{cell.gain:.2f}"
    return figure if float(figure) > 1 else f"**{figure}**"


def _left_out(cells: Sequence[Cell]) -> list[str]:
    """How many rows were left out, and where; a line for those of too much time, and one for each other reason."""
    reasons: dict[str, Counter[str]] = {}
    for each in cells:
        if each.left_out:
            reason = "by time" if BY_TIME in each.left_out else f"({each.left_out})"
            reasons.setdefault(reason, Counter())[each.where] += 1
    return [
        f"- Left out {reason}: {places.total()} of {len(cells)} rows: "
        + "; ".join(f"{where} ({count})" for where, count in places.items())
        + "."
        for reason, places in reasons.items()
    ]


def _plain_failures(cells: Iterable[TimeCell]) -> list[str]:
    """Which plain passes failed, and where."""
    places: dict[str, dict[str, None]] = {}
    for each in cells:
        if each.plain_failure:
            places.setdefault(each.plain_failure, {})[each.where] = None
    return [f"- Nothing is compared with {failure}: {'; '.join(where)}." for failure, where in places.items()]


def _naive_sentence(cells: Sequence[MemoryCell]) -> list[str]:
    """Whether naive recipes take as much more memory as they are to take; nothing without a row that could say."""
    rows = [each for each in cells if each.size == LARGE and each.pair.startswith("naive_")]
    if not rows:
        return []
    claim = f"- At {LARGE} pixels the naive recipes take at least {NAIVE_AT_LEAST} times as much"
    gains = [(each.gain, each) for each in rows if each.gain is not None]
    if not gains:
        return [f"{claim}: **not met**, no row has figures of both."]
    smallest, cell = min(gains, key=lambda each: each[0])
    return [
        f"{claim}: **{'met' if smallest >= NAIVE_AT_LEAST else 'not met'}**, smallest {smallest:.3g} "
        f"({cell.ours}, {cell.where}); {len(gains)} of {len(rows)} rows have figures of both."
    ]


def _time_table(cells: Iterable[TimeCell]) -> str:
    header = ["here", "peer", "model", "px", "batch", "rounds", "forward ms", "here ms", "peer ms", "here × forward"]
    header += ["peer × forward", "here × forward + backward", "peer × forward + backward", "peer ÷ here", "alike"]
    rows = []
    for each in cells:
        seconds = [each.forward_seconds, each.ours_seconds, each.peer_seconds]
        spreads = [each.ours_forward, each.peer_forward, each.ours_backward, each.peer_backward, each.speedup]
        alike = each.failure if each.likeness is None else "{:.3f}, {:.1g}".format(*each.likeness)
        milliseconds = ["" if value is None else f"{1000 * value:.0f}" for value in seconds]
        rows.append([*each.place, str(each.rounds), *milliseconds, *map(_spread, spreads), alike])
    return markdown_table(header, rows)


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else "{1:.2f} [{0:.2f}, {2:.2f}]".format(*spread)


def _memory_table(cells: Iterable[MemoryCell]) -> str:
    header = ["here", "peer", "model", "px", "batch", "forward", "forward + backward", "here", "peer", "peer ÷ here"]
    rows = []
    for each in cells:
        figures = [each.forward_mebibytes, each.backward_mebibytes, each.ours_mebibytes, each.peer_mebibytes]
        ratio = each.failure if each.gain is None else f"{each.gain:.2f}"
        rows.append([*each.place, *("" if value is None else f"{value:.0f}" for value in figures), ratio])
    return markdown_table(header, rows)


def _facts(cells: Sequence[Cell]) -> list[str]:
    """Commands and machines, each once."""
    lines = dict.fromkeys(line for each in cells for line in each.facts.split("\n\n"))
    loads = [each.load for each in cells if isinstance(each, TimeCell)]
    weights = sorted({f"{each.model}: {each.weights}" for each in cells if isinstance(each, TimeCell)})
    if loads:
        lines[f"Load average {min(loads)} to {max(loads)} before the runs. Weights: {', '.join(weights)}."] = None
    return ["\n\n".join(lines)]
