"""What a benchmark consists of: models, methods, metrics, data, and how they are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..errors import OptionError, VitExplainError
from ..metrics.catalogue import list_metrics
from ..registry import list_methods
from .configuration_file import place_of
from .entries import DataEntry, MethodEntry, MetricEntry, ModelEntry, check, fields_of, is_count

ALL = "all"
TARGETS = ("predicted", "label")
DTYPES = ("float32", "bfloat16", "float16")

_Entry = TypeVar("_Entry", ModelEntry, MethodEntry, MetricEntry)


@dataclass(frozen=True)
class BenchConfiguration:
    """A benchmark.

    Attributes:
        models: one or more, each with its own label.
        methods: one or more, each with its own label; ``"all"`` in a file means all that need no training.
        metrics: one or more, each with its own label; ``"all"`` in a file means the whole catalogue.
        data: the annotated images.
        target: the class explained: ``"predicted"``, or ``"label"``, the most probable of the image's own classes.
        only_correct: whether images whose prediction is not among their classes are left out.
        seed: of all randomness; each image has its own stream.
        batch_size: images, or changed images, in one forward pass.
        chunk_size: images that are computed and stored together.
        device: where models run.
        dtype: their precision.
        compiled: whether metrics ask them compiled; see `evaluate`.

    Raises:
        OptionError: a value outside what is said above.
    """

    models: tuple[ModelEntry, ...]
    methods: tuple[MethodEntry, ...]
    metrics: tuple[MetricEntry, ...]
    data: DataEntry
    target: str = "predicted"
    only_correct: bool = False
    seed: int = 0
    batch_size: int = 32
    chunk_size: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in ("models", "methods", "metrics"):
            _check_distinct(name, [each.label for each in getattr(self, name)])
        check("target", self.target, self.target in TARGETS, f"one of {', '.join(TARGETS)}")
        for name in ("only_correct", "compiled"):
            check(name, getattr(self, name), isinstance(getattr(self, name), bool), "true or false")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        check("seed", self.seed, whole and 0 <= self.seed < 2**32, f"a whole number from 0 to {2**32 - 1}")
        for name in ("batch_size", "chunk_size"):
            check(name, getattr(self, name), is_count(getattr(self, name)), "a whole number >= 1")
        check("device", self.device, isinstance(self.device, str), "text such as cpu or cuda:0")
        check("dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> BenchConfiguration:
        """A configuration as a file or the command line gives it.

        Models, methods and metrics are lists of names or mappings (or one alone), ``models`` by default the embedded
        one and the other two ``"all"``; data is ``"FORMAT:ROOT"`` or a mapping, by default the embedded scenes.

        Raises:
            UnknownNameError: a key, method, metric or option that does not exist.
            OptionError: a value that cannot be taken.
        """
        settings = fields_of(cls, given, "a benchmark")
        readers: dict[str, Callable[[], object]] = {
            "models": lambda: _entries(settings.get("models", ["scenes"]), ModelEntry.read),
            "methods": lambda: _entries(_all(settings.get("methods"), _untrained), MethodEntry.read),
            "metrics": lambda: _entries(_all(settings.get("metrics"), list_metrics), MetricEntry.read),
            "data": lambda: DataEntry.read(settings.get("data", "scenes")),
        }
        for key, read in readers.items():
            try:
                settings[key] = read()
            except VitExplainError as error:
                raise type(error)(f"{'' if ', line ' in str(error) else place_of(given, key)}{error}") from error
        return cls(**settings)

    def to_mapping(self) -> dict[str, Any]:
        """The configuration as plain JSON types; `from_mapping` reads it back."""
        return dataclasses.asdict(self)

    def expanded(self) -> BenchConfiguration:
        """The same with the environment's variables in its paths.

        Raises:
            OptionError: a variable is not set.
        """
        return replace(self, models=tuple(each.expanded() for each in self.models), data=self.data.expanded())


def _entries(given: object, read: Callable[[object], _Entry]) -> tuple[_Entry, ...]:
    listed = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return tuple(read(each) for each in listed)


def _all(given: object, names: Callable[[], list[str]]) -> object:
    return names() if given in (None, ALL) else given


def _untrained() -> list[str]:
    return list_methods(trainable=False)


def _check_distinct(name: str, labels: Sequence[str]) -> None:
    if not labels:
        raise OptionError(f"found no {name}, expected at least one")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise OptionError(f"found several {name} called {', '.join(map(repr, twice))}; give each its own 'label'")
