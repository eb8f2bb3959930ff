"""Attention masks of exported graphs that hide nothing: some models make one for every forward, of a fixed size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .operators import shows_images


def drop_open_masks(module: fx.GraphModule, images: Tensor) -> None:
    """Takes masks that are True everywhere, whatever the images show, off attention, in place.

    Args:
        module: the graph, in functions of torch.
        images: (B, channels, H, W) that it can be run on.
    """
    with torch.no_grad():
        _OpenMasks(module).run(images)
    module.recompile()


class _OpenMasks(fx.Interpreter):
    """Runs the graph, and looks at masks that depend on the sizes of images alone."""

    def run_node(self, n: fx.Node) -> Any:
        mask = n.args[3] if len(n.args) > 3 else n.kwargs.get("attn_mask")
        if n.target is F.scaled_dot_product_attention and isinstance(mask, fx.Node) and not shows_images(mask):
            value = self.env[mask]
            if value.dtype == torch.bool and value.all():
                n.args = (*n.args[:3], None, *n.args[4:]) if len(n.args) > 3 else n.args
                n.kwargs = {name: each for name, each in n.kwargs.items() if name != "attn_mask"}
        return super().run_node(n)
