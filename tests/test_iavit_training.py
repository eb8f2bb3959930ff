"""Training for IA-ViT: what is written and what stays as it was, resuming, losses, batches, and the command."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_images, make_model
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitexplain
from vitexplain import CheckpointError, InputError, OptionError, UnsupportedModelError, VitExplainError, adapt
from vitexplain.data.example import Example
from vitexplain.data.stripes import CLASSES, PATCH, SIZE, stripes_examples
from vitexplain.iavit import load_iavit
from vitexplain.iavit.interpreter import InterpreterShape, fresh_interpreter
from vitexplain.iavit.losses import attention_regulariser, simulation_loss
from vitexplain.iavit.trunk import read_frozen
from vitexplain.preprocessing import Preprocessing
from vitexplain.training.iavit import IAViTSettings, train_iavit, train_interpreter
from vitexplain.training.iavit_batches import cropped, labelled_images, places_in_step
from vitexplain.training.iavit_learners import InterpreterLearner, JointLearner

PREPROCESSING = Preprocessing((SIZE, SIZE), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_fraction=1.0)
TINY = IAViTSettings(steps=6, batch_size=4, learning_rate=1e-2, evaluate_every=2, images=20, validation_share=0.2)


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, **options}
    return VisionTransformer(img_size=SIZE, patch_size=PATCH, num_classes=CLASSES, **shape).eval()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return stripes_examples(range(20))


def batches(count: int = 5) -> list[Tensor]:
    return [torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def state_of(model: nn.Module) -> list[Any]:
    modules, parameters = list(model.modules()), list(model.parameters())
    return [
        [each.training for each in modules],
        [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules],
        [(each.requires_grad, each.grad is None, each.dtype, each.device) for each in parameters],
        [sorted(vars(each)) for each in modules],
        {name: each.tolist() for name, each in model.state_dict().items()},
    ]


# -- the interpreter alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"reg": "none"}, {"head": "position", "reg": "mmd"}, {"optimiser": "sgd"}])
def test_an_interpreter_is_trained_and_the_model_stays_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, output = vit().train(), tmp_path / "interpreter.safetensors"
    model.head.weight.requires_grad_(False)
    before = state_of(model)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = train_interpreter(
            model, batches(), output, replace(TINY, **changes), logs=tmp_path / "logs", card={"note": 1}
        )
    assert torch.equal(torch.rand(1), expected)
    assert state_of(model) == before
    assert record == json.loads(output.with_suffix(".json").read_text())
    assert (record["images"], record["with_model"], record["note"]) == (16, False, 1)
    assert [entry["step"] for entry in record["history"]] == [2, 4, 6]
    assert record["result"] == min(record["history"], key=lambda entry: entry["loss"])
    assert (tmp_path / "logs" / "metrics.csv").read_text().count("\n") == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["interpreter.json", output.name, "logs"]
    assert all(name.startswith("interpreter.") for name in load_file(output))
    scores = vitexplain.get_explainer("iavit", model, checkpoint=str(output))(batches()[0]).scores
    torch.testing.assert_close(scores.sum((1, 2)), torch.ones(4))


def test_fit_trains_and_explains(tmp_path: Path) -> None:
    model = vit()
    explainer = vitexplain.get_explainer("iavit", model)
    output = tmp_path / "interpreter.safetensors"
    explainer.fit([(each, None) for each in batches()], output, validation=batches(1), steps=2, batch_size=4)
    assert explainer.method.options == {"checkpoint": str(output)}
    assert json.loads(output.with_suffix(".json").read_text())["images"] == 20
    assert explainer(batches()[0]).scores.shape == (4, 8, 8)


def test_training_lowers_the_loss_it_reports(tmp_path: Path) -> None:
    model, images = vit(), torch.cat(batches(8))
    settings = replace(TINY, steps=60, batch_size=16, images=32, evaluate_every=20)
    record = train_interpreter(model, [images[:24]], tmp_path / "i.safetensors", settings, validation=[images[24:]])
    reading = read_frozen(adapt(model), images[24:])
    with torch.no_grad():
        first = fresh_interpreter(InterpreterShape(16, CLASSES), 0)(reading.tokens)
        start = simulation_loss(first.logits, reading.logits) + attention_regulariser(
            "kl", reading.received, first.received
        )
        state = load_file(tmp_path / "i.safetensors")
        trained = fresh_interpreter(InterpreterShape(16, CLASSES), 0)
        trained.load_state_dict({name.removeprefix("interpreter."): each for name, each in state.items()})
        found = trained(reading.tokens)
        kl = attention_regulariser("kl", reading.received, found.received)
        end = simulation_loss(found.logits, reading.logits) + kl
    assert end < 0.5 * start
    assert record["result"]["loss"] == pytest.approx(end.item(), rel=1e-4)
    assert record["result"]["regularisation"] == pytest.approx(kl.item(), rel=1e-4, abs=1e-7)
    assert record["result"]["agreement"] == (found.logits.argmax(1) == reading.logits.argmax(1)).float().mean()
    assert "predictor_right" not in record["result"]


@pytest.mark.parametrize(("steps", "share"), [(9, 0.1), (19, 0.05), (4, 0.2), (1, 0.5), (10, 0.1), (7, 0.1), (20, 0.9)])
def test_the_rate_rises_and_falls_for_any_number_of_steps(steps: int, share: float) -> None:
    from vitexplain.training.iavit_module import one_cycle

    def rates(schedule: Any) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        return found

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
    found = rates(one_cycle(optimizer, replace(TINY, steps=steps, warmup_share=share)))
    assert all(0 < rate <= 3.0 for rate in found)
    if share * (steps + 1) == 1:  # no step is left to rise in
        assert found[0] == pytest.approx(3.0)
        assert found == sorted(found, reverse=True)
    else:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
        plain = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 3.0, total_steps=steps + 1, pct_start=share, cycle_momentum=False
        )
        assert found == rates(plain)


def test_as_many_steps_as_leave_none_to_rise_in_are_made(tmp_path: Path) -> None:
    settings = replace(TINY, steps=9, warmup_share=0.1)
    assert train_interpreter(vit(), batches(), tmp_path / "i.safetensors", settings)["history"][-1]["step"] == 9


def test_labels_and_images_kept_are_not_trained_on(tmp_path: Path) -> None:
    seen = [torch.full((1, 3, SIZE, SIZE), float(index)) for index in range(20)]
    from vitexplain.training import iavit

    kept, trained = iavit._split(20, TINY)
    assert sorted(kept + trained) == list(range(20))
    assert len(kept) == 4
    assert train_interpreter(vit(), seen, tmp_path / "i.safetensors", TINY)["images"] == 16


@pytest.mark.parametrize(
    ("images", "message"),
    [([], "no batches"), ([[1, 2]], "expected normalised images"), ([torch.randn(1, 3, SIZE, SIZE)], "at least 2")],
)
def test_images_that_are_none(tmp_path: Path, images: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_interpreter(vit(), images, tmp_path / "i.safetensors", TINY)
    assert not list(tmp_path.iterdir())


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    images = [torch.randn(1, 3, 32, 48), torch.randn(1, 3, 40, 24)]
    with pytest.raises(InputError, match="several sizes"):
        train_interpreter(make_model("dynamic"), images, tmp_path / "i.safetensors", TINY)


# -- both together -----------------------------------------------------------------------------------------------


def test_model_and_interpreter_are_trained_together(tmp_path: Path, examples: list[Example]) -> None:
    model, output = vit(), tmp_path / "iavit.safetensors"
    model.patch_embed.requires_grad_(False)  # the copy that is trained has no frozen parts
    before = state_of(model)
    record = train_iavit(model, examples, PREPROCESSING, output, TINY, card={"classes": list("abcd")})
    assert state_of(model) == before
    written = load_file(output)
    trunk = {name.removeprefix("trunk."): each for name, each in written.items() if name.startswith("trunk.")}
    assert trunk.keys() == model.state_dict().keys()
    assert not any(torch.equal(trunk[name], each) for name, each in model.state_dict().items())
    assert record == json.loads(output.with_suffix(".json").read_text())
    assert (record["images"], record["with_model"]) == (16, True)
    assert {"predictor_right", "interpreter_right", "agreement", "classification"} <= record["result"].keys()
    explainer = load_iavit(output, vit())
    assert explainer.subject.labels == list("abcd")
    assert explainer.subject.preprocessing == PREPROCESSING
    scores = explainer([example.image for example in examples[:2]]).scores
    torch.testing.assert_close(scores.sum((1, 2)), torch.ones(2))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["iavit.json", "iavit.safetensors"]
    with pytest.raises(CheckpointError, match="belongs to another model"):
        vitexplain.get_explainer("iavit", model, checkpoint=str(output))(batches()[0])


def test_the_objective_is_its_parts(examples: list[Example]) -> None:
    batch = labelled_images(examples[:6], PREPROCESSING, CLASSES)
    model, interpreter = vit().train(), fresh_interpreter(InterpreterShape(16, CLASSES), 0)
    settings = replace(TINY, reg_weight=0.5, simulation_weight=2.0, imitation_weight=3.0, label_smoothing=0.1)
    found = JointLearner(adapt(model), interpreter, settings).objective(batch)
    reading = read_frozen(adapt(model), batch.images)
    with torch.no_grad():
        said = interpreter(reading.tokens)
        entropies = [
            nn.functional.cross_entropy(each, batch.classes, label_smoothing=0.1)
            for each in (reading.logits, said.logits)
        ]
        simulation = simulation_loss(said.logits, reading.logits)
        regularisation = attention_regulariser("kl", reading.received, said.received)
    torch.testing.assert_close(found.classification.detach(), entropies[0])
    torch.testing.assert_close(found.simulation.detach(), simulation)
    torch.testing.assert_close(found.regularisation.detach(), regularisation)
    expected = entropies[0] + 2 * simulation + 0.5 * regularisation + 3 * entropies[1]
    torch.testing.assert_close(found.loss.detach(), expected)
    assert found.predictor_right == (reading.logits.argmax(1) == batch.classes).float().mean()
    assert found.interpreter_right == (said.logits.argmax(1) == batch.classes).float().mean()


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"reg": "none", "simulation_weight": 0.0}, {"model"}),
        ({"reg": "none"}, {"model", "interpreter"}),
        ({"reg": "kl", "simulation_weight": 0.0}, {"model", "interpreter"}),
    ],
)
def test_which_loss_moves_what(examples: list[Example], changes: dict[str, Any], moved: set[str]) -> None:
    interpreter = fresh_interpreter(InterpreterShape(16, CLASSES), 0)
    learner = JointLearner(adapt(vit()), interpreter, replace(TINY, **changes))
    batch = labelled_images(examples[:4], PREPROCESSING, CLASSES)
    learner.objective(batch).loss.backward()
    found = {
        name.split(".")[0] for name, each in learner.named_parameters() if each.grad is not None and each.grad.any()
    }
    assert found == moved


def test_a_frozen_reading_gives_the_model_no_gradient() -> None:
    model = vit()
    reading = read_frozen(adapt(model), batches()[0])
    learner = InterpreterLearner(fresh_interpreter(InterpreterShape(16, CLASSES), 0), TINY)
    learner.objective(reading).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in learner.parameters())


def test_the_released_recipe_reproduces_the_published_choices() -> None:
    settings = IAViTSettings.released(steps=5)
    assert (settings.reg, settings.detach_teacher, settings.scale_logits) == ("released", False, False)
    assert (settings.optimiser, settings.learning_rate, settings.temperature) == ("sgd", 0.03, 3.0)
    assert (settings.reg_weight, settings.simulation_weight, settings.steps) == (1.0, 1.0, 5)


@pytest.mark.parametrize(
    "wrong", [{"reg": "mse"}, {"head": "mean"}, {"steps": 0}, {"temperature": 0}, {"optimiser": "lion"}, {"images": 1}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"found {next(iter(wrong))} ="):
        IAViTSettings(**wrong)


def test_a_loss_that_is_no_number_writes_nothing(tmp_path: Path) -> None:
    images = [torch.randn(8, 3, SIZE, SIZE)]
    model = vit()
    with torch.no_grad():
        model.head.bias.fill_(float("inf"))
    with pytest.raises(VitExplainError, match="no loss that is a number"):
        train_interpreter(model, images, tmp_path / "i.safetensors", TINY)
    assert not (tmp_path / "i.safetensors").exists()


@pytest.mark.parametrize("label", [(), (CLASSES,)])
def test_examples_without_a_class_of_the_model(tmp_path: Path, examples: list[Example], label: tuple[int, ...]) -> None:
    wrong = [replace(each, labels=label) for each in examples]
    with pytest.raises(InputError, match="expected a class from 0 to 3 first"):
        train_iavit(vit(), wrong, PREPROCESSING, tmp_path / "i.safetensors", TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"labels": (CLASSES,)}, "expected a class from 0 to 3 first"), ({"image": Path("gone.png")}, "gone.png")],
)
def test_an_example_to_choose_by_that_cannot_be_used_is_told_before_training(
    tmp_path: Path, examples: list[Example], change: dict[str, Any], message: str
) -> None:
    held = [*examples[:5], replace(examples[5], **change)]
    with pytest.raises(InputError, match=message):
        train_iavit(vit(), Breaking(examples, 1), PREPROCESSING, tmp_path / "i.safetensors", TINY, validation=held)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(tmp_path: Path, examples: list[Example], precision: torch.dtype) -> None:
    model, output = vit().to(precision), tmp_path / "i.safetensors"
    with pytest.raises(UnsupportedModelError, match=rf"in {precision}, expected torch\.float32: train model\.float"):
        train_iavit(model, examples, PREPROCESSING, output, TINY)
    assert not list(tmp_path.iterdir())
    assert train_interpreter(model, batches(), output, TINY)["result"]["loss"] < 1
    assert vitexplain.get_explainer("iavit", model, checkpoint=str(output))(batches()[0]).grid == (8, 8)


def test_positions_and_tokens_do_not_decay() -> None:
    from vitexplain.training.iavit_module import parameter_groups

    settings = replace(TINY, weight_decay=0.1, interpreter_rate=0.5)
    learner = JointLearner(adapt(make_model("torchvision")), fresh_interpreter(InterpreterShape(24, 7), 0), settings)
    groups = parameter_groups(learner, settings)
    found = {id(each): (group["lr"], group["weight_decay"]) for group in groups for each in group["params"]}
    named = {name: found[id(parameter)] for name, parameter in learner.named_parameters()}
    assert named["model.class_token"] == named["model.encoder.pos_embedding"] == (1e-2, 0.0)
    assert named["model.conv_proj.weight"] == (1e-2, 0.1)
    assert (named["interpreter.head.weight"], named["interpreter.head.bias"]) == ((0.5, 0.1), (0.5, 0.0))


@pytest.mark.parametrize("name", ["model.pt", "no_such_folder/model.safetensors"])
def test_wrong_output(tmp_path: Path, examples: list[Example], name: str) -> None:
    with pytest.raises(InputError, match="safetensors"):
        train_iavit(vit(), examples, PREPROCESSING, tmp_path / name, TINY)
    with pytest.raises(InputError, match="safetensors"):
        train_interpreter(vit(), batches(), tmp_path / name, TINY)


def test_a_model_whose_attention_cannot_be_trained_with(tmp_path: Path) -> None:
    model, pictures = make_model("several_attentions"), make_images("several_attentions", batch=4)
    prepare = Preprocessing((32, 48), (0.5,) * 3, (0.5,) * 3, crop_fraction=1.0)
    from PIL import Image

    examples = [Example(str(index), Image.new("RGB", (48, 32)), (0,)) for index in range(4)]
    with pytest.raises(UnsupportedModelError, match="Train the interpreter alone"):
        train_iavit(model, examples, prepare, tmp_path / "i.safetensors", TINY)
    assert train_interpreter(model, [pictures], tmp_path / "i.safetensors", TINY)["images"] == 3


def test_a_regulariser_that_would_not_move_the_model_is_refused(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, model = tmp_path / "i.safetensors", vit()
    model.set_grad_checkpointing(True)
    assert train_iavit(model, examples, PREPROCESSING, output, replace(TINY, steps=1))["result"]
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: True)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        train_iavit(model, examples, PREPROCESSING, output, replace(TINY, steps=1))
    assert train_iavit(model, examples, PREPROCESSING, output, replace(TINY, steps=1, reg="none"))["result"]


def test_masks_that_nobody_looks_at_may_be_wrong(examples: list[Example]) -> None:
    wrong = [replace(examples[0], mask=np.ones((3, 3), np.int8), size=(3, 3))]
    expected = labelled_images(examples[:1], PREPROCESSING, CLASSES)
    assert torch.equal(labelled_images(wrong, PREPROCESSING, CLASSES).images, expected.images)


def test_dropped_patches_are_named(tmp_path: Path, examples: list[Example]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"drops patches.*patch_drop_rate"):
        train_iavit(vit(patch_drop_rate=0.5), examples, PREPROCESSING, tmp_path / "i.safetensors", TINY)


def test_a_model_of_one_output_has_nothing_to_imitate(tmp_path: Path, examples: list[Example]) -> None:
    model, output = vit(), tmp_path / "i.safetensors"
    model.reset_classifier(1)
    with pytest.raises(UnsupportedModelError, match="with 1 output, expected two classes"):
        train_interpreter(model, batches(), output, TINY)
    alike = [replace(each, labels=(0,)) for each in examples]
    with pytest.raises(UnsupportedModelError, match="with 1 output, expected two classes"):
        train_iavit(model, alike, PREPROCESSING, output, TINY)


def test_the_random_states_of_gpus_are_left_alone(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("all GPUs were seeded")

    model = vit()
    monkeypatch.setattr("torch.cuda.manual_seed_all", refuse)
    fresh_interpreter(InterpreterShape(4, 2), 0)
    train_iavit(model, examples, PREPROCESSING, tmp_path / "i.safetensors", replace(TINY, steps=1))


def test_a_caller_s_inference_mode_and_precision_are_no_hindrance(tmp_path: Path, examples: list[Example]) -> None:
    output, model, images = tmp_path / "i.safetensors", vit(), batches(2)
    short, before = replace(TINY, steps=1), torch.get_default_dtype()
    with torch.inference_mode():
        train_interpreter(model, images, output, short)
        train_iavit(model, examples, PREPROCESSING, output, short)
    torch.set_default_dtype(torch.float64)
    try:
        train_interpreter(model, images, output, short)
        train_iavit(model, examples, PREPROCESSING, output, short)
    finally:
        torch.set_default_dtype(before)


# -- going on ----------------------------------------------------------------------------------------------------


class Breaking(list[Example]):
    """Examples of which none can be asked for by its place any more after so many."""

    def __init__(self, examples: list[Example], left: int, error: type[BaseException] = RuntimeError) -> None:
        super().__init__(examples)
        self.left, self.error = left, error

    def __getitem__(self, index: Any) -> Any:
        self.left -= not isinstance(index, slice)
        if self.left < 0:
            raise self.error("the disk is gone")
        return super().__getitem__(index)


def test_resumed_training_ends_where_an_unbroken_one_does(tmp_path: Path, examples: list[Example]) -> None:
    model = vit(proj_drop_rate=0.2, drop_path_rate=0.1)
    logs = [tmp_path / "logs of one", tmp_path / "logs of two"]
    held, output = examples[:4], tmp_path / "broken.safetensors"
    unbroken = train_iavit(
        model, examples, PREPROCESSING, tmp_path / "unbroken.safetensors", TINY, validation=held, logs=logs[0]
    )
    with pytest.raises(RuntimeError, match="disk"):  # one to look at the model, four a step: five steps
        train_iavit(model, Breaking(examples, 22), PREPROCESSING, output, TINY, validation=held, logs=logs[1])
    assert [each.name for each in tmp_path.glob("broken*")] == ["broken.safetensors.training"]
    otherwise = PREPROCESSING.replace(mean=(0.4, 0.5, 0.5))
    with pytest.raises(CheckpointError, match="preprocessing differ"):
        train_iavit(model, examples, otherwise, output, TINY, validation=held, resume=True)
    resumed = train_iavit(
        model, Breaking(examples, 9), PREPROCESSING, output, TINY, validation=held, resume=True, logs=logs[1]
    )
    assert resumed["history"] == unbroken["history"]
    expected = load_file(tmp_path / "unbroken.safetensors")
    for name, each in load_file(output).items():
        torch.testing.assert_close(each, expected[name], rtol=0, atol=0)
    assert not list(tmp_path.glob("*.training"))
    assert len({(each / "metrics.csv").read_text() for each in logs}) == 1


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path, examples: list[Example]) -> None:
    output = tmp_path / "iavit.safetensors"
    broken = Breaking(examples, 14, KeyboardInterrupt)
    with pytest.raises(VitExplainError, match=r"stopped after 3 steps.*go on with resume"):
        train_iavit(vit(), broken, PREPROCESSING, output, TINY, validation=examples[:4])
    with pytest.raises(CheckpointError, match="reg differ"):
        train_iavit(
            vit(), examples, PREPROCESSING, output, replace(TINY, reg="mmd"), validation=examples[:4], resume=True
        )
    with pytest.raises(CheckpointError, match="data differ"):
        train_iavit(vit(), examples[:9], PREPROCESSING, output, TINY, validation=examples[:4], resume=True)
    relabelled = [*examples[:-1], replace(examples[-1], labels=())]
    with pytest.raises(CheckpointError, match="data differ"):
        train_iavit(vit(), relabelled, PREPROCESSING, output, TINY, validation=examples[:4], resume=True)
    with pytest.raises(CheckpointError, match="model differ"):
        train_iavit(vit(qkv_bias=False), examples, PREPROCESSING, output, TINY, validation=examples[:4], resume=True)
    record = train_iavit(vit(), examples, PREPROCESSING, output, TINY, validation=examples[:4], resume=True)
    assert record["history"][-1]["step"] == TINY.steps


@pytest.mark.parametrize("left", [6, 14])
def test_an_evaluation_that_fails_costs_no_steps(tmp_path: Path, examples: list[Example], left: int) -> None:
    held, output = examples[:4], tmp_path / "broken.safetensors"
    unbroken = train_iavit(vit(), examples, PREPROCESSING, tmp_path / "unbroken.safetensors", TINY, validation=held)
    with pytest.raises(RuntimeError, match="disk"):  # four to look at before, four an evaluation after 2, 4 and 6 steps
        train_iavit(vit(), examples, PREPROCESSING, output, TINY, validation=Breaking(held, left))
    assert [each.name for each in tmp_path.glob("broken*")] == ["broken.safetensors.training"]
    steps_left = 4 if left == 6 else 0
    seen = Breaking(examples, 1 + 4 * steps_left)  # one to look at the model
    resumed = train_iavit(vit(), seen, PREPROCESSING, output, TINY, validation=held, resume=True)
    assert (resumed["history"], resumed["result"]) == (unbroken["history"], unbroken["result"])
    expected = load_file(tmp_path / "unbroken.safetensors")
    for name, each in load_file(output).items():
        torch.testing.assert_close(each, expected[name], rtol=0, atol=0)
    assert not list(tmp_path.glob("*.training"))


def test_an_interrupted_last_evaluation_is_no_end(tmp_path: Path, examples: list[Example]) -> None:
    output, held = tmp_path / "iavit.safetensors", Breaking(examples[:4], 14, KeyboardInterrupt)
    with pytest.raises(VitExplainError, match=r"stopped after 6 steps.*go on with resume"):
        train_iavit(vit(), examples, PREPROCESSING, output, TINY, validation=held)
    assert not output.exists()
    resumed = train_iavit(vit(), examples, PREPROCESSING, output, TINY, validation=examples[:4], resume=True)
    assert [entry["step"] for entry in resumed["history"]] == [2, 4, 6]


def test_a_resumed_interpreter_ends_where_an_unbroken_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitexplain.training.iavit_batches import ReadingBatches

    unbroken = train_interpreter(vit(), batches(), tmp_path / "unbroken.safetensors", TINY)
    output, ask = tmp_path / "broken.safetensors", ReadingBatches.__getitem__

    def failing(self: ReadingBatches, step: int) -> Any:
        if step == 5:
            raise RuntimeError("the power is gone")
        return ask(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(ReadingBatches, "__getitem__", failing)
        with pytest.raises(RuntimeError, match="power"):
            train_interpreter(vit(), batches(), output, TINY)
    with pytest.raises(CheckpointError, match="data differ"):
        train_interpreter(vit(), batches(4), output, TINY, resume=True)
    with pytest.raises(CheckpointError, match="data differ"):
        train_interpreter(vit(), batches(), output, TINY, validation=batches(1), resume=True)
    assert train_interpreter(vit(), batches(), output, TINY, resume=True)["history"] == unbroken["history"]
    expected = load_file(tmp_path / "unbroken.safetensors")
    for name, each in load_file(output).items():
        torch.testing.assert_close(each, expected[name], rtol=0, atol=0)


# -- batches -----------------------------------------------------------------------------------------------------


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    settings = replace(TINY, batch_size=5)
    seen = [place for step in range(6) for place in places_in_step(step, 10, settings)]
    epochs = [seen[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(each) == list(range(10)) for each in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert seen != [place for step in range(6) for place in places_in_step(step, 10, replace(settings, seed=1))]


def test_crops_show_what_they_should() -> None:
    down, across = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images = torch.stack([down, across, torch.ones(32, 32)])[None].repeat(200, 1, 1, 1)
    found = cropped(images, replace(TINY, smallest_crop=0.25, flip=True), np.random.default_rng(0))
    torch.testing.assert_close(found[:, 2], torch.ones(200, 32, 32))
    height, width = (found[:, axis].diff(dim=1 + axis)[:, 1:-1, 1:-1].mean((1, 2)) for axis in (0, 1))
    torch.testing.assert_close(height, width.abs(), rtol=1e-3, atol=1e-3)  # proportions stay
    areas = height.square()
    assert 0.24 < areas.min() < 0.3
    assert 0.95 < areas.max() <= 1.01
    assert 0.35 < (width < 0).float().mean() < 0.65
    assert found.min() >= 0
    assert found.max() <= 31


def test_whole_images_keep_their_pixels() -> None:
    images = torch.randn(50, 3, 8, 8)
    found = cropped(images, replace(TINY, smallest_crop=1.0, flip=True), np.random.default_rng(0))
    mirrored = (found == images.flip(-1)).all(-1).all(-1).all(-1)
    assert (mirrored | (found == images).all(-1).all(-1).all(-1)).all()
    assert 10 < mirrored.sum() < 40
    assert torch.equal(cropped(images, replace(TINY, smallest_crop=1.0, flip=False), np.random.default_rng(0)), images)


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def invoke() -> Callable[..., Any]:
    import typer
    from typer.testing import CliRunner

    from vitexplain.training.iavit_command import train_iavit_command

    app = typer.Typer()
    app.command()(train_iavit_command)
    return lambda *arguments: CliRunner().invoke(app, [str(each) for each in arguments])


def test_the_command_trains_an_interpreter_for_the_embedded_model(tmp_path: Path, invoke: Any) -> None:
    output = tmp_path / "interpreter.safetensors"
    result = invoke(
        *("--output", output, "--logs", tmp_path / "logs"),
        *("--set", "images=8", "--set", "steps=2", "--set", "batch_size=4"),
    )
    assert result.exit_code == 0, result.output
    assert "agreement" in result.output
    assert "accuracy" not in result.output
    training = json.loads(output.with_suffix(".json").read_text())["training"]
    assert (training["images"], training["learning_rate"], training["reg"]) == (8, 2e-3, "kl")
    model = vitexplain.load_model()
    assert vitexplain.get_explainer("iavit", model, checkpoint=str(output))(torch.zeros(1, 3, 96, 96)).grid == (12, 12)
    for wrong, message in ((["--set", "reg=mse"], "reg ="), (["--architecture", "depth=2"], "add --joint")):
        failed = invoke("--output", output, *wrong)
        assert message in str(failed.exception)


def test_the_command_trains_a_new_model_on_a_folder_of_classes(tmp_path: Path, invoke: Any) -> None:
    for index, example in enumerate(stripes_examples(range(12))):
        folder = tmp_path / "train" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        assert not isinstance(example.image, Path)
        example.image.save(folder / f"{index}.png")
    output, shape = tmp_path / "iavit.safetensors", ("img_size=32", "patch_size=8", "embed_dim=12", "num_classes=2")
    arguments = [
        *("--joint", "--data", f"imagefolder:{tmp_path / 'train'}", "--data-option", "classes=own"),
        *(part for each in (*shape, "depth=1") for part in ("--architecture", each)),
        *("--set", "steps=2", "--set", "batch_size=4", "--output", output),
    ]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "interpreter's accuracy" in result.output
    explainer = load_iavit(output)
    assert explainer([example.image for example in stripes_examples(range(2))]).grid == (4, 4)
    released = invoke(*arguments, "--released")
    assert released.exit_code == 0, released.output
    card = json.loads(output.with_suffix(".json").read_text())
    assert (card["training"]["reg"], card["interpreter"]["patches"], card["training"]["steps"]) == ("released", 16, 2)


def test_the_command_reads_folders_and_data_sets_without_labels(tmp_path: Path, invoke: Any) -> None:
    for index, example in enumerate(stripes_examples(range(4))):
        (tmp_path / "key").mkdir(exist_ok=True)
        assert not isinstance(example.image, Path)
        example.image.save(tmp_path / "key" / f"{index}.png")
    for data in (tmp_path, f"imagefolder:{tmp_path}"):
        output = tmp_path / "interpreter.safetensors"
        result = invoke("--output", output, "--data", data, "--set", "steps=1", "--set", "batch_size=2")
        assert result.exit_code == 0, result.output
        assert json.loads(output.with_suffix(".json").read_text())["images"] == 4 - 1


def test_a_new_model_is_what_the_seed_says_so_that_its_training_goes_on(tmp_path: Path, invoke: Any) -> None:
    for index, example in enumerate(stripes_examples(range(6))):
        folder = tmp_path / "train" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        assert not isinstance(example.image, Path)
        example.image.save(folder / f"{index}.png")
    shape = ("img_size=32", "patch_size=8", "embed_dim=12", "num_classes=2", "depth=1")
    arguments = [
        *("--joint", "--data", f"imagefolder:{tmp_path / 'train'}", "--data-option", "classes=own"),
        *(part for each in shape for part in ("--architecture", each)),
        *("--set", "steps=1", "--set", "batch_size=2", "--output"),
    ]
    initial = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        output, before = tmp_path / f"{name}.safetensors", torch.random.get_rng_state()
        result = invoke(*arguments, output, "--set", f"seed={seed}")
        assert result.exit_code == 0, result.output
        assert torch.equal(torch.random.get_rng_state(), before)
        initial.append(json.loads(output.with_suffix(".json").read_text())["initial"])
    assert initial[0] == initial[1] != initial[2]


def test_the_sibling_of_the_embedded_model_comes_back(tmp_path: Path, invoke: Any) -> None:
    output = tmp_path / "iavit.safetensors"
    result = invoke(
        *("--joint", "--model", "scenes-pm", "--data-option", "count=4", "--output", output),
        *("--set", "steps=1", "--set", "batch_size=2"),
    )
    assert result.exit_code == 0, result.output
    assert load_iavit(output)(torch.zeros(1, 3, 96, 96)).grid == (12, 12)
