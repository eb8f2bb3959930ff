"""Training of the gates: duality, borrowing, interruption, collapse, and tasks with a known answer."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_images, make_model
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from vitexplain import (
    CheckpointError,
    Explainer,
    ExplanationWarning,
    InputError,
    OptionError,
    UnsupportedModelError,
    adapt,
)
from vitexplain.benchmarks.pair_task import GlyphBatches, Scale, learn_masks, learn_task, measure
from vitexplain.cli import app
from vitexplain.data.counting_grids import COLOURS, make_counting_grids
from vitexplain.data.glyph_grids import PATCH, SHAPES, make_glyph_grids
from vitexplain.diffmask.evaluation import Evaluation
from vitexplain.diffmask.gates import log_kept
from vitexplain.diffmask.masking import MaskedModel
from vitexplain.methods.diffmask import DiffMask
from vitexplain.methods.diffmask_class import ClassDiffMask
from vitexplain.preprocessing import Preprocessing
from vitexplain.training.diffmask import DiffMaskSettings, train_diffmask
from vitexplain.training.diffmask_learner import DiffMaskLearner
from vitexplain.training.lookahead import Lookahead
from vitexplain.training.picture_batches import PictureBatches

ROOT = Path(__file__).parents[1]
TINY = DiffMaskSettings(steps=6, evaluate_every=2, warmup_steps=2, validation_batches=2, margin=1.0, agreement=0.0)


@pytest.fixture
def model() -> nn.Module:
    return make_model("cls")


@pytest.fixture
def batches() -> list[Tensor]:
    return [make_images("cls", batch=4, seed=seed) for seed in range(3)]


def learner(model: nn.Module, images: Tensor, **settings: Any) -> DiffMaskLearner:
    return DiffMaskLearner(MaskedModel(adapt(model)), images, dataclasses.replace(TINY, **settings))


def evaluation(**figures: float) -> Evaluation:
    names = {each.name: 0.0 for each in dataclasses.fields(Evaluation)}
    return Evaluation(**{**names, "agreement": 1.0, "images": 4, **figures})  # type: ignore[arg-type]


# -- the objective -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_multiplier_rises_where_the_constraint_is_violated_and_falls_where_it_holds(
    model: nn.Module, batches: list[Tensor], shared: bool
) -> None:
    for violation, direction in ((1.0, 1), (-0.1, -1)):
        learning = learner(model, batches[0], shared_multiplier=shared)
        optimizer, before = learning.multiplier_optimizer(), learning.multiplier(2).item()
        course = [before]
        for _ in range(20):
            learning.ascend(optimizer, 2, torch.tensor(violation))
            course.append(learning.multiplier(2).item())
        steps = torch.tensor(course).diff() * direction
        assert (steps > 0).all()
        assert (learning.multiplier(0).item() == before) is not shared


def test_the_published_code_goes_the_other_way(model: nn.Module, batches: list[Tensor]) -> None:
    learning = DiffMaskLearner(MaskedModel(adapt(model)), batches[0], DiffMaskSettings.released())
    optimizer = learning.multiplier_optimizer()
    for _ in range(40):
        learning.ascend(optimizer, 0, torch.tensor(1.0))
    # a unit violation for 40 steps: 20 → 8 at a rate of 0.3
    assert learning.multiplier(0).item() == pytest.approx(8.0, abs=0.01)


def test_multiplier_stays_within_its_limits(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0], multiplier_limits=(19.0, 20.5), multiplier_rate=1.0)
    optimizer = learning.multiplier_optimizer()
    for violation, limit in ((1.0, 20.5), (-1.0, 19.0)):
        for _ in range(20):
            learning.ascend(optimizer, 1, torch.tensor(violation))
        assert learning.multiplier(1).item() == limit


def test_first_gates_mask_what_was_asked_for(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0], masked_at_start=0.1)
    found = learning.masked.read(batches[0])
    masked = 1 - log_kept(learning.gates(found.states))[:, -1].exp().mean()
    assert masked.item() == pytest.approx(learning.masked_at_start, abs=1e-4)
    torch.testing.assert_close(learning.gates.replacement.detach(), found.states[0].mean((0, 1)))


def test_objective_is_its_formula(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0])
    found = learning.masked.read(batches[0])
    depths = set()
    for step in range(12):
        objective = learning.objective(found, step)
        depths.add(objective.depth)
        logits = learning.gates(found.states[: objective.depth + 1])
        sparsity = log_kept(logits)[:, -1].mean()
        expected = learning.multiplier(objective.depth).item() * objective.violation + sparsity
        torch.testing.assert_close(objective.loss, expected)
        again = learning.objective(found, step)
        assert torch.equal(again.loss, objective.loss)  # a step's noise is its own
        assert not torch.equal(learning.objective(found, step, rank=1).kept, objective.kept)
    assert depths == set(range(5))


def test_only_gates_up_to_the_drawn_depth_learn(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0])
    found = learning.masked.read(batches[0])
    step = next(step for step in range(50) if learning.draw_depth(step) == 2)
    learning.objective(found, step).loss.backward()
    learnt = [any(each.grad is not None for each in gate.parameters()) for gate in learning.gates.gates]
    assert learnt == [True, True, True, False, False]
    assert learning.gates.replacement.grad is not None
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.parametrize(("share", "depths"), [(0.0, {0, 1, 2, 3, 4}), (0.5, {2, 3, 4}), (1.0, {4})])
def test_shallow_depths_can_be_left_out(
    model: nn.Module, batches: list[Tensor], share: float, depths: set[int]
) -> None:
    learning = learner(model, batches[0], shallowest_depth=share)
    assert {learning.draw_depth(step) for step in range(60)} == depths


def test_rates_grow_and_fall() -> None:
    settings = DiffMaskSettings(warmup_steps=4, final_rate=0.2)
    shares = [settings.rate_share(step, 12) for step in range(13)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[8] == pytest.approx(0.6)  # half of the cosine
    assert shares[12] == pytest.approx(0.2)
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert {dataclasses.replace(settings, final_rate=1.0).rate_share(step, 12) for step in range(4, 12)} == {1.0}


def test_the_average_of_the_gates_is_what_counts(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0], averaging=0.9)
    expected = None
    for value in (1.0, 2.0, 5.0):
        with torch.no_grad():
            learning.gates.replacement.fill_(value)
        learning.stepped()
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    averaged = torch.full_like(learning.gates.replacement, expected or 0.0)
    torch.testing.assert_close(learning.best_gates().replacement.detach(), averaged)
    assert learning.offer(evaluation(kept=0.5), 1)
    torch.testing.assert_close(learning.best_gates().replacement.detach(), averaged)
    learning.restart()
    learning.stepped()
    torch.testing.assert_close(learning._result.state_dict(), learning.gates.state_dict())


def test_the_class_token_counts_only_as_in_the_published_code(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0], count_class_token=True)
    found = learning.masked.read(batches[0])
    states = found.with_class_token(model.cls_token.flatten())
    assert {tuple(each.shape) for each in states} == {(4, 25, 24)}
    torch.testing.assert_close(states[1][:, 0], (model.cls_token + model.pos_embed[:, :1])[0].expand(4, -1))
    objective = learning.objective(found, 0)
    expected = log_kept(learning.gates(states[: objective.depth + 1]))[:, -1].mean()
    torch.testing.assert_close(objective.loss - learning.multiplier(0).item() * objective.violation, expected)


def test_gates_told_a_class_learn_from_likely_classes(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0], constraint="class", top_classes=2)
    found = learning.masked.read(batches[0])
    losses = {round(learning.objective(found, 0, draw=draw).violation.item(), 6) for draw in range(6)}
    assert len(losses) > 1
    assert learning.gates.shape.class_width == 24
    assert learning.objective(found, 1).loss.isfinite()


# -- the choice of gates -----------------------------------------------------------------------------------------


def test_the_best_gates_meet_the_constraint_and_keep_few_patches(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0], margin=0.1, agreement=0.95)
    assert learning.offer(evaluation(divergence=0.5, kept=0.1), 1)
    assert not learning.offer(evaluation(divergence=0.6, kept=0.01), 2)
    assert learning.offer(evaluation(divergence=0.09, kept=0.9), 3)
    assert not learning.offer(evaluation(divergence=0.09, kept=0.1, agreement=0.9), 4)
    assert learning.offer(evaluation(divergence=0.1, kept=0.2), 5)
    weight = learning.gates.replacement.detach().clone()
    with torch.no_grad():
        learning.gates.replacement.add_(1)
    assert not learning.offer(evaluation(divergence=0.01, kept=0.3), 6)
    assert learning.best is not None
    assert learning.best["step"] == 5
    torch.testing.assert_close(learning.best_gates().replacement.detach(), weight)


def test_of_gates_that_keep_about_as_few_patches_those_that_change_less_are_better(
    model: nn.Module, batches: list[Tensor]
) -> None:
    learning = learner(model, batches[0], margin=0.1, agreement=0.95)
    assert learning.offer(evaluation(divergence=0.09, kept=0.030), 1)
    assert learning.offer(evaluation(divergence=0.01, kept=0.031), 2)
    assert not learning.offer(evaluation(divergence=0.02, kept=0.030), 3)
    assert not learning.offer(evaluation(divergence=0.001, kept=0.032), 4)  # more than the fewest, not than the best
    assert learning.offer(evaluation(divergence=0.09, kept=0.025), 5)


def test_collapse_is_seen(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0], margin=0.1, multiplier_limits=(0.0, 20.0))
    assert learning.collapsed(evaluation(divergence=2.0, kept=0.005))
    assert not learning.collapsed(evaluation(divergence=2.0, kept=0.05))
    assert not learning.collapsed(evaluation(divergence=0.01, kept=0.0))  # nothing is needed: legitimate
    optimizer = learning.multiplier_optimizer()
    for _ in range(200):
        learning.ascend(optimizer, 0, torch.tensor(1.0))
    assert learning.collapsed(evaluation(divergence=2.0, kept=0.5))
    learning.ascend(optimizer, 0, torch.tensor(-1.0))
    assert not learning.collapsed(evaluation(divergence=2.0, kept=0.5))


def test_a_restart_has_other_gates_that_mask_half_as_much(model: nn.Module, batches: list[Tensor]) -> None:
    learning = learner(model, batches[0])
    before, share = learning.gates.gates[0].inner.weight.detach().clone(), learning.masked_at_start
    learning.ascend(learning.multiplier_optimizer(), 0, torch.tensor(1.0))
    learning.restart()
    assert learning.masked_at_start <= share / 2
    assert not torch.equal(learning.gates.gates[0].inner.weight, before)
    assert {each.item() for each in learning.multipliers.parameters()} == {20.0}


# -- training ----------------------------------------------------------------------------------------------------


def test_training_writes_a_checkpoint_and_leaves_the_model_alone(
    tmp_path: Path, model: nn.Module, batches: list[Tensor]
) -> None:
    model.train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = train_diffmask(model, batches, tmp_path / "gates.safetensors", TINY)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["gates.json", "gates.safetensors"]
    assert json.loads((tmp_path / "gates.json").read_text()) == json.loads(json.dumps(card))
    assert [each["step"] for each in card["history"]] == [2, 4, 6]
    assert card["training"]["steps"] == 6
    assert card["met"]
    explanation = Explainer(DiffMask(checkpoint=str(tmp_path / "gates.safetensors")), model)(batches[0])
    assert explanation.scores.shape == (4, 4, 6)


def test_the_same_seed_gives_the_same_gates(tmp_path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_diffmask(model, batches, tmp_path / f"{name}.safetensors", dataclasses.replace(TINY, seed=seed))
        weights.append(load_file(tmp_path / f"{name}.safetensors"))
    assert all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())
    assert not all(torch.equal(each, weights[2][name]) for name, each in weights[0].items())


class Interrupted:
    """Batches that fail once, after some have been given."""

    def __init__(self, batches: list[Tensor], after: int) -> None:
        self.batches, self.left = batches, after

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt if self.left == -1 else RuntimeError("twice")
            yield batch


@pytest.mark.parametrize("course", [{"lookahead": True}, {}, {"averaging": 0.8, "final_rate": 0.1}])
def test_an_interrupted_training_goes_on_where_it_was(
    tmp_path: Path, model: nn.Module, batches: list[Tensor], course: dict[str, Any]
) -> None:
    settings = dataclasses.replace(TINY, steps=14, multiplier_rate=1.0, keep_best=False, **course)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    expected = train_diffmask(model, batches, whole, settings, validation=batches[:2])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="go on with resume"):
        train_diffmask(model, Interrupted(batches, 10), parts, settings, validation=batches[:2])
    assert signal.getsignal(signal.SIGINT) is handler
    assert not parts.exists()
    assert (tmp_path / "parts.safetensors.training").is_file()
    found = train_diffmask(model, batches, parts, settings, validation=batches[:2], resume=True)
    assert [each["step"] for each in found["history"]] == [2, 4, 6, 8, 10, 12, 14]
    drop = ("seconds",)
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert {k: v for k, v in ours.items() if k not in drop} == {k: v for k, v in theirs.items() if k not in drop}
    weights = load_file(parts)
    assert all(torch.equal(each, weights[name]) for name, each in load_file(whole).items())
    assert not (tmp_path / "parts.safetensors.training").exists()


@pytest.mark.filterwarnings("ignore:the gates in .* do not meet the constraint")
def test_a_multiplier_at_its_limit_is_given_up_as_soon_after_an_interruption(
    tmp_path: Path, model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitexplain.training.diffmask_learner._LONG_AT_LIMIT", 4)
    limit = {"margin": 1e-9, "multiplier_start": 1.0, "multiplier_limits": (0.05, 1.0), "collapsed_below": 0.0}
    settings = dataclasses.replace(TINY, steps=6, restarts=1, **limit)  # type: ignore[arg-type]
    whole = train_diffmask(model, batches, tmp_path / "whole.safetensors", settings, validation=batches[:2])
    assert [each["restarts"] for each in whole["history"]] == [0, 0, 1]  # before what the evaluation leads to
    parts = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_diffmask(model, Interrupted(batches, 3), parts, settings, validation=batches[:2])
    found = train_diffmask(model, batches, parts, settings, validation=batches[:2], resume=True)
    for ours, theirs in zip(found["history"], whole["history"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_the_state_of_an_earlier_version_goes_on_without_the_steps_at_the_limit(
    tmp_path: Path, model: nn.Module, batches: list[Tensor]
) -> None:
    output = tmp_path / "gates.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_diffmask(model, Interrupted(batches, 3), output, TINY, validation=batches[:2])
    state = tmp_path / "gates.safetensors.training"
    content = torch.load(state, weights_only=True)
    del content["state"]["steps_at_limit"]
    torch.save(content, state)
    found = train_diffmask(model, batches, output, TINY, validation=batches[:2], resume=True)
    assert found["history"][-1]["step"] == TINY.steps


def test_interrupted_before_anything_was_saved_it_promises_nothing(
    tmp_path: Path, model: nn.Module, batches: list[Tensor]
) -> None:
    output = tmp_path / "gates.safetensors"
    with pytest.raises(KeyboardInterrupt, match=r"stopped after \d steps, before anything was saved: start anew"):
        train_diffmask(model, Interrupted(batches, 2), output, TINY, validation=batches)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from families import make_images, make_model
from vitexplain.training.diffmask import DiffMaskSettings, train_diffmask

class Batches:
    left = int(sys.argv[2])
    def __iter__(self):
        for seed in range(3):
            Batches.left -= 1
            if Batches.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            yield make_images("cls", batch=4, seed=seed)

settings = DiffMaskSettings(
    steps=14, evaluate_every=2, warmup_steps=2, validation_batches=2, margin=1.0, agreement=0.0, keep_best=False
)
validation = [make_images("cls", batch=4, seed=seed) for seed in range(2)]
train_diffmask(make_model("cls"), Batches(), Path(sys.argv[1]), settings, validation=validation)
"""


