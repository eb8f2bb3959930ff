"""The scenes, the embedded model and its training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import signal
import warnings
from pathlib import Path

import lightning.pytorch
import numpy as np
import pytest
import torch
from torch import nn

from vitexplain.benchmarks.scenes_checks import (
    background,
    colour_histogram,
    object_histogram,
    place_and_area,
    predictions,
    simple_classifier,
)
from vitexplain.data.scenes import CLASS_NAMES, SIZE, SPLITS, Scene, SceneDataset, make_scene, normalise
from vitexplain.errors import CheckpointError, InputError, VitExplainError
from vitexplain.models.embedded import load_checkpoint, load_scenes_model, scenes_card
from vitexplain.training.classifier import ClassifierSettings, accuracy, train_classifier, window_tokens
from vitexplain.training.scene_batches import NO_OBJECT, Batch, SceneBatches, ScenePool, faded

SEEDS = (0, 7, 10**9 + 3, 2 * 10**9 + 11)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_scenes_model()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed) for seed in SPLITS["test"][:400]]


@pytest.fixture(scope="module")
def labels(scenes: list[Scene]) -> torch.Tensor:
    return torch.tensor([scene.classes[0] for scene in scenes])


def same(first: Scene, second: Scene) -> bool:
    return (
        first.classes == second.classes
        and np.array_equal(first.image, second.image)
        and np.array_equal(first.masks, second.masks)
    )


# -- scenes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_objects", [1, 2, None])
def test_same_seed_same_pixels_whatever_was_made_before(num_objects: int | None) -> None:
    first = {seed: make_scene(seed, num_objects=num_objects) for seed in SEEDS}
    make_scene(99, num_objects=2)
    for seed in reversed(SEEDS):
        assert same(first[seed], make_scene(seed, num_objects=num_objects))


def test_different_seeds_differ() -> None:
    pictures = {make_scene(seed).image.tobytes() for seed in range(40)}
    assert len(pictures) == 40


def test_global_random_state_is_left_alone() -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(3)
    torch.manual_seed(3)
    make_scene(1).recoloured(1).without_objects()
    assert (np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize("num_objects", [1, 2])
@pytest.mark.parametrize("size", [48, SIZE, 130])
def test_masks_boxes_and_classes_fit(num_objects: int, size: int) -> None:
    for seed in range(30):
        scene = make_scene(seed, num_objects=num_objects, size=size)
        assert scene.image.shape == (size, size, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.shape == (num_objects, size, size)
        assert scene.masks.dtype == np.bool_
        assert len(scene.classes) == len(set(scene.classes)) == len(scene.names) == num_objects
        assert not (scene.masks.sum(axis=0) > 1).any()
        for mask, (x0, y0, x1, y1) in zip(scene.masks, scene.boxes.tolist(), strict=True):
            assert mask.sum() > 0.015 * size**2
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0].any()
            assert mask[y1 - 1].any()
            assert mask[:, x0].any()
            assert mask[:, x1 - 1].any()


def test_seed_decides_the_number_of_objects() -> None:
    scenes = [make_scene(seed, num_objects=None) for seed in range(40)]
    counts = [len(scene.classes) for scene in scenes]
    assert set(counts) == {1, 2}
    assert same(scenes[0], make_scene(0, num_objects=counts[0]))


def test_splits_do_not_overlap() -> None:
    ranges = sorted(SPLITS.values(), key=lambda seeds: seeds.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ranges))


@pytest.mark.parametrize("num_objects", [1, 2])
def test_recoloured_scene_differs_on_the_objects_only(num_objects: int) -> None:
    scene = make_scene(5, num_objects=num_objects)
    other = scene.recoloured(1)
    assert np.array_equal(scene.masks, other.masks)
    assert not np.array_equal(other.image, scene.recoloured(2).image)
    changed = (scene.image != other.image).any(axis=2)
    shown = scene.masks.any(axis=0)
    assert changed[shown].mean() > 0.9
    # Lens blur carries a colour a few pixels over the edge of the object.
    near = np.zeros_like(shown)
    for down in range(-5, 6):
        for right in range(-5, 6):
            near |= np.roll(shown, (down, right), (0, 1))
    assert not changed[~near].any()


def test_object_shadow_and_outline_are_gone_without_objects() -> None:
    for seed in range(10):
        scene = make_scene(seed)
        empty = scene.without_objects()
        changed = (scene.image != empty).any(axis=2)
        assert changed[scene.masks[0]].mean() > 0.9
        rest = ~scene.masks[0]
        assert changed[rest].mean() < 0.6
        # The empty scene is what another object of the same seed would stand in: it depends on no object colour.
        assert np.array_equal(empty, scene.recoloured(3).without_objects())


def test_occlusion_hides_no_more_than_asked() -> None:
    shares = {}
    for occlusion in (0.0, 0.1, 0.4):
        hidden = []
        for seed in range(40):
            free = make_scene(seed, size=48, occlusion=0.0).masks[0]
            hidden.append(1 - make_scene(seed, size=48, occlusion=occlusion).masks[0].sum() / free.sum())
        assert max(hidden) <= occlusion + 1e-9
        shares[occlusion] = np.mean(hidden)
    assert shares[0.0] == 0
    assert 0 < shares[0.1] < shares[0.4]


def test_classes_are_equally_frequent() -> None:
    counts = np.bincount([make_scene(seed, size=32).classes[0] for seed in range(600)], minlength=12)
    assert counts.min() > 25
    assert counts.max() < 80


@pytest.mark.parametrize("features", [colour_histogram, object_histogram, place_and_area, background])
def test_class_cannot_be_told_from_simple_cues(features: object) -> None:
    found = simple_classifier(features, range(600), range(5000, 5400))
    assert found < 1 / 12 + 0.09


def test_dataset_gives_normalised_images_and_labels() -> None:
    dataset = SceneDataset("validation", 5)
    image, label = dataset[2]
    scene = make_scene(SPLITS["validation"][2])
    assert len(dataset) == 5
    assert image.shape == (3, SIZE, SIZE)
    assert image.dtype == torch.float32
    assert label == scene.classes[0]
    assert torch.equal(image, normalise(scene.image))
    assert image.min() >= -1
    assert image.max() <= 1
    pair = SceneDataset("test", 2, num_objects=2)[1][1]
    assert pair.tolist() == list(make_scene(SPLITS["test"][1], num_objects=2).classes)
    with pytest.raises(IndexError):
        dataset[5]


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": -1},
        {"seed": 1.5},
        {"seed": True},
        {"seed": 0, "num_objects": 3},
        {"seed": 0, "num_objects": 0},
        {"seed": 0, "size": 8},
        {"seed": 0, "size": 96.0},
        {"seed": 0, "occlusion": 0.9},
    ],
)
def test_wrong_scene_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match="expected"):
        make_scene(**arguments)


@pytest.mark.parametrize("arguments", [("training", 5), ("test", 0), ("test", 5, 3)])
def test_wrong_dataset_arguments(arguments: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match="expected"):
        SceneDataset(*arguments)


@pytest.mark.parametrize("variant", [0, -2, 1.0, True])
def test_wrong_variant(variant: object) -> None:
    with pytest.raises(InputError, match="expected"):
        make_scene(0).recoloured(variant)


# -- the shipped model -------------------------------------------------------------------------------------------


def test_shipped_model_is_an_ordinary_vision_transformer(model: nn.Module) -> None:
    from timm.models.vision_transformer import VisionTransformer

    assert isinstance(model, VisionTransformer)
    assert not model.training
    assert model.patch_embed.grid_size == (12, 12)
    assert model(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, len(CLASS_NAMES))
    card = scenes_card()
    assert tuple(card["classes"]) == CLASS_NAMES
    assert card["accuracy"]["test"] >= 0.95
    assert card["training"] == {
        key: value for key, value in ClassifierSettings().__dict__.items() if key != "architecture"
    }


def test_a_token_sees_its_cell_and_a_margin_above_and_to_the_left(model: nn.Module) -> None:
    image = torch.zeros(1, 3, SIZE, SIZE, requires_grad=True)
    model.patch_embed(image).reshape(1, 12, 12, -1)[0, 5, 7].square().sum().backward()
    assert image.grad is not None
    rows, columns = image.grad[0].abs().sum(dim=0).nonzero().unbind(dim=1)
    assert (rows.min(), rows.max()) == (5 * 8 - 7, 5 * 8 + 7)
    assert (columns.min(), columns.max()) == (7 * 8 - 7, 7 * 8 + 7)


def test_shipped_model_names_unseen_objects(model: nn.Module, scenes: list[Scene], labels: torch.Tensor) -> None:
    found = predictions(model, (scene.image for scene in scenes)).argmax(dim=1)
    assert (found == labels).double().mean() >= 0.93


def test_shipped_model_is_lost_without_the_object(model: nn.Module, scenes: list[Scene], labels: torch.Tensor) -> None:
    found = predictions(model, (scene.without_objects() for scene in scenes[:200])).argmax(dim=1)
    assert (found == labels[:200]).double().mean() < 0.2


def test_shipped_model_does_not_mind_colours(model: nn.Module, scenes: list[Scene], labels: torch.Tensor) -> None:
    found = predictions(model, (scene.recoloured(1).image for scene in scenes[:200])).argmax(dim=1)
    assert (found == labels[:200]).double().mean() >= 0.9


def test_shipped_model_sees_both_of_two_objects(model: nn.Module) -> None:
    scenes = [make_scene(seed, num_objects=2) for seed in SPLITS["test"][:200]]
    best = predictions(model, (scene.image for scene in scenes)).topk(2, dim=1).indices.tolist()
    assert np.mean([set(pair) == set(scene.classes) for pair, scene in zip(best, scenes, strict=True)]) > 0.7
    assert np.mean([pair[0] in scene.classes for pair, scene in zip(best, scenes, strict=True)]) > 0.93


# -- training ----------------------------------------------------------------------------------------------------

TINY = ClassifierSettings(
    architecture={
        "img_size": 96,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 12,
        "embed_layer": "convolutional",
    },
    one_object_scenes=24,
    two_object_scenes=8,
    steps=60,
    window_share=0.8,
    fading_share=1.0,
    refining_share=0.2,
    warmup_steps=5,
    batch_size=16,
    validation_scenes=10,
    test_scenes=10,
)


def test_training_learns_and_writes_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    log = logging.getLogger(lightning.pytorch.__name__)
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = train_classifier(path, TINY, progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert log.level == level
    assert [entry["step"] for entry in record["history"]] == [48, 12]
    assert record["history"][-1]["loss"] < 2.3  # the logarithm of 12 classes is 2.48
    assert record == json.loads(path.with_suffix(".json").read_text())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.json", "tiny.safetensors"]
    model = load_checkpoint(path)
    assert not model.training
    assert accuracy(model, SPLITS["test"][:10]) == record["accuracy"]["test"]


def test_training_that_fails_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitexplain.training.classifier.window_tokens", lambda model, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_classifier(tmp_path / "broken.safetensors", TINY, progress=False)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_training_ends_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    handler, steps = signal.getsignal(signal.SIGINT), iter(range(3))

    def interrupting(model: nn.Module, batch: Batch) -> torch.Tensor:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
        return window_tokens(model, batch)

    monkeypatch.setattr("vitexplain.training.classifier.window_tokens", interrupting)
    with pytest.raises(VitExplainError, match=r"stopped after 3 steps of a round; nothing was written: start anew"):
        train_classifier(tmp_path / "broken.safetensors", TINY, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_loss_that_is_no_number_overwrites_nothing(tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    output.write_bytes(b"an earlier model")
    settings = dataclasses.replace(TINY, learning_rate=1e30)
    with pytest.raises(VitExplainError, match=r"no loss and gradient that are numbers .*nan.*Lower learning_rate"):
        train_classifier(output, settings, progress=False)
    assert output.read_bytes() == b"an earlier model"
    assert list(tmp_path.iterdir()) == [output]


def test_whole_scenes_train_the_model_as_it_is_used(model: nn.Module) -> None:
    settings = ClassifierSettings(steps=2, window_share=0.5, refining_share=0.0)
    small, large = SceneBatches(ScenePool.paint(8, 8, 0.2), settings)
    with torch.no_grad():
        assert window_tokens(model, small).shape[1] == 1 + 7 * 7
        torch.testing.assert_close(model.head(window_tokens(model, large)[:, 0]), model(large.images))


def test_batches_are_seeded_and_agree_with_the_masks() -> None:
    settings = ClassifierSettings(steps=4, window_share=0.5, refining_share=0.25)
    pool = ScenePool.paint(8, 8, 0.2)
    first, second = list(SceneBatches(pool, settings)), list(SceneBatches(pool, settings))
    assert len(first) == 3
    assert len(list(SceneBatches(pool, settings, refining=True))) == 1
    for batch, again in zip(first, second, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(batch, again, strict=True))
        torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(settings.batch_size))
        covered = batch.patch_masks.mean(dim=2)
        assert ((batch.patch_labels == NO_OBJECT) <= (covered <= 0.3)).all()
        named = nn.functional.one_hot(batch.patch_labels, NO_OBJECT + 1)[..., :NO_OBJECT].amax(dim=1).bool()
        assert (named <= (batch.targets > 0)).all()
    assert (first[-1].targets == 0.5).any()


def test_fading_goes_from_plain_to_the_picture_itself() -> None:
    scene = make_scene(4)
    images, shown = scene.image[None], scene.masks
    plain = faded(images, shown, 0.0)
    assert len(np.unique(plain[0][shown[0]], axis=0)) == 1
    assert len(np.unique(plain[0][~shown[0]], axis=0)) == 1
    assert np.array_equal(faded(images, shown, 1.0), images)


@pytest.mark.parametrize("change", [{"steps": 0}, {"window": 12}, {"label_smoothing": -0.1}, {"learning_rate": 0.0}])
def test_wrong_settings(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        ClassifierSettings(**change)


@pytest.mark.parametrize("name", ["model.pt", "no_such_folder/model.safetensors"])
def test_wrong_output(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="safetensors"):
        train_classifier(tmp_path / name, TINY, progress=False)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_output_that_is_a_folder_is_told_before_training(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="found the folder"):
        train_classifier(tmp_path / "model.safetensors", TINY, progress=False)


# -- broken checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, model: nn.Module) -> Path:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(scenes_card()))
    return path


def test_intact_checkpoint_loads(checkpoint: Path, model: nn.Module) -> None:
    loaded = load_checkpoint(checkpoint)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_missing_files(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        load_checkpoint(checkpoint.with_name("nothing.safetensors"))
    checkpoint.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(checkpoint)


def test_truncated_weights(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "architecture"),
        ('{"architecture": {"no_such_argument": 1}}', "VisionTransformer"),
        ('{"architecture": {"img_size": 96, "patch_size": 7, "embed_layer": "convolutional"}}', "VisionTransformer"),
        ('{"architecture": {"img_size": 96, "patch_size": 8, "embed_dim": 48, "num_heads": 3}}', "not of this arch"),
    ],
)
def test_wrong_description(checkpoint: Path, text: str, message: str) -> None:
    checkpoint.with_suffix(".json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)
