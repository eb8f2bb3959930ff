"""Tar shards (WebDataset): where their pictures lie, so that each can be read by itself."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from ..errors import InputError
from ..images import IMAGE_SUFFIXES
from .entries import Entry
from .storage import is_url, opened

TAR_SUFFIXES = frozenset({".tar", ".tgz", ".gz"})
"""Suffixes taken for shards (lower case); compressed ones are refused with the reason."""


def entries_of_tar(file: str) -> Iterator[Entry]:
    """The pictures in an uncompressed tar shard, in their order; members of other kinds are left aside.

    Only the headers are read. A shard that is cut short gives the pictures before the cut, and one failed entry.

    Args:
        file: path or URL.

    Raises:
        InputError: the shard cannot be opened, or is no uncompressed tar file.
    """
    location = file if is_url(file) else os.path.abspath(file)
    members = 0
    try:
        with opened(file) as content, tarfile.open(fileobj=content, mode="r:") as archive:
            for member in archive:
                members += 1
                if member.isreg() and _is_picture(member.name):
                    yield Entry(f"{file}/{member.name}", location, member.offset_data, member.size)
    except tarfile.TarError as error:
        if not members:
            raise InputError(
                f"{file!r} is no uncompressed tar file: {error}. Decompress it (gunzip), or unpack it into a folder"
            ) from error
        reason = f"{file!r} is cut short or broken after {members} members: {error}. Get a fresh copy"
        yield Entry(f"{file}/…", location, -1, 0, error=reason)
    except OSError as error:
        raise InputError(f"{file!r} cannot be opened: {error.strerror or error}") from error


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
