"""Models that were turned into graphs: what can be explained of them, and what to pass instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedModelError


def refuse_graphs(model: Any) -> None:
    """Refuses models whose blocks were dissolved into one graph of operations: there is nothing left to watch.

    Modules under `torch.compile` still have their blocks, and pass; so do graphs of `torch.fx` that call modules.

    Raises:
        UnsupportedModelError: an exported program or its module, or TorchScript.
    """
    found = _kind(model)
    if found is not None:
        raise UnsupportedModelError(
            f"found {found}, expected the torch.nn.Module that it was made from: attention and token states are read "
            "inside its blocks, which such a graph does not have. Pass the module itself; under torch.compile it may be"
        )


def _kind(model: Any) -> str | None:
    if isinstance(model, torch.export.ExportedProgram):
        return "an exported program (torch.export)"
    if isinstance(model, torch.jit.ScriptModule):
        return "a TorchScript module (torch.jit)"
    if isinstance(model, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes
    ):
        return "the module of an exported program (torch.export)"
    return None
