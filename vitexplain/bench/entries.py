"""The parts of a configuration: one model, one method, one metric, one data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import OptionError, UnknownNameError
from ..method import Method
from ..metrics.catalogue import create_metric, metric_info
from ..metrics.metric import Metric
from ..options import Configurable
from ..preprocessing import Preprocessing
from ..registry import create_method, method_info
from .configuration_file import expand_variables, place_of

SELECTIONS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}
"""Parts of a data set by position, so that what is tuned on one half is reported on the other."""


@dataclass(frozen=True)
class ModelEntry:
    """One model.

    Attributes:
        name: as `vitexplain.load_model` takes it.
        label: its name in tables; `name` by default.
        checkpoint: file of weights; ``${NAME}`` stands for a variable of the environment.
        labels: file of class names; ``${NAME}`` likewise.
        preprocessing: fields of `Preprocessing` to override, e.g. ``{"crop_mode": "squash"}``.
    """

    name: str = "scenes"
    label: str = ""
    checkpoint: str | None = None
    labels: str | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_texts(self, "name", "label")
        _check_texts(self, "checkpoint", "labels", optional=True)
        object.__setattr__(self, "preprocessing", fields_of(Preprocessing, self.preprocessing, "preprocessing"))
        object.__setattr__(self, "label", self.label or self.name)

    @classmethod
    def read(cls, given: object) -> ModelEntry:
        """An entry from a name, or from a mapping of the fields."""
        return cls(**fields_of(cls, {"name": given} if isinstance(given, str) else given, "a model"))

    def expanded(self) -> ModelEntry:
        """The same with the environment's variables in its paths."""
        return replace(
            self, checkpoint=_expanded("checkpoint", self.checkpoint), labels=_expanded("labels", self.labels)
        )


@dataclass(frozen=True)
class MethodEntry:
    """One method with its options.

    Attributes:
        name: registry name.
        options: options that differ from the defaults.
        label: its name in tables and folders; by default the name, with the options.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        _check_texts(self, "name", "label")
        object.__setattr__(self, "name", method_info(self.name).name)
        object.__setattr__(self, "label", self.label or _label(self.create()))

    @classmethod
    def read(cls, given: object) -> MethodEntry:
        """An entry from a name, or from a mapping: ``name``, perhaps ``label``, and options by their names."""
        return cls(**_named_options(given, "a method"))

    def create(self) -> Method:
        """The configured method."""
        return create_method(self.name, **self.options)


@dataclass(frozen=True)
class MetricEntry:
    """One metric with its options; attributes as of `MethodEntry`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        _check_texts(self, "name", "label")
        object.__setattr__(self, "name", metric_info(self.name).name)
        object.__setattr__(self, "label", self.label or _label(self.create()))

    @classmethod
    def read(cls, given: object) -> MetricEntry:
        """An entry from a name, or from a mapping: ``name``, perhaps ``label``, and options by their names."""
        return cls(**_named_options(given, "a metric"))

    def create(self) -> Metric:
        """The configured metric."""
        return create_metric(self.name, **self.options)


@dataclass(frozen=True)
class DataEntry:
    """One data set, or a part of it.

    Attributes:
        format: which reader.
        root: folder or file; ``${NAME}`` stands for a variable of the environment.
        options: what the reader is told besides.
        select: ``all``, or the examples at ``even`` or ``odd`` positions.
        limit: how many of those, from the first; None for all.
    """

    format: str = "scenes"
    root: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    select: str = "all"
    limit: int | None = None

    def __post_init__(self) -> None:
        _check_texts(self, "format")
        _check_texts(self, "root", optional=True)
        check("options", self.options, isinstance(self.options, Mapping), "a mapping")
        for name, value in self.options.items():
            plain = value is None or isinstance(value, str | bool | int | float)
            check(f"the option {name}", value, plain, "text, a number, true or false")
        object.__setattr__(self, "options", dict(self.options))
        known = isinstance(self.select, str) and self.select in SELECTIONS
        check("select", self.select, known, f"one of {', '.join(SELECTIONS)}")
        check("limit", self.limit, self.limit is None or is_count(self.limit), "a whole number >= 1, or nothing")

    @classmethod
    def read(cls, given: object) -> DataEntry:
        """An entry from ``FORMAT``, ``FORMAT:ROOT``, or a mapping of the fields."""
        if isinstance(given, str):
            name, _, root = given.partition(":")
            given = {"format": name, "root": root or None}
        return cls(**fields_of(cls, given, "data"))

    def expanded(self) -> DataEntry:
        """The same with the environment's variables in its paths."""
        options = {
            name: expand_variables(value, name) if isinstance(value, str) else value
            for name, value in self.options.items()
        }
        return replace(self, root=_expanded("root", self.root), options=options)

    @property
    def spec(self) -> str:
        """``FORMAT`` or ``FORMAT:ROOT``, as `vitexplain.data.open_dataset` takes it."""
        return self.format if self.root is None else f"{self.format}:{self.root}"


def fields_of(kind: type[Any], given: object, where: str) -> dict[str, Any]:
    """The given fields of a dataclass, checked to exist; a value that is nothing (``key:``) means the default.

    Args:
        kind: the dataclass.
        given: what a user wrote.
        where: what is configured, for messages.

    Raises:
        UnknownNameError: a key that is no field; the message names close ones, and the line where it is known.
        OptionError: no mapping at all.
    """
    known = [each.name for each in dataclasses.fields(kind)]
    if not isinstance(given, Mapping):
        raise OptionError(f"found {given!r} for {where}, expected a mapping of {', '.join(known)}")
    for key in given:
        if key not in known:
            error = UnknownNameError.listing(f"setting of {where}", str(key), known)
            raise UnknownNameError(f"{place_of(given, key)}{error}")
    return {key: value for key, value in given.items() if value is not None}


def check(name: str, value: object, fits: bool, expected: str) -> None:
    """Refuses a value that does not fit.

    Raises:
        OptionError: `fits` is False.
    """
    if not fits:
        raise OptionError(f"found {name}: {value!r}, expected {expected}")


def is_count(value: object) -> bool:
    """Whether a value is a whole number >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_texts(entry: object, *names: str, optional: bool = False) -> None:
    for name in names:
        value = getattr(entry, name)
        check(name, value, isinstance(value, str) or (optional and value is None), "text")


def _expanded(name: str, path: str | None) -> str | None:
    return None if path is None else expand_variables(path, name)


def _named_options(given: object, where: str) -> dict[str, Any]:
    if isinstance(given, str):
        return {"name": given}
    if not isinstance(given, Mapping) or "name" not in given:
        raise OptionError(f"found {given!r} for {where}, expected a name, or a mapping with 'name' and options")
    # a mapping from `configuration_record` keeps options apart, one written by hand has them beside the name
    apart = given.get("options") or {}
    check("options", apart, isinstance(apart, Mapping), f"a mapping of the options of {where}")
    beside = {key: value for key, value in given.items() if key not in ("name", "label", "options")}
    return {"name": given["name"], "label": given.get("label") or "", "options": {**apart, **beside}}


def _label(configured: Configurable) -> str:
    changed = [
        f"{each.name}={configured.options[each.name]}"
        for each in configured.info.options
        if configured.options[each.name] != each.default
    ]
    return f"{configured.info.name} ({', '.join(changed)})" if changed else str(configured.info.name)
