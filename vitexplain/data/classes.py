"""From the names that data sets give their classes to the classes of the model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import InputError, TargetError, UnknownNameError
from ..models.labels import find_class, read_labels
from .metadata import Record, read_object

_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ModelClasses:
    """The classes of the model.

    Attributes:
        labels: their names in order; None for those of ImageNet-1k.
    """

    labels: tuple[str, ...] | None = None

    @classmethod
    def read(cls, labels: str | os.PathLike[str] | Sequence[str] | None) -> ModelClasses:
        """The classes from names, a file of names, or None for ImageNet-1k.

        Raises:
            InputError: the file is missing or not understood.
        """
        return cls(None if labels is None else tuple(read_labels(labels)))

    @property
    def names(self) -> tuple[str, ...]:
        """The names in order."""
        return imagenet_classes()[1] if self.labels is None else self.labels

    def find(self, name: str) -> int:
        """The class of a name, a WordNet id or an index; underscores count as spaces.

        Raises:
            UnknownNameError: there is no such class, or several.
            TargetError: the index is out of range.
        """
        known = self.names
        if _WORDNET_ID.fullmatch(name) and name not in known:
            return self._find_wordnet_id(name)
        try:
            return find_class(name, known, len(known))
        except UnknownNameError:
            if "_" not in name:
                raise
            return find_class(name.replace("_", " "), known, len(known))

    def check(self, index: int, what: str) -> int:
        """The index, if the model has such a class; without labels nothing is known and anything passes.

        Raises:
            InputError: the model has fewer classes.
        """
        if self.labels is not None and index >= len(self.labels):
            raise InputError(
                f"found {what}, but the labels of the model are {len(self.labels)}; expected class {index} too"
            )
        return index

    def find_in(self, record: Record, name: str) -> int:
        """The same for a name from metadata.

        Raises:
            InputError: there is no such class; the message says where the name stands.
        """
        try:
            return self.find(name)
        except (UnknownNameError, TargetError) as error:
            raise record.fault(f"the class {name!r}", f"a class of the model ({error})") from error

    def values(self, record: Record, value: Any) -> tuple[int, ...]:
        """The classes in a metadata value: an index, a name, or a list of these and of ``[index, name]`` pairs.

        Raises:
            InputError: one of them is no class.
        """
        listed = value if isinstance(value, list) else [value]
        found = set()
        for each in listed:
            # of an [index, name] pair the name is for the reader
            name = each[0] if isinstance(each, list) and len(each) == 2 and isinstance(each[1], str) else each
            if isinstance(name, bool) or not isinstance(name, int | str):
                raise record.fault(f"the class {name!r}", "an index, a name, or a list of them")
            found.add(self.find_in(record, str(name)))
        return tuple(sorted(found))

    def _find_wordnet_id(self, wordnet_id: str) -> int:
        ids, names = imagenet_classes()
        if wordnet_id not in ids:
            raise UnknownNameError(f"{wordnet_id} is none of the {len(ids)} classes of ImageNet-1k")
        index = ids.index(wordnet_id)
        if self.labels is not None:
            label = self.labels[index] if index < len(self.labels) else None
            # a model with other classes, or the same in another order, must not be scored by ImageNet's indices
            if label is None or _parts(label).isdisjoint(_parts(names[index])):
                raise UnknownNameError(
                    f"{wordnet_id} is {names[index]!r}, ImageNet's class {index}, which the model calls {label!r}: its "
                    "classes are not ImageNet's, or in another order"
                )
        return index


@lru_cache(maxsize=1)
def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """WordNet ids and names of the 1000 classes of ImageNet-1k, in order."""
    from timm.data import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    return tuple(info.label_names()), tuple(info.label_descriptions())


def read_class_map(file: Path, classes: ModelClasses) -> dict[str, tuple[int, ...]]:
    """Which classes of the model show objects of a category.

    Args:
        file: a JSON object: category to an index, a name, a WordNet id, or a list of these and of
            ``[index, name]`` pairs.
        classes: the model's classes.

    Raises:
        InputError: the file cannot be read, or names something that is no class.
    """
    record = read_object(file)
    return {
        category: classes.values(Record(file, f"category {category!r}", {}), value)
        for category, value in record.content.items()
    }


def match_categories(
    categories: Iterable[str], classes: ModelClasses, class_map: Path | None
) -> dict[str, tuple[int, ...]]:
    """The model's classes of each category; none where the map, or else the model's names, do not have it.

    Raises:
        InputError: the map cannot be read.
    """
    if class_map is not None:
        known = read_class_map(class_map, classes)
        return {category: known.get(category, ()) for category in categories}
    return {category: _by_name(category, classes) for category in categories}


def _by_name(category: str, classes: ModelClasses) -> tuple[int, ...]:
    try:
        return (classes.find(category),)
    except (UnknownNameError, TargetError):
        return ()


def _parts(label: str) -> set[str]:
    return {part.strip().lower() for part in label.replace("_", " ").split(",")}