def test_a_killed_training_comes_to_the_same(tmp_path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    settings = dataclasses.replace(TINY, steps=14, keep_best=False)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    expected = train_diffmask(model, batches, whole, settings, validation=batches[:2])
    folders = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests"))
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-c", KILLED, str(parts), "9"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not parts.exists()
    found = train_diffmask(model, batches, parts, settings, validation=batches[:2], resume=True)
    assert [each["step"] for each in found["history"]] == [each["step"] for each in expected["history"]]
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert ours["divergence"] == pytest.approx(theirs["divergence"], rel=1e-4)
        assert ours["kept"] == pytest.approx(theirs["kept"])
    weights = load_file(parts)
    for name, each in load_file(whole).items():
        torch.testing.assert_close(weights[name], each, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_resumed_is_refused(tmp_path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    output = tmp_path / "gates.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_diffmask(model, Interrupted(batches, 5), output, TINY, validation=batches[:2])
    with pytest.raises(CheckpointError, match="margin differ"):
        train_diffmask(model, batches, output, dataclasses.replace(TINY, margin=0.3), resume=True)
    with pytest.raises(CheckpointError, match="model differ"):
        train_diffmask(make_model("dynamic"), [make_images("dynamic")], output, TINY, resume=True)
    with pytest.raises(CheckpointError, match="validation differ"):
        train_diffmask(model, batches, output, TINY, validation=batches[1:], resume=True)
    shuffled = [each.flip(0) for each in batches[1::-1]]
    assert train_diffmask(model, batches, output, TINY, validation=shuffled, resume=True)["history"][-1]["step"] == 6
    with pytest.raises(KeyboardInterrupt):
        train_diffmask(model, Interrupted(batches, 5), output, TINY)
    state = tmp_path / "gates.safetensors.training"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read as the state of a training"):
        train_diffmask(model, batches, output, TINY, resume=True)
    torch.save({"identity": {}, "state": nn.Linear(1, 1)}, state)
    with pytest.raises(CheckpointError, match="cannot be read as the state of a training"):
        train_diffmask(model, batches, output, TINY, resume=True)


def test_collapsed_gates_are_replaced_and_in_the_end_given_up(
    tmp_path: Path, model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    collapsed = evaluation(divergence=2.0, kept=0.0, agreement=0.1)
    monkeypatch.setattr(DiffMaskLearner, "evaluate", lambda *_: collapsed)
    settings = dataclasses.replace(TINY, steps=100, restarts=1, margin=0.1)
    with pytest.warns(ExplanationWarning, match="do not meet the constraint, training collapsed"):
        card = train_diffmask(model, batches, tmp_path / "gates.safetensors", settings)
    assert card["restarts"] == 1
    assert [each["step"] for each in card["history"]] == [2, 4]
    assert not card["met"]


def test_a_restart_takes_along_nothing_of_the_gates_it_replaces(
    tmp_path: Path, model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffMaskLearner, "evaluate", lambda *_: evaluation(divergence=2.0, agreement=0.1))
    settings = dataclasses.replace(TINY, steps=20, evaluate_every=8, margin=0.1, lookahead=True, multiplier_rate=1.0)
    output = tmp_path / "gates.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_diffmask(model, Interrupted(batches, 10), output, settings, validation=batches)
    kept = torch.load(tmp_path / "gates.safetensors.training", weights_only=True)["state"]
    assert (kept["step"], kept["restarts"]) == (8, 1)
    fresh = learner(model, batches[0], **dataclasses.asdict(settings))
    fresh.restart()
    gates, multipliers = kept["lookaheads"]
    for parameters, found in ((fresh.gates.parameters(), gates), (fresh.multipliers.parameters(), multipliers)):
        assert found["steps"] == 0
        for each, slow in zip(parameters, found["slow"], strict=True):
            assert torch.equal(slow, each.detach())


def test_training_stops_early_without_progress(
    tmp_path: Path, model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffMaskLearner, "evaluate", lambda *_: evaluation(divergence=0.1, kept=0.5))
    settings = dataclasses.replace(TINY, steps=100, patience=3)
    card = train_diffmask(model, batches, tmp_path / "gates.safetensors", settings)
    assert [each["step"] for each in card["history"]] == [2, 4, 6, 8]
    assert card["result"]["step"] == 2


def test_gates_that_give_nothing_up_are_pointed_out(
    tmp_path: Path, model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffMaskLearner, "evaluate", lambda *_: evaluation(kept=1.0))
    with pytest.warns(ExplanationWarning, match="keep 100.0% of the patches.*smaller multiplier_start"):
        train_diffmask(model, batches, tmp_path / "gates.safetensors", TINY)


@pytest.mark.parametrize(
    "settings",
    [
        DiffMaskSettings.released(steps=4, evaluate_every=2),
        dataclasses.replace(TINY, constraint="class"),
        dataclasses.replace(TINY, constraint="evidence", shared_multiplier=True),
    ],
)
@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
def test_variants_train(tmp_path: Path, model: nn.Module, batches: list[Tensor], settings: DiffMaskSettings) -> None:
    card = train_diffmask(model, batches, tmp_path / "gates.safetensors", settings)
    assert card["constraint"] == settings.constraint
    assert card["result"]["step"] <= settings.steps
    assert all(each.isfinite().all() for each in load_file(tmp_path / "gates.safetensors").values())


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
@pytest.mark.parametrize("kind", ["mean_pooled", "eva_rope", "hf_vit", "own_batch_second", "naflex", "torchvision"])
def test_families_train(tmp_path: Path, kind: str) -> None:
    batches = [(make_images(kind, batch=4, seed=seed), torch.zeros(4)) for seed in range(2)]
    model = make_model(kind)
    train_diffmask(model, batches, tmp_path / "gates.safetensors", TINY)
    Explainer(DiffMask(checkpoint=str(tmp_path / "gates.safetensors")), model)(batches[0][0])


def test_mixed_precision_keeps_the_gates_in_single(tmp_path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    train_diffmask(model, batches, tmp_path / "gates.safetensors", TINY, precision="bf16-mixed")
    weights = load_file(tmp_path / "gates.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.float32}
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_figures_are_logged(tmp_path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    settings = dataclasses.replace(TINY, steps=20, evaluate_every=10)
    train_diffmask(model, batches, tmp_path / "gates.safetensors", settings, logs=tmp_path / "logs")
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {name for row in rows for name, value in row.items() if value}
    assert names >= {"divergence_soft", "kept_soft", "divergence", "agreement", "kept", "multiplier_0", "multiplier_4"}
    assert {int(row["step"]) for row in rows} == {10, 20}


def test_figures_from_before_an_interruption_are_kept(tmp_path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    settings, more = dataclasses.replace(TINY, steps=30, evaluate_every=10), {"validation": batches[:1]}
    train_diffmask(model, batches, tmp_path / "whole.safetensors", settings, logs=tmp_path / "whole", **more)
    output, logs = tmp_path / "gates.safetensors", tmp_path / "logs"
    with pytest.raises(KeyboardInterrupt):
        train_diffmask(model, Interrupted(batches, 25), output, settings, logs=logs, **more)
    train_diffmask(model, batches, output, settings, logs=logs, resume=True, **more)
    found, expected = ((each / "metrics.csv").read_text().splitlines() for each in (logs, tmp_path / "whole"))
    assert len(found) == len(expected) == 7
    columns = [sorted(lines[0].split(",")) for lines in (found, expected)]
    assert columns[0] == columns[1]
    steps = [[row["step"] for row in csv.DictReader(lines)] for lines in (found, expected)]
    assert steps[0] == steps[1] == ["10", "10", "20", "20", "30", "30"]
    depths = [[row["depth"] for row in csv.DictReader(lines)] for lines in (found, expected)]
    assert depths[0] == depths[1]


def test_the_method_fits_itself(tmp_path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    method = DiffMask(depth=1).fit(adapt(model), batches, tmp_path / "gates.safetensors", **dataclasses.asdict(TINY))
    assert method == DiffMask(depth=1, checkpoint=str(tmp_path / "gates.safetensors"))
    assert Explainer(method, model)(batches[0]).scores.isfinite().all()


@pytest.mark.parametrize("constraint", ["class", "evidence", None])
def test_the_method_of_a_class_fits_gates_that_are_told_one(
    tmp_path: Path, model: nn.Module, batches: list[Tensor], constraint: str | None
) -> None:
    recipe = {**dataclasses.asdict(TINY), "constraint": constraint}
    if constraint is None:
        del recipe["constraint"]
    output = tmp_path / "gates.safetensors"
    explainer = Explainer(ClassDiffMask(), model).fit(batches, output, **recipe)
    assert json.loads(output.with_suffix(".json").read_text())["constraint"] == (constraint or "class")
    assert explainer(batches[0], 2).scores.isfinite().all()


@pytest.mark.parametrize(
    ("learning", "constraint", "said"),
    [
        (DiffMask(), "class", "expected 'distribution'.*fit diffmask_class"),
        (DiffMask(), "evidence", "expected 'distribution'.*fit diffmask_class"),
        (ClassDiffMask(), "distribution", "expected 'class' or 'evidence'.*fit diffmask,"),
    ],
)
def test_gates_that_the_method_could_not_read_are_not_trained(
    tmp_path: Path, model: nn.Module, learning: DiffMask, constraint: str, said: str
) -> None:
    output = tmp_path / "gates.safetensors"
    with pytest.raises(OptionError, match=f"constraint='{constraint}', {said}"):
        learning.fit(adapt(model), [], output, constraint=constraint)


def test_the_best_gates_are_chosen_by_all_validation_images(
    tmp_path: Path, model: nn.Module, batches: list[Tensor]
) -> None:
    output = tmp_path / "gates.safetensors"
    assert train_diffmask(model, batches, output, TINY, validation=batches)["result"]["images"] == 12
    assert train_diffmask(model, batches, output, TINY)["result"]["images"] == 8  # the first two batches


def test_wrong_input_is_refused_before_any_work(tmp_path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    for name in ("gates.pt", "no_such_folder/gates.safetensors"):
        with pytest.raises(InputError, match=r"\.safetensors"):
            train_diffmask(model, batches, tmp_path / name, TINY)
    output = tmp_path / "gates.safetensors"
    with pytest.raises(InputError, match="no batches"):
        train_diffmask(model, [], output, TINY)
    with pytest.raises(InputError, match="tuple that begins with them"):
        train_diffmask(model, [{"images": batches[0]}], output, TINY)
    with pytest.raises(InputError, match="can be iterated again"):
        train_diffmask(model, iter(batches), output, TINY, validation=batches)
    with pytest.raises(UnsupportedModelError):
        train_diffmask(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), batches, output, TINY)
    for wrong in ({"steps": 0}, {"margin": 0.0}, {"masked_at_start": 1.0}, {"constraint": "all"}, {"agreement": 2.0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            dataclasses.replace(TINY, **wrong)
    with pytest.raises(OptionError, match="one of 32-true"):
        train_diffmask(model, batches, output, TINY, precision="half")
    with pytest.raises(OptionError, match="multiplier_limits"):
        DiffMaskSettings(multiplier_limits=(3.0, 1.0))


@pytest.mark.parametrize("constraint", ["distribution", "class"])
def test_a_model_of_one_output_has_no_distribution_to_keep(
    tmp_path: Path, model: nn.Module, batches: list[Tensor], constraint: Any
) -> None:
    model.reset_classifier(1)  # type: ignore[operator]
    settings = dataclasses.replace(TINY, constraint=constraint)
    with pytest.raises(UnsupportedModelError, match="with 1 output, expected two classes"):
        train_diffmask(model, batches, tmp_path / "gates.safetensors", settings)


def test_the_random_states_of_gpus_are_left_alone(
    model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("all GPUs were seeded")

    monkeypatch.setattr("torch.cuda.manual_seed_all", refuse)
    learner(model, batches[0])


def test_a_caller_s_inference_mode_and_precision_are_no_hindrance(
    tmp_path: Path, model: nn.Module, batches: list[Tensor]
) -> None:
    output, before = tmp_path / "gates.safetensors", torch.get_default_dtype()
    with torch.inference_mode():
        train_diffmask(model, batches, output, TINY)
        assert torch.is_inference_mode_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        train_diffmask(model, batches, output, TINY)
    finally:
        torch.set_default_dtype(before)


def test_lookahead_follows_every_few_steps() -> None:
    moved, still = torch.zeros(2, requires_grad=True), torch.ones(1, requires_grad=True)
    lookahead = Lookahead([moved, still], interval=3, share=0.5)
    moved.grad = torch.ones(2)
    values = []
    for _ in range(6):
        with torch.no_grad():
            moved += 1
            still += 1
        lookahead.step()
        values.append(moved[0].item())
    assert values == [1.0, 2.0, 1.5, 2.5, 3.5, 3.0]
    assert still.item() == 7.0  # without a gradient it is none of its business


# -- tasks with a known answer -----------------------------------------------------------------------------------


def test_glyph_grids_show_what_their_labels_say() -> None:
    grids = make_glyph_grids("pair", 40, 3, side=6)
    assert grids.images.shape == (40, 3, 24, 24)
    assert (grids.evidence.sum(1) == 2).all()
    assert torch.equal(grids.images, make_glyph_grids("pair", 40, 3, side=6).images)
    cells = (
        grids.images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(40, 36, 3, 4, 4)
    )
    for image, target, evidence in zip(cells, grids.targets, grids.evidence, strict=True):
        shapes = {}
        for cell in image[evidence]:
            colour = "red" if cell[0].max() > 0.9 else "blue"
            ink = (cell[0 if colour == "red" else 2] > 0.6).float()
            shapes[colour] = next(
                index for index, shape in enumerate(torch.from_numpy(SHAPES)) if torch.equal(shape, ink)
            )
        assert target.argmax() == 4 * shapes["red"] + shapes["blue"]
    incomplete = make_glyph_grids("pair", 400, 3, side=6, complete=False)
    counts = incomplete.evidence.sum(1)
    assert 0.2 < (counts < 2).float().mean() < 0.36
    entropy = -(incomplete.targets * (incomplete.targets + 1e-9).log()).sum(1)
    torch.testing.assert_close(entropy, (2 - counts) * torch.tensor(4.0).log(), rtol=1e-4, atol=1e-4)


def test_pointer_grids_name_a_glyph() -> None:
    grids = make_glyph_grids("pointer", 200, 1)
    assert (grids.evidence.sum(1) == 2).all()
    assert grids.targets.shape == (200, 4)
    incomplete = make_glyph_grids("pointer", 200, 1, complete=False)
    missing = incomplete.evidence.sum(1) < 2
    assert (incomplete.targets[missing] == 0.25).all()
    assert (incomplete.targets[~missing].amax(1) == 1).all()


def test_counting_grids_count() -> None:
    grids = make_counting_grids(300, 0, cell=4)
    assert grids.images.shape == (300, 3, 12, 12)
    assert grids.labels.unique().tolist() == list(range(10))
    shown = grids.images[:, :, ::4, ::4].flatten(2).transpose(1, 2)
    assert torch.equal((shown == torch.from_numpy(COLOURS[0])).all(2), grids.red)
    assert torch.equal(grids.red.sum(1), grids.labels)
    inner = make_counting_grids(300, 0, extremes=False).labels
    assert (inner.min(), inner.max()) == (1, 8)


@pytest.mark.slow
def test_the_two_patches_that_a_label_rests_on_are_found() -> None:
    scale = Scale(side=6, width=48, depth=3, learning=300)
    model, accuracy = learn_task("pair", scale, seed=0)
    assert accuracy > 0.99
    trained, card = learn_masks(model, "pair", scale.side, DiffMaskSettings(steps=200, evaluate_every=50))
    assert card["met"]
    found = measure(trained, model, "pair", scale.side, images=256)
    assert found.iou >= 0.99
    assert found.exact >= 0.98
    assert found.agreement >= 0.99
    assert found.divergence < 0.05
    # what the answer costs is no accident of the task: with either patch dropped, the label is open
    assert card["result"]["divergence_all_masked"] > 1.0
    # the map is read from the model: with other weights the same gates find something else
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    assert measure(trained, model, "pair", scale.side, images=64).iou < 0.7


def test_batches_of_glyphs_can_be_iterated_again() -> None:
    batches = GlyphBatches("pair", 3, 2, 0, 4)
    first, second = list(batches), list(batches)
    assert [len(each) for each in first] == [2, 2, 2]
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_picture_batches_are_shuffled_and_start_anywhere(tmp_path: Path) -> None:
    from PIL import Image

    for index in range(7):
        Image.new("RGB", (8, 8), (30 * index, 0, 0)).save(tmp_path / f"{index}.png")
    preprocessing = Preprocessing((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop_fraction=1.0)
    batches = PictureBatches.of(str(tmp_path), preprocessing, batch_size=3, seed=4)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    endless = batches.endless()
    reds = [[round(255 * each[0, 0, 0].item()) // 30 for each in next(endless)] for _ in range(6)]
    assert torch.equal(torch.rand(1), expected)
    assert [len(each) for each in reds] == [3, 3, 1, 3, 3, 1]
    epochs = [[*a, *b, *c] for a, b, c in (reds[:3], reds[3:])]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    later = batches.endless(4)
    assert [round(255 * each[0, 0, 0].item()) // 30 for each in next(later)] == reds[4]
    assert [len(each) for each in batches] == [3, 3, 1]
    with pytest.raises(InputError, match="found 0 pictures"):
        PictureBatches([], preprocessing)


def test_picture_batches_know_themselves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module
) -> None:
    from PIL import Image

    for index in range(4):
        Image.new("RGB", (48, 32), (60 * index, 0, 0)).save(tmp_path / f"{index}.png")
    seen = Preprocessing((32, 48), (0.5,) * 3, (0.5,) * 3, crop_fraction=1.0)
    batches = PictureBatches.of(str(tmp_path), seen, batch_size=2)
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        assert PictureBatches.of(".", seen, batch_size=2, workers=1).digest() == batches.digest()
    others = [
        PictureBatches(batches.pictures[1:], seen, batch_size=2),
        PictureBatches(batches.pictures, seen, batch_size=3),
        PictureBatches(batches.pictures, seen, batch_size=2, seed=1),
        PictureBatches(batches.pictures, seen.replace(mean=(0.4,) * 3), batch_size=2),
        PictureBatches(range(4), seen, batch_size=2),
        PictureBatches(range(4), seen, batch_size=2, objects=2),
    ]
    assert len({each.digest() for each in (batches, *others)}) == 7
    output, passing = tmp_path / "gates.safetensors", PictureBatches.endless

    def failing(self: PictureBatches, start: int = 0) -> Iterator[Tensor]:
        for index, batch in enumerate(passing(self, start)):
            if index == 3:
                raise RuntimeError("the disk is gone")
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(PictureBatches, "endless", failing)
        with pytest.raises(RuntimeError):
            train_diffmask(model, batches, output, TINY)
    for other in others[:3]:
        with pytest.raises(CheckpointError, match="images differ"):
            train_diffmask(model, other, output, TINY, resume=True)
    assert [each["step"] for each in train_diffmask(model, batches, output, TINY, resume=True)["history"]] == [2, 4, 6]


def test_training_on_scenes_from_the_command_line_s_pieces(tmp_path: Path) -> None:
    from vitexplain import load_model

    loaded = load_model("scenes")
    batches = PictureBatches.of("scenes", loaded.preprocessing, batch_size=4)
    settings = dataclasses.replace(TINY, steps=2, validation_batches=1)
    card = train_diffmask(loaded.model, batches, tmp_path / "gates.safetensors", settings)
    assert card["model"]["sha256"] == loaded.identity()["sha256"]


def test_fields_of_the_recipe_on_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "gates.safetensors"
    words = ["train", "diffmask", "--data", "scenes", "--batch-size", "2", "--steps", "2", "--output", str(output)]
    wrong = CliRunner().invoke(app, [*words, "--set", "multiplier_rat=1"])
    assert wrong.exit_code != 0
    assert "multiplier_rate" in f"{wrong.output}{wrong.exception}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        done = CliRunner().invoke(app, [*words, "--set", "multiplier_rate=1", "--set", "validation_batches=1"])
    assert done.exit_code == 0, done.output
    recipe = json.loads(output.with_suffix(".json").read_text())["training"]
    assert (recipe["steps"], recipe["multiplier_rate"], recipe["validation_batches"]) == (2, 1.0, 1)
