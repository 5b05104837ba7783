"""Writes in place and aliases of nodes, read from operator schemas and fake tensors.

Contract
- Two values alias if their nodes' fake tensors share a storage, so views through any operator are seen.
- A write shows in a schema (`Tensor(a!)`), a trailing underscore, `out=`, `inplace=True`, `x += y` or `x[i] = y`. A
  mutating construct that is none of these is refused by name.
- An integration declares engine state that no schema shows (a KV cache reached through a layer name) as an
  `EffectTable`.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from dynaflow_serving.capture.fx.matching import calls
from dynaflow_serving.capture.fx.symbols import fake_value
from dynaflow_serving.errors import PartitionError
from dynaflow_serving.strategy.rules import function_names

# Function name -> node -> (states read, states written).
EffectTable = Mapping[str, Callable[[fx.Node], tuple[tuple[str, ...], tuple[str, ...]]]]

_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.setitem,
}  # fmt: skip


def storage_id(node: fx.Node) -> int | None:
    """Return the identity of the memory of a node's value; None without strided memory."""
    return memory_id(fake_value(node))


def memory_id(value: Any) -> int | None:
    """Return the identity of the memory of a value; None without strided memory."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return int(value.untyped_storage()._cdata)
    return None


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """Return the argument nodes whose memory `node` writes.

    Raises:
        PartitionError: `node` mutates its arguments in a way that cannot be seen.
    """
    written: list[Any] = []
    if node.op == "call_method":
        if node.target == "__setitem__" or _ends_in_underscore(str(node.target)):
            written = [node.args[0]]
    elif node.op == "call_function":
        written = _written_by_function(node)
    nodes: list[fx.Node] = []
    for argument in written:
        fx.node.map_arg(argument, nodes.append)
    return nodes


def _written_by_function(node: fx.Node) -> list[Any]:
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) and "mutation" in str(target):
        raise PartitionError(f"{node.name}: {target} mutates its arguments in ways that cannot be seen")
    if (schema := _schema(target)) is not None:
        return [
            node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    in_place = target in _IN_PLACE or node.kwargs.get("inplace") is True
    if in_place or _ends_in_underscore(getattr(target, "__name__", "")):
        return [node.args[0], node.kwargs.get("out")]
    return [node.kwargs.get("out")]


def _ends_in_underscore(name: str) -> bool:
    """Whether a name follows torch's convention for writing in place."""
    return name.endswith("_") and not name.endswith("__")


def declared_effects(node: fx.Node, table: EffectTable) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the engine states that `node` reads and those that it writes, by the integration's table."""
    for name in function_names(node) & table.keys():
        return table[name](node)
    return (), ()


def _schema(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads: list[str] = target.overloads()  # type: ignore[no-untyped-call]
        target = getattr(target, overloads[0]) if len(overloads) == 1 else target
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def hidden_edges(gm: fx.GraphModule, effects: EffectTable) -> dict[fx.Node, set[fx.Node]]:
    """Return node -> earlier nodes that it must follow because of writes in place and declared engine state."""
    edges: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    writer: dict[Any, fx.Node] = {}
    readers: dict[Any, list[fx.Node]] = defaultdict(list)
    for n in calls(gm):
        reads, writes = declared_effects(n, effects)
        written = {storage_id(a) for a in written_arguments(n)} | set(writes)
        for key in ({storage_id(a) for a in n.all_input_nodes} | set(reads) | written) - {None}:
            if key in writer:
                edges[n].add(writer[key])
            if key in written:
                edges[n].update(readers.pop(key, ()))
                writer[key] = n
            else:
                readers[key].append(n)
        edges[n].discard(n)
    return edges


def piece_effects(
    graph: fx.GraphModule, storages: list[str], effects: EffectTable
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what a piece writes, and what engine state it reads.

    Args:
        graph: the piece.
        storages: of its arguments.
        effects: the integration's table.

    Returns:
        The storages and engine states that it writes in place, and the engine states that it only reads.
    """
    holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    argument = {storage_id(p): s for p, s in zip(holders, storages, strict=True)}
    argument.pop(None, None)
    writes: dict[str, None] = {}
    reads: dict[str, None] = {}
    for n in calls(graph):
        for a in written_arguments(n):
            if (storage := argument.get(storage_id(a))) is not None:
                writes[storage] = None
        read, wrote = declared_effects(n, effects)
        reads.update(dict.fromkeys(read))
        writes.update(dict.fromkeys(wrote))
    return tuple(writes), tuple(r for r in reads if r not in writes)
