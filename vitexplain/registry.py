"""The registry: methods by name, with what each claims about itself."""

from __future__ import annotations

import importlib
import pkgutil
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .errors import ExplanationWarning, OptionError, UnknownNameError
from .method import Method
from .options import OptionInfo, check_declared, configure, options_of

ENTRY_POINT_GROUP = "vitexplain.methods"
"""Entry-point group in which other distributions name modules that register methods."""

_Class = TypeVar("_Class", bound=type[Method])


@dataclass(frozen=True)
class MethodInfo:
    """What a method says about itself. The tests hold each method to it.

    Attributes:
        name: registry name, the same as the file's.
        title: the name people use.
        paper: where it is defined.
        class_specific: the map depends on the target.
        passes: cost an image and target, e.g. ``"1F + 1B"`` (forward and backward passes; backwards are repeated
            for each target, forwards are not).
        signed: with default options, negative scores are evidence against the target.
        trainable: must be trained before use.
        stochastic: two calls may differ unless seeded.
        aliases: other names that are understood.
        method: the class.
    """

    name: str
    title: str
    paper: str
    class_specific: bool
    passes: str
    signed: bool
    trainable: bool
    stochastic: bool
    aliases: tuple[str, ...]
    method: type[Method]

    @property
    def options(self) -> tuple[OptionInfo, ...]:
        """The options, in the order of the method's fields."""
        return options_of(self.method)


_methods: dict[str, MethodInfo] = {}
_loaded = _loading = False
_LOADING = threading.RLock()


def register_method(
    name: str,
    *,
    title: str,
    paper: str,
    class_specific: bool,
    passes: str,
    signed: bool = False,
    trainable: bool = False,
    stochastic: bool = False,
    aliases: Sequence[str] = (),
) -> Callable[[_Class], _Class]:
    """Class decorator that adds a method to the registry; see `MethodInfo` for the arguments.

    Raises:
        OptionError: the name or an alias is taken by another class, or the class is no `Method`.
    """

    def register(cls: _Class) -> _Class:
        if not issubclass(cls, Method):
            raise OptionError(f"{name}: found {cls.__qualname__}, expected a class derived from vitexplain.Method")
        if cls.__module__.partition(".")[0] != __package__:
            _load()  # so that a name that is taken is known here, and not when methods are looked up
        info = MethodInfo(
            name, title, paper, class_specific, passes, signed, trainable, stochastic, tuple(aliases), cls
        )
        for each in (name, *aliases):
            other = _lookup(each)
            # the same class again is a notebook cell or a module that was reloaded
            if other is not None and (_place(other.method), other.name) != (_place(cls), name):
                taken = _place(other.method)
                raise OptionError(
                    f"method name {each!r} of {_place(cls)} is already taken by {taken}; choose another name"
                )
        _methods[name] = info
        cls.info = info
        return cls

    return register


def list_methods(*, class_specific: bool | None = None, trainable: bool | None = None) -> list[str]:
    """Names of all methods, built-in and plugged-in, sorted.

    Args:
        class_specific: only those that do (True) or do not (False) depend on the target.
        trainable: only those that do or do not need training.
    """
    _load()
    return sorted(
        name
        for name, info in _methods.items()
        if class_specific in (None, info.class_specific) and trainable in (None, info.trainable)
    )


def method_info(name: str) -> MethodInfo:
    """What a method says about itself. Hyphens, spaces, capitals and aliases are forgiven.

    Raises:
        UnknownNameError: no method has this name; the message lists close matches and all names.
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"found a {type(name).__name__}, expected the name of a method, such as 'tokentm'")
    _load()
    info = _lookup(name)
    if info is None:
        raise UnknownNameError.listing("method", name, _methods)
    return info


def create_method(name: str, **options: Any) -> Method:
    """A configured method.

    Raises:
        UnknownNameError: no such method, or the method has no such option.
        OptionError: a value that an option cannot take.
    """
    return configure(method_info(name).method, options)


def _lookup(name: str) -> MethodInfo | None:
    wanted = squash(name)
    for info in _methods.values():
        if wanted in map(squash, (info.name, *info.aliases)):
            return info
    return None


def squash(name: str) -> str:
    """A name without what people vary: capitals, spaces, hyphens, underscores."""
    return re.sub(r"[\s_-]", "", name.lower())


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _load() -> None:
    """Loads all methods, once; other threads wait until they are there."""
    global _loaded, _loading
    if _loaded:
        return
    with _LOADING:  # which one thread may enter again, since a method that is loaded may ask for others
        if _loaded or _loading:
            return
        _loading = True
        try:
            _load_everything()
            _loaded = True
        finally:
            _loading = False


def _load_everything() -> None:
    package = importlib.import_module("vitexplain.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        before = set(_methods)
        try:
            entry_point.load()
            for name in _methods.keys() - before:
                check_declared(_methods[name].method)
        except Exception as error:  # somebody else's code: its failure must not take the built-in methods away
            for name in _methods.keys() - before:
                del _methods[name]
            warnings.warn(
                f"the plug-in {entry_point.name!r} ({entry_point.value}) could not be loaded and is left out: "
                f"{type(error).__name__}: {error}",
                ExplanationWarning,
                stacklevel=3,
            )
