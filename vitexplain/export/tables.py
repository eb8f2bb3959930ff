"""Lists and tables of images: text with a path a line, CSV, Parquet."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, VitExplainError
from .entries import Entry
from .storage import is_url, name_of, read_bytes

TABLE_SUFFIXES = frozenset({".txt", ".csv", ".parquet"})
"""Suffixes of files that name images (lower case)."""


@dataclass(frozen=True)
class TableColumns:
    """How tables are read.

    Attributes:
        path: the column with paths or URLs.
        target: the column with the class explained, index or name; where a cell is empty, the predicted class is. A
            table need not have the column ``"target"``, but has to have one of another name. None: no column is, so
            that no table names a class.
        root: folder or URL that relative paths start from; None for the one that holds the table.
    """

    path: str = "path"
    target: str | None = "target"
    root: str | None = None


def entries_of_table(file: str, columns: TableColumns, class_index: Callable[[str], int]) -> Iterator[Entry]:
    """The images that a list or table names; whether they are there is seen when they are read.

    A target that is no class of the model makes its entry a failed one, and no other.

    Args:
        file: path or URL.
        columns: how to read it.
        class_index: the class that a target names.

    Raises:
        InputError: the table cannot be read, or lacks a column.
    """
    root = columns.root if columns.root is not None else _folder(file)
    for number, row in enumerate(_rows(file, columns), 1):
        path = row.get(columns.path)
        if path is None or not str(path).strip():
            yield Entry(f"{file}, row {number}", file, number, 0, error=f"{file!r}, row {number}: the path is empty")
            continue
        location = _joined(root, str(path))
        target = None if columns.target is None else row.get(columns.target)
        if target is None or not str(target).strip() or target != target:  # Parquet writers use NaN for an empty cell
            yield Entry(str(path), location)
            continue
        try:
            yield Entry(str(path), location, target=class_index(_class_text(target)))
        except VitExplainError as error:
            yield Entry(str(path), location, error=f"{file!r}, row {number}: {error}")


def _rows(file: str, columns: TableColumns) -> Iterator[Mapping[str, Any]]:
    suffix = name_of(file).suffix.lower()
    try:
        content = read_bytes(file)
        if suffix == ".parquet":
            yield from _parquet_rows(file, content, columns)
            return
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ImportError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the table {file!r} cannot be read: {type(error).__name__}: {error}. Expected UTF-8 text or Parquet"
        ) from error
    if suffix == ".txt":
        yield from ({columns.path: line} for line in text.splitlines() if line.strip())
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]  # "path, target" has the column target
        _check_columns(file, columns, reader.fieldnames)
        yield from reader
    except csv.Error as error:
        raise InputError(f"{file!r}, line {reader.line_num}: {error}; expected comma-separated values") from error


def _parquet_rows(file: str, content: bytes, columns: TableColumns) -> Iterator[Mapping[str, Any]]:
    from .extra import require

    require("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source = pq.ParquetFile(io.BytesIO(content))
        names = source.schema_arrow.names
        _check_columns(file, columns, names)
        for batch in source.iter_batches(columns=[each for each in (columns.path, columns.target) if each in names]):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"the table {file!r} cannot be read: {error}. Expected a Parquet file") from error


def _check_columns(file: str, columns: TableColumns, names: Sequence[str]) -> None:
    """Makes sure that a column which was meant is not taken for none, so that other classes would be explained."""
    found = ", ".join(map(repr, names)) or "none"
    if columns.path not in names:
        raise InputError(
            f"{file!r} has no column {columns.path!r}, found {found}; name the column of paths with --path-column"
        )
    if columns.target is None or columns.target in names:
        return
    meant = [name for name in names if name.strip().lower() == columns.target.lower()]
    if meant or columns.target != TableColumns.target:
        raise InputError(
            f"{file!r} has no column {columns.target!r}, found {found}; name the column of classes with --target-column"
        )


def _folder(file: str) -> str:
    return posixpath.dirname(file) if is_url(file) else os.path.dirname(os.path.abspath(file))


def _joined(root: str, path: str) -> str:
    if is_url(path):
        return path
    if is_url(root):
        return posixpath.join(root, path)
    return os.path.abspath(os.path.join(root, os.path.expanduser(path)))


def _class_text(target: Any) -> str:
    """Numbers as pandas writes a column of whole numbers with gaps: 3.0 is class 3."""
    if isinstance(target, float) and target.is_integer():
        return str(int(target))
    text = str(target).strip()
    return text[:-2] if text.endswith(".0") and text[:-2].isdecimal() else text
