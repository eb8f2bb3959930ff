"""Oxford-IIIT Pet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Examples, FileEntry
from .masks import MaskFile
from .metadata import read_columns
from .reader import CategoryReader
from .voc import read_annotation

_PET, _BACKGROUND, _BORDER = (frozenset({value}) for value in (1, 2, 3))


@register_dataset(
    "oxford_pets",
    title="Oxford-IIIT Pet",
    source="Parkhi et al., Cats and Dogs, CVPR 2012",
    gives=("labels", "masks", "boxes"),
    training_split="trainval",
)
@dataclass(frozen=True)
class OxfordPets(CategoryReader):
    """Oxford-IIIT Pet: 37 breeds, every pixel annotated.

    ::

        ROOT/annotations/list.txt                  Abyssinian_100 1 1 1   (name, class from 1, species, breed)
        ROOT/annotations/trainval.txt, test.txt    the same of a split
        ROOT/annotations/trimaps/Abyssinian_100.png    1 pet, 2 background, 3 border (left out)
        ROOT/annotations/xmls/Abyssinian_100.xml       box of the head, of some pictures (only for boxes=True)
        ROOT/images/Abyssinian_100.jpg

    With ``classes="own"`` the model's classes are the breeds in the list's order: number less 1; with "names" the breed
    is looked up among the model's classes, or in class_map.
    """

    split: str = option("test", "which pictures", choices=("trainval", "test", "list"))
    classes: str = option(
        "own", "what the labels are: the list's own numbers, or breeds by name", choices=("own", "names")
    )
    boxes: bool = option(False, "give the boxes of heads, and leave out pictures without; masks show the whole pet")

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        folder = root / "annotations"
        records = read_columns(folder / f"{self.split}.txt", ("name", "class", "species", "breed"))
        breeds = {record.text("name"): record.text("name").rpartition("_")[0] for record in records}
        if self.classes == "names":
            labels, notes = self.categories(breeds.values(), classes)
        else:
            numbers = {breeds[record.text("name")]: record.whole("class", 1) for record in records}
            labels = {breed: (classes.check(number - 1, f"class {number}"),) for breed, number in numbers.items()}
            notes = []
        entries, without = [], 0
        for record in records:
            name = record.path("name", Path()).as_posix()
            if breeds[record.text("name")] not in labels:
                continue
            annotation = folder / "xmls" / f"{name}.xml"
            if self.boxes and not annotation.is_file():
                without += 1
                continue
            size, heads = read_annotation(annotation) if self.boxes else (None, [])
            mask = MaskFile(folder / "trimaps" / f"{name}.png", _PET, _BORDER, _BACKGROUND)
            boxes = tuple(head.box for head in heads) if self.boxes else None
            image = root / "images" / f"{name}.jpg"
            entries.append(FileEntry(name, image, labels[breeds[record.text("name")]], mask, boxes, size))
        if without:
            notes.append(f"{without} pictures without a box left out")
        return self.examples(root, entries, notes)
