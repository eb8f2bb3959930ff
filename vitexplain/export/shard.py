"""`ShardResult`: all that was found out about the images that are committed together."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ..explanation import Explanation

STATISTICS = ("probability", "predicted_probability", "minimum", "maximum", "mean", "std")
"""Figures of each map, besides its method's diagnostics."""

CLASSES = ("class", "predicted")
"""Class indices of each map; -1 where the image failed."""


@dataclass(frozen=True, eq=False)
class MapShape:
    """What the maps of one method look like.

    Attributes:
        grid: patch grid (h, w).
        diagnostics: names of the figures that come with each map.
        signed: scores below zero are evidence against the target.
        extent: pixels (height, width) of the input that the grid takes up; see `Explanation.extent`.
    """

    grid: tuple[int, int]
    diagnostics: tuple[str, ...]
    signed: bool
    extent: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class ShardResult:
    """Results of n consecutive images; M methods, K targets an image.

    Attributes:
        index: number of the shard.
        scores: for each method (n, K, h, w) float32, raw; NaN where the image failed.
        columns: figures by name, (n, M, K): int64 for `CLASSES`, else float64, NaN where there is none.
        errors: n reasons, "" for images that were explained.
        views: encoded pictures by (position in the shard, method, target's number).
    """

    index: int
    scores: Mapping[str, npt.NDArray[np.float32]]
    columns: Mapping[str, npt.NDArray[Any]]
    errors: list[str]
    views: dict[tuple[int, str, int], bytes] = field(default_factory=dict)

    @classmethod
    def empty(cls, index: int, count: int, targets: int, shapes: Mapping[str, MapShape]) -> ShardResult:
        """Room for the results of `count` images."""
        diagnostics = {name: None for shape in shapes.values() for name in shape.diagnostics}
        size = (count, len(shapes), targets)
        columns: dict[str, npt.NDArray[Any]] = {name: np.full(size, -1, np.int64) for name in CLASSES}
        columns |= {name: np.full(size, np.nan) for name in (*STATISTICS, *diagnostics)}
        scores = {label: np.full((count, targets, *shape.grid), np.nan, np.float32) for label, shape in shapes.items()}
        return cls(index, scores, columns, [""] * count)

    def put(self, positions: Sequence[int], explanations: Sequence[Explanation]) -> None:
        """Fills in some images, from one explanation a method in the order of `scores`.

        Args:
            positions: b places in the shard.
            explanations: of those b images.
        """
        rows = np.asarray(positions)
        for number, (stored, explanation) in enumerate(zip(self.scores.values(), explanations, strict=True)):
            _, targets, height, width = stored.shape
            scores = explanation.scores.reshape(len(rows), targets, height, width).float()
            stored[rows] = scores.cpu().numpy()
            probabilities = explanation.logits.float().softmax(1)
            best = probabilities.max(1)
            flat = scores.flatten(2)
            figures = {
                "class": best.indices[:, None] if explanation.targets is None else explanation.targets,
                "predicted": best.indices[:, None],
                "probability": explanation.probabilities,
                "predicted_probability": best.values[:, None],
                "minimum": flat.amin(2),
                "maximum": flat.amax(2),
                "mean": flat.mean(2),
                "std": flat.std(2, correction=0),
                **explanation.diagnostics,
            }
            for name, values in figures.items():
                self.columns[name][rows, number] = values.reshape(len(rows), -1).cpu().numpy()

    def pack(self) -> bytes:
        """The results as one `.npz` file of plain arrays, for the way between processes."""
        keys = sorted(self.views)
        about = {"index": self.index, "errors": self.errors, "methods": list(self.scores), "views": keys}
        arrays: dict[str, Any] = {f"scores/{number}": each for number, each in enumerate(self.scores.values())}
        arrays |= {f"column/{name}": values for name, values in self.columns.items()}
        arrays |= {f"view/{number}": np.frombuffer(self.views[key], np.uint8) for number, key in enumerate(keys)}
        buffer = io.BytesIO()
        np.savez(buffer, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
        return buffer.getvalue()

    @classmethod
    def unpack(cls, content: bytes) -> ShardResult:
        """What `pack` was called on."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            return cls(
                about["index"],
                {label: arrays[f"scores/{number}"] for number, label in enumerate(about["methods"])},
                {name.removeprefix("column/"): arrays[name] for name in arrays.files if name.startswith("column/")},
                about["errors"],
                {
                    (position, label, target): arrays[f"view/{number}"].tobytes()
                    for number, (position, label, target) in enumerate(about["views"])
                },
            )
