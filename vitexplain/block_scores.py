"""Scores of single blocks: what a reading of each block's own output says, and how its own attention moves that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import AttentionOperands
from .capture import Capture
from .combination import Combination
from .layout import from_tokens, to_tokens
from .models.adapter import BlockModules
from .modified_backward import BackwardRules, on_graph, with_pullback
from .record import BlockRecord, Needs
from .tap import AttentionTap

RECORDED = Needs(attention=True, states=frozenset({"in", "out"}))
"""What a capture keeps of the blocks that are scored, so that they need not be computed a second time."""

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_LOOSE = 0.05  # half precisions
_TRIED = 4  # patches

_Build = tuple[object, ...]
"""What blocks have in common that compute in the same way."""


def score_blocks(
    capture: Capture,
    count: int,
    score: Callable[[Tensor], Tensor],
    reads: int | None = None,
    backward: BackwardRules | None = None,
) -> list[BlockRecord]:
    """The last blocks, each with the gradient of the score of its own output at its own attention.

    One backward from all scores together: it passes each block once, and goes no further down than that. Behind the
    attention of a plain block no token sees another, so a block whose input, output and attention were
    captured (see `RECORDED`) is computed again for the tokens that the score reads alone, its attention's output given;
    with a CLS head that is one token. Of many tokens, only the values on which a gradient depends are computed again;
    see `_LinearMaps`. Blocks for which this does not give back what was captured (windows, feed-forward branches that
    mix tokens, attention written by hand), or of which less was captured, cost one more forward of the model, in which
    the graph is cut behind every block.

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
    if needs.any_attention and RECORDED.states <= needs.kept_states and records[0].index >= needs.from_block:
        for shortened in (True, False):
            found = _computed_again(records, score, reads, backward, shortened)
            if found is not None:
                return found
    return _second_forward(capture, len(records), score, backward)


def _computed_again(
    records: Sequence[BlockRecord],
    score: Callable[[Tensor], Tensor],
    reads: int,
    backward: BackwardRules | None,
    shortened: bool,
) -> list[BlockRecord] | None:
    """The blocks with their gradients, by one backward from all scores together; None where blocks do otherwise.

    If `shortened`, what is left out in computing many tokens again is tried on a few, in one block of each build: they
    have to leave the block as they did, and to have the gradient that they have with nothing left out.
    """
    replays: list[_Replay] = []
    trials: dict[int, _Replay] = {}
    last: dict[_Build, int] = {}
    for place, record in enumerate(records):
        few, build, linear = record.layout.prefix + _TRIED, _build(record.modules.block), None
        if shortened and few < reads:
            if build not in last:
                linear = _LinearMaps()
                trial = _Replay.of(record, few, backward, linear)
                if trial is None or not trial.gives_back(record):
                    return None
                trials[place], last[build] = trial, linear.seen
            linear = _LinearMaps(last[build])
        replay = _Replay.of(record, reads, backward, linear)
        if replay is None or not (linear or replay.gives_back(record)):
            return None
        replays.append(replay)
    with torch.enable_grad():
        leaving = [replay.leaving(record) for replay, record in zip(replays, records, strict=True)]
        total = torch.stack([score(each) for each in leaving]).sum()
    gradients = torch.autograd.grad(total, [*(each.attended for each in replays), *leaving])
    for place, trial in trials.items():
        expected = trial.gradient(gradients[len(records) + place])
        if not _near(gradients[place][:, :, : expected.shape[2]], expected):
            return None
    return [_with_gradient(record, each) for record, each in zip(records, gradients[: len(records)], strict=True)]


def _with_gradient(record: BlockRecord, gradient: Tensor) -> BlockRecord:
    """A block with the gradient at the output of its attention; none reached the other tokens."""
    rest = record.operands.num_tokens - gradient.shape[2]
    return replace(record, _output_gradients={0: F.pad(gradient, (0, 0, 0, rest))})


def _build(block: nn.Module) -> _Build:
    """What a block is made of; like no other's where somebody reaches into it."""
    parts = list(block.modules())
    changed = any(each._forward_hooks or each._forward_pre_hooks or "forward" in vars(each) for each in parts)
    return (*(type(each) for each in parts), *([id(block)] if changed else []))


class _LinearMaps(TorchFunctionMode):
    """Leaves out what a gradient at attention's output does not need of a block's linear maps.

    Those before attention, whose output is given, and the last one behind it, whose value nothing but the output
    depends on, get zeros for values. Where one and the same gradient arrives at all tokens, as from their mean, it goes
    back through a map once.

    Args:
        last: the number of the last map behind attention; 0 leaves nothing out.

    Attributes:
        seen: how many maps behind attention came by.
    """

    def __init__(self, last: int = 0) -> None:
        super().__init__()
        self.seen, self._last = 0, last

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is not F.linear:
            return func(*args, **named)
        given = dict(zip(("input", "weight"), args, strict=False)) | named
        state, weight = given["input"], given["weight"]
        behind = on_graph(state)
        self.seen += behind
        if self._last == 0 or on_graph(weight):
            return func(*args, **named)
        shape = (*state.shape[:-1], len(weight))
        if not behind:
            return state.new_zeros(()).expand(shape)

        def compute() -> Tensor:
            value: Tensor = state.new_zeros(shape) if self.seen == self._last else func(*args, **named)
            return value

        return with_pullback(compute, lambda gradient: (_transposed(gradient, weight),), state)


def _transposed(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient · weight; one row an image where all tokens (B, N, D) have the same gradient."""
    first = gradient[:, :1]
    if gradient.ndim == 3 and torch.equal(gradient[:, -1:], first) and bool((gradient == first).all()):
        return (first @ weight).expand(*gradient.shape[:-1], weight.shape[1])
    return gradient @ weight


class _Replay(NamedTuple):
    """A block computed again from the output of its attention on, for its first tokens.

    Attributes:
        attended: output of its attention (B, H, T, dh), the leaf of the graph.
        output: the first tokens (B, T, D) that leave the block.
    """

    attended: Tensor
    output: Tensor

    @classmethod
    def of(
        cls, record: BlockRecord, reads: int, backward: BackwardRules | None, linear: _LinearMaps | None = None
    ) -> _Replay | None:
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
            with rules, linear or nullcontext(), tap, torch.enable_grad():
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

    def gradient(self, arriving: Tensor) -> Tensor:
        """The gradient at the output of attention, of one (B, N, D) that arrives at the tokens."""
        part = arriving[:, : self.output.shape[1]].to(self.output.dtype)
        torch.autograd.backward(self.output, part, inputs=[self.attended])
        return cast(Tensor, self.attended.grad)


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


def _second_forward(
    capture: Capture, count: int, score: Callable[[Tensor], Tensor], backward: BackwardRules | None
) -> list[BlockRecord]:
    blocks = capture.adapter.blocks[-count:]
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for modules in blocks:
            hook = _keep_and_cut(modules, outputs, cut=modules is not blocks[-1])
            stack.callback(modules.block.register_forward_hook(hook).remove)
        needs = Needs(attention_gradient=True, from_block=len(capture.blocks) - count, backward=backward)
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
