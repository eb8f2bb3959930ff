"""The matrices around attention that methods read: also of what stands in for a linear layer, and under hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make_images, make_model
from torch import Tensor, nn

from vitexplain import adapt, get_explainer

READERS = ("tokentm", "beyond_intuition")
"""Methods that read the weights around attention."""


class OwnLowRank(nn.Module):
    """LoRA as people write it: it tells nothing of the layer it stands in for, and counts on three axes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x).clone()
        result[:, :, :] += self.up(self.down(x))
        return result

    def merged(self) -> nn.Linear:
        layer = copy.deepcopy(self.base)
        with torch.no_grad():
            layer.weight += self.up.weight @ self.down.weight
            layer.bias += self.up.bias
        return layer


def double(family: str) -> Any:
    return make_model(family).double()


@pytest.mark.parametrize("kind", ["cls", "eva_rope"])
@pytest.mark.parametrize("name", READERS)
def test_low_rank_layers_that_say_nothing_of_themselves_count(name: str, kind: str) -> None:
    torch.manual_seed(0)
    merged, adapted, images = double(kind), double(kind), make_images(kind).double()
    for ours, theirs in zip(merged.blocks, adapted.blocks, strict=True):
        for part in ("qkv", "v_proj", "proj"):
            if getattr(theirs.attn, part, None) is not None:
                layer = OwnLowRank(getattr(theirs.attn, part)).double()
                setattr(theirs.attn, part, layer)
                setattr(ours.attn, part, layer.merged())
    expected = get_explainer(name, merged)(images, 1).scores
    torch.testing.assert_close(get_explainer(name, adapted)(images, 1).scores, expected)


def scaled(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 1.7 * output


def without_second_head(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    (state,) = arguments
    return (torch.cat([state[..., :8], torch.zeros_like(state[..., 8:16]), state[..., 16:]], -1),)


def scale_weights(layer: nn.Linear) -> None:
    layer.weight.mul_(1.7)
    layer.bias.mul_(1.7)


def clear_second_head(layer: nn.Linear) -> None:
    layer.weight[:, 8:16] = 0


@pytest.mark.parametrize(
    ("hooked", "changed"),
    [
        (lambda layer: layer.register_forward_hook(scaled), scale_weights),
        (lambda layer: layer.register_forward_pre_hook(without_second_head), clear_second_head),
    ],
)
@pytest.mark.parametrize("name", READERS)
def test_what_hooks_make_of_a_linear_layer_counts(
    name: str, hooked: Callable[[nn.Module], object], changed: Callable[[nn.Linear], None]
) -> None:
    ours, theirs, images = double("cls"), double("cls"), make_images("cls").double()
    for one, other in zip(ours.blocks, theirs.blocks, strict=True):
        hooked(one.attn.proj)
        with torch.no_grad():
            changed(other.attn.proj)
    expected = get_explainer(name, theirs)(images, 1).scores
    torch.testing.assert_close(get_explainer(name, ours)(images, 1).scores, expected)


def test_a_hook_that_multi_head_attention_never_calls_does_not_count() -> None:
    """It takes the weight of its output projection, and does not call it."""
    plain, hooked, images = make_model("own"), make_model("own"), make_images("own")
    for module in hooked.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.out_proj.register_forward_hook(scaled)
    expected = get_explainer("tokentm", plain)(images, 1).scores
    torch.testing.assert_close(get_explainer("tokentm", hooked)(images, 1).scores, expected)


@pytest.mark.parametrize("kind", ["differential", "own", "torchvision"])
def test_an_explainer_can_be_sent_to_another_process(kind: str) -> None:
    explainer, images = get_explainer("generic_attention", make_model(kind)), make_images(kind)
    sent = pickle.loads(pickle.dumps(explainer))
    torch.testing.assert_close(sent(images, 1).scores, explainer(images, 1).scores)


def test_a_copy_of_an_adapter_reads_the_weights_of_its_own_model() -> None:
    adapter = adapt(make_model("own"))
    copied = copy.deepcopy(adapter)
    expected = adapter.value_weight(0).clone()
    with torch.no_grad():
        for parameter in adapter.model.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied.value_weight(0), expected)
