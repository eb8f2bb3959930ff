"""Explaining files: what is written for each image, and that one bad file costs nothing but itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SIZE, make_model
from PIL import Image

import vitexplain.explain_files
from vitexplain import (
    ExplanationWarning,
    ExportError,
    InputError,
    OptionError,
    Subject,
    TargetError,
    adapt,
    create_method,
    explain_with,
)
from vitexplain.explain_files import explain_to_folder
from vitexplain.models.loading import LoadedModel
from vitexplain.preprocessing import Preprocessing

LABELS = ["cat", "dog", "bird, fowl", "fish", "fox", "frog", "fly"]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    preprocessing = Preprocessing(SIZE, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), crop_fraction=1.0)
    subject = Subject(adapt(make_model("registers")), preprocessing, LABELS)
    return LoadedModel("tiny", subject.adapter.model, subject, "made up", 7)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (60, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    return path


def broken(path: Path) -> Path:
    path.write_bytes(b"no picture")
    return path


def chosen(*names: str) -> list[Any]:
    return [create_method(name) for name in names or ("generic_attention",)]


def record_of(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / f"{name}.json").read_text(encoding="utf-8"))


def test_what_is_written_is_what_the_explanation_says(tmp_path: Path, model: LoadedModel) -> None:
    files = [picture(tmp_path / f"{name}.png", seed) for seed, name in enumerate("abc")]
    methods, targets = [*chosen("generic_attention"), create_method("gradcam", relu=False)], [4, 1, 4]
    output = tmp_path / "out"
    assert explain_to_folder(files, model, methods, targets, output, batch_size=2) == (3, [])
    assert len(list(output.iterdir())) == 3 * (1 + 2 * 2 * 2), "a class that is asked twice is done once"
    for file in files:
        record = record_of(output, file.stem)
        explanations = explain_with(methods, model.subject, file, torch.tensor([[4, 1]]))
        assert record["image"] == str(file)
        assert record["image_size"] == list(SIZE)
        assert record["patch_grid"] == [4, 6]
        assert record["model"] == model.identity()
        assert record["model"]["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
        assert record["versions"].keys() >= {"vitexplain", "python", "torch", "timm", "numpy", "pillow"}
        likely = explanations[0].logits[0].softmax(0).sort(descending=True)
        assert [each["class"] for each in record["predicted"]] == likely.indices[:5].tolist()
        assert [each["probability"] for each in record["predicted"]] == pytest.approx(likely.values[:5].tolist())
        assert record["predicted"][0]["label"] == LABELS[int(likely.indices[0])]
        maps = iter(record["maps"])
        for explanation in explanations:
            overlays = explanation.overlay()
            for k, index in enumerate((4, 1)):
                entry = next(maps)
                assert entry["method"] == explanation.method
                assert entry["options"] == explanation.options
                assert (entry["class"], entry["label"]) == (index, LABELS[index])
                assert entry["probability"] == pytest.approx(explanation.probabilities[0, k].item())
                share = explanation.diagnostics["prefix_share"][0, k].item()
                assert entry["prefix_share"] == pytest.approx(share, rel=1e-5)  # of two images at a time
                assert entry["signed"] == explanation.signed
                assert entry["approximate"] is None
                assert entry["scores"] == f"{file.stem}-{explanation.method}-{index}.npy"
                scores = np.load(output / entry["scores"])
                assert scores.dtype == np.float32
                np.testing.assert_allclose(scores, explanation.scores[0, k], rtol=1e-4, atol=1e-6)
                drawn = np.asarray(Image.open(output / entry["overlay"])).astype(int)
                assert np.abs(drawn - overlays[0, k]).max() <= 2


def test_the_predicted_class_is_the_default(tmp_path: Path, model: LoadedModel) -> None:
    file = picture(tmp_path / "a.png")
    explain_to_folder([file], model, chosen("rollout", "tokentm"), [], tmp_path / "out")
    record = record_of(tmp_path / "out", "a")
    assert [each["class"] for each in record["maps"]] == [record["predicted"][0]["class"]] * 2
    assert [each["class_specific"] for each in record["maps"]] == [False, True]


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_a_bad_file_costs_only_itself(tmp_path: Path, model: LoadedModel, batch_size: int) -> None:
    files = [
        picture(tmp_path / "a.png"),
        broken(tmp_path / "b.png"),
        broken(tmp_path / "c.png"),
        picture(tmp_path / "d.jpg", 1, (300, 20)),
        tmp_path / "gone.png",
        picture(tmp_path / "e.png", 2, (10, 400)),
    ]
    (tmp_path / "empty.png").touch()
    files.append(tmp_path / "empty.png")
    told: list[InputError] = []
    output = tmp_path / "out"
    done, failures = explain_to_folder(
        files, model, chosen(), [2], output, batch_size=batch_size, on_failure=told.append
    )
    assert done == 3
    assert told == failures
    for error, name in zip(failures, ("b.png", "c.png", "gone.png", "empty.png"), strict=True):
        assert name in str(error)
    assert sorted(path.stem for path in output.glob("*.json")) == ["a", "d", "e"]


def test_a_run_of_nothing_but_bad_files(tmp_path: Path, model: LoadedModel) -> None:
    files = [broken(tmp_path / f"{name}.png") for name in "ab"]
    done, failures = explain_to_folder(files, model, chosen(), [], tmp_path / "out")
    assert (done, len(failures)) == (0, 2)
    assert not list((tmp_path / "out").iterdir())


def test_names_stay_apart(tmp_path: Path, model: LoadedModel) -> None:
    files = [
        picture(tmp_path / each, seed)
        for seed, each in enumerate(
            ["a/x.png", "b/x.png", "x.jpg", "x-2.png", "X.png", "a b ü.png", f"{'l' * 240}.png"]
        )
    ]
    output = tmp_path / "out"
    assert explain_to_folder(files, model, chosen(), [3], output) == (7, [])
    records = {path.stem: record_of(output, path.stem) for path in output.glob("*.json")}
    assert {each["image"] for each in records.values()} == {str(file) for file in files}
    assert len({stem.lower() for stem in records}) == 7
    assert records["x"]["image"] == str(files[0])
    assert records["x-2"]["image"] == str(files[3]), "a number never takes another file's name"
    assert records["a b ü"]["image"] == str(files[5])
    scores = {(output / each["maps"][0]["scores"]).read_bytes() for each in records.values()}
    assert len(scores) == 7


def test_one_method_with_two_settings_keeps_both(tmp_path: Path, model: LoadedModel) -> None:
    methods = [create_method("rollout", head_fusion=fusion) for fusion in ("mean", "max")]
    explain_to_folder([picture(tmp_path / "a.png")], model, methods, [3], tmp_path / "out")
    maps = record_of(tmp_path / "out", "a")["maps"]
    assert [each["scores"] for each in maps] == ["a-rollout-3.npy", "a-rollout-2-3.npy"]
    assert [each["options"]["head_fusion"] for each in maps] == ["mean", "max"]
    assert [each["method"] for each in maps] == ["rollout", "rollout"]
    assert not np.array_equal(*(np.load(tmp_path / "out" / each["scores"]) for each in maps))


def test_a_source_is_never_overwritten(tmp_path: Path, model: LoadedModel) -> None:
    files = [picture(tmp_path / "x-rollout-3.png"), picture(tmp_path / "x.png", 1)]
    before = files[0].read_bytes()
    with pytest.raises(ExportError, match=r"x-rollout-3\.png' is one of the images .*another output folder"):
        explain_to_folder(files, model, chosen("rollout"), [3], tmp_path)
    assert files[0].read_bytes() == before


def test_results_of_an_earlier_run_are_replaced(tmp_path: Path, model: LoadedModel) -> None:
    file = picture(tmp_path / "a.png")
    for _ in range(2):
        explain_to_folder([file], model, chosen(), [3], tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_somebody_elses_record_is_not_replaced(tmp_path: Path, model: LoadedModel) -> None:
    files = [picture(tmp_path / "b.png"), picture(tmp_path / "a.png")]
    (tmp_path / "a.json").write_text('{"shapes": ["drawn by hand"]}')
    with pytest.raises(ExportError, match=r"a\.json' is there already and no record of an earlier run"):
        explain_to_folder(files, model, [create_method("rollout")], [1], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "a.json"}
    assert json.loads((tmp_path / "a.json").read_text()) == {"shapes": ["drawn by hand"]}


def test_what_cannot_be_done_is_said_before_anything_is_read(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = picture(tmp_path / "a.png")
    (tmp_path / "file").touch()
    monkeypatch.setattr(Preprocessing, "__call__", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(ExportError, match="cannot use the folder"):
        explain_to_folder([file], model, chosen(), [], tmp_path / "file")
    with pytest.raises(OptionError, match="batch_size=0"):
        explain_to_folder([file], model, chosen(), [], tmp_path / "out", batch_size=0)
    with pytest.raises(OptionError, match="0 methods"):
        explain_to_folder([file], model, [], [], tmp_path / "out")


def test_a_class_that_the_model_lacks(tmp_path: Path, model: LoadedModel) -> None:
    with pytest.raises(TargetError, match="found class 7, expected 0 to 6"):
        explain_to_folder([picture(tmp_path / "a.png")], model, chosen(), [7], tmp_path / "out")


def test_finished_images_survive_an_interruption(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [picture(tmp_path / f"{name}.png", seed) for seed, name in enumerate("abc")]
    save, calls = vitexplain.explain_files.save_png, []

    def interrupted(*args: Any) -> Path:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return save(*args)

    monkeypatch.setattr(vitexplain.explain_files, "save_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explain_to_folder(files, model, chosen(), [3], tmp_path / "out", batch_size=3)
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.json")) == ["a", "b"]
    assert not list((tmp_path / "out").glob("*.part"))


def test_memory_is_that_of_one_batch(tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are reduced as they are read, and a batch is written before the next is read."""
    files = [picture(tmp_path / f"{index}.png", index) for index in range(5)]
    events: list[str] = []
    prepare, save = Preprocessing.__call__, vitexplain.explain_files.save_json

    def read(self: Preprocessing, image: Any) -> Any:
        events.append("read")
        return prepare(self, image)

    def write(*args: Any) -> Path:
        events.append("write")
        return save(*args)

    monkeypatch.setattr(Preprocessing, "__call__", read)
    monkeypatch.setattr(vitexplain.explain_files, "save_json", write)
    explain_to_folder(files, model, chosen(), [], tmp_path / "out", batch_size=2)
    assert events == ["read", "read", "write", "write"] * 2 + ["read", "write"]


