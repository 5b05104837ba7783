"""`x.size()` as one integer per dimension, so that no `torch.Size` crosses an operator's border.

Contract
- A static dimension becomes a constant. A dimension that is a graph input becomes that input. Any other dimension gets
  a size look-up of its own.
- The reason: compilers of single operators take tensors and symbolic integers, not `torch.Size`.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from dynaflow_serving.capture.fx.symbols import fake_value


def decompose_sizes(gm: fx.GraphModule) -> None:
    """Rewrite the look-ups of whole shapes; `gm` is changed."""
    known = {
        fake.node.expr: n
        for n in gm.graph.nodes
        if n.op == "placeholder" and isinstance(fake := fake_value(n), torch.SymInt)
    }
    for node in list(gm.graph.nodes):
        if node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs:
            tensor = node.args[0]
            sizes = tuple(_dimension(gm, node, tensor, d, known) for d in range(fake_value(tensor).dim()))
            for user in list(node.users):
                if user.target is operator.getitem and isinstance(user.args[1], int):
                    _replace(user, sizes[user.args[1]])
                else:
                    put = functools.partial(_put, node, sizes)
                    user.args = fx.node.map_arg(user.args, put)
                    user.kwargs = fx.node.map_arg(user.kwargs, put)
            gm.graph.erase_node(node)
    gm.recompile()


def _dimension(gm: fx.GraphModule, node: fx.Node, tensor: fx.Node, d: int, known: dict[Any, fx.Node]) -> Any:
    """Return dimension `d` of `tensor` as a constant or a node before `node`; `known` are sizes that are inputs."""
    size = fake_value(tensor).shape[d]
    if not isinstance(size, torch.SymInt):
        return size
    if size.node.expr in known:
        return known[size.node.expr]
    with gm.graph.inserting_before(node):
        look_up = gm.graph.call_method("size", (tensor, d))
    look_up.meta = {**node.meta, "example_value": size}
    return look_up


def _put(old: fx.Node, new: Any, argument: fx.Node) -> Any:
    """Return `new` for `old`, and any other argument as it is."""
    return new if argument is old else argument


def _replace(user: fx.Node, size: Any) -> None:
    """Put `size`, a node or a constant, wherever `user` was read."""
    for reader in list(user.users):
        reader.args = fx.node.map_arg(reader.args, functools.partial(_put, user, size))
        reader.kwargs = fx.node.map_arg(reader.kwargs, functools.partial(_put, user, size))
    user.graph.erase_node(user)
