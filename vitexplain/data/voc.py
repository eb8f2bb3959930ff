"""PASCAL VOC: segmentations and boxes of 20 categories."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Box, Examples, FileEntry
from .masks import MaskFile
from .metadata import Record, read_columns, read_xml
from .reader import CategoryReader

CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The 20 categories; place + 1 is the value in segmentations."""

_VOID = 255


@dataclass(frozen=True)
class BoxObject:
    """An object with its box."""

    category: str
    difficult: bool
    box: Box


@register_dataset(
    "voc",
    title="PASCAL VOC 2012",
    source="Everingham et al., The PASCAL Visual Object Classes Challenge: A Retrospective, IJCV 2015",
    gives=("labels", "masks", "boxes"),
)
@dataclass(frozen=True)
class Voc(CategoryReader):
    """PASCAL VOC 2007 to 2012, segmentation or detection.

    ::

        ROOT/ImageSets/Segmentation/val.txt    (task segmentation; Main for detection) one picture's name a line
        ROOT/JPEGImages/2007_000033.jpg
        ROOT/Annotations/2007_000033.xml       size and boxes
        ROOT/SegmentationClass/2007_000033.png (task segmentation) category 1 to 20, 0 background, 255 left out

    One example is one picture and one category named in its annotation. Boxes count pixels from 1 with both edges
    inside; they are moved to edges from 0, exclusive.
    """

    task: str = option("segmentation", "masks and boxes, or boxes alone", choices=("segmentation", "detection"))
    split: str = option("val", "the list of pictures, such as train, val, trainval or test")
    difficult: bool = option(True, "keep boxes of objects marked as difficult")

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        folder = {"segmentation": "Segmentation", "detection": "Main"}[self.task]
        listed = Record(root, "options", {"split": f"ImageSets/{folder}/{self.split}.txt"}).path("split", root)
        annotations = {}
        for record in read_columns(listed, ("name",)):
            file = record.path("name", root / "Annotations")
            annotations[file.name] = read_annotation(file.with_name(f"{file.name}.xml"), CATEGORIES)
        labels, notes = self.categories(CATEGORIES, classes)
        entries = []
        for name, (size, objects) in annotations.items():
            boxes: dict[str, list[Box]] = defaultdict(list)
            for each in objects:
                if each.category in labels and (self.difficult or not each.difficult):
                    boxes[each.category].append(each.box)
            for category, found in boxes.items():
                value = frozenset({CATEGORIES.index(category) + 1})
                mask = MaskFile(root / "SegmentationClass" / f"{name}.png", value, frozenset({_VOID}))
                entries.append(
                    FileEntry(
                        f"{name}#{category}",
                        root / "JPEGImages" / f"{name}.jpg",
                        labels[category],
                        mask if self.task == "segmentation" else None,
                        tuple(found),
                        size,
                    )
                )
        return self.examples(root, entries, notes)


def read_annotation(file: Path, categories: tuple[str, ...] = ()) -> tuple[tuple[int, int], list[BoxObject]]:
    """Height and width of the picture and its objects, from an annotation in VOC's format.

    Args:
        file: the XML file.
        categories: those there are; empty for any.

    Raises:
        InputError: the file cannot be read, or something in it is missing or wrong.
    """
    root = read_xml(file)
    size = _fields(file, "size", root.find("size"))
    objects = []
    for index, element in enumerate(root.findall("object")):
        record = _fields(file, f"object {index}", element)
        corners = _fields(file, f"object {index}, bndbox", element.find("bndbox"))
        category = record.text("name")
        if categories and category not in categories:
            raise record.fault(f"the category {category!r}", f"one of {', '.join(categories)}")
        left, top, right, bottom = (corners.number(key) for key in ("xmin", "ymin", "xmax", "ymax"))
        box = corners.box((left - 1, top - 1, right, bottom))
        objects.append(BoxObject(category, record.has("difficult") and record.flag("difficult"), box))
    return (size.whole("height", 1), size.whole("width", 1)), objects


def _fields(file: Path, place: str, element: ElementTree.Element | None) -> Record:
    return Record(file, place, {} if element is None else {child.tag: child.text for child in element})
