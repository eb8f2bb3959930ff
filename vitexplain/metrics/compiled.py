"""A model's forward compiled, for metrics that ask about many images of one size.

`torch.compile` makes one graph of the whole forward, for batches of one shape: with CUDA graphs (``"reduce-overhead"``)
on a GPU, in its default mode on the CPU, where linear maps are what takes the time and nothing is gained. It has not
been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import OptionError, is_out_of_memory
from ..models.adapter import ModelAdapter

_Forward = Callable[[ModelAdapter, Tensor], Tensor]

_BACKEND: str | Callable[..., Any] = "inductor"
_COMPILED: WeakKeyDictionary[nn.Module, dict[str | None, _Forward]] = WeakKeyDictionary()
"""Model → its forward by torch's mode; the forward gets the model with each call and does not hold it."""


def compiled_logits(adapter: ModelAdapter, images: Tensor, size: int) -> Tensor:
    """As `ModelAdapter.logits`, compiled: logits (B, C) of images that `check_images` has seen.

    Args:
        adapter: of the borrowed model.
        images: (B, channels, H, W), with B up to `size`; fewer are filled up, so that there is one shape.
        size: images in one forward.

    Raises:
        OptionError: the model runs as it is and not compiled, for want of a compiler or because it cannot be traced.
    """
    batch = images.contiguous()
    if len(images) < size:
        batch = images.new_zeros(size, *images.shape[1:])
        batch[: len(images)] = images
    try:
        # else hooks that are registered or removed after the compilation would not be noticed
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            logits = _forward_of(adapter.model, batch.device)(adapter, batch)
    except Exception as error:
        cause = getattr(error, "inner_exception", None) or error.__cause__ or error
        if is_out_of_memory(cause):
            raise cause from None  # as without a compiler
        adapter.logits(images)  # raises what is wrong with the images or the model itself
        found = str(cause).strip().partition("\n")[0]
        raise OptionError(
            f"the model cannot be compiled ({type(cause).__name__}: {found}); expected one that torch.compile takes "
            "whole, and a compiler for its device. Leave 'compiled' out, and the model runs as it is"
        ) from error
    return logits[: len(images)].clone()  # a CUDA graph writes its next answer to the same place


def _forward_of(model: nn.Module, device: torch.device) -> _Forward:
    of_model = _COMPILED.setdefault(model, {})
    mode = "reduce-overhead" if device.type == "cuda" else None
    if mode not in of_model:
        # torch keeps what it compiled, and counts it, by code object: each model needs its own
        forward = FunctionType(_forward.__code__.replace(), globals())
        of_model[mode] = torch.compile(forward, fullgraph=True, dynamic=False, backend=_BACKEND, mode=mode)
    return of_model[mode]


def _forward(adapter: ModelAdapter, images: Tensor) -> Tensor:
    return adapter.logits(images)
