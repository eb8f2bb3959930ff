"""CelebA: faces with forty attributes, one of them as the label, and any other as a sensitive attribute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, UnknownNameError
from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Examples, FileEntry
from .metadata import read_columns
from .reader import FileReader

_SPLITS = {"train": 0, "validation": 1, "test": 2}
_ATTRIBUTES, _PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"


@register_dataset(
    "celeba",
    title="CelebA",
    source="Liu et al., Deep Learning Face Attributes in the Wild, ICCV 2015",
    gives=("labels",),
)
@dataclass(frozen=True)
class CelebA(FileReader):
    """CelebA, aligned and cropped faces.

    ::

        ROOT/img_align_celeba/000001.jpg
        ROOT/list_attr_celeba.txt       the number of pictures; the names of attributes; 000001.jpg -1 1 … a line
        ROOT/list_eval_partition.txt    000001.jpg 0   (0 train, 1 validation, 2 test)

    The model has two classes: 1 where the picture has the attribute, 0 where not.
    """

    split: str = option("test", "which pictures", choices=tuple(_SPLITS))
    attribute: str = option("Gray_Hair", "the attribute that is the label, by its name in list_attr_celeba.txt")

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        classes.check(1, "two classes")
        has = celeba_attribute(root, self.attribute)
        records = read_columns(root / _PARTITION, ("name", "split"))
        chosen = [record for record in records if record.whole("split", 0, 2) == _SPLITS[self.split]]
        entries = []
        for record in chosen:
            name = record.text("name")
            if name not in has:
                raise record.fault(f"the picture {name!r}", f"one of those in {_ATTRIBUTES}")
            entries.append(FileEntry(name, record.path("name", root / "img_align_celeba"), (int(has[name]),)))
        return self.examples(root, entries)


def celeba_attribute(root: Path, attribute: str) -> dict[str, bool]:
    """Which pictures have an attribute, by name; such as the groups for `vitexplain.iavit.evaluation.fairness`.

    Args:
        root: the folder of `CelebA`.
        attribute: such as ``"Male"``.

    Raises:
        UnknownNameError: there is no such attribute.
        InputError: the list is missing or broken; says where.
    """
    file = root / _ATTRIBUTES
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {str(file)!r} ({type(error).__name__}: {error}); expected CelebA's list"
        ) from error
    names = lines[1].split() if len(lines) > 1 else []
    if attribute not in names:
        raise UnknownNameError.listing("attribute of CelebA", attribute, names)
    place = 1 + names.index(attribute)
    found: dict[str, bool] = {}
    for number, line in enumerate(lines[2:], 3):
        fields = line.split()
        if len(fields) != 1 + len(names) or fields[place] not in ("1", "-1"):
            raise InputError(
                f"{str(file)!r}, line {number}: found {len(fields)} fields, expected a picture's name and "
                f"{len(names)} times 1 or -1"
            )
        found[fields[0]] = fields[place] == "1"
    return found
