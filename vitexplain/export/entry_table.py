"""The images of an export as a table, so that its folder knows them without its inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import read_parquet
from .entries import Entry
from .rows import printable

if TYPE_CHECKING:
    import pyarrow as pa

_TEXTS = ("path", "location", "error")


def table_of_entries(entries: Sequence[Entry]) -> pa.Table:
    """One row an image, in order; the columns are the fields of `Entry`."""
    import pyarrow as pa

    columns = {}
    for field in fields(Entry):
        values = [getattr(entry, field.name) for entry in entries]
        if field.name in _TEXTS:
            columns[field.name] = pa.array([None if each is None else printable(each) for each in values], pa.string())
        else:
            columns[field.name] = pa.array(values, pa.int64())
    return pa.table(columns)


def read_entries(path: str | os.PathLike[str]) -> list[Entry]:
    """The images that `table_of_entries` was given; a path that is no text has its escapes.

    Raises:
        InputError: the table cannot be read.
    """
    import pyarrow as pa

    try:
        return [Entry(**row) for row in read_parquet(Path(path)).to_pylist()]
    except (OSError, pa.ArrowException, TypeError) as error:
        raise InputError(
            f"cannot read {os.fspath(path)!r}: {type(error).__name__}: {error}; expected the images of an export"
        ) from error
