"""Torch calls in double precision, one at a time: arguments are widened as a call needs them, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def wide(value: Any) -> Any:
    """Floating-point tensors, alone or in lists, tuples and dicts, in double precision where their device has it."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() and value.device.type != "mps" else value
    if isinstance(value, dict):
        return {name: wide(each) for name, each in value.items()}
    return type(value)(wide(each) for each in value) if type(value) in (list, tuple) else value


def widely(func: Callable[..., Any], args: Sequence[Any], named: dict[str, Any]) -> Any:
    """A call with its arguments widened."""
    return func(*wide(args), **wide(named))


def writes_in_place(func: Callable[..., Any]) -> bool:
    """Whether a torch function writes into its first argument, which then must be that very tensor."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
