"""What tells one model's weights from another's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

PRECISIONS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Precisions in which a model may be used other than in the one that it was met in."""


def weights_digest(model: nn.Module, precision: torch.dtype | None = None) -> str:
    """SHA-256 of the names, types, shapes and content of all weights.

    Args:
        model: the module, on any device.
        precision: round floating-point weights to it first; None takes them as they are.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        if precision is not None and tensor.is_floating_point():
            tensor = tensor.to(precision)
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digests by precision; ``sha256`` is that of the weights as they are."""
    rounded = {name: weights_digest(model, precision) for name, precision in PRECISIONS.items()}
    return {"sha256": weights_digest(model), **rounded}


def same_weights(model: nn.Module, known: Mapping[str, str]) -> bool:
    """Whether a model has the weights of a fingerprint, be it in another precision."""
    if weights_digest(model) == known.get("sha256"):
        return True
    parameter = next(model.parameters(), torch.empty(0))
    name = str(parameter.dtype).removeprefix("torch.")
    name = name if name in PRECISIONS else "float32"  # double precision adds no digits to weights that had fewer
    return weights_digest(model, PRECISIONS[name]) == known.get(name)
