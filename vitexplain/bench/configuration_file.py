"""Configurations as YAML: mappings that remember their lines, and variables of the environment in paths."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, OptionError
from .extra import require

_VARIABLE = re.compile(r"\$\{(\w+)\}")


class LocatedMapping(dict[str, Any]):
    """A mapping that knows where each key stands.

    Attributes:
        source: name of the file.
        lines: line of each key, from 1.
    """

    def __init__(self, source: str, lines: dict[str, int]) -> None:
        super().__init__()
        self.source = source
        self.lines = lines

    def overridden(self, given: Mapping[str, Any]) -> LocatedMapping:
        """The same with other values of some keys, which stand nowhere in the file."""
        found = LocatedMapping(self.source, {key: line for key, line in self.lines.items() if key not in given})
        found.update({**self, **given})
        return found


def place_of(mapping: Any, key: str) -> str:
    """Where a key stands, as the beginning of a message: ``"bench.yaml, line 3: "``; empty where that is not known."""
    if isinstance(mapping, LocatedMapping) and key in mapping.lines:
        return f"{mapping.source}, line {mapping.lines[key]}: "
    return ""


def read_mapping(path: str | os.PathLike[str]) -> LocatedMapping:
    """The mapping in a YAML file; nothing but plain values is ever constructed.

    Raises:
        InputError: the file cannot be read, is no YAML, holds a key twice, or is no mapping.
        VitExplainError: PyYAML is missing.
    """
    require("yaml")
    import yaml

    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the configuration {str(file)!r}: {cause}") from error

    class Loader(yaml.SafeLoader):
        pass

    def construct(loader: Any, node: Any) -> Any:
        loader.flatten_mapping(node)
        mapping = LocatedMapping(file.name, {})
        yield mapping
        for key_node, value_node in node.value:
            key, line = str(loader.construct_object(key_node, deep=True)), key_node.start_mark.line + 1
            if key in mapping:
                raise InputError(
                    f"{file.name}, line {line}: found {key!r} a second time (first in line {mapping.lines[key]}), "
                    "expected each key once"
                )
            mapping.lines[key] = line
            mapping[key] = loader.construct_object(value_node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", construct)
    try:
        found = yaml.load(text, Loader)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of values, such as a date that is none
        raise InputError(f"{str(file)!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, LocatedMapping):
        raise InputError(f"found {type(found).__name__} in {str(file)!r}, expected a mapping such as 'methods: all'")
    return found


def expand_variables(text: str, where: str) -> str:
    """A path with every ``${NAME}`` replaced by that variable of the environment.

    Args:
        text: the path.
        where: the setting it comes from, for the message.

    Raises:
        OptionError: the variable is not set.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise OptionError(
                f"{where}: found {text!r}, but the environment variable {found[1]} is not set; set it, or write the "
                "path out"
            )
        return os.environ[found[1]]

    return _VARIABLE.sub(value, text)
