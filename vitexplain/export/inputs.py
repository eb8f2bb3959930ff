"""What the inputs of an export mean: files, folders, patterns, lists, tables, tar shards; local or remote."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence

from ..errors import InputError
from ..images import IMAGE_SUFFIXES, find_images
from ..own_pictures import is_own_picture
from .entries import Entry
from .storage import find_remote, is_url, name_of
from .tables import TABLE_SUFFIXES, TableColumns, entries_of_table
from .tar_shards import TAR_SUFFIXES, entries_of_tar

Place = str | os.PathLike[str]


def list_entries(
    inputs: Place | Sequence[Place], columns: TableColumns, class_index: Callable[[str], int]
) -> list[Entry]:
    """All images of an export, in the order of the inputs; the same picture with the same target once.

    An input is an image, a folder (searched recursively, in sorted order), a pattern such as ``photos/*.jpg``, a list
    of paths (``.txt``), a table (``.csv``, ``.parquet``), an uncompressed tar shard (``.tar``), or a URL of any of
    these that fsspec understands. A pattern is one of pictures, or of lists, tables and shards. What earlier runs wrote
    is left out where folders and patterns of this machine are searched (`vitexplain.own_pictures`).

    Args:
        inputs: one or several.
        columns: how tables are read.
        class_index: the class that a table's target names.

    Raises:
        InputError: an input is not there, cannot be read, or holds no images; or a pattern fits both.
    """
    inputs = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if not inputs:
        raise InputError("no inputs given: expected at least one image, folder, pattern, list, table or tar shard")
    found: dict[object, Entry] = {}
    for each in map(os.fsdecode, inputs):
        entries = [entry for file in _files(each) for entry in _entries(file, columns, class_index)]
        if not entries:
            raise InputError(f"no images in {each!r}: expected at least one")
        for entry in entries:
            found.setdefault(entry.identity, entry)
    return list(found.values())


def _files(text: str) -> list[str]:
    """The files that one input names; lists, tables and shards among them.

    Raises:
        InputError: as `list_entries`.
    """
    if is_url(text):
        return _of_one_kind(text, find_remote(text, _is_image, lambda path: _is_image(path) or _is_container(path)))
    text = os.path.expanduser(text)
    if os.path.isfile(text):
        return [text]
    containers = sorted(filter(_is_container, glob.glob(text, recursive=True))) if glob.has_magic(text) else []
    try:
        pictures = [os.fspath(path) for path in find_images(text, leave_out=is_own_picture)]
    except InputError:
        if not containers:
            raise
        return containers
    return _of_one_kind(text, [*containers, *(path for path in pictures if not _is_container(path))])


def _of_one_kind(pattern: str, files: list[str]) -> list[str]:
    """The files, where all are pictures, or none is.

    Raises:
        InputError: a file such as ``readme.txt`` would be read as a list, beside pictures or in their place.
    """
    containers = [file for file in files if _is_container(file)]
    if containers and len(containers) < len(files):
        raise InputError(
            f"the pattern {pattern!r} fits {len(files) - len(containers)} pictures, and {len(containers)} lists, "
            f"tables or shards (such as {containers[0]!r}); expected one of them: add a suffix to the pattern, such as "
            "'*.jpg' or '*.tar', or give the folder for the pictures in it"
        )
    return files


def _entries(file: str, columns: TableColumns, class_index: Callable[[str], int]) -> Iterator[Entry]:
    suffix = name_of(file).suffix.lower()
    if suffix in TABLE_SUFFIXES:
        yield from entries_of_table(file, columns, class_index)
    elif suffix in TAR_SUFFIXES:
        yield from entries_of_tar(file)
    else:
        yield Entry(file, file if is_url(file) else os.path.abspath(file))


def _is_image(path: str) -> bool:
    name = name_of(path)
    return name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith(".")


def _is_container(path: str) -> bool:
    return name_of(path).suffix.lower() in TABLE_SUFFIXES | TAR_SUFFIXES
