"""The batch of an exported graph: sizes that were written down as numbers, made to follow the images again.

An export with static shapes writes its sizes into each reshape. Leading axes that a reshape leaves alone have the sizes
of what is reshaped, so that tokens may be left out too. Of the others, that of the images is found by running the graph
on twice as many: a tensor that depends on them has twice the places along one axis, and where this one goes to need not
be given, for a reshape infers one size. The caller checks on the numbers that images still do not interact.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, fx

_RESHAPES: frozenset[Any] = frozenset({"view", "reshape", torch.reshape})
_REPEATS: frozenset[Any] = frozenset({"expand", "repeat"})


def free_batch(module: fx.GraphModule, images: Tensor) -> None:
    """Lets a graph take any number of images, as far as its reshapes hinder it, in place.

    Args:
        module: takes images; of fixed sizes, or of some that follow the images already.
        images: (B, channels, H, W), as many as it was exported with.

    Raises:
        Exception: whatever operations raise that still want the old number of images.
    """
    graph = module.graph
    _infer_followed(graph)
    placeholder = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(placeholder):
        count = graph.call_method("size", (placeholder, 0))
    with torch.no_grad():
        known = _Shapes(module)
        known.run(images)
        _Freeing(module, known.shapes, len(images), count).run(torch.cat([images, images]))
    if not count.users:
        graph.erase_node(count)
    module.recompile()


def _infer_followed(graph: fx.Graph) -> None:
    """A size that follows the images, alone among numbers, is inferred, so that no block has to be handed it."""
    for node in graph.nodes:
        if node.target in _RESHAPES and isinstance(node.args[1], list | tuple):
            sizes = node.args[1]
            if sum(not isinstance(size, int) or size < 0 for size in sizes) == 1:
                node.update_arg(1, [size if isinstance(size, int) else -1 for size in sizes])


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor of a forward."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


class _Freeing(fx.Interpreter):
    """Runs on another number of images, and frees each node on the way.

    Args:
        module: the graph.
        shapes: of every tensor where the number of images is the old one.
        batch: that number.
        count: the node that says how many there are.
    """

    def __init__(
        self, module: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]], batch: int, count: fx.Node
    ) -> None:
        super().__init__(module)
        self._shapes, self._batch, self._count = shapes, batch, count

    def run_node(self, n: fx.Node) -> Any:
        if n.target in _RESHAPES | _REPEATS and isinstance(n.args[1], list | tuple) and isinstance(n.args[0], fx.Node):
            free = self._reshape if n.target in _RESHAPES else self._repeat
            n.update_arg(1, free(n, n.args[0], list(n.args[1])))
        return super().run_node(n)

    def _reshape(self, node: fx.Node, state: fx.Node, sizes: list[Any]) -> list[Any]:
        """Leading axes that stay are taken from the state; behind them, the axis that images go to is inferred."""
        old, result = self._shapes[state], self._shapes[node]
        staying = next(
            (i for i, (a, b) in enumerate(zip(old, result, strict=False)) if a != b), min(len(old), len(result))
        )
        for axis in range(staying):
            sizes[axis] = self._size(node, state, axis)
        grown, others = self._grown(state), sizes[staying:]
        if (
            grown is not None
            and grown >= staying
            and -1 not in others
            and all(isinstance(each, int) for each in others)
        ):
            sizes[_place(old, grown, result)] = -1
        return sizes

    def _repeat(self, node: fx.Node, state: fx.Node, sizes: list[Any]) -> list[Any]:
        """What does not depend on the images, such as a class token, is repeated for each."""
        axis = self._grown(state)
        if axis is None and sizes[0] == self._batch:
            sizes[0] = self._count
        elif axis is not None and node.target == "expand":
            sizes[axis] = -1
        return sizes

    def _grown(self, state: fx.Node) -> int | None:
        """The axis of a tensor that has more places for more images."""
        pairs = zip(self._shapes[state], self.env[state].shape, strict=True)
        return next((axis for axis, (old, now) in enumerate(pairs) if old != now), None)

    def _size(self, node: fx.Node, state: fx.Node, axis: int) -> fx.Node:
        with node.graph.inserting_before(node):
            size = node.graph.call_method("size", (state, axis))
        size.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        self.env[size] = self.env[state].shape[axis]
        return size


def _place(old: tuple[int, ...], axis: int, result: tuple[int, ...]) -> int:
    """The axis of the result in which images lie one behind the other, if they did along an axis before."""
    entries = prod(old[axis:])
    places = [index for index in range(len(result)) if prod(result[index:]) >= entries]
    exact = [index for index in places if prod(result[index:]) == entries]
    return exact[0] if exact else places[-1]
