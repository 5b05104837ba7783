"""Random states around operators that draw nothing, as AOT autograd leaves them where a layer is recomputed.

Contract
- Gradient checkpointing runs operators again in the backward pass, under the random state of the forward pass:
  `run_and_save_rng_state` there, `run_with_rng_state` here. Attention is among them, even with a dropout of 0.
- An operator that draws nothing is called as it is. The forward graph then saves an empty tensor in place of the state,
  and nothing reads it. An operator that draws stays as it is: it is refused.
- Source: `torch._functorch.partitioners.functionalize_rng_ops` puts the states there.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.utils._pytree import tree_leaves

from dynaflow_serving.capture.fx.symbols import fake_value
from dynaflow_serving.capture.independence.prove import draws_nothing


def drop_idle_rng_states(gm: fx.GraphModule) -> None:
    """Call operators that draw nothing without their random states; `gm` is changed."""
    for node in list(gm.graph.nodes):
        if node.target is run_with_rng_state and _is_idle(node.args[1], node.args[2:], node.kwargs):
            node.replace_all_uses_with(_call(node, node.args[1], node.args[2:], node.kwargs))
            gm.graph.erase_node(node)
        elif node.target is run_and_save_rng_state and _is_idle(node.args[0], node.args[1:], node.kwargs):
            _replace_saved(node)
    gm.recompile()


def _is_idle(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if not isinstance(function, torch._ops.OpOverload):
        return False
    schema = function._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    return draws_nothing(given | dict(zip((a.name for a in schema), args)) | kwargs)


def _call(before: fx.Node, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """Put a call of `function` before a node. AOT autograd leaves no values on the nodes that this replaces."""
    with before.graph.inserting_before(before):
        call = before.graph.call_function(function, args, kwargs)
    values = fx.map_arg((args, kwargs), fake_value)
    with detect_fake_mode(tree_leaves(values)) or nullcontext():
        call.meta = {**before.meta, "val": function(*values[0], **values[1])}
    return call


def _replace_saved(node: fx.Node) -> None:
    """Put a call in the place of one that returns the random state before it, too."""
    call = _call(node, node.args[0], node.args[1:], node.kwargs)
    for part in list(node.users):
        instead = call
        if part.args[1] == 0:  # the state
            instead = _call(node, torch.ops.aten.empty.memory_format, ([0],), {"dtype": torch.uint8})
        part.replace_all_uses_with(instead)
        node.graph.erase_node(part)
    node.graph.erase_node(node)
