"""What the commands that train read: training splits, options that count, and options that cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from vitexplain import OptionError, UnknownNameError
from vitexplain.cli_train import train_app
from vitexplain.data import dataset_info, list_datasets
from vitexplain.data.example import Example
from vitexplain.data.scene_examples import SceneEntry
from vitexplain.data.scenes import SPLITS
from vitexplain.options import configure
from vitexplain.training.command_options import training_options
from vitexplain.training.picture_batches import PictureBatches

TRAINING = {
    **dict.fromkeys(("celeba", "cifar10", "cub", "scenes", "voc"), "train"),
    "coco": "train2017",
    "imagenet_s": "train-semi",
    "oxford_pets": "trainval",
}
"""The split that is for training, of all data sets that come in splits."""


def names(examples: Sequence[Example]) -> list[str]:
    return [example.name for example in examples]


def train(*words: Any) -> None:
    result = CliRunner().invoke(train_app, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception


@pytest.fixture
def pets(tmp_path: Path) -> str:
    """A data set of three pictures to train on and two to test with."""
    for folder in ("images", "annotations/trimaps"):
        (tmp_path / folder).mkdir(parents=True)
    for split, numbers in (("trainval", (1, 2, 3)), ("test", (4, 5))):
        pictures = [f"Persian_{number}" for number in numbers]
        lines = "".join(f"{name} 1 1 1\n" for name in pictures)
        (tmp_path / "annotations" / f"{split}.txt").write_text(lines)
        for name in pictures:
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.jpg")
            Image.new("L", (8, 8), 1).save(tmp_path / "annotations" / "trimaps" / f"{name}.png")
    return f"oxford_pets:{tmp_path}"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches the trainings, none of which runs; scenes are not painted."""
    found: dict[str, Any] = {}
    last = {"classification_loss": 0.0, "mask_loss": 0.0}

    def patch_masks(_: Any, labelled: Any, masked: Any, *__: Any, validation: Any, **___: Any) -> dict[str, Any]:
        found.update(labelled=names(labelled), masked=names(masked), validation=names(validation or ()))
        return {"history": [last], "after": None, "score": "probability"}

    def joint(_: Any, examples: Any, *__: Any, **___: Any) -> dict[str, Any]:
        found.update(examples=names(examples))
        return {"result": {"step": 1, "regularisation": 0.0}}

    def alone(_: Any, images: Any, *__: Any, **___: Any) -> dict[str, Any]:
        found.update(images=images if isinstance(images, PictureBatches) else list(images))
        return {"result": {"step": 1, "regularisation": 0.0}}

    monkeypatch.setattr("vitexplain.training.patch_masks.train_patch_masks", patch_masks)
    monkeypatch.setattr("vitexplain.training.iavit.train_iavit", joint)
    monkeypatch.setattr("vitexplain.training.iavit.train_interpreter", alone)
    monkeypatch.setattr(SceneEntry, "load", lambda self: Example(self.name, Path("unpainted"), (0,)))
    return found


# -- splits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_datasets())
def test_the_training_split_of_every_data_set_is_one_it_knows(name: str) -> None:
    info = dataset_info(name)
    assert (name in TRAINING) == ("split" in [option.name for option in info.options])
    told = training_options(f"{name}:somewhere", (), count=None)
    assert told == ({"split": TRAINING[name]} if name in TRAINING else {})
    assert name not in TRAINING or configure(info.reader, told).options["split"] != info.reader().options["split"]


def test_what_is_named_goes_before_the_training_split() -> None:
    assert training_options("coco:here", ["split=mine"], count=5) == {"split": "mine"}
    assert training_options("scenes", ["count=3"], count=5) == {"split": "train", "count": 3}
    with pytest.raises(UnknownNameError, match="name for --annotated-option called 'spilt'"):
        training_options("coco:here", ["spilt=mine"], count=5, name="--annotated-option")


def test_patch_masks_are_trained_on_training_pictures(tmp_path: Path, seen: dict[str, Any], pets: str) -> None:
    output = ("--output", tmp_path / "pm.safetensors")
    train("pm", *output, "--data", pets, "--annotated", pets)
    assert seen["labelled"] == seen["masked"] == ["Persian_1", "Persian_2", "Persian_3"]
    train("pm", *output, "--data", pets, "--annotated", pets, "--annotated-option", "split=test")
    assert (len(seen["labelled"]), seen["masked"]) == (3, ["Persian_4", "Persian_5"])
    for words in ((), ("--data", "scenes")):
        train("pm", *output, *words)
        assert (len(seen["labelled"]), len(seen["masked"])) == (9_900, 100)
        assert {name.partition("/")[0] for name in seen["labelled"] + seen["masked"]} == {"train"}


