"""`HeatmapExport`: reading an export back; scores by image, the table, pictures on demand."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError, UnknownNameError
from ..files import read_parquet
from ..patch_pixels import scaled_extent
from ..preprocessing import Preprocessing
from .entries import Entry, view
from .entry_table import read_entries
from .extra import require
from .folder import ExportFolder
from .manifest import read_manifest
from .rows import printable
from .settings import ExportSettings

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from ..render import Pixels


class HeatmapExport:
    """An export, finished or not: what is committed can be read.

    Attributes:
        folder: where it is.
        manifest: what was exported with what; see `vitexplain.export.manifest`.
        entries: the images, in order.
        settings: what was chosen.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], entries: Sequence[Entry]) -> None:
        self.folder, self.manifest, self.entries = folder, manifest, entries
        chosen = manifest["settings"]
        self.settings = ExportSettings(**{**chosen, "targets": tuple(chosen["targets"])})
        self._files = ExportFolder(folder, self.settings)
        self._last: tuple[int, pa.Table] | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> HeatmapExport:
        """Opens the export in a folder.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        require("zarr", "pyarrow")
        path = Path(folder)
        manifest = read_manifest(path / "manifest.json")
        return cls(path, manifest, read_entries(path / "inputs.parquet"))

    def __len__(self) -> int:
        """How many images there are, those that failed too."""
        return len(self.entries)

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return f"HeatmapExport({str(self.folder)!r}, {len(self)} images, {', '.join(self.methods)}{state})"

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, by the names that their scores have here."""
        return tuple(self.manifest["methods"])

    @property
    def maps_per_image(self) -> int:
        """Methods × targets."""
        return len(self.methods) * self.settings.num_targets

    @property
    def num_shards(self) -> int:
        """How many shards there are when all are committed."""
        return math.ceil(len(self) / self.settings.shard_size)

    @property
    def complete(self) -> bool:
        """Whether all shards are committed."""
        return len(self._committed) == self.num_shards

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Path and reason of each image that could not be explained."""
        return self._files.failures(self._committed)

    def scores(self, image: int | str, method: str) -> npt.NDArray[np.float32]:
        """Raw scores of one image: (h, w), or (K, h, w) where several targets were explained.

        Args:
            image: its number, or its path as the table has it.
            method: one of `methods`.

        Raises:
            InputError: no such image; it is not computed yet; or it failed, with the reason.
            UnknownNameError: no such method.
        """
        rows = self._rows(image, method)
        number = self._number(image)
        stored = np.asarray(self._array(method)[number], np.float32)
        scores: npt.NDArray[np.float32] = stored * np.asarray(rows["scale"], np.float32)[:, None, None]
        return scores if self.settings.targets[1:] else scores[0]

    def all_scores(self, method: str, shard: int) -> npt.NDArray[np.float32]:
        """Raw scores (n, K, h, w) of the images of a committed shard; NaN where one failed."""
        start, shape = shard * self.settings.shard_size, (-1, len(self.methods), self.settings.num_targets)
        stored = np.asarray(self._array(method)[start : start + self.settings.shard_size], np.float32)
        scales = np.asarray(self._part(shard)["scale"], np.float32).reshape(shape)[:, self.methods.index(method)]
        scores: npt.NDArray[np.float32] = stored * scales[:, :, None, None]
        return scores

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All committed rows: one for each image, method and target.

        Args:
            columns: names of those that are wanted; all by default.
        """
        import pyarrow as pa

        parts = [read_parquet(self._files.rows(shard), columns) for shard in self._committed]
        if not parts:
            raise InputError(f"nothing is committed in {str(self.folder)!r} yet: run the export again to go on")
        return pa.concat_tables(part.replace_schema_metadata(None) for part in parts)

    def frame(self) -> pd.DataFrame:
        """`table` for pandas."""
        return self.table().to_pandas()

    def heatmap(self, image: int | str, method: str, size: tuple[int, int] | None = None) -> npt.NDArray[np.float32]:
        """A heatmap in [0, 1], as `Explanation.heatmap` has it.

        Args:
            image: number or path.
            method: one of `methods`.
            size: pixels (H, W); the model's input size by default.

        Returns:
            (H, W), or (K, H, W).

        Raises:
            InputError: as `scores`.
            UnknownNameError: no such method.
        """
        from ..render import normalise, upsample

        scores = torch.from_numpy(self.scores(image, method))
        size = size or self._preprocessing.size
        extent = scaled_extent(self.manifest["methods"][method].get("extent"), self._preprocessing.size, size)
        maps = upsample(scores, size, extent=extent)
        heat: npt.NDArray[np.float32] = normalise(maps, signed=self._signed(method)).numpy()
        return heat

    def overlay(self, image: int | str, method: str, **style: Any) -> Pixels:
        """The heatmap over what the model saw of the image, which is read again.

        Args:
            image: number or path.
            method: one of `methods`.
            **style: `colormap`, `alpha`, `mode` of `render.overlay`.

        Returns:
            uint8 RGB (H, W, 3), or (K, H, W, 3).

        Raises:
            InputError: as `scores`; or the image is not there any more.
            UnknownNameError: no such method.
        """
        from ..render import overlay

        heat = self.heatmap(image, method)
        seen = np.asarray(view(self.entries[self._number(image)], self._preprocessing))
        return overlay(np.broadcast_to(seen, (*heat.shape, 3)), heat, signed=self._signed(method), **style)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Everything but the pictures in one file: ``.npz``, or ``.h5`` (HDF5).

        Raises:
            InputError: another suffix, or the export is not finished.
            ExportError: the file cannot be written.
        """
        from .single_file import save_export

        return save_export(self, Path(path))

    def count_maps(self, column: str, value: bool) -> int:
        """How many maps have this value in a column of true and false."""
        table = self.table([column])
        return int(np.sum(np.asarray(table[column].drop_null()) == value))

    @cached_property
    def _preprocessing(self) -> Preprocessing:
        return Preprocessing(**self.manifest["model"]["preprocessing"])

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        numbers: dict[str, list[int]] = {}
        for number, entry in enumerate(self.entries):
            numbers.setdefault(entry.path, []).append(number)
        return numbers

    @property
    def _committed(self) -> list[int]:
        return sorted(int(path.stem) for path in (self.folder / "rows").glob("[0-9]*.parquet"))

    def _number(self, image: int | str) -> int:
        if isinstance(image, str):
            found = self._numbers.get(printable(image), [])
            if len(found) != 1:
                raise InputError(
                    f"found {len(found)} images with the path {image!r}, expected one; give the image's number, 0 to "
                    f"{len(self) - 1}"
                )
            return found[0]
        if not 0 <= image < len(self):
            raise InputError(f"found image {image}, expected 0 to {len(self) - 1}")
        return image

    def _signed(self, method: str) -> bool:
        return bool(self.manifest["methods"][method]["signed"])

    def _array(self, method: str) -> Any:
        import zarr

        return zarr.open_group(self._files.scores, mode="r")[method]

    def _rows(self, image: int | str, method: str) -> pa.Table:
        """The K rows of an image and a method."""
        if method not in self.methods:
            raise UnknownNameError.listing("method in this export", method, self.methods)
        number, targets = self._number(image), self.settings.num_targets
        shard, position = divmod(number, self.settings.shard_size)
        place = position * len(self.methods) + self.methods.index(method)
        rows = self._part(shard).slice(place * targets, targets)
        reason = rows["error"][0].as_py()
        if reason is not None:
            raise InputError(f"image {number} was not explained: {reason}")
        return rows

    def _part(self, shard: int) -> pa.Table:
        """The rows of a shard; the last one asked for is kept."""
        if self._last is None or self._last[0] != shard:
            if not self._files.rows(shard).is_file():
                raise InputError(f"shard {shard} is not computed yet: run the export again to go on")
            self._last = shard, read_parquet(self._files.rows(shard))
        return self._last[1]
