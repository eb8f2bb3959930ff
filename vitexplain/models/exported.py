"""Exported models: the graph of `torch.export`, made into a model of modules that can be watched.

The user's graph stays as it is. A copy of it, on the same parameters, is taken to evaluation mode, written in functions
of torch, freed of the number of images that it was exported with, and cut into modules again; the result is compared
with the graph on noise. What cannot be made so leaves a model that is asked for logits alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, fx, nn

from ..errors import UnsupportedModelError
from .adapter import ModelAdapter, first_weight
from .batch_axis import free_batch
from .black_box import BlackBoxAdapter
from .exported_input import ExportedInput, flattened, patch_grid
from .multi_head import restore_multi_head
from .open_masks import drop_open_masks
from .operators import decomposed, translate
from .regrouping import regroup


def adapt_exported(module: fx.GraphModule, grid: tuple[int, int] | None = None) -> ModelAdapter:
    """The adapter of an exported model.

    Args:
        module: the module of an exported program.
        grid: patches (h, w); those of the patch convolution where not given.

    Returns:
        A `DiscoveredAdapter`, for all methods that work on the module it was made from; a `FeatureAdapter` for a
        pyramid; a `BlackBoxAdapter` where the graph does not show what is computed, or wants one number of images.

    Raises:
        UnsupportedModelError: it takes more than images, returns no logits, was exported in training mode, or has no
            patch grid.
    """
    flat, images = flattened(module)
    _quiet([flat])
    try:
        return _look_into(flat, images)
    except UnsupportedModelError as error:
        found = grid or patch_grid(flat)
        return BlackBoxAdapter(flat, images.shape[1:], found, batch=images.fixed_batch, reason=str(error))


def _quiet(made: Iterable[nn.Module]) -> None:
    """Has errors of modules made here raised alone; each of a class of its own, they would also print them."""
    for each in made:
        if isinstance(each, fx.GraphModule):
            type(each).__call__ = nn.Module.__call__  # type: ignore[method-assign]


def _look_into(flat: fx.GraphModule, images: ExportedInput) -> ModelAdapter:
    from .discovery import DiscoveredAdapter
    from .features import FeatureAdapter

    whole = _watchable(flat, images)
    try:
        return DiscoveredAdapter(whole, images.size)
    except UnsupportedModelError as error:
        try:
            return FeatureAdapter(whole, images.size, reason=str(error))
        except UnsupportedModelError:
            raise error from None


def _watchable(flat: fx.GraphModule, images: ExportedInput) -> fx.GraphModule:
    """The model of modules, for any number of images.

    Raises:
        UnsupportedModelError: its operations are too small to tell, or it does not compute the same.
    """
    if found := decomposed(flat.graph):
        raise UnsupportedModelError(
            f"layers and attention were taken apart ({', '.join(found)}), as run_decompositions and older versions of "
            "torch.export do"
        )
    module = fx.GraphModule(flat, deepcopy(flat.graph), "ExportedModel")
    restore_multi_head(module)
    translate(module)
    reference = first_weight(flat)
    first, second = images.noise(reference, 0), images.noise(reference, 1)
    with torch.inference_mode(False), torch.no_grad():
        try:
            drop_open_masks(module, first)
            free_batch(module, first)
            theirs = set(flat.modules())
            _quiet(each for each in regroup(module).modules() if each not in theirs)
            expected = torch.cat([flat(first), flat(second)])
            same = _same(module(torch.cat([first, second])), expected) and _same(module(second[-1:]), expected[-1:])
        except (MemoryError, torch.cuda.OutOfMemoryError):  # says nothing about the model
            raise
        except Exception as error:  # whatever operations raise that want another number of images, or were misread
            raise UnsupportedModelError(
                f"it takes {images.shape[0]} images at a time ({type(error).__name__}: {_first_line(error)}); "
                "export it with a dynamic batch to have more methods"
            ) from error
    if not same:
        raise UnsupportedModelError(
            f"it computes something else on other numbers of images than {images.shape[0]}; export it with a dynamic "
            "batch to have more methods"
        )
    return module


def _same(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 0.05
    scale = float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=tolerance * max(scale, 1e-6))


def _first_line(error: Exception) -> str:
    """What an operation raised, without the listing of the graph that follows."""
    return str(error).partition("\n")[0]
