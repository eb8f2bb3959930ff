"""Explainers in the hands of other libraries: captum, Quantus, targets of pytorch-grad-cam, compiled models."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from families import make_images, make_model
from torch import Tensor, nn

from vitexplain import InputError, UnknownNameError, UnsupportedModelError, compare, get_explainer
from vitexplain.interoperability import quantus_explain
from vitexplain.models.graphs import refuse_graphs


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return make_model("cls")


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return make_images("cls", batch=3)


class TestCaptum:
    def test_infidelity_measures_an_explainer(self, vit: nn.Module, inputs: Tensor) -> None:
        from captum.metrics import infidelity

        noise = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 0.01

        def perturb(batch: Tensor) -> tuple[Tensor, Tensor]:
            repeated = noise.repeat(len(batch) // 3, 1, 1, 1)
            return repeated, batch - repeated

        maps = get_explainer("tokentm", vit).attribute(inputs, 2)
        found = infidelity(vit, perturb, inputs, maps, target=2, n_perturb_samples=1)
        with torch.no_grad():
            fall = vit(inputs)[:, 2] - vit(inputs - noise)[:, 2]
        expected = ((maps * noise).flatten(1).sum(1) - fall).square()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    def test_sensitivity_calls_an_explainer(self, vit: nn.Module, inputs: Tensor) -> None:
        from captum.metrics import sensitivity_max

        explainer = get_explainer("generic_attention", vit)
        found, wider = (
            sensitivity_max(
                lambda batch, **settings: explainer.attribute(batch, settings["target"]),
                inputs,
                perturb_func=_shifted(radius),
                n_perturb_samples=1,
                target=1,
            )
            for radius in (1e-3, 1e-1)
        )
        before, after = (explainer.attribute(each, 1) for each in (inputs, inputs + 1e-3))
        expected = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-5)
        assert (wider > found).all()


def _shifted(by: float) -> Any:
    def perturb(batch: tuple[Tensor, ...] | Tensor, radius: float = 0) -> tuple[Tensor, ...]:
        return tuple(each + by for each in (batch if isinstance(batch, tuple) else (batch,)))

    return perturb


class TestQuantus:
    def test_maps_have_the_shape_it_asks_for(self, vit: nn.Module, inputs: Tensor) -> None:
        targets = np.array([1, 4, 2])
        found = quantus_explain(
            vit, inputs.numpy(), targets, method="gradcam", relu=False, device="cpu", normalise=True
        )
        assert found.shape == (3, 1, 32, 48)
        assert found.dtype == np.float32
        expected = get_explainer("gradcam", vit, relu=False).attribute(inputs, targets)[:, :1]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        default = get_explainer("tokentm", vit).attribute(inputs, targets)[:, :1]
        np.testing.assert_allclose(quantus_explain(vit, inputs.double(), torch.tensor(targets)), default, rtol=1e-5)

    def test_what_it_cannot_explain_is_refused(self, vit: nn.Module, inputs: Tensor) -> None:
        with pytest.raises(InputError, match=r"\(B, 3, H, W\)"):
            quantus_explain(vit, inputs[0], torch.tensor([1]))
        with pytest.raises(UnknownNameError, match="fusion"):
            quantus_explain(vit, inputs, torch.tensor([1, 1, 1]), method="rollout", fusion="max")

    @pytest.mark.peers
    @pytest.mark.filterwarnings("ignore")
    def test_its_metric_runs_on_an_explainer(self, quantus: ModuleType, vit: nn.Module, inputs: Tensor) -> None:
        metric = quantus.Sparseness(disable_warnings=True, abs=True, normalise=False)
        classes = np.array([1, 4, 2])
        given: dict[str, Any] = {"x_batch": inputs.numpy(), "y_batch": classes, "device": "cpu"}
        found = metric(
            model=vit, **given, explain_func=quantus_explain, explain_func_kwargs={"method": "generic_attention"}
        )
        maps = quantus_explain(vit, inputs, classes, method="generic_attention")
        expected = metric(model=vit, **given, a_batch=maps)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert len(set(np.round(found, 6))) == 3


class TestTargets:
    def test_callables_as_pytorch_grad_cam_has_them(self, vit: nn.Module, inputs: Tensor) -> None:
        class ClassifierOutputTarget:
            """A target as that library's users write them: scores (B,) of outputs (B, C), or one score of (C,)."""

            def __init__(self, category: int) -> None:
                self.category = category

            def __call__(self, output: Tensor) -> Tensor:
                return output[self.category] if output.ndim == 1 else output[:, self.category]

        explainer = get_explainer("gradcam", vit)
        found = explainer(inputs, ClassifierOutputTarget(3))
        assert found.targets is None
        torch.testing.assert_close(found.scores, explainer(inputs, 3).scores)

    @pytest.mark.peers
    def test_of_its_library(self, pytorch_grad_cam: ModuleType, vit: nn.Module, inputs: Tensor) -> None:
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        found = get_explainer("gradcam", vit)(inputs, ClassifierOutputTarget(3))
        torch.testing.assert_close(found.scores, get_explainer("gradcam", vit)(inputs, 3).scores)


class TestGraphs:
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler, about its own tensors
    def test_compiled_models_give_the_same_maps(self, inputs: Tensor) -> None:
        plain = get_explainer("tokentm", make_model("cls"))(inputs, 1).scores
        model = torch.compile(make_model("cls"), backend="eager")
        scores = compare(model, inputs, ["tokentm"], targets=1)["tokentm"].scores[:, 0]
        torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-6)

    @pytest.mark.filterwarnings("ignore")
    def test_scripted_models_are_refused(self, vit: nn.Module, inputs: Tensor) -> None:
        with pytest.raises(UnsupportedModelError, match=r"expected the torch\.nn\.Module that it was made from"):
            compare(torch.jit.trace(vit, inputs), inputs, ["tokentm"])

    @pytest.mark.filterwarnings("ignore")  # what the exporter warns of is its own
    def test_exported_programs_pass_every_door(self, vit: nn.Module, inputs: Tensor) -> None:
        program = torch.export.export(vit, (inputs[:1],))
        expected = get_explainer("tokentm", vit)(inputs, 1).scores
        found = compare({"program": program, "module": program.module()}, inputs, ["tokentm"], targets=1)
        for scores in (
            get_explainer("tokentm", program)(inputs, 1).scores,
            found["program", "tokentm"].scores[:, 0],
            found["module", "tokentm"].scores[:, 0],
        ):
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)

    def test_others_pass(self, vit: nn.Module) -> None:
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x).relu()

        for model in (vit, torch.fx.symbolic_trace(Network()), torch.compile(vit, backend="eager")):
            refuse_graphs(model)
