"""Writing results: whole or not at all, under names that every system can hold."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import ExportError

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

_LONGEST_NAME = 150  # bytes of a name; file systems allow 255, and method, class and suffix follow
_NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f/\\\ud800-\udfff]")  # lone surrogates stand for undecodable bytes


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Writes a file through a temporary neighbour, so that readers see the old file or the whole new one.

    Args:
        path: where to; missing folders are made, an existing file is replaced.
        write: writes the content to the open file it is given.

    Returns:
        The path.

    Raises:
        ExportError: the file cannot be written; the message names the path and the cause.
    """
    target = Path(path)
    try:
        temporary = target.with_name(f".{uuid.uuid4().hex}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        cause = error.strerror or error
        raise ExportError(
            f"cannot write {str(target)!r}: {type(error).__name__}: {cause}. Check that the folder can be written to "
            "and has room"
        ) from error
    except (ValueError, TypeError) as error:
        raise ExportError(f"cannot write {str(target)!r}: {type(error).__name__}: {error}") from error
    return target


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a folder for results, with its parents, and checks that it can be written to.

    Raises:
        ExportError: it cannot be made, is a file, or is read-only.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "it is read-only")
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ExportError(
            f"cannot use the folder {str(folder)!r} for results: {type(error).__name__}: {cause}. Choose a folder that "
            "can be made and written to"
        ) from error
    return folder


def check_place(path: Path) -> None:
    """Makes sure that a file can be written here, in a folder that is made, before hours are spent on its content.

    Raises:
        ExportError: the folder cannot be made or written to, or there is a folder of the file's name.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise ExportError(f"cannot write {str(path)!r}: found a folder there, expected a file or nothing")


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names for files, one each, that stay apart on every file system (capitals and accents may not count there).

    A name taken before gets a number (``x``, ``x-2``), which never is the name of another entry. Characters that no
    file name holds become ``_``; long names are cut.

    Args:
        names: wished names, without suffix.
    """
    cleaned = [_clean(name) for name in names]
    taken = {_folded(name) for name in cleaned}
    numbers: dict[str, int] = {}
    distinct = []
    for name in cleaned:
        key, wished = _folded(name), name
        while key in numbers and _folded(name) in taken:
            numbers[key] += 1
            name = f"{wished}-{numbers[key]}"
        numbers.setdefault(key, 1)
        taken.add(_folded(name))
        distinct.append(name)
    return distinct


def save_scores(scores: Tensor, path: str | os.PathLike[str]) -> Path:
    """Raw scores as a float32 (or wider) `.npy` array of the same shape.

    Raises:
        ExportError: the file cannot be written.
    """
    return write_whole(path, lambda file: np.save(file, _array(scores), allow_pickle=False))


def save_arrays(arrays: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Several tensors in one compressed `.npz`.

    Raises:
        ExportError: the file cannot be written.
    """
    plain: dict[str, Any] = {name: _array(array) for name, array in arrays.items()}
    return write_whole(path, lambda file: np.savez_compressed(file, **plain))


def save_json(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """A record as indented UTF-8 JSON, on the disk when this returns; NaN and infinity, which JSON lacks, become null.

    Raises:
        ExportError: the record holds something else than plain types, or the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        text = json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False)
        file.write(f"{text}\n".encode())
        _to_disk(file)

    return write_whole(path, write)


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16, and half precision would lose range where others read the file
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
    array: npt.NDArray[Any] = wide.numpy()
    return array


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return as_text(value)
    return value


def as_text(name: str) -> str:
    r"""A file's name as it can be written down: bytes in it that are no text become ``\udcXX``."""
    return name.encode("utf-8", "backslashreplace").decode()


def _clean(name: str) -> str:
    name = _NOT_IN_NAMES.sub("_", name).lstrip(".") or "image"  # a leading dot would hide the results
    return name.encode()[:_LONGEST_NAME].decode(errors="ignore").rstrip()


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", name).casefold())


def write_parquet(table: pa.Table, path: Path) -> None:
    """A table as a Parquet file with checksums, on the disk when this returns.

    Raises:
        ExportError: the file cannot be written.
    """
    import pyarrow.parquet as pq

    def write(file: BinaryIO) -> None:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        _to_disk(file)

    write_whole(path, write)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A table that `write_parquet` wrote, its checksums checked; of these columns only, if any are named.

    Raises:
        OSError: there is no such file, or it is damaged.
        pyarrow.ArrowException: it is no such table.
    """
    import pyarrow.parquet as pq

    with path.open("rb") as file:  # Arrow itself opens no path that is not UTF-8
        return pq.read_table(file, columns=columns, page_checksum_verification=True)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
