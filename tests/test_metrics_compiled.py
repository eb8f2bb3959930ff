"""The compiled forward of the metrics: the same logits, one compilation, the model given back."""

from __future__ import annotations

import gc
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SIZE, make_images, make_model
from test_contract import assert_same_state, disturb, state_of
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typer.testing import CliRunner

from vitexplain.bench import figures, open_results
from vitexplain.cli import app
from vitexplain.errors import InputError, OptionError, UnsupportedModelError
from vitexplain.metrics import compiled, create_metric, evaluate
from vitexplain.metrics.batches import InformedPredictor
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.predictor import Predictor
from vitexplain.models import adapt


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of nodes of each graph that is to be compiled, and then runs as it was traced."""
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compilations.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(compiled, "_BACKEND", backend)
    return compilations


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def backend(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(compiled, "_BACKEND", backend)


@pytest.fixture
def vit() -> nn.Module:
    return make_model("cls")


@pytest.mark.parametrize("kind", ["cls", "naflex", "hf_vit", "torchvision"])
def test_logits_are_those_of_the_model_as_it_is(graphs: list[int], kind: str) -> None:
    model = make_model(kind)
    plain, fast = Predictor.of(model, 4), Predictor.of(model, 4, compiled=True)
    for count in (4, 8, 1, 3, 9):
        images = make_images(kind, count, seed=count)
        torch.testing.assert_close(fast.logits(images), plain.logits(images))
        torch.testing.assert_close(fast.probabilities(images), plain.probabilities(images))


def test_earlier_answers_stay_as_they_were(monkeypatch: pytest.MonkeyPatch, vit: nn.Module) -> None:
    """As with CUDA graphs, each answer is written over the one before."""

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        place = torch.zeros(3, 7)
        return lambda *inputs: (place.copy_(graph(*inputs)[0]),)

    monkeypatch.setattr(compiled, "_BACKEND", backend)
    fast, images = Predictor.of(vit, 3, compiled=True), make_images("cls", 8)
    first = fast.logits(images[:3])
    everything = fast.logits(images)
    torch.testing.assert_close(everything, Predictor.of(vit).logits(images))
    torch.testing.assert_close(first, everything[:3])


def test_one_compilation_serves_all_batches_and_predictors_of_a_model(graphs: list[int], vit: nn.Module) -> None:
    images = make_images("cls", 7)
    for count in (7, 2, 3):
        Predictor.of(vit, 3, compiled=True).logits(images[:count])
        InformedPredictor(adapt(vit), None, 3, compiled=True).logits(images.to(memory_format=torch.channels_last))
    assert len(graphs) == 1
    Predictor.of(vit, 2, compiled=True).logits(images)
    assert len(graphs) == 2


def test_many_models_do_not_get_into_each_others_way(graphs: list[int]) -> None:
    models = [
        VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=12, depth=1, num_heads=1, num_classes=classes).eval()
        for classes in range(2, 12)  # more than torch compiles of one function
    ]
    images = make_images("cls")
    for model in models + models:
        torch.testing.assert_close(Predictor.of(model, 2, compiled=True).logits(images), model(images).detach())
    assert len(graphs) == len(models)


def test_what_changes_on_the_model_is_noticed(graphs: list[int], vit: nn.Module) -> None:
    fast, images = Predictor.of(vit, 2, compiled=True), make_images("cls")
    before = fast.logits(images)
    with torch.no_grad():
        vit.head.weight.mul_(2)
    vit.head.bias = nn.Parameter(vit.head.bias.detach() + 1)
    torch.testing.assert_close(fast.logits(images), Predictor.of(vit).logits(images))
    with vit.blocks[0].register_forward_pre_hook(lambda _, given: (given[0] * 0.5,)):
        hooked = fast.logits(images)
        torch.testing.assert_close(hooked, Predictor.of(vit).logits(images))
    found = fast.logits(images)
    torch.testing.assert_close(found, Predictor.of(vit).logits(images))
    assert (found - hooked).abs().max() > 0.01
    assert (found - before).abs().max() > 0.01


def test_the_model_is_given_back_as_it_was(graphs: list[int], vit: nn.Module) -> None:
    disturb(vit)
    before = state_of(vit)
    Predictor.of(vit, 2, compiled=True).logits(make_images("cls", 3))
    assert_same_state(before, state_of(vit))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_nothing_keeps_the_model(graphs: list[int]) -> None:
    model = make_model("cls")
    Predictor.of(model, 2, compiled=True).logits(make_images("cls"))
    gone = weakref.ref(model)
    held = len(compiled._COMPILED)
    del model
    gc.collect()
    assert gone() is None
    assert len(compiled._COMPILED) == held - 1


def test_tokens_are_dropped_from_the_model_as_it_is(graphs: list[int], vit: nn.Module) -> None:
    images, scores = make_images("cls", 3), torch.rand(3, 4, 6)
    plain, fast = (
        create_metric("token_dropping").measure(
            MetricBatch(scores, torch.arange(3), images, Predictor.of(vit, 2, compiled=each))
        )
        for each in (False, True)
    )
    torch.testing.assert_close(fast, plain)


def test_a_gpu_gets_cuda_graphs(monkeypatch: pytest.MonkeyPatch, vit: nn.Module) -> None:
    modes: list[str | None] = []
    monkeypatch.setattr(torch, "compile", lambda forward, *, mode, **_: modes.append(mode) or forward)
    for device in ("cpu", "cuda:0", "cuda:1", "cpu"):
        compiled._forward_of(vit, torch.device(device))
    assert modes == [None, "reduce-overhead"]


# ------------------------------------------------------------------------------------------ what goes wrong


class Counted(nn.Module):
    """A model that reads its logits on the way, which no graph holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.most: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        if logits.max() > 0:
            self.most.append(float(logits.max()))
        return logits


