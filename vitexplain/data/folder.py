"""The user's own pictures, with masks or boxes beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..images import find_images
from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Box, Examples, FileEntry
from .image_folder import folder_class
from .masks import MaskFile
from .metadata import Record, inside, read_csv, read_object
from .reader import FileReader


@register_dataset(
    "folder",
    title="Folder of pictures with masks or boxes",
    source="the project's own layout",
    gives=("labels", "masks", "boxes"),
)
@dataclass(frozen=True)
class Folder(FileReader):
    """Pictures, with masks of the same name or boxes in a table.

    ::

        ROOT/images/…/NAME.jpg     pictures; the first subfolder, if any, names the class
        ROOT/masks/…/NAME.png      masks in the same subfolders (optional): above 0 object, 255 left out
        ROOT/boxes.csv             file,x0,y0,x1,y1, a line for each box (optional)
        ROOT/boxes.json            or {"FILE": [[x0, y0, x1, y1], …], …}
        ROOT/classes.csv           file,class, a line for each class (optional; the subfolder counts without)
        ROOT/classes.json          or {"FILE": class, …}, class a name, WordNet id, index, or a list of these

    FILE is the picture's path below images. Boxes are in pixels, edges exclusive.
    """

    images: str = option("images", "folder of the pictures, below the data set's folder")
    masks: str = option("masks", "folder of the masks, below the data set's folder; used if it is there")
    ignored: int = option(255, "pixel value of masks that is left out; -1 for none", minimum=-1, maximum=65535)
    label: str = option("", "class of all pictures, by name, WordNet id or index; empty: from classes.* or subfolders")

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        folder, masks = (self._folder(root, name) for name in (self.images, self.masks))
        pictures = {file.relative_to(folder).as_posix(): file for file in find_images(folder)}
        boxes = _boxes(root)
        labels = self._labels(root, folder, pictures, classes)
        listed = [name for name in (*(boxes or ()), *labels) if name not in pictures]
        pictures |= {name: inside(folder, name) for name in listed}  # they will be reported as missing
        entries = [
            FileEntry(
                name,
                file,
                labels.get(name, ()),
                MaskFile((masks / name).with_suffix(".png"), ignored=frozenset({self.ignored} - {-1}))
                if masks.is_dir()
                else None,
                None if boxes is None else boxes.get(name, ()),
            )
            for name, file in pictures.items()
        ]
        return self.examples(root, entries)

    def _folder(self, root: Path, name: str) -> Path:
        return Record(root, "option", {"folder": name}).path("folder", root)

    def _labels(
        self, root: Path, folder: Path, pictures: dict[str, Path], classes: ModelClasses
    ) -> dict[str, tuple[int, ...]]:
        if self.label:
            label = classes.find(self.label)
            return {name: (label,) for name in pictures}
        found: dict[str, tuple[int, ...]] = {}
        table = _table(root, "classes")
        if table is None:
            known = {
                name: folder_class(folder / name, classes)
                for name in sorted({_first(name) for name in pictures} - {""})
            }
            return {name: (known[_first(name)],) for name in pictures if _first(name)}
        for record, name, value in _entries(table, "class"):
            found[name] = tuple(sorted({*found.get(name, ()), *classes.values(record, value)}))
        return found


def _first(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _boxes(root: Path) -> dict[str, tuple[Box, ...]] | None:
    table = _table(root, "boxes")
    if table is None:
        return None
    found: dict[str, tuple[Box, ...]] = {}
    for record, name, value in _entries(table, "x0", "y0", "x1", "y1"):
        found[name] = (*found.get(name, ()), *(record.box(each) for each in value))
    return found


def _table(root: Path, stem: str) -> Path | None:
    found = [file for file in (root / f"{stem}.csv", root / f"{stem}.json") if file.is_file()]
    if len(found) > 1:
        raise InputError(f"found both {str(found[0])!r} and {str(found[1])!r}, expected one of them; remove the other")
    return found[0] if found else None


def _entries(table: Path, *columns: str) -> Iterator[tuple[Record, str, Any]]:
    """Each file of a table with its value: boxes as a list of four numbers each, classes as they stand."""
    if table.suffix == ".csv":
        for record in read_csv(table, ("file", *columns)):
            values = [record.content[column] for column in columns]
            yield record, _name(record, record.text("file")), values[0] if len(values) == 1 else [values]
    else:
        whole = read_object(table)
        for name, value in whole.content.items():
            record = Record(table, repr(name), {"value": value})
            yield record, _name(record, name), value if len(columns) == 1 else record.sequence("value")


def _name(record: Record, name: str) -> str:
    return Record(record.file, record.place, {"file": name}).path("file", Path()).as_posix()
