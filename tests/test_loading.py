"""Models by name, weights and labels from files, and what is said when something does not fit."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from discovered import Own
from safetensors.torch import save_file
from torch import nn

from vitexplain import (
    CheckpointError,
    ExplanationWarning,
    InputError,
    OptionError,
    TargetError,
    UnknownNameError,
    UnsupportedModelError,
    get_explainer,
)
from vitexplain.data import scenes
from vitexplain.models import hub
from vitexplain.models.discovery import DiscoveredAdapter
from vitexplain.models.embedded import SCENES_ARCHITECTURE, build_model, load_checkpoint
from vitexplain.models.labels import find_class, read_labels
from vitexplain.models.loading import list_models, load_model
from vitexplain.models.weights import read_state
from vitexplain.preprocessing import Preprocessing

NAME = "timm:test_vit"


@pytest.fixture(scope="session")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=7).eval()


@pytest.fixture
def checkpoint(tiny: nn.Module, tmp_path: Path) -> Path:
    save_file(tiny.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_a_checkpoint_gives_its_model(tiny: nn.Module, checkpoint: Path) -> None:
    loaded = load_model(NAME, checkpoint=checkpoint)
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(loaded.model(images), tiny(images))
    assert not loaded.model.training
    assert loaded.num_classes == 7
    assert loaded.labels is None, "a model fine-tuned to 7 classes does not have ImageNet's"
    assert loaded.weights == str(checkpoint)
    assert loaded.device == torch.device("cpu")


def test_imagenet_labels_where_the_number_fits(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    loaded = load_model(NAME, checkpoint=tmp_path / "x.safetensors")
    assert loaded.labels is not None
    assert loaded.class_index("zebra") == 340
    with pytest.raises(UnknownNameError, match=r"ambiguous: 134 \(.*\), 517 \(.*Give the index"):
        loaded.class_index("crane")


def test_the_preprocessing_is_the_models_own_and_can_be_changed(checkpoint: Path) -> None:
    own = load_model(NAME, checkpoint=checkpoint).preprocessing
    assert (own.size, own.mean, own.crop_fraction) == ((160, 160), (0.5, 0.5, 0.5), 0.95)
    changed = load_model(NAME, checkpoint=checkpoint, preprocessing={"mean": (0.1, 0.2, 0.3), "crop_mode": "squash"})
    assert changed.preprocessing == own.replace(mean=(0.1, 0.2, 0.3), crop_mode="squash")
    with pytest.raises(OptionError, match=r"interpolation is 'cubic', expected one of .*bicubic"):
        load_model(NAME, checkpoint=checkpoint, preprocessing={"interpolation": "cubic"})
    with pytest.raises(OptionError, match=r"timm:test_vit cannot take inputs of 96x90 pixels: .*multiples of"):
        load_model(NAME, checkpoint=checkpoint, preprocessing={"size": (96, 90)})


def test_identity_is_that_of_the_content(tiny: nn.Module, checkpoint: Path, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "same.pt")
    ours, same = (load_model(NAME, checkpoint=each).identity() for each in (checkpoint, tmp_path / "same.pt"))
    assert ours["sha256"] == same["sha256"]
    assert ours["weights"] != same["weights"]
    assert json.loads(json.dumps(ours)) == ours
    other = load_model(NAME, checkpoint=checkpoint)
    with torch.no_grad():
        other.model.norm.bias[3] += 1e-6
    assert other.identity()["sha256"] != ours["sha256"]


class TestEmbedded:
    """Which weights ship is tested elsewhere; here, that such a model is prepared and named as it was trained."""

    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        save_file(build_model().state_dict(), tmp_path / "scenes.safetensors")
        card = {"architecture": dict(SCENES_ARCHITECTURE)}
        (tmp_path / "scenes.json").write_text(json.dumps(card))
        return tmp_path / "scenes.safetensors"

    def test_the_users_own_weights(self, weights: Path) -> None:
        loaded = load_model("scenes", checkpoint=weights)
        assert loaded.labels == scenes.CLASS_NAMES
        assert loaded.num_classes == len(scenes.CLASS_NAMES)
        assert loaded.weights == str(weights)
        scene = scenes.make_scene(0, num_objects=1)
        torch.testing.assert_close(loaded.preprocessing([scene.image])[0], scenes.normalise(scene.image))

    def test_the_shipped_ones_are_the_default(self, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vitexplain.models.embedded.load_scenes_model", lambda: load_checkpoint(weights))
        shipped, own = load_model(), load_model("scenes", checkpoint=weights)
        assert shipped.name == "scenes"
        assert shipped.weights == "embedded"
        assert shipped.identity()["sha256"] == own.identity()["sha256"]

    @pytest.mark.parametrize(
        "said",
        [
            {"preprocessing": Preprocessing((96, 96), (0.4,) * 3, (0.2,) * 3, "bilinear", 0.8, "squash").to_dict()},
            {"mean": [0.4] * 3, "std": [0.2] * 3, "input_size": [3, 96, 96]},
        ],
    )
    def test_pictures_and_classes_are_those_of_the_card(self, weights: Path, said: dict[str, Any]) -> None:
        names = [f"class {index}" for index in range(12)]
        card = {"architecture": dict(SCENES_ARCHITECTURE), "classes": names, **said}
        weights.with_suffix(".json").write_text(json.dumps(card))
        loaded = load_model("scenes", checkpoint=weights)
        expected = Preprocessing((96, 96), (0.4,) * 3, (0.2,) * 3, crop_fraction=1.0)
        assert loaded.preprocessing == (Preprocessing(**said["preprocessing"]) if "preprocessing" in said else expected)
        assert loaded.labels == names
        given = load_model(
            "scenes", checkpoint=weights, labels=list("abcdefghijkl"), preprocessing={"std": (0.5, 0.5, 0.5)}
        )
        assert given.preprocessing == loaded.preprocessing.replace(std=(0.5, 0.5, 0.5))
        assert given.labels == list("abcdefghijkl")

    def test_a_card_without_names_of_classes_is_not_given_those_of_scenes(self, weights: Path) -> None:
        card = {"architecture": dict(SCENES_ARCHITECTURE), "classes": None}
        weights.with_suffix(".json").write_text(json.dumps(card))
        assert load_model("scenes", checkpoint=weights).labels is None

    @pytest.mark.parametrize(
        ("said", "error", "message"),
        [
            ({"classes": ["a", "b"]}, InputError, "found 2 labels, expected 12"),
            ({"preprocessing": {"side": 96}}, CheckpointError, r"scenes\.safetensors' has a preprocessing that cannot"),
            ({"std": [0, 1, 1]}, CheckpointError, "has a preprocessing that cannot be used .*above 0"),
        ],
    )
    def test_cards_that_do_not_fit(
        self, weights: Path, said: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        weights.with_suffix(".json").write_text(json.dumps({"architecture": dict(SCENES_ARCHITECTURE), **said}))
        with pytest.raises(error, match=message):
            load_model("scenes", checkpoint=weights)

    def test_weights_that_are_not_its_own(self, checkpoint: Path) -> None:
        with pytest.raises(CheckpointError, match=r"tiny\.json"):
            load_model("scenes", checkpoint=checkpoint)


class TestCardBesideTimmsWeights:
    """What `vitexplain train pm` writes beside the weights of timm's architectures counts there as well."""

    @pytest.fixture
    def card(self, checkpoint: Path) -> Path:
        return checkpoint.with_suffix(".json")

    def test_pictures_are_those_of_the_training(self, checkpoint: Path, card: Path) -> None:
        plain = load_model(NAME, checkpoint=checkpoint).preprocessing
        trained = plain.replace(mean=(0.4, 0.4, 0.4), crop_mode="squash")
        card.write_text(json.dumps({"method": "pm", "preprocessing": trained.to_dict()}))
        assert load_model(NAME, checkpoint=checkpoint).preprocessing == trained
        given = load_model(NAME, checkpoint=checkpoint, preprocessing={"crop_mode": "border"})
        assert given.preprocessing == trained.replace(crop_mode="border")

    @pytest.mark.parametrize(
        "text", ["[1, 2]", '{"epochs": 3}', '{"a": 1}\n{"a": 2}', '{"preprocessing": "imagenet"}', "{", "\udce9"]
    )
    def test_what_says_nothing_of_pictures_is_somebody_elses(self, checkpoint: Path, card: Path, text: str) -> None:
        plain = load_model(NAME, checkpoint=checkpoint).preprocessing
        card.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert load_model(NAME, checkpoint=checkpoint).preprocessing == plain

    def test_what_cannot_be_used_is_no_reason_to_guess(self, checkpoint: Path, card: Path) -> None:
        said = load_model(NAME, checkpoint=checkpoint).preprocessing.to_dict()
        card.write_text(json.dumps({"preprocessing": {**said, "std": [0, 1, 1]}}))
        with pytest.raises(CheckpointError, match=r"has a preprocessing that cannot be used .*above 0"):
            load_model(NAME, checkpoint=checkpoint)

    @pytest.mark.parametrize("size", [(112, 448), (64, 144), (96, 160), (96, 96)])
    def test_the_card_says_which_grid_was_saved(self, size: tuple[int, int], tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=3, depth=1).eval()
        with torch.no_grad():
            model.pos_embed.normal_()
        saved = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("blocks")}
        whole = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=3).state_dict()
        save_file({**whole, **saved}, tmp_path / "x.safetensors")
        said = Preprocessing(size, (0.5,) * 3, (0.5,) * 3).to_dict()
        (tmp_path / "x.json").write_text(json.dumps({"preprocessing": said}))
        loaded = load_model("timm:vit_tiny_patch16_224", checkpoint=tmp_path / "x.safetensors")
        assert loaded.preprocessing.size == size
        torch.testing.assert_close(loaded.model.pos_embed, model.pos_embed)
        (tmp_path / "x.json").unlink()
        if size == (64, 144):  # as many patches as a square has
            with pytest.warns(ExplanationWarning, match="may be of images of 64×144 pixels or of 96×96"):
                load_model(
                    "timm:vit_tiny_patch16_224",
                    checkpoint=tmp_path / "x.safetensors",
                    preprocessing={"size": size},
                )


