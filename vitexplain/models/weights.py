"""Weights from files: safetensors, or torch state dicts in the wrappings that training scripts leave."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .saved_form import classifiers_of

_WRAPPINGS = ("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
_OBJECTS = ("Unsupported global", "Unsupported class", "unrecognized function")  # how torch refuses them
_EXPECTED = "expected a .safetensors file or a torch state dict (.pt, .pth, .bin)"


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A state dict from a file; nothing is unpickled but plain tensors.

    A dict around it (``state_dict``, ``model``; an average such as ``model_ema`` only where there is nothing else) and
    a prefix that all names share (``module.``) are taken off.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds no state dict.
    """
    path = Path(path)
    check_there(path)
    return _without_prefix(_unwrapped(_read(path), path))


def check_there(path: Path) -> None:
    """Makes sure that there is a file of weights.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"no checkpoint at {str(path)!r} ({found}); {_EXPECTED}")


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads weights that must fit exactly.

    Args:
        model: where to.
        state: all its tensors by name.
        source: what the error calls the weights.

    Raises:
        CheckpointError: names or shapes differ; the message lists the first of them.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    wrong = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    if any(keys for _, keys in wrong):
        found = "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for kind, keys in wrong
            if keys
        )
        remedy = _remedy(wrong, classifiers_of(model))
        raise CheckpointError(f"the weights in {source!r} are not of this architecture: {found}. {remedy}")
    model.load_state_dict(dict(state))


def first_line(error: BaseException) -> str:
    """Kind and first line of somebody else's error, to be quoted in one of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150]}" if lines else type(error).__name__


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise kinds of their own on broken files
        if isinstance(error, pickle.UnpicklingError) and any(each in str(error) for each in _OBJECTS):
            raise CheckpointError(
                f"{str(path)!r} holds Python objects besides tensors; reading them would run code from the file, so it "
                "is refused. Save only model.state_dict(), best as .safetensors"
            ) from error
        # torch's first line for a failed unpickling is the advice to allow running code
        cause = type(error).__name__ if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise CheckpointError(
            f"{str(path)!r} cannot be read as weights, it may be cut short or of another format ({cause}); {_EXPECTED}"
        ) from error


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = [content[key] for key in _WRAPPINGS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{str(path)!r} holds no state dict but {type(content).__name__}; {_EXPECTED}")
    others = [key for key, each in content.items() if not isinstance(each, Tensor)]
    if others:
        raise CheckpointError(
            f"{str(path)!r} holds no state dict: {others[0]!r} is no tensor; expected tensors by name, at the top or "
            f"under one of {', '.join(_WRAPPINGS)}"
        )
    return {str(key): tensor for key, tensor in content.items()}


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in (each for _ in _PREFIXES for each in _PREFIXES):  # they nest in any order
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _remedy(wrong: list[tuple[str, list[str]]], classifiers: tuple[str, ...]) -> str:
    names = {kind: {key.split(" ")[0] for key in keys} for kind, keys in wrong}
    if not names["missing"] and not names["unexpected"] and names["of another shape"] == {"pos_embed"}:
        return (
            "They are for images of another size, which can be found out where it is square: else give it "
            "(preprocessing={'size': (height, width)}, --size HxW or --preprocessing size=HxW)"
        )
    only_missing = not names["unexpected"] and not names["of another shape"]
    if only_missing and all(key.startswith(tuple(f"{each}." for each in classifiers)) for key in names["missing"]):
        return "They hold no classifier: use weights that were fine-tuned to classes"
    return "Name the architecture that they were trained with"
