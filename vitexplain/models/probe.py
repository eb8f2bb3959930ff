"""Watching one forward pass of an unknown model: who computes attention, on what, and what happens around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Attention
from ..borrowing import borrowed
from ..tap import AttentionTap
from .adapter import ModelAdapter


@dataclass(eq=False)
class ModuleCall:
    """One call of one module.

    Attributes:
        module: the module.
        input: its first tensor argument, or None.
        output: its output, or the first tensor of it; None while it runs and for outputs without tensors.
        start: position of the call among all events of the forward.
        parents: the calls it was made in, outermost first.
    """

    module: nn.Module
    input: Tensor | None
    start: int
    parents: tuple[ModuleCall, ...]
    output: Tensor | None = None


@dataclass(eq=False)
class AttentionCall:
    """One attention call.

    Attributes:
        operands: the attention, with its values (B, H, N, dh).
        output: O (B, H, N, dh).
        start: position among all events of the forward.
        parents: the module calls it was made in, outermost first.
    """

    operands: Attention
    output: Tensor
    start: int
    parents: tuple[ModuleCall, ...]


@dataclass(eq=False)
class Forward:
    """Everything that was seen in one forward pass, in order.

    Attributes:
        modules: the module calls.
        attentions: the attention calls.
        stacked: some attention came with images and heads in one axis.
    """

    modules: list[ModuleCall] = field(default_factory=list)
    attentions: list[AttentionCall] = field(default_factory=list)
    stacked: bool = False


@contextlib.contextmanager
def watched(model: nn.Module, batch: int = 1) -> Iterator[Forward]:
    """Records every module call and every attention call of a forward of `batch` images; leaves nothing behind."""
    seen = Forward()
    stack: list[ModuleCall] = []
    events = 0

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal events
        events += 1
        call = ModuleCall(module, first_tensor((*arguments, *named.values())), events, tuple(stack))
        seen.modules.append(call)
        stack.append(call)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        stack.pop().output = first_tensor(output)

    def attended(operands: Attention, tracked: Tensor) -> Tensor:
        nonlocal events
        events += 1
        seen.attentions.append(AttentionCall(operands, operands.output(tracked), events, tuple(stack)))
        return tracked

    tap = AttentionTap(batch)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(torch.inference_mode(False))
        hooks.enter_context(borrowed(model))
        for handle in tap.watch(model, attended):
            hooks.callback(handle.remove)
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        hooks.enter_context(tap)
        yield seen
        seen.stacked = tap.stacked


def watch(adapter: ModelAdapter, images: Tensor) -> Forward:
    """What is seen in one forward of the adapter's model, without a graph.

    Raises:
        UnsupportedModelError: the model cannot be run on such images.
    """
    with torch.no_grad(), adapter.prepared(), watched(adapter.model, len(images)) as seen:
        adapter.run(images)
    return seen


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a tensor, tuple, list or output object."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list):
        return next((each for each in value if isinstance(each, Tensor)), None)
    if hasattr(value, "to_tuple"):
        return first_tensor(value.to_tuple())
    return None
