"""Cells of the table of peers: what they hold, the CSV files they are kept in, and the report that is made of them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor

from vitexplain.files import write_whole

from .measuring import FORWARD, FORWARD_BACKWARD, markdown_table

BY_TIME = "more than --longest"
"""What the reason of a row that is left out says where it would take too long."""
LARGE = 768
"""Image side in pixels from which on attention makes up most of the memory."""
NAIVE_AT_LEAST = 2
"""How many times the memory that naive recipes are to take there."""

Spread = Sequence[float]
"""Lower quartile, median and upper quartile."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pair in one place.

    Attributes:
        model: timm's name.
        weights: trained or random.
        size: image side in pixels.
        batch: number of images.
        threads: number of threads.
        facts: command and machine, as `measuring.machine_facts` gives them.
        pair: its name.
        ours: the method here.
        peer: the other one.
        ours_failure: how the one failed, if it did.
        peer_failure: how the other failed, if it did.
        left_out: why neither was run, if so.
    """

    file: ClassVar[str]
    model: str
    weights: str
    size: int
    batch: int
    threads: int
    facts: str
    pair: str
    ours: str
    peer: str
    ours_failure: str = ""
    peer_failure: str = ""
    left_out: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from other cells."""
        return self.model, self.weights, self.size, self.batch, self.threads, self.pair

    @property
    def place(self) -> list[str]:
        """The first columns of its row."""
        return [self.ours, self.peer, self.model.partition("_patch")[0], str(self.size), str(self.batch)]

    @property
    def where(self) -> str:
        """Model, size and batch, in a sentence."""
        return f"{self.model.partition('_patch')[0]}, {self.size} px, batch {self.batch}"

    @property
    def failure(self) -> str:
        """Why there are no figures, or not those of both."""
        left_out = self.left_out and f"left out: {self.left_out}"
        return "; ".join(filter(None, (left_out, self.ours_failure, self.peer_failure))).replace("|", "/")


def without_places(message: str) -> str:
    """A message without the places of files on this machine."""
    return re.sub(r" ?\(?(/[^\s/()]+){2,}[^\s()]*\)?", "", message)


@dataclass(frozen=True, kw_only=True)
class TimeCell(Cell):
    """CPU times.

    Attributes:
        rounds: how often each side ran, without a call before; where that call would not fit, the one call is cold.
        load: the machine's load average before the run.
        plain_failure: which plain pass failed and how, if one did; nothing is compared with it then.
        forward_seconds: median of the plain forward pass.
        backward_seconds: median of forward and backward.
        ours_seconds: median of the method here.
        peer_seconds: median of the other.
        ours_forward: time of the one as a multiple of the plain forward, within rounds.
        ours_backward: as a multiple of forward and backward.
        peer_forward: the same of the other.
        peer_backward: likewise.
        speedup: time of the other as a multiple of the one's, within rounds.
        likeness: see `likeness`.
    """

    file = "peers_time.csv"
    load: float
    rounds: int = 0
    plain_failure: str = ""
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    ours_seconds: float | None = None
    peer_seconds: float | None = None
    ours_forward: Spread | None = None
    ours_backward: Spread | None = None
    peer_forward: Spread | None = None
    peer_backward: Spread | None = None
    speedup: Spread | None = None
    likeness: Sequence[float] | None = None

    @property
    def gain(self) -> float | None:
        """How many times as long the other takes."""
        return None if self.speedup is None else self.speedup[1]


@dataclass(frozen=True, kw_only=True)
class MemoryCell(Cell):
    """Peaks of memory above model and input, in MiB, each of a process of its own.

    Attributes:
        forward_mebibytes: of the plain forward pass.
        backward_mebibytes: of forward and backward.
        ours_mebibytes: of the method here.
        peer_mebibytes: of the other.
    """

    file = "peers_memory.csv"
    forward_mebibytes: float | None = None
    backward_mebibytes: float | None = None
    ours_mebibytes: float | None = None
    peer_mebibytes: float | None = None

    @property
    def gain(self) -> float | None:
        """How many times as much the other takes."""
        if self.ours_mebibytes is None or self.peer_mebibytes is None:
            return None
        return self.peer_mebibytes / self.ours_mebibytes


_Cell = TypeVar("_Cell", bound=Cell)


def likeness(ours: Tensor, peer: Tensor) -> tuple[float, float]:
    """How alike two maps are: mean rank correlation, and largest difference as a share of a map's range.

    Args:
        ours: (B, M), or (2, B, M) of which each image takes the one that is more alike.
        peer: (B, M).
    """
    from scipy.stats import spearmanr

    correlations, differences = [], []
    for sides, other in zip((ours if ours.ndim == 3 else ours[None]).unbind(1), peer, strict=True):
        found = [(spearmanr(own.numpy(), other.numpy()).statistic, own) for own in sides.float()]
        correlation, own = max(found, key=lambda each: each[0])
        correlations.append(float(correlation))
        differences.append(float((_scaled(own) - _scaled(other.float())).abs().max()))
    return float(np.mean(correlations)), max(differences)


def _scaled(row: Tensor) -> Tensor:
    return (row - row.min()) / (row.max() - row.min())


def read_cells(kind: type[_Cell], folder: Path) -> list[_Cell]:
    """The cells in a folder; none where there is no file."""
    path = folder / kind.file
    if not path.exists():
        return []
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    return [kind(**{name: json.loads(value) for name, value in row.items()}) for row in rows]


def add_cells(kind: type[_Cell], new: Sequence[_Cell], folder: Path, order: Sequence[str]) -> None:
    """Writes cells to a folder, instead of older ones of the same places, and the report anew.

    Every value in the CSV file is JSON, so that numbers, lists, text and nothing are told apart.

    Args:
        kind: of the cells.
        new: the cells.
        folder: where files lie.
        order: of the pairs.
    """
    cells = {each.key: each for each in [*read_cells(kind, folder), *new]}
    rows = sorted(cells.values(), key=lambda each: (each.model, each.size, each.batch, order.index(each.pair)))
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: json.dumps(value) for name, value in asdict(each).items()} for each in rows)
    write_whole(folder / kind.file, lambda file: file.write(text.getvalue().encode()))
    whole = report(read_cells(TimeCell, folder), read_cells(MemoryCell, folder))
    write_whole(folder / "peers.md", lambda file: file.write(whole.encode()))


def report(times: Sequence[TimeCell], memory: Sequence[MemoryCell]) -> str:
    """The figures and what they say as Markdown."""
    parts = ["# Beside other packages\n"]
    if times:
        parts += [_TIME, *_sentences(times, "faster", "slower"), *_plain_failures(times), "", _time_table(times), ""]
    if memory:
        parts += [_MEMORY, *_sentences(memory, "smaller", "larger"), *_naive_sentence(memory)]
        parts += ["", _memory_table(memory), ""]
    return "\n".join([*parts, *_facts([*times, *memory]), ""])


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


def _sentences(cells: Sequence[TimeCell] | Sequence[MemoryCell], better: str, worse: str) -> list[str]:
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
    sides = [each for cell in cells for each in ((cell.ours, cell.ours_failure), (cell.peer, cell.peer_failure))]
    failed = sorted({f"{name} ({failure})" for name, failure in sides if failure})
    return [*lines, *_left_out(cells), *(f"- Failed: {each}." for each in failed)]


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
