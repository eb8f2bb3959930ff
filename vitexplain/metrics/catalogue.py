"""The catalogue of metrics: by name, with what each needs and the figures it gives."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import OptionError, UnknownNameError
from ..options import OptionInfo, configure, options_of
from ..registry import squash
from .metric import Metric, Part

_Class = TypeVar("_Class", bound=type[Metric])


@dataclass(frozen=True)
class Figure:
    """One number that a metric gives.

    Attributes:
        name: key in the results.
        title: for tables, with its unit.
        higher_is_better: None for a figure that only describes.
        chance: what a map without information gets; None where that depends on the data.
    """

    name: str
    title: str
    higher_is_better: bool | None
    chance: float | None = None


@dataclass(frozen=True)
class MetricInfo:
    """What a metric says about itself.

    Attributes:
        name: catalogue name.
        title: the name people use.
        paper: where it is defined.
        requires: the parts of a `MetricBatch` it cannot do without.
        figures: what it gives, the most important first.
        metric: the class.
    """

    name: str
    title: str
    paper: str
    requires: frozenset[Part]
    figures: tuple[Figure, ...]
    metric: type[Metric]

    @property
    def options(self) -> tuple[OptionInfo, ...]:
        """The options, in the order of the metric's fields."""
        return options_of(self.metric)


_metrics: dict[str, MetricInfo] = {}


def register_metric(
    name: str, *, title: str, paper: str, requires: Sequence[Part] = (), figures: Sequence[Figure]
) -> Callable[[_Class], _Class]:
    """Class decorator that adds a metric to the catalogue; see `MetricInfo` for the arguments.

    Raises:
        OptionError: the name is taken by another class, or the class is no `Metric`.
    """

    def register(cls: _Class) -> _Class:
        if not issubclass(cls, Metric):
            raise OptionError(f"{name}: found {cls.__qualname__}, expected a class derived from Metric")
        other = None if name not in _metrics else _metrics[name].metric
        # the same class again is a notebook cell or a module that was reloaded
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            taken = f"{other.__module__}.{other.__qualname__}"
            raise OptionError(f"metric name {name!r} is already taken by {taken}; choose another")
        info = MetricInfo(name, title, paper, frozenset(requires), tuple(figures), cls)
        _metrics[name] = cls.info = info
        return cls

    return register


def list_metrics() -> list[str]:
    """Names of all metrics, sorted."""
    _load()
    return sorted(_metrics)


def metric_info(name: str) -> MetricInfo:
    """What a metric says about itself. Hyphens, spaces and capitals are forgiven.

    Raises:
        UnknownNameError: no metric has this name; the message lists close matches and all names.
    """
    _load()
    for info in _metrics.values():
        if squash(info.name) == squash(name):
            return info
    raise UnknownNameError.listing("metric", name, _metrics)


def create_metric(name: str, **options: Any) -> Metric:
    """A configured metric.

    Raises:
        UnknownNameError: no such metric, or the metric has no such option.
        OptionError: a value that an option cannot take.
    """
    return configure(metric_info(name).metric, options)


def _load() -> None:
    package = importlib.import_module("vitexplain.metrics")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
