"""The method: masking inside any model, maps from a checkpoint, checkpoints that belong to their model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXACT_STATES, all_families, make_images, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trained import random_gates

import vitexplain
from vitexplain import (
    Capture,
    CheckpointError,
    Explainer,
    ExplanationWarning,
    InputError,
    NotTrainedError,
    TargetError,
    UnsupportedModelError,
    adapt,
)
from vitexplain.diffmask.checkpoint import load_checkpoint
from vitexplain.diffmask.constraint import divergence
from vitexplain.diffmask.evaluation import evaluate
from vitexplain.diffmask.masking import STATE_NEEDS, MaskedModel, amortised_log_kept, class_token, hard_mask
from vitexplain.diffmask.refinement import _enough_by_rank, refined
from vitexplain.methods.diffmask import DiffMask
from vitexplain.methods.diffmask_class import ClassDiffMask
from vitexplain.models.fingerprint import fingerprint, same_weights
from vitexplain.targets import ExplainedScore, resolve_target

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")


def explainer(model: nn.Module, **options: Any) -> Explainer:
    return Explainer(DiffMask(checkpoint=str(random_gates(model)), **options), model)


def scores_of(model: nn.Module, images: Tensor, **options: Any) -> Tensor:
    return explainer(model, **options)(images).scores


def borrowed_state(model: nn.Module) -> list[Any]:
    modules = list(model.modules())
    return [
        [each.training for each in modules],
        [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules],
        [(each.requires_grad, each.grad is None, each.dtype, each.device) for each in model.parameters()],
        [sorted(vars(each)) for each in modules],
        [each.detach().clone().flatten().tolist() for each in model.parameters()],
    ]


# -- masking -----------------------------------------------------------------------------------------------------


def test_keeping_everything_is_the_model_itself(family: str, model: nn.Module, images: Tensor) -> None:
    masked = MaskedModel(adapt(model))
    found = masked.read(images)
    everything = torch.ones(found.states[0].shape[:2])
    with torch.no_grad(), Capture(masked.adapter, STATE_NEEDS) as capture:
        expected = capture.forward(images)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=0)
    kept = masked.logits(images, everything, torch.full((24,), 7.0))
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)


def test_dropping_everything_leaves_nothing_of_the_image(family: str, model: nn.Module, images: Tensor) -> None:
    masked, images = MaskedModel(adapt(model.double())), images.double()
    replacement = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nothing = torch.zeros(2, math.prod(all_families()[family].grid), dtype=torch.float64)
    first = masked.logits(images, nothing, replacement)
    torch.testing.assert_close(masked.logits(images * -3, nothing, replacement), first, rtol=1e-12, atol=1e-12)
    assert (masked.logits(images, nothing, -replacement) - first).abs().max() > 1e-7


@pytest.mark.parametrize("kind", EXACT_STATES)
def test_dropping_everything_leaves_the_replacement_at_every_position(kind: str) -> None:
    model, images = make_model(kind), make_images(kind)
    masked, replacement = MaskedModel(adapt(model)), torch.randn(24, generator=torch.Generator().manual_seed(1))
    found = masked.logits(images, torch.zeros(2, math.prod(all_families()[kind].grid)), replacement)
    embed = copy.deepcopy(model.patch_embed)
    shape = embed(images).shape
    model.patch_embed.forward = lambda _: replacement.expand(shape).clone()
    with torch.no_grad():
        torch.testing.assert_close(found, model(images), rtol=1e-5, atol=1e-6)


def test_a_dropped_patch_hides_its_pixels_and_no_others(family: str, model: nn.Module, images: Tensor) -> None:
    grid, size = all_families()[family].grid, all_families()[family].size
    masked, replacement = MaskedModel(adapt(model.double())), torch.zeros(24, dtype=torch.float64)
    mask = torch.ones(2, *grid, dtype=torch.float64)
    mask[:, 1, 2] = 0
    images = images.double()
    changed = images.clone()
    height, width = size[0] // grid[0], size[1] // grid[1]
    changed[:, :, height : 2 * height, 2 * width : 3 * width] *= -1
    before = masked.logits(images, mask.flatten(1), replacement)
    torch.testing.assert_close(masked.logits(changed, mask.flatten(1), replacement), before, rtol=1e-12, atol=1e-12)
    mask[:, 1, 2] = 1
    before = masked.logits(images, mask.flatten(1), replacement)
    assert (masked.logits(changed, mask.flatten(1), replacement) - before).abs().max() > 1e-8


def test_states_are_those_between_the_blocks(family: str, model: nn.Module, images: Tensor) -> None:
    masked = MaskedModel(adapt(model))
    found = masked.read(images)
    assert len(found.states) == len(masked.adapter.blocks) + 2
    patches = math.prod(all_families()[family].grid)
    assert {tuple(each.shape) for each in found.states} == {(2, patches, 24)}
    assert {each.shape[1] for each in found.prefix} == {all_families()[family].prefix}
    torch.testing.assert_close(masked.embedding.tokens(images), found.states[0], rtol=1e-5, atol=1e-6)


def test_gradients_reach_mask_and_replacement_and_no_weight(model: nn.Module, images: Tensor, family: str) -> None:
    masked = MaskedModel(adapt(model))
    kept = torch.full((2, math.prod(all_families()[family].grid)), 0.5, requires_grad=True)
    replacement = torch.zeros(24, requires_grad=True)
    before = borrowed_state(model)
    masked.logits(images, kept, replacement).square().sum().backward()
    assert kept.grad is not None
    assert replacement.grad is not None
    assert kept.grad.abs().sum() > 0
    assert replacement.grad.abs().sum() > 0
    assert borrowed_state(model) == before


def test_a_model_that_changes_images_first_is_refused() -> None:
    class Normalising(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.image_size = inner, (32, 48)

        def forward(self, images: Tensor) -> Tensor:
            return self.inner((images - 0.5) / 0.2)

    with pytest.raises(UnsupportedModelError, match="changes images before"):
        MaskedModel(adapt(Normalising(make_model("own")))).read(make_images("own"))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "cait_xxs24_224", "resnet18"])
def test_models_without_a_state_at_every_depth_are_refused(name: str) -> None:
    import timm

    options: dict[str, Any] = {} if name == "resnet18" else {"img_size": 64, "embed_dim": 48, "depth": 2}
    if name.startswith("swin"):
        options |= {"depths": (1, 1), "num_heads": (3, 6), "window_size": 4, "embed_dim": 24}
        del options["depth"]
    model = timm.create_model(name, **options).eval()
    with pytest.raises(UnsupportedModelError, match="gradcam"):
        Explainer(DiffMask(checkpoint="any.safetensors"), model)(torch.randn(1, 3, 64, 64))


# -- maps --------------------------------------------------------------------------------------------------------


def transcription(model: nn.Module, image: Tensor, path: Path, depths: list[int]) -> Tensor:
    """log of the product of P(z > 0) over some depths (P,): gates written out in float64, states from plain hooks."""
    weights = {name: each.double() for name, each in load_file(path).items()}
    stretch = json.loads(path.with_suffix(".json").read_text())["gates"]["stretch"]
    states: list[Tensor] = []
    handles = [
        model.patch_embed.register_forward_hook(lambda _, __, out: states.append(out.reshape(-1, 24).clone())),
        *(block.register_forward_pre_hook(lambda _, args: states.append(args[0][0])) for block in model.blocks),
        model.blocks[-1].register_forward_hook(lambda _, __, out: states.append(out[0])),
    ]
    with torch.no_grad():
        model(image[None])
    for handle in handles:
        handle.remove()
    states = [each[-len(states[0]) :] for each in states]
    normal = [(x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() for x in states]
    total = torch.zeros(len(states[0]), dtype=torch.float64)
    for depth in depths:
        vector = torch.cat([normal[0], normal[depth]], dim=1)
        for layer in ("inner", "outer"):
            name = f"gates.{depth}.{layer}"
            gain, direction = (weights[f"{name}.parametrizations.weight.original{index}"] for index in (0, 1))
            matrix = gain * direction / direction.pow(2).sum(1, keepdim=True).sqrt()
            vector = (vector @ matrix.T + weights[f"{name}.bias"]).tanh()
        logits = stretch * vector[:, 0] + weights[f"gates.{depth}.offset"]
        total += (1 / (1 + (-(logits - 0.2 * math.log(0.2))).exp())).log()
    return total


@pytest.mark.parametrize("kind", EXACT_STATES)
@pytest.mark.parametrize(
    ("options", "depths"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"scale": "log_probability"}, [0, 1, 2, 3, 4]),
        ({"depth": 2}, [0, 1, 2]),
        ({"depth": -4, "aggregate": False}, [1]),
        ({"depth": 4, "aggregate": False, "scale": "log_probability"}, [4]),
    ],
)
def test_map_equals_its_reference(kind: str, options: dict[str, Any], depths: list[int]) -> None:
    model, images = make_model(kind).double(), make_images(kind).double()
    path = random_gates(model)
    scores = Explainer(DiffMask(checkpoint=str(path), **options), model)(images).scores
    for image, found in zip(images, scores, strict=True):
        expected = transcription(copy.deepcopy(model), image, path, depths)
        expected = expected if "scale" in options else expected.exp()
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-8, atol=1e-10)


def test_maps_on_every_family(family: str, model: nn.Module, images: Tensor) -> None:
    explanation = explainer(model)(images)
    assert explanation.scores.shape == (2, *all_families()[family].grid)
    assert explanation.scores.min() > 0
    assert explanation.scores.max() < 1
    assert explanation.scores.flatten(1).std(1).min() > 1e-4


def test_an_image_has_the_same_map_alone_and_in_a_batch(family: str, model: nn.Module) -> None:
    images = make_images(family, batch=3)
    together = scores_of(model, images)
    for index in range(3):
        torch.testing.assert_close(
            scores_of(model, images[index : index + 1])[0], together[index], rtol=1e-4, atol=1e-6
        )


def test_one_forward_pass(family: str, model: nn.Module, images: Tensor) -> None:
    explain, calls = explainer(model), []
    for block in explain.subject.adapter.blocks:
        block.block.register_forward_pre_hook(lambda *_: calls.append(1))
    explain(images, [[0, 1], [2, 3]])
    assert len(calls) == len(explain.subject.adapter.blocks)


def test_the_map_is_the_same_for_every_class() -> None:
    explanation = explainer(make_model("cls"))(make_images("cls"), [[0, 3], [5, 1]])
    torch.testing.assert_close(explanation.scores[:, 0], explanation.scores[:, 1], rtol=0, atol=0)


def test_the_model_is_given_back(family: str, model: nn.Module, images: Tensor) -> None:
    model.train()
    before = borrowed_state(model)
    scores_of(model, images, refine=True, refine_steps=2)
    assert borrowed_state(model) == before


def test_other_weights_or_other_gates_give_another_map() -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = scores_of(model, images)
    other = make_model("cls")
    with torch.no_grad():
        for parameter in other.blocks.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    assert (scores_of(other, images) - expected).abs().max() > 1e-2  # same gates: they depend on the shape alone
    changed = Explainer(DiffMask(checkpoint=str(random_gates(model, seed=1))), model)(images).scores
    assert (changed - expected).abs().max() > 1e-2


def test_saturated_probabilities_keep_their_order(tmp_path: Path) -> None:
    model, images = make_model("cls"), make_images("cls")
    source = random_gates(model)
    path = tmp_path / "saturated.safetensors"
    weights = load_file(source)
    for name in weights:
        if name.endswith("offset"):
            weights[name] = torch.tensor(21.0)
    save_file(weights, path)
    shutil.copy(source.with_suffix(".json"), path.with_suffix(".json"))
    found = Explainer(DiffMask(checkpoint=str(path)), model)(images).scores.flatten(1)
    assert (found.float() == 1).all()  # what single precision would have shown
    logarithm = Explainer(DiffMask(checkpoint=str(path), scale="log_probability"), model)(images).scores.flatten(1)
    assert len(found[0].unique()) > 20
    assert (found.argsort(1) == logarithm.argsort(1)).float().mean() > 0.9


def test_inside_autocast_and_in_half_precision() -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = scores_of(model, images)
    checkpoint = str(random_gates(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (scores_of(model, images) - expected).abs().max() < 0.1
    for precision, tolerance in ((torch.bfloat16, 0.1), (torch.float64, 1e-4)):
        # the same weights, rounded: the checkpoint is still theirs
        found = Explainer(DiffMask(checkpoint=checkpoint), copy.deepcopy(model).to(precision))(images.to(precision))
        assert (found.scores - expected).abs().max() < tolerance


def test_a_depth_that_is_not_there() -> None:
    with pytest.raises(UnsupportedModelError, match="expected -5 to 4"):
        scores_of(make_model("cls"), make_images("cls"), depth=5)


# -- gates that are told a class ---------------------------------------------------------------------------------


def test_told_a_class_the_map_depends_on_it(family: str, model: nn.Module, images: Tensor) -> None:
    path = random_gates(model, class_specific=True)
    maps = [class_map(model, path, images, each) for each in ([1, 4], [4, 1], [1, 1])]
    assert (maps[0] - maps[1]).abs().max() > 1e-3
    torch.testing.assert_close(maps[0][0], maps[2][0], rtol=1e-4, atol=1e-6)


def class_map(model: nn.Module, path: Path, images: Tensor, classes: list[int]) -> Tensor:
    with torch.no_grad(), Capture(model, STATE_NEEDS) as capture:
        capture.forward(images)
        capture.explained = ExplainedScore(resolve_target(classes, capture.logits), 0)
        return ClassDiffMask(checkpoint=str(path)).attribute(capture)


def test_told_no_class_where_one_is_needed() -> None:
    model = make_model("cls")
    path = random_gates(model, class_specific=True)
    method = ClassDiffMask(checkpoint=str(path))
    with torch.no_grad(), Capture(model, STATE_NEEDS) as capture:
        capture.forward(make_images("cls"))
        with pytest.raises(TargetError, match="one class an image"):
            method.attribute(capture)


def test_gates_of_the_other_kind_are_refused() -> None:
    model, images = make_model("cls"), make_images("cls")
    with pytest.raises(CheckpointError, match="use the method diffmask_class"):
        Explainer(DiffMask(checkpoint=str(random_gates(model, class_specific=True))), model)(images)
    with pytest.raises(CheckpointError, match="use the method diffmask,"):
        Explainer(ClassDiffMask(checkpoint=str(random_gates(model))), model)(images)


# -- checkpoints -------------------------------------------------------------------------------------------------


def test_without_a_checkpoint_it_says_how_to_get_one() -> None:
    with pytest.raises(NotTrainedError, match="vitexplain train diffmask"):
        Explainer(DiffMask(), make_model("cls"))(make_images("cls"))


def copied(tmp_path: Path, model: nn.Module) -> Path:
    source, path = random_gates(model), tmp_path / "gates.safetensors"
    shutil.copy(source, path)
    shutil.copy(source.with_suffix(".json"), path.with_suffix(".json"))
    return path


def edit(path: Path, **entries: Any) -> None:
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**card, **entries}))


def check_refused(path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Explainer(DiffMask(checkpoint=str(path)), model)(make_images("cls"))


def test_gates_of_another_model_are_refused(tmp_path: Path) -> None:
    model = make_model("cls")
    path = copied(tmp_path, model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] += 0.5
    check_refused(path, model, "belongs to another model: it was trained on a VisionTransformer")


def test_weights_that_change_under_a_loaded_checkpoint_are_noticed(tmp_path: Path) -> None:
    model, images = make_model("cls"), make_images("cls")
    explain = explainer(model)
    explain(images)
    with torch.no_grad():
        model.head.bias[0] += 1
    with pytest.raises(CheckpointError, match="another model"):
        explain(images)


def test_a_rewritten_checkpoint_is_read_again(tmp_path: Path) -> None:
    model, images = make_model("cls"), make_images("cls")
    path = copied(tmp_path, model)
    explain = Explainer(DiffMask(checkpoint=str(path)), model)
    before = explain(images).scores
    shutil.copy(random_gates(model, seed=1), path)
    assert (explain(images).scores - before).abs().max() > 1e-2


def test_broken_checkpoints_are_refused_with_the_reason(tmp_path: Path) -> None:
    model = make_model("cls")
    path = copied(tmp_path, model)
    check_refused(tmp_path / "nothing.safetensors", model, "no such file")
    for entries, message in (
        ({"format": 2}, "format 2, expected 1"),
        ({"method": "other"}, "no card of a checkpoint of diffmask"),
        ({"constraint": "beauty"}, "constraint 'beauty'"),
        ({"gates": {"width": 24}}, "lacks what describes gates"),
        ({"gates": {"width": 24, "depths": 14, "hidden": 6}}, "gates for 12 blocks, but the model has 3"),
        ({"gates": {"width": 24, "depths": 5, "hidden": 9}}, "not of this architecture"),
    ):
        edit(copied(tmp_path, model), **entries)
        check_refused(path, model, message)
    copied(tmp_path, model).with_suffix(".json").write_text("{")
    check_refused(path, model, "is not JSON")
    path.with_suffix(".json").unlink()
    check_refused(path, model, "keep both files together")
    copied(tmp_path, model).write_bytes(b"x" * 90)
    check_refused(path, model, "cannot be read as weights")


def test_loading_keeps_one_set_of_gates_and_no_model_alive() -> None:
    import gc
    import weakref

    model = make_model("cls")
    adapter = adapt(model)
    first = load_checkpoint(random_gates(model), adapter, torch.device("cpu"), torch.float32)
    assert load_checkpoint(random_gates(model), adapter, torch.device("cpu"), torch.float32) is first
    watch = weakref.ref(adapter)
    del adapter, model
    gc.collect()
    assert watch() is None


def test_fingerprints_tell_weights_apart_and_precisions_not() -> None:
    model = make_model("cls")
    known = fingerprint(model)
    for precision in (torch.float64, torch.bfloat16, torch.float16):
        assert same_weights(copy.deepcopy(model).to(precision), known)
    with torch.no_grad():
        model.head.bias[2] += 0.1
    assert not same_weights(model, known)
    assert not same_weights(make_model("own"), known)


def test_fingerprint_is_the_identity_of_a_loaded_model() -> None:
    from vitexplain import load_model

    loaded = load_model("scenes")
    assert fingerprint(loaded.model)["sha256"] == loaded.identity()["sha256"]


# -- evaluation and search ---------------------------------------------------------------------------------------


def test_evaluation_counts_what_hard_masks_do() -> None:
    model, images = make_model("cls"), make_images("cls", batch=5)
    masked = MaskedModel(adapt(model))
    gates = load_checkpoint(random_gates(model), masked.adapter, torch.device("cpu"), torch.float32).gates
    found = evaluate(masked, gates, [images[:3], images[3:]])
    kept, divergences, same = [], [], []
    for image in images:
        states = masked.read(image[None])
        mask = (amortised_log_kept(gates, states).exp() > 0.5).float()
        answer = masked.logits(image[None], mask, gates.replacement)
        kept.append(mask.mean())
        divergences.append(divergence("distribution", states.logits, answer)[0])
        same.append(float(answer.argmax() == states.logits.argmax()))
    assert found.images == 5
    assert found.kept == pytest.approx(torch.stack(kept).mean().item())
    assert found.divergence == pytest.approx(torch.stack(divergences).mean().item(), rel=1e-4)
    assert found.divergence_median == pytest.approx(torch.stack(divergences).median().item(), rel=1e-4)
    assert found.agreement == pytest.approx(sum(same) / 5)
    assert 0 < found.kept < 1


@pytest.mark.parametrize("options", [{}, {"scale": "log_probability"}, {"depth": 2}])
@pytest.mark.parametrize("told", [False, True])
def test_report_is_about_the_masks_that_are_shown(told: bool, options: dict[str, Any]) -> None:
    model, images = make_model("cls"), make_images("cls", batch=3)
    path = random_gates(model, class_specific=told)
    kind, constraint = (ClassDiffMask, "class") if told else (DiffMask, "distribution")
    explainer = Explainer(kind(checkpoint=str(path), **options), model)
    classes = torch.tensor([1, 4, 0])
    explanation = explainer(images, classes)
    found = explainer.method.report(model, explanation)
    replacement = load_file(path)["replacement"]
    for index, image in enumerate(images):
        scores = explanation.scores[index].flatten()
        kept = (scores.exp() if "scale" in options else scores) > 0.5
        embed = model.patch_embed.register_forward_hook(
            lambda _, __, out, kept=kept: torch.where(kept.view(out.shape[:-1])[..., None], out, replacement)
        )
        with torch.no_grad():
            answer = model(image[None])
        embed.remove()
        with torch.no_grad():
            whole = model(image[None])
        expected = divergence(constraint, whole, answer, classes[index : index + 1])[0]
        assert found.kept[index].item() == pytest.approx(kept.float().mean().item())
        assert found.divergence[index].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
        assert found.unchanged[index].item() == (answer.argmax() == whole.argmax()).item()
    assert (found.divergence_all_masked > 0).all()
    assert 0 < found.kept.max() < 1


@pytest.mark.parametrize("scales", [("probability", "log_probability"), ("log_probability", "probability")])
def test_report_reads_maps_in_the_scale_they_were_made_in(scales: tuple[str, str]) -> None:
    model, images = make_model("cls"), make_images("cls", batch=3)
    ours, theirs = (explainer(model, scale=scale) for scale in scales)
    method: Any = ours.method
    expected, found = (method.report(model, each(images)) for each in (ours, theirs))
    assert 0 < expected.kept.mean() < 1
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.divergence, expected.divergence)


def test_report_of_other_maps_is_refused() -> None:
    model, images = make_model("cls"), make_images("cls")
    explain = explainer(model)
    method: Any = explain.method
    with pytest.raises(TargetError, match="found 2 targets an image"):
        method.report(model, explain(images, [[0, 1], [2, 3]]))
    with pytest.raises(InputError, match="of the method rollout"):
        method.report(model, vitexplain.get_explainer("rollout", model)(images))
    with pytest.raises(InputError, match="without its images"):
        method.report(model, dataclasses.replace(explain(images), inputs=None))


def test_search_finds_masks_that_hold_and_depends_on_no_neighbour() -> None:
    model, images = make_model("cls"), make_images("cls", batch=3)
    masked = MaskedModel(adapt(model))
    gates = load_checkpoint(random_gates(model), masked.adapter, torch.device("cpu"), torch.float32).gates
    margin = 0.5

    def search(images: Tensor, start: float) -> tuple[Tensor, Tensor]:
        found = masked.read(images)
        log_kept = torch.full((len(images), 24), start)
        classes = found.logits.argmax(1)
        log_kept = refined(
            masked, gates, found, log_kept, constraint="distribution", classes=classes, margin=margin, steps=60
        )
        answer = masked.logits(found.images, hard_mask(log_kept), gates.replacement)
        return log_kept, divergence("distribution", found.logits, answer)

    log_kept, change = search(images, math.log(0.999))
    assert (change <= margin).all()
    assert hard_mask(log_kept).mean() < 0.8  # it started from everything kept
    alone, _ = search(images[1:2], math.log(0.999))
    torch.testing.assert_close(hard_mask(alone[0]), hard_mask(log_kept[1]), rtol=0, atol=0)
    torch.testing.assert_close(alone[0], log_kept[1], rtol=1e-2, atol=1e-2)
    repaired, change = search(images, math.log(0.01))
    assert (change <= margin).all()  # it started from nothing kept
    assert hard_mask(repaired).mean() < 0.8
    assert max(log_kept.max(), repaired.max()) <= 0


def test_just_enough_patches_are_kept_in_the_given_order() -> None:
    needed = torch.tensor([0, 1, 4, 6])
    odds = torch.tensor([3.0, -1.0, 5.0, 0.5, -7.0, 2.0]).expand(4, 6)

    def change(mask: Tensor) -> Tensor:
        return (needed - mask.sum(1)).clamp(min=0).float()

    found = _enough_by_rank(odds, change, 0.0)
    assert (found > 0).sum(1).tolist() == needed.tolist()
    torch.testing.assert_close(found.diff(dim=1), odds.diff(dim=1))


def test_the_class_token_is_found_by_name() -> None:
    model = make_model("cls")
    assert torch.equal(class_token(adapt(model)), model.cls_token.flatten())
    for kind in ("registers", "mean_pooled"):
        with pytest.raises(UnsupportedModelError, match="count_class_token"):
            class_token(adapt(make_model(kind)))


def test_warnings_of_constant_maps_do_not_hide_errors(tmp_path: Path) -> None:
    model = make_model("cls")
    path = copied(tmp_path, model)
    weights = {name: torch.zeros_like(each) for name, each in load_file(path).items()}
    for name in weights:
        if name.endswith("original1"):
            weights[name] += 1
    save_file(weights, path)
    with pytest.warns(ExplanationWarning, match="diffmask gave a constant map"):
        Explainer(DiffMask(checkpoint=str(path)), model)(make_images("cls"))