def test_warnings_name_the_file(tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [broken(tmp_path / "a.png"), picture(tmp_path / "b.png"), picture(tmp_path / "c.png", 1)]
    explain = explain_with

    def with_warnings(*args: Any) -> Any:
        warnings.warn("tokentm gave a constant map for images [0, 1]: cause", ExplanationWarning, stacklevel=1)
        warnings.warn("somebody else's", DeprecationWarning, stacklevel=1)
        return explain(*args)

    monkeypatch.setattr(vitexplain.explain_files, "explain_with", with_warnings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        explain_to_folder(files, model, chosen(), [3], tmp_path / "out")
    assert [(each.category, str(each.message)) for each in caught] == [
        (ExplanationWarning, f"tokentm gave a constant map for {str(files[1])!r}, {str(files[2])!r}: cause"),
        (DeprecationWarning, "somebody else's"),
    ]


def test_a_constant_map_is_a_warning_that_names_its_file(tmp_path: Path, model: LoadedModel) -> None:
    file = tmp_path / "grey.png"
    picture(file)
    flat = make_model("registers")
    with torch.no_grad():
        flat.head.weight.zero_()
    subject = Subject(adapt(flat), model.preprocessing, LABELS)
    with pytest.warns(ExplanationWarning, match=r"constant map for '.*grey\.png'"):
        explain_to_folder([file], LoadedModel("flat", flat, subject, "", 7), chosen(), [3], tmp_path / "out")
    assert record_of(tmp_path / "out", "grey")["maps"][0]["constant"] is True
