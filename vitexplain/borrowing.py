"""Models are borrowed: whatever is changed on one is put back, also when the work in between raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

_COMPILED = "_compiled_call_impl"


@contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, frozen weights, no checkpointing, nothing compiled inside; everything as before outside.

    Checkpointing would run blocks a second time in the backward pass, when nothing watches them; and what
    `nn.Module.compile` made of a module may be a forward in which nobody watched.
    """
    modes = [(module, module.training) for module in model.modules()]
    # there are hundreds of modules: to ask one for what it lacks, or to walk them once more, is dear
    checkpointed = [
        (module, name)
        for module, _ in modes
        for name in ("grad_checkpointing", "gradient_checkpointing")
        if vars(module).get(name, getattr(type(module), name, False)) is True
    ]
    compiled = [(module, vars(module)[_COMPILED]) for module, _ in modes if vars(module).get(_COMPILED) is not None]
    trainable = [
        parameter
        for module, _ in modes
        for parameter in module._parameters.values()
        if parameter is not None and parameter.requires_grad and parameter.is_leaf
    ]
    try:
        for module, training in modes:
            if training:  # a write on a module is dear, and there are hundreds
                module.training = False
        for module, name in checkpointed:
            setattr(module, name, False)
        for module, _ in compiled:
            setattr(module, _COMPILED, None)
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, training in modes:
            if module.training is not training:
                module.training = training
        for module, name in checkpointed:
            setattr(module, name, True)
        for module, call in compiled:
            setattr(module, _COMPILED, call)
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def attributes_set(owners: Iterable[object], name: str, value: object) -> Iterator[None]:
    """An attribute of several objects set inside, and back to each one's own value outside."""
    before = [(owner, getattr(owner, name)) for owner in owners]
    try:
        for owner, _ in before:
            setattr(owner, name, value)
        yield
    finally:
        for owner, own in before:
            setattr(owner, name, own)
