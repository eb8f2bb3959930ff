"""The operators of exported graphs as the functions of torch that eager models call.

`torch.export` writes a model down in operators of ATen. Whatever watches a forward knows the functions above them, so
each node is turned back into the function, method or layer that it came from. Weights stay the same objects.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import UnsupportedModelError

_NAMED: dict[str, Callable[..., Any] | str] = {
    "unfold": "unfold",  # that of torch.nn.functional is another
    "split_with_sizes": torch.split,
    "linalg_vector_norm": torch.linalg.vector_norm,
    "mul_": "__imul__",
    "add_": "__iadd__",
}
"""Operators that are not called by their own name: a function, or the name of a method of tensors."""

_KEPT = frozenset({"batch_norm", "embedding", "instance_norm", "sym_size"})
"""Operators whose function takes its arguments in another order, and of which nobody asks anything."""

_WITHOUT_BACKEND = {"layer_norm": 5, "group_norm": 5}
"""Arguments of the function; the operator has one more, about the library that computes it."""

_BACKEND = frozenset({"cudnn_enable", "cudnn_enabled", "layout", "pin_memory"})
"""Named arguments that functions do not have, or that change no number."""

_LAYERS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
}
"""Functions that are layers where their weights are parameters; and their arguments."""

_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
_IDENTITY = frozenset({*_DROPOUTS, *(f"{each}_" for each in _DROPOUTS), "alias"})
"""What gives its input back, in evaluation mode."""

_DECOMPOSED = frozenset({"_softmax", "addmm", "native_layer_norm", "native_group_norm"})
"""Operators that only a graph has whose layers and attention were taken apart, as `run_decompositions` does."""

_CHECKS = frozenset(
    {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}
)


def operator_name(node: fx.Node) -> str | None:
    """The name of a node's ATen operator, such as ``layer_norm``; None for nodes that call none."""
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else None


def mark_images(graph: fx.Graph) -> None:
    """Notes which nodes of a graph depend on more of its images than their sizes; see `shows_images`."""
    for node in graph.nodes:
        given = node.op == "placeholder" or any(map(shows_images, node.all_input_nodes))
        node.meta["shows_images"] = given and operator_name(node) != "sym_size"


def shows_images(node: fx.Node) -> bool:
    """Whether a node depends on the pixels of the images, in a graph that was marked."""
    return bool(node.meta.get("shows_images"))


def evaluate(graph: fx.Graph) -> None:
    """Takes a graph to evaluation mode, in place: no dropout, and no checks of the shapes that it was exported with.

    Raises:
        UnsupportedModelError: it is random in another way, or updates its own statistics.
    """
    for node in list(graph.nodes):
        name = operator_name(node)
        if name in _IDENTITY:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif name in _CHECKS or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.erase_node(node)
        elif name == "scaled_dot_product_attention":
            node.args = (*node.args[:4], *((0.0, *node.args[5:]) if len(node.args) > 4 else ()))
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "dropout_p"}
        elif name is not None and (_is_random(node) or (name == "batch_norm" and node.args[5])):
            raise UnsupportedModelError(
                f"found {name!r} in its training form in an exported graph, expected a model that was exported in "
                "evaluation mode: call model.eval() before torch.export.export"
            )


def translate(module: fx.GraphModule) -> None:
    """Turns operators into functions, methods and layers, in place; those that have none stay."""
    graph = module.graph
    for node in list(graph.nodes):
        name = operator_name(node)
        if name is None or name in _KEPT:
            continue
        if name in ("slice", "index"):
            _index(node, name)
        elif name in ("softmax", "log_softmax"):
            node.target, node.args, node.kwargs = getattr(torch, name), node.args[:1], _softmax_settings(node)
        elif name == "einsum":
            node.target, node.args = torch.einsum, (node.args[0], *node.args[1])
        else:
            _rename(node, name)
        if node.target in _LAYERS:
            _layer(module, node)
    module.recompile()


def decomposed(graph: fx.Graph) -> list[str]:
    """The operators in a graph by which it shows that its layers and attention were taken apart."""
    names = {operator_name(node) or "" for node in graph.nodes}
    return sorted(name for name in names if name in _DECOMPOSED or name.startswith("_scaled_dot_product"))


def _is_random(node: fx.Node) -> bool:
    attention = operator_name(node) == "scaled_dot_product_attention"
    return torch.Tag.nondeterministic_seeded in node.target.tags and not attention  # type: ignore[union-attr]


def _rename(node: fx.Node, name: str) -> None:
    target = _NAMED.get(name)
    if target is None:
        target = next((found for owner in (F, torch) if (found := getattr(owner, name, None)) is not None), None)
    if target is None and hasattr(Tensor, name):
        target = name
    if target is None or name.startswith("_"):
        return
    count = _WITHOUT_BACKEND.get(name, len(node.args))
    node.args = node.args[:count]
    node.kwargs = {key: value for key, value in node.kwargs.items() if key not in _BACKEND}
    node.op, node.target = "call_method" if isinstance(target, str) else "call_function", target


def _softmax_settings(node: fx.Node) -> dict[str, Any]:
    """By name, as models write them, and without a precision where none is asked for."""
    given = dict(zip(("dim", "dtype"), node.args[1:], strict=False)) | node.kwargs
    return {name: each for name, each in given.items() if each is not None}


def _index(node: fx.Node, name: str) -> None:
    """A part of a tensor, by square brackets."""
    state, given = node.args[0], list[Any](node.args[1:])
    if name == "slice":
        axis, *ends = given + [0, None, None, 1][len(given) :]
        if axis < 0:
            return
        places = (*[slice(None)] * axis, slice(*ends))
    else:
        places = tuple(slice(None) if each is None else each for each in given[0])
    node.target, node.args = operator.getitem, (state, places)


def _layer(module: fx.GraphModule, node: fx.Node) -> None:
    """An operation with weights of its own, as the layer that has them."""
    names = _LAYERS[node.target]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    state, nodes = given.pop("input"), [given.pop(name, None) for name in ("weight", "bias")]
    weight, bias = (_parameter(module, each) for each in nodes)
    if weight is None or (bias is None) != (nodes[1] is None):
        return
    if node.target is F.linear:
        layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    elif node.target is F.layer_norm:
        layer = nn.LayerNorm(**given, bias=bias is not None, device="meta")
    else:
        width = weight.shape[1] * given.get("groups", 1)
        layer = nn.Conv2d(
            width,
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            bias=bias is not None,
            device="meta",
            **_on_both_axes(given),
        )
    layer.weight, layer.bias = weight, bias
    name = f"{node.name}_layer"
    module.add_submodule(name, layer)
    node.op, node.target, node.args, node.kwargs = "call_module", name, (state,), {}


def _on_both_axes(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a convolution; ATen writes one number for both axes."""
    return {key: value * 2 if isinstance(value, list) and len(value) == 1 else value for key, value in settings.items()}


def _parameter(module: fx.GraphModule, node: Any) -> nn.Parameter | None:
    """The parameter that a node reads; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = operator.attrgetter(str(node.target))(module)
    return found if isinstance(found, nn.Parameter) else None
