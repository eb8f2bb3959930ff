"""The state tap: sees a token state of a block where a module takes it or puts it out, and may put another there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import UnsupportedModelError
from .layout import from_tokens, to_tokens
from .models.adapter import BlockModules
from .needs import State


def watch_state(modules: BlockModules, kind: State, seen: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Hands a token state on.

    Args:
        modules: where the block is tapped.
        kind: which state.
        seen: takes it as (B, N, D), and returns what the model goes on with.

    Raises:
        UnsupportedModelError: the block has no such state.
    """
    module, taken = modules.place(kind)
    if module is None:
        raise UnsupportedModelError(
            f"a {type(modules.block).__name__} has no token state {kind!r}; methods that read attention alone work on "
            "it: rollout, generic_attention"
        )

    def keep(state: Tensor) -> Tensor:
        return from_tokens(seen(to_tokens(state, modules.arrangement)), modules.arrangement, state.shape)

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if arguments:
            return (keep(arguments[0]), *arguments[1:]), named
        first = next(iter(named))
        return arguments, {**named, first: keep(named[first])}

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return (keep(output[0]), *output[1:]) if isinstance(output, tuple) else keep(output)

    if taken:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)
