"""What the inputs of an export mean: which images, in which order, and from where they are read."""

from __future__ import annotations

import io
import os
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import LABELS, export, picture, pictures, tiny_model
from PIL import Image

from vitexplain import InputError, TargetError, create_method, explain_with
from vitexplain.benchmarks.export_broken import ODD_PICTURES, make_inputs
from vitexplain.export.entries import Entry, prepare, view
from vitexplain.export.inputs import list_entries
from vitexplain.export.rows import printable
from vitexplain.export.tables import TableColumns
from vitexplain.models.labels import find_class
from vitexplain.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((16, 24), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop_fraction=1.0)


def entries(*inputs: Any, **columns: Any) -> list[Entry]:
    chosen = list(inputs) if len(inputs) > 1 else inputs[0]
    return list_entries(chosen, TableColumns(**columns), lambda text: find_class(text, LABELS, len(LABELS)))


def locations(*inputs: Any, **columns: Any) -> list[str]:
    return [each.location for each in entries(*inputs, **columns)]


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures(tmp_path / "in", 3)
    picture(tmp_path / "in" / "more" / "x.jpg", 7)
    (tmp_path / "in" / "notes.md").write_text("no picture")
    picture(tmp_path / "in" / ".hidden.png")
    return tmp_path / "in"


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of fsspec's file system in memory."""
    import fsspec

    root = f"memory://{uuid.uuid4().hex}"
    file_system = fsspec.filesystem("memory")
    file_system.makedirs(root)
    yield root
    file_system.rm(root, recursive=True)


def upload(root: str, name: str, content: bytes) -> str:
    import fsspec

    with fsspec.open(f"{root}/{name}", "wb") as file:
        file.write(content)
    return f"{root}/{name}"


def test_files_folders_and_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [str(folder / name) for name in ("000.png", "001.png", "002.png", "more/x.jpg")]
    assert locations(folder) == found
    assert locations(str(folder / "00*.png")) == found[:3]
    assert locations(str(folder / "**" / "*.jpg")) == found[3:]
    assert locations(folder / "002.png", folder) == [found[2], *found[:2], found[3]]
    assert locations(folder / "notes.md") == [str(folder / "notes.md")]  # named: its fault is listed later
    monkeypatch.chdir(folder)
    assert [(each.path, each.location) for each in entries("001.png")] == [("001.png", found[1])]


def test_a_pattern_is_of_pictures_or_of_lists(
    memory: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "readme.txt").write_text("Pictures of my holidays\n")
    upload(memory, "a.png", b"")
    upload(memory, "readme.txt", b"Pictures of my holidays\n")
    for place in (tmp_path / "*", f"{memory}/*"):
        with pytest.raises(InputError, match=r"fits \d pictures, and 1 lists, tables or shards \(such as .*readme"):
            entries(place)
    assert len(entries(tmp_path / "*.txt")) == 1
    assert len(entries(folder / "*")) == 4
    (folder / "notes.md").rename(folder / "list.txt")
    monkeypatch.chdir(folder)
    (entry,) = entries("./*.txt")
    assert entry.path == "no picture"


def test_the_query_of_a_web_address_is_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    class Web:
        """All addresses without a query, and one with it."""

        def exists(self, path: str) -> bool:
            return "?" not in path or path.endswith("a.jpg?width=1")

        def isdir(self, path: str) -> bool:
            return False

        def unstrip_protocol(self, path: str) -> str:
            return path

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (Web(), url))
    monkeypatch.setattr("vitexplain.export.tables.read_bytes", lambda file: f"path\n{file.split('?')[1]}.png".encode())
    assert locations("https://example.org/a.jpg?width=1") == ["https://example.org/a.jpg?width=1"]
    with pytest.raises(InputError, match="no images at"):
        locations("https://example.org/b.jpg?width=1")
    monkeypatch.setattr(Web, "exists", lambda *_: True)
    assert locations("https://example.org/list.csv?x=1") == ["https://example.org/x=1.png"]


