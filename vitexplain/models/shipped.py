"""Checkpoints of methods that learn, as they ship with the package, found by the model that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from .fingerprint import fingerprint, same_weights

ASSETS = Path(__file__).parent.parent / "assets"
"""Where shipped checkpoints lie, each ``<model>_<method>.safetensors`` with a card of the same name in JSON."""


def model_entry(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint's card says, under ``model``, of the model that it belongs to; JSON-able.

    Returns:
        ``kind``, the class's name; ``parameters``, their number; and the digests of `fingerprint`.
    """
    return {"kind": type(model).__name__, "parameters": _count(model), **fingerprint(model)}


def shipped_checkpoint(method: str, model: nn.Module) -> Path | None:
    """The checkpoint that the package ships for a method on these very weights, in whatever precision they are.

    Weights are hashed only where a shipped model has as many parameters.

    Args:
        method: registry name.
        model: the model to be explained.

    Returns:
        The ``.safetensors`` file; None where none was trained on this model.
    """
    for card in sorted(ASSETS.glob(f"*_{method}.json")):
        known = json.loads(card.read_text(encoding="utf-8"))["model"]
        if known["parameters"] == _count(model) and same_weights(model, known):
            return card.with_suffix(".safetensors")
    return None


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
