"""Models are borrowed: what is switched off for a call is off inside, and on again behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_images, make_model
from torch import nn

from vitexplain import get_explainer
from vitexplain.borrowing import attributes_set, borrowed


def test_everything_is_put_back_after_an_error() -> None:
    model: Any = make_model("cls")
    model.train()
    model.blocks[0].eval()
    model.blocks[1].grad_checkpointing = True
    model.blocks[2].requires_grad_(False)
    before = [(module.training, getattr(module, "grad_checkpointing", None)) for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), borrowed(model):  # noqa: PT012 - what holds inside is asked inside
        assert not any(module.training or getattr(module, "grad_checkpointing", False) for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
    assert before == [(module.training, getattr(module, "grad_checkpointing", None)) for module in model.modules()]
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["legrad", "generic_attention", "gradcam", "transformer_attribution", "rollout"])
@pytest.mark.parametrize("whole", [False, True])
def test_modules_that_were_compiled_in_place_are_explained_as_they_are(name: str, whole: bool) -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = get_explainer(name, model)(images, 1).scores
    compiled: list[nn.Module] = [model] if whole else list(model.blocks)  # type: ignore[arg-type]
    for module in compiled:
        module.compile(backend="eager")
    with torch.no_grad():
        model(images)  # compiled now
    calls = [module._compiled_call_impl for module in compiled]
    torch.testing.assert_close(get_explainer(name, model)(images, 1).scores, expected)
    assert [module._compiled_call_impl for module in compiled] == calls


class _Linked:
    """Writing its attribute writes that of what it holds, as a configuration does with those of its parts."""

    def __init__(self, own: str, *parts: _Linked) -> None:
        self._own, self._parts = own, parts

    @property
    def kind(self) -> str:
        return self._own

    @kind.setter
    def kind(self, value: str) -> None:
        self._own = value
        for part in self._parts:
            part.kind = value


@pytest.mark.parametrize("own", [("eager", "fused"), ("fused", "eager"), ("eager", "eager"), ("fused", "fused")])
def test_attributes_that_write_each_other_are_put_back(own: tuple[str, str]) -> None:
    part = _Linked(own[1])
    whole = _Linked(own[0], part)
    with attributes_set([whole, part], "kind", "fused"):
        assert (whole.kind, part.kind) == ("fused", "fused")
    assert (whole.kind, part.kind) == own
