"""Models are borrowed: whatever is changed on one is put back, also when the work in between raises."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

_COMPILED = "_compiled_call_impl"
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")
_LIBRARIES = ("timm.", "torch.nn.", "torchvision.", "transformers.", "vitexplain.")
_PATCHED = ("forward", "forward_features", "forward_head", "pool")  # what somebody may have put on an instance


def all_modules(model: nn.Module, without: Collection[nn.Module] = ()) -> list[nn.Module]:
    """The modules of a model, each once, in the order of `nn.Module.modules`; `without` some and what they hold alone.

    In two thirds of the time: it is done in each forward, and on small models it shows.
    """
    found: dict[nn.Module, None] = dict.fromkeys(without)
    left_out, waiting = len(found), [model]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            inner = module._modules
            if inner:
                waiting += [each for each in reversed(inner.values()) if each is not None]
    return list(found)[left_out:]


def runs_library_code(module: nn.Module) -> bool:
    """Whether a module runs the code of a known library: nobody gave its class or itself another forward."""
    own, kind = vars(module), type(module)
    return (
        kind.__module__.startswith(_LIBRARIES)
        and kind.forward.__module__.startswith(_LIBRARIES)
        and not any(name in own for name in _PATCHED)
    )


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see what goes through a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, frozen weights, no checkpointing, nothing compiled inside; everything as before outside.

    Checkpointing would run blocks a second time in the backward pass, when nothing watches them; and what
    `nn.Module.compile` made of a module may be a forward in which nobody watched.
    """
    modules = all_modules(model)
    # there are hundreds: what a module lacks is asked of its dictionary, a tenth of the time of asking the module
    held = [vars(module) for module in modules]
    training = [module.training for module in modules]
    named = {  # by a value of the class, and not by a property
        kind
        for kind in set(map(type, modules))
        if any(isinstance(getattr(kind, name, None), bool) for name in _CHECKPOINTING)
    }
    checkpointed = [
        (module, name)
        for module, own in zip(modules, held, strict=True)
        if type(module) in named or not own.keys().isdisjoint(_CHECKPOINTING)
        for name in _CHECKPOINTING
        if getattr(module, name, False) is True
    ]
    compiled = [(module, own[_COMPILED]) for module, own in zip(modules, held, strict=True) if own.get(_COMPILED)]
    trainable = [
        parameter
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None and parameter.requires_grad and parameter.is_leaf
    ]
    try:
        if any(training):
            for module, was in zip(modules, training, strict=True):
                if was:
                    module.training = False
        for module, name in checkpointed:
            setattr(module, name, False)
        for module, _ in compiled:
            setattr(module, _COMPILED, None)
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, was in zip(modules, training, strict=True):
            if module.training is not was:
                module.training = was
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
