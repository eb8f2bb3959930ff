"""What a reader of a data set is: options, and a way from a folder to examples."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..errors import InputError
from ..options import Configurable, option
from .classes import ModelClasses, match_categories
from .entries import Entry, Examples

if TYPE_CHECKING:
    from .catalogue import DatasetInfo

_FEW = 3  # of many names, how many an error lists


@dataclass(frozen=True)
class Reader(Configurable):
    """Base of all readers: a frozen dataclass whose fields are options, and whose docstring is the documented layout.

    Attributes:
        info: what was said at registration.
    """

    info: ClassVar[DatasetInfo]

    @abstractmethod
    def read(self, root: Path, classes: ModelClasses) -> Examples:
        """The examples of the data set. Metadata is read now, masks and pictures when an example is asked for.

        Args:
            root: the data set's folder or file; the current folder for a data set that needs neither.
            classes: the classes of the model.

        Raises:
            InputError: metadata is missing or wrong, or files that it names are missing.
        """


@dataclass(frozen=True)
class FileReader(Reader):
    """Base of readers whose pictures are files."""

    skip_missing: bool = option(False, "leave out examples whose picture or mask file is missing, instead of stopping")

    def examples(self, root: Path, entries: Sequence[Entry], notes: Iterable[str] = ()) -> Examples:
        """The examples whose files are there.

        Raises:
            InputError: files are missing and `skip_missing` is off, or nothing is left.
        """
        notes = list(notes)
        there = {file: os.path.isfile(file) for entry in entries for file in entry.files}
        kept = [entry for entry in entries if all(there[file] for file in entry.files)]
        missing = [str(file) for file, exists in there.items() if not exists]
        if missing and not self.skip_missing:
            raise InputError(
                f"{len(missing)} of the {len(there)} files that {str(root)!r} should hold are missing: {few(missing)}. "
                "Copy them there, or pass skip_missing=True to leave their examples out"
            )
        if missing:
            notes.append(f"{len(entries) - len(kept)} examples left out: {len(missing)} files are missing")
        if not kept:
            left_out = f" ({'; '.join(notes)})" if notes else ""
            raise InputError(f"{str(root)!r} holds no example{left_out}; expected:\n\n{self.info.layout}")
        return Examples(kept, notes)


@dataclass(frozen=True)
class CategoryReader(FileReader):
    """Base of readers whose objects have categories that need not be the model's classes."""

    class_map: str = option(
        "",
        "JSON file: category to the model's classes that show it, by index, name or WordNet id; empty: the class of "
        "the same name",
    )
    keep_unknown: bool = option(False, "keep objects whose category is no class of the model, without labels")

    def categories(self, names: Iterable[str], classes: ModelClasses) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """The model's classes of each category that is kept, and what to note of the others.

        Raises:
            InputError: no category is a class of the model, or the map cannot be read.
        """
        names = sorted(set(names))
        class_map = Path(self.class_map).expanduser() if self.class_map else None
        matched = match_categories(names, classes, class_map)
        unknown = [name for name in names if not matched[name]]
        if self.keep_unknown or not unknown:
            return matched, []
        if len(unknown) == len(names):
            raise InputError(
                f"none of the {len(names)} categories ({few(names)}) is a class of the model. Pass class_map, a JSON "
                f'file such as {{"{names[0]}": [281, 282]}}, or keep_unknown=True'
            )
        note = f"objects of {len(unknown)} categories left out, which are no classes of the model: {few(unknown)}"
        return {name: labels for name, labels in matched.items() if labels}, [note]


def few(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:_FEW]) + (", …" if len(names) > _FEW else "")
