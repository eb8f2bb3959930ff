"""Examples before their files are opened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from ..errors import InputError
from ..files import as_text
from .example import Example
from .masks import MaskSource

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the upright picture, edges exclusive."""


@dataclass(frozen=True)
class Entry(ABC):
    """What a reader knows of an example from the metadata alone; small, and fit to be sent to another process.

    Attributes:
        name: the example's name; what of a file's name is no text is written out.
    """

    name: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", as_text(self.name))

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files without which there is no example."""

    @abstractmethod
    def load(self) -> Example:
        """The example, with its annotation read.

        Raises:
            InputError: the annotation's files cannot be used.
        """


@dataclass(frozen=True)
class FileEntry(Entry):
    """A picture in a file of its own.

    Attributes:
        image: the file.
        labels: see `Example`.
        mask: where the mask comes from.
        boxes: see `Example`.
        size: height and width, as the metadata has it.
    """

    image: Path
    labels: tuple[int, ...] = ()
    mask: MaskSource | None = None
    boxes: tuple[Box, ...] | None = None
    size: tuple[int, int] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.image, *(() if self.mask is None else self.mask.files))

    def load(self) -> Example:
        mask = None if self.mask is None else self.mask.read()
        boxes = None if self.boxes is None else np.array(self.boxes, np.float64).reshape(-1, 4)
        return Example(self.name, self.image, self.labels, mask, boxes, self.size)


class ExampleSequence(Sequence[Example]):
    """Examples whose names are known without opening any."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of the examples, in their order."""

    @abstractmethod
    def select(self, indices: Sequence[int]) -> ExampleSequence:
        """The examples at these places, in this order."""

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> ExampleSequence: ...

    def __getitem__(self, index: int | slice) -> Example | ExampleSequence:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._load(index)

    @abstractmethod
    def _load(self, index: int) -> Example: ...


class Examples(ExampleSequence):
    """The examples of a data set: what a reader gives. Masks and pictures are opened when an example is asked for.

    Args:
        entries: what is known of them from the metadata.
        notes: what was left out, in sentences; empty if nothing was.

    Raises:
        InputError: two entries have one name.
    """

    def __init__(self, entries: Sequence[Entry], notes: Sequence[str] = ()) -> None:
        self.entries = tuple(entries)
        self.notes = tuple(notes)
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise InputError(
                f"found {len(twice)} names more than once, such as {twice[0]!r}, expected one record an example; "
                "remove the repetitions from the metadata"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    def select(self, indices: Sequence[int]) -> Examples:
        return Examples([self.entries[index] for index in indices], self.notes)

    def __len__(self) -> int:
        return len(self.entries)

    def _load(self, index: int) -> Example:
        return self.entries[index].load()
