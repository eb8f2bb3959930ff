"""Class names: from files, for ImageNet, and back from a name to its class."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError, TargetError, UnknownNameError

_FEW = 40  # labels that an error message lists in full


def read_labels(labels: str | os.PathLike[str] | Iterable[str] | Mapping[int, str]) -> list[str]:
    """Class names in order.

    Args:
        labels: the names themselves, in order or by index, such as ``config.id2label``; or a file: a JSON list of names
            or of objects with a name (and perhaps an index), a JSON object of names by index, or text with one name a
            line.

    Raises:
        InputError: the file is missing or not understood, or indices are not 0, 1, 2, …
    """
    if isinstance(labels, Mapping):
        try:
            return [str(each) for each in _in_order(dict(labels))]
        except (ValueError, TypeError) as error:
            keys = ", ".join(map(repr, list(labels)[:3]))
            raise InputError(f"found labels by {keys}, …; expected names by class index 0, 1, … ({error})") from error
    if not isinstance(labels, str | os.PathLike):
        return [str(each) for each in labels]
    try:
        text = Path(labels).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the labels file {str(labels)!r} cannot be read: {error}") from error
    if Path(labels).suffix != ".json":
        lines = [line.strip() for line in text.strip().splitlines()]
        if not all(lines):
            # leaving it out would move every name after it to another class
            raise InputError(f"line {lines.index('') + 1} of the labels file {str(labels)!r} is empty, expected a name")
        return lines
    try:
        return [_name(each) for each in _in_order(json.loads(text))]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(
            f"the labels file {str(labels)!r} is not understood ({error}); expected a JSON list of names, a JSON "
            "object of names by class index 0, 1, …, or text with one name a line"
        ) from error


def imagenet_labels(model: nn.Module) -> list[str] | None:
    """ImageNet's names if a timm model has as many classes as one of ImageNet's sets, else None."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model) if getattr(model, "num_classes", 0) else None
    return None if subset is None else list(ImageNetInfo(subset).label_descriptions())


_INDEX = re.compile(r"[+-]?\d{1,18}")  # longer ones Python may refuse to read


def find_class(label: str, labels: Sequence[str] | None, num_classes: int) -> int:
    """The class that a user names: an index, a full label, or a comma-separated part of one ("zebra").

    Args:
        label: what the user wrote; whole numbers are indices.
        labels: class names, where known.
        num_classes: how many classes there are.

    Raises:
        TargetError: the index is out of range.
        UnknownNameError: no class, or several, have this name.
    """
    text = label.strip().lower()
    if _INDEX.fullmatch(text):
        if not 0 <= int(text) < num_classes:
            raise TargetError(
                f"found class {text}, expected 0 to {num_classes - 1}: the model has {num_classes} classes"
            )
        return int(text)
    names = [each.lower() for each in labels or ()]
    parts = [{part.strip() for part in each.split(",")} for each in names]
    for matches in (
        [index for index, each in enumerate(names) if each == text],
        [index for index, each in enumerate(parts) if text in each],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches and labels:
            several = ", ".join(f"{index} ({labels[index]})" for index in matches)
            raise UnknownNameError(f"class {label!r} is ambiguous: {several}. Give the index")
    if not labels:
        raise UnknownNameError(f"class {label!r} cannot be looked up: no labels are known. Give an index, or labels")
    known = set().union(*parts)
    if len(known) <= _FEW:
        raise UnknownNameError.listing("class", label, known)
    close = difflib.get_close_matches(text, sorted(known), n=3, cutoff=0.75)
    hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    raise UnknownNameError(f"no class called {label!r}{hint}. Known: {len(labels)} labels, or an index")


def class_index(given: Any, labels: Sequence[str] | None) -> int:
    """The class that is meant by a name, as `find_class` reads it, or by an index, whose range is not checked here.

    Raises:
        TargetError: it is neither, or a name where no labels are known.
        UnknownNameError: no class, or several, have this name.
    """
    if not isinstance(given, str):
        try:
            return int(given.__index__())
        except AttributeError:
            raise TargetError(f"found the class {given!r}, expected an index or a name") from None
    if _INDEX.fullmatch(given.strip()):
        return int(given)
    if not labels:
        raise TargetError(
            f"found the class {given!r}, but the names of this model's classes are not known: give the index, such as "
            "281, or labels (load_model(…, labels=…), or Subject(adapt(model), preprocessing, labels))"
        )
    return find_class(given, labels, len(labels))


def _in_order(content: Any) -> list[Any]:
    if isinstance(content, dict):
        by_index = {int(key): value for key, value in content.items()}
    elif isinstance(content, list) and content and all(isinstance(each, dict) and "index" in each for each in content):
        by_index = {int(each["index"]): each for each in content}
    elif isinstance(content, list):
        by_index = dict(enumerate(content))
    else:
        raise TypeError(f"found {type(content).__name__}")
    if sorted(by_index) != list(range(len(content))):
        raise ValueError("its indices are not 0, 1, 2, …, each once")
    return [by_index[index] for index in range(len(by_index))]


def _name(entry: Any) -> str:
    """A name from what label files hold: a string, a list ending in one, or an object with a name."""
    if isinstance(entry, dict):
        key = next((key for key in ("name", "names", "label") if key in entry), None)
        if key is None:
            raise ValueError(f"an entry has no name but {', '.join(map(str, entry))}")
        entry = entry[key]
    if isinstance(entry, list):
        entry = ", ".join(entry) if all(isinstance(each, str) for each in entry) else entry[-1]
    if not isinstance(entry, str):
        raise TypeError(f"found {entry!r} where a name is expected")
    return entry
