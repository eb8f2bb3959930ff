"""The state that an interrupted training of gates goes on from; read without running code from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import write_whole
from ..models.weights import first_line


def write_training_state(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes tensors, numbers, texts and containers of them, whole or not at all.

    Args:
        path: where to.
        identity: what the state is good for; compared on reading.
        state: what is kept.

    Raises:
        ExportError: the file cannot be written.
    """
    write_whole(path, lambda file: torch.save({"identity": identity, "state": state}, file))


def read_training_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What `write_training_state` kept.

    Raises:
        CheckpointError: the file is missing, broken, holds other objects, or is of another model or other settings.
    """
    if not path.is_file():
        raise CheckpointError(f"found no training to go on with at {str(path)!r}: start without resume")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, state = content["identity"], content["state"]
    except Exception as error:  # torch raises kinds of its own on broken files
        raise CheckpointError(
            f"{str(path)!r} cannot be read as the state of a training ({first_line(error)}); delete it and start anew"
        ) from error
    changed = [name for name in identity if found.get(name) != identity[name]]
    if changed:
        raise CheckpointError(
            f"{str(path)!r} is of another training: {', '.join(changed)} differ. Go on with the same model, data and "
            "settings, or delete it and start anew"
        )
    kept: dict[str, Any] = state
    return kept
