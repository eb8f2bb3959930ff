"""What a watched forward pass tells about a model: its blocks and its patch grid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn

from ..errors import UnsupportedModelError
from ..layout import Arrangement
from .layer_scale import close
from .probe import AttentionCall, Forward, ModuleCall


@dataclass(frozen=True, eq=False)
class FoundBlock:
    """A block and its attention, as they were called, and the axes of its token states."""

    call: ModuleCall
    attention: AttentionCall
    arrangement: Arrangement = "BND"


def find_blocks(seen: Forward) -> list[FoundBlock]:
    """The repeated modules that each call self-attention once, in order.

    Raises:
        UnsupportedModelError: no attention was seen, its token count changes, or no repeated module holds it.
    """
    calls = [call for call in seen.attentions if call.operands.num_tokens == call.operands.num_keys]
    if not calls:
        raise UnsupportedModelError(
            "no attention was seen: the model calls neither scaled_dot_product_attention nor "
            "multi_head_attention_forward on image tokens, and multiplies no softmax with values. Switch it to one of "
            "them, or write a ModelAdapter"
        )
    counts = Counter(call.operands.num_tokens for call in calls)
    # before the last of them, others attend to a reduced set of tokens; behind it, they pool
    reduced = any(call.operands.num_tokens != call.operands.num_keys for call in seen.attentions[: _last(seen, calls)])
    if len(counts) > 1 or reduced or any(call.operands.shape[0] != 1 for call in calls):
        raise UnsupportedModelError(
            f"attention runs over {', '.join(map(str, counts))} tokens in {len(calls)} calls (in windows or stages"
            f"{', or onto fewer tokens' if reduced else ''}); expected one sequence of tokens from the first block to "
            "the last. Hierarchical models need a ModelAdapter"
        )
    axes = {call.operands.v.ndim for call in calls}
    if axes != {4}:
        raise UnsupportedModelError(
            f"attention is called on values of {', '.join(map(str, sorted(axes)))} axes (as in windows or stages); "
            "expected (B, H, N, dh), or (B·H, N, dh) with the heads of an image next to each other; write a "
            "ModelAdapter for anything else"
        )
    depth = 0
    while len(calls) > 1 and len({_at(call, depth) for call in calls}) == 1 and _at(calls[0], depth) is not None:
        depth += 1
    if len(calls) == 1:
        repeated = _list_elements(seen)
        depth = max((i for i, parent in enumerate(calls[0].parents) if id(parent.module) in repeated), default=-1)
    found = [FoundBlock(call.parents[depth], call) for call in calls if 0 <= depth < len(call.parents)]
    modules = {id(block.call.module) for block in found}
    if len(found) != len(calls) or len(modules) != len(calls):
        raise UnsupportedModelError(
            f"{len(calls)} attention calls were seen in {len(modules)} blocks; expected one call in each of a list of "
            "blocks that are modules of their own. Write a ModelAdapter"
        )
    return [_with_layout(block) for block in found]


def carries_stream(blocks: list[FoundBlock]) -> bool:
    """Whether blocks take what the one before put out; not where attention alone is a module, and residuals are not."""
    pairs = [(one.call.output, other.call.input) for one, other in pairwise(blocks)]
    return any(gave is not None and taken is not None and close(gave, taken) for gave, taken in pairs)


def _last(seen: Forward, calls: list[AttentionCall]) -> int:
    return max(index for index, call in enumerate(seen.attentions) if call is calls[-1])


def _with_layout(block: FoundBlock) -> FoundBlock:
    tokens = block.attention.operands.num_tokens
    shapes = {None if state is None else tuple(state.shape[:2]) for state in (block.call.input, block.call.output)}
    if shapes == {(1, tokens)}:
        return block
    if shapes == {(tokens, 1)}:
        return replace(block, arrangement="NBD")
    raise UnsupportedModelError(
        f"a {type(block.call.module).__name__} takes and gives tensors that begin with {shapes}; expected token states "
        "(B, N, D) or (N, B, D). Models that pass anything else between blocks need a ModelAdapter"
    )


def find_grid(seen: Forward, tokens: int) -> tuple[nn.Conv2d | None, tuple[int, int]]:
    """The patch convolution, if it reads the image itself and in its own size, and its output size (h, w).

    Raises:
        UnsupportedModelError: no convolution before the first attention makes at most `tokens` patches.
    """
    first = seen.attentions[0].start
    convolutions = [
        call
        for call in seen.modules
        if isinstance(call.module, nn.Conv2d) and call.start < first and call.output is not None
    ]
    if not convolutions:
        raise UnsupportedModelError(
            "no patch convolution was seen, so the patch grid is not known; write a ModelAdapter"
        )
    last = convolutions[-1]
    h, w = (int(side) for side in last.output.shape[-2:])  # type: ignore[union-attr]
    if h * w > tokens:
        raise UnsupportedModelError(
            f"attention runs over {tokens} tokens, but the patch convolution makes a grid of {h}×{w}; expected one "
            "token a patch. Models that merge or drop patches need a ModelAdapter"
        )
    whole, given = seen.modules[0].input, last.input
    as_it_is = whole is not None and given is not None and whole.shape[-2:] == given.shape[-2:]
    stem = last.module if len(convolutions) == 1 and as_it_is and isinstance(last.module, nn.Conv2d) else None
    return stem, (h, w)


def _at(call: AttentionCall, depth: int) -> ModuleCall | None:
    return call.parents[depth] if depth < len(call.parents) else None


def _list_elements(seen: Forward) -> set[int]:
    root = seen.modules[0].module
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return {id(element) for each in lists for element in each}
