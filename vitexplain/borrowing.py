"""Models are borrowed: whatever is changed on one is put back, also when the work in between raises."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError

_COMPILED = "_compiled_call_impl"
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "use_checkpointing", "with_cp")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = ("timm.", "torch.nn.", "torchvision.", "transformers.", "vitexplain.")
_QUANTISED = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")
_DECISIVE = frozenset(
    ("forward", "forward_features", "forward_head", "forward_cls", "pool", "_pool", "_pos_embed", "_forward_embeds")
)
"""Functions of a library's model that decide which tokens there are and which are read; somebody may have put others on
an instance, or on a class derived from it."""

_CALLERS: ContextVar[Callable[[], AbstractContextManager[Any]]] = ContextVar("callers_autocast", default=nullcontext)
"""Makes the autocast that `without_autocast` turned off; nothing where there was none."""


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
        and _DECISIVE.isdisjoint(own)
    )


def follows_library(module: nn.Module, *, but_for_forward: bool = False) -> bool:
    """Whether a known library's code decides what a module does with tokens; its class may be somebody else's.

    A class that was derived from a library's and leaves alone what decides it follows the library.

    Args:
        module: any.
        but_for_forward: its `forward` is not asked about: it may prepare images, or put logits into something.
    """
    own, kind = vars(module), type(module)
    decisive = _DECISIVE - {"forward"} if but_for_forward else _DECISIVE
    if any(callable(own.get(name)) for name in decisive):  # a library's own "pool" may be a word
        return False
    functions = (getattr(kind, name, None) for name in decisive)
    return all(each is None or (getattr(each, "__module__", None) or "").startswith(_LIBRARIES) for each in functions)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see what goes through a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def check_graph(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Refuses a model through which no gradient can go.

    Args:
        model: is named in the error.
        modules: all that it consists of; see `all_modules`.

    Raises:
        UnsupportedModelError: a weight or buffer was made in `torch.inference_mode`, or a layer is quantised.
    """
    check_unquantised(model, modules)
    _check_made_outside(model, modules)


def check_unquantised(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Refuses layers that compute with whole numbers; arguments as for `check_graph`.

    Raises:
        UnsupportedModelError: there is one.
    """
    kinds = dict.fromkeys(map(type, modules))
    quantised = next((kind for kind in kinds if kind.__module__.startswith(_QUANTISED)), None)
    if quantised is not None:
        raise UnsupportedModelError(
            f"found a {type(model).__name__} with quantised layers ({quantised.__name__}), through which no "
            "gradient goes, so that their share would be taken for nothing; expected layers in floating point. Explain "
            "the model as it was before it was quantised, or take a method without a gradient, such as rollout or "
            "occlusion"
        )


def _check_made_outside(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    held: list[dict[str, Any]] = [each._parameters for each in modules if each._parameters]
    held += [each._buffers for each in modules if each._buffers]
    for tensors in held:
        for tensor in tensors.values():
            if tensor is not None and tensor.is_inference():
                raise UnsupportedModelError(
                    f"found a {type(model).__name__} with weights or buffers made inside torch.inference_mode(), "
                    "through which no gradient can go; expected ones made outside it. Load the model outside, or "
                    "explain copy.deepcopy(model), called outside; or take a method without a gradient, such as "
                    "rollout or occlusion"
                )


@contextmanager
def borrowed(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[nn.Module]:
    """Evaluation mode, frozen weights, no checkpointing, nothing compiled inside; everything as before outside.

    Checkpointing would run blocks a second time in the backward pass, when nothing watches them; and what
    `nn.Module.compile` made of a module may be a forward in which nobody watched.

    Args:
        model: is borrowed.
        modules: all that it consists of, where that is known; see `all_modules`.

    Raises:
        UnsupportedModelError: a graph would be recorded, and a weight or buffer was made in `torch.inference_mode`.
    """
    modules = all_modules(model) if modules is None else modules
    if torch.is_grad_enabled():
        _check_made_outside(model, modules)
    training: list[bool] = []
    checkpointed: list[tuple[nn.Module, str]] = []
    compiled: list[tuple[nn.Module, Any]] = []
    trainable: list[nn.Parameter] = []
    named: dict[type, bool] = {}
    # once over all of them: there are hundreds, and on a small model it shows
    for module in modules:
        own, kind = module.__dict__, type(module)
        if kind not in named:  # by a value of the class, and not by a property
            named[kind] = any(isinstance(getattr(kind, name, None), bool) for name in _CHECKPOINTING)
        training.append(module.training)
        if named[kind] or not own.keys().isdisjoint(_CHECKPOINTING):
            checkpointed += [(module, name) for name in _CHECKPOINTING if getattr(module, name, False) is True]
        if own.get(_COMPILED):
            compiled.append((module, own[_COMPILED]))
        for parameter in module._parameters.values():
            # of one made in inference mode, what is set to False could not be set back
            if parameter is not None and parameter.requires_grad and parameter.is_leaf and not parameter.is_inference():
                trainable.append(parameter)
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
            parameter.requires_grad = False
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
            parameter.requires_grad = True


@contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Hooks and attributes that a library leaves on a model's modules, inside, are taken off again."""
    owned = [vars(module) for module in all_modules(model)]
    hooks = [own[name] for own in owned for name in _HOOKS if name in own]
    before: list[tuple[dict[Any, Any], set[Any]]] = [(held, set(held)) for held in (*hooks, *owned)]
    try:
        yield
    finally:
        for held, known in before:
            for new in held.keys() - known:
                del held[new]


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on, on a type of device."""
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # before torch 2.4 each type has a function of its own
        return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


@contextmanager
def without_autocast(device: str) -> Iterator[None]:
    """Autocast is off inside, on a type of device; in `callers_autocast` it is what it was.

    Attribution is not to be in half precision because the model is, and where it asks the model again, that is to
    answer as it answered before.
    """
    if not autocast_is_on(device):
        yield
        return
    token = _CALLERS.set(partial(torch.autocast, device))  # precision and cache are still the caller's where it is off
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _CALLERS.reset(token)


def callers_autocast() -> AbstractContextManager[Any]:
    """What is entered around a forward of the model, also outside `without_autocast`, where it changes nothing."""
    return _CALLERS.get()()


@contextmanager
def attributes_set(owners: Iterable[object], name: str, value: object) -> Iterator[None]:
    """An attribute of several objects set inside, and back to each one's own value outside.

    It is written where it differs, which is asked each time: writing one object's may change another's.
    """
    before = [(owner, getattr(owner, name)) for owner in owners]
    try:
        for owner, _ in before:
            if getattr(owner, name) is not value:
                setattr(owner, name, value)
        yield
    finally:
        for owner, own in before:
            if getattr(owner, name) is not own:
                setattr(owner, name, own)
