"""What benchmarks store: whole or not there, found by what determines it, by one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitexplain import ExportError
from vitexplain.bench.store import CellStore, Columns
from vitexplain.data.example import Example
from vitexplain.keys import digest, example_digest, seed_of
from vitexplain.locking import locked

KEY = digest("test")


def columns() -> Columns:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(5, 3, 4)).astype(np.float32)
    scores[1, 2, 3], scores[2, 0, 0] = np.nan, -np.inf
    return {
        "image": np.array(["a", "b", "ü", "", "e#1"], object),
        "used": np.array([True, False, True, True, False]),
        "target": np.arange(5),
        "value": np.array([0.1, np.nan, -0.0, 1e300, 5e-324]),
        "curve": generator.normal(size=(5, 7)),
        "scores": scores,
    }


def test_what_comes_back_is_what_went_in(tmp_path: Path) -> None:
    store, given = CellStore(tmp_path), columns()
    store.write(KEY, given, {"note": 1})
    found = store.read(KEY)
    assert found is not None
    assert list(found) == list(given)
    for name, values in given.items():
        assert found[name].dtype == values.dtype
        assert found[name].shape == values.shape
        assert found[name].tobytes() == values.tobytes() or values.dtype == object
        found[name][:1] = found[name][1:2]  # writable, as torch wants it
    assert CellStore(tmp_path).read(KEY)["image"].tolist() == given["image"].tolist()  # type: ignore[index]


def test_no_image_is_a_cell_too(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.write(KEY, {name: values[:0] for name, values in columns().items()}, {})
    found = store.read(KEY)
    assert found is not None
    assert found["scores"].shape == (0, 3, 4)


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert CellStore(tmp_path / "none").read(KEY) is None


def test_a_cell_of_another_key_is_none(tmp_path: Path) -> None:
    store, other = CellStore(tmp_path), digest("other")
    store.write(KEY, columns(), {})
    store.path(other).parent.mkdir(exist_ok=True)
    store.path(KEY).rename(store.path(other))
    assert store.read(other) is None


def test_any_damage_is_noticed(tmp_path: Path) -> None:
    store, given = CellStore(tmp_path), columns()
    store.write(KEY, given, {})
    whole = store.path(KEY).read_bytes()
    harmless = 0
    for place in range(0, len(whole), 11):
        store.path(KEY).write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found = store.read(KEY)
        if found is not None:  # a byte that carries nothing, such as a statistic of a column
            harmless += 1
            for name, values in given.items():
                assert found[name].dtype == values.dtype
                np.testing.assert_array_equal(found[name], values)
    assert harmless < len(whole) / 11 / 2
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        store.path(KEY).write_bytes(whole[:length])
        assert store.read(KEY) is None


def test_tidy_leaves_finished_cells_alone(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.write(KEY, columns(), {})
    rest = store.path(KEY).with_name(".0123.part")
    rest.write_bytes(b"half")
    store.tidy()
    assert not rest.exists()
    assert store.read(KEY) is not None
    store.clear()
    assert store.read(KEY) is None


def test_keys_tell_everything_apart() -> None:
    assert digest("a", {"x": 1, "y": 2}) == digest("a", {"y": 2, "x": 1})
    assert len({digest("a"), digest("a", None), digest(["a"]), digest("a", 1), digest("a", 1.5), digest("a", "1")}) == 6
    assert 0 <= seed_of(0, "image") < 2**63
    assert seed_of(0, "image") == seed_of(0, "image") != seed_of(1, "image")


def test_the_content_of_an_example_counts_and_not_its_place(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 3), (9, 9, 9))
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name)
    picture.putpixel((0, 0), (9, 9, 8))
    picture.save(tmp_path / "c.png")
    mask, boxes = np.zeros((3, 4), np.int8), np.array([[0.0, 0, 1, 1]])
    a = Example("x", tmp_path / "a.png", (1,), mask, boxes=boxes)
    assert example_digest(a) == example_digest(Example("x", tmp_path / "b.png", (1,), mask, boxes=boxes))
    others = [
        Example("y", tmp_path / "a.png", (1,), mask, boxes=boxes),
        Example("x", tmp_path / "c.png", (1,), mask, boxes=boxes),
        Example("x", tmp_path / "absent.png", (1,), mask, boxes=boxes),
        Example("x", tmp_path / "a.png", (1, 2), mask, boxes=boxes),
        Example("x", tmp_path / "a.png", (1,), mask + np.int8(1), boxes=boxes),
        Example("x", tmp_path / "a.png", (1,), mask.T, boxes=boxes),
        Example("x", tmp_path / "a.png", (1,), None, boxes=boxes),
        Example("x", tmp_path / "a.png", (1,), mask, boxes=boxes + 1),
        Example("x", picture, (1,), mask, boxes=boxes),
        Example("x", Image.new("RGB", (3, 4), (9, 9, 9)), (1,), mask, boxes=boxes),
    ]
    assert len({example_digest(each) for each in [a, *others]}) == len(others) + 1


HOLD = """
import sys, time
from pathlib import Path
from vitexplain.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_process_own_until_that_ends_or_is_killed(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ExportError, match=rf"in use by another run \(process {holder.pid} on .*another --output"),
            locked(tmp_path),
        ):
            pass
        holder.kill()
    with locked(tmp_path):
        assert (tmp_path / ".lock.json").is_file()
    assert not (tmp_path / ".lock.json").exists()


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ExportError, match="in use by another run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
