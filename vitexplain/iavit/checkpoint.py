"""Trained interpreters in files: weights as safetensors, with those of the model where both were trained together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..explainer import Explainer
from ..files import save_json
from ..models import adapt
from ..models.adapter import ModelAdapter
from ..models.companion import (
    ReadOnce,
    check_companion_model,
    read_companion_card,
    write_companion,
    write_weights,
)
from ..models.saved_form import saved_form
from ..models.weights import load_strictly, read_state
from ..preprocessing import Preprocessing
from ..registry import create_method
from ..subject import Subject
from .interpreter import Interpreter, InterpreterShape

FORMAT = 1
"""Version of the card; raised when an older reader could misread a newer file."""

_METHOD = "iavit"
_AGAIN = "train again with `vitexplain train iavit`"
_INTERPRETER, _TRUNK = "interpreter.", "trunk."


def save_checkpoint(
    path: str | os.PathLike[str],
    interpreter: Interpreter,
    adapter: ModelAdapter,
    *,
    with_model: bool,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes an interpreter and its card.

    Args:
        path: file to write, ending in ``.safetensors``; the card gets the ending ``.json``. The card is written last.
        interpreter: what was trained.
        adapter: the model it belongs to.
        with_model: the model's weights go into the file, too.
        record: further entries of the card, JSON-able: settings, history, results.

    Returns:
        The card.

    Raises:
        CheckpointError: the path does not end in ``.safetensors``.
        ExportError: a file cannot be written.
    """
    state = {_INTERPRETER + name: tensor for name, tensor in interpreter.state_dict().items()}
    if with_model:
        state |= {_TRUNK + name: tensor for name, tensor in adapter.model.state_dict().items()}
    described = {"with_model": with_model, "interpreter": dataclasses.asdict(interpreter.shape)}
    classes = interpreter.shape.num_classes
    return write_companion(path, _METHOD, FORMAT, adapter, state, described, num_classes=classes, record=record)


def load_interpreter(
    path: str | os.PathLike[str], adapter: ModelAdapter, device: torch.device, dtype: torch.dtype
) -> Interpreter:
    """An interpreter from a file, checked to belong to this model; read once for as long as both stay the same.

    Args:
        path: the ``.safetensors`` file, with its ``.json`` beside it.
        adapter: the model to be explained.
        device: where to put it.
        dtype: its precision, float32 or wider.

    Raises:
        CheckpointError: a file is missing or broken, or the interpreter was trained on another model; says which.
    """
    return _interpreters(Path(path), adapter, device, dtype)


def load_iavit(path: str | os.PathLike[str], model: nn.Module | None = None) -> Explainer:
    """A model that was trained together with its interpreter, ready to explain itself.

    ::

        explainer = load_iavit("cifar10.safetensors")
        explainer(images).save("explained.png")
        get_explainer("rollout", explainer.subject)(images)

    Args:
        path: what ``vitexplain train iavit`` or `vitexplain.training.iavit.train_iavit` wrote.
        model: a module of the trained architecture, whose weights are replaced; by default it is built from the card,
            which says how where the embedded model's architecture, or one of timm's by name, was trained.

    Returns:
        An explainer of the method `iavit`; ``explainer.subject`` holds the model, in evaluation mode on the CPU, its
        preprocessing and its classes' names where the card has them.

    Raises:
        CheckpointError: a file is missing or broken, holds no model, or one of another architecture.
    """
    path = Path(path)
    card, state = read_companion_card(path, _METHOD, FORMAT, _AGAIN), read_state(path)
    weights = _part(state, _TRUNK)
    if not weights:
        raise CheckpointError(
            f"{str(path)!r} holds an interpreter alone, expected one with its model: load the model that it was "
            f"trained on and use get_explainer('iavit', model, checkpoint={str(path)!r})"
        )
    known = card.get("preprocessing")
    preprocessing = None if known is None else Preprocessing(**known)
    model = _built(card, path, weights, preprocessing) if model is None else model
    load_strictly(model, weights, str(path))
    subject = Subject(adapt(model.eval()), preprocessing, card.get("classes"))
    return Explainer(create_method(_METHOD, checkpoint=str(path)), subject)


def save_model(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Writes the model of a checkpoint as an ordinary checkpoint, for `load_model` and whatever reads weights.

    Args:
        path: what training wrote.
        output: file to write, ending in ``.safetensors``; a card with the ending ``.json`` goes beside it.

    Raises:
        CheckpointError: a file is missing or broken, or holds no model.
        ExportError: a file cannot be written.
    """
    explainer = load_iavit(path)
    card = read_companion_card(Path(path), _METHOD, FORMAT, _AGAIN)
    write_weights(Path(output), explainer.subject.adapter.model.state_dict())
    described = ("architecture", "classes", "preprocessing")
    save_json({name: card[name] for name in described if name in card}, Path(output).with_suffix(".json"))


def _read_interpreter(path: Path, adapter: ModelAdapter, device: torch.device, dtype: torch.dtype) -> Interpreter:
    state, card = read_state(path), read_companion_card(path, _METHOD, FORMAT, _AGAIN)
    try:
        interpreter = Interpreter(InterpreterShape(**card["interpreter"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path.with_suffix('.json')} lacks what describes an interpreter ({type(error).__name__}: {error}); "
            f"{_AGAIN}"
        ) from error
    check_companion_model(card, path, adapter, _AGAIN)
    load_strictly(interpreter, _part(state, _INTERPRETER), str(path))
    return interpreter.to(device=device, dtype=dtype).requires_grad_(False).eval()


_interpreters = ReadOnce(_read_interpreter)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _built(
    card: Mapping[str, Any], path: Path, weights: Mapping[str, Tensor], preprocessing: Preprocessing | None
) -> nn.Module:
    """The architecture that the card names, for the image size that the weights are for, with fresh weights."""
    architecture = card.get("architecture")
    if isinstance(architecture, str):
        import timm

        if not timm.is_model(architecture):
            raise CheckpointError(
                f"{path.with_suffix('.json')} names the architecture {architecture!r}, which this version of timm does "
                "not have: pass load_iavit(path, model=…) a module of the trained architecture"
            )
        with torch.device("meta"):
            plain = timm.create_model(architecture)
        form = saved_form(weights, plain, None if preprocessing is None else preprocessing.size, None)
        model: nn.Module = timm.create_model(architecture, **{"num_classes": card["model"]["num_classes"], **form})
        return model
    if isinstance(architecture, Mapping):
        from ..models.embedded import build_model

        return build_model(architecture)
    raise CheckpointError(
        f"{path.with_suffix('.json')} does not say how to build the model: pass load_iavit(path, model=…) a module of "
        "the trained architecture"
    )
