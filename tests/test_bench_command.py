"""`vitexplain bench` as a user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from vitexplain.bench import figures, open_results
from vitexplain.bench.command import configure
from vitexplain.cli import app
from vitexplain.errors import OptionError
from vitexplain.locking import locked
from vitexplain.metrics.catalogue import list_metrics, metric_info


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RESAMPLES", 50)
    monkeypatch.setattr(figures, "PERMUTATIONS", 99)


def run(*words: object) -> Any:
    environment = {"COLUMNS": "100", "NO_COLOR": "1", "FORCE_COLOR": None, "TERM": "dumb"}
    return CliRunner().invoke(app, ["bench", *(str(word) for word in words)], env=environment)


def refusal(result: Any, said: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.match(f"error: .*{said}", line), line


def test_from_options_alone(tmp_path: Path) -> None:
    words = ["--methods", "rollout, tokentm", "--metrics", "auprc,energy_in_mask", "--data", "scenes", "--limit", 3]
    result = run(
        *words, "--data-option", "split=validation", "--preprocessing", "mean=[0.4, 0.5, 0.6]", "--output", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # no progress bar where nobody watches
    lines = result.stdout.splitlines()
    assert lines[0].startswith("auprc, scenes: area under")
    assert all(re.match(r"  (rollout|tokentm) +0\.\d+ \[0\.\d+, 0\.\d+\]  n=3$", line) for line in lines[1:3])
    assert lines[-1] == f"Report: {tmp_path / 'report.html'}"
    configuration = open_results(tmp_path).run["configuration"]
    assert configuration["data"]["options"] == {"split": "validation"}
    assert configuration["models"][0]["preprocessing"] == {"mean": [0.4, 0.5, 0.6]}
    assert {row["image"].split("/")[0] for row in open_results(tmp_path)._read("results.parquet", {}).to_pylist()} == {
        "validation"
    }


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text("methods: [rollout]\nmetrics: [auprc]\ndata: {format: scenes, limit: 9, select: odd}\nseed: 5\n")
    result = run(file, "--limit", 2, "--seed", 7, "--only-correct", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    configuration = json.loads((tmp_path / "out" / "run.json").read_text())["configuration"]
    assert configuration["data"] == {"format": "scenes", "root": None, "options": {}, "select": "odd", "limit": 2}
    assert (configuration["seed"], configuration["only_correct"]) == (7, True)
    assert [each["name"] for each in configuration["methods"]] == ["rollout"]


def test_what_is_said_of_a_model_without_its_name_is_of_the_files_model(tmp_path: Path) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text(
        "models: {name: timm:vit_tiny_patch16_224, label: mine, preprocessing: {size: [64, 64], crop_mode: squash}}\n"
    )
    (model,) = configure(file, {"labels": "x.json", "preprocessing": {"size": [96, 96]}}, None, {}, {}).models
    assert (model.name, model.label, model.labels) == ("timm:vit_tiny_patch16_224", "mine", "x.json")
    assert model.preprocessing == {"size": [96, 96], "crop_mode": "squash"}
    (model,) = configure(file, {"name": "scenes", "preprocessing": {"size": [96, 96]}}, None, {}, {}).models
    assert (model.label, model.preprocessing) == ("scenes", {"size": [96, 96]})

    file.write_text("models: [scenes, {name: scenes, label: mine}]\n")
    with pytest.raises(OptionError, match=r"--preprocessing without --model, and several models .* scenes, mine;"):
        configure(file, {"preprocessing": {"size": [96, 96]}}, None, {}, {})


def test_an_option_of_the_reader_leaves_the_files_others(tmp_path: Path) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text("data: {format: scenes, options: {split: test, count: 9}}\n")
    assert configure(file, {}, None, {"options": {"count": 3}}, {}).data.options == {"split": "test", "count": 3}
    assert configure(file, {}, "scenes", {"options": {"count": 3}}, {}).data.options == {"count": 3}


@pytest.mark.parametrize(
    ("words", "line", "said"),
    [
        (["--methods", "rolout"], "methods", "no method called 'rolout' "),
        (["--metrics", "auprcc"], "metrics", "no metric called 'auprcc' "),
        (["--data", "scenes", "--select", "some"], "data", "found select: 'some'"),
        (["--preprocessing", "crp=1"], "models", "no setting of preprocessing called 'crp' "),
    ],
)
def test_what_an_option_replaced_is_not_blamed_on_the_file(
    tmp_path: Path, words: list[str], line: str, said: str
) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text("models: [scenes]\nmethods: [rollout]\nmetrics: [auprc]\ndata: scenes\n")
    refusal(run(file, *words, "--output", tmp_path / "out"), said)
    result = run(file, *words, "--output", tmp_path / "out")
    assert "bench.yaml" not in result.stderr
    file.write_text(f"{line}: {{name: 5}}\n")
    refusal(run(file, "--output", tmp_path / "out"), "bench.yaml, line 1: ")


def test_list_has_every_metric_with_figures_and_requirements() -> None:
    result = run("--list")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for info in map(metric_info, list_metrics()):
        assert f"{info.name} {info.title}" in text
        assert all(f"{figure.name} {figure.title}" in text for figure in info.figures)
    assert "segmentation Segmentation; requires masks" in text
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.filterwarnings("always::vitexplain.ExplanationWarning")
def test_an_image_that_cannot_be_read_gives_exit_code_1(tmp_path: Path) -> None:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for name in ("a", "b"):
        Image.effect_noise((96, 96), 90).convert("RGB").save(images / f"{name}.png")
    (images / "broken.png").write_bytes(b"no picture")
    words = ["--methods", "rollout", "--metrics", "saco", "--data", f"folder:{tmp_path / 'data'}"]
    result = run(*words, "--output", tmp_path / "out")
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: scenes leaves out 'broken.png': ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "rolout"], "no method called 'rolout' .did you mean 'rollout'"),
        (["--metrics", "auprcc"], "no metric called 'auprcc' .did you mean 'auprc'"),
        (["--data", "cocoo:x"], "no data set called 'cocoo' .did you mean 'coco'"),
        (["--data", "coco:/absent"], "/absent"),
        (["--limit", 0], "found limit: 0, expected a whole number >= 1"),
        (["--select", "some"], "expected one of all, even, odd"),
        (["--checkpoint", "/absent.pt"], "no file '/absent.pt'"),
        (["--preprocessing", "crop_mode"], "--preprocessing: found 'crop_mode', expected NAME=VALUE"),
        (["--data-option", "split=["], "expected a plain value"),
        (["--data-option", "splt=test"], "no option of scenes called 'splt'"),
        (["/absent.yaml"], "cannot read the configuration"),
        (["--device", "cuda:77"], "the device 'cuda:77' cannot be used"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, words: list[object], said: str) -> None:
    refusal(run(*words, "--output", tmp_path / "out"), said)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path):
        refusal(run("--metrics", "auprc", "--limit", 2, "--output", tmp_path), "in use by another run .process")