def test_pictures_to_measure_on_are_not_trained_on_by_their_labels(
    tmp_path: Path, seen: dict[str, Any], pets: str
) -> None:
    train("pm", "--output", tmp_path / "pm.safetensors", "--data", pets, "--annotated", pets, "--validation", 1)
    assert len(seen["validation"]) == 1
    assert sorted(seen["labelled"]) == sorted(seen["masked"])
    assert not {*seen["labelled"]} & {*seen["validation"]}
    assert len(seen["labelled"]) == 2
    shared = ("--data-option", "objects=2", "--data-option", "count=40", "--share", "0.5", "--validation", "6")
    train("pm", "--output", tmp_path / "pm.safetensors", *shared)
    pictures = {part: {name.partition("#")[0] for name in seen[part]} for part in seen}
    assert pictures["validation"]
    assert not pictures["validation"] & (pictures["labelled"] | pictures["masked"])


def test_model_and_interpreter_are_trained_on_training_pictures(
    tmp_path: Path, seen: dict[str, Any], pets: str
) -> None:
    output = ("--output", tmp_path / "iavit.safetensors")
    train("iavit", "--joint", *output, "--data", pets)
    assert seen["examples"] == ["Persian_1", "Persian_2", "Persian_3"]
    train("iavit", "--joint", *output, "--set", "images=7", "--data-option", "objects=2")
    assert len(seen["examples"]) == 14
    assert seen["examples"][0].startswith("train/")
    train("iavit", *output, "--data", pets)
    assert sum(map(len, seen["images"])) == 3
    train("iavit", *output, "--data", pets, "--data-option", "split=test")
    assert sum(map(len, seen["images"])) == 2


def test_an_interpreter_sees_a_picture_once_however_many_objects_it_shows(tmp_path: Path, seen: dict[str, Any]) -> None:
    # or the pictures that its weights are chosen by would be trained on as well
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    records = []
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
        segments = [{"value": value, "category": f"kind {value}"} for value in (1, 2, 3)]
        records.append({"file": f"{name}.png", "mask": f"{name}.png", "segments": segments})
        Image.new("L", (8, 8), 1).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    train("iavit", "--output", tmp_path / "iavit.safetensors", "--data", f"annotated:{tmp_path}")
    assert sum(map(len, seen["images"])) == 2


# -- options that count, or cannot -------------------------------------------------------------------------------


def test_options_of_scenes_count_for_an_interpreter_alone(tmp_path: Path, seen: dict[str, Any]) -> None:
    output = ("--output", tmp_path / "iavit.safetensors")
    train("iavit", *output)
    assert (seen["images"].pictures, seen["images"].objects) == (SPLITS["train"][:20_000], 1)
    told = ("split=validation", "count=7", "objects=2")
    train("iavit", *output, "--data", "scenes", *(word for each in told for word in ("--data-option", each)))
    assert (seen["images"].pictures, seen["images"].objects) == (SPLITS["validation"][:7], 2)
    with pytest.raises(UnknownNameError, match="name for --data-option called 'nonsense'"):
        train("iavit", *output, "--data-option", "nonsense=1")
    with pytest.raises(OptionError, match="objects=3"):
        train("iavit", *output, "--data-option", "objects=3")


def test_options_of_no_reader_are_refused(tmp_path: Path, seen: dict[str, Any], pets: str) -> None:
    output = ("--output", tmp_path / "m.safetensors")
    with pytest.raises(OptionError, match=r"--data-option split=test together with the pictures .*FORMAT:ROOT"):
        train("iavit", *output, "--data", tmp_path, "--data-option", "split=test")
    with pytest.raises(OptionError, match=r"--annotated-option split=test without --annotated.*write --data-option"):
        train("pm", *output, "--data", pets, "--annotated-option", "split=test")
    with pytest.raises(OptionError, match=r"--share 0\.01 together with --annotated oxford_pets:"):
        train("pm", *output, "--data", pets, "--annotated", pets, "--share", "0.01")
    assert not seen
