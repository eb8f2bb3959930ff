"""Model families: one adapter each, chosen by inspecting the module."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..errors import UnsupportedModelError
from .adapter import BlockModules, ModelAdapter
from .graphs import is_exported, opened

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

__all__ = ["BlockModules", "ModelAdapter", "adapt", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and peft wrappers, which hide its kind, hooks and attention."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = cast("Any", model).get_base_model()
        else:
            return model


def adapt(model: nn.Module | ModelAdapter | ExportedProgram) -> ModelAdapter:
    """Finds the adapter for a model by looking at what it is.

    Args:
        model: a supported model, possibly compiled, exported or wrapped; or an adapter, returned as it is.

    Raises:
        UnsupportedModelError: no adapter fits, or what was passed is no model.
    """
    if isinstance(model, ModelAdapter):
        return model
    model = opened(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"found a {type(model).__name__}, expected a torch.nn.Module (vitexplain.load_model makes one from a name)"
        )
    module = unwrap(model)
    if is_exported(module):
        from .exported import adapt_exported

        return adapt_exported(cast("fx.GraphModule", module))
    # a model of timm cannot exist before timm is imported, so the import costs nobody anything
    if "timm" in sys.modules:
        from .cait import CaitAdapter, is_cait
        from .timm_family import TimmAdapter, is_timm_transformer
        from .windows import SwinAdapter, is_swin

        if is_timm_transformer(module):
            return TimmAdapter(module)
        if is_swin(module):
            return SwinAdapter(module)
        if is_cait(module):
            return CaitAdapter(module)
    from .discovery import DiscoveredAdapter
    from .patch_input import PatchInput, takes_patches

    if takes_patches(module):
        module = PatchInput(module)
    try:
        return DiscoveredAdapter(module)
    except UnsupportedModelError as error:
        from .features import FeatureAdapter

        try:
            return FeatureAdapter(module, reason=str(error))
        except UnsupportedModelError:
            raise error from None
