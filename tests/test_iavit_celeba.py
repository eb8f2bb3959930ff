"""CelebA: an attribute as the label, another one as the groups of the fairness figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vitexplain import InputError, UnknownNameError
from vitexplain.data import open_dataset
from vitexplain.data.celeba import celeba_attribute
from vitexplain.iavit.evaluation import fairness

ROWS = {"000001.jpg": "-1 1", "000002.jpg": "1 1", "000003.jpg": "1 -1", "000004.jpg": "-1 -1"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "img_align_celeba").mkdir()
    for name in ROWS:
        Image.new("RGB", (10, 12)).save(tmp_path / "img_align_celeba" / name)
    lines = ["4", "Gray_Hair Male ", *(f"{name}  {row}" for name, row in ROWS.items())]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    splits = dict(zip(ROWS, (0, 0, 1, 2), strict=True))
    (tmp_path / "list_eval_partition.txt").write_text("".join(f"{name} {split}\n" for name, split in splits.items()))
    return tmp_path


def test_labels_and_groups(root: Path) -> None:
    found = {
        split: [(example.name, example.labels) for example in open_dataset(f"celeba:{root}", split=split)]
        for split in ("train", "validation", "test")
    }
    assert found == {
        "train": [("000001.jpg", (0,)), ("000002.jpg", (1,))],
        "validation": [("000003.jpg", (1,))],
        "test": [("000004.jpg", (0,))],
    }
    assert open_dataset(f"celeba:{root}", attribute="Male")[0].labels == (0,)
    male = celeba_attribute(root, "Male")
    assert male == {"000001.jpg": True, "000002.jpg": True, "000003.jpg": False, "000004.jpg": False}
    gray = celeba_attribute(root, "Gray_Hair")
    labels, group = (torch.tensor([int(each[name]) for name in ROWS]) for each in (gray, male))
    assert fairness(torch.ones(4, dtype=torch.int64), labels, group).demographic_parity == 0
    assert fairness(group, labels, group).demographic_parity == 1


def test_what_is_wrong_is_named(root: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"attribute of CelebA called 'Mal'.*Male"):
        celeba_attribute(root, "Mal")
    with pytest.raises(InputError, match="two classes"):
        open_dataset(f"celeba:{root}", labels=["face"])
    partition, attributes = root / "list_eval_partition.txt", root / "list_attr_celeba.txt"
    partition.write_text("000009.jpg 2\n")
    with pytest.raises(InputError, match=r"line 1: found the picture '000009.jpg'"):
        open_dataset(f"celeba:{root}")
    attributes.write_text("1\nGray_Hair Male\n000001.jpg 1\n")
    with pytest.raises(InputError, match="line 3: found 2 fields"):
        open_dataset(f"celeba:{root}")
    attributes.unlink()
    with pytest.raises(InputError, match="expected CelebA's list"):
        open_dataset(f"celeba:{root}")
