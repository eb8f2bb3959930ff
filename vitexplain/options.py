"""Options: dataclass fields that know their meaning and range, and check their values."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from .errors import OptionError, UnknownNameError


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """An option of a method or metric: a dataclass field that knows its meaning and its range.

    Args:
        default: the value when none is given; its type is the option's type.
        help: what it does, in one sentence, with its unit.
        choices: the values it can take; besides numbers, where `minimum` or `maximum` is given too.
        minimum: smallest number.
        maximum: largest number.
    """
    metadata = {"help": help, "choices": tuple(choices), "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class OptionInfo:
    """One option: name, default, meaning, and what it can take (in words)."""

    name: str
    default: Any
    help: str
    range: str


@dataclass(frozen=True)
class Configurable(ABC):
    """Base of what is configured by options: a frozen dataclass whose fields were made by `option`.

    Attributes:
        info: what was said at registration, with the name under which it is known.
    """

    info: ClassVar[Any]

    def __post_init__(self) -> None:
        check_declared(type(self))
        for each in dataclasses.fields(self):
            if isinstance(value := getattr(self, each.name), np.generic):  # such as a number out of np.arange
                object.__setattr__(self, each.name, value.item())
            _check_option(self.info.name, each, getattr(self, each.name))

    @property
    def options(self) -> dict[str, Any]:
        """The options and their values."""
        return dataclasses.asdict(self)


_Kind = TypeVar("_Kind", bound=Configurable)


def check_declared(kind: type[Configurable]) -> None:
    """Checks that what a class has of options can be read as such.

    Raises:
        OptionError: a field was not made by `option`, or the class is no dataclass and has fields all the same.
    """
    name = kind.info.name
    for each, value in vars(kind).items():
        if isinstance(value, dataclasses.Field):
            raise OptionError(
                f"{name}: found the option {each} in {kind.__qualname__}, which is no dataclass, expected "
                "@dataclass(frozen=True) above the class, under the line that registers it"
            )
    for field in dataclasses.fields(kind):
        if "help" not in field.metadata:
            raise OptionError(
                f"{name}: found the field {field.name}, of which nothing but its type and default is known, expected "
                f'{field.name} = option(default, "what it does"), from vitexplain.options'
            )


def options_of(kind: type[Configurable]) -> tuple[OptionInfo, ...]:
    """The options of a class, in the order of its fields.

    Raises:
        OptionError: they were not declared as options.
    """
    check_declared(kind)
    return tuple(
        OptionInfo(each.name, each.default, each.metadata["help"], describe_range(each))
        for each in dataclasses.fields(kind)
    )


def configure(kind: type[_Kind], options: dict[str, Any]) -> _Kind:
    """An instance with these options.

    Raises:
        UnknownNameError: there is no such option.
        OptionError: a value that an option cannot take, or options that were not declared as such.
    """
    check_declared(kind)
    known = [each.name for each in dataclasses.fields(kind)]
    for each in options:
        if each not in known:
            raise UnknownNameError.listing(f"option of {kind.info.name}", each, known)
    return kind(**options)


def describe_range(each: dataclasses.Field[Any]) -> str:
    """What an option can take, in words."""
    words = [repr(choice) for choice in each.metadata["choices"]]
    if isinstance(each.default, bool):
        words += ["True", "False"]
    elif isinstance(each.default, int | float):
        limits = [
            f"{relation} {_exact(each.metadata[key])}"
            for key, relation in (("minimum", ">="), ("maximum", "<="))
            if each.metadata[key] is not None
        ]
        kind = "a whole number" if isinstance(each.default, int) else "a number"
        words.append(" ".join([kind, " and ".join(limits)]).rstrip())
    elif not words:
        words.append("text")
    return " or ".join(words)


def _exact(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _check_option(method: str, each: dataclasses.Field[Any], value: Any) -> None:
    if not _fits(each.default, value, **{key: each.metadata[key] for key in ("choices", "minimum", "maximum")}):
        raise OptionError(f"{method}: found {each.name}={value!r}, expected {describe_range(each)}")


def _fits(default: Any, value: Any, choices: tuple[Any, ...], minimum: float | None, maximum: float | None) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(value, str) or isinstance(default, str):
        return value in choices if choices else isinstance(value, str) and isinstance(default, str)
    if not isinstance(value, int if isinstance(default, int) else (int, float)):
        return False
    return math.isfinite(value) and (minimum is None or value >= minimum) and (maximum is None or value <= maximum)
