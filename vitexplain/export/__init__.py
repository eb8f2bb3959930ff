"""Batch export: heatmaps of many images as sharded arrays, a table and pictures; resumable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from .results import HeatmapExport

__all__ = ["export_heatmaps", "open_export"]


def export_heatmaps(
    inputs: str | os.PathLike[str] | list[str | os.PathLike[str]], output: str | os.PathLike[str], **settings: Any
) -> HeatmapExport:
    """Explains many images into a folder, going on where an earlier run stopped.

    See `vitexplain.export.run.export_heatmaps` for the settings.
    """
    from . import run

    return run.export_heatmaps(inputs, output, **settings)


def open_export(folder: str | os.PathLike[str]) -> HeatmapExport:
    """The scores, the table and the pictures that an export left in a folder, finished or not.

    Raises:
        InputError: the folder holds no export, or it cannot be read.
    """
    from .results import HeatmapExport

    return HeatmapExport.open(folder)
