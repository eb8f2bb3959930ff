"""Inside one block of a watched forward pass: the linear maps around its attention, and where token states are.

Each finding is verified on the numbers of that pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import BlockModules, linear_weight
from .findings import FoundBlock
from .layer_scale import Joined, close
from .probe import Forward, ModuleCall


@dataclass(frozen=True, eq=False)
class Projections:
    """Linear maps around one block's attention; None where none verified.

    They are functions, asked when needed: a model may be moved, converted or trained after it was watched.

    Attributes:
        heads: H.
        output: gives (D, H·dh), from the heads to the residual stream, without the LayerScale on top of it.
        value: gives (H·dh, D), from the attention input to the values.
        input_known: whether it is known where attention takes its input.
    """

    heads: int
    output: Callable[[], Tensor] | None = None
    value: Callable[[], Tensor] | None = None
    input_known: bool = True


@dataclass(frozen=True, eq=False)
class _LinearMap:
    """A linear map as it was seen at work.

    Attributes:
        weight: gives its matrix.
        call: the call of its module.
        given: what was multiplied, as the module had it.
        gave: what came of it (1, N, …), bias included.
        alone: whether nothing else of the attention takes the same input.
    """

    weight: Callable[[], Tensor]
    call: ModuleCall
    given: Tensor
    gave: Tensor
    alone: bool = False


def describe(seen: Forward, block: FoundBlock) -> tuple[BlockModules, Projections, Joined | None]:
    """Where the block is tapped, the linear maps around its attention, and how what they gave joined the stream."""
    value, output = _find_value(seen, block), _find_output(seen, block)
    source, taken, known = _find_input(seen, block, value)
    joined = None if output is None else _find_joined(seen, block, output.gave)
    mid = None if joined is None else joined.mid
    around = block.attention.parents[-1].module
    modules = BlockModules(block.call.module, around, source, mid, arrangement=block.arrangement, taken=taken)
    projections = Projections(
        heads=block.attention.operands.shape[1],
        output=None if output is None else output.weight,
        value=None if value is None else value.weight,
        input_known=known,
    )
    return modules, projections, joined


def _find_value(seen: Forward, block: FoundBlock) -> _LinearMap | None:
    """The map that made the values; or the last third of one that made queries, keys and values."""
    attention = block.attention
    around, values = attention.parents[-1], attention.operands.v.transpose(1, 2).flatten(2)
    if isinstance(around.module, nn.MultiheadAttention):
        return _multi_head_value(around, values)
    for call, given, gave in _token_maps(seen, block):
        for parts in (1, 3):
            last = _rows(gave, values).chunk(parts, -1)[-1]
            if call.start < attention.start and close(last, values) and _affine(call.module, given, gave):
                weight = partial(_last_part, call.module, given.shape[-1], parts)
                return _LinearMap(weight, call, given, last, alone=parts == 3)
    return None


def _multi_head_value(around: ModuleCall, values: Tensor) -> _LinearMap | None:
    module: Any = around.module
    weight = partial(_value_part, module)
    bias = None if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[2]
    given = around.input
    if given is None or given.shape[-1] != weight().shape[1]:
        return None
    if not close(F.linear(_rows(given, values), weight(), bias), values):
        return None
    return _LinearMap(weight, around, given, values)


def _find_output(seen: Forward, block: FoundBlock) -> _LinearMap | None:
    """The map from the heads, side by side, to the residual stream."""
    attention = block.attention
    around, merged = attention.parents[-1], attention.output.transpose(1, 2).flatten(2)
    width = merged.shape[-1]
    if isinstance(around.module, nn.MultiheadAttention):
        module: Any = around.module.out_proj
        projected = F.linear(merged, module.weight, module.bias)
        if around.output is None or not close(_rows(around.output, merged), projected):
            return None
        return _LinearMap(partial(_own_weight, module), around, merged, projected)
    for call, given, gave in _token_maps(seen, block):
        if call.start > attention.start and close(_rows(given, merged), merged) and _affine(call.module, given, gave):
            return _LinearMap(partial(linear_weight, call.module, width), call, given, _rows(gave, merged))
    return None


def _find_input(
    seen: Forward, block: FoundBlock, value: _LinearMap | None
) -> tuple[nn.Module | None, nn.Module | None, bool]:
    """The module whose output attention takes; else the one whose input it takes; and whether it is known at all."""
    taker = block.attention.parents[-1] if value is None else value.call
    if taker is block.call or taker.input is None:
        return None, None, False
    source = None
    for each in _inside(seen, block.call):
        before = each.start < taker.start and each not in taker.parents
        if before and _once(seen, each) and each.output is not None and close(each.output, taker.input):
            source = each.module
    if source is not None:
        return source, None, True
    if block.call.input is not None and close(taker.input, block.call.input):
        return None, None, True
    alone = value is not None and value.alone
    return None, taker.module if alone else None, alone


def _find_joined(seen: Forward, block: FoundBlock, projected: Tensor) -> Joined | None:
    """The first module that takes the stream with what was projected, each channel scaled, if at all."""
    stream = block.call.input
    if stream is None:
        return None
    projected = projected if projected.shape == stream.shape else projected.transpose(0, 1)
    for each in _inside(seen, block.call):
        if each.start < block.attention.start or each.input is None or each.input.shape != stream.shape:
            continue
        joined = Joined(block.call.module, each.module, each.input, each.input - stream, projected)
        if joined.scaled_by(joined.ratio) and _once(seen, each):
            return joined
    return None


def _token_maps(seen: Forward, block: FoundBlock) -> list[tuple[ModuleCall, Tensor, Tensor]]:
    """Calls inside the block that take and give one vector a token, outermost first; with what they took and gave."""
    tokens = block.attention.operands.num_tokens
    return [
        (call, call.input, call.output)
        for call in _inside(seen, block.call)
        if call.input is not None and call.output is not None
        if all(each.ndim == 3 and each.shape[:2].numel() == tokens for each in (call.input, call.output))
    ]


def _rows(state: Tensor, like: Tensor) -> Tensor:
    """A state of one image as (1, N, …), also where it is (N, 1, …)."""
    return state if state.shape[0] == like.shape[0] else state.transpose(0, 1)


def _affine(module: nn.Module, given: Tensor, gave: Tensor) -> bool:
    """Whether a module computed W x + b, whatever its kind: adapters such as LoRA stand in for an `nn.Linear`.

    Verified on the numbers: what it adds to W x is the same for all tokens.
    """
    if next(module.parameters(), None) is None:
        return False
    try:
        weight = linear_weight(module, given.shape[-1]).to(given)
    except Exception:  # whatever a module raises that takes anything but features
        return False
    if weight.shape != (gave.shape[-1], given.shape[-1]):
        return False
    product = F.linear(given, weight)
    return close(gave, product + (gave - product)[:1, :1])


def _value_part(module: Any) -> Tensor:
    """What an `nn.MultiheadAttention` multiplies with to make values."""
    packed = module.in_proj_weight
    matrix: Tensor = module.v_proj_weight if packed is None else packed.chunk(3)[2]
    return matrix.detach()


def _own_weight(module: Any) -> Tensor:
    """The weight of a module that is not called, such as the output projection of an `nn.MultiheadAttention`."""
    weight: Tensor = module.weight
    return weight.detach()


def _last_part(module: nn.Module, width: int, parts: int) -> Tensor:
    return linear_weight(module, width).chunk(parts)[-1]


def _inside(seen: Forward, outer: ModuleCall) -> list[ModuleCall]:
    return [call for call in seen.modules if outer in call.parents]


def _once(seen: Forward, call: ModuleCall) -> bool:
    """Whether the module was called once in the whole forward, so that a hook on it sees this call alone."""
    return sum(each.module is call.module for each in seen.modules) == 1
