"""CIFAR-10 from the files in which it is handed around; nothing is unpickled."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InputError
from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Entry, Examples
from .example import Example
from .reader import Reader

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The ten classes, in the order of their labels."""

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_TRAINING = tuple(f"data_batch_{number}" for number in range(1, 6))
_BATCHES = {"train": _TRAINING, "test": ("test_batch",)}
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")


@dataclass(frozen=True)
class Cifar10Entry(Entry):
    """One picture among many in a file.

    Attributes:
        file: where it is.
        split: which part of the file, where the file has both.
        place: its number there.
        label: 0 to 9.
    """

    file: Path
    split: str
    place: int
    label: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def load(self) -> Example:
        pictures, _ = read_cifar10_file(self.file, self.split)
        return Example(self.name, Image.fromarray(pictures[self.place]), (self.label,))


@register_dataset(
    "cifar10",
    title="CIFAR-10",
    source="Krizhevsky, Learning multiple layers of features from tiny images, 2009",
    gives=("labels",),
)
@dataclass(frozen=True)
class Cifar10(Reader):
    """CIFAR-10, whose 32 × 32 pictures lie in a few large files. In ROOT is one of these.

    ::

        cifar-10-batches-py/data_batch_1 … data_batch_5, test_batch     as torchvision unpacks it
        cifar-10-batches-bin/data_batch_1.bin … test_batch.bin          the authors' binary version
        NAME.npz                                                        x_train, y_train, x_test, y_test

    Or ROOT is one of these folders itself. In the ``.npz``, pictures are (n, 32, 32, 3) uint8 and labels (n,) whole
    numbers. The classes of the model are taken to be those of CIFAR-10, in its order.

    The files of the first layout are pickles. They are not unpickled, which would run code from the file: the bytes and
    numbers in them are read off.
    """

    split: str = option("test", "which part", choices=tuple(_BATCHES))

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        classes.check(len(CLASS_NAMES) - 1, f"{len(CLASS_NAMES)} classes in {str(root)!r}")
        entries = [
            Cifar10Entry(f"{self.split}/{file.stem}/{place:05d}", file, self.split, place, int(label))
            for file in self._files(root)
            for place, label in enumerate(read_cifar10_file(file, self.split)[1])
        ]
        return Examples(entries)

    def _files(self, root: Path) -> list[Path]:
        for folder in (root, *(root / each for each in _FOLDERS)):
            for suffix in ("", ".bin"):
                files = [folder / f"{name}{suffix}" for name in _BATCHES[self.split]]
                if all(file.is_file() for file in files):
                    return files
        archives = sorted(root.glob("*.npz"))
        if len(archives) != 1:
            raise InputError(
                f"found {len(archives)} .npz files and no complete {self.split} batches in {str(root)!r}; expected:\n\n"
                f"{self.info.layout}"
            )
        return archives


@lru_cache(maxsize=8)
def read_cifar10_file(file: Path, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pictures (n, 32, 32, 3) and labels (n,) of a file of any layout of `Cifar10`.

    Args:
        file: one of its files.
        split: which part of a ``.npz``; the other files have one part.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        if file.suffix == ".npz":
            pictures, labels = _from_archive(file, split)
        elif file.suffix == ".bin":
            pictures, labels = _from_records(file)
        else:
            pictures, labels = _from_pickle(file)
    except Exception as error:  # what archives and arrays raise on broken content has no common base
        raise InputError(
            f"{str(file)!r} cannot be read as a part of CIFAR-10 ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if len(pictures) != len(labels) or not len(labels) or not 0 <= labels.min() <= labels.max() < len(CLASS_NAMES):
        raise InputError(
            f"{str(file)!r} holds {len(pictures)} pictures and {len(labels)} labels, expected as many, with labels "
            f"from 0 to {len(CLASS_NAMES) - 1}"
        )
    return pictures, labels


def _from_archive(file: Path, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
        pictures, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (_SIDE, _SIDE, 3) or labels.dtype.kind not in "iu":
        raise ValueError(f"found pictures {pictures.dtype} {pictures.shape} and labels {labels.dtype}")
    return pictures, labels.reshape(-1).astype(np.int64)


def _from_records(file: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """One byte of label, then 3072 of pixels, again and again."""
    records = np.fromfile(file, np.uint8).reshape(-1, 1 + _PIXELS)
    return _upright(records[:, 1:]), records[:, 0].astype(np.int64)


def _from_pickle(file: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The one long text of bytes in a pickle, and the whole numbers after the text ``labels``; no opcode is run."""
    pixels, labels, after_labels = b"", list[int](), False
    for name, value in _opcodes(file.read_bytes()):
        if isinstance(value, str | bytes | bytearray):
            raw = value.encode("latin-1", "replace") if isinstance(value, str) else bytes(value)
            after_labels = raw == b"labels" or (after_labels and not raw)
            pixels = max(pixels, raw, key=len)
        elif after_labels and name in ("BININT1", "BININT2", "BININT", "INT"):
            labels.append(int(value))
    return _upright(np.frombuffer(pixels, np.uint8).reshape(-1, _PIXELS)), np.array(labels, np.int64)


def _opcodes(content: bytes) -> Iterator[tuple[str, Any]]:
    for opcode, value, _ in pickletools.genops(content):
        if value is not None and "PUT" not in opcode.name and "GET" not in opcode.name:
            yield opcode.name, value


def _upright(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pictures (n, 32, 32, 3) from rows of all red, then all green, then all blue pixels."""
    return np.ascontiguousarray(rows.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))
