"""`vitexplain export` as a user meets it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import picture, pictures
from typer.testing import CliRunner

from vitexplain import open_export
from vitexplain.cli import app

METHODS = "rollout,tokentm"


def run(*words: object) -> Any:
    environment = {"COLUMNS": "100", "NO_COLOR": "1", "FORCE_COLOR": None, "TERM": "dumb"}
    return CliRunner().invoke(app, ["export", *(str(word) for word in words)], env=environment)


def test_a_folder_is_exported_and_goes_on(tmp_path: Path) -> None:
    pictures(tmp_path / "in", 3)
    words = [tmp_path / "in", "--methods", METHODS, "--output", tmp_path / "out", "--view", "heatmap"]
    words += ["--target", "key", "--target", 0, "--preprocessing", "mean=[0.4, 0.5, 0.6]", "--dtype", "float16"]
    words += ["--option", "head_fusion=max", "--also", tmp_path / "all.npz", "--batch-size", 2, "--workers", 1]
    for _ in range(2):
        result = run(*words)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""  # no progress bar where nobody watches
        assert result.stdout == f"3 of 3 images explained. Results: {tmp_path / 'out'}\n"
    export = open_export(tmp_path / "out")
    assert export.methods == ("rollout", "tokentm")
    assert export.manifest["methods"]["rollout"]["options"]["head_fusion"] == "max"
    assert export.manifest["model"]["preprocessing"]["mean"] == [0.4, 0.5, 0.6]
    assert set(export.table().to_pydict()["label"]) == {"key", export.table().to_pydict()["label"][1]}
    assert len(list((tmp_path / "out" / "views").rglob("*.jpg"))) == 12
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["scores/tokentm"].shape == (3, 2, 12, 12)
    refused = run(*words[:-2], "--seed", 1)
    assert refused.exit_code == 2
    assert re.match(r"error: the folder .* holds another export: settings\.seed is 0 there, and 1 now", refused.stderr)


def test_one_file_of_another_kind_is_refused_before_the_work(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    result = run(tmp_path / "a.png", "--output", tmp_path / "out", "--also", tmp_path / "all.csv")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: found suffix '.csv'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("also", "said"), [("a.png/all.npz", "cannot use the folder"), ("all.npz", "found a folder")])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, also: str, said: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "all.npz").mkdir()
    result = run(tmp_path / "a.png", "--output", tmp_path / "out", "--also", tmp_path / also)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_bad_images_are_listed_and_counted_by_the_exit_code(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"")
    (tmp_path / "list.csv").write_text("file,kind\na.png,key\nb.jpg,key\na.png,unicorn\n")
    words = [tmp_path / "list.csv", "--path-column", "file", "--target-column", "kind", "--root", tmp_path / "in"]
    result = run(*words, "--methods", "tokentm", "--output", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert [re.sub("'.*/", "'", line)[:30] for line in result.stderr.splitlines()] == [
        "error: 'b.jpg' is empty (0 byt",
        "error: 'list.csv', row 3: no c",
    ]
    assert "1 of 3 images explained" in result.stdout
    assert "2 failed: see the column 'error'" in result.stdout
    again = run(*words, "--methods", "tokentm", "--output", tmp_path / "out")
    assert (again.exit_code, again.stderr) == (1, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.png", "--output", "out"], "no images at 'gone.png'"),
        (["a.png", "--output", "out", "--methods", "rollou"], "no method called 'rollou'"),
        (["a.png", "--output", "out", "--target", "unicorn"], "no class"),
        (["a.png", "--output", "out", "--batch-size", "0"], "batch_size is 0"),
        (["a.png", "--output", "out", "--view", "film"], "view is 'film'"),
        (["a.png", "--output", "a.png"], "cannot use the folder"),
    ],
)
def test_what_cannot_be_carried_out(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitexplain.export import pipeline

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    pictures(tmp_path / "in", 2)
    monkeypatch.setattr(pipeline.ShardResult, "put", interrupted)
    result = run(tmp_path / "in", "--output", tmp_path / "out")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