def test_a_compiler_that_fails_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, vit: nn.Module) -> None:
    failing(monkeypatch, RuntimeError("no compiler here\nand more"))
    before = state_of(vit)
    said = r"cannot be compiled \(RuntimeError: no compiler here\); .*Leave 'compiled' out"
    with pytest.raises(OptionError, match=said):
        Predictor.of(vit, compiled=True).logits(make_images("cls"))
    assert_same_state(before, state_of(vit))


def test_a_model_that_is_no_graph_is_refused(graphs: list[int], vit: nn.Module) -> None:
    adapter = adapt(vit)
    adapter.model = Counted(vit)
    assert Predictor(adapter).logits(make_images("cls")).shape == (2, 7)
    with pytest.raises(OptionError, match=r"cannot be compiled \(Unsupported: Data-dependent branching\)"):
        Predictor(adapter, compiled=True).logits(make_images("cls"))


def test_too_many_shapes_are_refused(graphs: list[int], vit: nn.Module) -> None:
    images = make_images("cls", 1)
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (1, 2):
            Predictor.of(vit, size, compiled=True).logits(images)
        with pytest.raises(OptionError, match=r"cannot be compiled \(\w+: .*recompile"):
            Predictor.of(vit, 3, compiled=True).logits(images)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_lack_of_memory_stays_what_it_is(monkeypatch: pytest.MonkeyPatch, vit: nn.Module, error: Exception) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
        Predictor.of(vit, compiled=True).logits(make_images("cls"))


def test_images_that_the_model_does_not_take_are_an_input_error(graphs: list[int]) -> None:
    fast = Predictor.of(make_model("torchvision"), compiled=True)
    with pytest.raises(InputError, match="the model refused images of 64×64 pixels"):
        fast.logits(torch.zeros(2, 3, 64, 64))
    with pytest.raises(InputError, match="NaN or infinite"):
        fast.logits(torch.full((2, 3, *SIZE), float("nan")))


def test_a_model_without_logits_is_said_to_be_that(graphs: list[int], vit: nn.Module) -> None:
    fast = Predictor.of(vit, compiled=True)
    vit.head = nn.Unflatten(1, (4, 6))
    with pytest.raises(UnsupportedModelError, match=r"the model returned \(2, 4, 6\)"):
        fast.logits(make_images("cls"))


# ------------------------------------------------------------------------------------------ the doors


def test_evaluate_measures_the_same(graphs: list[int], vit: nn.Module) -> None:
    metrics = [create_metric("deletion", steps=4, order="patches"), "class_sensitivity"]
    plain, fast = (
        evaluate(["rollout", "gradcam"], make_images("cls", 5), metrics, model=vit, batch_size=3, compiled=each)
        for each in (False, True)
    )
    assert len(graphs) == 1
    assert plain.rows.keys() == fast.rows.keys()
    for key, rows in plain.rows.items():
        for name, values in rows.items():
            np.testing.assert_allclose(fast.rows[key][name], values, rtol=1e-5, atol=1e-6)


def test_the_benchmark_takes_it(graphs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RESAMPLES", 50)
    monkeypatch.setattr(figures, "PERMUTATIONS", 99)
    words = ["bench", "--methods", "rollout", "--metrics", "saco", "--limit", "3"]
    tables = []
    for word in ("--uncompiled", "--compiled"):
        assert CliRunner().invoke(app, [*words, word, "--output", str(tmp_path / word)]).exit_code == 0
        results = open_results(tmp_path / word)
        assert results.run["configuration"]["compiled"] is (word == "--compiled")
        assert len(graphs) == (word == "--compiled")
        tables.append([(row.figure, row.value) for row in results.figures()])
    assert [name for name, _ in tables[0]] == [name for name, _ in tables[1]]
    np.testing.assert_allclose([value for _, value in tables[0]], [value for _, value in tables[1]], atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler on PATH")
def test_torchs_own_compiler() -> None:
    model = VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=12, depth=1, num_heads=1, num_classes=5).eval()
    images = make_images("cls", 5)
    expected = Predictor.of(model).logits(images)
    torch.testing.assert_close(Predictor.of(model, 2, compiled=True).logits(images), expected, rtol=1e-4, atol=1e-5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