class TestWeights:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"model": state, "model_ema": {key: tensor * 0 for key, tensor in state.items()}},
            lambda state: {"model_ema": state, "lr": 0.1},
            lambda state: {"model": {"state_dict": state}},
            lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
            lambda state: {"state_dict": {f"model._orig_mod.{key}": tensor for key, tensor in state.items()}},
            lambda state: {"state_dict": {f"module.model.{key}": tensor for key, tensor in state.items()}},
            lambda state: {key: tensor.half() for key, tensor in state.items()},
        ],
        ids=["plain", "state_dict", "model before ema", "only ema", "nested", "parallel", "compiled", "both", "half"],
    )
    def test_wrappings(self, tiny: nn.Module, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
        torch.save(wrap(tiny.state_dict()), tmp_path / "x.pth")
        loaded = load_model(NAME, checkpoint=tmp_path / "x.pth").model.state_dict()
        for key, tensor in tiny.state_dict().items():
            assert loaded[key].dtype == torch.float32
            torch.testing.assert_close(loaded[key], tensor, rtol=1e-3, atol=1e-4)

    def test_missing_or_folder(self, tmp_path: Path) -> None:
        for path, found in ((tmp_path / "none.pt", "no such file"), (tmp_path, "a folder")):
            with pytest.raises(CheckpointError, match=rf"no checkpoint at .*{found}.*safetensors"):
                load_model(NAME, checkpoint=path)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("content", [b"", b"not weights at all, but long enough to hold a header", "cut"])
    def test_broken_files(self, tiny: nn.Module, tmp_path: Path, suffix: str, content: bytes | str) -> None:
        path = tmp_path / f"x{suffix}"
        if content == "cut":
            (save_file if suffix == ".safetensors" else torch.save)(tiny.state_dict(), path)
            content = path.read_bytes()[:-4000]
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\..* cannot be read as weights, it may be cut short") as caught:
            read_state(path)
        assert "\n" not in str(caught.value)

    def test_pickled_objects_are_refused(self, tiny: nn.Module, tmp_path: Path) -> None:
        for content in (tiny, {"model": tiny.state_dict(), "args": argparse.Namespace(lr=1)}, _Trap(tmp_path / "ran")):
            torch.save(content, tmp_path / "x.pt")
            with pytest.raises(CheckpointError, match=r"would run code.*Save only model\.state_dict\(\)") as caught:
                read_state(tmp_path / "x.pt")
            assert "weights_only" not in str(caught.value), "that is the advice to run the code"
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"state_dict": {"a": "b"}}])
    def test_no_state_dict(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="holds no state dict"):
            read_state(tmp_path / "x.pt")

    def test_another_architecture(self, checkpoint: Path) -> None:
        with pytest.raises(CheckpointError, match=r"not of this architecture: \d+ missing \(.*Name the architecture"):
            load_model("timm:vit_tiny_patch16_224", checkpoint=checkpoint)

    @pytest.mark.parametrize("architecture", ["test_vit", "vit_tiny_patch16_224"])
    def test_the_position_embedding_tells_the_input_size(self, architecture: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        saved = timm.create_model(architecture, img_size=96, num_classes=10).eval()
        save_file(saved.state_dict(), tmp_path / "x.safetensors")
        loaded = load_model(f"timm:{architecture}", checkpoint=tmp_path / "x.safetensors")
        assert (loaded.preprocessing.size, loaded.num_classes) == ((96, 96), 10)
        images = torch.randn(2, 3, 96, 96)
        torch.testing.assert_close(loaded.model(images), saved(images))

    def test_an_input_size_that_is_not_square_has_to_be_given(self, tmp_path: Path) -> None:
        saved = timm.create_model("vit_tiny_patch16_224", img_size=(64, 128), num_classes=7).eval()
        save_file(saved.state_dict(), tmp_path / "x.safetensors")
        shapes = (
            r"pos_embed \(1, 33, 192\) instead of \(1, 197, 192\)\)\. They are for images of another size.*--size HxW"
        )
        with pytest.raises(CheckpointError, match=shapes):
            load_model("timm:vit_tiny_patch16_224", checkpoint=tmp_path / "x.safetensors")
        size = {"size": (64, 128)}
        loaded = load_model("timm:vit_tiny_patch16_224", checkpoint=tmp_path / "x.safetensors", preprocessing=size)
        images = torch.randn(2, 3, 64, 128)
        torch.testing.assert_close(loaded.model(images), saved(images))

    @pytest.mark.parametrize("size", [(96, 96), (64, 128), (224, 224)])
    def test_a_plain_transformer_is_brought_to_the_size_that_is_asked_for(
        self, size: tuple[int, int], tmp_path: Path
    ) -> None:
        """The weights are those that timm makes of a state dict for a model of that size."""
        from timm.models.vision_transformer import checkpoint_filter_fn

        torch.manual_seed(0)
        saved = timm.create_model("vit_tiny_patch16_224", num_classes=7)
        save_file(saved.state_dict(), tmp_path / "x.safetensors")
        expected = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=size).eval()
        expected.load_state_dict(checkpoint_filter_fn(saved.state_dict(), expected))
        loaded = load_model(
            "timm:vit_tiny_patch16_224", checkpoint=tmp_path / "x.safetensors", preprocessing={"size": size}
        )
        assert loaded.preprocessing.size == size
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(loaded.model(images), expected(images))
        grid = (size[0] // 16, size[1] // 16)
        assert get_explainer("tokentm", loaded)(images).scores.shape == (2, *grid)

    def test_sizes_that_a_model_cannot_be_brought_to(self, tmp_path: Path) -> None:
        saved = timm.create_model("vit_tiny_patch16_224", num_classes=7)
        save_file(saved.state_dict(), tmp_path / "x.safetensors")
        with pytest.raises(OptionError, match="inputs of 96x90 pixels: expected multiples of the patch size 16×16"):
            load_model(
                "timm:vit_tiny_patch16_224", checkpoint=tmp_path / "x.safetensors", preprocessing={"size": (96, 90)}
            )

    def test_no_classifier(self, tmp_path: Path) -> None:
        headless = timm.create_model("test_vit", num_classes=0)
        save_file(headless.state_dict(), tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"2 missing \(head\.bias, head\.weight\)\. They hold no classifier"):
            load_model(NAME, checkpoint=tmp_path / "x.safetensors")

    @pytest.mark.parametrize("architecture", ["swin_tiny_patch4_window7_224", "resnet10t", "efficientnet_b0"])
    def test_classifiers_of_other_names_tell_the_classes_too(self, architecture: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        saved = timm.create_model(architecture, num_classes=10).eval()
        save_file(saved.state_dict(), tmp_path / "x.safetensors")
        loaded = load_model(f"timm:{architecture}", checkpoint=tmp_path / "x.safetensors")
        assert (loaded.num_classes, loaded.labels) == (10, None)
        images = torch.randn(1, 3, *loaded.preprocessing.size)
        torch.testing.assert_close(loaded.model(images), saved(images))
        save_file(timm.create_model(architecture, num_classes=0).state_dict(), tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"2 missing .*They hold no classifier"):
            load_model(f"timm:{architecture}", checkpoint=tmp_path / "x.safetensors")

    def test_two_heads_of_a_distilled_model(self, tmp_path: Path) -> None:
        model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5).eval()
        save_file(model.state_dict(), tmp_path / "x.safetensors")
        loaded = load_model("timm:deit_tiny_distilled_patch16_224", checkpoint=tmp_path / "x.safetensors")
        assert loaded.num_classes == 5
        images = torch.randn(1, 3, 224, 224)
        torch.testing.assert_close(loaded.model(images), model(images))


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class TestNames:
    def test_unknown_models(self) -> None:
        with pytest.raises(UnknownNameError, match=r"no model called 'vit_tiny_patch16_224'\. Known: scenes .*timm:"):
            load_model("vit_tiny_patch16_224")
        with pytest.raises(UnknownNameError, match=r"'vit_tiny_patch16_242' \(did you mean 'vit_tiny_patch16_224'"):
            load_model("timm:vit_tiny_patch16_242")
        with pytest.raises(
            UnknownNameError, match=r"pretrained tag of vit_tiny_patch16_224 called 'augreg'.*Known: aug"
        ):
            load_model("timm:vit_tiny_patch16_224.augreg")

    def test_other_architectures_are_refused_before_anything_is_fetched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vitexplain.models.loading.fetch_pretrained", lambda _: pytest.fail("fetched"))
        for name in ("pit_ti_224", "crossvit_tiny_240", "tnt_s_legacy_patch16_224"):
            with pytest.raises(UnsupportedModelError, match=f"^timm:{name} is not supported: .+"):
                load_model(f"timm:{name}")

    def test_architectures_that_have_to_be_watched_are_loaded(self, tmp_path: Path) -> None:
        """What has no adapter of its own cannot be judged without weights; that is no reason to refuse it."""
        from timm.models import register_model

        def watched_vit(pretrained: bool = False, **_: Any) -> nn.Module:
            model = Own()
            model.num_classes = 7
            model.pretrained_cfg = {"input_size": (3, 32, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3}
            return model

        register_model(watched_vit)
        torch.manual_seed(0)
        save_file(Own().state_dict(), tmp_path / "own.safetensors")
        loaded = load_model("timm:watched_vit", checkpoint=tmp_path / "own.safetensors")
        assert isinstance(loaded.subject.adapter, DiscoveredAdapter)
        assert loaded.num_classes == 7

    @pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "", "cpu:x"])
    def test_devices_that_are_not_there(self, device: str, checkpoint: Path) -> None:
        with pytest.raises(OptionError, match=rf"the device '{device}' cannot be used .*available: cpu") as caught:
            load_model(NAME, checkpoint=checkpoint, device=device)
        assert "\n" not in str(caught.value)

    def test_features_are_not_taken_for_classes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        headless = timm.create_model("test_vit", num_classes=0)
        monkeypatch.setattr("vitexplain.models.loading.fetch_pretrained", lambda _: (headless, "hub"))
        with pytest.warns(ExplanationWarning, match="no classifier: its outputs are features"):
            loaded = load_model(NAME)
        assert loaded.labels is None
        assert loaded.num_classes == 64

    def test_list_models(self) -> None:
        assert [name for name, _ in list_models("scen*")] == ["scenes", "scenes-pm"]
        found = dict(list_models("timm:test_vit*"))
        assert found["timm:test_vit"] == found["timm:test_vit2"] == ""
        assert set(found) <= {f"timm:{name}" for name in timm.list_models("test_vit*")}
        assert dict(list_models("vit_small_patch14_dinov2")) == {
            "timm:vit_small_patch14_dinov2": "no classifier: its outputs are features"
        }
        assert not list(list_models("resnet*"))
        assert next(list_models())[0] == "scenes", "the list streams: the first line does not wait for the last"


