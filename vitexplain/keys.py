"""Keys: digests of everything that determines a stored result, so that nothing else is ever taken for it."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .data.example import Example

LAYOUT_VERSION = 1
"""Part of every key; raised when the same settings come to mean other stored values."""

_BLOCK = 1 << 20
_PACKAGE = __name__.partition(".")[0]


def digest(*parts: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of plain JSON values; the order of mappings does not matter."""
    text = json.dumps([LAYOUT_VERSION, *parts], sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seed_of(*parts: Any) -> int:
    """A seed for a random generator, 0 to 2⁶³-1: the same for the same parts, in every process."""
    return int(digest("seed", *parts)[:16], 16) >> 1


@cache
def own_code(kind: type) -> tuple[str, ...]:
    """Digest (64 hexadecimal digits) of the code that a method or metric of somebody else's is made of.

    That is the modules of the class and of its bases; of what was typed in or run as a script, the class alone. None
    for what belongs to this package, whose version is noted where results are stored, and for code that cannot be read.
    """
    sources = set()
    for each in kind.__mro__:
        package = each.__module__.partition(".")[0]
        if package == _PACKAGE or package in sys.stdlib_module_names:
            continue
        try:
            sources.add(inspect.getsource(each if package == "__main__" else sys.modules[each.__module__]))
        except (OSError, TypeError, KeyError):
            continue
    return (digest("code", sorted(sources)),) if sources else ()


def example_digest(example: Example) -> str:
    """Digest of an example's content; where the file lies does not count.

    Name, picture, classes, mask, boxes, and the size that the annotation has: pictures of another are refused.
    """
    size = [] if example.size is None else [list(example.size)]
    sha = hashlib.sha256(json.dumps([example.name, list(example.labels), *size]).encode())
    if isinstance(example.image, Path):
        _add_file(sha, example.image)
    else:
        sha.update(f"{example.image.mode}{example.image.size}".encode())
        sha.update(example.image.tobytes())
    for name in ("mask", "boxes"):
        array = getattr(example, name)
        if array is not None:
            sha.update(f"{name}{array.dtype}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (64 hexadecimal digits) of a file's content."""
    sha = hashlib.sha256()
    _add_file(sha, path)
    return sha.hexdigest()


def _add_file(sha: Any, path: Path) -> None:
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                sha.update(block)
    except OSError as error:  # the image is reported as unreadable when it is to be loaded
        sha.update(f"unreadable: {type(error).__name__}".encode())
