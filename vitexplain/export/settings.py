"""What is chosen for an export, besides its model and its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import OptionError
from ..files import distinct_names
from ..method import Method

CHOICES = {
    "dtype": ("float32", "float16"),
    "view": ("none", "overlay", "heatmap"),
    "view_format": ("jpeg", "png", "webp"),
    "engine": ("local", "ray"),
}
"""Settings that take one of a few words."""

_ONLY_HOW = ("batch_size", "workers", "engine", "ray_address", "ray_workers", "retry_failed", "isolate")


def _default_workers() -> int:
    return max(2, min(8, os.cpu_count() or 1))


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and how the work is done.

    Attributes:
        targets: classes explained for every image; empty for the one its table names, or else the predicted one.
        dtype: how scores are stored: ``"float32"``, or ``"float16"`` with a power of two a map in the table.
        view: pictures besides the scores: ``"none"``, ``"overlay"`` or ``"heatmap"``, of the model's input size.
        view_format: ``"jpeg"``, ``"png"`` or ``"webp"``.
        shard_size: images committed together.
        seed: of methods that draw lots; each image has its own stream.
        batch_size: images in one forward; halved where memory does not suffice.
        workers: threads that read pictures, and as many that draw them.
        engine: ``"local"`` or ``"ray"``.
        ray_address: a cluster to join; None for one of this machine.
        ray_workers: processes of the Ray engine; None for one a GPU where the model is on one, else one for two cores.
        retry_failed: try images again that failed; the others of their shards stay as they are.
        isolate: read pictures in processes instead of threads, so that one that ends its decoder is a failed image. A
            script then has to begin its work below ``if __name__ == "__main__":``.

    Raises:
        OptionError: a value that cannot be taken.
    """

    targets: tuple[int, ...] = ()
    dtype: str = "float32"
    view: str = "none"
    view_format: str = "jpeg"
    shard_size: int = 256
    seed: int = 0
    batch_size: int = 32
    workers: int = field(default_factory=_default_workers)
    engine: str = "local"
    ray_address: str | None = None
    ray_workers: int | None = None
    retry_failed: bool = False
    isolate: bool = False

    def __post_init__(self) -> None:
        for name, possible in CHOICES.items():
            if getattr(self, name) not in possible:
                raise OptionError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(possible)}")
        for name in ("shard_size", "batch_size", "workers"):
            _check_number(name, getattr(self, name), 1)
        _check_number("seed", self.seed, 0)
        if self.ray_workers is not None:
            _check_number("ray_workers", self.ray_workers, 1)

    @property
    def num_targets(self) -> int:
        """K: maps of one method for one image."""
        return max(1, len(self.targets))

    def determining(self) -> dict[str, Any]:
        """Those that determine what is stored, JSON-able; the others may differ from run to run."""
        chosen = {name: value for name, value in asdict(self).items() if name not in _ONLY_HOW}
        return {**chosen, "targets": list(self.targets)}


def labelled(methods: Sequence[Method]) -> dict[str, Method]:
    """Methods by the names they have in an export: their own, numbered where one is there twice.

    Raises:
        OptionError: there are none.
    """
    if not methods:
        raise OptionError("found no methods, expected at least one")
    return dict(zip(distinct_names([each.info.name for each in methods]), methods, strict=True))


def _check_number(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise OptionError(f"{name} is {value!r}, expected a whole number >= {minimum}")