class TestHub:
    def test_offline_is_said_at_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr(hub, "is_cached", lambda _: False)
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("touched the network"))
        with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.*scenes.*--checkpoint"):
            load_model(NAME)

    def test_no_network_is_said_soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in [each for each in os.environ if each.lower().endswith("_proxy")]:
            monkeypatch.delenv(variable)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        monkeypatch.setattr(hub, "is_cached", lambda _: False)
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=r"no connection to 127\.0\.0\.1: .*HF_HUB_OFFLINE=1"):
            load_model(NAME)
        assert time.monotonic() - started < 3

    def test_a_proxy_is_left_to_the_client(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("went past the proxy"))
        assert hub.offline_cause() == ""

    def test_the_clients_noise_is_kept_back_and_the_logger_restored(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s")
            raise RuntimeError("first line\nand a long tail")

        logger = logging.getLogger("huggingface_hub")
        level = logger.level
        monkeypatch.setattr(hub, "is_cached", lambda _: False)
        monkeypatch.setattr(hub, "offline_cause", lambda: "")
        monkeypatch.setattr(timm, "create_model", fail)
        monkeypatch.setattr(logger, "propagate", True)
        with (
            caplog.at_level(logging.INFO),
            pytest.raises(CheckpointError, match=r"RuntimeError: first line\)") as caught,
        ):
            hub.fetch_pretrained("test_vit")
        assert "tail" not in str(caught.value)
        assert [each.getMessage() for each in caplog.records] == [
            "fetching the pretrained weights of timm:test_vit from the hub"
        ]
        assert logger.level == level

    def test_what_was_fetched_is_recorded(self, monkeypatch: pytest.MonkeyPatch, tiny: nn.Module) -> None:
        monkeypatch.setattr(hub, "is_cached", lambda _: True)
        monkeypatch.setattr(hub, "offline_cause", lambda: pytest.fail("what is cached needs no network"))
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **_: create(name))
        assert load_model(NAME).weights == "hub:timm/test_vit.r160_in1k"

    def test_no_weights_to_fetch(self) -> None:
        names = [name for name in timm.list_models("vit_*") if not timm.get_pretrained_cfg(name).has_weights]
        with pytest.raises(CheckpointError, match=r"there are no pretrained weights of timm:vit_.*--checkpoint"):
            hub.fetch_pretrained(names[0])


