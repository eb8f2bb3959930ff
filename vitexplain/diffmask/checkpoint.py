"""Trained gates in a file: weights as safetensors, and beside them a JSON card with the model that they belong to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.adapter import ModelAdapter
from ..models.companion import ReadOnce, check_companion_model, read_companion_card, write_companion
from ..models.weights import load_strictly, read_state
from .constraint import CONSTRAINTS, Constraint
from .gates import Gates, GateShape
from .masking import class_features

FORMAT = 1
"""Version of the card; raised when an older reader could misread a newer file."""

_METHOD = "diffmask"
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
    described = {"gates": dataclasses.asdict(gates.shape), "constraint": constraint, "margin": margin}
    return write_companion(
        path, _METHOD, FORMAT, adapter, gates.state_dict(), described, num_classes=num_classes, record=record
    )


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
    return _gates(Path(path), adapter, device, dtype)


def _read_gates(path: Path, adapter: ModelAdapter, device: torch.device, dtype: torch.dtype) -> TrainedGates:
    state, card = read_state(path), read_companion_card(path, _METHOD, FORMAT, _AGAIN)
    try:
        shape, num_classes = GateShape(**card["gates"]), int(card["model"]["num_classes"])
        constraint, margin = card["constraint"], float(card["margin"])
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
    check_companion_model(card, path, adapter, _AGAIN)
    load_strictly(gates, state, str(path))
    gates = gates.to(device=device, dtype=dtype).requires_grad_(False).eval()
    features = class_features(adapter, num_classes).to(device=device, dtype=dtype) if shape.class_width else None
    return TrainedGates(gates, constraint, margin, features)


_gates = ReadOnce(_read_gates)
