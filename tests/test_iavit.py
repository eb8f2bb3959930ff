"""IA-ViT: the published code's numbers, losses known on paper, what is read of models, checkpoints, and the method."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from families import make_images, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from trained import random_interpreter

import vitexplain
from vitexplain import CheckpointError, InputError, NotTrainedError, OptionError, UnsupportedModelError, adapt
from vitexplain.iavit import (
    Interpreter,
    InterpreterShape,
    attention_regulariser,
    load_iavit,
    load_interpreter,
    save_checkpoint,
    save_model,
    simulation_loss,
)
from vitexplain.iavit.evaluation import Fairness, answers, fairness
from vitexplain.iavit.interpreter import fresh_interpreter
from vitexplain.iavit.losses import REGULARISERS, distribution
from vitexplain.iavit.trunk import normalised, read_frozen, read_on_graph
from vitexplain.preprocessing import Preprocessing

LAYERS = {"query": "query", "key": "key", "value": "value", "token_score": "fc1", "head": "fc2"}
"""Names here, and in the published code."""


@pytest.fixture(scope="module")
def published(goldens: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(goldens / "iavit.npz") as arrays:
        return {name: arrays[name] for name in arrays}


def tensor(published: dict[str, Any], name: str) -> Tensor:
    return torch.from_numpy(published[name])


def published_interpreter(published: dict[str, Any], prefix: str = "w/") -> Interpreter:
    interpreter = Interpreter(InterpreterShape(24, 10, "position", 196, scale_logits=False))
    state = {
        f"{ours}.{kind}": tensor(published, f"{prefix}{theirs}.{kind}")
        for ours, theirs in LAYERS.items()
        for kind in ("weight", "bias")
    }
    interpreter.load_state_dict(state)
    return interpreter


def close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest entry."""
    assert (found.detach() - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


# -- the published code ------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_attention_logits_losses_and_gradients_are_those_of_the_published_code(published: dict[str, Any]) -> None:
    interpreter = published_interpreter(published)
    tokens = tensor(published, "in/tokens").requires_grad_()
    head = nn.Linear(24, 10)
    head.load_state_dict({kind: tensor(published, f"w/head.{kind}") for kind in ("weight", "bias")})
    logits, found = head(tokens[:, 0]), interpreter(tokens[:, 1:])
    close(logits, tensor(published, "out/logits"))
    close(found.logits, tensor(published, "out/inter_logits"))
    close(interpreter.attention(tokens[:, 1:]), tensor(published, "out/new_atts"))
    expected = tensor(published, "out/map_mean_over_queries")
    for received in (found.received, interpreter.received(tokens[:, 1:])):
        torch.testing.assert_close(received.detach(), expected, rtol=1e-5, atol=1e-8)
    attentions = tensor(published, "in/atts_f16").float()
    received = attentions.mean(2).sum(0)[:, 1:, 1:].mean(1)
    close(received, tensor(published, "out/old_atts"))
    parts = {
        "ce": F.cross_entropy(logits, tensor(published, "in/labels")),
        "kd_T3": simulation_loss(found.logits, logits, temperature=3.0, detach_teacher=False),
        "mmd": attention_regulariser("released", received, found.received),
    }
    for name, value in parts.items():
        close(value, tensor(published, f"loss/{name}"))
    loss = sum(parts.values(), torch.zeros(()))
    close(loss, tensor(published, "loss/total_ce+kd+mmd"))
    loss.backward()
    assert tokens.grad is not None
    close(tokens.grad, tensor(published, "grad/tokens"))
    for ours, theirs in {**{f"interpreter.{ours}": name for ours, name in LAYERS.items()}, "head": "head"}.items():
        layer = head if ours == "head" else interpreter.get_submodule(ours.removeprefix("interpreter."))
        for kind in ("weight", "bias"):
            close(layer.get_parameter(kind).grad, tensor(published, f"grad/{theirs}.{kind}"))


@pytest.mark.parity
def test_the_published_regulariser_calls_equal_attention_further_apart(published: dict[str, Any]) -> None:
    model, interpreter = tensor(published, "out/old_atts"), tensor(published, "out/map_mean_over_queries")
    same = attention_regulariser("released", model, model)
    close(same, tensor(published, "loss/mmd_old_old"))
    assert same > attention_regulariser("released", model, interpreter)


@pytest.mark.parity
def test_the_whole_published_model_gives_the_same_map(published: dict[str, Any], goldens: Path, tmp_path: Path) -> None:
    model, interpreter = converted(published), published_interpreter(published, "e2e/w/")
    absorb(interpreter, model.norm)
    path = tmp_path / "iavit.safetensors"
    save_checkpoint(path, interpreter, adapt(model), with_model=False)
    with np.load(goldens / "inputs.npz") as inputs:
        image = torch.from_numpy(inputs["vit_tiny/catdog"])[None]
    explanation = vitexplain.get_explainer("iavit", model, checkpoint=str(path))(image)
    close(explanation.logits, tensor(published, "e2e/logits"))
    expected = tensor(published, "e2e/new_atts_mean_q")
    torch.testing.assert_close(explanation.scores.flatten(1), expected, rtol=1e-5, atol=1e-8)
    reading = read_frozen(adapt(model), image)
    with torch.no_grad():
        close(interpreter(reading.tokens).logits, tensor(published, "e2e/inter_logits"))


def converted(published: dict[str, Any]) -> VisionTransformer:
    """The published model in timm's architecture."""
    model = VisionTransformer(
        patch_size=16, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, num_classes=10, qkv_bias=True
    ).eval()

    def of(name: str) -> Tensor:
        return tensor(published, f"e2e/w/{name}")

    state = {
        "cls_token": of("transformer.embeddings.cls_token"),
        "pos_embed": of("transformer.embeddings.position_embeddings"),
    }
    names = {
        "patch_embed.proj": "transformer.embeddings.patch_embeddings",
        "norm": "transformer.encoder.encoder_norm",
        "head": "head",
    }
    parts = {"norm1": "attention_norm", "norm2": "ffn_norm", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}
    for block in range(2):
        layer = f"transformer.encoder.layer.{block}"
        names |= {f"blocks.{block}.{ours}": f"{layer}.{theirs}" for ours, theirs in parts.items()}
        names[f"blocks.{block}.attn.proj"] = f"{layer}.attn.out"
        for kind in ("weight", "bias"):
            rows = [of(f"{layer}.attn.{name}.{kind}") for name in ("query", "key", "value")]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(rows)
    state |= {f"{ours}.{kind}": of(f"{theirs}.{kind}") for ours, theirs in names.items() for kind in ("weight", "bias")}
    model.load_state_dict(state)
    return model


@torch.no_grad()
def absorb(interpreter: Interpreter, norm: nn.Module) -> None:
    """Takes the final norm's scale and shift into the interpreter's maps: W (g x + s) + b = (W g) x + (W s + b)."""
    for layer in (interpreter.query, interpreter.key, interpreter.value):
        layer.bias += layer.weight @ norm.get_parameter("bias")
        layer.weight *= norm.get_parameter("weight")


# -- the interpreter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("head", ["pooled", "position"])
def test_an_interpreter_is_its_definition(head: Any, scale: bool) -> None:
    shape = InterpreterShape(6, 3, head, 5 if head == "position" else 0, scale)
    interpreter = fresh_interpreter(shape, 1).double()
    tokens = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = interpreter(tokens)
    for image in range(2):
        rows = [normal_row(interpreter, tokens[image], query, scale) for query in range(5)]
        mixed = torch.stack([sum(row[p] * interpreter.value(tokens[image, p]) for p in range(5)) for row in rows])
        if head == "pooled":
            expected = interpreter.head(mixed.mean(0))
        else:
            assert interpreter.token_score is not None
            expected = interpreter.head(interpreter.token_score(mixed)[:, 0])
        torch.testing.assert_close(found.logits[image], expected)
        torch.testing.assert_close(found.received[image], torch.stack(rows).mean(0))
    torch.testing.assert_close(interpreter.attention(tokens).sum(2), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(interpreter.received(tokens), interpreter.attention(tokens).mean(1))


def normal_row(interpreter: Interpreter, tokens: Tensor, query: int, scale: bool) -> Tensor:
    q = interpreter.query(tokens[query])
    scores = torch.stack([q @ interpreter.key(each) for each in tokens])
    weights = (scores / (math.sqrt(len(q)) if scale else 1)).exp()
    return weights / weights.sum()


def test_many_images_and_patches_go_through_in_tiles() -> None:
    interpreter = fresh_interpreter(InterpreterShape(4, 3), 0)
    tokens = torch.randn(3, 800, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(interpreter.received(tokens), interpreter.attention(tokens).mean(1))


def test_a_head_by_position_takes_one_number_of_patches() -> None:
    interpreter = fresh_interpreter(InterpreterShape(6, 3, "position", 5), 0)
    with pytest.raises(InputError, match="found 4 patches, expected 5"):
        interpreter(torch.randn(1, 4, 6))


@pytest.mark.parametrize("wrong", [{"head": "mean"}, {"patches": 3}, {"head": "position"}, {"width": 0}])
def test_shapes_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="number of patches with the head 'position' alone"):
        InterpreterShape(**{"width": 6, "num_classes": 3, **wrong})


def test_first_weights_follow_the_seed_and_leave_the_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (fresh_interpreter(InterpreterShape(6, 3), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.query.weight, again.query.weight)
    assert not torch.equal(first.query.weight, other.query.weight)


# -- losses ------------------------------------------------------------------------------------------------------


def received(rows: int = 4, patches: int = 6, seed: int = 0) -> Tensor:
    noise = torch.randn(rows, patches, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.softmax(1)


def test_simulation_is_nothing_for_the_same_answer_and_known_for_two_classes() -> None:
    logits = torch.randn(3, 4)
    assert simulation_loss(logits, logits).abs() < 1e-6
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert simulation_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)
    assert simulation_loss(2 * student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * expected, rel=1e-6)


@pytest.mark.parametrize("detached", [True, False])
def test_the_teacher_learns_only_where_it_is_not_detached(detached: bool) -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    simulation_loss(student, teacher, detach_teacher=detached).backward()
    assert student.grad is not None
    assert (teacher.grad is None) is detached


@pytest.mark.parametrize("detached", [False, True])
def test_classes_that_the_model_rules_out_take_no_part(detached: bool) -> None:
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    gone = torch.tensor([False, True, False, False, False])
    loss = simulation_loss(student, teacher.masked_fill(gone, -torch.inf), detach_teacher=detached)
    nearly = simulation_loss(student, teacher.masked_fill(gone, -1e4), detach_teacher=detached)
    torch.testing.assert_close(loss, nearly)
    loss.backward()
    for each in (student,) if detached else (student, teacher):
        assert each.grad is not None
        assert each.grad.isfinite().all()


def test_patches_that_receive_nothing_give_finite_gradients() -> None:
    # a mask can hide a patch from all others
    model = torch.tensor([[0.0, 0.5, 1.5], [0.4, 0.6, 1.0]], requires_grad=True)
    interpreter = torch.tensor([[0.2, 0.3, 0.5]]).expand(2, 3)
    found = attention_regulariser("kl", model, interpreter)
    share = torch.tensor([0.25, 0.75])
    first = (share * (share / interpreter[0, 1:]).log()).sum()
    share = torch.tensor([0.2, 0.3, 0.5])
    assert found.item() == pytest.approx((first + (share * (share / interpreter[0]).log()).sum()).item() / 2, abs=1e-6)
    found.backward()
    assert model.grad is not None
    assert model.grad.isfinite().all()


@pytest.mark.parametrize("reg", ["kl", "mmd"])
def test_regularisers_vanish_for_the_same_attention_alone(reg: Any) -> None:
    rows = received()
    assert attention_regulariser(reg, 12 * rows, rows).abs() < 1e-12  # the model's attention is scaled to sum 1
    assert attention_regulariser(reg, rows, received(seed=1)) > 1e-3


def test_the_released_regulariser_stays_between_its_bounds_and_fails_what_others_pass() -> None:
    rows = received(rows=64, patches=16)
    same = attention_regulariser("released", rows, rows)
    unrelated = attention_regulariser("released", rows, received(rows=64, patches=16, seed=1))
    assert same > unrelated > math.exp(-0.5)
    assert same <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 5), patches=st.integers(2, 7))
def test_bounds_of_the_regularisers(seed: int, rows: int, patches: int) -> None:
    model, interpreter = received(rows, patches, seed), received(rows, patches, seed + 1)
    assert math.exp(-0.5) - 1e-12 <= attention_regulariser("released", model, interpreter) <= 1
    assert attention_regulariser("mmd", model, interpreter) >= -1e-12
    assert attention_regulariser("kl", model, interpreter) >= 0
    assert attention_regulariser("none", model, interpreter) == 0


def test_another_order_of_images_is_the_same_set_but_other_pairs() -> None:
    model, interpreter = received(5, 6, 0), received(5, 6, 1)
    shuffled = interpreter[torch.tensor([2, 0, 4, 1, 3])]
    torch.testing.assert_close(
        attention_regulariser("mmd", model, shuffled), attention_regulariser("mmd", model, interpreter)
    )
    assert attention_regulariser("mmd", model, model[[2, 0, 4, 1, 3]]).abs() < 1e-12
    assert attention_regulariser("kl", model, model[[2, 0, 4, 1, 3]]) > 0.1


def test_mmd_is_its_definition() -> None:
    model, interpreter = received(3, 4, 0), received(3, 4, 1)
    rows = [*model, *interpreter]
    spread = sum(float((x - y).square().sum()) for x in rows for y in rows) / len(rows) ** 2

    def kernel(x: Tensor, y: Tensor) -> float:
        distance = float((x - y).square().sum())
        return sum(math.exp(-distance / (factor * spread)) for factor in (0.25, 0.5, 1, 2, 4)) / 5

    def mean(left: Tensor, right: Tensor) -> float:
        return sum(kernel(x, y) for x in left for y in right) / 9

    expected = mean(model, model) + mean(interpreter, interpreter) - 2 * mean(model, interpreter)
    assert attention_regulariser("mmd", model, interpreter).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("reg", ["kl", "mmd"])
def test_minimising_a_regulariser_makes_the_attentions_equal(reg: Any) -> None:
    model, free = received(6, 5), torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        attention_regulariser(reg, model, free.softmax(1)).backward()
        optimizer.step()
    assert attention_regulariser(reg, model, free.detach().softmax(1)) < 1e-3
    if reg == "kl":
        torch.testing.assert_close(free.detach().softmax(1), model, atol=5e-3, rtol=0)


def test_minimising_the_released_regulariser_drives_them_apart() -> None:
    model, free = received(6, 5), torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    before = (free.detach().softmax(1) - model).square().sum()
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        attention_regulariser("released", model, free.softmax(1)).backward()
        optimizer.step()
    assert (free.detach().softmax(1) - model).square().sum() > 2 * before


def test_equal_or_empty_attention_gives_numbers() -> None:
    flat = torch.full((2, 3), 1 / 3)
    for reg in REGULARISERS:
        assert attention_regulariser(reg, flat, flat).isfinite()
        assert attention_regulariser(reg, torch.zeros(2, 3), flat).isfinite()
    assert distribution(torch.tensor([[-1.0, 1.0, 3.0]])).tolist() == [[0.0, 0.25, 0.75]]


def test_regularisers_refuse_other_shapes() -> None:
    with pytest.raises(InputError, match=r"expected the same \(B, P\)"):
        attention_regulariser("kl", torch.ones(2, 3), torch.ones(2, 4))


# -- what is read of a model -------------------------------------------------------------------------------------


def test_reading_is_what_eager_attention_says(family: str, model: nn.Module, images: Tensor) -> None:
    adapter = adapt(model)
    reading = read_frozen(adapter, images)
    assert reading.tokens.requires_grad is False
    torch.testing.assert_close(reading.tokens.mean(2), torch.zeros(reading.tokens.shape[:2]), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        reading.tokens.var(2, correction=0), torch.ones(reading.tokens.shape[:2]), atol=1e-2, rtol=0
    )
    needs = vitexplain.Needs(attention=True)
    with vitexplain.Capture(adapter, needs) as capture, torch.no_grad():
        logits = capture.forward(images)
        prefix = capture.layouts[-1].prefix
        dense = [block.attention().mean(1)[:, prefix:, prefix:].mean(1) for block in capture.blocks]
    torch.testing.assert_close(reading.received, torch.stack(dense).sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reading.logits, logits)


@pytest.mark.exact_states
def test_on_the_graph_the_same_is_read(family: str, model: nn.Module, images: Tensor) -> None:
    adapter = adapt(model)
    frozen, graph = read_frozen(adapter, images), read_on_graph(adapter, images)
    for found, expected in zip(graph, frozen, strict=True):
        assert found.requires_grad
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_gradient_of_received_attention_is_that_of_dense_attention() -> None:
    model, images = make_model("cls").double(), make_images("cls").double()
    weights = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = ("blocks.0.attn.qkv.weight", "blocks.2.attn.qkv.weight", "patch_embed.proj.weight")
    parameters = [model.get_parameter(name) for name in names]
    reading = read_on_graph(adapt(model), images)
    found = torch.autograd.grad((reading.received * weights).sum(), parameters, allow_unused=True)
    matrices: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, output: matrices.append(output))
    model(images)
    dense = torch.stack([each.mean(1)[:, 1:, 1:].mean(1) for each in matrices]).sum(0)
    for ours, expected in zip(found, torch.autograd.grad((dense * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", ["several_attentions", "torchvision"])
def test_attention_that_cannot_be_trained_with(kind: str) -> None:
    model, images = make_model(kind), make_images(kind)
    with pytest.raises(UnsupportedModelError, match=r"expected once.*Train the interpreter alone"):
        read_on_graph(adapt(model), images)
    assert read_on_graph(adapt(model), images, attention=False).received.abs().max() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_windows_are_refused_where_attention_is_asked_for() -> None:
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=3
    ).eval()
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(UnsupportedModelError, match="reg='none'"):
        read_frozen(adapt(model), images)
    assert read_frozen(adapt(model), images, attention=False).tokens.shape == (1, 16, 16)


# -- checkpoints and the method ----------------------------------------------------------------------------------


def test_the_map_is_the_interpreters_received_attention() -> None:
    model, images = make_model("registers"), make_images("registers")
    path = random_interpreter(model)
    adapter = adapt(model)
    explanation = vitexplain.get_explainer("iavit", adapter, checkpoint=str(path))(images)
    interpreter = load_interpreter(path, adapter, torch.device("cpu"), torch.float32)
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(images)
        tokens = normalised(seen[0][:, 5:])
        expected = interpreter.attention(tokens).mean(1).reshape(2, 4, 6)
    torch.testing.assert_close(explanation.scores, expected)
    torch.testing.assert_close(explanation.scores.sum((1, 2)), torch.ones(2))


def test_without_a_checkpoint_the_error_says_how_to_get_one() -> None:
    model, images = make_model("cls"), make_images("cls")
    with pytest.raises(NotTrainedError, match=r"vitexplain train iavit.*explainer\.fit"):
        vitexplain.get_explainer("iavit", model)(images)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_interpreter_of_another_model_is_refused() -> None:
    path = random_interpreter(make_model("cls"))
    with pytest.raises(CheckpointError, match=r"belongs to another model.*VisionTransformer"):
        vitexplain.get_explainer("iavit", make_model("registers"), checkpoint=str(path))(make_images("registers"))
    changed = make_model("cls")
    with torch.no_grad():
        changed.head.bias[0] += 1e-3
    with pytest.raises(CheckpointError, match="belongs to another model"):
        vitexplain.get_explainer("iavit", changed, checkpoint=str(path))(make_images("cls"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"method": "diffmask"}, "no card of a checkpoint of iavit"),
        ({"format": 2}, "has format 2, expected 1"),
        ({"interpreter": {"width": 24}}, "lacks what describes an interpreter"),
        ({"interpreter": {"width": 25, "num_classes": 7}}, "not of this architecture"),
        ({"model": None}, "does not say which model"),
    ],
)
def test_broken_cards(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    model, source = make_model("cls"), random_interpreter(make_model("cls"))
    path = tmp_path / "iavit.safetensors"
    shutil.copy(source, path)
    card = json.loads(source.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**card, **entries}))
    with pytest.raises(CheckpointError, match=message):
        vitexplain.get_explainer("iavit", model, checkpoint=str(path))(make_images("cls"))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    model, source = make_model("cls"), random_interpreter(make_model("cls"))
    explainer = vitexplain.get_explainer("iavit", model, checkpoint=str(tmp_path / "iavit.safetensors"))
    with pytest.raises(CheckpointError, match="no such file"):
        explainer(make_images("cls"))
    shutil.copy(source, tmp_path / "iavit.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read.*keep both"):
        explainer(make_images("cls"))
    (tmp_path / "iavit.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        explainer(make_images("cls"))
    shutil.copy(source.with_suffix(".json"), tmp_path / "iavit.json")
    assert explainer(make_images("cls")).scores.shape == (2, 4, 6)
    state = load_file(source)
    save_file({name: each for name, each in state.items() if "query" not in name}, tmp_path / "iavit.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        explainer(make_images("cls"))
    with pytest.raises(CheckpointError, match=r"ending in \.safetensors"):
        save_checkpoint(tmp_path / "iavit.pt", Interpreter(InterpreterShape(24, 7)), adapt(model), with_model=False)


def test_a_model_comes_back_with_its_interpreter(tmp_path: Path) -> None:
    architecture = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}
    torch.manual_seed(0)
    model = VisionTransformer(**architecture).eval()
    interpreter = fresh_interpreter(InterpreterShape(24, 7), 0)
    path, images = tmp_path / "iavit.safetensors", torch.randn(2, 3, 32, 32)
    prepare = Preprocessing((32, 32), (0.4,) * 3, (0.3,) * 3, "bilinear", 0.8, "squash")
    card = {"architecture": architecture, "classes": list("abcdefg"), "preprocessing": prepare.to_dict()}
    save_checkpoint(path, interpreter, adapt(model), with_model=True, record=card)
    expected = vitexplain.get_explainer("iavit", model, checkpoint=str(path))(images)
    for found in (load_iavit(path), load_iavit(path, VisionTransformer(**architecture))):
        explanation = found(images)
        torch.testing.assert_close(explanation.scores, expected.scores)
        torch.testing.assert_close(explanation.logits, expected.logits)
        assert found.subject.labels == list("abcdefg")
    save_model(path, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), dict(model.state_dict()))
    loaded = vitexplain.load_model("scenes", checkpoint=tmp_path / "model.safetensors")
    assert (loaded.preprocessing, loaded.labels) == (prepare, list("abcdefg"))
    again = vitexplain.get_explainer("iavit", loaded, checkpoint=str(path))(images)
    torch.testing.assert_close(again.scores, expected.scores)


