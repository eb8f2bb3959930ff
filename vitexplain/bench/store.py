"""The store: one Parquet file a finished cell, found by its key, whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..files import write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

Columns = dict[str, npt.NDArray[Any]]
"""Arrays by name, one row an image: (n, …) of numbers, bool, or (n,) str objects."""

_ABOUT = b"vitexplain"
_SHAPE = b"shape"


class CellStore:
    """Finished cells in a folder.

    A cell is written to a temporary file, forced to the disk and renamed; so a process that is killed leaves it whole
    or not at all. A file whose content does not have the digest that was noted in it counts as not there.

    Args:
        folder: where the cells are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the cell of a key is, or would be."""
        return self.folder / key[:2] / f"{key}.parquet"

    def read(self, key: str) -> Columns | None:
        """The columns of a cell; None where there is none, or none that can be trusted."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(self.path(key), page_checksum_verification=True)
            about, columns = json.loads(table.schema.metadata[_ABOUT]), columns_of(table)
            sound = (about["key"], about["content"]) == (key, _content(columns))
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            return None
        return columns if sound else None

    def write(self, key: str, columns: Columns, about: Mapping[str, Any]) -> None:
        """Commits a cell.

        Args:
            key: of everything that determines the columns.
            columns: one row an image.
            about: JSON-able notes for those who look at the file; they determine nothing.

        Raises:
            ExportError: the file cannot be written.
        """
        write_parquet(table_of(columns, {**about, "key": key, "content": _content(columns)}), self.path(key))

    def tidy(self) -> None:
        """Removes what killed processes left half written. Only for the one process that holds the folder."""
        for part in self.folder.glob("*/.*.part"):
            part.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes all cells."""
        for path in self.folder.glob("*/*.parquet"):
            path.unlink(missing_ok=True)


def table_of(columns: Columns, about: Mapping[str, Any]) -> pa.Table:
    """Arrays as a table; those of several axes become lists of a fixed length, which remember their shape."""
    import pyarrow as pa

    arrays, fields = [], []
    for name, values in columns.items():
        if values.ndim == 1:
            array = pa.array(values, type=pa.string() if values.dtype == object else None)
            fields.append(pa.field(name, array.type))
        else:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            array = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
            fields.append(pa.field(name, array.type, metadata={_SHAPE: json.dumps(values.shape[1:])}))
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata={_ABOUT: json.dumps(about)}))


def columns_of(table: pa.Table) -> Columns:
    """The arrays that `table_of` was given."""
    import pyarrow as pa

    columns: Columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        array = column.combine_chunks()
        if pa.types.is_fixed_size_list(field.type):
            shape = json.loads(field.metadata[_SHAPE])
            columns[field.name] = np.array(array.flatten()).reshape(len(array), *shape)
        else:
            columns[field.name] = np.array(array, object if pa.types.is_string(field.type) else None)
    return columns


def _content(columns: Columns) -> str:
    """SHA-256 of what the columns hold: checksums of pages say nothing of the rest of the file."""
    sha = hashlib.sha256()
    for name, values in columns.items():
        text = values.dtype == object
        sha.update(json.dumps([name, values.dtype.str, values.shape, values.tolist() if text else None]).encode())
        sha.update(b"" if text else np.ascontiguousarray(values).tobytes())
    return sha.hexdigest()
