"""Files that may lie on this machine, or behind a URL that fsspec understands."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from typing import IO, cast

from ..errors import InputError


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether fsspec has to open it, rather than the operating system."""
    return "://" in os.fspath(location)


def name_of(location: str) -> PurePosixPath:
    """The part of a path or URL that says what the file is called: of a web address, what comes before its query."""
    web = location.startswith(("http://", "https://"))
    return PurePosixPath(location.partition("?")[0] if web else location)


def opened(location: str) -> AbstractContextManager[IO[bytes]]:
    """The file, for reading from any place in it."""
    if is_url(location):
        import fsspec

        return cast("AbstractContextManager[IO[bytes]]", fsspec.open(location, "rb"))
    return open(location, "rb")


def read_bytes(location: str, offset: int | None = None, size: int | None = None) -> bytes:
    """The content of a file, or `size` bytes of it from `offset` on.

    Raises:
        EOFError: there are fewer.
        Exception: whatever the file system raises.
    """
    if is_url(location):
        from fsspec.core import url_to_fs

        file_system, path = url_to_fs(location)
        end = None if size is None else (offset or 0) + size
        content = cast("bytes", file_system.cat_file(path, start=offset, end=end))
    else:
        with open(location, "rb") as file:
            file.seek(offset or 0)
            content = file.read(-1 if size is None else size)
    if size is not None and len(content) != size:
        raise EOFError(f"found {len(content)} bytes, expected {size}: the file is cut short or was changed")
    return content


def find_remote(url: str, in_folders: Callable[[str], bool], by_pattern: Callable[[str], bool]) -> list[str]:
    """The files that a URL names, as URLs in sorted order.

    Args:
        url: a file, a folder (searched recursively), or a pattern.
        in_folders: whether a file found in a folder counts.
        by_pattern: whether a file that fits the pattern counts.

    Raises:
        InputError: the place cannot be searched, or there is nothing.
    """
    try:
        from fsspec.core import url_to_fs

        file_system, path = url_to_fs(url)
        if glob.has_magic(str(name_of(path))):
            found = [each for each in sorted(file_system.glob(path)) if by_pattern(each)]
        elif file_system.isdir(path):
            found = [each for each in sorted(file_system.find(path)) if in_folders(each)]
        else:
            found = [path] if file_system.exists(path) else []
        located = [str(file_system.unstrip_protocol(each)) for each in found]
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(
            f"{url!r} cannot be searched: {type(error).__name__}: {error}. Check the address, and that the package "
            "which fsspec needs for it is installed"
        ) from error
    if not located:
        raise InputError(f"no images at {url!r}: expected a file, a folder with pictures or a matching pattern")
    return located
