"""Scores of single blocks: what a reading of each block's own output says, and how its own attention moves that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .capture import Capture
from .layout import to_tokens
from .models.adapter import BlockModules
from .record import BlockRecord, Needs


def score_blocks(capture: Capture, count: int, score: Callable[[Tensor], Tensor]) -> list[BlockRecord]:
    """The last blocks, each with the gradient of the score of its own output at its own attention.

    One more forward, in which the graph is cut behind every block, and one backward from all scores together: it passes
    each block once, and goes no further down than that.

    Args:
        capture: after its forward pass.
        count: how many blocks; all where there are fewer.
        score: maps the tokens (B, N, D) that leave a block to one score an image (B,), differentiably.

    Returns:
        Records of the last `count` blocks, from the lower to the upper, with attention and its gradient.
    """
    blocks = capture.adapter.blocks[-count:]
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for modules in blocks:
            hook = _keep_and_cut(modules, outputs, cut=modules is not blocks[-1])
            stack.callback(modules.block.register_forward_hook(hook).remove)
        needs = Needs(attention_gradient=True, from_block=len(capture.blocks) - len(blocks))
        local = stack.enter_context(Capture(capture.adapter, needs))
        local.forward(capture.images.detach())
        local.backward(torch.stack([score(each) for each in outputs]).sum())
    return local.blocks[-len(blocks) :]


def _keep_and_cut(modules: BlockModules, outputs: list[Tensor], *, cut: bool) -> Callable[..., Any]:
    """A forward hook that keeps the block's output on its graph; what the model goes on with is off it, if cut."""

    def keep(_: Any, __: Any, output: Any) -> Any:
        state, *rest = output if isinstance(output, tuple) else (output,)
        outputs.append(to_tokens(state, modules.arrangement))
        state = state.detach() if cut else state
        return (state, *rest) if isinstance(output, tuple) else state

    return keep
