"""ImageNet-S: semantic segmentations of ImageNet's own pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..images import find_images
from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Examples, FileEntry
from .image_folder import folder_class
from .masks import Mask, MaskSource, combine, read_channels
from .metadata import Record, read_columns
from .reader import FileReader

_IGNORED = 1000
# classes of ImageNet that count as one in the 919-class set: the model may answer with either
_MERGED = {
    "n04355933": "n04356056",
    "n02808440": "n04493381",
    "n03832673": "n03642806",
    "n03773504": "n04008634",
    "n15075141": "n03887697",
}


@dataclass(frozen=True)
class ClassIdMask(MaskSource):
    """A picture whose red and green say the class of each pixel: red + 256 green.

    Attributes:
        file: the picture.
        class_id: the object's.
    """

    file: Path
    class_id: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self) -> Mask:
        channels = read_channels(self.file).astype(np.int64)
        ids = channels[..., 0] + 256 * channels[..., 1]
        if not np.any(ids == self.class_id):
            raise InputError(
                f"the mask {str(self.file)!r} holds the class ids {np.unique(ids)[:6].tolist()}, expected its folder's "
                f"{self.class_id} among them: ids are places in the sorted list of all classes. If folders are "
                "missing, pass categories, the file with that list"
            )
        return combine(ids == self.class_id, ids == _IGNORED)


@register_dataset(
    "imagenet_s",
    title="ImageNet-S",
    source="Gao et al., Large-scale Unsupervised Semantic Segmentation, TPAMI 2023",
    gives=("labels", "masks"),
    training_split="train-semi",
)
@dataclass(frozen=True)
class ImageNetS(FileReader):
    """ImageNet-S with 50, 300 or 919 classes.

    ::

        ROOT/validation/n01440764/ILSVRC2012_val_00000293.JPEG
        ROOT/validation-segmentation/n01440764/ILSVRC2012_val_00000293.png

    A mask's class id is red + 256 green: 0 other, 1000 left out, else the place (from 1) of the WordNet id among all
    sorted. The object is the class of the folder; other classes are background. The five classes that merge two of
    ImageNet's have both as labels.
    """

    split: str = option("validation", "which pictures", choices=("validation", "train-semi"))
    categories: str = option("", "file with one WordNet id a line, in any order; empty: the folders there are")

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        folder, masks = root / self.split, root / f"{self.split}-segmentation"
        pictures = find_images(folder)
        folders = sorted({file.parent for file in pictures})
        if any(each.parent != folder for each in folders):
            raise InputError(f"{str(folder)!r} holds pictures in no class folder; expected:\n\n{self.info.layout}")
        ids = self._ids(masks)
        labels = {each: self._labels(each, classes) for each in folders}
        unknown = [each for each in folders if each.name not in ids]
        if unknown:
            raise InputError(
                f"the class folder {str(unknown[0])!r} is not among the {len(ids)} categories; expected a folder of "
                f"the same name in {str(masks)!r}, or a line in the file of categories"
            )
        entries = [
            FileEntry(
                file.relative_to(root).as_posix(),
                file,
                labels[file.parent],
                ClassIdMask(masks / file.parent.name / f"{file.stem}.png", ids[file.parent.name]),
            )
            for file in pictures
        ]
        return self.examples(root, entries)

    def _ids(self, masks: Path) -> dict[str, int]:
        if self.categories:
            lines = read_columns(Path(self.categories).expanduser(), ("category",))
            names = [line.text("category") for line in lines]
        else:
            names = [each.name for each in masks.iterdir() if each.is_dir()] if masks.is_dir() else []
        return {name: number for number, name in enumerate(sorted(set(names)), 1)}

    def _labels(self, folder: Path, classes: ModelClasses) -> tuple[int, ...]:
        label = folder_class(folder, classes)
        merged = _MERGED.get(folder.name)
        if merged is None:
            return (label,)
        return tuple(sorted({label, classes.find_in(Record(folder, "merged class", {}), merged)}))
