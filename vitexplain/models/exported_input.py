"""What an exported graph takes and gives: one batch of images, logits, and the patches that it cuts."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree

from ..errors import InputError, UnsupportedModelError
from ..randomness import DRAWN
from .operators import evaluate, mark_images, operator_name


@dataclass(frozen=True)
class ExportedInput:
    """The images that a graph was exported with.

    Attributes:
        shape: (B, channels, H, W).
        fixed: for each axis, whether it takes only this many.
    """

    shape: tuple[int, int, int, int]
    fixed: tuple[bool, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Pixels (H, W)."""
        return self.shape[2:]

    @property
    def fixed_batch(self) -> int | None:
        """The one number of images that is taken; None for any."""
        return self.shape[0] if self.fixed[0] else None

    def noise(self, like: Tensor | None, seed: int) -> Tensor:
        """Images (B, channels, H, W) to try the graph on, on the device and in the precision of a weight."""
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), **DRAWN)
        return noise if like is None else noise.to(like)


class _FixedSize(nn.Module):
    """Refuses images of other sizes than the graph was exported with: its reshapes could take them for more images."""

    def __init__(self, images: ExportedInput) -> None:
        super().__init__()
        self._images = images

    def forward(self, images: Tensor) -> Tensor:
        pairs = zip(images.shape[1:], self._images.shape[1:], self._images.fixed[1:], strict=True)
        if any(found != expected and fixed for found, expected, fixed in pairs):
            raise InputError(
                f"found images of shape {tuple(images.shape[1:])}, expected {self._images.shape[1:]}, with which the "
                "model was exported"
            )
        return images


def flattened(module: fx.GraphModule) -> tuple[fx.GraphModule, ExportedInput]:
    """A copy of the graph, on the same parameters, from images to logits, in evaluation mode; and what images it takes.

    Raises:
        UnsupportedModelError: it takes more than images, returns no logits, or was exported in training mode.
    """
    graph = deepcopy(module.graph)
    specification = getattr(getattr(graph._codegen, "pytree_info", None), "out_spec", None)
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor) and not node.users:
            graph.erase_node(node)
    evaluate(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    shapes = [tuple(getattr(node.meta.get("val"), "shape", ())) for node in placeholders]
    if [len(shape) for shape in shapes] != [4]:
        raise UnsupportedModelError(
            f"the exported graph takes tensors of shapes {shapes}; expected images alone, (B, channels, H, W). Wrap "
            "the model in a module that takes such images, and export that"
        )
    _return_logits(graph, specification)
    images = _images(shapes[0])
    flat = fx.GraphModule(module, graph, "ExportedModel")
    flat.add_submodule("fixed_size", _FixedSize(images))
    with graph.inserting_after(placeholders[0]):
        checked = graph.call_module("fixed_size", (placeholders[0],))
    checked.meta["val"] = placeholders[0].meta["val"]
    mark_images(graph)
    placeholders[0].replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)
    flat.recompile()
    return flat, images


def patch_grid(flat: fx.GraphModule) -> tuple[int, int]:
    """What the patch convolution puts out (h, w): one that reads the image, in steps as large as its kernel.

    Raises:
        UnsupportedModelError: there is none.
    """
    for node in flat.graph.nodes:
        if operator_name(node) not in ("conv2d", "convolution"):
            continue
        weight, steps = node.args[1].meta["val"], (*node.args[3:4], [1])[0]
        if tuple(weight.shape[2:]) == (steps[0], steps[-1]):
            h, w = node.meta["val"].shape[2:]
            return _hint(h, 0), _hint(w, 0)
        break
    raise UnsupportedModelError(
        "no patch convolution was found in the exported graph, so the patch grid is not known; pass "
        "vitexplain.models.exported.adapt_exported(program.module(), grid=(h, w)) as the model"
    )


def _images(shape: tuple[Any, ...]) -> ExportedInput:
    fixed = tuple(isinstance(side, int) for side in shape)
    batch, channels, height, width = (_hint(side, 2) for side in shape)
    return ExportedInput((batch, channels, height, width), fixed)


def _hint(size: Any, otherwise: int) -> int:
    """A size, or what a size that may vary was when the model was exported."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return otherwise if hint is None else int(hint)


def _return_logits(graph: fx.Graph, specification: Any) -> None:
    """Makes the graph return its logits alone, which its output is, or which it has."""
    output = next(node for node in graph.nodes if node.op == "output")
    flat = output.args[0]
    given = flat if isinstance(flat, list | tuple) else [flat]
    index: Any = 0 if specification is None else _pytree.tree_unflatten(list(range(len(given))), specification)
    index = getattr(index, "logits", index)
    shape = tuple(given[index].meta["val"].shape) if isinstance(index, int) else ()
    if len(shape) != 2:
        found = shape or f"a {type(index).__name__}"
        raise UnsupportedModelError(
            f"the exported graph returns {found}; expected logits of shape (B, C), one row an image, or an object that "
            "has `logits`. Wrap the model in a module that returns such scores, and export that"
        )
    output.args = (given[index],)
