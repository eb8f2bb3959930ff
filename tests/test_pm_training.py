"""Training of patch masks: what is written and what stays as it was, resuming, freezing, and the command."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import signal
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import torch
from families import make_model
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import (
    Capture,
    CheckpointError,
    InputError,
    Needs,
    UnsupportedModelError,
    VitExplainError,
    adapt,
    get_explainer,
    load_model,
)
from vitexplain.data import open_dataset
from vitexplain.data.example import Example
from vitexplain.data.stripes import CLASSES, PATCH, SIZE, stripes_examples
from vitexplain.models.embedded import load_checkpoint
from vitexplain.models.token_head import TokenHead, token_head
from vitexplain.preprocessing import Preprocessing
from vitexplain.training.data_digest import examples_digest
from vitexplain.training.patch_mask_batches import PatchMaskBatches
from vitexplain.training.patch_mask_evaluation import evaluate_patch_masks
from vitexplain.training.patch_masks import PatchMaskSettings, train_patch_masks

PREPROCESSING = Preprocessing((SIZE, SIZE), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_fraction=1.0)
TINY = PatchMaskSettings(
    steps=6, batch_size=4, annotated_batch_size=3, learning_rate=1e-3, head_rate=2e-3, log_every=2, save_every=2
)


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, **options}
    return VisionTransformer(img_size=SIZE, patch_size=PATCH, num_classes=CLASSES, **shape).eval()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return stripes_examples(range(30))


def changed(settings: PatchMaskSettings) -> dict[str, Any]:
    """The fields in which settings differ from those of `train`."""
    return {name: value for name, value in vars(settings).items() if value != getattr(TINY, name)}


def train(model: nn.Module, examples: Sequence[Example], output: Path, **changes: Any) -> dict[str, Any]:
    more = {name: changes.pop(name) for name in ("resume", "logs", "card", "validation") if name in changes}
    settings = replace(TINY, **changes)
    return train_patch_masks(model, examples, examples[:5], PREPROCESSING, output, settings, **more)


def test_training_writes_an_ordinary_checkpoint_and_leaves_the_model_alone(
    tmp_path: Path, examples: list[Example]
) -> None:
    model, output = vit().train(), tmp_path / "pm.safetensors"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    log = logging.getLogger(lightning.pytorch.__name__)
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = train(model, examples, output, logs=tmp_path / "logs", card={"note": 1}, validation=examples[:6])
    assert torch.equal(torch.rand(1), expected)
    assert log.level == level
    assert model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    written = load_file(output)
    assert written.keys() == before.keys()
    assert {name: (each.shape, each.dtype) for name, each in written.items()} == {
        name: (each.shape, each.dtype) for name, each in before.items()
    }
    assert not torch.equal(written["head.weight"], before["head.weight"])
    assert not torch.equal(written["patch_embed.proj.weight"], before["patch_embed.proj.weight"])
    assert record == json.loads(output.with_suffix(".json").read_text())
    assert (record["method"], record["score"], record["note"]) == ("pm", "probability", 1)
    assert (record["labelled"], record["annotated"]) == (30, 5)
    assert [entry["step"] for entry in record["history"]] == [2, 4, 6]
    assert (tmp_path / "logs" / "metrics.csv").read_text().count("\n") == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["logs", "pm.json", "pm.safetensors"]
    model.load_state_dict(written)
    assert evaluate_patch_masks(model, examples[:6], PREPROCESSING).__dict__ == pytest.approx(record["after"])


class Breaking(list[Example]):
    """Examples of which none can be asked for by its place any more after so many."""

    def __init__(self, examples: list[Example], left: int) -> None:
        super().__init__(examples)
        self.left = left

    def __getitem__(self, index: Any) -> Any:
        self.left -= not isinstance(index, slice)
        if self.left < 0:
            raise RuntimeError("the disk is gone")
        return super().__getitem__(index)


@pytest.mark.parametrize("loss", ["balanced", "joint"])
def test_resumed_training_ends_where_an_unbroken_one_does(tmp_path: Path, examples: list[Example], loss: Any) -> None:
    model = vit(proj_drop_rate=0.2, drop_path_rate=0.1)
    logs = [tmp_path / "logs of one", tmp_path / "logs of two"]
    unbroken = train(model, examples, tmp_path / "unbroken.safetensors", loss=loss, logs=logs[0])
    output = tmp_path / "broken.safetensors"
    with pytest.raises(RuntimeError, match="disk"):
        train(
            model, Breaking(examples, 20), output, loss=loss, logs=logs[1]
        )  # 4 a step, so 5 steps; saved after 2 and 4
    assert sorted(each.name for each in tmp_path.glob("broken*")) == ["broken.safetensors.training"]
    resumed = train(model, Breaking(examples, 8), output, loss=loss, resume=True, logs=logs[1])
    assert resumed["history"] == unbroken["history"]
    expected = load_file(tmp_path / "unbroken.safetensors")
    for name, tensor in load_file(output).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert not list(tmp_path.glob("*.training"))
    assert len({(each / "metrics.csv").read_text() for each in logs}) == 1


def test_losses_between_two_entries_of_the_log_are_kept(tmp_path: Path, examples: list[Example]) -> None:
    course = {"log_every": 3, "save_every": 2}
    unbroken = train(vit(), examples, tmp_path / "unbroken.safetensors", **course)
    output = tmp_path / "broken.safetensors"
    with pytest.raises(RuntimeError, match="disk"):
        train(vit(), Breaking(examples, 12), output, **course)  # 4 a step, so 3 steps; saved after 2
    state = output.with_name("broken.safetensors.training")
    before = state.read_bytes()
    assert train(vit(), Breaking(examples, 16), output, **course, resume=True)["history"] == unbroken["history"]
    state.write_bytes(before)
    content = torch.load(state, weights_only=True)
    del content["state"]["recent"]  # as an earlier version wrote it
    torch.save(content, state)
    resumed = train(vit(), Breaking(examples, 16), output, **course, resume=True)
    assert [entry["step"] for entry in resumed["history"]] == [3, 6]
    assert resumed["history"][1] == unbroken["history"][1]


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path, examples: list[Example]) -> None:
    class Interrupting(Breaking):
        def __getitem__(self, index: Any) -> Any:
            try:
                return super().__getitem__(index)
            except RuntimeError:
                raise KeyboardInterrupt from None

    handler, output = signal.getsignal(signal.SIGINT), tmp_path / "pm.safetensors"
    with pytest.raises(VitExplainError, match=r"stopped after \d steps.*go on with resume"):
        train(vit(), Interrupting(examples, 20), output)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [each.name for each in tmp_path.iterdir()] == ["pm.safetensors.training"]
    assert train(vit(), examples, output, resume=True)["history"][-1]["step"] == TINY.steps


def test_a_closing_measurement_that_fails_costs_no_steps(tmp_path: Path, examples: list[Example]) -> None:
    held, output = examples[:6], tmp_path / "broken.safetensors"
    unbroken = train(vit(), examples, tmp_path / "unbroken.safetensors", validation=held)
    with pytest.raises(RuntimeError, match="disk"):  # six before training, six after it
        train(vit(), examples, output, validation=Breaking(held, 8))
    assert [each.name for each in tmp_path.glob("broken*")] == ["broken.safetensors.training"]
    resumed = train(vit(), Breaking(examples, 0), output, validation=held, resume=True)
    for entry in ("history", "before", "after"):
        assert resumed[entry] == unbroken[entry]
    expected = load_file(tmp_path / "unbroken.safetensors")
    for name, tensor in load_file(output).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert not list(tmp_path.glob("*.training"))


def test_a_loss_that_is_no_number_overwrites_nothing(tmp_path: Path, examples: list[Example]) -> None:
    output, state = tmp_path / "pm.safetensors", tmp_path / "pm.safetensors.training"
    train(vit(), examples, output)
    good = output.read_bytes()
    with pytest.raises(VitExplainError, match=r"no loss that is a number at step 2, but nan.*Lower learning_rate"):
        train(vit(), examples, output, learning_rate=1e30, save_every=1)
    kept = torch.load(state, weights_only=True)["state"]
    assert kept["step"] == 1
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())
    assert output.read_bytes() == good


def test_a_gradient_that_is_no_number_does_not_reach_the_weights(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    with pytest.raises(VitExplainError, match="no gradient that is a number at step 1, but inf"):
        train(vit(), examples, tmp_path / "pm.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_refused(tmp_path: Path, examples: list[Example], precision: torch.dtype) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"in {precision}, expected torch\.float32: train model\.float"):
        train(vit().to(precision), examples, tmp_path / "pm.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_training_is_not_resumed(tmp_path: Path, examples: list[Example]) -> None:
    output = tmp_path / "pm.safetensors"
    with pytest.raises(RuntimeError):
        train(vit(), Breaking(examples, 20), output)
    with pytest.raises(CheckpointError, match="loss"):
        train(vit(), examples, output, loss="plain", resume=True)
    with pytest.raises(CheckpointError, match="data"):
        train(vit(), examples[:20], output, resume=True)
    with pytest.raises(CheckpointError, match="model"):
        train(vit(qkv_bias=False), examples, output, resume=True)
    otherwise = PREPROCESSING.replace(mean=(0.4, 0.5, 0.5))
    with pytest.raises(CheckpointError, match="preprocessing differ"):
        train_patch_masks(vit(), examples, examples[:5], otherwise, output, TINY, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"labels": (3, 1)},
        {"mask": np.zeros((SIZE, SIZE), np.int8)},
        {"boxes": np.array([[1.0, 2.0, 3.0, 4.0]])},
    ],
)
def test_a_training_on_other_examples_as_many_is_not_resumed(
    tmp_path: Path, examples: list[Example], change: dict[str, Any]
) -> None:
    output = tmp_path / "pm.safetensors"
    with pytest.raises(RuntimeError):
        train(vit(), Breaking(examples, 20), output)
    for kind in (list, tuple):
        other = kind([replace(examples[0], **change), *examples[1:]])
        with pytest.raises(CheckpointError, match="data differ"):
            train_patch_masks(vit(), other, other[:5], PREPROCESSING, output, TINY, resume=True)


def test_the_digest_of_data_opens_no_file() -> None:
    class Counted(Sequence[Example]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("opened")

    scenes = open_dataset("scenes", count=3)
    found = [examples_digest(each) for each in (Counted(), scenes, scenes.select([1, 0, 2]), list(scenes))]
    assert len(set(found)) == 4
    assert examples_digest(scenes) == hashlib.sha256("\n".join(("3", *scenes.names)).encode()).hexdigest()
    assert examples_digest(list(scenes)) == examples_digest(tuple(scenes))
    assert examples_digest(list(scenes), []) != examples_digest([], list(scenes))


def test_what_lies_below_the_trained_blocks_stays_frozen(tmp_path: Path, examples: list[Example]) -> None:
    model, output = vit(), tmp_path / "pm.safetensors"
    train(model, examples, output, trained_blocks=1, head_rate=1e-2)
    changed = {name for name, tensor in load_file(output).items() if not torch.equal(tensor, model.state_dict()[name])}
    trained = {name for name in model.state_dict() if name.startswith(("blocks.1.", "norm.", "head."))}
    assert changed == trained


def test_rates_fall_with_depth_and_every_weight_has_one() -> None:
    from vitexplain.training.patch_mask_module import parameter_groups

    model = vit()
    with Capture(model, Needs(states=frozenset({"out"}), from_block=-1)) as capture:
        capture.forward(torch.randn(1, 3, SIZE, SIZE))
        head = token_head(capture)
    settings = PatchMaskSettings(learning_rate=1.0, head_rate=3.0, layer_decay=0.5, weight_decay=0.1)
    groups = parameter_groups(adapt(model), head, settings)
    found = {id(each): (group["rate"], group["weight_decay"]) for group in groups for each in group["params"]}
    named = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(named)
    assert named["head.weight"] == (3.0, 0.1)
    assert named["head.bias"] == (3.0, 0.0)
    assert named["norm.weight"] == (1.0, 0.0)
    assert named["blocks.1.attn.qkv.weight"] == (1.0, 0.1)
    assert named["blocks.0.attn.qkv.weight"] == (0.5, 0.1)
    assert named["patch_embed.proj.weight"] == (0.25, 0.1)
    assert named["pos_embed"] == named["cls_token"] == (0.25, 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision", {"class_token", "encoder.pos_embedding"}),
        ("hf_vit_eager", {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}),
        ("hf_clip", {"vision_model.embeddings.position_embedding.weight"}),
    ],
)
def test_positions_and_tokens_do_not_decay(name: str, expected: set[str]) -> None:
    from vitexplain.training.trained_model import undecayed

    model = make_model(name)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert undecayed(model) & matrices == expected
    assert undecayed(nn.ModuleDict({"model": vit()})) & {"model.pos_embed", "model.head.weight"} == {"model.pos_embed"}


def test_dropout_works_in_training(tmp_path: Path, examples: list[Example]) -> None:
    plain, dropping = (
        train(vit(proj_drop_rate=rate), examples, tmp_path / "pm.safetensors")["history"] for rate in (0.0, 0.5)
    )
    assert plain[0]["classification_loss"] != dropping[0]["classification_loss"]


def test_frozen_parts_rest_while_the_others_train(tmp_path: Path) -> None:
    from vitexplain.training.patch_mask_module import PatchMaskModule, parameter_groups

    model = vit(proj_drop_rate=0.5)
    model.norm_pre = nn.BatchNorm1d(16)
    settings = PatchMaskSettings(trained_blocks=1)
    head = TokenHead(model.norm, None, (), 1)
    parameter_groups(adapt(model), head, settings)
    PatchMaskModule(adapt(model), head, settings, tmp_path / "state", {}).on_fit_start()
    resting = [model.patch_embed, model.blocks[0], model.norm_pre]
    assert not any(module.training for part in resting for module in part.modules())
    assert all(module.training for module in model.blocks[1].modules())
    assert model.norm.training


def test_distillation_asks_for_the_answers_from_before(tmp_path: Path, examples: list[Example]) -> None:
    model = vit(proj_drop_rate=0.5)  # the answers come from a model that is evaluated, not trained
    settings = replace(TINY, distillation=True, log_every=1, smallest_crop=0.5)
    batch = PatchMaskBatches(examples, examples[:5], PREPROCESSING, settings, CLASSES)[0]
    with torch.no_grad():
        probabilities = model(batch.images).softmax(1)
        torch.manual_seed(settings.seed)
        answers = copy.deepcopy(model).train()(batch.images).log_softmax(1)
    record = train(model, examples, tmp_path / "pm.safetensors", **changed(settings))
    expected = -(probabilities * answers).sum(1).mean()
    assert record["history"][0]["classification_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_distillation_looks_at_no_label_of_pictures_without_masks(tmp_path: Path, examples: list[Example]) -> None:
    bare = [replace(example, labels=()) for example in examples]
    weights = []
    for name, labelled in (("labels", examples), ("none", bare)):
        output = tmp_path / f"{name}.safetensors"
        settings = replace(TINY, distillation=True)
        train_patch_masks(vit(), labelled, examples[:5], PREPROCESSING, output, settings)
        weights.append(load_file(output))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(InputError, match="labels"):
        train_patch_masks(vit(), bare, examples[:5], PREPROCESSING, tmp_path / "pm.safetensors", TINY)
    with pytest.raises(InputError, match="labels"):
        train_patch_masks(vit(), bare, bare[:5], PREPROCESSING, tmp_path / "pm.safetensors", settings)


def test_distillation_keeps_answers_that_labels_would_change(tmp_path: Path, examples: list[Example]) -> None:
    inputs, moved = PREPROCESSING([example.image for example in examples]), {}

    def probabilities(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return model(inputs).softmax(1)

    for distillation in (False, True):
        output, model = tmp_path / f"{distillation}.safetensors", vit()
        before = probabilities(model)
        train(model, examples, output, steps=30, mask_weight=0.0, distillation=distillation)
        model.load_state_dict(load_file(output))
        moved[distillation] = float((probabilities(model) - before).abs().max())
    assert moved[True] < moved[False] / 5


def test_a_checkpoint_of_a_new_model_is_loaded_as_it_was_trained(tmp_path: Path, examples: list[Example]) -> None:
    output = tmp_path / "pm.safetensors"
    shape = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    card = {"architecture": {**shape, "num_classes": CLASSES}, "classes": list("abcd")}
    train(vit(), examples, output, card=card)
    loaded = load_model("scenes", checkpoint=output)
    assert (loaded.preprocessing, loaded.labels) == (PREPROCESSING, list("abcd"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "no mask of what the model sees of '1'; expected one of each"),
        ({"mask": np.full((SIZE, SIZE), -1, np.int8)}, "no mask of what the model sees of '1'"),
        ({"labels": ()}, "no label of '1'"),
    ],
)
def test_an_example_that_cannot_be_measured_is_named(
    examples: list[Example], change: dict[str, Any], message: str
) -> None:
    named = [replace(example, name=str(index)) for index, example in enumerate(examples[:4])]
    mixed = [named[0], replace(named[1], **change), *named[2:]]
    with pytest.raises(InputError, match=message):
        evaluate_patch_masks(vit(), mixed, PREPROCESSING)
    with pytest.raises(InputError, match=message):
        evaluate_patch_masks(vit(), mixed[1:2], PREPROCESSING)


@pytest.mark.parametrize("name", ["model.pt", "no_such_folder/model.safetensors"])
def test_wrong_output(tmp_path: Path, examples: list[Example], name: str) -> None:
    with pytest.raises(InputError, match="safetensors"):
        train(vit(), examples, tmp_path / name)


def test_a_model_without_such_a_head_is_refused(tmp_path: Path, examples: list[Example]) -> None:
    model = vit()
    model.head = nn.Sequential(nn.Linear(model.embed_dim, 8), nn.GELU(), nn.Linear(8, model.num_classes))
    with pytest.raises(UnsupportedModelError, match="generic_attention"):
        train(model, examples, tmp_path / "pm.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_attention_pool_learns_with_its_model(tmp_path: Path, examples: list[Example]) -> None:
    model = vit(global_pool="map", class_token=False)
    before = {name: each.clone() for name, each in model.attn_pool.named_parameters()}
    train(model, examples, tmp_path / "pm.safetensors", steps=2)
    trained = load_file(tmp_path / "pm.safetensors")
    assert any(not torch.equal(trained[f"attn_pool.{name}"], each) for name, each in before.items())


def test_the_random_states_of_gpus_are_left_alone(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("all GPUs were seeded")

    model = vit()
    monkeypatch.setattr("torch.cuda.manual_seed_all", refuse)
    train(model, examples, tmp_path / "pm.safetensors", steps=1)


def test_a_caller_s_inference_mode_is_no_hindrance(tmp_path: Path, examples: list[Example]) -> None:
    with torch.inference_mode():
        train(vit(), examples, tmp_path / "pm.safetensors", steps=1)


def test_dropped_patches_are_named(tmp_path: Path, examples: list[Example]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"drops patches.*patch_drop_rate"):
        train(vit(patch_drop_rate=0.5), examples, tmp_path / "pm.safetensors")


def test_the_command_trains_the_embedded_model(tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    from vitexplain.training.patch_masks_command import train_pm_command

    app, output = typer.Typer(), tmp_path / "pm.safetensors"
    app.command()(train_pm_command)
    arguments = [
        *("--output", str(output), "--share", "0.5", "--validation", "2", "--data-option", "count=10"),
        *("--set", "steps=2", "--set", "batch_size=2", "--set", "annotated_batch_size=2", "--set", "flip=false"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "after  accuracy" in result.output
    record = json.loads(output.with_suffix(".json").read_text())
    assert (record["labelled"], record["annotated"]) == (5, 3)
    assert record["training"]["flip"] is False
    assert record["training"]["layer_decay"] == 0.8
    model = load_model("scenes", checkpoint=output)
    assert load_checkpoint(output).state_dict().keys() == model.model.state_dict().keys()
    assert get_explainer("pm", model)(torch.zeros(1, 3, 96, 96), 1).scores.shape == (1, 12, 12)
    for wrong, message in (
        (["--set", "stepz=2"], "stepz"),
        (["--set", "steps"], "NAME=VALUE"),
        (["--set", "steps=many"], "value like"),
        (["--share", "0"], "--share"),
    ):
        failed = CliRunner().invoke(app, [*arguments, *wrong])
        assert isinstance(failed.exception, Exception)
        assert message in str(failed.exception)


def test_the_command_keeps_random_images_of_all_classes_to_measure_on(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer
    from typer.testing import CliRunner

    from vitexplain.training.patch_masks_command import train_pm_command

    for index, example in enumerate(examples):  # a folder a class, one after the other, as readers list them
        for folder, picture in (("images", example.image), ("masks", Image.fromarray(example.mask.astype(np.uint8)))):
            place = tmp_path / folder / str(example.labels[0])
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{index}.png")
    seen: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def note(_: Any, __: Any, masked: Any, *___: Any, validation: Any, **____: Any) -> dict[str, Any]:
        seen.append((validation.names, masked.names))
        return {"history": [{"classification_loss": 0, "mask_loss": 0}], "after": None, "score": "probability"}

    monkeypatch.setattr("vitexplain.training.patch_masks.train_patch_masks", note)
    app = typer.Typer()
    app.command()(train_pm_command)
    arguments = ["--output", str(tmp_path / "pm.safetensors"), "--data-option", "count=4", "--validation", "10"]
    for seed in (0, 0, 1):
        named = ["--annotated", f"folder:{tmp_path}", "--set", f"seed={seed}"]
        result = CliRunner().invoke(app, [*arguments, *named])
        assert result.exit_code == 0, result.output
    assert seen[0] == seen[1] != seen[2]
    kept, masked = seen[0]
    assert len(kept) == 10
    assert len({*kept, *masked}) == len(kept) + len(masked) == len(examples)
    assert {Path(name).parent.name for name in kept} == set("0123")
