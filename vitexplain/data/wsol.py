"""Weakly supervised object localisation: the metadata folders of its usual protocol."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Examples, FileEntry
from .masks import Mask, MaskSource, combine, read_values, resize_nearest
from .metadata import Record, read_columns
from .reader import FileReader

_BOX = ("file", "x0", "y0", "x1", "y1")
_MASK = ("file", "mask", "ignore")


@dataclass(frozen=True)
class UnionMask(MaskSource):
    """The union of several mask files, where above 0; what only the ignore file covers is left out.

    Attributes:
        masks: one file an instance.
        ignored: the ignore file, if there is one.
        size: height and width of the picture, to which each file is brought by nearest neighbour.
    """

    masks: tuple[Path, ...]
    ignored: Path | None
    size: tuple[int, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.masks if self.ignored is None else (*self.masks, self.ignored)

    def read(self) -> Mask:
        shown, ignored = np.zeros(self.size, bool), np.zeros(self.size, bool)
        for file in self.masks:
            shown |= resize_nearest(read_values(file) > 0, self.size)
        if self.ignored is not None:
            ignored = resize_nearest(read_values(self.ignored) > 0, self.size)
        return combine(shown, ignored)


@register_dataset(
    "wsol",
    title="Weakly supervised object localisation",
    source="Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, CVPR 2020",
    gives=("labels", "masks", "boxes"),
)
@dataclass(frozen=True)
class Wsol(FileReader):
    """Data sets in the metadata format of the WSOL protocol (ImageNet, CUB, OpenImages30k).

    ::

        ROOT/image_ids.txt      val/0001.JPEG                     one path a line, below the folder of pictures
        ROOT/class_labels.txt   val/0001.JPEG,65                  class of the model
        ROOT/image_sizes.txt    val/0001.JPEG,500,375             width, height
        ROOT/localization.txt   val/0001.JPEG,111,107,441,374     a line for each box: x0, y0, x1, y1
                                val/0001.jpg,m/1a.png,m/1.png     or for each mask: mask file, ignore file (once)

    Boxes are taken as they stand. Masks of one picture are united; the ignore file is left out where no mask is.
    """

    images: str = option("", "folder of the pictures and masks; empty: images below the metadata's folder")
    kind: str = option("boxes", "what localization.txt holds", choices=("boxes", "masks"))

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        folder = Path(self.images).expanduser() if self.images else root / "images"
        labels = {each.text("file"): each for each in _lines(root / "class_labels.txt", ("file", "class"))}
        sizes = {each.text("file"): each for each in _lines(root / "image_sizes.txt", ("file", "width", "height"))}
        places: dict[str, list[Record]] = defaultdict(list)
        for each in _lines(root / "localization.txt", _BOX if self.kind == "boxes" else _MASK):
            places[each.text("file")].append(each)
        entries = []
        for record in _lines(root / "image_ids.txt", ("file",)):
            name = record.text("file")
            for file, table in (("class_labels", labels), ("image_sizes", sizes), ("localization", places)):
                if name not in table:
                    raise record.fault(f"{name!r}, which {file}.txt does not have", "a line in each file")
            size = sizes[name].whole("height", 1), sizes[name].whole("width", 1)
            label = classes.check(labels[name].whole("class", 0), f"class {labels[name].content['class']}")
            found = places[name]
            boxes = (
                tuple(each.box([each.number(key) for key in _BOX[1:]]) for each in found)
                if self.kind == "boxes"
                else None
            )
            mask = _mask(found, folder, size) if self.kind == "masks" else None
            entries.append(FileEntry(name, record.path("file", folder), (label,), mask, boxes, size))
        return self.examples(folder, entries)


def _lines(file: Path, columns: tuple[str, ...]) -> list[Record]:
    return read_columns(file, columns, ",")


def _mask(records: list[Record], folder: Path, size: tuple[int, int]) -> UnionMask:
    for record in records[1:]:
        if record.content["ignore"]:
            raise record.fault("a second ignore file", "one, in the first line of a picture")
    ignored = records[0].path("ignore", folder) if records[0].content["ignore"] else None
    return UnionMask(tuple(record.path("mask", folder) for record in records), ignored, size)
