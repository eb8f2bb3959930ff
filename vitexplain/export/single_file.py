"""An export as one file: NumPy's `.npz`, or HDF5."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..errors import InputError
from ..files import write_whole
from .extra import require

if TYPE_CHECKING:
    import h5py

    from .results import HeatmapExport

_HDF5_SUFFIXES = (".h5", ".hdf5")


def save_export(export: HeatmapExport, path: Path) -> Path:
    """Writes a finished export into one file, whole or not at all.

    For n images and K targets, it holds ``scores/METHOD`` (n, K, h, w) float32, NaN where an image failed; ``class``
    (n, K) int64, -1 there; ``probability`` (n, K) float64, NaN there; ``path`` and ``error`` (n,) texts.

    Args:
        export: the export.
        path: ``.npz``, which has to fit into memory; or ``.h5`` or ``.hdf5``, which does not.

    Raises:
        InputError: another suffix, or the export is not finished.
        ExportError: the file cannot be written.
    """
    check_kind(path)
    if not export.complete:
        raise InputError(f"the export in {str(export.folder)!r} is not finished: run it again to go on, then save it")
    write = _write_hdf5 if path.suffix.lower() in _HDF5_SUFFIXES else _write_npz
    return write_whole(path, lambda file: write(export, file))


def check_kind(path: Path) -> None:
    """Makes sure that a file of this suffix can be written here, before there is anything to write.

    Raises:
        InputError: another suffix.
        VitExplainError: the package for HDF5 is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npz", *_HDF5_SUFFIXES):
        raise InputError(f"found suffix {path.suffix!r} in {str(path)!r}, expected .npz, .h5 or .hdf5")
    if suffix in _HDF5_SUFFIXES:
        require("h5py")


def _write_npz(export: HeatmapExport, file: BinaryIO) -> None:
    arrays: dict[str, Any] = {
        f"scores/{method}": np.concatenate(list(_scores(export, method))) for method in export.methods
    }
    np.savez_compressed(file, **(arrays | _figures(export)))


def _write_hdf5(export: HeatmapExport, file: BinaryIO) -> None:
    import h5py

    with _Disk(file.name, "w+") as disk:  # opened anew: HDF5 has to read what it writes
        try:
            with h5py.File(disk, "w") as target:
                for method in export.methods:
                    _write_scores(export, method, target, disk)
                for name, values in _figures(export).items():
                    texts = values.dtype.kind == "U"
                    target.create_dataset(name, data=values.astype(object) if texts else values)
        finally:
            disk.check()


class _Disk(io.FileIO):
    """A file whose failed writes are told afterwards: HDF5 crashes where it learns of one while it closes its file."""

    failure: OSError | None = None

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        count = len(left)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self.failure = self.failure or error
        return count

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0

    def check(self) -> None:
        """Raises what the first write that failed raised."""
        if self.failure is not None:
            raise self.failure


def _write_scores(export: HeatmapExport, method: str, target: h5py.File, disk: _Disk) -> None:
    size, targets = len(export), export.settings.num_targets
    grid = tuple(export.manifest["methods"][method]["grid"])
    chunks = (min(size, 32), targets, *grid)
    dataset = target.create_dataset(
        f"scores/{method}", (size, targets, *grid), np.float32, chunks=chunks, compression="gzip", fletcher32=True
    )
    start = 0
    for scores in _scores(export, method):
        dataset[start : start + len(scores)] = scores
        disk.check()
        start += len(scores)


def _scores(export: HeatmapExport, method: str) -> Iterator[np.ndarray[Any, Any]]:
    return (export.all_scores(method, shard) for shard in range(export.num_shards))


def _figures(export: HeatmapExport) -> dict[str, Any]:
    """What there is of each image and target, whatever the method: rows of the first one."""
    table = export.table(["path", "class", "probability", "error"])
    shape = (len(export), len(export.methods), export.settings.num_targets)

    def first(name: str, values: Any) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = np.asarray(values).reshape(shape)[:, 0]
        return found[:, 0].astype(str) if name in ("path", "error") else found

    return {
        "class": first("class", table["class"].fill_null(-1)),
        "probability": first("probability", table["probability"].fill_null(float("nan"))),
        "path": first("path", table["path"]),
        "error": first("error", table["error"].fill_null("")),
    }
