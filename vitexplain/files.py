"""Writing results: whole or not at all, never a half-written file."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from .errors import ExportError


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Writes a file through a temporary neighbour, so that readers see the old file or the whole new one.

    Args:
        path: where to; missing folders are made, an existing file is replaced.
        write: writes the content to the open file it is given.

    Raises:
        ExportError: the file cannot be written; the message names the path and the cause.
    """
    target = Path(path)
    temporary = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(
            f"cannot write {str(target)!r}: {type(error).__name__}: {error}. Check that the folder can be written to "
            "and has room"
        ) from error
    return target


def save_scores(scores: Tensor, path: str | os.PathLike[str]) -> Path:
    """Raw scores as a float32 (or wider) `.npy` array of the same shape."""
    return write_whole(path, lambda file: np.save(file, scores.cpu().numpy(), allow_pickle=False))


def save_arrays(arrays: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Several tensors in one compressed `.npz`."""
    plain: dict[str, Any] = {name: array.cpu().numpy() for name, array in arrays.items()}
    return write_whole(path, lambda file: np.savez_compressed(file, **plain))


def save_json(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """A record as indented UTF-8 JSON."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    return write_whole(path, lambda file: file.write(text.encode()))
