"""The Vision Transformer that ships with the package, trained on the procedural scenes.

It needs no download, so every example, test and benchmark can run anywhere. Its training is in
`vitexplain.training.classifier`, its data in `vitexplain.data.scenes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitexplain.errors import CheckpointError

SCENES_ARCHITECTURE: Mapping[str, Any] = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "num_classes": 12,
}
"""Arguments of timm's `VisionTransformer` for the shipped model."""

_WEIGHTS = "scenes_vit.safetensors"


def build_model(architecture: Mapping[str, Any] = SCENES_ARCHITECTURE) -> nn.Module:
    """Builds a timm `VisionTransformer` with fresh weights.

    Args:
        architecture: its keyword arguments.

    Raises:
        CheckpointError: timm does not take these arguments.
    """
    from timm.models.vision_transformer import VisionTransformer

    try:
        model: nn.Module = VisionTransformer(**dict(architecture))
    except (TypeError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"no VisionTransformer can be built from {dict(architecture)!r}: {error}. "
            "Expected the keyword arguments of timm's VisionTransformer; compare with the checkpoint's JSON file."
        ) from error
    return model


def read_checkpoint_card(weights: Path) -> dict[str, Any]:
    """Returns the JSON description that lies beside a weights file.

    Args:
        weights: the ``.safetensors`` file; its description has the same name with ``.json``.

    Raises:
        CheckpointError: the description is missing, is not JSON or names no architecture.
    """
    path = weights.with_suffix(".json")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}. Expected the description written with the weights; "
            "keep both files together or train again with `vitexplain train classifier`."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}). Train again with `vitexplain train classifier`."
        ) from error
    if not isinstance(card, dict) or not isinstance(card.get("architecture"), dict):
        raise CheckpointError(f"{path} has no 'architecture' entry. Train again with `vitexplain train classifier`.")
    return card


def load_checkpoint(weights: str | Path) -> nn.Module:
    """Returns the model of a checkpoint written by `vitexplain.training.classifier.train_classifier`.

    Args:
        weights: the ``.safetensors`` file, with its ``.json`` beside it.

    Returns:
        A timm `VisionTransformer` in evaluation mode, float32, on the CPU.

    Raises:
        CheckpointError: a file is missing or broken, or the weights do not fit the architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = Path(weights)
    card = read_checkpoint_card(weights)
    if not weights.is_file():
        raise CheckpointError(f"there is no file {weights}. Give the path of a .safetensors checkpoint.")
    try:
        state = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{weights} is not a readable safetensors file ({error}). It may be cut short; "
            "copy it again or train again with `vitexplain train classifier`."
        ) from error
    model = build_model(card["architecture"])
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"{weights} does not fit the architecture in its JSON file: {len(odd)} tensors differ, first {odd[0]!r} "
            f"(found {found.get(odd[0])}, expected {expected.get(odd[0])}). Use the JSON written with these weights."
        )
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()})
    return model.eval()


def load_scenes_model() -> nn.Module:
    """Returns the shipped model: a timm `VisionTransformer` that names the object in a scene.

    It takes images (B, 3, 96, 96) normalised to -1..1 (`vitexplain.data.scenes.normalise`) and gives logits (B, 12)
    over `vitexplain.data.scenes.CLASS_NAMES`. Patch grid 12 x 12, one prefix token (CLS), 6 blocks of 4 heads.

    Returns:
        A new model in evaluation mode, float32, on the CPU.

    Raises:
        CheckpointError: the weights in the installed package are missing or broken.
    """
    with resources.as_file(resources.files("vitexplain").joinpath("assets")) as folder:
        return load_checkpoint(folder / _WEIGHTS)


def scenes_card() -> dict[str, Any]:
    """Returns what is recorded about the shipped model: architecture, classes, training recipe and accuracies.

    Raises:
        CheckpointError: the description in the installed package is missing or broken.
    """
    with resources.as_file(resources.files("vitexplain").joinpath("assets")) as folder:
        return read_checkpoint_card(folder / _WEIGHTS)
