"""Models that were turned into graphs: which can be explained, and what to pass instead of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedModelError


def refuse_graphs(model: Any) -> None:
    """Refuses TorchScript, whose blocks were dissolved into a graph that nothing can watch.

    Modules under `torch.compile` still have their blocks; those of exported graphs are made again.

    Raises:
        UnsupportedModelError: TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "found a TorchScript module (torch.jit), expected the torch.nn.Module that it was made from: attention and "
            "token states are read inside its blocks, which such a graph does not have. Pass the module itself, which "
            "may be under torch.compile; or export it with torch.export"
        )


def opened(model: Any) -> Any:
    """The module of an exported program; any other model as it is.

    Raises:
        UnsupportedModelError: TorchScript.
    """
    refuse_graphs(model)
    return model.module() if isinstance(model, torch.export.ExportedProgram) else model


def is_exported(module: Any) -> bool:
    """Whether a module is that of an exported program: a graph of operators and no layers."""
    return isinstance(module, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
    )
