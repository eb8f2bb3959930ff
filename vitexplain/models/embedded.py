"""The Vision Transformers that ship with the package, trained on the procedural scenes.

They need no download, so every example, test and benchmark can run anywhere. The first was trained by
`vitexplain.training.classifier` on the data of `vitexplain.data.scenes`; its sibling was trained on from there by
`vitexplain.benchmarks.patch_masks`, with masks of 1 % of the scenes, for the method `pm`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from .weights import check_there, load_strictly, read_state

SCENES_ARCHITECTURE: Mapping[str, Any] = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 3.0,
    "num_classes": 12,
    "embed_layer": "convolutional",
}
"""Arguments of timm's `VisionTransformer` for the shipped model; `embed_layer` by name."""

_OF_TIMM = (
    "For weights of a timm model add --model timm:ARCHITECTURE (in Python: load_model('timm:ARCHITECTURE', "
    "checkpoint=…))"
)
_WEIGHTS = "scenes_vit.safetensors"
_PATCH_MASKS = "scenes_pm.safetensors"


class ConvolutionalStem(nn.Module):
    """Patch embedding by three strided 3 x 3 convolutions; learns from far fewer images than one linear map.

    Takes images (B, 3, S, S) and gives tokens (B, N, D), one for each cell of 8 x 8 pixels in reading order. A token
    sees its cell and a margin of up to 7 pixels above and to the left of it, and none on the other sides.

    Args:
        img_size: side of the images in pixels, a multiple of 8.
        patch_size: side of a cell; only 8.
        in_chans: number of colour channels.
        embed_dim: number of features of a token.
        **unused: further arguments that timm passes to a patch embedding.
    """

    def __init__(
        self, img_size: int = 96, patch_size: int = 8, in_chans: int = 3, embed_dim: int = 96, **unused: Any
    ) -> None:
        super().__init__()
        if patch_size != 8 or img_size % 8:
            raise ValueError(f"img_size is {img_size}, patch_size {patch_size}; expected a multiple of 8, and 8")
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        for before, after in ((in_chans, 24), (24, 48), (48, 96)):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.proj = nn.Conv2d(96, embed_dim, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.proj(self.convolutions(images))
        return tokens.flatten(2).transpose(1, 2)


def build_model(architecture: Mapping[str, Any] = SCENES_ARCHITECTURE) -> nn.Module:
    """Builds a timm `VisionTransformer` with fresh weights.

    Args:
        architecture: its keyword arguments; `embed_layer` may be ``"convolutional"`` (see `ConvolutionalStem`).

    Raises:
        CheckpointError: timm does not take these arguments.
    """
    from timm.models.vision_transformer import VisionTransformer

    arguments = dict(architecture)
    if arguments.get("embed_layer") == "convolutional":
        arguments["embed_layer"] = ConvolutionalStem
    try:
        model: nn.Module = VisionTransformer(**arguments)
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
            f"{path} is not JSON ({error}). Expected the description written with the weights; train again, or move it "
            "away if it is something else."
        ) from error
    if not isinstance(card, dict) or not isinstance(card.get("architecture"), dict):
        raise CheckpointError(
            f"{path} has no 'architecture' entry, expected what `vitexplain train classifier` writes. {_OF_TIMM}"
        )
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
    weights = Path(weights)
    check_there(weights)
    description = weights.with_suffix(".json")
    if not description.is_file():
        raise CheckpointError(
            f"{str(weights)!r} has no description {description.name!r} beside it, which `vitexplain train classifier` "
            f"writes with the weights: keep both files together. {_OF_TIMM}"
        )
    card = read_checkpoint_card(weights)
    state = read_state(weights)
    model = build_model(card["architecture"])
    load_strictly(model, state, str(weights))
    return model.eval()


def load_scenes_model() -> nn.Module:
    """Returns the shipped model: a timm `VisionTransformer` that names the object in a scene.

    It takes images (B, 3, 96, 96) normalised to -1..1 (`vitexplain.data.scenes.normalise`) and gives logits (B, 12)
    over `vitexplain.data.scenes.CLASS_NAMES`. Patch grid 12 x 12, one prefix token (CLS), 6 blocks of 3 heads.

    Returns:
        A new model in evaluation mode, float32, on the CPU.

    Raises:
        CheckpointError: the weights in the installed package are missing or broken.
    """
    return _shipped(_WEIGHTS)


def load_patch_mask_model() -> nn.Module:
    """Returns the sibling of the shipped model whose patches were taught, by a few masks, to name their object.

    Architecture, names of weights, input and classes are those of `load_scenes_model`, and nearly so its answers; the
    method `pm` reads its maps. Other methods explain it like any model.

    Returns:
        A new model in evaluation mode, float32, on the CPU.

    Raises:
        CheckpointError: the weights in the installed package are missing or broken.
    """
    return _shipped(_PATCH_MASKS)


def scenes_card() -> dict[str, Any]:
    """Returns what is recorded about the shipped model: architecture, classes, training recipe and accuracies.

    Raises:
        CheckpointError: the description in the installed package is missing or broken.
    """
    with resources.as_file(resources.files("vitexplain").joinpath("assets")) as folder:
        return read_checkpoint_card(folder / _WEIGHTS)


def _shipped(weights: str) -> nn.Module:
    with resources.as_file(resources.files("vitexplain").joinpath("assets")) as folder:
        return load_checkpoint(folder / weights)
