"""COCO's two ways to write a mask: polygons and run lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .metadata import Record
from .optional import import_optional

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]
"""Polygons ``[[x, y, x, y, …], …]``, or run lengths ``{"size": [height, width], "counts": list or text}``."""

_FEWEST = 6  # numbers of a polygon with an area
_FARTHEST = 1e6  # pixels; what is farther is a mistake, and COCO's tools crash where they follow it


def check_segmentation(record: Record, size: tuple[int, int]) -> Segmentation:
    """The field ``segmentation`` of an annotation, checked.

    Polygons of fewer than three points, which have no area, are dropped.

    Args:
        record: the annotation.
        size: height and width of its picture.

    Raises:
        InputError: it is no segmentation, or of a picture of another size.
    """
    value = record.value("segmentation", "polygons or run lengths")
    if isinstance(value, list):
        for polygon in value:
            flat = isinstance(polygon, list) and len(polygon) % 2 == 0
            if not flat or not all(isinstance(each, int | float) and abs(each) < _FARTHEST for each in polygon):
                raise record.fault(f"a polygon {str(polygon)[:60]}", "a list of x, y, x, y, … in pixels")
        return [polygon for polygon in value if len(polygon) >= _FEWEST]
    if not isinstance(value, dict) or list(value.get("size", ())) != list(size):
        raise record.fault(
            f"a segmentation {str(value)[:60]}", f"polygons, or run lengths of size {list(size)} (height, width)"
        )
    try:
        run_lengths(value)
    except ValueError as error:
        raise record.fault(f"run lengths that do not fit: {error}", "background and object runs in turn") from error
    return value


def draw(segmentation: Segmentation, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The pixels of a checked segmentation, (H, W).

    Polygons are drawn as COCO's own tools draw them, on which its areas and scores rest; OpenCV would add half a pixel
    all around.
    """
    if not segmentation:
        return np.zeros(size, bool)
    if not isinstance(segmentation, Mapping):
        coco = import_optional("pycocotools.mask", "polygons of COCO")
        drawn = coco.merge(coco.frPyObjects([list(polygon) for polygon in segmentation], *size))
        segmentation = {"size": size, "counts": drawn["counts"].decode()}
    runs = run_lengths(segmentation)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def run_lengths(segmentation: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Lengths of the runs of background and object in turn, down the columns.

    COCO's compressed text has five bits a character, the sixth saying that more follow; from the fourth run on it
    holds the difference from the run two before. Decoded here, since COCO's tools return memory that was never
    written where the runs are too short.

    Raises:
        ValueError: the runs are no whole numbers, or do not fill the picture.
    """
    height, width = segmentation["size"]
    counts = segmentation.get("counts")
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        raise ValueError(f"found counts {str(counts)[:40]!r}")
    if sum(runs) != height * width:
        raise ValueError(f"they cover {sum(runs)} pixels of {height * width}")
    return np.array(runs, np.int64)


def _decompress(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"found the character {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:  # negative
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the last run is cut short")
    return runs
