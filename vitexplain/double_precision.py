"""Torch calls in double precision, one at a time: arguments are widened as a call needs them, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Scratch:
    """Memory that tensors take over from one another: to ask for as much anew can cost more than to fill it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, tensor: Tensor, use: str, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of a tensor's shape, of another type where asked; its own until the next of the same use."""
        key, count = (use, dtype or tensor.dtype, tensor.device), tensor.numel()
        held = self._held.get(key)
        if held is None or held.numel() < count:
            held = self._held[key] = tensor.new_empty(count, dtype=key[1])
        return held[:count].view(tensor.shape)

    def wide(self, tensor: Tensor) -> Tensor:
        """A tensor in double precision where its device has it; itself, if it is so wide."""
        known = wide(tensor[:0])
        return tensor if known.dtype == tensor.dtype else self.like(tensor, "wide", known.dtype).copy_(tensor)


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
