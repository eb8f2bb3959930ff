"""What a watched forward pass tells about a model; each finding is verified on the numbers of that pass."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..layout import Arrangement
from .adapter import BlockModules
from .probe import AttentionCall, Forward, ModuleCall

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_LOOSE = 0.05  # half precisions


@dataclass(frozen=True, eq=False)
class FoundBlock:
    """A block and its attention, as they were called, and the axes of its token states."""

    call: ModuleCall
    attention: AttentionCall
    arrangement: Arrangement = "BND"


@dataclass(frozen=True, eq=False)
class Projections:
    """Linear maps around one block's attention; None where none verified.

    Attributes:
        heads: H.
        output: the module from the heads to the residual stream, with a weight (D, H·dh) and a bias.
        scale: (D,) LayerScale on top of it.
        value: gives (H·dh, D), from the attention input to the values. Asked when needed: a model may be moved or
            converted after it was watched.
    """

    heads: int
    output: nn.Linear | None = None
    scale: Tensor | None = None
    value: Callable[[], Tensor] | None = None


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
    if len(counts) > 1 or reduced or any(call.operands.shape[0] != 1 or call.operands.v.ndim != 4 for call in calls):
        raise UnsupportedModelError(
            f"attention runs over {', '.join(map(str, counts))} tokens in {len(calls)} calls (in windows or stages"
            f"{', or onto fewer tokens' if reduced else ''}); expected one sequence of tokens from the first block to "
            "the last. Hierarchical models need a ModelAdapter"
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
    """The patch convolution, if it reads the image itself, and its output size (h, w).

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
    stem = last.module if len(convolutions) == 1 and isinstance(last.module, nn.Conv2d) else None
    return stem, (h, w)


def find_pool(seen: Forward, tokens: int, prefix: int) -> nn.Module | None:
    """The module in which a head's queries attend to the final tokens; None for heads without attention."""
    calls = [
        call
        for call in seen.attentions
        if call.operands.num_tokens != tokens and call.operands.num_keys in (tokens, tokens - prefix)
    ]
    return calls[-1].parents[-1].module if calls else None


def find_projections(seen: Forward, block: FoundBlock) -> Projections:
    """The linear maps into the values and out of the heads, recognised by what they were given and gave."""
    attention = block.attention
    heads, around = attention.operands.shape[1], attention.parents[-1].module
    merged = attention.output.transpose(1, 2).flatten(2)
    values = attention.operands.v.transpose(1, 2).flatten(2)
    if isinstance(around, nn.MultiheadAttention):
        packed = around.in_proj_weight is not None

        def value_of() -> Tensor:
            return around.in_proj_weight.chunk(3)[2] if packed else around.v_proj_weight

        return Projections(heads, around.out_proj, None, value_of)
    output: nn.Linear | None = None
    value: Callable[[], Tensor] | None = None
    for call in _inside(seen, block.call):
        if not isinstance(call.module, nn.Linear) or call.input is None or call.output is None:
            continue
        if call.start > attention.start and output is None and _close(call.input, merged):
            output = call.module
        if call.start < attention.start:
            for share in (1, 3):  # a projection of its own, or the last third of one for q, k and v
                if call.output.shape[-1] == share * values.shape[-1] and _close(
                    call.output.chunk(share, -1)[-1], values
                ):
                    value = functools.partial(_last_part, call.module, share)
    return Projections(heads, output, None, value)


def _last_part(module: nn.Linear, share: int) -> Tensor:
    return module.weight.chunk(share)[-1]


def find_states(seen: Forward, block: FoundBlock, projections: Projections) -> tuple[BlockModules, Projections]:
    """Where the block is tapped, and its projections with LayerScale: what was added over what was projected."""
    call, attention = block.call, block.attention
    outer = attention.parents[-1]
    source = None
    for each in _inside(seen, call):
        ends_before = each.start < outer.start and each not in outer.parents
        if ends_before and each.output is not None and outer.input is not None and _close(each.output, outer.input):
            source = each.module
    mid = None
    if projections.output is not None and call.input is not None:
        output = projections.output
        projected = F.linear(attention.output.transpose(1, 2).flatten(2), output.weight, output.bias).detach()
        if block.arrangement == "NBD":
            projected = projected.transpose(0, 1)
        for each in _inside(seen, call):
            if each.start < attention.start or each.input is None or each.input.shape != call.input.shape:
                continue
            added = each.input - call.input
            scale = (added * projected).sum((0, 1)) / (projected * projected).sum((0, 1)).clamp(min=1e-30)
            if _close(added, scale * projected, stream=each.input):
                mid = each.module
                projections = replace(projections, scale=_layer_scale(call.module, scale))
                break
    around = attention.parents[-1].module
    modules = BlockModules(call.module, around, attention_input=source, mid=mid, arrangement=block.arrangement)
    return modules, projections


def _layer_scale(block: nn.Module, measured: Tensor) -> Tensor | None:
    """The block's own parameter that a measured ratio is nearest to, if it is near; None for no scaling."""
    ones = torch.ones_like(measured)
    own = [each for each in block.parameters() if each.shape == measured.shape]
    nearest = min([ones, *own], key=lambda each: (each - measured).abs().float().mean().item())
    if not _close(nearest, measured):
        return measured
    return None if nearest is ones else nearest


def _close(a: Tensor, b: Tensor, stream: Tensor | None = None) -> bool:
    """Whether two tensors hold the same numbers, up to the rounding of their precision.

    `stream` is what they were subtracted from: in half precision its rounding is what is left of small additions.
    """
    if a.shape != b.shape:
        return False
    half = a.dtype not in _TOLERANCE
    size = (stream if half and stream is not None else b).abs().max().item()
    return (a - b).abs().max().item() <= _TOLERANCE.get(a.dtype, _LOOSE) * max(size, 1e-12)


def _inside(seen: Forward, outer: ModuleCall) -> list[ModuleCall]:
    return [call for call in seen.modules if outer in call.parents]


def _at(call: AttentionCall, depth: int) -> ModuleCall | None:
    return call.parents[depth] if depth < len(call.parents) else None


def _list_elements(seen: Forward) -> set[int]:
    root = seen.modules[0].module
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return {id(element) for each in lists for element in each}
