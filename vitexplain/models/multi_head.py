"""`nn.MultiheadAttention` in exported graphs, made again: its operations mix axes, and modules know how to read it."""

from __future__ import annotations

from itertools import takewhile
from operator import attrgetter, getitem
from typing import Any

from torch import Tensor, fx, nn

from .operators import operator_name

_PARAMETERS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
_LINEAR_MAPS = 3  # of what calls attention with two tensors or one: queries, keys and values together, the output
_PRODUCTS = ("scaled_dot_product_attention", "bmm", "baddbmm")


def restore_multi_head(module: fx.GraphModule) -> None:
    """Puts an `nn.MultiheadAttention` in the place of what a call of one left behind, in place.

    Calls with masks, and with weights for queries, keys and values of different widths, stay as they are.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        key = next((key for key, (_, kind) in stack.items() if _is_multi_head(kind)), None)
        if key is not None:
            calls.setdefault(key, []).append(node)
    for nodes in calls.values():
        _restore(module, nodes)
    module.recompile()


def _is_multi_head(kind: Any) -> bool:
    return str(kind).strip("'>").endswith("torch.nn.modules.activation.MultiheadAttention")


def _restore(module: fx.GraphModule, nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    given = [each for each in dict.fromkeys(a for node in nodes for a in node.all_input_nodes) if each not in inside]
    states = [each for each in given if _is_tensor(each) and each.op != "get_attr"]
    weights = {str(each.target): each for each in given if each.op == "get_attr"}
    found = {name: next((path for path in weights if path.endswith(f".{name}")), None) for name in _PARAMETERS}
    outputs = [node for node in nodes if _is_tensor(node) and any(user not in inside for user in node.users)]
    product = next((node for node in nodes if operator_name(node) in _PRODUCTS), None)
    complete = found["in_proj_weight"] is not None and found["out_proj.weight"] is not None
    whole = complete and set(weights) == {path for path in found.values() if path is not None}
    if product is None or not whole or len(outputs) != 1 or len(states) not in (1, 2):
        return
    if any(state.meta["val"].ndim != 3 for state in states):
        return
    parameters: dict[str, Any] = {
        name: None if path is None else attrgetter(path)(module) for name, path in found.items()
    }
    width = int(parameters["out_proj.weight"].shape[0])
    queries = product.all_input_nodes[operator_name(product) == "baddbmm"]  # which takes the mask first
    start = [operator_name(node) for node in takewhile(lambda node: operator_name(node) != "linear", nodes)]
    layer: Any = nn.MultiheadAttention(
        width,
        width // int(queries.meta["val"].shape[-1]),
        bias=found["in_proj_bias"] is not None,
        batch_first="transpose" in start,
        device="meta",
    )
    layer.in_proj_weight, layer.in_proj_bias = parameters["in_proj_weight"], parameters["in_proj_bias"]
    layer.out_proj.weight, layer.out_proj.bias = parameters["out_proj.weight"], parameters["out_proj.bias"]
    # queries, keys and values of three tensors come from three maps; then the first two are of the same states
    apart = sum(operator_name(node) == "linear" for node in nodes) > _LINEAR_MAPS
    keys = states[0] if apart else states[-1]
    name = f"{nodes[0].name}_multi_head"
    module.add_submodule(name, layer)
    with module.graph.inserting_before(outputs[0]):
        call = module.graph.call_module(name, (states[0], keys, states[-1]), {"need_weights": False})
        result = module.graph.call_function(getitem, (call, 0))
    outer = dict(list(nodes[0].meta["nn_module_stack"].items())[:-1])
    call.meta["nn_module_stack"], result.meta = outer, {**outputs[0].meta, "nn_module_stack": outer}
    outputs[0].replace_all_uses_with(result)
    for node in reversed(nodes):
        if not node.users:  # sizes may be read by later calls
            module.graph.erase_node(node)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