def test_a_model_of_timm_comes_back_at_the_size_it_was_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7, img_size=(64, 96)).eval()
    path, images = tmp_path / "iavit.safetensors", torch.randn(1, 3, 64, 96)
    prepare = Preprocessing((64, 96), (0.5,) * 3, (0.5,) * 3)
    card = {"architecture": "test_vit", "preprocessing": prepare.to_dict()}
    save_checkpoint(path, fresh_interpreter(InterpreterShape(64, 7), 0), adapt(model), with_model=True, record=card)
    found = load_iavit(path)(images)
    torch.testing.assert_close(found.logits, model(images))
    assert found.grid == (4, 6)
    save_model(path, tmp_path / "model.safetensors")
    loaded = vitexplain.load_model("timm:test_vit", checkpoint=tmp_path / "model.safetensors")
    assert loaded.preprocessing == prepare


def test_models_that_do_not_come_back(tmp_path: Path) -> None:
    model, alone = make_model("cls"), random_interpreter(make_model("cls"))
    with pytest.raises(CheckpointError, match="holds an interpreter alone"):
        load_iavit(alone)
    path = tmp_path / "iavit.safetensors"
    save_checkpoint(path, fresh_interpreter(InterpreterShape(24, 7), 0), adapt(model), with_model=True)
    with pytest.raises(CheckpointError, match=r"load_iavit\(path, model=…\)"):
        load_iavit(path)
    with pytest.raises(CheckpointError, match="not of this architecture"):
        load_iavit(path, make_model("registers"))
    strange = tmp_path / "strange.safetensors"
    record = {"architecture": "scenes-pm"}
    save_checkpoint(
        strange, fresh_interpreter(InterpreterShape(24, 7), 0), adapt(model), with_model=True, record=record
    )
    with pytest.raises(CheckpointError, match=r"'scenes-pm', which this version of timm does not have"):
        load_iavit(strange)
    assert load_iavit(path, make_model("cls"))(make_images("cls")).scores.shape == (2, 4, 6)


