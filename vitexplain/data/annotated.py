"""The project's own layout: one JSON list of pictures with masks, boxes or numbered segments."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Box, Examples, FileEntry
from .masks import MaskFile
from .metadata import Record, read_records
from .reader import FileReader

_CLASS_KEYS = ("classes", "imagenet", "label")


@register_dataset(
    "annotated",
    title="Pictures listed in annotations.json",
    source="the project's own layout",
    gives=("labels", "masks", "boxes"),
)
@dataclass(frozen=True)
class Annotated(FileReader):
    """Pictures listed in one JSON file, the project's own simple layout.

    ::

        ROOT/annotations.json    [record, …]
        ROOT/images/FILE         the pictures
        ROOT/masks/MASK          the masks

    A record has ``"file"`` and what is known of:

    - ``"classes"`` (or ``"imagenet"``, or ``"label"``): a class of the model by index, name or WordNet id, a list
      of these, or null;
    - ``"mask"``: a picture, above 0 object, 255 left out (see the options);
    - ``"boxes"``: ``[[x0, y0, x1, y1], …]`` in pixels of the picture, edges exclusive;
    - ``"segments"``: ``[{"value": 3, "category": "chair", "classes": [423, 559], "iscrowd": 0}, …]``, where the mask
      has the segment's value. Then each category is an example: its segments are the object, its crowds are left
      out, everything else is background;
    - ``"w"`` and ``"h"``: width and height of the picture, checked against it.
    """

    images: str = option("images", "folder of the pictures, below the data set's folder")
    masks: str = option("masks", "folder of the masks, below the data set's folder")
    mask_key: str = option("mask", "the field that names the mask")
    boxes_key: str = option("boxes", "the field with boxes in pixels of the picture")
    ignored: int = option(255, "pixel value of masks that is left out; -1 for none", minimum=-1, maximum=65535)
    keep_unknown: bool = option(True, "keep pictures and objects without a class of the model")

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        options = Record(root, "options", {"images": self.images, "masks": self.masks})
        images, masks = options.path("images", root), options.path("masks", root)
        entries, unknown = [], 0
        for record in read_records(root / "annotations.json"):
            found = (
                self._segments(record, images, masks, classes)
                if record.has("segments")
                else [self._whole(record, images, masks, classes)]
            )
            entries += [each for each in found if each.labels or self.keep_unknown]
            unknown += sum(not each.labels for each in found)
        notes = (
            [f"{unknown} examples without a class of the model left out"] if unknown and not self.keep_unknown else []
        )
        return self.examples(root, entries, notes)

    def _whole(self, record: Record, images: Path, masks: Path, classes: ModelClasses) -> FileEntry:
        image = record.path("file", images)
        mask = None
        if record.has(self.mask_key):
            mask = MaskFile(record.path(self.mask_key, masks), ignored=frozenset({self.ignored} - {-1}))
        boxes: tuple[Box, ...] | None = None
        if record.has(self.boxes_key):
            boxes = tuple(record.box(each) for each in record.sequence(self.boxes_key))
        return FileEntry(record.text("file"), image, _classes(record, classes), mask, boxes, _size(record))

    def _segments(self, record: Record, images: Path, masks: Path, classes: ModelClasses) -> list[FileEntry]:
        image, mask = record.path("file", images), record.path(self.mask_key, masks)
        groups: dict[str, list[Record]] = defaultdict(list)
        for segment in record.records("segments"):
            groups[segment.text("category")].append(segment)
        entries = []
        for category, segments in groups.items():
            values: dict[bool, set[int]] = {True: set(), False: set()}
            for segment in segments:
                crowd = segment.has("iscrowd") and segment.flag("iscrowd")
                values[crowd].add(segment.whole("value", 1, 65535))
            if not values[False]:
                continue  # nothing but a crowd
            labels = tuple(sorted({label for segment in segments for label in _classes(segment, classes)}))
            found = MaskFile(mask, frozenset(values[False]), frozenset(values[True]))
            entries.append(FileEntry(f"{record.text('file')}#{category}", image, labels, found, None, _size(record)))
        return entries


def _classes(record: Record, classes: ModelClasses) -> tuple[int, ...]:
    key = next((key for key in _CLASS_KEYS if record.has(key)), None)
    return () if key is None else classes.values(record, record.content[key])


def _size(record: Record) -> tuple[int, int] | None:
    return (record.whole("h", 1), record.whole("w", 1)) if record.has("w") or record.has("h") else None
