"""Models are borrowed: whatever is changed on one is put back, also when the work in between raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def borrowed(model: nn.Module, *, fused_attention: Iterable[nn.Module] = ()) -> Iterator[nn.Module]:
    """Evaluation mode, frozen weights and fused attention inside; everything as before outside.

    Args:
        model: the model; each of its modules keeps its own training flag.
        fused_attention: attention modules with a `fused_attn` switch that is turned on meanwhile, since the
            fused kernel's arguments are where attention is read.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_leaf]
    unfused = [module for module in fused_attention if getattr(module, "fused_attn", True) is False]
    try:
        for module, _ in modes:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in unfused:
            setattr(module, "fused_attn", True)  # noqa: B010 - not an attribute every nn.Module declares
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in unfused:
            setattr(module, "fused_attn", False)  # noqa: B010
