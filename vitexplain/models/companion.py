"""Weights that were trained beside a model, in a file with a card that says which model: checked, and read once."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError
from ..files import save_json, write_whole
from .adapter import ModelAdapter
from .fingerprint import same_weights
from .shipped import model_entry

_Read = TypeVar("_Read")


def write_companion(
    path: str | os.PathLike[str],
    method: str,
    version: int,
    adapter: ModelAdapter,
    state: Mapping[str, Tensor],
    described: Mapping[str, Any],
    *,
    num_classes: int,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes weights and their card.

    Args:
        path: file to write, ending in ``.safetensors``; the card gets the ending ``.json``. The card is written last.
        method: registry name of what learned.
        version: the card's ``format``.
        adapter: the model they belong to.
        state: the weights by name.
        described: entries of the card that are read back with them, JSON-able.
        num_classes: C, the model's number of outputs.
        record: further entries of the card, JSON-able: settings, history, results.

    Returns:
        The card.

    Raises:
        CheckpointError: the path does not end in ``.safetensors``.
        ExportError: a file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"found {str(path)!r} to write to, expected a name ending in .safetensors")
    identity = {
        "method": method,
        "format": version,
        "model": {**model_entry(adapter.model), "num_classes": num_classes},
        **described,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"safetensors": metadata.version("safetensors")},
    }
    card = {**identity, **(record or {}), **identity}  # the entries that are read back come first, and count
    write_weights(path, state)
    save_json(card, path.with_suffix(".json"))
    return card


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Tensors as safetensors, on the CPU, none sharing memory with another."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    write_whole(path, lambda file: file.write(save(whole)))


def read_companion_card(weights: Path, method: str, version: int, again: str) -> dict[str, Any]:
    """The card beside a weights file.

    Args:
        weights: the ``.safetensors`` file; its card has the same name with ``.json``.
        method: the card's ``method`` must be.
        version: the card's ``format`` must be.
        again: how to train anew, for messages.

    Raises:
        CheckpointError: it is missing, no JSON, of another method, or of a format that is not known here.
    """
    path = weights.with_suffix(".json")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}. Expected the card written with the weights; keep both "
            f"files together, or {again}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {again}") from error
    if not isinstance(card, dict) or card.get("method") != method:
        raise CheckpointError(f"{path} is no card of a checkpoint of {method}; {again}")
    if card.get("format") != version:
        raise CheckpointError(
            f"{path} has format {card.get('format')!r}, expected {version}: update vitexplain, or {again}"
        )
    return card


def check_companion_model(card: dict[str, Any], weights: Path, adapter: ModelAdapter, again: str) -> None:
    """Refuses weights that were trained beside another model.

    Args:
        card: with the entry ``model`` that `vitexplain.models.shipped.model_entry` makes.
        weights: the file, for messages.
        adapter: the model to be explained.
        again: how to train anew, for messages.

    Raises:
        CheckpointError: the model's weights are others than the card's, or the card does not say.
    """
    model = card.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{weights.with_suffix('.json')} does not say which model it belongs to; {again}")
    if not same_weights(adapter.model, model):
        raise CheckpointError(
            f"{str(weights)!r} belongs to another model: it was trained on a {model.get('kind')} whose weights have "
            f"the SHA-256 {str(model.get('sha256'))[:12]}…, and this {type(adapter.model).__name__} has others. It "
            f"explains only the weights that it was trained on: load those, or {again}"
        )


class ReadOnce(Generic[_Read]):
    """A reader of files that remembers the last thing it read for a model, as long as file and model stay the same.

    Args:
        load: reads a file, for a model, to a device and a precision.
    """

    def __init__(self, load: Callable[[Path, ModelAdapter, torch.device, torch.dtype], _Read]) -> None:
        self._load = load
        self._kept: WeakKeyDictionary[ModelAdapter, tuple[object, _Read]] = WeakKeyDictionary()

    def __call__(self, path: Path, adapter: ModelAdapter, device: torch.device, dtype: torch.dtype) -> _Read:
        """What the file holds.

        Raises:
            CheckpointError: in the words of `load`.
        """
        try:
            stat = path.stat()
            written: object = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            written = None  # whoever reads the file says what is wrong with it
        tensors = [*adapter.model.parameters(), *adapter.model.buffers()]
        weights = tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors)
        key = (path, written, device, dtype, weights)
        kept = self._kept.get(adapter)
        if kept is not None and kept[0] == key:
            return kept[1]
        found = self._load(path, adapter, device, dtype)
        self._kept[adapter] = key, found
        return found