class TestLabels:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("x.txt", "cat\ndog, hound\nbird\n\n"),
            ("x.txt", "\ufeffcat\r\n dog, hound \r\nbird"),
            ("x.json", '["cat", "dog, hound", "bird"]'),
            ("x.json", '{"2": "bird", "0": "cat", "1": ["dog", "hound"]}'),
            ("x.json", '{"0": ["n01", "cat"], "1": {"name": "dog, hound"}, "2": "bird"}'),
            (
                "x.json",
                '[{"index": 2, "name": "bird"}, {"index": 0, "name": "cat"}, {"index": 1, "label": "dog, hound"}]',
            ),
        ],
    )
    def test_files(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text, encoding="utf-8")
        names = read_labels(tmp_path / name)
        assert names[1:] == ["dog, hound", "bird"]
        assert names[0] in ("cat", "n01, cat")

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("x.txt", "cat\n\nbird", "is empty"),
            ("x.json", '["cat"', "not understood"),
            ("x.json", '{"0": "cat", "2": "bird"}', "indices are not 0, 1, 2"),
            ("x.json", '{"cat": 0}', "not understood"),
            ("x.json", '[{"index": 0, "wnid": "n01"}]', "no name but index, wnid"),
            ("x.json", "[1, 2]", "found 1 where a name"),
            ("x.json", "3", "not understood"),
        ],
    )
    def test_files_that_are_not_understood(self, tmp_path: Path, name: str, text: str, said: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=rf"(?s)x\..*{said}|{said}.*x\."):
            read_labels(tmp_path / name)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "latin.txt").write_bytes("müde".encode("latin-1"))
        for name in ("none.txt", "latin.txt"):
            with pytest.raises(InputError, match=rf"the labels file '.*{name}' cannot be read"):
                read_labels(tmp_path / name)

    def test_their_number_must_fit(self, checkpoint: Path) -> None:
        assert load_model(NAME, checkpoint=checkpoint, labels=list("abcdefg")).labels == list("abcdefg")
        with pytest.raises(InputError, match="found 3 labels, expected 7, one for each class of timm:test_vit"):
            load_model(NAME, checkpoint=checkpoint, labels=["a", "b", "c"])

    def test_classes_by_name(self) -> None:
        labels = ["tabby, tabby cat", "Tiger cat", "tiger, big cat", "crane", "crane", "big cat, lion"]
        for text, expected in {"tabby": 0, " TIGER ": 2, "tiger cat": 1, "5": 5, "+2": 2, "lion": 5}.items():
            assert find_class(text, labels, 6) == expected
        for text, numbers in {"crane": "3 .*4", "big cat": "2 .*5"}.items():
            with pytest.raises(UnknownNameError, match=f"ambiguous: {numbers} .*Give the index"):
                find_class(text, labels, 6)
        with pytest.raises(UnknownNameError, match=r"no class called 'loin' \(did you mean 'lion'\?\)"):
            find_class("loin", labels, 6)
        with pytest.raises(UnknownNameError, match=r"no class called 'name9x' \(did you mean .*Known: 99 labels"):
            find_class("name9x", [f"name{index}" for index in range(99)], 99)
        with pytest.raises(UnknownNameError, match="no labels are known"):
            find_class("lion", None, 6)
        with pytest.raises(UnknownNameError, match="no class called '777"):
            find_class("7" * 5000, labels, 6)
        for text in ("-1", "6", "5000"):
            with pytest.raises(TargetError, match=f"found class {text}, expected 0 to 5"):
                find_class(text, labels, 6)
        with pytest.raises(UnknownNameError, match="no class called '²'"):
            find_class("²", labels, 6)


@pytest.mark.parity
def test_real_weights_name_what_is_in_the_picture(test_data: Path) -> None:
    loaded = load_model(
        "timm:vit_tiny_patch16_224",
        checkpoint=test_data / "vit_tiny_patch16_224_in1k" / "model.safetensors",
        labels=test_data / "labels" / "imagenet1k_classes.json",
    )
    picture = loaded.preprocessing([test_data / "xai_samples" / "imagenet-stubs__koala.jpg"])
    with torch.no_grad():
        assert loaded.model(picture).argmax().item() == loaded.class_index("koala") == 105
