"""A watch on torch calls that hooks switch on and off: off again whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make_images, make_model
from torch.overrides import _get_current_function_mode_stack

from vitexplain import get_explainer
from vitexplain.scoped_mode import ScopedMode


class Watch(ScopedMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_calls_are_seen_between_on_and_off() -> None:
    number = torch.ones(2)
    with Watch() as watch:
        torch.add(number, 1)
        assert watch.calls == 0
        for _ in range(2):  # on is on
            watch.switch(True)
        torch.add(number, 1)
        assert watch.calls == 1
        for _ in range(2):
            watch.switch(False)
        torch.add(number, 1)
        assert watch.calls == 1
        watch.switch(True)
    torch.add(number, 1)
    assert watch.calls == 1
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("name", ["generic_attention", "rollout", "transformer_attribution"])
@pytest.mark.parametrize("place", ["attn", "attn.qkv", "mlp"])
def test_nothing_watches_after_an_interrupt(error: type[BaseException], name: str, place: str) -> None:
    model, images = make_model("cls"), make_images("cls")
    explainer = get_explainer(name, model)

    def interrupt(*_: Any) -> None:
        raise error

    handle = model.blocks[-1].get_submodule(place).register_forward_hook(interrupt)
    with pytest.raises(error):
        explainer(images)
    assert not _get_current_function_mode_stack()
    handle.remove()
    assert explainer(images).scores.isfinite().all()
