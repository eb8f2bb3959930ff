"""Cells of the table of peers: what they hold, and the CSV files they are kept in."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor

from vitexplain.files import write_whole

BY_TIME = "more than --longest"
"""What the reason of a row that is left out says where it would take too long."""

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


def write_cells(kind: type[_Cell], cells: Sequence[_Cell], folder: Path) -> None:
    """Writes the CSV file; every value in it is JSON, so that numbers, lists, text and nothing are told apart."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: json.dumps(value) for name, value in asdict(each).items()} for each in cells)
    write_whole(folder / kind.file, lambda file: file.write(text.getvalue().encode()))
