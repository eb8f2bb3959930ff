"""Explanations by other packages, in the form that their documentation shows: ``pip install "vitexplain[peers]"``."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .measuring import Run
from .torchvision_twin import torchvision_twin


@dataclass(frozen=True, eq=False)
class Subject:
    """What is explained.

    Attributes:
        model: a timm Vision Transformer with a CLS head.
        images: (B, 3, H, W), normalised.
        classes: (B,) int64, explained.
    """

    model: nn.Module
    images: Tensor
    classes: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (h, w)."""
        model: Any = self.model
        h, w = model.patch_embed.grid_size
        return int(h), int(w)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        height, width = self.images.shape[-2:]
        return height, width


Prepare = Callable[[Subject], Run]


# ---------------------------------------------------------------------------------------------- pytorch-grad-cam


def grad_cam(name: str) -> Prepare:
    """A class of pytorch-grad-cam at the input of the last block's attention, with its usual `reshape_transform`."""

    def prepare(subject: Subject) -> Run:
        library = importlib.import_module("pytorch_grad_cam")
        targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
        height, width = subject.grid

        def reshape_transform(tokens: Tensor) -> Tensor:
            return tokens[:, 1:].reshape(len(tokens), height, width, -1).permute(0, 3, 1, 2)

        model: Any = subject.model
        layers = [model.blocks[-1].norm1]
        chosen = [targets.ClassifierOutputTarget(each) for each in subject.classes.tolist()]

        def run() -> object:
            with getattr(library, name)(model, target_layers=layers, reshape_transform=reshape_transform) as cam:
                return cam(input_tensor=subject.images, targets=chosen)

        return run

    return prepare


# ---------------------------------------------------------------------------------------------------------- captum


def captum_pixels(name: str, **arguments: Any) -> Prepare:
    """An algorithm of captum at the pixels."""

    def prepare(subject: Subject) -> Run:
        algorithm = getattr(importlib.import_module("captum.attr"), name)(subject.model)
        images = subject.images.clone().requires_grad_(name != "Occlusion")
        return lambda: algorithm.attribute(images, target=subject.classes, **arguments)

    return prepare


def captum_occlusion(subject: Subject) -> Run:
    """captum's occlusion by windows of 3 × 3 patches, one patch further each time, one window a forward."""
    height, width = (side // count for side, count in zip(subject.image_size, subject.grid, strict=True))
    window = {"sliding_window_shapes": (3, 3 * height, 3 * width), "strides": (3, height, width), "baselines": 0}
    return captum_pixels("Occlusion", **window)(subject)


class _MapOfTokens(nn.Module):
    """A norm whose patch tokens pass as a feature map (B, D, h, w), since captum takes axis 1 for channels."""

    def __init__(self, norm: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.norm, self.grid, self.map = norm, grid, nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        patches = tokens[:, 1:].transpose(1, 2)
        features = self.map(patches.reshape(*patches.shape[:2], *self.grid))
        return torch.cat([tokens[:, :1], features.flatten(2).transpose(1, 2)], 1)


def captum_layer_grad_cam(subject: Subject) -> Run:
    """captum's Grad-CAM at the input of the last block's attention."""
    layer_grad_cam = importlib.import_module("captum.attr").LayerGradCam
    model: Any = copy.deepcopy(subject.model)
    layer = _MapOfTokens(model.blocks[-1].norm1, subject.grid)
    model.blocks[-1].norm1 = layer
    algorithm = layer_grad_cam(model, layer.map)
    return lambda: algorithm.attribute(subject.images, target=subject.classes, relu_attributions=True)


# ------------------------------------------------------------------------------------------------- torch-cam and lxt


def torchcam_legrad(layers: int) -> Prepare:
    """torch-cam's LeGrad on the last blocks of the torchvision twin."""

    def prepare(subject: Subject) -> Run:
        legrad = importlib.import_module("torchcam.methods").LeGrad
        twin: Any = torchvision_twin(subject.model)

        def run() -> object:
            with legrad(twin, list(twin.encoder.layers)[-layers:]) as extractor:
                logits = twin(subject.images)
                maps = extractor(subject.classes.tolist(), logits)
            return extractor.fuse_cams(maps) if len(maps) > 1 else maps[0]

        return run

    return prepare


def lxt_attnlrp(subject: Subject) -> Run:
    """lxt's efficient rules on the torchvision twin: input times the gradient of the patched model."""
    core, models = (importlib.import_module(f"lxt.efficient.{name}") for name in ("core", "models"))
    vision_transformer = importlib.import_module("torchvision.models.vision_transformer")
    rules = models.get_default_map(vision_transformer)
    twin = torchvision_twin(subject.model)

    def run() -> Tensor:
        images = subject.images.clone().requires_grad_()
        with _forwards_kept(rules):
            core.monkey_patch(vision_transformer, rules)
            logits = twin(images)
            logits.gather(1, subject.classes[:, None]).sum().backward()
        twin.zero_grad(set_to_none=True)
        gradient: Any = images.grad
        relevance: Tensor = images.detach() * gradient
        return relevance

    return run


@contextmanager
def _forwards_kept(classes: Any) -> Iterator[None]:
    """lxt patches torch's own classes for good; here, for one run."""
    before = {each: vars(each)["forward"] for each in classes if isinstance(each, type)}
    try:
        yield
    finally:
        for each, forward in before.items():
            type.__setattr__(each, "forward", forward)
