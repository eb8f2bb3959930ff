"""`Entry`: one image of an export, and how it becomes the model's input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .storage import is_url, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..preprocessing import Preprocessing


@dataclass(frozen=True, slots=True)
class Entry:
    """One image.

    Attributes:
        path: its name in tables and messages; of a tar shard's member, ``SHARD/MEMBER``.
        location: the file that is opened: an absolute path, or a URL that fsspec understands.
        offset: where the picture begins in that file, in bytes; None where it is the whole file.
        size: its length in bytes, with an `offset`.
        target: the class explained for this image; None where the table names none.
        error: why it cannot be explained, where that is known before it is read.
    """

    path: str
    location: str
    offset: int | None = None
    size: int | None = None
    target: int | None = None
    error: str | None = None

    @property
    def identity(self) -> tuple[str, int | None, int | None, int | None, str | None]:
        """What tells it from other entries: the same picture with another target is another entry."""
        return self.location, self.offset, self.size, self.target, self.error


def prepare(entry: Entry, preprocessing: Preprocessing) -> Tensor:
    """The model's input (3, H, W), float32.

    Raises:
        InputError: the picture cannot be fetched or read.
    """
    if entry.error is not None:
        raise InputError(entry.error)
    source = _source(entry)
    try:
        return preprocessing(source)
    except InputError as error:
        raise InputError(str(error) if isinstance(source, Path) else f"{entry.path!r}: {error}") from error


def view(entry: Entry, preprocessing: Preprocessing) -> Image:
    """What the model sees of it, RGB of the input's size.

    Raises:
        InputError: the picture cannot be fetched or read.
    """
    return preprocessing.view(_source(entry))


def _source(entry: Entry) -> Path | bytes:
    """A plain file stays a path, whose errors name it; everything else is fetched."""
    if entry.offset is None and not is_url(entry.location):
        return Path(entry.location)
    try:
        return read_bytes(entry.location, entry.offset, entry.size)
    except Exception as error:  # each remote file system has its own
        cause = getattr(error, "strerror", None) or error
        raise InputError(
            f"{entry.path!r} cannot be fetched: {type(error).__name__}: {cause}. Check that it is there and that this "
            "machine may read it"
        ) from error
