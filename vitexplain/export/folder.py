"""`ExportFolder`: where an export lies, and how a shard is committed: whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import ExportError
from ..files import distinct_names, read_parquet, write_parquet, write_whole
from ..own_pictures import VIEWS
from .pipeline import ShardTask
from .rows import rows_table
from .settings import ExportSettings
from .shard import MapShape, ShardResult
from .views import SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

_SCORES, _PICTURES = b"scores_sha256", b"views_sha256"


class ExportFolder:
    """The files of an export.

    ::

        manifest.json            what was exported, with what
        inputs.parquet           the images, in order
        scores.zarr/METHOD       (images, targets, h, w), sharded
        rows/000000.parquet      one row for each image, method and target of a shard
        views/000000/…           pictures of a shard

    A shard is committed by its file of rows, which comes last and holds the digests of its scores and pictures. Without
    that file, or where a digest does not fit, the shard counts as not there, and is written anew over what is left.

    Args:
        path: the folder.
        settings: of the export.
        labels: class names of the model, where known.
    """

    def __init__(self, path: Path, settings: ExportSettings, labels: Sequence[str] | None = None) -> None:
        self.path, self.settings, self.labels = path, settings, labels

    @property
    def manifest(self) -> Path:
        """The file of the manifest; where it is, `inputs` and `scores` are, too."""
        return self.path / "manifest.json"

    @property
    def inputs(self) -> Path:
        """The table of the images."""
        return self.path / "inputs.parquet"

    @property
    def scores(self) -> Path:
        """The Zarr group with one array a method."""
        return self.path / "scores.zarr"

    @property
    def unfinished_start(self) -> Path:
        """A mark that is there until the first manifest is: what lies beside it was begun here."""
        return self.path / ".unfinished-start"

    def rows(self, shard: int) -> Path:
        """The rows of a shard; it is committed where this file is."""
        return self.path / "rows" / f"{shard:06d}.parquet"

    def claim(self) -> None:
        """Makes sure that a fresh export writes over nobody's files, and marks the folder as begun.

        Raises:
            ExportError: it holds something under a name that an export needs.
        """
        needed = (self.inputs, self.scores, self.path / "rows", self.path / VIEWS)
        there = [each.name for each in needed if each.exists()]
        if there and not self.unfinished_start.exists():
            raise ExportError(
                f"the folder {str(self.path)!r} holds {' and '.join(there)} but no manifest.json, so it is no export "
                "that can be continued, and nothing there is written over; choose another folder"
            )
        write_whole(self.unfinished_start, lambda file: None)

    def create_arrays(self, images: int, shapes: Mapping[str, MapShape]) -> None:
        """Makes the empty arrays of a fresh export.

        Raises:
            ExportError: they cannot be made.
        """
        import zarr
        from zarr.codecs import ZstdCodec

        size, targets = self.settings.shard_size, self.settings.num_targets
        codec = ZstdCodec(level=3, checksum=True)
        try:
            group = zarr.open_group(self.scores, mode="w", zarr_format=3)
            for label, shape in shapes.items():
                group.create_array(
                    label,
                    shape=(images, targets, *shape.grid),
                    shards=(size, targets, *shape.grid),
                    chunks=(_chunk(size), targets, *shape.grid),
                    dtype=self.settings.dtype,
                    compressors=codec,
                    fill_value=float("nan"),
                    dimension_names=("image", "target", "row", "column"),
                    attributes={"signed": shape.signed},
                )
        except OSError as error:
            raise _unwritable(self.scores, error) from error

    def missing(self, task: ShardTask) -> Sequence[int]:
        """Places of the images that are to be computed: all of a shard that is not there as it was committed.

        With `retry_failed`, those that failed, of one that is.
        """
        import pyarrow as pa

        try:
            table, stored = self._table(task), self._stored(task)
            known = {name: (table.schema.metadata or {}).get(name) for name in (_SCORES, _PICTURES)}
            intact = known[_SCORES] == _digest(stored).encode() and known[_PICTURES] == self._pictures(table).encode()
        except (OSError, ValueError, KeyError, RuntimeError, pa.ArrowException):  # RuntimeError: a chunk's checksum
            intact = False
        if not intact:
            return range(len(task.entries))
        if not self.settings.retry_failed:
            return ()
        failed = table.filter(table["error"].is_valid())
        return sorted({image - task.start for image in failed["image"].to_pylist()})

    def commit(self, task: ShardTask, result: ShardResult) -> None:
        """Writes the pictures and scores of a shard, and then the rows that make it count.

        Of a task that is not a whole shard, what is committed of the other images stays.

        Raises:
            ExportError: something cannot be written; the shard then counts as not there.
        """
        kept = None if task.is_whole else (self._table(task), self._stored(task))
        views = self._write_views(task, result)
        stored, scales = {}, {}
        for label, scores in result.scores.items():
            stored[label], scales[label] = quantised(scores, self.settings.dtype)
        table = rows_table(result, task.entries, task.start, self.labels, scales, views)
        if kept is not None:
            table, stored = _merged(*kept, table, stored, task)
        self.rows(task.index).unlink(missing_ok=True)
        try:
            group = self._group()
            for label, values in stored.items():
                group[label][task.start : task.start + len(values)] = values
                _to_disk(self.scores / label / "c" / str(task.index) / "0" / "0" / "0")
            digests = {_SCORES: _digest(stored), _PICTURES: self._pictures(table)}
        except OSError as error:
            raise _unwritable(self.scores, error) from error
        write_parquet(table.replace_schema_metadata(digests), self.rows(task.index))

    def tidy(self) -> None:
        """Removes what killed processes left half written. Only for the one process that holds the folder."""
        for pattern in (".*.part", "rows/.*.part", "views/*/.*.part", "scores.zarr/**/*.partial"):
            for part in self.path.glob(pattern):
                part.unlink(missing_ok=True)

    def failures(self, shards: Iterable[int]) -> list[tuple[str, str]]:
        """Path and reason of each image in committed shards that could not be explained."""
        found: dict[int, tuple[str, str]] = {}
        for shard in shards:
            table = read_parquet(self.rows(shard), ["image", "path", "error"])
            for row in table.filter(table["error"].is_valid()).to_pylist():
                found[row["image"]] = (row["path"], row["error"])
        return list(found.values())

    def _write_views(self, task: ShardTask, result: ShardResult) -> dict[tuple[int, str, int], str]:
        """Writes the pictures; returns where, relative to the folder."""
        folder = f"{VIEWS}/{task.index:06d}"
        if task.is_whole:
            shutil.rmtree(self.path / folder, ignore_errors=True)  # of a run that was killed
        methods = {label: number for number, label in enumerate(result.scores)}
        places = {}
        for (position, label, target), content in sorted(result.views.items()):
            stem = distinct_names([Path(task.entries[position].path).stem])[0]
            index = int(result.columns["class"][position, methods[label], target])
            name = f"{task.start + position:07d}-{stem}-{label}-{target}-{index}{SUFFIXES[self.settings.view_format]}"
            write_whole(self.path / folder / name, partial(_write, content))
            places[position, label, target] = f"{folder}/{name}"
        return places

    def _table(self, task: ShardTask) -> pa.Table:
        """The committed rows of a shard."""
        return read_parquet(self.rows(task.index))

    def _pictures(self, table: pa.Table) -> str:
        """The digest of the pictures that rows name."""
        sha = hashlib.sha256()
        for view in table["view"].drop_null().to_pylist():
            sha.update((self.path / view).read_bytes())
        return sha.hexdigest()

    def _stored(self, task: ShardTask) -> dict[str, npt.NDArray[Any]]:
        rows = slice(task.start, task.start + len(task.entries))
        group = self._group()
        return {label: np.asarray(group[label][rows]) for label in sorted(group.array_keys())}

    def _group(self) -> Any:
        import zarr

        return zarr.open_group(self.scores, mode="r+")


def quantised(
    scores: npt.NDArray[np.float32], dtype: str
) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.float32]]:
    """Scores as they are stored, and what has to be multiplied with them.

    Half precision keeps 11 bits between 6e-5 and 65504 only; so each map is brought below 1 by a power of two, which
    costs nothing.

    Args:
        scores: (n, K, h, w).
        dtype: ``"float32"`` or ``"float16"``.

    Returns:
        (n, K, h, w) of that type, and (n, K) factors.
    """
    if dtype == "float32":
        return scores, np.ones(scores.shape[:2], np.float32)
    largest = np.where(np.isfinite(scores), np.abs(scores), 0).max((2, 3))
    _, exponents = np.frexp(largest)
    scales = np.ldexp(np.float32(1), np.where(largest > 0, exponents, 0)).astype(np.float32)
    return (scores / scales[:, :, None, None]).astype(np.float16), scales


def _merged(
    table: pa.Table,
    stored: Mapping[str, npt.NDArray[Any]],
    new_table: pa.Table,
    new_stored: Mapping[str, npt.NDArray[Any]],
    task: ShardTask,
) -> tuple[pa.Table, dict[str, npt.NDArray[Any]]]:
    """Rows and scores of a shard, new where the task computed them."""
    import pyarrow as pa

    new = np.zeros(len(task.entries), bool)
    new[list(task.positions)] = True
    both = pa.concat_tables([table.replace_schema_metadata(None), new_table])
    rows = np.arange(len(table)) + len(table) * np.repeat(new, len(table) // len(new))
    scores = {label: np.where(new[:, None, None, None], values, stored[label]) for label, values in new_stored.items()}
    return both.take(rows), scores


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _digest(stored: Mapping[str, npt.NDArray[Any]]) -> str:
    sha = hashlib.sha256()
    for label, values in sorted(stored.items()):
        sha.update(f"{label} {values.dtype.str} {values.shape}".encode())
        sha.update(np.ascontiguousarray(values).tobytes())
    return sha.hexdigest()


def _chunk(shard_size: int) -> int:
    """Images in one compressed piece: a divisor of the shard, so that one map is read without the whole shard."""
    return next(size for size in range(min(32, shard_size), 0, -1) if shard_size % size == 0)


def _to_disk(path: Path) -> None:
    """Forces a file to the disk before the rows that vouch for it."""
    if not path.exists():  # nothing but NaN is not stored
        return
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _unwritable(path: Path, error: OSError) -> ExportError:
    return ExportError(
        f"cannot write {str(path)!r}: {type(error).__name__}: {error.strerror or error}. Check that the folder can be "
        "written to and has room; running again goes on from here"
    )