def test_an_interpreter_ships_for_the_embedded_model() -> None:
    from vitexplain.data import open_dataset

    model = vitexplain.load_model()
    examples = list(open_dataset("scenes", split="test", count=60))
    found = vitexplain.get_explainer("iavit", model)(model.preprocessing([each.image for each in examples]))
    masks = torch.from_numpy(np.stack([each.mask for each in examples if each.mask is not None]))
    peaks = found.scores.flatten(1).argmax(1)
    on_object = [
        masks[image, 8 * (peak // 12) : 8 * (peak // 12 + 1), 8 * (peak % 12) : 8 * (peak % 12 + 1)].any().item()
        for image, peak in enumerate(peaks.tolist())
    ]
    assert sum(on_object) / len(on_object) > 0.75
    from vitexplain.models.shipped import shipped_checkpoint

    path = shipped_checkpoint("iavit", model.model)
    assert path is not None
    answered = answers(model.model, path, examples, model.preprocessing)
    assert answered.agreement > 0.95
    assert answered.predictor_accuracy > 0.9
    assert abs(answered.interpreter_accuracy - answered.predictor_accuracy) <= 0.05
    assert answered.names == tuple(each.name for each in examples)


# -- fairness ----------------------------------------------------------------------------------------------------


def test_fairness_is_known_on_paper() -> None:
    # group 0: TP FN FP TN; group 1: TP TP TP FN, TN TN TN FP
    labels = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    predicted = torch.tensor([1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1])
    group = torch.tensor([0] * 4 + [1] * 8)
    found = fairness(predicted, labels, group)
    assert found == Fairness(
        accuracy_gap=0.25,
        demographic_parity=0.0,
        equal_opportunity=0.25,
        equalised_odds=0.25,
        balanced_accuracy=(0.5 + 0.5 + 0.75 + 0.75) / 4,
    )
    assert fairness(predicted, labels, 1 - group) == found
    assert fairness(1 - predicted, 1 - labels, group.bool(), positive=0) == found
    even = fairness(labels, labels, group)
    assert even == Fairness(0.0, 0.0, 0.0, 0.0, 1.0)


def test_fairness_refuses_what_it_cannot_compare() -> None:
    labels = torch.tensor([1, 0, 1, 0])
    with pytest.raises(InputError, match=r"expected \(n,\) each"):
        fairness(labels, labels, labels[:3])
    with pytest.raises(InputError, match="expected 0 and 1"):
        fairness(labels, labels, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(InputError, match="without positive or without negative"):
        fairness(labels, labels, labels)
    with pytest.raises(InputError, match="without positive or without negative"):
        fairness(labels, labels, torch.zeros(4, dtype=torch.int64))
