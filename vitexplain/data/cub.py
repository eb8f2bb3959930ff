"""Caltech-UCSD Birds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Examples, FileEntry
from .masks import MaskFile
from .metadata import Record, read_columns
from .reader import FileReader

_TRAINING = {"train": True, "test": False}


@register_dataset(
    "cub",
    title="Caltech-UCSD Birds 200-2011",
    source="Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, CNS-TR-2011-001",
    gives=("labels", "masks", "boxes"),
)
@dataclass(frozen=True)
class Cub(FileReader):
    """Caltech-UCSD Birds 200-2011: 200 species, one box a picture.

    ::

        ROOT/images.txt               1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
        ROOT/bounding_boxes.txt       1 60.0 27.0 325.0 304.0        (x, y, width, height)
        ROOT/image_class_labels.txt   1 1                            (classes from 1)
        ROOT/train_test_split.txt     1 0                            (1 training, 0 test)
        ROOT/images/001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
        ROOT/segmentations/…          the same path as .png, grey by the number of annotators (optional)

    The model's classes are the species in their order: number less 1. Object is where at least half of the grey scale
    is reached, that is where more than two of five annotators saw the bird.
    """

    split: str = option("test", "which pictures", choices=("train", "test", "all"))

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        images = _by_id(root / "images.txt", "file")
        boxes = _by_id(root / "bounding_boxes.txt", "x", "y", "width", "height")
        species = _by_id(root / "image_class_labels.txt", "class")
        training = _by_id(root / "train_test_split.txt", "training")
        masks = root / "segmentations"
        entries = []
        for key, record in images.items():
            for table in (boxes, species, training):
                if key not in table:
                    raise record.fault(f"picture {key}, of which the other files know nothing", "a line in each file")
            if self.split != "all" and training[key].flag("training") != _TRAINING[self.split]:
                continue
            image = record.path("file", root / "images")
            name = image.relative_to(root / "images")
            box = boxes[key].box([boxes[key].number(each) for each in ("x", "y", "width", "height")], True)
            label = classes.check(species[key].whole("class", 1) - 1, f"class {species[key].content['class']}")
            mask = MaskFile((masks / name).with_suffix(".png"), frozenset(range(128, 256))) if masks.is_dir() else None
            entries.append(FileEntry(name.as_posix(), image, (label,), mask, (box,)))
        return self.examples(root, entries)


def _by_id(file: Path, *columns: str) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for record in read_columns(file, ("id", *columns)):
        key = record.text("id")
        if key in found:
            raise record.fault(f"the picture {key} again", f"one line each; the first is {found[key].place}")
        found[key] = record
    return found
