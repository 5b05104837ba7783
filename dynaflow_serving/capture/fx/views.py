"""Results of a graph that are views: they are made from whole tensors, as the graph itself makes them.

Contract
- A result that the graph makes by views alone, from its inputs or from earlier results, shares their memory. Merged
  micro-batches would be a copy, with other strides where the view leaves out elements or repeats them.
- AOT autograd needs the strides: it makes such results anew from what they are views of.
- Views of an input's new contents, which the graph makes before it writes them, are not made anew: such a graph is
  not split at ATen level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from dynaflow_serving.capture.fx.batched import marked_dynamic
from dynaflow_serving.capture.fx.buffers import own_code, result_list, result_of
from dynaflow_serving.capture.fx.effects import memory_id, storage_id, written_arguments
from dynaflow_serving.capture.fx.symbols import expression, fake_value


@dataclass(frozen=True)
class ViewResults:
    """The results of a graph that are views.

    Attributes:
        positions: Their positions in the result.
        bases: The positions of the results that they are views of.
        make: A function inputs, bases -> the views.
    """

    positions: tuple[int, ...]
    bases: tuple[int, ...]
    make: Callable[..., Sequence[torch.Tensor]]

    def put(self, args: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
        """Return the results of a plan, with views where the graph returns views.

        Args:
            args: The inputs of the graph.
            results: What a plan has returned for them.
        """
        made = dict(zip(self.positions, self.make(*args, *(results[i] for i in self.bases)), strict=True))
        return tuple(made.get(i, result) for i, result in enumerate(results))


def view_results(gm: fx.GraphModule, axes: Sequence[tuple[int, int]]) -> ViewResults | None:
    """Return the results of `gm` that are views; None if there are none.

    Args:
        gm: The graph.
        axes: The positions of the results that have a token axis, with that axis; the views are marked dynamic there.
    """
    if not isinstance(result_of(gm), tuple | list):
        return None
    results = result_list(gm)
    bases, views = _bases_and_views(gm, {r for r in results if isinstance(r, fx.Node)})
    positions = tuple(i for i, r in enumerate(results) if r in views and isinstance(fake_value(r), torch.Tensor))
    if not positions:
        return None
    graph, copied = fx.Graph(), {}
    for node in (*(n for n in gm.graph.nodes if n.op == "placeholder"), *bases):
        copied[node] = graph.placeholder(node.name)
    for node in views:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output([copied[results[i]] for i in positions])
    graph.eliminate_dead_code()
    marks = [(positions.index(i), axis) for i, axis in axes if i in positions]
    make = marked_dynamic(own_code(fx.GraphModule({}, graph)), marks)
    return ViewResults(positions, tuple(results.index(base) for base in bases), make)


def view_of_a_written_input(gm: fx.GraphModule) -> str:
    """Return why an ATen graph cannot be split that writes an input and may return a view of it, or ""."""
    writes = [(n, a) for n in gm.graph.nodes for a in written_arguments(n) if a.op == "placeholder"]
    memory = {storage_id(n): a.name for write, a in writes for n in (write, *write.all_input_nodes)}
    memory.pop(None, None)
    _, views = _bases_and_views(gm, set())
    for result in result_list(gm) if writes else ():
        if not isinstance(result, fx.Node) or result in views or storage_id(result) not in memory:
            continue
        if not _starts_dense(fake_value(result)):
            written = memory[storage_id(result)]
            return f"{result.name} may be a view of input {written}, which is written in place"
    return ""


def _starts_dense(fake: torch.Tensor) -> bool:
    """Whether a tensor has all elements of its memory, from the first one."""
    dense: bool = torch._prims_common.is_non_overlapping_and_dense_or_false(fake)
    return dense and bool(expression(fake.storage_offset()) == 0)


def _bases_and_views(gm: fx.GraphModule, results: set[fx.Node]) -> tuple[list[fx.Node], dict[fx.Node, None]]:
    """Return the results that are no views, and the nodes made by views alone from inputs and from those."""
    bases: list[fx.Node] = []
    views: dict[fx.Node, None] = {}
    known: set[fx.Node] = set()
    memory: set[int | None] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            known.add(node)
        elif _is_view(node, known, memory):
            views[node] = None
            known.add(node)
            continue
        elif node in results and isinstance(fake_value(node), torch.Tensor):
            bases.append(node)
            known.add(node)
        else:
            continue
        memory.add(storage_id(node))
        memory.discard(None)  # what has no strided memory has no views
    return bases, views


def _is_view(node: fx.Node, known: set[fx.Node], memory: set[int | None]) -> bool:
    """Whether `node` is a view of what is in `memory`, or a number, made from `known` nodes."""
    if node.op not in ("call_function", "call_method") or not known.issuperset(node.all_input_nodes):
        return False
    if not node.all_input_nodes or written_arguments(node):
        return False
    leaves = pytree.tree_leaves(fake_value(node))
    return bool(leaves) and all(_shares(leaf, memory) for leaf in leaves)


def _shares(leaf: Any, memory: set[int | None]) -> bool:
    if isinstance(leaf, torch.Tensor):
        return memory_id(leaf) in memory
    return isinstance(leaf, int | torch.SymInt)
