"""Configurations of benchmarks: what is read, and what is refused where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vitexplain import InputError, OptionError, UnknownNameError, VitExplainError, list_methods
from vitexplain.bench import extra, read_configuration
from vitexplain.bench.configuration import BenchConfiguration
from vitexplain.bench.entries import DataEntry, MethodEntry, MetricEntry, ModelEntry
from vitexplain.metrics.catalogue import list_metrics


def configured(**given: Any) -> BenchConfiguration:
    return BenchConfiguration.from_mapping(given)


def written(folder: Path, text: str) -> Path:
    path = folder / "bench.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_says_everything(tmp_path: Path) -> None:
    text = """
models:
  - scenes
  - {name: "timm:vit_tiny_patch16_224", checkpoint: "${WEIGHTS}/a.safetensors", label: tiny,
     preprocessing: {crop_mode: squash}}
methods:
  - tokentm
  - {name: Roll-Out, head_fusion: max}
  - {name: rollout, label: plain}
metrics: [energy_in_mask, {name: pointing_game, tolerance: 15, label: pointing}]
data: {format: scenes, options: {objects: 2}, select: odd, limit: 7}
target: label
only_correct: true
seed: 3
batch_size: 4
chunk_size: 5
device: cpu
dtype: bfloat16
compiled: true
"""
    assert read_configuration(written(tmp_path, text)) == BenchConfiguration(
        models=(
            ModelEntry(),
            ModelEntry(
                "timm:vit_tiny_patch16_224",
                "tiny",
                checkpoint="${WEIGHTS}/a.safetensors",
                preprocessing={"crop_mode": "squash"},
            ),
        ),
        methods=(
            MethodEntry("tokentm"),
            MethodEntry("rollout", {"head_fusion": "max"}, "rollout (head_fusion=max)"),
            MethodEntry("rollout", label="plain"),
        ),
        metrics=(MetricEntry("energy_in_mask"), MetricEntry("pointing_game", {"tolerance": 15}, "pointing")),
        data=DataEntry("scenes", options={"objects": 2}, select="odd", limit=7),
        target="label",
        only_correct=True,
        seed=3,
        batch_size=4,
        chunk_size=5,
        dtype="bfloat16",
        compiled=True,
    )


def test_nothing_said_is_everything_on_the_embedded_scenes() -> None:
    found = configured()
    assert [each.name for each in found.models] == ["scenes"]
    assert [each.name for each in found.methods] == list_methods(trainable=False)
    assert [each.name for each in found.metrics] == list_metrics()
    assert found.data == DataEntry("scenes")
    assert found == configured(methods="all", metrics="all", data="scenes", models="scenes")


def test_json_keeps_it_whole(tmp_path: Path) -> None:
    text = (
        "methods: {name: rollout, head_fusion: max}\nmetrics: {name: saco, label: S}\ndata: {options: {objects: 2}}\n"
    )
    found = read_configuration(written(tmp_path, text))
    assert BenchConfiguration.from_mapping(json.loads(json.dumps(found.to_mapping()))) == found


def test_data_in_one_word() -> None:
    assert DataEntry.read("coco:/a/b:c") == DataEntry("coco", "/a/b:c")
    assert DataEntry.read("coco:/a/b:c").spec == "coco:/a/b:c"
    assert DataEntry.read("scenes").spec == "scenes"


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("seed: 0\nmethds: all\n", UnknownNameError, r"bench\.yaml, line 2: .*'methds' \(did you mean 'methods'"),
        ("models:\n  - name: scenes\n    checkpint: a\n", UnknownNameError, r"line 3: .*did you mean 'checkpoint'"),
        (
            "seed: 0\nmethods: [rolout]\n",
            UnknownNameError,
            r"line 2: no method called 'rolout' \(did you mean 'rollout'",
        ),
        ("metrics: [insertoin]\n", UnknownNameError, r"line 1: no metric called .*'insertion'"),
        ("methods: [{name: rollout, head_fusoin: max}]\n", UnknownNameError, "did you mean 'head_fusion'"),
        ("methods: [{name: rollout, head_fusion: most}]\n", OptionError, "found head_fusion='most'"),
        ("models: {preprocessing: {crop_mod: squash}}\n", UnknownNameError, "did you mean 'crop_mode'"),
        ("data: {limit: 0}\n", OptionError, "line 1: found limit: 0, expected a whole number >= 1"),
        ("data: {select: evn}\n", OptionError, "expected one of all, even, odd"),
        ("target: labels\n", OptionError, "expected one of predicted, label"),
        ("only_correct: 1\n", OptionError, "expected true or false"),
        ("compiled: 1\n", OptionError, "found compiled: 1, expected true or false"),
        ("batch_size: true\n", OptionError, "found batch_size: True, expected a whole number >= 1"),
        ("seed: -1\n", OptionError, "found seed: -1"),
        ("dtype: float64\n", OptionError, "expected one of float32, bfloat16, float16"),
        ("methods: []\n", OptionError, "found no methods"),
        ("methods: [rollout, Rollout]\n", OptionError, "several methods called 'rollout'; give each its own 'label'"),
        ("methods: [3]\n", OptionError, "found 3 for a method"),
        ("methods: [{head_fusion: max}]\n", OptionError, "expected a name, or a mapping with 'name'"),
        ("data: [scenes]\n", OptionError, "for data, expected a mapping"),
        ("models: {checkpoint: 3}\n", OptionError, "found checkpoint: 3, expected text"),
        ("seed: 1\nseed: 2\n", InputError, r"line 2: found 'seed' a second time \(first in line 1\)"),
        ("seed: [\n", InputError, "is no YAML"),
        ("- 1\n", InputError, "found list in"),
        ("seed: 0x_\n", InputError, "is no YAML: invalid literal"),
        ("data: {limit: 2020-13-45}\n", InputError, "is no YAML: month must be in"),
        ("data: {select: [even]}\n", OptionError, r"found select: \['even'\], expected one of"),
        ("data: {options: {seed: {a: 1}}}\n", OptionError, "found the option seed: .*, expected text, a number"),
        ("methods: [{name: rollout, options: [1]}]\n", OptionError, r"found options: \[1\], expected a mapping"),
        ("metrics: [{name: sensitivity_max, radius: .inf}]\n", OptionError, "found radius=inf, expected a number"),
        ("a: !!python/object/apply:os.getcwd []\n", InputError, "is no YAML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, kind: type[VitExplainError], said: str) -> None:
    with pytest.raises(kind, match=said):
        read_configuration(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the configuration .*absent\.yaml"):
        read_configuration(tmp_path / "absent.yaml")


def test_variables_stand_in_paths_and_stay_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    monkeypatch.delenv("ABSENT", raising=False)
    given = {
        "models": {"checkpoint": "${PLACE}/a.pt", "labels": "x"},
        "data": {"format": "folder", "root": "${PLACE}/${PLACE}", "options": {"masks": "${PLACE}", "ignored": 3}},
    }
    found = BenchConfiguration.from_mapping(given)
    assert found.expanded().models[0].checkpoint == "/data/a.pt"
    assert found.expanded().models[0].labels == "x"
    assert found.expanded().data.root == "/data//data"
    assert found.expanded().data.options == {"masks": "/data", "ignored": 3}
    assert found.models[0].checkpoint == "${PLACE}/a.pt"
    with pytest.raises(
        OptionError, match=r"root: found '\$\{ABSENT\}/x', but the environment variable ABSENT is not set"
    ):
        configured(data={"format": "folder", "root": "${ABSENT}/x"}).expanded()


def test_missing_packages_are_named_with_the_way_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name in ("yaml", "pyarrow") else object())
    with pytest.raises(VitExplainError, match=r"need pyarrow, pyyaml, .*pip install 'vitexplain\[bench\]'"):
        extra.require()
    with pytest.raises(VitExplainError, match=r"need pyyaml, which"):
        extra.require("yaml")
    extra.require("scipy")
