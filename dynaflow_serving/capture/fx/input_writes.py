"""Writes of an ATen graph into its inputs: AOT autograd leaves `input.copy_(result)` at the end of the graph.

Contract
- An input with a token axis (a KV cache) is written in place where the result is made, without a copy. The copy stays
  if the operator has no in-place form, or if a later node reads the old contents.
- An input without a token axis (a counter of past tokens) would be written once per micro-batch. Its new contents
  become an extra output, which the caller copies once, after the plan.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import fx

from dynaflow_serving.capture.fx.effects import storage_id
from dynaflow_serving.capture.fx.symbols import fake_value, has_tokens


def settle_input_writes(gm: fx.GraphModule, tokens: Set[Any]) -> list[int]:
    """Rewrite the final copies of `gm`, which is changed; `tokens` are the token symbols.

    Returns:
        The positions of the inputs whose new contents are extra outputs, in the outputs' order.
    """
    graph = gm.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.nodes if n.op == "output")
    extra: list[tuple[int, fx.Node]] = []
    for node in list(graph.nodes):
        is_final = node.target is torch.ops.aten.copy_.default and node.users.keys() <= {output}
        if not is_final or node.args[0] not in inputs:
            continue
        target, result = node.args[0], node.args[1]
        if not has_tokens(fake_value(target), tokens):
            extra.append((inputs.index(target), result))
            node.replace_all_uses_with(result)
        elif (in_place := _in_place_form(result)) and _is_last_use(graph, target, result):
            result.target, result.meta["val"] = in_place, target.meta["val"]
            node.replace_all_uses_with(target)
        else:
            continue
        graph.erase_node(node)
    if extra:
        output.args = ((*output.args[0], *(result for _, result in extra)),)
    gm.recompile()
    return [position for position, _ in extra]


def _in_place_form(node: fx.Node) -> Any:
    """Return `aten.index_copy_.default` for `aten.index_copy.default`; None without one with equal arguments."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    packet = getattr(torch.ops.aten, f"{target.overloadpacket.__name__}_", None)
    form = getattr(packet, target._overloadname, None)
    if form is None or [a.name for a in form._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    return form


def _is_last_use(graph: fx.Graph, target: fx.Node, result: fx.Node) -> bool:
    """Whether `result` overwrites its first argument, `target`, and nothing reads that memory afterwards."""
    if result.args[0] is not target:
        return False
    after = False
    for n in graph.nodes:
        stale = [a for a in n.all_input_nodes if storage_id(a) == storage_id(target)]
        if after and stale and n.target is not torch.ops.aten.copy_.default:
            return False
        after = after or n is result
    return True
