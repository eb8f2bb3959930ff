"""The presets of weakly supervised localisation, on made-up data in the layout of the protocol's metadata."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitexplain import load_model
from vitexplain.bench import read_configuration, run_bench
from vitexplain.bench.entries import MethodEntry, ModelEntry
from vitexplain.data import Example, open_dataset
from vitexplain.metrics import evaluate

CONFIGURATIONS = Path(__file__).parents[1] / "benchmarks" / "configurations"
PRESETS = {"wsol_cub": "CUB", "wsol_imagenet": "ILSVRC", "wsol_openimages30k": "OpenImages"}
COUNT = 5


@pytest.fixture(scope="module")
def scenes() -> list[Example]:
    return list(open_dataset("scenes", split="test", count=COUNT))


def write_layout(folder: Path, dataset: str, scenes: list[Example]) -> None:
    """Scenes as a test split: a picture, its class and size a line each, then its box, or its mask and ignore file."""
    metadata, data = folder / "metadata" / dataset / "test", folder / "data" / dataset
    metadata.mkdir(parents=True)
    (data / "val").mkdir(parents=True)
    lines: dict[str, list[str]] = {"image_ids": [], "class_labels": [], "image_sizes": [], "localization": []}
    for place, scene in enumerate(scenes):
        name = f"val/{place:04d}.png"
        assert isinstance(scene.image, Image.Image)
        assert scene.mask is not None
        assert scene.boxes is not None
        scene.image.save(data / name)
        lines["image_ids"].append(name)
        lines["class_labels"].append(f"{name},{scene.labels[0]}")
        lines["image_sizes"].append(f"{name},{scene.image.width},{scene.image.height}")
        if dataset == "OpenImages":
            mask, ignore = f"val/{place}_mask.png", f"val/{place}_ignore.png"
            Image.fromarray(np.uint8(255 * (scene.mask == 1))).save(data / mask)
            left_out = np.zeros_like(scene.mask, np.uint8)
            left_out[:, :10] = 255  # only what lies off the object is left out
            Image.fromarray(left_out).save(data / ignore)
            lines["localization"].append(f"{name},{mask},{ignore}")
        else:
            lines["localization"].append(",".join([name, *(str(int(side)) for side in scene.boxes[0])]))
    for stem, content in lines.items():
        (metadata / f"{stem}.txt").write_text("\n".join(content) + "\n")


def as_annotated(dataset: str, scene: Example) -> Example:
    if dataset != "OpenImages" or scene.mask is None:
        return scene
    mask = scene.mask.copy()
    mask[:, :10] = np.where(mask[:, :10] == 1, 1, -1)
    return replace(scene, mask=mask)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_measures_what_the_layout_holds(
    preset: str, tmp_path: Path, scenes: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PRESETS[preset]
    write_layout(tmp_path, dataset, scenes)
    monkeypatch.setenv("WSOL_METADATA", str(tmp_path / "metadata"))
    monkeypatch.setenv("WSOL_DATA", str(tmp_path / "data"))
    methods = ("pm", "raw_attention")
    configuration = read_configuration(CONFIGURATIONS / f"{preset}.yaml")
    assert set(methods) <= {each.name for each in configuration.methods}
    assert configuration.models[0].preprocessing["crop_mode"] == "squash"
    small = replace(configuration, models=(ModelEntry("scenes"),), methods=tuple(map(MethodEntry, methods)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of plots with few images
        results = run_bench(small, tmp_path / "results")
    model, expected = load_model(), [as_annotated(dataset, scene) for scene in scenes]
    metrics = [each.name for each in configuration.metrics]
    annotations: dict[str, Any] = (
        {"masks": [each.mask for each in expected]}
        if dataset == "OpenImages"
        else {"boxes": [each.boxes for each in expected]}
    )
    direct = evaluate(
        list(methods),
        model.preprocessing([each.image for each in expected]),
        metrics,
        model=model,
        target=[each.labels[0] for each in expected],
        **annotations,
    )
    assert results.run["models"][0]["images"]["used"] == COUNT
    found = {(row.method, row.metric, row.figure): row.value for row in results.figures()}
    for row in direct.table():
        assert found[row["method"], row["metric"], row["figure"]] == pytest.approx(row["value"], abs=1e-9)


def test_presets_take_the_metrics_of_the_protocol() -> None:
    for preset, dataset in PRESETS.items():
        metrics = [each.name for each in read_configuration(CONFIGURATIONS / f"{preset}.yaml").metrics]
        boxes = ["max_box_accuracy", "max_box_accuracy_v2"]
        assert metrics == (["pixel_average_precision"] if dataset == "OpenImages" else boxes)
