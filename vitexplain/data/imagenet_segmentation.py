"""ImageNet-Segmentation: pictures and foreground masks in one MATLAB file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InputError, UnknownNameError
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Entry, Examples
from .example import Example
from .optional import import_optional
from .reader import Reader


@dataclass(frozen=True)
class MatlabEntry(Entry):
    """One picture of the file.

    Attributes:
        file: the MATLAB file.
        index: its place there.
        labels: see `Example`.
    """

    file: Path
    index: int
    labels: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def load(self) -> Example:
        try:
            with _opened(self.file) as content:
                picture = self._array(content[content["value/img"][self.index, 0]], 3)
                cell = content[content["value/gt"][self.index, 0]]
                mask = self._array(content[cell[0, 0]], 2)
        except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
            raise self._fault(f"{type(error).__name__}: {error}") from error
        # MATLAB stores columns first, so that axes arrive the other way round
        picture, mask = picture.transpose(2, 1, 0), mask.transpose(1, 0)
        if picture.dtype != np.uint8 or picture.shape[2] != 3 or mask.shape != picture.shape[:2]:
            raise self._fault(f"a picture of {picture.shape} {picture.dtype} and a mask of {mask.shape}")
        if mask.dtype.kind not in "biuf" or not np.isin(mask, (-1, 0, 1)).all():
            raise self._fault(f"mask values {np.unique(mask)[:5].tolist()}")
        return Example(self.name, Image.fromarray(picture.copy()), self.labels, mask.astype(np.int8))

    def _array(self, dataset: Any, axes: int) -> npt.NDArray[Any]:
        if getattr(dataset, "ndim", None) != axes:
            raise self._fault(f"{dataset}")
        return np.asarray(dataset)

    def _fault(self, found: str) -> InputError:
        return InputError(
            f"{str(self.file)!r}, picture {self.index}: found {found}, expected a picture (H, W, 3) in uint8 and a "
            "mask (H, W) of 0, 1 and -1, each stored with its axes turned round"
        )


@register_dataset(
    "imagenet_segmentation",
    title="ImageNet-Segmentation",
    source="Guillaumin, Küttel, Ferrari, ImageNet Auto-Annotation with Segmentation Propagation, IJCV 2014",
    gives=("labels", "masks"),
    root="file",
)
@dataclass(frozen=True)
class ImageNetSegmentation(Reader):
    """ImageNet-Segmentation as published: one MATLAB 7.3 file with 4,276 pictures.

    ::

        gtsegs_ijcv.mat
            /value/img      (n, 1) references to pictures (3, W, H), uint8
            /value/gt       (n, 1) references to cells (1, 1) that refer to masks (W, H): 1 object, 0 background,
                            -1 left out
            /value/target   (n, 1) references to WordNet ids as characters (optional)

    Axes are turned round, as MATLAB stores them. Ids that are no class of the model give no label.
    """

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        with _opened(root) as content:
            count = _count(root, content)
            ids = _ids(root, content, count) if "value/target" in content else []
        known = {each: _label(each, classes) for each in set(ids)}
        notes = [
            f"{sum(not known[each] for each in ids)} pictures without label: their ids are no classes of the model"
        ]
        entries = [
            MatlabEntry(f"{index:04d}{f'#{ids[index]}' if ids else ''}", root, index, known[ids[index]] if ids else ())
            for index in range(count)
        ]
        return Examples(entries, notes if not all(known.values()) else ())


def _opened(file: Path) -> Any:
    h5py = import_optional("h5py", "MATLAB 7.3 files")
    try:
        return h5py.File(file, "r")
    except OSError as error:
        raise InputError(
            f"{str(file)!r} cannot be read as MATLAB 7.3 (HDF5): {error}; expected gtsegs_ijcv.mat as published"
        ) from error


def _count(file: Path, content: Any) -> int:
    shapes = [getattr(content.get(f"value/{name}"), "shape", None) for name in ("img", "gt")]
    if shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != 1 or not shapes[0][0]:
        raise InputError(
            f"{str(file)!r}: found /value/img {shapes[0]} and /value/gt {shapes[1]}, expected two lists (n, 1) of "
            "references; is it gtsegs_ijcv.mat?"
        )
    return int(shapes[0][0])


def _ids(file: Path, content: Any, count: int) -> list[str]:
    try:
        return [_text(content, content["value/target"][index, 0]) for index in range(count)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError) as error:
        raise InputError(
            f"{str(file)!r}: found a /value/target that cannot be read ({type(error).__name__}: {error}), expected "
            f"{count} references to WordNet ids as characters, or none"
        ) from error


def _text(content: Any, reference: Any) -> str:
    return "".join(chr(code) for code in np.asarray(content[reference]).flatten())


def _label(wordnet_id: str, classes: ModelClasses) -> tuple[int, ...]:
    try:
        return (classes.find(wordnet_id),)
    except UnknownNameError:
        return ()
