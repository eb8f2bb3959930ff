"""COCO: instances as polygons and run lengths."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Box, Examples, FileEntry
from .masks import Mask, MaskSource, combine
from .metadata import Record, read_object
from .optional import import_optional
from .reader import CategoryReader
from .segmentations import Segmentation, check_segmentation, draw


@dataclass(frozen=True)
class Instances(MaskSource):
    """The union of some instances; what only crowds cover is left out.

    Attributes:
        objects: segmentations of single objects.
        crowds: segmentations of groups in which objects were not told apart.
        size: height and width of the picture.
    """

    objects: tuple[Segmentation, ...]
    crowds: tuple[Segmentation, ...]
    size: tuple[int, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def read(self) -> Mask:
        shown, crowded = np.zeros(self.size, bool), np.zeros(self.size, bool)
        for segmentation in self.objects:
            shown |= draw(segmentation, self.size)
        for segmentation in self.crowds:
            crowded |= draw(segmentation, self.size)
        return combine(shown, crowded)


@register_dataset(
    "coco",
    title="COCO instances",
    source="Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014",
    gives=("labels", "masks", "boxes"),
    training_split="train2017",
)
@dataclass(frozen=True)
class Coco(CategoryReader):
    """COCO's instances, or any other data set in its JSON format.

    ::

        ROOT/annotations/instances_val2017.json    images, annotations, categories
        ROOT/val2017/000000000139.jpg              the pictures

    One example is one picture and one category: all its instances together are the object, crowds are left out (-1),
    everything else is background. Boxes are those of single objects. Objects without an area are dropped.
    """

    split: str = option("val2017", "folder of the pictures, and part of the annotations' name")
    annotations: str = option("", "annotations below the data set's folder; empty: annotations/instances_SPLIT.json")

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        options = Record(root, "options", {"split": self.split, "annotations": self._annotations})
        folder = options.path("split", root)
        content = read_object(options.path("annotations", root))
        names = {record.whole("id"): record.text("name") for record in content.records("categories")}
        images = {record.whole("id"): record for record in content.records("images")}
        labels, notes = self.categories(names.values(), classes)
        groups: dict[tuple[int, int], list[Record]] = defaultdict(list)
        for record in content.records("annotations"):
            image, category = record.whole("image_id"), record.whole("category_id")
            if image not in images:
                raise record.fault(f"image_id={image}", f"the id of one of the {len(images)} images")
            if category not in names:
                raise record.fault(f"category_id={category}", f"the id of one of the {len(names)} categories")
            groups[image, category].append(record)
        entries = []
        for (image, category), records in sorted(groups.items()):
            if names[category] in labels:
                entries.append(_entry(images[image], folder, names[category], labels[names[category]], records))
        nothing = sum(entry is None for entry in entries)
        if nothing:
            notes.append(f"{nothing} categories left out where a picture shows only crowds or objects without area")
        found = [entry for entry in entries if entry is not None]
        if any(not isinstance(each, dict) for entry in found for each in _segmentations(entry)):
            import_optional("pycocotools.mask", "polygons of COCO")  # now rather than at the first picture
        return self.examples(root, found, notes)

    @property
    def _annotations(self) -> str:
        return self.annotations or f"annotations/instances_{self.split}.json"


def _entry(
    image: Record, folder: Path, category: str, labels: tuple[int, ...], records: list[Record]
) -> FileEntry | None:
    size = image.whole("height", 1), image.whole("width", 1)
    objects: list[Segmentation] = []
    crowds: list[Segmentation] = []
    boxes: list[Box] = []
    masked = True
    for record in records:
        crowd = record.has("iscrowd") and record.flag("iscrowd")
        boxed = not crowd and 0 not in record.sequence("bbox")[2:4]
        segmentation = check_segmentation(record, size) if record.has("segmentation") else None
        if segmentation:
            (crowds if crowd else objects).append(segmentation)
        elif segmentation is None or boxed:  # lists of objects that were only boxed have empty ones
            masked = False
        if boxed:
            boxes.append(record.box(record.sequence("bbox"), width_and_height=True))
    if not boxes:
        return None
    mask = Instances(tuple(objects), tuple(crowds), size) if masked else None
    file = image.path("file_name", folder)
    return FileEntry(f"{file.relative_to(folder).as_posix()}#{category}", file, labels, mask, tuple(boxes), size)


def _segmentations(entry: FileEntry) -> tuple[Segmentation, ...]:
    return (*entry.mask.objects, *entry.mask.crowds) if isinstance(entry.mask, Instances) else ()
