"""The catalogue of data sets: readers by name, with the layout that each expects."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import InputError, UnknownNameError
from ..options import OptionInfo, configure, options_of
from ..registry import squash
from .classes import ModelClasses
from .entries import Examples
from .reader import Reader

Root = Literal["folder", "file", "nothing"]
"""What a data set is read from."""

Part = Literal["labels", "masks", "boxes"]
"""What the examples of a data set may have."""

_Class = TypeVar("_Class", bound=type[Reader])


@dataclass(frozen=True)
class DatasetInfo:
    """What a reader says about itself.

    Attributes:
        name: catalogue name.
        title: the name people use.
        source: where the data set or its layout is described.
        gives: what the examples may have besides the picture.
        root: what it is read from.
        reader: the class.
        training_split: what the option ``split``, where the reader has one, is to be for training.
    """

    name: str
    title: str
    source: str
    gives: tuple[Part, ...]
    root: Root
    reader: type[Reader]
    training_split: str = "train"

    @property
    def layout(self) -> str:
        """The files it expects, and how it reads them."""
        return inspect.getdoc(self.reader) or ""

    @property
    def options(self) -> tuple[OptionInfo, ...]:
        """The options, in the order of the reader's fields."""
        return options_of(self.reader)


_datasets: dict[str, DatasetInfo] = {}


def register_dataset(
    name: str,
    *,
    title: str,
    source: str,
    gives: Sequence[Part],
    root: Root = "folder",
    training_split: str = "train",
) -> Callable[[_Class], _Class]:
    """Class decorator that adds a reader to the catalogue; see `DatasetInfo` for the arguments.

    Raises:
        ValueError: the name is taken by another class.
    """

    def register(cls: _Class) -> _Class:
        other = _datasets.get(name)
        if other is not None and other.reader.__qualname__ != cls.__qualname__:
            raise ValueError(f"data set name {name!r} is already taken by {other.reader.__qualname__}; choose another")
        _datasets[name] = cls.info = DatasetInfo(name, title, source, tuple(gives), root, cls, training_split)
        return cls

    return register


def list_datasets() -> list[str]:
    """Names of all data sets that can be opened, sorted."""
    _load()
    return sorted(_datasets)


def dataset_info(name: str) -> DatasetInfo:
    """What a reader says about itself. Hyphens, spaces and capitals are forgiven.

    Raises:
        UnknownNameError: no data set has this name; the message lists close matches and all names.
    """
    _load()
    for info in _datasets.values():
        if squash(info.name) == squash(name):
            return info
    raise UnknownNameError.listing("data set", name, _datasets, "Write NAME:PATH, such as voc:data/VOC2012.")


def open_dataset(
    spec: str, *, labels: str | os.PathLike[str] | Sequence[str] | None = None, **options: Any
) -> Examples:
    """The examples of a data set, opened one by one as they are asked for.

    ::

        examples = open_dataset("coco:data/coco", split="val2017", class_map="coco_to_imagenet.json")
        print(len(examples), examples.names[0], examples[0].mask.mean())

    Args:
        spec: ``NAME:PATH``, or ``NAME`` alone for a data set that needs no files; see `list_datasets`.
        labels: what the model's classes are called, in order, or a file of that; None for ImageNet-1k.
        **options: the reader's own, see ``dataset_info(name).options``.

    Raises:
        UnknownNameError: no such data set or option.
        OptionError: a value that an option cannot take.
        InputError: files are missing or metadata is wrong; the message says where and what was expected.
    """
    name, _, path = spec.partition(":")
    info = dataset_info(name)
    reader = configure(info.reader, options)
    return reader.read(_root(info, path), ModelClasses.read(labels))


def _root(info: DatasetInfo, path: str) -> Path:
    if info.root == "nothing":
        if path:
            raise InputError(f"found the path {path!r} for {info.name}, which needs none; write {info.name!r}")
        return Path()
    if not path:
        raise InputError(f"{info.name} needs a {info.root}; write '{info.name}:PATH'. Expected there:\n\n{info.layout}")
    root = Path(path).expanduser()
    if not (root.is_dir() if info.root == "folder" else root.is_file()):
        what = f"no such {info.root}" if not root.exists() else f"no {info.root}"
        raise InputError(f"{str(root)!r} is {what}; expected there:\n\n{info.layout}")
    return root


def _load() -> None:
    package = importlib.import_module("vitexplain.data")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
