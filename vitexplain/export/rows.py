"""The table of an export: one row for each image, method and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .entries import Entry
from .shard import CLASSES, ShardResult

if TYPE_CHECKING:
    import pyarrow as pa


def rows_table(
    result: ShardResult,
    entries: Sequence[Entry],
    start: int,
    labels: Sequence[str] | None,
    scales: Mapping[str, npt.NDArray[np.float32]],
    views: Mapping[tuple[int, str, int], str],
) -> pa.Table:
    """The rows of a shard, image by image, method by method, target by target.

    Args:
        result: of n images, M methods, K targets.
        entries: the n images.
        start: number of the first one in the export.
        labels: class names, where known.
        scales: for each method (n, K), what stored scores have to be multiplied with.
        views: files of the pictures, relative to the export's folder, by the keys of `ShardResult.views`.

    Returns:
        n·M·K rows; null where an image failed, with the reason in ``error``.
    """
    import pyarrow as pa

    classes = result.columns["class"]
    count, methods, targets = classes.shape
    size = (count, methods, targets)
    failed = np.repeat([bool(error) for error in result.errors], methods * targets)
    cells = [(row, label, k) for row in range(count) for label in result.scores for k in range(targets)]
    columns: dict[str, Any] = {
        "image": np.repeat(np.arange(start, start + count), methods * targets),
        "path": [printable(entries[row].path) for row, _, _ in cells],
        "method": [label for _, label, _ in cells],
        "target": np.broadcast_to(np.arange(targets), size).reshape(-1),
        "class": pa.array(classes.reshape(-1), mask=failed),
        "label": [_name(labels, index) for index in classes.reshape(-1).tolist()],
    }
    for name, values in result.columns.items():
        if name == "constant":
            columns[name] = pa.array(values.reshape(-1) == 1, mask=failed)
        elif name not in CLASSES:
            columns[name] = pa.array(values.reshape(-1), mask=np.isnan(values.reshape(-1)))
        elif name != "class":
            columns[name] = pa.array(values.reshape(-1), mask=failed)
    finite = np.stack([np.isfinite(each).all((2, 3)) for each in result.scores.values()], 1)
    columns["finite"] = pa.array(finite.reshape(-1), mask=failed)
    columns["scale"] = np.stack([scales[label] for label in result.scores], 1).reshape(-1)
    columns["view"] = pa.array([views.get((row, label, k)) for row, label, k in cells], pa.string())
    columns["error"] = pa.array([printable(result.errors[row]) or None for row, _, _ in cells], pa.string())
    return pa.table({name: _typed(name, values) for name, values in columns.items()})


def printable(text: str) -> str:
    """The text, with bytes of a path that are no text written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _name(labels: Sequence[str] | None, index: int) -> str | None:
    return labels[index] if labels is not None and 0 <= index < len(labels) else None


def _typed(name: str, values: Any) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.string()) if name == "label" else values
