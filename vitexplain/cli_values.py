"""What the texts on the command line mean: configured methods, sizes, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import OptionError, UnknownNameError
from .registry import create_method, method_info

if TYPE_CHECKING:
    from .method import Method
    from .options import OptionInfo


def configure_methods(names: Sequence[str], options: Sequence[str]) -> list[Method]:
    """Each method, once, with those of the options that it has.

    Args:
        names: methods, as users spell them.
        options: ``NAME=VALUE``.

    Raises:
        UnknownNameError: no such method, or an option that none of them has.
        OptionError: an option is given twice, has no value, or a value that it cannot take.
    """
    infos = list({info.name: info for info in map(method_info, names)}.values())
    known = {each.name: each for info in infos for each in info.options}
    given: dict[str, str] = {}
    for each in options:
        name, equals, value = each.partition("=")
        if not equals:
            raise OptionError(f"--option: found {each!r}, expected NAME=VALUE")
        if name not in known:
            raise UnknownNameError.listing(f"option of {', '.join(info.name for info in infos)}", name, known)
        if name in given:
            raise OptionError(f"--option: found {name} twice ({given[name]!r} and {value!r}), expected one value")
        given[name] = value
    return [
        create_method(
            info.name, **{each.name: _value(given[each.name], each) for each in info.options if each.name in given}
        )
        for info in infos
    ]


def _value(text: str, option: OptionInfo) -> bool | int | float | str:
    """The value that is meant, by the type of the option's default; what does not fit stays text, and is refused."""
    if isinstance(option.default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(option.default, int | float):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def read_preprocessing(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of `vitexplain.preprocessing.Preprocessing` from ``NAME=VALUE``.

    A size is ``96``, ``96x128`` or ``96,128``, mean and deviation are ``0.5,0.5,0.5``; brackets around them are
    allowed. What is no such setting stays text, and is refused where it is used.

    Raises:
        OptionError: a text without ``=``, a setting that is given twice, or numbers that are none.
    """
    settings: dict[str, Any] = {}
    for each in texts:
        name, equals, value = each.partition("=")
        if not equals:
            raise OptionError(f"--preprocessing: found {each!r}, expected NAME=VALUE")
        if name in settings:
            raise OptionError(f"--preprocessing: found {name} twice, expected one value")
        settings[name] = _setting(name, value.strip())
    return settings


def _setting(name: str, text: str) -> Any:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    bare = text.strip("[]() ")
    if name == "size":
        return read_size(bare.replace(",", "x"), f"--preprocessing {name}")
    if name in ("mean", "std"):
        return read_numbers(f"--preprocessing {name}", bare, float, ",", 3)
    if name == "crop_fraction":
        return (read_numbers(f"--preprocessing {name}", bare, float, ",", 1) or (text,))[0]
    return text


def read_size(text: str | None, option: str = "--size") -> tuple[Any, ...] | None:
    """Height and width, from ``224x160`` or ``224``; None stays None.

    Args:
        text: the size.
        option: what the error calls it.

    Raises:
        OptionError: something else.
    """
    if text is not None and text.strip().isdecimal():
        return (int(text), int(text))
    return read_numbers(option, text, int, "x", 2)


def read_numbers(option: str, text: str | None, kind: type, separator: str, count: int) -> tuple[Any, ...] | None:
    """So many numbers; None stays None.

    Args:
        option: what the error calls the text.
        text: the numbers.
        kind: int or float.
        separator: what stands between them.
        count: how many there must be.

    Raises:
        OptionError: something else.
    """
    if text is None:
        return None
    try:
        numbers = tuple(kind(each) for each in text.split(separator))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        form = f"{count} numbers such as 0.5,0.4,0.4" if count > 1 else "a number such as 0.9"
        form = "a size such as 224 or 224x160" if kind is int else form
        raise OptionError(f"{option}: found {text!r}, expected {form}")
    return numbers
