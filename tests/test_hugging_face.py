"""Classifiers of transformers by name: `load_model("hf:…")`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from discovered import SQUARE
from PIL import Image
from typer.testing import CliRunner

from vitexplain import CheckpointError, InputError, OptionError, UnsupportedModelError, get_explainer, load_model
from vitexplain.cli import app
from vitexplain.models import hub, hugging_face
from vitexplain.models.hugging_face import read_processor
from vitexplain.models.loading import LoadedModel
from vitexplain.preprocessing import Preprocessing

LABELS = dict(enumerate(["cat", "dog", "bird", "fish", "horse", "sheep", "cow"]))
SIDES = {"height": 32, "width": 32}


def photograph(height: int = 90, width: int = 140) -> Image.Image:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 9, width // 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(folder: Path, architecture: str = "ViT", processor: Any = None, **options: Any) -> Path:
    """A tiny classifier with random weights, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**SQUARE, "id2label": LABELS, **options})
    getattr(transformers, f"{architecture}ForImageClassification")(config).save_pretrained(folder)
    (processor or transformers.ViTImageProcessor(size=SIDES)).save_pretrained(folder)
    return folder


def named(folder: Path) -> str:
    return f"hf:{folder}"


@pytest.mark.parametrize("architecture", ["ViT", "DeiT", "Beit", "Dinov2", "Dinov2WithRegisters"])
def test_a_folder_is_explained_as_the_model_in_it(tmp_path: Path, architecture: str) -> None:
    folder = saved(tmp_path, architecture)
    loaded = load_model(named(folder))
    assert loaded.weights == str(folder)
    assert loaded.num_classes == 7
    assert list(loaded.labels or ()) == list(LABELS.values())
    assert loaded.class_index("horse") == 4
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    inputs = transformers.AutoImageProcessor.from_pretrained(folder)(photograph(), return_tensors="pt")
    by_name = get_explainer("generic_attention", loaded)(photograph(), "horse")
    by_hand = get_explainer("generic_attention", model)(inputs, 4)
    # the two ways to resize are not the same to the last level of 255
    torch.testing.assert_close(by_name.logits, model(**inputs).logits.detach(), rtol=0, atol=2e-2)
    torch.testing.assert_close(by_name.scores, by_hand.scores, rtol=0.05, atol=1e-4)
    assert by_name.overlay().shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (transformers.ViTImageProcessor(size=SIDES), ("squash", 1.0, (32, 32), "bilinear")),
        (transformers.DeiTImageProcessor(), ("squash", 0.875, (224, 224), "bicubic")),
        (transformers.CLIPImageProcessor(), ("center", 1.0, (224, 224), "bicubic")),
        (
            transformers.BitImageProcessor(size={"shortest_edge": 248}, do_normalize=False),
            ("center", 224 / 248, (224, 224), "bicubic"),
        ),
        (transformers.ConvNextImageProcessor(size={"shortest_edge": 224}), ("center", 0.875, (224, 224), "bicubic")),
        (transformers.ConvNextImageProcessor(size={"shortest_edge": 384}), ("squash", 1.0, (384, 384), "bicubic")),
        (transformers.SiglipImageProcessor(size={"height": 48, "width": 96}), ("squash", 1.0, (48, 96), "bicubic")),
    ],
    ids=["vit", "deit", "clip", "bit", "convnext", "convnext_large", "siglip"],
)
def test_what_processors_say_is_what_they_do(processor: Any, expected: tuple[Any, ...]) -> None:
    found = read_processor(processor, "hf:a")
    assert (found.crop_mode, found.crop_fraction, found.size, found.interpolation) == expected
    for picture in (photograph(), photograph(300, 120)):
        theirs = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0])
        difference = (found(picture) - theirs) * torch.tensor(found.std)[:, None, None] * 255
        assert difference.abs().mean() < 6, "a pixel of a busy picture at most, where they round the crop otherwise"


@pytest.mark.parametrize(
    "processor",
    [
        transformers.MobileViTImageProcessor(size={"shortest_edge": 256}),  # blue, green, red
        transformers.ViTImageProcessor(rescale_factor=1 / 127.5),
        transformers.ViTImageProcessor(do_resize=False),
        transformers.LevitImageProcessor(size={"shortest_edge": 288}),  # resizes to 8/7 of what it says
        transformers.Siglip2ImageProcessor(),  # patches of no one size
    ],
    ids=["channels", "scale", "no_resize", "levit", "patches"],
)
def test_a_processor_that_does_something_else_is_refused(processor: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"hf:a prepares pictures .*ImageProcessor is not .*return_tensors"):
        read_processor(processor, "hf:a")


def test_names_that_mean_nothing_are_no_labels(tmp_path: Path) -> None:
    plain = {index: f"LABEL_{index}" for index in range(3)}
    assert load_model(named(saved(tmp_path, id2label=plain, num_labels=3))).labels is None
    given = load_model(named(tmp_path), labels=["a", "b", "c"])
    assert given.labels == ["a", "b", "c"]


def test_half_precision_is_explained_in_single(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    transformers.AutoModelForImageClassification.from_pretrained(folder).half().save_pretrained(folder)
    assert {each.dtype for each in load_model(named(folder)).model.parameters()} == {torch.float32}


def test_a_model_without_a_trained_classifier_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SQUARE)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size=SIDES).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lack classifier\.bias, classifier\.weight.*random.*ImageTextModel"):
        load_model(named(tmp_path))


def test_nothing_is_unpickled_and_no_code_is_run(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    state = load_model(named(folder)).model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot be loaded .*expected .*model\.safetensors"):
        load_model(named(folder))
    (folder / "modeling_own.py").write_text("raise SystemExit", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.Config"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(named(folder))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_what_is_missing_is_said(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded .*expected .*preprocessor_config\.json"):
        load_model(named(folder))


def test_a_checkpoint_beside_it_and_another_size_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(OptionError, match=r"found the checkpoint 'a\.safetensors' for hf:"):
        load_model(named(folder), checkpoint="a.safetensors")
    larger = load_model(named(folder), preprocessing={"size": (64, 64)})
    with pytest.raises(InputError, match=r"refused images of 64×64 pixels .*; expected 32×32"):
        get_explainer("rollout", larger)(photograph())


def test_without_transformers_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hugging_face, "is_cached", lambda _: False)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.*no folder 'some/where'.*save_pretrained"):
        load_model("hf:some/where")
    monkeypatch.setattr(hugging_face, "find_spec", lambda _: None)
    with pytest.raises(OptionError, match="needs transformers: pip install transformers"):
        load_model("hf:some/where")


def test_a_repository_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--some--where"
    saved(cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", os.fspath(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.is_cached("some/where")
    loaded = load_model("hf:some/where")
    assert loaded.weights == "hub:some/where"
    assert isinstance(loaded, LoadedModel)


def test_on_the_command_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "DeiT")
    photograph().save(tmp_path / "a.png")
    output = tmp_path / "out"
    options = ["--model", named(folder), "--target", "fish", "--method", "tokentm", "--whole"]
    result = CliRunner().invoke(app, ["explain", str(tmp_path / "a.png"), *options, "--output", str(output)])
    assert result.exit_code == 0, result.output
    record = json.loads((output / "a.json").read_text(encoding="utf-8"))
    assert record["model"]["name"] == named(folder)
    assert Preprocessing(**record["model"]["preprocessing"]) == load_model(named(folder)).preprocessing
    assert record["maps"][0]["label"] == "fish"
    with Image.open(output / record["maps"][0]["overlay"]) as overlay:
        assert overlay.size == (140, 90)
