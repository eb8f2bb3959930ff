"""LayerScale: what a block multiplies with, channel by channel, as attention joins the stream.

It is told from numbers that were seen in a forward, verified on them, and read from the model whenever it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..randomness import DRAWN

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_LOOSE = 0.05  # half precisions


@dataclass(frozen=True, eq=False)
class Joined:
    """How what attention projected joined the stream of one block, in one forward.

    Attributes:
        block: the block.
        mid: the module that took the stream then.
        stream: that stream (1, N, D), or (N, 1, D).
        added: what had joined it.
        projected: what of that had been projected.
    """

    block: nn.Module
    mid: nn.Module
    stream: Tensor
    added: Tensor
    projected: Tensor

    @property
    def ratio(self) -> Tensor:
        """(D,) what was added over what was projected."""
        squares = (self.projected * self.projected).sum((0, 1))
        return (self.added * self.projected).sum((0, 1)) / squares.clamp(min=1e-30)

    def scaled_by(self, scale: Tensor) -> bool:
        """Whether what was projected, times that, is what was added."""
        return close(self.added, scale * self.projected, stream=self.stream)


def layer_scales(
    joined: Sequence[Joined | None], again: Callable[[], Sequence[Joined | None]]
) -> list[Callable[[], Tensor] | None]:
    """What gives each block's LayerScale (D,), also when the model was trained since; None for no scaling.

    Its values tell which parameter it is. Before training they are those of other parameters, or of no scaling (zeros,
    ones); so the blocks' small parameters are then given values of their own in another forward.

    Args:
        joined: of each block; None where that was not found.
        again: the same in another forward.
    """
    known = [each for each in joined if each is not None]
    near = {each.block: _near(each) for each in known}
    if all(len(near[each.block]) == 1 and not _untrained(each) for each in known):
        return [None if each is None else _named(each, near[each.block][0]) for each in joined]
    values = _other_values(known)
    with _replaced([each.block for each in known], values):
        tried = again()
    return [None if each is None else _told(each, other, values) for each, other in zip(joined, tried, strict=True)]


def close(a: Tensor, b: Tensor, stream: Tensor | None = None) -> bool:
    """Whether two tensors hold the same numbers, up to the rounding of their precision.

    `stream` is what they were subtracted from: in half precision its rounding is what is left of small additions.
    """
    if a.shape != b.shape:
        return False
    half = not {a.dtype, b.dtype} <= _TOLERANCE.keys()
    size = (stream if half and stream is not None else b).abs().max().item()
    tolerance = _LOOSE if half else max(_TOLERANCE[a.dtype], _TOLERANCE[b.dtype])
    return bool((a - b).abs().max().item() <= tolerance * max(size, 1e-12))


def _small(joined: Joined) -> dict[str, nn.Parameter]:
    """The parameters of the block that a scale may be or depend on: as many numbers as channels, or fewer."""
    width = joined.stream.shape[-1]
    named = joined.block.named_parameters()
    return {name: each for name, each in named if each.is_floating_point() and 0 < each.numel() <= width}


def _options(joined: Joined, constant: Tensor, values: Mapping[Tensor, Tensor]) -> dict[str | None, Tensor]:
    """What may scale (D,): a constant, or by name a parameter of the block, if these had other values."""
    width = joined.stream.shape[-1]
    small = {name: values.get(each, each) for name, each in _small(joined).items() if each.numel() in (1, width)}
    return {None: constant, **{name: each.detach().flatten().expand(width) for name, each in small.items()}}


def _near(joined: Joined) -> list[str | None]:
    """The names of parameters that have the measured values; None for no scaling."""
    options = _options(joined, torch.ones_like(joined.ratio), {})
    return [name for name, each in options.items() if close(each, joined.ratio)]


def _untrained(joined: Joined) -> bool:
    """Whether a small parameter has one value throughout, as before training: a scale made of it may be anything."""
    return any(bool(each.min() == each.max()) for each in _small(joined).values())


def _other_values(joined: Sequence[Joined]) -> dict[Tensor, Tensor]:
    """Values for the small parameters that nothing else has, about as large as their own."""
    values: dict[Tensor, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for parameter in dict.fromkeys(each for block in joined for each in _small(block).values()):
        random = 0.5 + torch.rand(parameter.shape, generator=generator, **DRAWN)
        values[parameter] = random.to(parameter) * parameter.abs().max().clamp(min=0.1)
    return values


@contextmanager
def _replaced(blocks: Sequence[nn.Module], values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters, which are put back: so whatever else holds them sees no change."""
    owners = dict.fromkeys(module for block in blocks for module in block.modules())
    places = [
        (owner._parameters, name, parameter)
        for owner in owners
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter in values
    ]
    try:
        for parameters, name, parameter in places:
            parameters[name] = nn.Parameter(values[parameter], requires_grad=False)
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


def _told(joined: Joined, other: Joined | None, values: Mapping[Tensor, Tensor]) -> Callable[[], Tensor] | None:
    """What scales, told by a forward with other values: what has those that were then measured."""
    if other is None or other.mid is not joined.mid:
        return _measured(joined)
    plain, ratio = torch.ones_like(joined.ratio), other.ratio
    constant = plain if close(plain, joined.ratio) else joined.ratio
    options = _options(joined, constant, values)
    nearest = min(options, key=lambda name: (options[name] - ratio).abs().float().mean().item())
    if not other.scaled_by(options[nearest]):
        return _measured(joined)
    if nearest is None and constant is not plain:
        return partial(_while_unchanged, joined.block, {}, constant)
    return _named(joined, nearest)


def _named(joined: Joined, name: str | None) -> Callable[[], Tensor] | None:
    return None if name is None else partial(_parameter, joined.block, name, joined.stream.shape[-1])


def _parameter(block: nn.Module, name: str, width: int) -> Tensor:
    """Whatever tensor the block has by that name by then, (width,)."""
    parameter: Tensor = attrgetter(name)(block)
    return parameter.detach().flatten().expand(width)


def _measured(joined: Joined) -> Callable[[], Tensor]:
    before = {name: each.detach().clone() for name, each in _small(joined).items()}
    return partial(_while_unchanged, joined.block, before, joined.ratio)


def _while_unchanged(block: nn.Module, before: Mapping[str, Tensor], measured: Tensor) -> Tensor:
    """What was measured, as long as the small parameters that it may be made of are as they were."""
    changed = [name for name, each in before.items() if not _same(each, attrgetter(name)(block))]
    if changed:
        raise UnsupportedModelError(
            f"what scales the attention of a {type(block).__name__} is no parameter, so it was measured; found other "
            f"values in its {changed[0]!r} since then, expected the same. Make a new explainer of the model as it is"
        )
    return measured


def _same(before: Tensor, now: Tensor) -> bool:
    """Whether values are the same, but for the device and precision that they now have."""
    return torch.equal(before.to(now), now)
