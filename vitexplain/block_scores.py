"""Scores of single blocks: what a reading of each block's own output says, and how its own attention moves that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import AttentionOperands
from .capture import Capture
from .combination import Combination
from .layout import from_tokens, to_tokens
from .models.adapter import BlockModules
from .record import BlockRecord, Needs
from .tap import AttentionTap

RECORDED = Needs(attention=True, states=frozenset({"in", "out"}))
"""What a capture keeps of the blocks that are scored, so that they need not be computed a second time."""

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_LOOSE = 0.05  # half precisions


def score_blocks(
    capture: Capture, count: int, score: Callable[[Tensor], Tensor], reads: int | None = None
) -> list[BlockRecord]:
    """The last blocks, each with the gradient of the score of its own output at its own attention.

    One backward from all scores together: it passes each block once, and goes no further down than that. Behind the
    attention of a plain block no token sees another, so a block whose input, output and attention were captured (see
    `RECORDED`) is computed again for the tokens that the score reads alone, its attention's output given; with a CLS
    head that is one token. Blocks for which this does not give back what was captured (windows, feed-forward branches
    that mix tokens, attention written by hand), or of which less was captured, cost one more forward of the model, in
    which the graph is cut behind every block.

    Args:
        capture: after its forward pass.
        count: how many blocks; all where there are fewer.
        score: maps the tokens (B, N, D) that leave a block to one score an image (B,), differentiably.
        reads: how many of the first tokens the score reads, which then may be given those (B, reads, D) alone; None
            for all.

    Returns:
        Records of the last `count` blocks, from the lower to the upper, with attention and its gradient.
    """
    records = capture.blocks[-count:]
    replays = _replays(capture, records, capture.layouts[-1].count if reads is None else reads)
    if replays is None:
        return _second_forward(capture, len(records), score)
    with torch.enable_grad():
        total = torch.stack([score(each.output) for each in replays]).sum()
    gradients = torch.autograd.grad(total, [each.attended for each in replays])
    return [each.record_with(gradient) for each, gradient in zip(replays, gradients, strict=True)]


def _replays(capture: Capture, records: Sequence[BlockRecord], reads: int) -> list[_Replay] | None:
    """All the blocks computed again, or None."""
    needs = capture.needs
    if not (needs.any_attention and RECORDED.states <= needs.kept_states and records[0].index >= needs.from_block):
        return None
    found: list[_Replay] = []
    for record in records:
        replay = _Replay.of(record, reads)
        if replay is None:
            return None
        found.append(replay)
    return found


class _Replay(NamedTuple):
    """A block computed again from the output of its attention on, for its first tokens.

    Attributes:
        record: the block as it was captured.
        attended: output of its attention (B, H, T, dh), the leaf of the graph.
        output: the first tokens (B, T, D) that leave the block.
    """

    record: BlockRecord
    attended: Tensor
    output: Tensor

    @classmethod
    def of(cls, record: BlockRecord, reads: int) -> _Replay | None:
        """Computes the first `reads` tokens again; None where that is not what the block did."""
        modules = record.modules
        plain = type(modules.combination) is Combination and modules.arrangement in ("BND", "NBD")
        operands = record.operands if plain and record.windows is None else None
        if not isinstance(operands, AttentionOperands):
            return None
        attended = _attended(operands, reads).requires_grad_(True)
        tap, given = AttentionTap(len(attended)), lambda *_: attended
        handles = tap.watch(modules.attention, given, given)
        states = record.state("in")[:, :reads].to(attended.dtype)
        try:
            with tap, torch.enable_grad():
                found = modules.block(from_tokens(states, modules.arrangement, states.shape))
                output = to_tokens(found[0] if isinstance(found, tuple) else found, modules.arrangement)
        except Exception:  # whatever a block says that is called otherwise than its model calls it
            return None
        finally:
            for handle in handles:
                handle.remove()
        expected = record.state("out")[:, :reads]
        same = output.shape == expected.shape and _near(output.detach(), expected)
        return cls(record, attended, output) if same and output.requires_grad else None

    def record_with(self, gradient: Tensor) -> BlockRecord:
        """The block's record, with the gradient at the output of its attention; none reached the other tokens."""
        rest = self.record.operands.num_tokens - gradient.shape[2]
        return replace(self.record, _output_gradients={0: F.pad(gradient, (0, 0, 0, rest))})


def _attended(operands: AttentionOperands, rows: int) -> Tensor:
    """The first rows of the attention's output (B, H, T, dh)."""
    bias = operands.bias
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., :rows, :]
    q = operands.q[:, :, :rows]
    return F.scaled_dot_product_attention(q, operands.k, operands.v, attn_mask=bias, scale=operands.scale)


def _near(found: Tensor, expected: Tensor) -> bool:
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return bool((found - expected).abs().max() <= _TOLERANCE.get(found.dtype, _LOOSE) * largest)


def _second_forward(capture: Capture, count: int, score: Callable[[Tensor], Tensor]) -> list[BlockRecord]:
    blocks = capture.adapter.blocks[-count:]
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for modules in blocks:
            hook = _keep_and_cut(modules, outputs, cut=modules is not blocks[-1])
            stack.callback(modules.block.register_forward_hook(hook).remove)
        needs = Needs(attention_gradient=True, from_block=len(capture.blocks) - count)
        local = stack.enter_context(Capture(capture.adapter, needs))
        local.forward(capture.images.detach())
        local.backward(torch.stack([score(each) for each in outputs]).sum())
    return local.blocks[-count:]


def _keep_and_cut(modules: BlockModules, outputs: list[Tensor], *, cut: bool) -> Callable[..., Any]:
    """A forward hook that keeps the block's output on its graph; what the model goes on with is off it, if cut."""

    def keep(_: Any, __: Any, output: Any) -> Any:
        state, *rest = output if isinstance(output, tuple) else (output,)
        outputs.append(to_tokens(state, modules.arrangement))
        state = state.detach() if cut else state
        return (state, *rest) if isinstance(output, tuple) else state

    return keep
