"""Pictures sorted into one folder a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, TargetError, UnknownNameError
from ..images import find_images
from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Examples, FileEntry
from .reader import FileReader


@register_dataset(
    "imagefolder",
    title="One folder a class",
    source="the layout of ImageNet's training set",
    gives=("labels",),
)
@dataclass(frozen=True)
class ImageFolder(FileReader):
    """Pictures sorted into one folder a class.

    ::

        ROOT/CLASS/…/PICTURE

    CLASS is a class of the model: its name (underscores for spaces), WordNet id or index. With ``classes="own"`` the
    model's classes are the folders in sorted order, whatever their names; those without pictures count, too.
    """

    classes: str = option(
        "names",
        "what a folder's name means: a class of the model, or only its place in sorted order",
        choices=("names", "own"),
    )

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        pictures = [(file, file.relative_to(root)) for file in find_images(root)]
        loose = [file for file, relative in pictures if len(relative.parts) < 2]
        if loose:
            raise InputError(f"{str(loose[0])!r} lies in no class folder; expected:\n\n{self.info.layout}")
        if self.classes == "own":
            folders = sorted(each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
            if classes.labels is not None and len(folders) != len(classes.labels):
                # with one missing, those behind it would be taken for the class before
                raise InputError(
                    f"found {len(folders)} class folders in {str(root)!r}, expected {len(classes.labels)}, one for "
                    "each label of the model: make an empty folder for a class without pictures, or let names tell "
                    "the class (classes=names)"
                )
            labels = {folder: index for index, folder in enumerate(folders)}
        else:
            folders = sorted({relative.parts[0] for _, relative in pictures})
            labels = {folder: folder_class(root / folder, classes) for folder in folders}
        entries = [FileEntry(relative.as_posix(), file, (labels[relative.parts[0]],)) for file, relative in pictures]
        return self.examples(root, entries)


def folder_class(folder: Path, classes: ModelClasses) -> int:
    """The class that a folder is named after.

    Raises:
        InputError: there is no such class.
    """
    try:
        return classes.find(folder.name)
    except (UnknownNameError, TargetError) as error:
        raise InputError(
            f"the folder {str(folder)!r} is named after no class of the model: {error}. Rename it, or pass the labels "
            "of the model"
        ) from error