def test_lists_name_images_relative_to_themselves_or_a_root(folder: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text(f"in/001.png\n\n{folder / '000.png'}\n  in/gone.png\n", encoding="utf-8-sig")
    assert locations(listing)[:2] == [str(folder / "001.png"), str(folder / "000.png")]
    assert locations(listing, root="/elsewhere")[0] == "/elsewhere/in/001.png"
    assert entries(listing)[0].path == "in/001.png"
    assert len(entries(listing)) == 3  # whether they are there is seen when they are read


def test_tables_name_classes(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = ["fish", "", "2", "bird", "9", None]
    names = ["000.png", "001.png", "002.png", "000.png", "001.png", ""]
    rows = [f"{name},{cell or ''}" for name, cell in zip(names, cells, strict=True)]
    (folder / "t.csv").write_text("\n".join(["file,kind", *rows]))
    found = entries(folder / "t.csv", path="file", target="kind")
    assert [each.target for each in found] == [3, None, 2, 2, None, None]
    assert [bool(each.error) for each in found] == [False] * 4 + [True] * 2
    assert "row 5" in str(found[4].error)
    assert "path is empty" in str(found[5].error)
    unnamed = entries(folder / "t.csv", path="file", target=None)
    assert [(each.target, bool(each.error)) for each in unnamed] == [*[(None, False)] * 3, (None, True)]
    pq.write_table(pa.table({"path": names[:4], "target": ["fish", None, "2", "bird"]}), folder / "t.parquet")
    assert [each.identity for each in entries(folder / "t.parquet")] == [each.identity for each in found[:4]]
    pq.write_table(pa.table({"path": names[:3], "target": [3.0, float("nan"), 2.0]}), folder / "u.parquet")
    assert [each.target for each in entries(folder / "u.parquet")] == [3, None, 2]
    (folder / "v.csv").write_text("path\n000.png\n")
    assert [each.target for each in entries(folder / "v.csv")] == [None]
    (folder / "w.csv").write_text("path, target\n000.png, fish\n")
    assert [each.target for each in entries(folder / "w.csv")] == [3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"file\nx.png\n", r"no column 'path', found 'file'.*--path-column"),
        ("t.csv", b"", "no column 'path', found none"),
        ("t.csv", b"path\n\xff\xfe", "cannot be read: UnicodeDecodeError"),
        ("t.csv", b'"path,target\n' + b"x.png,1\n" * 20_000, "line .*: field larger than field limit"),
        ("t.csv", b"path,Target\nx.png,1\n", "no column 'target', found 'path', 'Target'; .*--target-column"),
        ("t.parquet", b"PAR1", "cannot be read: .*Expected a Parquet file"),
        ("t.txt", b"\n\n", "no images in"),
        ("t.tar", b"no tar", "no uncompressed tar file"),
        ("t.tar", b"\x1f\x8b" + b"0" * 600, "no uncompressed tar file.*Decompress"),
    ],
)
def test_a_table_or_shard_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        entries(tmp_path / name)


def test_a_column_of_classes_that_is_named_has_to_be_there(folder: Path) -> None:
    (folder / "t.csv").write_text("path,target\n000.png,fish\n")
    (folder / "t.txt").write_text("000.png\n")
    with pytest.raises(InputError, match=r"no column 'klass', found 'path', 'target'; .*--target-column"):
        entries(folder / "t.csv", target="klass")
    assert [each.target for each in entries(folder / "t.txt", target="klass")] == [None]


def test_nothing_is_said_with_the_place(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "gone.png", tmp_path / "*.png"):
        with pytest.raises(InputError, match="no images at"):
            entries(place)
    with pytest.raises(InputError, match="no inputs given"):
        list_entries([], TableColumns(), int)


def test_the_same_picture_twice_counts_once(folder: Path) -> None:
    (folder / "t.csv").write_text("path,target\n000.png,1\n000.png,2\n000.png,1\n")
    assert [each.target for each in entries(folder / "t.csv")] == [1, 2]


def test_tar_shards(folder: Path, tmp_path: Path) -> None:
    content = {path.name: path.read_bytes() for path in sorted(folder.glob("00*.png"))}
    long_name = "é" * 120 + ".png"
    place = shard(
        tmp_path / "a.tar", {"0.json": b"{}", **content, long_name: content["001.png"], "0.cls": b"1", ".x.png": b""}
    )
    found = entries(place)
    assert [each.path for each in found] == [f"{place}/{name}" for name in (*content, long_name)]
    for entry, name in zip(found, content, strict=False):
        expected = PREPROCESSING(folder / name)
        assert prepare(entry, PREPROCESSING).equal(expected)
        assert view(entry, PREPROCESSING).size == (24, 16)
    assert prepare(found[3], PREPROCESSING).equal(PREPROCESSING(folder / "001.png"))
    second = shard(tmp_path / "b.tar", {"y.png": content["000.png"]})
    assert [each.path for each in entries(str(tmp_path / "?.tar"))][-1] == f"{second}/y.png"


