"""Results on disk: whole or not at all, and under names that stay apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitexplain import ExportError
from vitexplain.files import distinct_names, make_folder, save_arrays, save_json, save_scores, write_whole


def test_write_whole_makes_folders_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deeper" / "note.txt"
    assert write_whole(target, lambda file: file.write(b"first")) == target
    assert write_whole(str(target), lambda file: file.write(b"second")) == target
    assert target.read_bytes() == b"second"
    assert [each.name for each in target.parent.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), ValueError("odd"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_the_old_file_and_no_rest(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "note.txt"
    target.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half of the ne")
        raise failure

    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ExportError
    with pytest.raises(expected) as caught:
        write_whole(target, write)
    if expected is ExportError:
        assert repr(str(target)) in str(caught.value)
        assert "No space left" in str(caught.value) or "odd" in str(caught.value)
        assert ("has room" in str(caught.value)) == isinstance(failure, OSError)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "x", tmp_path / "folder", Path("."), tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(ExportError, match="cannot write"):
            write_whole(target, lambda file: file.write(b""))
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file", "folder"]


def test_make_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_folder(str(tmp_path / "a" / "b")).is_dir()
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(ExportError, match=r"cannot use the folder '.*file.*(FileExists|NotADirectory)"):
            make_folder(path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ExportError, match="read-only"):
        make_folder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_kept_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    scores = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    loaded = np.load(save_scores(scores, tmp_path / "x.npy"))
    assert loaded.dtype == np.dtype(str(dtype).removeprefix("torch."))
    np.testing.assert_array_equal(loaded, scores.detach().numpy())


def test_half_precision_is_widened(tmp_path: Path) -> None:
    arrays = {name: torch.tensor([1.5, -3.0]).to(getattr(torch, name)) for name in ("bfloat16", "float16")}
    loaded = np.load(save_arrays({**arrays, "targets": torch.tensor([4])}, tmp_path / "x.npz"))
    for name in arrays:
        assert loaded[name].dtype == np.float32
        assert loaded[name].tolist() == [1.5, -3.0]
    assert loaded["targets"].dtype == np.int64


def test_json_is_valid_whatever_the_figures(tmp_path: Path) -> None:
    record = {"a": float("nan"), "b": [1.0, float("inf"), {"c": -float("inf")}], "ü": "zebra\udcff", "n": (1, None)}
    text = save_json(record, tmp_path / "x.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    loaded = json.loads(text, parse_constant=refuse)
    assert loaded == {"a": None, "b": [1.0, None, {"c": None}], "ü": "zebra\\udcff", "n": [1, None]}
    assert "ü" in text


def test_json_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not JSON serializable"):
        save_json({"a": object()}, tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["x", "x", "x"], ["x", "x-2", "x-3"]),
        (["x", "x", "x-2"], ["x", "x-3", "x-2"]),
        (["x-2", "x", "x"], ["x-2", "x", "x-3"]),
        (["x", "X", "é", "e\u0301", "STRASSE", "straße"], ["x", "X-2", "é", "e\u0301-2", "STRASSE", "straße-2"]),
        (
            [".hidden", "..", "a/b\\c\nd", "a\udcffb", "with space", "写真"],
            ["hidden", "image", "a_b_c_d", "a_b", "with space", "写真"],
        ),
    ],
)
def test_distinct_names(names: list[str], expected: list[str]) -> None:
    assert distinct_names(names) == expected


@given(st.lists(st.sampled_from(["x", "X", "x-2", "x-2-2", "X-3", "y", "", "é", "e\u0301", "ü" * 200, "ü" * 201])))
def test_distinct_names_are_distinct_and_fit(names: list[str]) -> None:
    import unicodedata

    made = distinct_names(names)
    assert len(made) == len(names)
    assert len({unicodedata.normalize("NFKD", name).casefold() for name in made}) == len(names)
    assert all(0 < len(name.encode()) <= 160 for name in made)


def test_many_files_of_one_name_take_no_time() -> None:
    made = distinct_names(["image"] * 5000)
    assert made[-1] == "image-5000"
    assert len(set(made)) == 5000


def test_files_stays_light() -> None:
    """Writing a file is no reason to load a model library or OpenCV."""
    source = "import sys, vitexplain.files; print(sorted({'cv2', 'timm', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
