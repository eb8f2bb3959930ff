"""Trained gates in a file: weights as safetensors, and beside them a JSON card with the model that they belong to."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError
from ..files import save_json, write_whole
from ..models.adapter import ModelAdapter
from ..models.fingerprint import same_weights
from ..models.shipped import model_entry
from ..models.weights import load_strictly, read_state
from .constraint import CONSTRAINTS, Constraint
from .gates import Gates, GateShape
from .masking import class_features

FORMAT = 1
"""Version of the card; raised when an older reader could misread a newer file."""

_AGAIN = "train again with `vitexplain train diffmask`"


@dataclass(frozen=True, eq=False)
class TrainedGates:
    """Gates ready to explain the model that they were trained on.

    Attributes:
        gates: on the model's device, frozen.
        constraint: what they were trained to keep.
        margin: by how much that may change, in nats.
        features: (C, class_width) what tells them a class; None where they are not told one.
    """

    gates: Gates
    constraint: Constraint
    margin: float
    features: Tensor | None


def save_checkpoint(
    path: str | os.PathLike[str],
    gates: Gates,
    adapter: ModelAdapter,
    num_classes: int,
    *,
    constraint: Constraint = "distribution",
    margin: float = 0.1,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes gates and their card.

    Args:
        path: file to write, ending in ``.safetensors``; the card gets the ending ``.json``. The card is written last.
        gates: what was trained.
        adapter: the model they belong to.
        num_classes: C, its number of outputs.
        constraint: what they were trained to keep.
        margin: by how much that may change, in nats.
        record: further entries of the card, JSON-able: settings, history, results.

    Returns:
        The card.

    Raises:
        CheckpointError: the path does not end in ``.safetensors``.
        ExportError: a file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"found {str(path)!r} to write gates to, expected a name ending in .safetensors")
    card = {
        "method": "diffmask",
        "format": FORMAT,
        "model": {**model_entry(adapter.model), "num_classes": num_classes},
        "gates": dataclasses.asdict(gates.shape),
        "constraint": constraint,
        "margin": margin,
        **(record or {}),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"safetensors": metadata.version("safetensors")},
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in gates.state_dict().items()}
    write_whole(path, lambda file: file.write(save(state)))
    save_json(card, path.with_suffix(".json"))
    return card


_loaded: WeakKeyDictionary[ModelAdapter, dict[object, TrainedGates]] = WeakKeyDictionary()


def load_checkpoint(
    path: str | os.PathLike[str], adapter: ModelAdapter, device: torch.device, dtype: torch.dtype
) -> TrainedGates:
    """Gates from a file, checked to belong to this model; read once for as long as file and model stay the same.

    Args:
        path: the ``.safetensors`` file, with its ``.json`` beside it.
        adapter: the model to be explained.
        device: where to put the gates.
        dtype: their precision, float32 or wider.

    Raises:
        CheckpointError: a file is missing or broken, or the gates were trained on another model; says which.
    """
    path = Path(path)
    try:
        stat = path.stat()
        written: object = (stat.st_mtime_ns, stat.st_size)
    except OSError:
        written = None  # whoever reads the file says what is wrong with it
    tensors = [*adapter.model.parameters(), *adapter.model.buffers()]
    weights = tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors)
    kept = _loaded.setdefault(adapter, {})
    key = (path, written, device, dtype, weights)
    if key not in kept:
        found = _load(path, adapter, device, dtype)
        kept.clear()  # one at a time: gates are used by the batch
        kept[key] = found
    return kept[key]


def read_card(path: Path) -> dict[str, Any]:
    """The card beside a weights file.

    Raises:
        CheckpointError: it is missing, no JSON, or not of gates.
    """
    card_path = path.with_suffix(".json")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {card_path}: {error.strerror or error}. Expected the card written with the gates; keep both "
            f"files together, or {_AGAIN}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{card_path} is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(card, dict) or card.get("method") != "diffmask":
        raise CheckpointError(f"{card_path} is no card of diffmask gates; {_AGAIN}")
    if card.get("format") != FORMAT:
        raise CheckpointError(
            f"{card_path} has format {card.get('format')!r}, expected {FORMAT}: update vitexplain, or {_AGAIN}"
        )
    return card


def _load(path: Path, adapter: ModelAdapter, device: torch.device, dtype: torch.dtype) -> TrainedGates:
    state = read_state(path)
    card = read_card(path)
    try:
        shape, model = GateShape(**card["gates"]), dict(card["model"])
        constraint, margin, num_classes = card["constraint"], float(card["margin"]), int(model["num_classes"])
        gates = Gates(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path.with_suffix('.json')} lacks what describes gates ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    if constraint not in CONSTRAINTS:
        raise CheckpointError(f"{path.with_suffix('.json')} names the constraint {constraint!r}, which is unknown")
    if shape.depths != len(adapter.blocks) + 2:
        raise CheckpointError(
            f"{str(path)!r} holds gates for {shape.depths - 2} blocks, but the model has {len(adapter.blocks)}: they "
            f"were trained on another model; {_AGAIN}"
        )
    if not same_weights(adapter.model, model):
        raise CheckpointError(
            f"{str(path)!r} holds gates of another model: they were trained on a {model.get('kind')} whose weights "
            f"have the SHA-256 {str(model.get('sha256'))[:12]}…, and this {type(adapter.model).__name__} has others. "
            f"Gates explain only the weights that they were trained on: load those, or {_AGAIN}"
        )
    load_strictly(gates, state, str(path))
    gates = gates.to(device=device, dtype=dtype).requires_grad_(False).eval()
    features = class_features(adapter, num_classes).to(device=device, dtype=dtype) if shape.class_width else None
    return TrainedGates(gates, constraint, margin, features)
