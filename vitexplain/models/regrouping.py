"""Modules of an exported graph, made again: every run of operations that one module call left behind becomes a module.

`torch.export` notes for each operation in which module calls it was made. Hooks can be placed on the modules made here
as on those of the model that was exported; parameters are the same objects.
"""

from __future__ import annotations

from itertools import groupby
from operator import getitem
from typing import Any

from torch import fx

from .operators import shows_images


def regroup(module: fx.GraphModule, depth: int = 1) -> fx.GraphModule:
    """The same graph, with a module for each module call.

    Args:
        module: a flat graph whose operations say where they come from.
        depth: nested calls that this graph stands in.
    """
    graph = module.graph
    operations = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    for call, run in groupby(operations, lambda node: _calls(node)[depth - 1 : depth]):
        nodes = list(run)
        if call and not (len(nodes) == 1 and nodes[0].op == "call_module"):
            _group(module, nodes, depth)
    module.recompile()
    return module


def _calls(node: fx.Node) -> list[tuple[str, Any]]:
    """The module calls inside the model that an operation was made in, outermost first: identity and class."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, kind) for key, (_, kind) in stack.items()][1:]


def _group(module: fx.GraphModule, nodes: list[fx.Node], depth: int) -> None:
    """Puts a module in the place of some operations, in place."""
    inside = set(nodes)
    inputs = [each for each in dict.fromkeys(a for node in nodes for a in node.all_input_nodes) if each not in inside]
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    if not outputs:
        return
    graph, copies = fx.Graph(), {}
    given = sorted((each for each in inputs if each.op != "get_attr"), key=lambda each: not shows_images(each))
    for each in given:
        copies[each] = graph.placeholder(each.name)
    for each in (*(each for each in inputs if each.op == "get_attr"), *nodes):
        copies[each] = graph.node_copy(each, copies.__getitem__)
    results = [copies[each] for each in outputs]
    graph.output(results[0] if len(results) == 1 else tuple(results))
    kind = str(_calls(nodes[0])[depth - 1][1])
    inner = regroup(fx.GraphModule(module, graph, kind.rpartition(".")[2].strip("'>")), depth + 1)
    name = f"{nodes[0].name}_group"
    module.add_submodule(name, inner)
    whole = module.graph
    with whole.inserting_before(nodes[0]):
        call = whole.call_module(name, tuple(given))
        parts = [call]
        if len(outputs) > 1:
            parts = [whole.call_function(getitem, (call, index)) for index in range(len(outputs))]
    for old, new in zip(outputs, parts, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        whole.erase_node(node)
