"""Scores of single blocks: what a reading of each block's own output says, and how its own attention moves that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import AttentionOperands
from .capture import Capture
from .combination import Combination
from .layout import from_tokens, to_tokens
from .modified_backward import BackwardRules
from .needs import SCORED_STATES, Needs
from .record import BlockRecord
from .tap import AttentionTap

RECORDED = Needs(attention=True, states=SCORED_STATES)
"""What a capture keeps of the blocks that are scored, so that they need not be computed a second time."""

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_LOOSE = 0.05  # half precisions


def score_blocks(
    capture: Capture,
    count: int,
    score: Callable[[Tensor], Tensor],
    reads: int | None = None,
    backward: BackwardRules | None = None,
) -> list[BlockRecord]:
    """The last blocks, each with the gradient of the score of its own output at its own attention.

    One backward from all scores together: it passes each block once, and goes no further down than that. A capture with
    `Needs.apart` holds the graphs for it. Otherwise a block whose input, output and attention were captured (see
    `RECORDED`) is computed again for the tokens that the score reads alone, its attention's output given, since behind
    the attention of a plain block no token sees another; with a CLS head that is one token. Blocks for which this does
    not give back what was captured (windows, feed-forward branches that mix tokens, attention written by hand), or of
    which less was captured, cost one more forward of the model.

    Args:
        capture: after its forward pass.
        count: how many blocks; all where there are fewer.
        score: maps the tokens (B, N, D) that leave a block to one score an image (B,), differentiably.
        reads: how many of the first tokens the score reads, which then may be given those (B, reads, D) alone; None
            for all.
        backward: the rules by which the gradient goes back through the block, from its output; None for the derivative.

    Returns:
        Records of the last `count` blocks, from the lower to the upper, with attention and its gradient.

    Raises:
        UnsupportedModelError: the blocks compute something for which `backward` has no rule.
    """
    records, needs = capture.blocks[-count:], capture.needs
    reads = capture.layouts[-1].count if reads is None else reads
    if needs.backward == backward and all(each.leaving is not None for each in records):
        return _apart(capture, len(records), score)
    if needs.attention and RECORDED.states <= needs.kept_states and records[0].index >= needs.from_block:
        found = _computed_again(records, score, reads, backward)
        if found is not None:
            return found
    with Capture(capture.adapter, Needs(apart=len(records), backward=backward)) as local:
        local.forward(capture.images.detach())
        return _apart(local, len(records), score)


def _apart(capture: Capture, count: int, score: Callable[[Tensor], Tensor]) -> list[BlockRecord]:
    """The last blocks with their gradients, on whose graphs the capture holds."""
    records = capture.blocks[-count:]
    with torch.enable_grad():
        total = torch.stack([score(cast(Tensor, each.leaving)) for each in records]).sum()
    capture.backward(total, retain_graph=True)  # a further target asks again, and has gradients of its own
    return [replace(each, _output_gradients=dict(each._output_gradients)) for each in records]


def _computed_again(
    records: Sequence[BlockRecord], score: Callable[[Tensor], Tensor], reads: int, backward: BackwardRules | None
) -> list[BlockRecord] | None:
    """The blocks with their gradients, by one backward from all scores together; None where blocks do otherwise."""
    replays: list[_Replay] = []
    for record in records:
        replay = _Replay.of(record, reads, backward)
        if replay is None or not replay.gives_back(record):
            return None
        replays.append(replay)
    with torch.enable_grad():
        leaving = [replay.leaving(record) for replay, record in zip(replays, records, strict=True)]
        total = torch.stack([score(each) for each in leaving]).sum()
    gradients = torch.autograd.grad(total, [each.attended for each in replays])
    return [_with_gradient(record, each) for record, each in zip(records, gradients, strict=True)]


def _with_gradient(record: BlockRecord, gradient: Tensor) -> BlockRecord:
    """A block with the gradient at the output of its attention; none reached the other tokens."""
    rest = record.operands.num_tokens - gradient.shape[2]
    return replace(record, _output_gradients={0: F.pad(gradient, (0, 0, 0, rest))})


class _Replay(NamedTuple):
    """A block computed again from the output of its attention on, for its first tokens.

    Attributes:
        attended: output of its attention (B, H, T, dh), the leaf of the graph.
        output: the first tokens (B, T, D) that leave the block.
    """

    attended: Tensor
    output: Tensor

    @classmethod
    def of(cls, record: BlockRecord, reads: int, backward: BackwardRules | None) -> _Replay | None:
        """Computes the first `reads` tokens again; None where the block cannot be called so."""
        modules = record.modules
        plain = type(modules.combination) is Combination and modules.arrangement in ("BND", "NBD")
        operands = record.operands if plain and record.windows is None else None
        if not isinstance(operands, AttentionOperands):
            return None
        attended = _attended(operands, reads).requires_grad_(True)
        batch, arrangement = len(attended), modules.arrangement
        tap, given = AttentionTap(batch), lambda *_: attended
        handles = tap.watch(modules.attention, given, given)
        states = record.state("in")[:, :reads].to(attended.dtype)
        rules = nullcontext() if backward is None else backward.watching(batch, arrangement)
        try:
            with rules, tap, torch.enable_grad():
                found = modules.block(from_tokens(states, arrangement, states.shape))
                output = to_tokens(found[0] if isinstance(found, tuple) else found, arrangement)
        except Exception:  # whatever a block says that is called otherwise than its model calls it
            return None
        finally:
            for handle in handles:
                handle.remove()
        return cls(attended, output) if output.requires_grad else None

    def gives_back(self, record: BlockRecord) -> bool:
        """Whether the tokens are those that left the block."""
        expected = record.state("out")[:, : self.attended.shape[2]]
        return self.output.shape == expected.shape and _near(self.output.detach(), expected)

    def leaving(self, record: BlockRecord) -> Tensor:
        """The tokens that left the block (B, T, D), on the graph of those computed again."""
        return record.state("out")[:, : self.attended.shape[2]] + (self.output - self.output.detach())


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