def test_a_shard_that_is_cut_short(folder: Path, tmp_path: Path) -> None:
    content = {path.name: path.read_bytes() for path in sorted(folder.glob("00*.png"))}
    place = shard(tmp_path / "a.tar", content)
    whole = entries(place)
    cut = place.read_bytes()[: (whole[2].offset or 0) + 5]
    place.write_bytes(cut)
    result = export(place, tmp_path / "out")
    reasons = dict(result.failures)
    assert len(result) == 4
    assert "found 5 bytes" in reasons[f"{place}/002.png"]
    assert "cut short or broken after" in reasons[f"{place}/…"]
    assert result.scores(1, "tokentm").shape == (4, 6)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_urls(scheme: str, memory: str, folder: Path, tmp_path: Path) -> None:
    content = {path.name: path.read_bytes() for path in sorted(folder.glob("00*.png"))}
    root = memory if scheme == "memory" else f"file://{tmp_path}/remote"
    os.makedirs(tmp_path / "remote" / "in" / "deep")
    for name, each in content.items():
        upload(root, f"in/deep/{name}", each)
    upload(root, "in/readme.md", b"")
    upload(root, "list.csv", b"path,target\nin/deep/002.png,fish\n")
    upload(root, "a.tar", shard(tmp_path / "a.tar", content).read_bytes())
    for place in (f"{root}/in", f"{root}/in/*/*.png", f"{root}/a.tar"):
        found = entries(place)
        assert [each.path.rpartition("/")[2] for each in found] == list(content), place
        for entry, name in zip(found, content, strict=True):
            assert prepare(entry, PREPROCESSING).equal(PREPROCESSING(folder / name))
    (entry,) = entries(f"{root}/list.csv")
    assert (entry.location.replace(":///", "://"), entry.target) == (
        f"{root}/in/deep/002.png".replace(":///", "://"),
        3,
    )
    result = export([f"{root}/a.tar", f"{root}/in/deep/000.png"], tmp_path / "out")
    np.testing.assert_allclose(result.scores(0, "tokentm"), result.scores(3, "tokentm"), rtol=1e-5)


def test_urls_that_lead_nowhere(memory: str) -> None:
    upload(memory, "a.png", b"")
    for place in (f"{memory}/gone.png", f"{memory}/*.jpg", "nosuch://x/y.png"):
        with pytest.raises(InputError, match=r"no images at|cannot be searched"):
            entries(place)
    (entry,) = entries(f"{memory}/a.png")
    with pytest.raises(InputError, match=r"a\.png': the data is empty"):
        prepare(entry, PREPROCESSING)
    with pytest.raises(InputError, match=r"gone\.png' cannot be fetched: FileNotFoundError"):
        prepare(Entry("gone.png", f"{memory}/gone.png"), PREPROCESSING)


def test_every_kind_of_bad_picture_is_a_reason_and_nothing_else_suffers(tmp_path: Path) -> None:
    """Pictures that cannot be read are named, unusual ones are explained as they are when alone."""
    files = make_inputs(tmp_path / "in", 2 * len(ODD_PICTURES))
    result = export(tmp_path / "in", tmp_path / "out", methods=["rollout"])
    expected = {printable(str(file)) for file, readable in files.items() if not readable}
    assert {path for path, _ in result.failures} == expected
    model = tiny_model()
    assert {entry.path for entry in result.entries} == {printable(str(file)) for file in files}
    for file, readable in files.items():
        if readable:
            alone = explain_with([create_method("rollout")], model.subject, str(file))[0]
            np.testing.assert_allclose(result.scores(str(file), "rollout"), alone.scores[0], atol=1e-6)


def test_a_class_that_does_not_exist_is_the_rows_fault(folder: Path) -> None:
    with pytest.raises(TargetError):
        find_class("9", LABELS, len(LABELS))
    (folder / "t.csv").write_text("path,target\n000.png,9\n001.png,1\n")
    assert [bool(each.error) for each in entries(folder / "t.csv")] == [True, False]


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (entry,) = entries(tmp_path / "a.gif")
    assert view(entry, PREPROCESSING).getpixel((3, 3)) == (255, 0, 0)
