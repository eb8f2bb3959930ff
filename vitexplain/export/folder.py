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
from ..files import distinct_names, write_parquet, write_whole
from .pipeline import ShardTask
from .rows import rows_table
from .settings import ExportSettings
from .shard import MapShape, ShardResult
from .views import SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

_DIGEST = b"scores_sha256"


class ExportFolder:
    """The files of an export.

    ::

        manifest.json            what was exported, with what
        inputs.parquet           the images, in order
        scores.zarr/METHOD       (images, targets, h, w), sharded
        rows/000000.parquet      one row for each image, method and target of a shard
        views/000000/…           pictures of a shard

    A shard is committed by its file of rows, which comes last and holds the digest of its scores. Without that file, or
    where the digest does not fit, the shard counts as not there, and is written anew over what is left of it.

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

    def rows(self, shard: int) -> Path:
        """The rows of a shard; it is committed where this file is."""
        return self.path / "rows" / f"{shard:06d}.parquet"

    def create_arrays(self, images: int, shapes: Mapping[str, MapShape]) -> None:
        """Makes the empty arrays of a fresh export.

        Raises:
            ExportError: they cannot be made, or the folder holds results of something else.
        """
        import zarr
        from zarr.codecs import ZstdCodec

        if (self.path / "rows").exists() or (self.path / "views").exists():
            raise ExportError(
                f"the folder {str(self.path)!r} holds rows or views but no manifest.json, so it is no export that can "
                "be continued; choose another folder"
            )
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

    def is_committed(self, task: ShardTask) -> bool:
        """Whether a shard is there as it was committed; with `retry_failed`, also without failures."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(self.rows(task.index), page_checksum_verification=True)
            stored = self._stored(task)
        except (OSError, ValueError, KeyError, RuntimeError, pa.ArrowException):  # RuntimeError: a chunk's checksum
            return False
        if (table.schema.metadata or {}).get(_DIGEST) != _digest(stored).encode():
            return False
        if self.settings.retry_failed and table["error"].null_count < len(table):
            return False
        return all((self.path / view).is_file() for view in table["view"].to_pylist() if view is not None)

    def commit(self, task: ShardTask, result: ShardResult) -> None:
        """Writes the pictures and scores of a shard, and then the rows that make it count.

        Raises:
            ExportError: something cannot be written; the shard then counts as not there.
        """
        self.rows(task.index).unlink(missing_ok=True)
        views = self._write_views(task, result)
        stored, scales = {}, {}
        for label, scores in result.scores.items():
            stored[label], scales[label] = quantised(scores, self.settings.dtype)
        try:
            group = self._group()
            for label, values in stored.items():
                group[label][task.start : task.start + len(values)] = values
                _to_disk(self.scores / label / "c" / str(task.index) / "0" / "0" / "0")
        except OSError as error:
            raise _unwritable(self.scores, error) from error
        table = rows_table(result, task.entries, task.start, self.labels, scales, views)
        write_parquet(table.replace_schema_metadata({_DIGEST: _digest(stored)}), self.rows(task.index))

    def tidy(self) -> None:
        """Removes what killed processes left half written. Only for the one process that holds the folder."""
        for pattern in (".*.part", "rows/.*.part", "views/*/.*.part", "scores.zarr/**/*.partial"):
            for part in self.path.glob(pattern):
                part.unlink(missing_ok=True)

    def failures(self, shards: Iterable[int]) -> list[tuple[str, str]]:
        """Path and reason of each image in committed shards that could not be explained."""
        import pyarrow.parquet as pq

        found: dict[int, tuple[str, str]] = {}
        for shard in shards:
            table: pa.Table = pq.read_table(self.rows(shard), columns=["image", "path", "error"])
            for row in table.filter(table["error"].is_valid()).to_pylist():
                found[row["image"]] = (row["path"], row["error"])
        return list(found.values())

    def _write_views(self, task: ShardTask, result: ShardResult) -> dict[tuple[int, str, int], str]:
        """Writes the pictures; returns where, relative to the folder."""
        folder = f"views/{task.index:06d}"
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
