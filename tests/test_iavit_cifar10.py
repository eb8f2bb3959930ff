"""CIFAR-10 in each of its layouts, without unpickling anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitexplain import InputError
from vitexplain.data import Examples, open_dataset
from vitexplain.data.cifar10 import CLASS_NAMES, read_cifar10_file

LABELS = [6, 9, 0, 3]


@pytest.fixture
def rows() -> np.ndarray[Any, Any]:
    """Pictures as the authors store them: all red pixels, then green, then blue."""
    return np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _read_afresh() -> None:
    read_cifar10_file.cache_clear()


def check(examples: Examples, rows: np.ndarray[Any, Any], labels: list[int] = LABELS) -> None:
    assert [example.labels for example in examples] == [(label,) for label in labels]
    for example, row in zip(examples, rows, strict=True):
        picture = np.array(example.image)
        assert picture.shape == (32, 32, 3)
        assert picture[5, 7].tolist() == [int(row[channel * 1024 + 5 * 32 + 7]) for channel in range(3)]
        np.testing.assert_array_equal(picture.transpose(2, 0, 1).reshape(-1), row)


@pytest.mark.parametrize("named", ["bytes", "text"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_batches(tmp_path: Path, rows: np.ndarray[Any, Any], protocol: int, named: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(1, 6):
        content: dict[Any, Any] = {
            "batch_label": f"training batch {number} of 5",
            "labels": [(label + number) % 10 for label in LABELS],
            "data": rows,
            "filenames": ["a_1.png", "b_2.png", "c_3.png", "d_4.png"],
        }
        if named == "bytes":
            content = {key.encode(): value for key, value in content.items()}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(content, protocol))
    shifted = [(label + number) % 10 for number in range(1, 6) for label in LABELS]
    for root in (tmp_path, folder):
        examples = open_dataset(f"cifar10:{root}", split="train")
        check(examples, np.tile(rows, (5, 1)), shifted)
    assert examples.names[4] == "train/data_batch_2/00000"
    with pytest.raises(InputError, match=r"no complete test batches.*(?s:.*)cifar-10-batches-bin"):
        open_dataset(f"cifar10:{tmp_path}")


def test_a_pickle_that_runs_code_does_not(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.write_text, (tmp_path / "ran", "")

    (tmp_path / "test_batch").write_bytes(pickle.dumps({"labels": LABELS, "data": Evil()}))
    with pytest.raises(InputError, match="cannot be read as a part of CIFAR-10"):
        open_dataset(f"cifar10:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_binary_batches(tmp_path: Path, rows: np.ndarray[Any, Any]) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    np.concatenate([np.array(LABELS, np.uint8)[:, None], rows], 1).tofile(folder / "test_batch.bin")
    check(open_dataset(f"cifar10:{tmp_path}"), rows)


def test_archives(tmp_path: Path, rows: np.ndarray[Any, Any]) -> None:
    upright = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    arrays = {"x_train": upright[::-1], "y_train": np.array(LABELS[::-1]), "x_test": upright, "y_test": LABELS}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    check(open_dataset(f"cifar10:{tmp_path}"), rows)
    check(open_dataset(f"cifar10:{tmp_path}", split="train"), rows[::-1], LABELS[::-1])
    part = open_dataset(f"cifar10:{tmp_path}")[1:3]
    assert [example.name for example in part] == ["test/cifar10/00001", "test/cifar10/00002"]
    with pytest.raises(InputError, match="10 classes"):
        open_dataset(f"cifar10:{tmp_path}", labels=["cat", "dog"])
    assert len(open_dataset(f"cifar10:{tmp_path}", labels=CLASS_NAMES)) == 4
    np.savez(tmp_path / "second.npz", **arrays)
    with pytest.raises(InputError, match=r"found 2 \.npz files"):
        open_dataset(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": [6, 9, 0, 10]}, "labels from 0 to 9"),
        ({"y_test": [6, 9, 0]}, "4 pictures and 3 labels"),
        ({"y_test": [0.5] * 4}, "labels float64"),
        ({"x_test": np.zeros((4, 32, 32, 3))}, "pictures float64"),
        ({"x_test": np.zeros((4, 3, 32, 32), np.uint8)}, "cannot be read"),
        ({"y_test": None}, "y_test"),
        ({"y_test": np.array([{}], object)}, "cannot be read"),
    ],
)
def test_archives_of_something_else(
    tmp_path: Path, rows: np.ndarray[Any, Any], changes: dict[str, Any], message: str
) -> None:
    arrays = {"x_test": rows.reshape(-1, 32, 32, 3), "y_test": LABELS, **changes}
    np.savez(tmp_path / "a.npz", **{name: each for name, each in arrays.items() if each is not None})
    with pytest.raises(InputError, match=message):
        open_dataset(f"cifar10:{tmp_path}")


def test_broken_archives(tmp_path: Path, rows: np.ndarray[Any, Any]) -> None:
    archive = tmp_path / "a.npz"
    np.savez_compressed(archive, x_test=rows.reshape(-1, 32, 32, 3), y_test=LABELS)
    content = bytearray(archive.read_bytes())
    content[1000:3000] = bytes(2000)
    archive.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a part of CIFAR-10"):
        open_dataset(f"cifar10:{tmp_path}")
    with archive.open("wb") as file:
        np.save(file, rows)  # one array, under the name of an archive
    with pytest.raises(InputError, match="cannot be read as a part of CIFAR-10"):
        open_dataset(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("name", ["test_batch", "test_batch.bin", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"no such thing", b"PK\x03\x04broken"])
def test_broken_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as a part of CIFAR-10|0 pictures"):
        open_dataset(f"cifar10:{tmp_path}")


@pytest.mark.parity
def test_the_real_pictures(test_data: Path) -> None:
    examples = open_dataset(f"cifar10:{test_data / 'cifar10'}", split="train")
    labels = [example.labels[0] for example in examples.select(range(0, 8000, 40))]
    assert len(examples) == 8000
    assert set(labels) == set(range(10))
